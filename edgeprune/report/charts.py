"""The charts of a report. Each takes the report and gives one SVG, or ``None`` when there is nothing to draw."""

from __future__ import annotations

from edgeprune.records.report import Report, VariantRow
from edgeprune.report import facts
from edgeprune.report.figures import (
    TimeUnit,
    change_text,
    in_unit,
    per_ms,
    quality_text,
    share_text,
    signed,
    significant,
    time_text,
    time_unit,
)
from edgeprune.report.markup import Markup, join, tag
from edgeprune.report.svg import (
    WIDTH,
    Plot,
    Point,
    Scale,
    chart,
    dot,
    label_at,
    line,
    padded,
    path,
    rect,
)


def variant_name(row: VariantRow) -> str:
    """A variant as people read it: ``pruned INT8``."""
    return f"{row.variant} {row.precision.upper()}"


def variant_class(row: VariantRow) -> str:
    """The CSS class that gives a variant its colour in every chart."""
    return f"{row.variant}-{row.precision}"


def variant_bars(report: Report) -> Markup | None:
    """Median and p90 latency of the variants; the budget stands only against the precision that ships."""
    rows = report.variants
    if not rows:
        return None
    longest = max(*(r.p90_ms for r in rows), report.limit_ms)
    unit = time_unit([longest])
    x = Scale(0.0, longest * 1.02 or 1.0, 96.0, WIDTH - 76)
    parts: list[Markup] = []
    y = 4.0
    for precision in dict.fromkeys(r.precision for r in rows):
        top = y = y + 20
        for row in (r for r in rows if r.precision == precision):
            parts.append(_latency_bar(row, x, y, unit))
            y += 26
        if precision == report.shipped:
            at = x(report.limit_ms)
            text = f"budget {time_text(report.limit_ms)}"
            anchor = "end" if at > WIDTH / 2 else "start"
            parts.append(line((at, top - 4), (at, y - 4), "limit"))
            parts.append(label_at(at, top - 8, text, "limit-text", anchor=anchor))
    return chart(
        "Latency of the variants",
        "Bars show the median, thin lines reach the 90th percentile. The budget applies to the precision that ships.",
        y,
        *parts,
    )


def _latency_bar(row: VariantRow, x: Scale, y: float, unit: TimeUnit) -> Markup:
    hint = f"{variant_name(row)}: median {time_text(row.median_ms)}, p90 {time_text(row.p90_ms)}"
    start, end, middle = x(row.median_ms), x(row.p90_ms), y + 9
    value = f"{in_unit(row.median_ms, unit)} {unit}"
    return join(
        label_at(88, y + 13, variant_name(row), "bar-name", anchor="end"),
        rect(x.start, y, start - x.start, 18, f"fill {variant_class(row)}", hint),
        line((start, middle), (end, middle), "whisker"),
        line((end, y + 5), (end, y + 13), "whisker"),
        label_at(WIDTH - 2, y + 13, value, "value", anchor="end"),
    )


def ledger_steps(report: Report) -> Markup | None:
    """Quality after each stage as a staircase that runs downwards; the largest loss is marked."""
    entries = facts.ledger_steps(report.ledger)
    first = entries[0].entry if entries else None
    stages = [s for s in entries if first and s.entry.metric == first.metric]
    if not stages:
        return None
    worst = facts.worst_step(entries)
    values = [s.entry.value for s in stages]
    x = Scale(*padded([*values, max(values) - 0.01]), 146.0, WIDTH - 150)
    parts: list[Markup] = []
    before: Point | None = None
    for index, step in enumerate(stages):
        at = (x(step.entry.value), 14.0 + 28 * index)
        reference = index > 0 and step.against is None
        if before is not None and not reference:
            kind = "worst-line" if step is worst else "step-line"
            parts += [line(before, (before[0], at[1]), kind), line((before[0], at[1]), at, kind)]
        parts.append(_ledger_row(step, at, reference=reference, lost_most=step is worst))
        before = before if reference else at
    return chart(
        f"{facts.metric(report).capitalize()} after each stage",
        "One row a stage; further left is worse. The step that lost most is marked.",
        28.0 * len(stages),
        *parts,
    )


def _ledger_row(step: facts.LedgerStep, at: Point, *, reference: bool, lost_most: bool) -> Markup:
    entry, y = step.entry, at[1] + 4
    name = f"{entry.stage} {entry.precision.upper()}"
    mark = "dot-ref" if reference else "dot-device" if entry.stage == "on-device" else "dot-step"
    note = "reference" if reference else ""
    if step.change is not None:
        note = change_text(step.change, entry.n)
    value = quality_text(entry.value, entry.n)
    return join(
        label_at(134, y, name, "bar-name", anchor="end"),
        dot(at, 5, mark, f"{name}: {value} of {entry.n}"),
        label_at(WIDTH - 84, y, value, "value", anchor="end"),
        label_at(WIDTH - 2, y, note, "worst-text" if lost_most else "tick", anchor="end"),
    )


def pareto(report: facts.PlannedStructure) -> Markup | None:
    """The structures that the search found best, with the one that was chosen."""
    if not report.pareto:
        return None
    plan = report.plan
    unit = time_unit([ms for ms, _ in report.pareto])
    factor = per_ms(unit)
    found = [(ms * factor, cost) for ms, cost in sorted(report.pareto)]
    chosen = (plan.predicted_ms * factor, plan.predicted_cost_nats)
    limit = plan.limit_ms * factor
    plot = Plot(
        Scale(*padded([*(ms for ms, _ in found), chosen[0], limit], 0.05), 52.0, WIDTH - 10),
        Scale(*padded([*(c for _, c in found), chosen[1]], 0.06, zero=True), 276.0, 40.0),
    )
    front = [plot.at(point) for point in found]
    hints = [f"{time_text(ms)} predicted, {significant(c)} nats" for ms, c in sorted(report.pareto)]
    parts = [
        plot.axes(f"predicted latency, {unit}", "predicted cost, nats"),
        _limit_line(plot, limit),
        path(front, "curve pruned-int8"),
        *(dot(at, 2.4, "mark pruned-int8", hint) for at, hint in zip(front, hints, strict=True)),
        _chosen(plot.at(chosen), plan.predicted_ms, plan.predicted_cost_nats),
    ]
    return chart(
        "The path the search walked",
        "Predicted latency against predicted cost before healing, by the models at the end of the search: to the left is faster, upwards"
        " is dearer.",
        316,
        *parts,
    )


def _limit_line(plot: Plot, limit: float) -> Markup:
    x = plot.x(limit)
    anchor = "end" if x > WIDTH * 0.6 else "start"
    return join(
        line((x, plot.top), (x, plot.bottom), "limit"),
        label_at(x, plot.top - 6, "budget", "limit-text", anchor=anchor),
    )


def _chosen(at: Point, ms: float, cost_nats: float) -> Markup:
    """The label stands below and to the left, where a falling front leaves room; to the right near the edge."""
    left = at[0] > 130
    hint = f"chosen: {time_text(ms)} predicted, {significant(cost_nats)} nats"
    return join(
        dot(at, 6.5, "chosen", hint),
        label_at(
            at[0] + (-11 if left else 11),
            at[1] + 14,
            "chosen",
            "value",
            anchor="end" if left else "start",
        ),
    )


def predicted_against_timed(report: facts.PlannedStructure) -> Markup | None:
    """Each checked structure: predicted against timed, with the line where both are equal."""
    checks = report.checks
    if not checks:
        return None
    every = [v for c in checks for v in (c.predicted_ms, c.measured_ms)]
    unit = time_unit(every)
    factor = per_ms(unit)
    low, high = padded([v * factor for v in (*every, report.limit_ms)], 0.08)
    plot = Plot(Scale(low, high, 52.0, WIDTH - 10), Scale(low, high, 276.0, 40.0))
    limit = plot.y(report.limit_ms * factor)
    parts = [
        plot.axes(f"predicted, {unit}", f"{report.stamp}, {unit}"),
        line(plot.at((low, low)), plot.at((high, high)), "identity"),
        line((plot.left, limit), (plot.right, limit), "limit"),
        label_at(plot.right, limit + 15, "budget", "limit-text", anchor="end"),
    ]
    for index, check in enumerate(checks, 1):
        error = facts.check_error(check.predicted_ms, check.measured_ms)
        hint = (
            f"structure {index}: predicted {time_text(check.predicted_ms)}, {report.stamp} "
            f"{time_text(check.measured_ms)}, error {signed(error * 100, 1)} %"
        )
        at = plot.at((check.predicted_ms * factor, check.measured_ms * factor))
        parts.append(dot(at, 5, "dot-good" if check.within_budget else "dot-bad", hint))
        parts.append(label_at(at[0] - 9, at[1] - 5, str(index), "tick", anchor="end"))
    return chart(
        "Predicted against timed",
        "On the dotted diagonal the prediction is exact; above it the structure is slower than predicted. "
        "Filled marks are within the budget.",
        316,
        *parts,
    )


def stage_bar(report: Report) -> Markup | None:
    """One bar of the whole run, split by the kind of work."""
    totals = facts.seconds_by_kind(report.stages)
    whole = sum(totals.values())
    if whole <= 0:
        return None
    parts, x = [], 0.0
    for kind, seconds in totals.items():
        width = WIDTH * seconds / whole
        parts.append(
            rect(
                x,
                0,
                max(0.0, width - 1.5),
                22,
                f"kind-{kind}",
                f"{kind}: {share_text(seconds / whole)}",
            )
        )
        if width > 44:
            parts.append(
                label_at(
                    x + width / 2, 15, share_text(seconds / whole, 0), "on-bar", anchor="middle"
                )
            )
        x += width
    return chart("Where the time of this run went", "Shares by kind of work.", 22, *parts)


def small_bar(share: float, class_: str, *, behind: float = 0.0, hint: str = "") -> Markup:
    """A bar for a table cell: ``share`` of the cell in front, ``behind`` pale behind it; both in [0, 1]."""
    pale = (rect(0, 1, 100 * behind, 8, "pale"),) if behind > 0 else ()
    title = hint or f"{share_text(share, 0)}"
    # Not through chart(): a hundred cells with title and description each would drown a screen reader; the figures stand beside.
    return tag(
        "svg",
        tag("title", title),
        *pale,
        rect(0, 1, max(0.8, 100 * share) if share > 0 else 0, 8, class_),
        viewBox="0 0 100 10",
        class_="cell-bar",
        aria_hidden="true",
    )
