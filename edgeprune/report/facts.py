"""What a report implies: who is compared with whom, what each stage lost, where the time went. No formatting here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeprune.records.measurement import Comparison, Measurement
from edgeprune.records.names import Precision, Stamp
from edgeprune.records.plan import LatencyModelQuality, PlanCheck, PruningPlan
from edgeprune.records.report import Gate, LedgerEntry, Report, StageCost, VariantRow

KINDS = ("training", "conversion", "measuring", "other")
# How the names of targets begin, and what people call such a thing.
_BOARDS = {
    "rpi": "a Raspberry Pi",
    "jetson": "a Jetson",
    "android": "an Android phone",
    "iphone": "an iPhone",
}


class PlannedStructure(Protocol):
    """What a report and the result of a search both say of a plan."""

    @property
    def plan(self) -> PruningPlan:
        """The chosen structure."""

    @property
    def checks(self) -> tuple[PlanCheck, ...]:
        """Structures that were timed before any training."""

    @property
    def latency_model(self) -> LatencyModelQuality:
        """How well latency is predicted."""

    @property
    def pareto(self) -> tuple[tuple[float, float], ...]:
        """Milliseconds and nats, both predicted."""

    @property
    def limit_ms(self) -> float:
        """The budget."""

    @property
    def stamp(self) -> Stamp:
        """What times are to be called."""


def earlier_kernels(model: LatencyModelQuality) -> str:
    """How many of the kernels were timed before this run, to be put behind their number; empty when none was."""
    return f" ({model.kernels_taken} by an earlier search)" if model.kernels_taken else ""


@dataclass(frozen=True)
class LedgerStep:
    """A ledger line with the line it is judged against.

    ``change`` is the difference to ``against`` (a ratio in [-1, 1]); ``None`` where the metric or the model is another.
    """

    entry: LedgerEntry
    against: LedgerEntry | None
    change: float | None


@dataclass(frozen=True)
class ShippedOutcome:
    """The shipped file against the dense models, as far as they were timed.

    ``ratio`` is latency over dense latency in the same precision; ``quality_change`` is against dense in the same precision,
    ``quality_change_fp32`` against dense FP32. ``interval`` is the paired comparison behind ``ratio``.
    """

    row: VariantRow
    ratio: float
    interval: Comparison | None
    quality_change: float | None
    quality_change_fp32: float | None
    size_ratio: float | None


def variant(report: Report, name: str, precision: Precision) -> VariantRow | None:
    """One of the four variants, if it is there."""
    found = (r for r in report.variants if r.variant == name and r.precision == precision)
    return next(found, None)


def variants_title(report: Report) -> str:
    """What stands over the variants; they are three where the pruned INT8 file was refused."""
    return "The four variants" if len(report.variants) in (0, 4) else "The variants"


def outcome(report: Report) -> ShippedOutcome | None:
    """The shipped variant and what it is compared with; ``None`` when it was not timed."""
    row = variant(report, "pruned", report.shipped)
    if row is None:
        return None
    same = variant(report, "dense", report.shipped)
    fp32 = variant(report, "dense", "fp32")
    return ShippedOutcome(
        row=row,
        ratio=row.ratio_to_dense,
        interval=interval(report, row),
        quality_change=None if same is None else row.quality - same.quality,
        quality_change_fp32=None if fp32 is None else row.quality - fp32.quality,
        size_ratio=None
        if same is None or same.size_bytes == 0
        else row.size_bytes / same.size_bytes,
    )


def interval(report: Report, row: VariantRow) -> Comparison | None:
    """The interleaved comparison of a pruned row with the dense row of the same precision."""
    dense = variant(report, "dense", row.precision)
    if dense is None or row.variant == "dense":
        return None
    names = {row.measurement: {row.measurement}, dense.measurement: {dense.measurement}}
    for key in names:
        if key in report.measurements:
            names[key].add(report.measurements[key].name)
    pairs = (
        c
        for c in report.comparisons
        if c.candidate in names[row.measurement] and c.reference in names[dense.measurement]
    )
    return next(pairs, None)


def timed_variants(report: Report) -> list[tuple[VariantRow, Measurement]]:
    """The variants whose samples are in the report, were not all rejected and are not zero."""
    pairs = [(row, report.measurements.get(row.measurement)) for row in report.variants]
    return [(r, m) for r, m in pairs if m is not None and any(m.samples_ns()) and m.median_ms > 0]


def ledger_steps(ledger: Sequence[LedgerEntry]) -> tuple[LedgerStep, ...]:
    """Each line with its predecessor: the last earlier line of the same metric, in the same precision if there is one.

    A second ``dense`` line is a reference (say, the dense INT8 file), not a stage: it has no predecessor and is none.
    """
    chain: list[LedgerEntry] = []
    steps = []
    for entry in ledger:
        if entry.stage == "dense" and chain:
            steps.append(LedgerStep(entry, None, None))
            continue
        comparable = [e for e in chain if e.metric == entry.metric]
        same = [e for e in comparable if e.precision == entry.precision]
        against = next(reversed(same or comparable), None)
        change = None if against is None else entry.value - against.value
        steps.append(LedgerStep(entry, against, change))
        chain.append(entry)
    return tuple(steps)


def worst_step(steps: Sequence[LedgerStep]) -> LedgerStep | None:
    """The step that lost most; ``None`` when no step lost anything."""
    losses = [s for s in steps if s.change is not None and s.change < 0]
    return min(losses, key=lambda s: s.change or 0.0, default=None)


def best_step(steps: Sequence[LedgerStep]) -> LedgerStep | None:
    """The step that won most back; ``None`` when no step gained."""
    gains = [s for s in steps if s.change is not None and s.change > 0]
    return max(gains, key=lambda s: s.change or 0.0, default=None)


def net_change(steps: Sequence[LedgerStep]) -> float | None:
    """The last stage against the first line, when both show the same metric."""
    stages = [s.entry for s in steps if s.against is not None]
    if not stages or not steps or steps[0].entry.metric != stages[-1].metric:
        return None
    return stages[-1].value - steps[0].entry.value


def seconds_by_kind(stages: Sequence[StageCost]) -> dict[str, float]:
    """Seconds of each kind of work, in a fixed order, kinds without any left out."""
    totals = {kind: sum(s.seconds for s in stages if s.kind == kind) for kind in KINDS}
    return {kind: seconds for kind, seconds in totals.items() if seconds > 0}


def missed_gates(report: Report) -> list[Gate]:
    """The gates that were not met."""
    return [gate for gate in report.gates if gate.missed]


def verdict_text(gate: Gate) -> str:
    """``met``, ``missed`` or ``not run``."""
    return "not run" if gate.not_run else "met" if gate.met else "missed"


def ledger_n(report: Report) -> int:
    """Samples behind the quality figures (0 when the ledger is empty)."""
    return max((entry.n for entry in report.ledger), default=0)


def metric(report: Report) -> str:
    """What quality means in this report."""
    return report.ledger[0].metric if report.ledger else "quality"


def wilson(value: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share that was observed over ``n`` independent samples.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22(158).
    """
    z = 1.96
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def scope_note(plan: PruningPlan) -> str:
    """What the scope local says about a plan, as one sentence; empty for a global one."""
    if plan.scope == "global":
        return ""
    return "Every group keeps the same share of its channels, as near as its widths come to it (scope local)."


def check_error(predicted_ms: float, measured_ms: float) -> float:
    """How far a prediction was off, as a share of the measured time (positive: predicted too slow)."""
    return predicted_ms / measured_ms - 1 if measured_ms > 0 else 0.0


def stamp_banner(report: Report) -> tuple[str, str] | None:
    """Title and sentence of the warning that must stand over figures that no real board produced."""
    machine = report.fingerprint.machine
    if report.stamp == "stand-in":
        return (
            "Stand-in figures",
            f"Every time in this report was measured on this {machine} machine ({report.fingerprint.cpu_model}), not on "
            f"{board(report)}. They show that the method works; they say nothing about the speed there.{_not_run_text(report)}",
        )
    if report.stamp == "emulated":
        return (
            "Emulated board",
            f"The {machine} board was emulated in software. Files, runtimes and numerics are real; the times are not those of "
            f"{board(report)} and carry no meaning as speed.",
        )
    return None


def _not_run_text(report: Report) -> str:
    """What a reader of a file that was never run must know before the figures."""
    if not not_run(report):
        return ""
    return " The file that ships was not run at all: times and answers are those of another file of the same net."


def unreliable(report: Report) -> list[str]:
    """Why figures of this report should not be believed, each reason once."""
    found = [m.unreliable for m in report.measurements.values() if m.unreliable is not None]
    return list(dict.fromkeys(found))


def not_run(report: Report) -> list[Gate]:
    """The gates that could not be judged, because nothing here runs the file that ships."""
    return [gate for gate in report.gates if gate.not_run]


def is_best_effort(report: Report) -> bool:
    """Whether a promise was broken, which is not said of a gate that could not be judged."""
    return bool(missed_gates(report)) or not (report.passed or not_run(report))


def is_sure(report: Report) -> bool:
    """Whether every gate was judged and met, by times that can be believed."""
    return report.passed and not unreliable(report)


def verdict(report: Report) -> str:
    """What a report says first. A promise that was kept by doubtful times says so."""
    if is_best_effort(report):
        return "BEST EFFORT"
    if not_run(report):
        return "NOT VERIFIED: THE FILE THAT SHIPS WAS NOT RUN"
    return "PASSED ON UNRELIABLE TIMES" if unreliable(report) else "PASSED"


def short_verdict(report: Report) -> str:
    """The verdict in a column of a table."""
    if is_best_effort(report):
        return "BEST EFFORT"
    if not_run(report):
        return "NOT VERIFIED"
    return "PASSED, UNRELIABLE" if unreliable(report) else "PASSED"


def latency_gate(report: Report) -> Gate | None:
    """The gate that the budget was judged by, if one was."""
    return next((gate for gate in report.gates if gate.name == "latency"), None)


def board(report: Report) -> str:
    """What the target stands for, as people call it."""
    target = report.target
    known = (name for start, name in _BOARDS.items() if target.startswith(start))
    name = next(known, "")
    return f"{name} (target {target})" if name else f"the board of target {target}"
