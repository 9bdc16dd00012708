"""What a search found, as a page and as text: what each cut saved and cost, what other budgets would give, and how far to trust it."""

from __future__ import annotations

import math

from edgeprune.records.plan import (
    SHARES,
    GroupCurve,
    LatencyModelQuality,
    ParetoPoint,
    PlanResult,
    SearchResult,
)
from edgeprune.report import facts, plan_sections
from edgeprune.report.facts import earlier_kernels
from edgeprune.report.figures import (
    in_unit,
    share_text,
    significant,
    speed_text,
    time_text,
    time_unit,
)
from edgeprune.report.html import masthead, page
from edgeprune.report.markup import Column, Markup, table, tag
from edgeprune.report.sections import note, section, unreliable_banner
from edgeprune.report.svg import WIDTH, Plot, Scale, chart, dot, label_at, padded, rect, steps
from edgeprune.report.terminal import Page, say_cuts

_PANELS_A_ROW = 3
_PANEL_HEIGHT = 118.0
_MOST_PANELS = 60


def other_budgets(found: SearchResult) -> list[tuple[float, ParetoPoint]]:
    """The cheapest structure found that is predicted within each share of the dense latency, as far as there is one."""
    rows: list[tuple[float, ParetoPoint]] = []
    for share in SHARES:
        limit_ms = share * found.plan.dense_ms
        fitting = [p for p in found.points if p.predicted_ms <= limit_ms]
        best = min(fitting, key=lambda p: p.cost_nats, default=None)
        if best is not None:
            rows.append((share, best))
    return rows


def _budget_rows(found: SearchResult) -> list[tuple[str, str, str, str, str]]:
    unit = time_unit([p.predicted_ms for _, p in other_budgets(found)])
    full = {c.group: c.channels for c in found.curves}
    return [
        (
            share_text(share, 0),
            in_unit(p.predicted_ms, unit),
            speed_text(p.predicted_ms / found.plan.dense_ms),
            significant(p.cost_nats),
            share_text(sum(p.widths.values()) / max(1, sum(full[g] for g in p.widths)), 0),
        )
        for share, p in other_budgets(found)
    ]


def _headline(found: SearchResult) -> str:
    plan, chosen = found.plan, found.chosen()
    fits = "fits" if chosen.within_budget else "does not fit for sure"
    return (
        f"{share_text(chosen.ratio_to_dense)} of dense {plan.precision.upper()} ({time_text(chosen.measured_ms)} {found.stamp},"
        f" {time_text(chosen.predicted_ms)} predicted before it was timed); {fits} the budget of {time_text(found.limit_ms)}"
    )


def render_search(found: SearchResult, *, width: int | None = None) -> str:
    """The result as lines of text; ends with a newline.

    Args:
        found: the record; control characters in its names are made visible.
        width: columns; ``None`` takes the terminal's, at most 110.
    """
    text = Page(width, False)
    text.say(_headline(found), "bold")
    if (doubt := found.chosen().unreliable) is not None:
        text.say(f"UNRELIABLE TIMES: {doubt}", "bold red")
    say_cuts(text, found.plan)
    rows = _budget_rows(found)
    if rows:
        unit = time_unit([p.predicted_ms for _, p in other_budgets(found)])
        text.title("What another budget would give (predicted, before healing)")
        text.table(("budget", unit, "speed-up", "cost, nats", "channels left"), rows)
    quality = found.latency_model
    text.say(
        f"Predictions come from {quality.kernels_measured} kernel timings{earlier_kernels(quality)} and"
        f" {quality.nets_fitted} whole nets; on {quality.nets_held_out} others they were"
        f" {share_text(quality.mean_error_ratio)} off on average, {share_text(quality.worst_error_ratio)} at worst.{_left_out(quality)}"
    )
    return text.text()


def _doubt(found: SearchResult) -> list[Markup]:
    """A warning where the structure that counts was timed among disturbances."""
    why = found.chosen().unreliable
    return [] if why is None else [unreliable_banner([why], "on this page")]


def _left_out(quality: LatencyModelQuality) -> str:
    if quality.p95_error_ratio is None:
        return ""
    return f" Each predicted from all others: {share_text(quality.p95_error_ratio)} at the 95th percentile."


def render_plan(plan: PlanResult) -> str:
    """A measured plan in short, as lines of text; ends with a newline."""
    lines = [
        f"{'group':40} {'channels':>8} {'kept':>6} {'saves (predicted)':>18} {'cost (nats)':>12}"
    ]
    for group in plan.plan.groups:
        lines.append(
            f"{group.name:40} {group.channels:8} {len(group.kept):6}"
            f" {group.saved_ms_predicted * 1000:15.1f} us {group.cost_nats:12.2g}"
            + ("" if group.kept else "  block removed")
        )
    if saved := plan_sections.saved_note(plan.plan):
        lines.append(saved)
    if scope := facts.scope_note(plan.plan):
        lines.append(scope)
    last = plan.chosen()
    lines.append(
        f"dense {plan.plan.dense_ms:.4g} ms, budget {plan.plan.limit_ms:.4g} ms,"
        f" measured {last.measured_ms:.4g} ms, predicted {last.predicted_ms:.4g} ms before it was timed"
    )
    if not last.within_budget:
        lines.append(
            "not feasible for sure: the structure above was measured over the budget, or too close to it"
        )
    elif len(plan.plan.groups) == sum(len(g.kept) == g.channels for g in plan.plan.groups):
        lines.append(
            "feasible: the dense model is within the budget already, nothing has to be cut"
        )
    else:
        lines.append(
            "feasible: the structure above was measured within the budget; deploy heals it"
        )
    return "\n".join(lines) + "\n"


def render_search_html(found: SearchResult) -> bytes:
    """The result as a self-contained UTF-8 page; names in it are untrusted and are escaped."""
    unit = time_unit([p.predicted_ms for _, p in other_budgets(found)])
    columns = [
        Column("budget"),
        Column(f"predicted, {unit}", True),
        Column("speed-up", True),
        Column("cost before healing, nats", True),
        Column("channels left", True),
    ]
    rows = _budget_rows(found)
    body = [
        tag("section", tag("h1", _headline(found)), class_="hero", aria_label="Result"),
        *_doubt(found),
        plan_sections.cuts(found),
        section(
            "budgets",
            "What another budget would give",
            table(
                "The cheapest structure found within each share of the dense latency, as predicted",
                columns,
                rows,
            )
            if rows
            else note("There is no faster structure."),
        ),
        section("curves", "What each group could give", _curves(found)),
        plan_sections.predictions(found),
        section("command", "Command", tag("pre", found.command)),
    ]
    return page(
        f"{found.model} for {found.target}: edgeprune search",
        masthead(f"{found.model} → {found.target}", f"{found.device}, {found.created}"),
        body,
        f"edgeprune {found.edgeprune_version}, {found.created}. Nothing was trained. Times are {found.stamp}; figures that no device"
        " produced say predicted.",
    )


def _curves(found: SearchResult) -> Markup:
    """A small staircase for each group: what it saves against what it costs, and where the plan stands."""
    widths = found.plan.widths()
    curves = sorted(found.curves, key=lambda c: -max(choice.saved_ms for choice in c.choices))
    shown = curves[:_MOST_PANELS]
    if not shown:
        return note("No group can be cut.")
    most_ms = max(choice.saved_ms for c in shown for choice in c.choices)
    unit = time_unit([most_ms])
    across = (WIDTH - 20) / _PANELS_A_ROW
    parts: list[Markup] = []
    for number, curve in enumerate(shown):
        left = 10 + across * (number % _PANELS_A_ROW)
        top = 22 + _PANEL_HEIGHT * (number // _PANELS_A_ROW)
        parts += _panel(curve, widths[curve.group], left, top, across - 14, most_ms)
    rows = math.ceil(len(shown) / _PANELS_A_ROW)
    more = f" The {len(shown)} groups that could save most." if len(curves) > len(shown) else ""
    return chart(
        "Saving against cost, group by group",
        f"Each group cut alone: to the right it saves more (all panels end at {in_unit(most_ms, unit)} {unit}, predicted), upwards it"
        f" costs more nats (each panel has its own scale). The mark is the width in the plan.{more}",
        22 + _PANEL_HEIGHT * rows,
        *parts,
    )


def _panel(
    curve: GroupCurve, width: int, left: float, top: float, across: float, most_ms: float
) -> list[Markup]:
    choices = sorted(curve.choices, key=lambda c: -c.width)
    dearest = max(c.cost_nats for c in choices)
    plot = Plot(
        Scale(*padded([0.0, most_ms], 0.02, zero=True), left, left + across),
        Scale(*padded([0.0, dearest], 0.1, zero=True), top + _PANEL_HEIGHT - 40, top),
    )
    points = [plot.at((c.saved_ms, c.cost_nats)) for c in choices]
    parts = [
        rect(plot.left, plot.top, across, plot.bottom - plot.top, "panel"),
        label_at(plot.left, plot.top - 5, curve.group[-24:], "tick"),
        label_at(
            plot.left + across,
            plot.bottom + 14,
            f"{curve.channels} → {width}",
            "tick",
            anchor="end",
        ),
        label_at(plot.left, plot.bottom + 14, f"≤ {significant(dearest)} nats", "tick"),
        steps(points, "thin pruned-int8"),
    ]
    for choice, at in zip(choices, points, strict=True):
        is_chosen = choice.width == width
        what = f"{choice.width} channels" if choice.width else "block removed"
        hint = f"{what}: saves {time_text(choice.saved_ms)}, costs {significant(choice.cost_nats)} nats"
        parts.append(
            dot(at, 4.5 if is_chosen else 1.8, "chosen" if is_chosen else "mark pruned-int8", hint)
        )
    return parts
