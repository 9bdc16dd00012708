"""Measurements that can be compared: every model in the same rounds, every sample kept.

Two runs one after the other differ by up to 10 % on a shared computer although nothing changed; the same runs interleaved in blocks
differ by 1-2 %. So models that will be compared are timed together, and only ratios within a round are trusted.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from edgeprune.devices.board import MAX_REJECTED_RATIO, Board
from edgeprune.devices.plans import KERNEL, Loaded, Timing, TimingPlan
from edgeprune.errors import DeviceError, Unreliable
from edgeprune.progress import Progress
from edgeprune.records.formats import FilePrecision
from edgeprune.records.measurement import Block, Comparison, Fingerprint, Measurement
from edgeprune.records.statistics import CONFIDENCE, centre

CHUNK_FILES = 64
CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class ModelFile:
    """One file to time. ``name`` is unique within a measurement; it is also the key under which the board knows the model."""

    name: str
    content: bytes
    precision: FilePrecision
    sha256: str


def measure(
    board: Board,
    models: Sequence[ModelFile],
    *,
    runtime: str,
    threads: int,
    plan: TimingPlan,
    purpose: str = "",
) -> list[Measurement]:
    """Latency of every file, in the order given, timed in the same rounds.

    Args:
        board: where to time.
        models: the files, with different names.
        runtime: what runs them.
        threads: threads of the runtime.
        plan: how long to look.
        purpose: see :meth:`Board.time`.

    Returns:
        One measurement for each file; ``unreliable`` says when over 30 % of its blocks were rejected.

    Raises:
        Unreliable: every block of a file was rejected.
        DeviceError: a file did not load, or the board failed.
    """
    found = [(model, runtime, threads) for model in models]
    return measure_mixed(board, found, plan=plan, purpose=purpose)


def measure_mixed(
    board: Board,
    models: Sequence[tuple[ModelFile, str, int]],
    *,
    plan: TimingPlan,
    purpose: str = "",
) -> list[Measurement]:
    """As :func:`measure`, with a runtime and its threads for every file, so that files of different formats meet the same noise."""
    names = [model.name for model, _, _ in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models that are timed together must have different names, got {names}")
    fingerprints = [board.fingerprint(runtime, threads) for _, runtime, threads in models]
    try:
        loaded = [
            board.load(model.name, model.content, runtime=runtime, threads=threads)
            for model, runtime, threads in models
        ]
        timing = board.time(names, plan, purpose=purpose)
    except BaseException:
        forget(board, names)
        raise
    board.unload(names)
    at = datetime.now(timezone.utc).isoformat()
    return [
        require_some(_measurement(model, facts, timing, fingerprint, at))
        for (model, _, _), facts, fingerprint in zip(models, loaded, fingerprints, strict=True)
    ]


def require_some(measurement: Measurement) -> Measurement:
    """The measurement, when at least one of its blocks counts.

    Raises:
        Unreliable: every block was rejected; names the most frequent reason.
    """
    if measurement.samples_ns():
        return measurement
    ((reason, count),) = measurement.rejections().most_common(1)
    raise Unreliable(
        f"all {len(measurement.blocks)} blocks of {measurement.name} were rejected, {count} of them because: {reason}",
        hint="end other programs on the board, cool it, and run it again",
    )


def disturbed(name: str, blocks: Sequence[Block]) -> str | None:
    """Why a model's blocks should not be believed: over 30 % of them were rejected."""
    rejected = sum(block.rejected is not None for block in blocks)
    if rejected <= MAX_REJECTED_RATIO * len(blocks):
        return None
    return f"{rejected} of {len(blocks)} blocks of {name} were rejected"


def forget(board: Board, names: Sequence[str]) -> None:
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
        peak_memory_bytes=timing.peak_memory_bytes.get(model.name),
        unreliable=timing.unreliable or disturbed(model.name, timing.blocks[model.name]),
        stop_reason=timing.stop_reason,
        notes=timing.notes,
    )


def compare(
    candidate: Measurement,
    reference: Measurement,
    *,
    confidence: float = CONFIDENCE,
    mixed: bool = False,
) -> Comparison:
    """A candidate against a reference of the same :func:`measure` call; ``mixed`` allows the runtimes of :func:`measure_mixed` to differ.

    Returns:
        The ratio of block medians: its centre over loads (:func:`paired_log_ratios`), with an interval of at least ``confidence``. Where
        there are too few for that (under 8 for 99 %) it is the full range, and the result's ``confidence`` says what it covers.

    Raises:
        ValueError: the two were not timed together, so their rounds have nothing in common.
    """
    is_one_stand = mixed or candidate.fingerprint_key == reference.fingerprint_key
    if not is_one_stand or candidate.at != reference.at:
        raise ValueError(
            f"{candidate.name!r} and {reference.name!r} must be timed together to be compared"
        )
    ratios = paired_log_ratios(candidate.blocks, reference.blocks)
    if not ratios:
        raise ValueError(f"{candidate.name!r} and {reference.name!r} share no accepted round")
    found = centre(ratios, confidence)
    return Comparison(
        candidate=candidate.name,
        reference=reference.name,
        ratio=math.exp(found.estimate),
        low=math.exp(found.low),
        high=math.exp(found.high),
        confidence=found.coverage,
        rounds=len(ratios),
    )


def paired_log_ratios(candidate: Sequence[Block], reference: Sequence[Block]) -> list[float]:
    """Log of candidate / reference, a value for each load of the two: the mean over the rounds in which both blocks were accepted.

    Rounds of one load are no independent values: the placement in memory that it drew biases them all. Where the models were loaded
    only once, there is nothing better than a value for each round.
    """
    theirs = {b.round: b for b in reference if b.rejected is None}
    by_load: dict[tuple[int, int], list[float]] = {}
    for b in candidate:
        if b.rejected is None and b.round in theirs:
            ratio = statistics.median(b.samples_ns) / statistics.median(theirs[b.round].samples_ns)
            by_load.setdefault((b.session, b.load), []).append(math.log(ratio))
    if len({(b.session, b.load) for b in candidate}) == 1:
        return [ratio for ratios in by_load.values() for ratio in ratios]
    return [statistics.fmean(ratios) for ratios in by_load.values()]


def time_kernels(
    board: Board,
    files: Mapping[str, bytes],
    *,
    runtime: str,
    threads: int,
    progress: Progress,
    plan: TimingPlan = KERNEL,
    purpose: str = "",
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
        purpose: see :meth:`Board.time`; a number is added to it for each request.

    Raises:
        DeviceError: no file loads, or the board failed.
    """
    times: dict[str, float] = {}
    problem = ""
    with progress.bar("timing kernels", len(files)) as bar:
        for number, chunk in enumerate(chunks(files)):
            part = f"{purpose}-{number}" if purpose else ""
            timed = time_chunk(
                board, chunk, runtime=runtime, threads=threads, plan=plan, purpose=part
            )
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
    board: Board,
    files: Mapping[str, bytes],
    *,
    runtime: str,
    threads: int,
    plan: TimingPlan,
    purpose: str = "",
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
        timing = board.time(keys, plan, purpose=purpose) if keys else None
    finally:
        forget(board, keys)
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
