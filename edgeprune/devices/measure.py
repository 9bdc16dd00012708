"""Measurements that can be compared: every model in the same rounds, every sample kept.

Two runs one after the other differ by up to 10 % on a shared computer although nothing changed; the same runs interleaved in blocks
differ by 1-2 %. So models that will be compared are timed together, and only ratios within a round are trusted.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import comb

from edgeprune.devices.board import KERNEL, Board, Loaded, Timing, TimingPlan
from edgeprune.errors import DeviceError
from edgeprune.progress import Progress
from edgeprune.results import Comparison, Fingerprint, Measurement
from edgeprune.specs import Precision

CONFIDENCE = 0.99
CHUNK_FILES = 64
CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class ModelFile:
    """One file to time. ``name`` is unique within a measurement; it is also the key under which the board knows the model."""

    name: str
    content: bytes
    precision: Precision
    sha256: str


def measure(
    board: Board,
    models: Sequence[ModelFile],
    *,
    runtime: str,
    threads: int,
    plan: TimingPlan,
    keep_loaded: bool = False,
) -> list[Measurement]:
    """Latency of every file, in the order given, timed in the same rounds.

    Args:
        board: where to time.
        models: the files, with different names.
        runtime: what runs them.
        threads: threads of the runtime.
        plan: how long to look.
        keep_loaded: leave the models on the board, for :meth:`Board.infer` and :meth:`Board.profile`.

    Raises:
        DeviceError: a file did not load, or the board failed.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models that are timed together must have different names, got {names}")
    fingerprint = board.fingerprint(runtime, threads)
    try:
        loaded = [
            board.load(model.name, model.content, runtime=runtime, threads=threads)
            for model in models
        ]
        timing = board.time(names, plan)
    except BaseException:
        _forget(board, names)
        raise
    if not keep_loaded:
        board.unload(names)
    at = datetime.now(timezone.utc).isoformat()
    return [
        _measurement(model, facts, timing, fingerprint, at)
        for model, facts in zip(models, loaded, strict=True)
    ]


def _forget(board: Board, names: Sequence[str]) -> None:
    """Unload on the way out of an error; a board that is gone has nothing to unload."""
    with contextlib.suppress(DeviceError):
        board.unload(names)


def _measurement(
    model: ModelFile, facts: Loaded, timing: Timing, fingerprint: Fingerprint, at: str
) -> Measurement:
    return Measurement(
        name=model.name,
        artifact_sha256=model.sha256,
        precision=model.precision,
        threads=fingerprint.threads,
        load_ns=facts.load_ns,
        first_ns=facts.first_ns,
        blocks=timing.blocks[model.name],
        before=timing.before,
        after=timing.after,
        fingerprint_key=fingerprint.key(),
        stamp=fingerprint.stamp,
        at=at,
    )


def compare(
    candidate: Measurement, reference: Measurement, *, confidence: float = CONFIDENCE
) -> Comparison:
    """A candidate against a reference of the same :func:`measure` call.

    Returns:
        The median over rounds of the ratio of block medians, with an order-statistic interval of at least ``confidence``. Where there are
        too few rounds for that (under 8 for 99 %) it is the full range, and the result's ``confidence`` says what it covers.

    Raises:
        ValueError: the two were not timed together, so their rounds have nothing in common.
    """
    if (candidate.fingerprint_key, candidate.at) != (reference.fingerprint_key, reference.at):
        raise ValueError(
            f"{candidate.name!r} and {reference.name!r} must be timed together to be compared"
        )
    ours, theirs = candidate.block_medians_ns(), reference.block_medians_ns()
    ratios = sorted(ours[number] / theirs[number] for number in ours.keys() & theirs.keys())
    if not ratios:
        raise ValueError(f"{candidate.name!r} and {reference.name!r} share no accepted round")
    rank = _rank(len(ratios), confidence)
    return Comparison(
        candidate=candidate.name,
        reference=reference.name,
        ratio=statistics.median(ratios),
        low=ratios[rank - 1],
        high=ratios[-rank],
        confidence=_coverage(len(ratios), rank),
        rounds=len(ratios),
    )


def _rank(n: int, confidence: float) -> int:
    """The highest rank ``k`` so that the k-th smallest and k-th largest of ``n`` values hold the median that surely, or 1."""
    rank = 1
    while 2 * (rank + 1) <= n and _coverage(n, rank + 1) >= confidence:
        rank += 1
    return rank


def _coverage(n: int, rank: int) -> float:
    """Probability that the median lies between the values of rank ``rank`` from below and from above.

    Fewer than ``rank`` of ``n`` values lie on one side of the median with the binomial probability of ``n`` fair coins.
    """
    return 1.0 - 2.0 * sum(comb(n, below) for below in range(rank)) / 2.0**n


def time_kernels(
    board: Board,
    files: Mapping[str, bytes],
    *,
    runtime: str,
    threads: int,
    progress: Progress,
    plan: TimingPlan = KERNEL,
) -> dict[str, float]:
    """Time of many small files in nanoseconds.

    The figure is the smallest block median over the rounds: for kernels of microseconds it repeats to about 1 %, where the median of all
    blocks moves by up to 6 % (disturbances only ever add time).

    Args:
        board: where to time.
        files: file content by name.
        runtime: what runs them.
        threads: threads of the runtime.
        progress: counts files; a file that the board cannot load is named there and left out of the answer.
        plan: how long to look at each.

    Raises:
        DeviceError: no file loads, or the board failed.
    """
    times: dict[str, float] = {}
    problem = ""
    with progress.bar("timing kernels", len(files)) as bar:
        for chunk in chunks(files):
            timed = time_chunk(board, chunk, runtime=runtime, threads=threads, plan=plan)
            times.update(timed.ns)
            for problem in timed.problems.values():
                progress.say(problem)
            bar.advance(len(chunk))
    if files and not times:
        raise DeviceError(f"no kernel could be timed: {problem}")
    return times


@dataclass(frozen=True)
class TimedChunk:
    """Nanoseconds of each small file that could be timed, and one line for each that could not."""

    ns: dict[str, float]
    problems: dict[str, str]


def time_chunk(
    board: Board, files: Mapping[str, bytes], *, runtime: str, threads: int, plan: TimingPlan
) -> TimedChunk:
    """Time of small files that are loaded at once, as :func:`time_kernels`. Blocks that the board rejected do not count.

    Raises:
        DeviceError: the board failed.
    """
    times: dict[str, float] = {}
    problems: dict[str, str] = {}
    loaded = board.load_many(files, runtime=runtime, threads=threads)
    keys = [key for key, model in loaded.items() if isinstance(model, Loaded)]
    try:
        timing = board.time(keys, plan) if keys else None
    finally:
        _forget(board, keys)
    for key, model in loaded.items():
        if isinstance(model, str):
            problems[key] = f"{key} does not load on device {board.name!r}: {model}"
        elif timing is not None:
            counted = [b for b in timing.blocks[key] if b.rejected is None]
            if counted:
                times[key] = min(float(statistics.median(b.samples_ns)) for b in counted)
            else:
                problems[key] = f"all blocks of {key} were disturbed on device {board.name!r}"
    return TimedChunk(times, problems)


def chunks(files: Mapping[str, bytes], most: int = CHUNK_FILES) -> Iterator[dict[str, bytes]]:
    """Files in groups that a small board holds at once: at most ``most`` files and 64 MiB, or a single larger file."""
    chunk: dict[str, bytes] = {}
    size = 0
    for name, content in files.items():
        if chunk and (len(chunk) == most or size + len(content) > CHUNK_BYTES):
            yield chunk
            chunk, size = {}, 0
        chunk[name] = content
        size += len(content)
    if chunk:
        yield chunk
