"""What the benchmarks write down, and the Markdown that is made from it. No torch here.

Every block names its stamp beside the figures: times of a stand-in are never times of the board it stands in for.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edgeprune.records.base import Record
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.plan import LatencyModelQuality
from edgeprune.records.report import Report
from edgeprune.report import charts, facts
from edgeprune.report.figures import (
    bytes_text,
    count_text,
    in_unit,
    printable,
    quality_text,
    seconds_text,
    share_text,
    signed,
    time_text,
    time_unit,
    unit_text,
)
from edgeprune.report.sections import speed_cell

RESULTS = Path(__file__).parent / "results"


class Check(Record):
    """A structure as predicted and as measured before any training, both as a share of the dense latency."""

    predicted_ratio: float
    measured_ratio: float


class Achieved(Record):
    """How a deployment to one budget came out.

    ``predicted_ms`` was predicted before the chosen structure was measured; ``plan_ratio`` is that measurement, before training.
    ``ratio``, ``low`` and ``high`` are of the shipped file against dense in the same precision, with ``confidence`` over ``rounds``.
    ``quality`` is on the development split, by stage; ``stage_seconds`` leaves out what all budgets share, but for the first.
    """

    searched: Precision
    shipped: Precision
    dense_ms: float
    predicted_ms: float
    plan_ratio: float
    plan_high: float
    ratio: float
    low: float
    high: float
    confidence: float
    rounds: int
    latency_met: bool
    missed_gates: tuple[str, ...]
    slack_ratio: float  # share of the budget that was not used; negative when it was missed
    metric: str
    n: int
    quality: dict[str, float]
    test_quality: dict[str, float]
    test_n: int
    macs_ratio: float
    parameters_ratio: float
    checks: tuple[Check, ...]
    latency_model: LatencyModelQuality
    stage_seconds: dict[str, float]
    load_1min: float | None  # of the device before the final timing


class BudgetRow(Record):
    """One budget. ``message`` says why there is nothing in ``achieved``."""

    budget: str
    asked_ratio: float
    status: Literal["done", "infeasible", "failed", "crashed", "not run"]
    message: str = ""
    seconds: float
    achieved: Achieved | None = None


class BudgetResults(Record):
    """``budgets.json``: one example, one device, several budgets in one run folder."""

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    model: str
    target: str
    device: str
    fingerprint: Fingerprint
    epochs: float
    seed: int
    max_drop: float
    versions: dict[str, str]
    rows: tuple[BudgetRow, ...]
    seconds: float


class Trial(Record):
    """Two models compared once. ``ratio`` is what the rule found, ``true_ratio`` is that of their layers."""

    number: int
    rule: Literal[
        "paired",
        "50 then 50, medians",
        "50 then 50, means",
        "benchmark_model",
        "onnxruntime_perf_test",
    ]
    true_ratio: float
    ratio: float
    verdict: Literal["faster", "slower", "tie", "undecided"] | None = None
    pairs: int | None = None
    seconds: float


class MeasurementResults(Record):
    """``measurement.json``: rules of measurement on chains of equal layers. ``chain_ms`` is by number of layers."""

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    fingerprint: Fingerprint
    layer: str
    block_ms: float
    chain_ms: dict[str, float]
    versions: dict[str, str]
    trials: tuple[Trial, ...]


def stamp_text(fingerprint: Fingerprint) -> str:
    """Where times come from.

    >>> from edgeprune.records.measurement import Fingerprint
    >>> stamp_text(Fingerprint.model_construct(stamp="stand-in", machine="x86_64"))
    'stand-in: x86-64'
    """
    return f"{fingerprint.stamp}: {fingerprint.machine.replace('_', '-')}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the others figures."""
    cells = [[printable(c).replace("|", "\\|") for c in row] for row in (head, *rows)]
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo_block(report: Report) -> str:
    """The four files, the gates and what the run cost."""
    n, stamp = facts.ledger_n(report), stamp_text(report.fingerprint)
    unit = time_unit([r.p90_ms for r in report.variants])
    four = table(
        (
            "file",
            f"median, {unit} ({stamp})",
            f"p90, {unit}",
            "speed-up against dense, same precision",
            f"{facts.metric(report)}, n = {n}",
            "size",
            "parameters",
            "MACs",
        ),
        [
            (
                charts.variant_name(r)
                + (", ships" if (r.variant, r.precision) == ("pruned", report.shipped) else ""),
                in_unit(r.median_ms, unit),
                in_unit(r.p90_ms, unit),
                speed_cell(report, r),
                quality_text(r.quality, n),
                bytes_text(r.size_bytes),
                count_text(r.parameters),
                count_text(r.macs),
            )
            for r in report.variants
        ],
    )
    gates = table(
        ("gate", "verdict", f"found ({stamp})", "limit"),
        [
            (
                g.name,
                "met" if g.met else "missed",
                unit_text(g.value, g.unit, n),
                unit_text(g.limit, g.unit, n),
            )
            for g in report.gates
        ],
        left=2,
    )
    cpu = printable(report.fingerprint.cpu_model)
    intro = (
        f"Target `{report.target}`, timed on `{report.device}` ({cpu}, {report.fingerprint.threads} thread,"
        f" {report.fingerprint.runtime} {report.fingerprint.runtime_version}): **{stamp}**."
        f" {_test_sentence(report)}"
    )
    return "\n\n".join([intro.strip(), four, gates, _costs(report, stamp)])


def _test_sentence(report: Report) -> str:
    if not report.test_quality:
        return ""
    shown = ", ".join(
        f"{k} {quality_text(v, report.test_n)}" for k, v in report.test_quality.items()
    )
    return f"On the test split ({report.test_n} samples, read once): {shown}."


def _costs(report: Report, stamp: str) -> str:
    whole = sum(s.seconds for s in report.stages)
    kinds = facts.seconds_by_kind(report.stages)
    rows = [
        (s.name, s.kind + (", kept from earlier" if s.cached else ""), seconds_text(s.seconds))
        for s in report.stages
    ]
    total = ", ".join(f"{k} {seconds_text(v)}" for k, v in kinds.items() if v)
    return (
        table(("stage", "kind", f"wall time ({stamp})"), [*rows, ("all", "", seconds_text(whole))], left=2)
        + f"\n\n{total}."
    )  # fmt: skip


def budgets_block(results: BudgetResults) -> str:
    """Asked, measured and accuracy for every budget; failures keep their line."""
    stamp = stamp_text(results.fingerprint)
    done = [r.achieved for r in results.rows if r.achieved is not None]
    n = done[0].n if done else 0
    metric = done[0].metric if done else "quality"
    head = (
        "budget",
        f"measured latency, share of dense ({stamp})",
        "99 % interval",
        "met",
        "slack",
        f"{metric}: pruned",
        "compensated",
        "recovered",
        "INT8",
        "wall time",
    )
    rows = [_budget_cells(row, len(head)) for row in results.rows]
    epochs = f"{results.epochs:g} epoch{'' if results.epochs == 1 else 's'}"
    dense = (
        f" On {n} samples, dense has {metric} {quality_text(done[0].quality['dense'], n)}."
        if done
        else ""
    )
    notes = [
        f"{row.budget}: {row.status}: {printable(row.message)}"
        for row in results.rows
        if row.message
    ]
    intro = (
        f"`{results.target}` timed on `{results.device}` ({printable(results.fingerprint.cpu_model)}): **{stamp}**."
        f" {epochs} of healing each.{dense} {_summary(results.rows)}"
        " The first line's wall time holds the stages that all budgets share."
    )
    listed = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join(part for part in (intro.strip(), table(head, rows), listed) if part)


def _budget_cells(row: BudgetRow, width: int) -> list[str]:
    a = row.achieved
    if a is None:
        cells = [row.budget, "", "", row.status]
        return [*cells, *([""] * (width - 5)), seconds_text(row.seconds)]
    met = "no" if not a.latency_met else "yes" if a.high <= row.asked_ratio else "yes, barely"
    stages = (a.quality.get(s) for s in ("pruned", "compensated", "recovered", "int8"))
    return [
        row.budget,
        share_text(a.ratio),
        f"{share_text(a.low)} to {share_text(a.high)}",
        met + (f"; missed {', '.join(a.missed_gates)}" if a.missed_gates else ""),
        f"{signed(a.slack_ratio * 100, 1)} %",
        *("" if value is None else quality_text(value, a.n) for value in stages),
        seconds_text(row.seconds),
    ]


def _summary(rows: Sequence[BudgetRow]) -> str:
    done = [(row, row.achieved) for row in rows if row.achieved is not None]
    if not done:
        return "No budget was deployed."
    met = sum(a.latency_met for _, a in done)
    passed = sum(not a.missed_gates for _, a in done)
    barely = any(a.latency_met and a.high > row.asked_ratio for row, a in done)
    explained = '; "barely" means that the interval reaches over it' if barely else ""
    return (
        f"{met} of {len(done)} deployed files met their latency budget, {passed} met every gate."
        f" Slack is the unused share of the budget{explained}."
    )


def prediction_block(results: BudgetResults) -> str:
    """Predicted against measured latency of the chosen structures, and how the training left it."""
    stamp = stamp_text(results.fingerprint)
    rows = [(row, row.achieved) for row in results.rows if row.achieved is not None]
    if not rows:
        return "No structure was measured."
    shown = [
        (
            row.budget,
            share_text(a.predicted_ms / a.dense_ms),
            share_text(a.plan_ratio),
            _error(a.predicted_ms / a.dense_ms, a.plan_ratio),
            share_text(a.ratio) if a.shipped == a.searched else f"{share_text(a.ratio)} {a.shipped}",
            str(len(a.checks)),
        )
        for row, a in rows
    ]  # fmt: skip
    checks = [c for _, a in rows for c in a.checks]
    errors = [abs(c.predicted_ratio / c.measured_ratio - 1) for c in checks]
    model = rows[0][1].latency_model
    intro = (
        f"Share of the dense latency ({time_text(rows[0][1].dense_ms)}); **{stamp}**. The latency model comes from"
        f" {model.kernels_measured} kernel timings and {model.nets_fitted} whole nets; on {model.nets_held_out} nets that it was"
        f" not fitted on it was {share_text(model.mean_error_ratio)} off on average, {share_text(model.worst_error_ratio)} at worst."
        f" Over all {len(checks)} structures that were checked before training: {share_text(sum(errors) / len(errors))} on average,"
        f" {share_text(max(errors))} at worst."
    )
    head = (
        "budget",
        "predicted",
        f"measured before training ({stamp})",
        "error",
        f"measured as shipped ({stamp})",
        "structures checked",
    )
    return f"{intro}\n\n{table(head, shown)}"


def measurement_block(results: MeasurementResults) -> str:
    """How far rules of measurement err on equal models, and how surely the paired rule finds a true difference."""
    stamp = stamp_text(results.fingerprint)
    equal: dict[str, list[Trial]] = {}
    shifted: dict[float, list[Trial]] = {}
    for trial in results.trials:
        if trial.true_ratio == 1:
            equal.setdefault(trial.rule, []).append(trial)
        if trial.rule == "paired":
            shifted.setdefault(trial.true_ratio, []).append(trial)
    if not results.trials:
        return "No trial was made."
    times = sorted(results.chain_ms.values())
    f = results.fingerprint
    intro = (
        f"Chains of equal layers ({results.layer}) on `{f.device}` ({printable(f.cpu_model)}, {f.cores} cores, {f.runtime}"
        f" {f.runtime_version}, {f.threads} thread): **{stamp}**. A chain takes {time_text(times[0])} to {time_text(times[-1])};"
        f" blocks of {results.block_ms:g} ms."
        ' Trials of all rules take turns while all have some left. "Paired" is the rule of `edgeprune.devices.timing.decide`;'
        " the others time one file after the other, as these tools do, with the same runtime calls."
    )
    parts = [intro]
    if equal:
        head = (
            f"the same file twice ({stamp})",
            "trials",
            "error: median",
            "95 % of trials",
            "within 1.6 %",
            "over 2 %",
            "called different",
            "time",
        )
        parts.append(table(head, [_equal_cells(rule, found) for rule, found in equal.items()]))
    if shifted:
        head = (
            f"paired: true difference ({stamp})",
            "trials",
            "found",
            "wrong direction",
            "tie",
            "undecided",
            "pairs, median",
            "time, median",
        )
        parts.append(table(head, [_shift_cells(r, shifted[r]) for r in sorted(shifted)]))
    return "\n\n".join(parts)


def _equal_cells(rule: str, found: Sequence[Trial]) -> tuple[str, ...]:
    errors = sorted(abs(t.ratio - 1) for t in found)
    n = len(errors)
    different = sum(t.verdict in ("faster", "slower") for t in found)
    return (
        rule,
        str(n),
        share_text(statistics.median(errors), 2),
        share_text(errors[min(n - 1, int(0.95 * n))], 2),
        share_text(sum(e <= 0.016 for e in errors) / n),
        share_text(sum(e > 0.02 for e in errors) / n),
        share_text(different / n) if found[0].verdict is not None else "no rule",
        seconds_text(statistics.median(t.seconds for t in found)),
    )


def _shift_cells(true_ratio: float, found: Sequence[Trial]) -> tuple[str, ...]:
    n, verdicts = len(found), [t.verdict for t in found]
    is_equal = true_ratio == 1
    right = [t for t in found if t.verdict == "slower" and not is_equal]
    wrong = verdicts.count("faster") + (verdicts.count("slower") if is_equal else 0)
    counted = [t.pairs for t in (right or found) if t.pairs is not None]
    return (
        "none" if is_equal else f"+{(true_ratio - 1) * 100:.0f} %",
        str(n),
        "" if is_equal else share_text(len(right) / n),
        share_text(wrong / n),
        share_text(verdicts.count("tie") / n),
        share_text(verdicts.count("undecided") / n),
        f"{statistics.median(counted):g}" if counted else "",
        seconds_text(statistics.median(t.seconds for t in found)),
    )


def _error(predicted: float, measured: float) -> str:
    return f"{signed((predicted / measured - 1) * 100, 1)} %"
