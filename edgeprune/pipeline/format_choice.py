"""Which of a target's formats ships: the dense model in each, timed in the same rounds on the board; the fastest that holds is taken.

The files are those of the dense stage of each format, so the one that wins is not converted again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import compare, measure_mixed
from edgeprune.errors import (
    AuthFailed,
    Busy,
    DeviceError,
    EdgepruneError,
    FormatError,
    HostKeyMismatch,
    LinkLost,
    ModelError,
    Unreachable,
)
from edgeprune.pipeline.context import Context, FormatCandidate, Job
from edgeprune.pipeline.files.int8_types import HOLDS, SAMPLES
from edgeprune.pipeline.files.records import DenseFiles
from edgeprune.pipeline.run_folder import RunFolder, Stage
from edgeprune.pipeline.stages.gates import MIN_BUILT_IN_AGREEMENT
from edgeprune.pipeline.stages.kernels import dense_stage
from edgeprune.records.measurement import Comparison, Measurement
from edgeprune.records.names import Precision
from edgeprune.records.report import FormatChoice, FormatRow
from edgeprune.workload.answers import logits

Making = Callable[[Job], Context]
OF_THE_BOARD = (LinkLost, Unreachable, Busy, HostKeyMismatch, AuthFailed)  # no format is to blame
Key = tuple[str, Precision]


@dataclass(frozen=True)
class _Tried:
    """A format whose dense files could be made and run here, or why they could not."""

    candidate: FormatCandidate
    context: Context | None = None
    dense: Stage[DenseFiles] | None = None
    error: EdgepruneError | None = None

    @property
    def name(self) -> str:
        """Of the format."""
        return self.candidate.target.format

    def refused(self) -> FormatRow:
        """The row of a format that failed as a whole."""
        return FormatRow(
            format=self.candidate.target.format,
            runtime=self.candidate.for_runtime,
            reason=str(self.error),
        )


@dataclass(frozen=True)
class _Ready(_Tried):
    """A format with files to measure."""

    context: Context
    dense: Stage[DenseFiles]


def chosen(job: Job, run: RunFolder, make: Making) -> Context:
    """The context of the fastest format whose answers hold, with the table of all in it.

    Args:
        job: the request; its candidates are what is measured.
        run: where the dense files and the measurement are kept.
        make: a context for a job whose format is decided, on boards that are open.

    Raises:
        FormatError, DeviceError: no format can be made and run here; the error is that of the target's own.
        ModelError: as :func:`edgeprune.pipeline.files.export.dense_files`.
    """
    tried: list[_Tried] = []
    for candidate in job.candidates:
        earlier = next((t.context for t in tried if t.context is not None), None)
        tried.append(_tried(job, candidate, run, make, earlier))
    ready = [t for t in tried if isinstance(t, _Ready)]
    if not ready:
        raise tried[0].error or ValueError("a choice needs candidates")
    first = ready[0].context
    names = ", ".join(t.name for t in ready)
    first.progress.say(f"formats: {names} on {first.board.name}, in the same rounds")
    stage = run.stage(
        "formats",
        "measuring",
        {
            "dense": {t.name: t.dense.digest for t in ready},
            "refused": {t.name: str(t.error) for t in tried if t.error is not None},
            "runtimes": {t.name: t.context.runtime_on(t.context.board) for t in ready},
            "precisions": list(job.target.precisions),
            "device": first.board_key(),
        },
        FormatChoice,
        lambda _: _choice(tried, ready),
    )
    choice = stage.result
    for line in lines(choice):
        first.progress.say(f"      {line}")
    run.notes.append(note(choice, job.target.name))
    winner = next(t for t in ready if t.name == choice.chosen)
    winner.context.formats = choice
    torch.manual_seed(job.seed)  # later stages must not depend on what was converted before
    return winner.context


def _tried(
    job: Job, candidate: FormatCandidate, run: RunFolder, make: Making, earlier: Context | None
) -> _Tried:
    """Convert the dense model, check it against torch, and see that the board runs it; a failure of the format is kept as its reason."""
    name = candidate.target.format
    try:
        context = make(job.in_format(candidate))
        if earlier is not None:
            context.share(earlier)
        if not context.runs_ship:
            raise FormatError(f"{candidate.for_runtime} is not on every machine here")
        dense = dense_stage(context, run, title=f"dense, {name}")
        return _Ready(candidate, context, dense)
    except OF_THE_BOARD:
        raise
    except (FormatError, ModelError, DeviceError) as error:  # one converter may replace an operator
        return _Tried(candidate, error=error)


def _choice(tried: Sequence[_Tried], ready: Sequence[_Ready]) -> FormatChoice:
    """Ask every file, time all of them in the same rounds, and take the fastest that holds."""
    own, first = tried[0], ready[0].context
    x = first.inputs(first.job.loaded.dataset.selection, SAMPLES)
    expected = logits(first.model, torch.from_numpy(x)).argmax(1)
    agreement: dict[Key, float] = {}
    for one in ready:
        for precision in one.candidate.target.precisions:
            path = one.dense.path(one.dense.result.whole(precision).path)
            found = one.context.run_file(one.context.board, path, x).argmax(1)
            agreement[one.name, precision] = float((found == expected).double().mean())
    times = _times(ready)
    rows = [
        _row(one, precision, own.name, agreement, times)
        for one in ready
        for precision in one.candidate.target.precisions
    ]
    failed = [t.refused() for t in tried if t.error is not None]
    best, reason = _best(own.name, ready, rows, times)
    return FormatChoice(
        own=own.candidate.target.format,
        chosen=best.format,
        precision=best.precision,
        reason=reason,
        rows=(*rows, *failed),
        samples=len(x),
        device=first.board.name,
        stamp=first.fingerprint(first.runtime_on(first.board)).stamp,
    )


def _times(ready: Sequence[_Ready]) -> dict[Key, Measurement]:
    keys: list[Key] = []
    files = []
    for one in ready:
        runtime = one.context.runtime_on(one.context.board)
        for precision in one.candidate.target.precisions:
            artifact = one.dense.result.whole(precision)
            path = one.dense.path(artifact.path)
            file = one.context.model_file(f"{one.name}-{precision}", path, artifact)
            keys.append((one.name, precision))
            files.append((file, runtime.name, runtime.threads))
    board = ready[0].context.board
    found = measure_mixed(board, files, plan=SEARCH, purpose="formats")
    return dict(zip(keys, found, strict=True))


def _row(
    one: _Ready,
    precision: Precision,
    own: str,
    agreement: dict[Key, float],
    times: dict[Key, Measurement],
) -> FormatRow:
    """One file: how fast, how it compares with the target's own format, and whether its answers hold."""
    key, measured = (one.name, precision), times[one.name, precision]
    reference = times.get((own, precision))
    against = None
    if reference is not None and reference is not measured:
        against = compare(measured, reference, mixed=True)
    best = max(value for (_, p), value in agreement.items() if p == precision)
    reasons = []
    if agreement[key] < best - HOLDS:
        reasons.append(
            f"it agrees with torch on {agreement[key]:.1%}, another format on {best:.1%}"
        )
    built_in = one.dense.result.built_in_agreement
    if precision == "int8" and built_in is not None and built_in < MIN_BUILT_IN_AGREEMENT:
        reasons.append(f"its built-in and fast kernels agree on {built_in:.1%} only")
    return FormatRow(
        format=one.candidate.target.format,
        runtime=one.candidate.for_runtime,
        precision=precision,
        median_ms=measured.median_ms,
        spread_ratio=measured.spread_ratio,
        ratio=None if against is None else against.ratio,
        ratio_low=None if against is None else against.low,
        ratio_high=None if against is None else against.high,
        agreement=agreement[key],
        holds=not reasons,
        reason="; ".join(reasons),
    )


def _best(
    own: str, ready: Sequence[_Ready], rows: Sequence[FormatRow], times: dict[Key, Measurement]
) -> tuple[FormatRow, str]:
    """The row that wins, and why."""
    # Where a stand-in cannot rank the precisions of a format, only the one that the target is for counts.
    counted = {
        (one.name, p)
        for one in ready
        for p in one.context.precisions(one.candidate.target.precisions)
    }

    def against(one: FormatRow, other: FormatRow) -> Comparison:
        first, second = (times[r.format, r.precision or "fp32"] for r in (one, other))
        return compare(first, second, mixed=True)

    return decide([r for r in rows if (r.format, r.precision) in counted], own, against)


def decide(
    rows: Sequence[FormatRow], own: str, against: Callable[[FormatRow, FormatRow], Comparison]
) -> tuple[FormatRow, str]:
    """The fastest row that holds, and why; the target's ``own`` format stays where another is faster only within the noise.

    Args:
        rows: files that were timed, at least one.
        own: name of the target's own format.
        against: the first row's time over the second's.
    """
    holding = sorted((r for r in rows if r.holds), key=_median)
    if not holding:
        best = max(rows, key=lambda r: r.agreement or 0.0)
        return best, "no format holds; its answers are the nearest to torch's"
    best = holding[0]
    second = next((r for r in holding if r.format != best.format), None)
    if second is None:
        how = "runs here" if len({r.format for r in rows}) == 1 else "holds"
        return best, f"the only format that {how}"
    mine = next((r for r in holding if r.format == own), None)
    if mine is not None and best.format != own:
        found = against(best, mine)
        if found.high >= 1:
            return (
                mine,
                f"the target's own format; {best.format} takes {_share(found)} of its time, within the noise",
            )
    found = against(best, second)
    reason = f"fastest of the formats that hold: {_share(found)} of the time of {second.format}"
    return best, f"{reason}, within the noise" if found.high >= 1 else reason


def _share(found: Comparison) -> str:
    return f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})"


def _median(row: FormatRow) -> float:
    return float("inf") if row.median_ms is None else row.median_ms


def lines(choice: FormatChoice) -> list[str]:
    """The table as lines for the progress."""
    found = []
    for row in choice.rows:
        name = f"{row.format} {row.precision or ''}".strip()
        if row.median_ms is None:
            found.append(f"{name}: not run: {row.reason}")
            continue
        doubt = "" if row.holds else f"; must not ship: {row.reason}"
        found.append(
            f"{name}: {row.median_ms:.4g} ms, same class as torch {row.agreement or 0:.1%}{doubt}"
        )
    return [*found, f"{choice.chosen} ships: {choice.reason}"]


def note(choice: FormatChoice, target: str) -> str:
    """One line for the report; a stand-in is called one."""
    text = f"format by measurement of the dense model: {choice.chosen}, {choice.reason}"
    if choice.stamp == "measured":
        return text
    return (
        f"{text}; chosen on {choice.device} ({choice.stamp}): measure again on a board of {target}"
    )
