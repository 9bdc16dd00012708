"""The sections of the page that show the result: gates, variants, accuracy and samples."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.records.measurement import Measurement
from edgeprune.records.report import Gate, Report, VariantRow
from edgeprune.report import charts, facts, timing_charts, timing_text
from edgeprune.report.figures import (
    NONE,
    TimeUnit,
    bytes_text,
    change_text,
    count_text,
    in_unit,
    quality_text,
    share_text,
    significant,
    speed_text,
    time_text,
    time_unit,
    unit_text,
)
from edgeprune.report.markup import Column, Markup, pairs, table, tag


def section(key: str, title: str, *children: str | None) -> Markup:
    """A titled section with an anchor."""
    parts = [c for c in children if c]
    return tag(
        "section",
        tag("h2", title, id=f"{key}-title"),
        *parts,
        id=key,
        aria_labelledby=f"{key}-title",
    )


def side_by_side(*drawings: Markup | None) -> Markup | None:
    """Charts and text beside each other where there is room."""
    found = [d for d in drawings if d]
    return tag("div", *found, class_="figures") if found else None


def note(*children: str) -> Markup:
    """A muted paragraph."""
    return tag("p", *children, class_="note")


def unreliable_banner(reasons: Sequence[str], where: str) -> Markup:
    """Says, before anything is read, that times were disturbed and why."""
    title = tag("strong", "Unreliable times. ")
    text = f"{'; '.join(reasons)}. Measure again before you rely on any time {where}."
    return tag("aside", title, text, class_="banner unreliable", role="note")


def gates(report: Report) -> Markup:
    """What was promised, and whether the exported file keeps it on the device."""
    n = facts.ledger_n(report)
    rows = [
        (
            gate.name,
            _verdict(gate),
            NONE if gate.not_run else found_text(gate, n),
            unit_text(gate.limit, gate.unit, n),
            gate.note or NONE,
        )
        for gate in report.gates
    ]
    columns = [
        Column("gate"),
        Column("verdict"),
        Column("found", True),
        Column("limit", True),
        Column("note"),
    ]
    if not rows:
        return section("gates", "Gates", note("No gate was judged."))
    where = report.device if report.stamp == "measured" else f"{report.device}, {report.stamp}"
    caption = f"Each gate, judged on the exported file ({where})"
    if facts.not_run(report):
        caption = (
            f"What was judged, on another file of the same net ({where}), and what was not run"
        )
    budget = f"Budget as asked: {report.budget}, which is {time_text(report.limit_ms, 4)} here. "
    return section(
        "gates",
        "Gates",
        table(caption, columns, rows),
        note(
            budget,
            f"{judged_note(report)} ".lstrip(),
            f"Ships {report.shipped.upper()}: {report.shipped_reason}.",
        ),
    )


def budget_text(report: Report) -> str:
    """The figure that the budget was judged on, beside the budget: it need not be the median, which was taken at another moment."""
    gate = facts.latency_gate(report)
    if gate is None or (gate.unit == "ms" and gate.high is None):
        return f"budget {time_text(report.limit_ms)}"
    found = found_text(gate, facts.ledger_n(report))
    if gate.unit == "ms":
        return f"judged on {found}; budget {time_text(report.limit_ms)}"
    return f"judged on {found} in the same rounds; budget {share_text(gate.limit, 2)}"


def found_text(gate: Gate, n: int) -> str:
    """What a gate found; with an interval, its upper end follows, which was judged."""
    found = unit_text(gate.value, gate.unit, n)
    if gate.high is None:
        return found
    high = unit_text(gate.high, gate.unit, n)
    return f"{found}, up to {high.removesuffix(f' {gate.unit}') if gate.unit != 'ms' else high}"


def judged_note(report: Report) -> str:
    """Which figure the latency gate was judged on, where it has an interval."""
    gate = facts.latency_gate(report)
    if gate is None or gate.high is None:
        return ""
    return "Latency is judged on the upper end of its interval (99 % where it was loaded often enough)."


def _verdict(gate: Gate) -> Markup:
    # What was not judged is neither good nor bad.
    kind = "stamp" if gate.not_run else "good" if gate.met else "bad"
    return tag("span", facts.verdict_text(gate), class_=f"chip {kind}")


def variants(report: Report) -> Markup:
    """The four files; every ratio is against the dense model in the same precision."""
    if not report.variants:
        return section("variants", facts.variants_title(report), note("No variant was timed."))
    unit = time_unit([r.p90_ms for r in report.variants])
    columns = [
        Column("variant"),
        Column(f"median, {unit}", True),
        Column(f"p90, {unit}", True),
        Column("spread", True),
        Column("speed-up against dense, same precision", True),
        Column(facts.metric(report), True),
        Column("size", True),
        Column("parameters", True),
        Column("MACs", True),
    ]
    n = facts.ledger_n(report)
    rows = [_variant_cells(report, row, unit, n) for row in report.variants]
    shipped = [
        "shipped" if (r.variant, r.precision) == ("pruned", report.shipped) else ""
        for r in report.variants
    ]
    return section(
        "variants",
        facts.variants_title(report),
        table(
            f"Dense and pruned, FP32 and INT8 ({report.stamp} times)",
            columns,
            rows,
            row_classes=shipped,
        ),
        side_by_side(charts.variant_bars(report), _reading(report)),
    )


def _variant_cells(report: Report, row: VariantRow, unit: TimeUnit, n: int) -> tuple[str, ...]:
    return (
        charts.variant_name(row),
        in_unit(row.median_ms, unit),
        in_unit(row.p90_ms, unit),
        f"±{share_text(row.spread_ratio)}",
        speed_cell(report, row),
        quality_text(row.quality, n),
        bytes_text(row.size_bytes),
        count_text(row.parameters),
        count_text(row.macs),
    )


def speed_cell(report: Report, row: VariantRow) -> str:
    """A speed-up with its interval, where rounds were compared."""
    if row.variant == "dense":
        return "reference"
    found = facts.interval(report, row)
    if found is None or found.low <= 0:
        return speed_text(row.ratio_to_dense)
    return f"{speed_text(row.ratio_to_dense)} ({interval_text(found.low, found.high)})"


def interval_text(low_ratio: float, high_ratio: float) -> str:
    """The speed-ups that bound a ratio, lower first."""
    return f"{significant(1 / high_ratio)} to {speed_text(low_ratio)}"


def _reading(report: Report) -> Markup:
    return tag(
        "div",
        tag("h3", "How to read this"),
        note(
            "The highlighted row ships. Median is the median of the session medians, each over the blocks of one process; p90 is over all "
            "samples and errs to the slow side (early stopping of MLPerf Inference); spread is half the inter-quartile range of the block "
            "medians over their median: how far blocks disagree."
        ),
        note(
            "Speed-ups compare pruned with dense in one precision, load by load; the interval in brackets is that of the signed-rank test."
        )
        if report.comparisons
        else "",
        _quantising(report) or "",
    )


def _quantising(report: Report) -> Markup | None:
    fp32, int8 = facts.variant(report, "dense", "fp32"), facts.variant(report, "dense", "int8")
    if fp32 is None or int8 is None or fp32.median_ms <= 0:
        return None
    return note(
        "Quantising alone, without pruning: dense INT8 runs at ",
        tag("strong", speed_text(int8.median_ms / fp32.median_ms)),
        " the speed of dense FP32. That gain is counted in no speed-up of the table.",
    )


def accuracy(report: Report) -> Markup:
    """Where accuracy was lost and won back."""
    steps = facts.ledger_steps(report.ledger)
    if not steps:
        return section("accuracy", "Accuracy ledger", note("The ledger is empty."))
    worst = facts.worst_step(steps)
    rows = [
        (
            f"{s.entry.stage}" if s.against or s is steps[0] else f"{s.entry.stage} (reference)",
            s.entry.precision.upper(),
            s.entry.where,
            s.entry.metric,
            quality_text(s.entry.value, s.entry.n),
            NONE if s.change is None else change_text(s.change, s.entry.n),
            NONE if s.against is None else f"{s.against.stage} {s.against.precision.upper()}",
            str(s.entry.n),
            s.entry.note or NONE,
        )
        for s in steps
    ]
    columns = [
        Column("stage"),
        Column("precision"),
        Column("where"),
        Column("metric"),
        Column("value", True),
        Column("change", True),
        Column("against"),
        Column("samples", True),
        Column("note"),
    ]
    return section(
        "accuracy",
        "Accuracy ledger",
        side_by_side(
            charts.ledger_steps(report),
            tag("ul", *(tag("li", s) for s in (*ledger_summary(report), *_footing(report)))),
        ),
        table(
            f"Quality after every stage, on the {steps[0].entry.split} split",
            columns,
            rows,
            row_classes=["worst" if s is worst else "" for s in steps],
        ),
    )


def ledger_summary(report: Report) -> list[str]:
    """Sentences: which stage lost most, which won most back, and what is left of it."""
    steps = facts.ledger_steps(report.ledger)
    worst, best, net = facts.worst_step(steps), facts.best_step(steps), facts.net_change(steps)
    n = facts.ledger_n(report)
    parts = []
    if worst is None:
        parts.append("No stage lost accuracy.")
    elif worst.change is not None:
        parts.append(
            f"The stage that lost most: {worst.entry.stage}, {change_text(worst.change, n)}."
        )
    if best is not None and best.change is not None:
        parts.append(f"Won back most: {best.entry.stage}, {change_text(best.change, n)}.")
    if net is not None:
        parts.append(f"From dense to the last stage: {change_text(net, n)}.")
    return parts


def _footing(report: Report) -> list[str]:
    """What the quality figures stand on."""
    lines = []
    if facts.metric(report) == "agreement":
        lines.append(
            "There are no labels: agreement is the share of samples answered as the dense model answers."
        )
    if report.test_quality:
        shown = ", ".join(
            f"{k} {quality_text(v, report.test_n)}" for k, v in report.test_quality.items()
        )
        lines.append(f"On the test split ({report.test_n} samples, read once): {shown}.")
    return lines


def samples(report: Report) -> Markup:
    """Every sample behind the medians, and the state of the device while they were taken."""
    timed = facts.timed_variants(report)
    if not timed:
        text = "The samples of the variants are not in this report."
        return section("samples", "Latency samples", note(text))
    rows = [
        (
            charts.variant_name(row),
            str(len(m.samples_ns())),
            str(max((b.calls_per_sample for b in m.blocks), default=0)),
            f"{len(m.block_medians_ns())} of {len(m.blocks)}",
            time_text(m.load_ns / 1e6),
            time_text(m.first_ns / 1e6),
            timing_text.memory_text(m),
            timing_text.p99_text(m),
            timing_text.sessions_text(m),
            timing_text.drift_text(m),
            _telemetry(m),
            timing_text.rejected_text(m),
        )
        for row, m in timed
    ]
    columns = [
        Column("variant"),
        Column("samples", True),
        Column("calls a sample", True),
        Column("blocks kept", True),
        Column("load", True),
        Column("first call", True),
        Column("peak memory", True),
        Column("p99", True),
        Column("sessions and their medians"),
        Column("sentinel drift", True),
        Column("device before → after"),
        Column("blocks left out"),
    ]
    return section(
        "samples",
        "Latency samples",
        side_by_side(timing_charts.drift(report), timing_charts.ecdf(report)),
        table(f"How the {report.stamp} times were taken", columns, rows),
    )


def _telemetry(measurement: Measurement) -> str:
    before, after = measurement.before, measurement.after
    parts = []
    if before.load_1min is not None and after.load_1min is not None:
        parts.append(f"load {before.load_1min:.2f} → {after.load_1min:.2f}")
    if before.temperature_c is not None and after.temperature_c is not None:
        parts.append(f"{before.temperature_c:.0f} → {after.temperature_c:.0f} °C")
    if before.clock_hz and after.clock_hz:
        parts.append(f"{before.clock_hz / 1e9:.2f} → {after.clock_hz / 1e9:.2f} GHz")
    if before.throttled or after.throttled:
        parts.append("throttled")
    return ", ".join(parts) or NONE


def sustained(report: Report) -> Markup | None:
    """How fast the shipped file stays, where that was asked for."""
    if report.sustained is None:
        return None
    rows = timing_text.sustained_rows(report.sustained)
    return section(
        "sustained",
        "Sustained latency",
        side_by_side(timing_charts.sustained(report.sustained), pairs(rows)),
        note(f"Times are {report.sustained.stamp}. The latency gate is judged on the steady time."),
    )
