"""The sections of the page that show the plan: widths, cuts, and how far the predictions can be trusted."""

from __future__ import annotations

from edgeprune.records.plan import PruningPlan
from edgeprune.records.report import Report
from edgeprune.report import charts, facts
from edgeprune.report.figures import (
    NONE,
    in_unit,
    share_text,
    signed,
    significant,
    speed_text,
    time_text,
    time_unit,
)
from edgeprune.report.markup import Column, Markup, pairs, table, tag
from edgeprune.report.sections import note, section, side_by_side


def widths(report: Report) -> Markup:
    """Every layer before and after."""
    rows = report.layer_widths
    if not rows:
        return section("widths", "Widths", note("No layer changed its width."))
    largest = max(max(r.out_before for r in rows), 1)
    cells = [
        (
            r.layer,
            r.kind,
            _change(r.in_before, r.in_after),
            _change(r.out_before, r.out_after),
            charts.small_bar(
                r.out_after / largest,
                "fill pruned-int8" if r.out_after < r.out_before else "fill kept",
                behind=r.out_before / largest,
                hint=f"{r.out_after} of {r.out_before} channels",
            ),
            share_text(r.out_after / r.out_before, 0) if r.out_before else NONE,
        )
        for r in rows
    ]
    columns = [
        Column("layer"),
        Column("kind"),
        Column("in", True),
        Column("out", True),
        Column("out channels"),
        Column("kept", True),
    ]
    before = facts.variant(report, "dense", report.shipped)
    after = facts.variant(report, "pruned", report.shipped)
    text = ""
    if before is not None and after is not None and before.macs and before.parameters:
        text = (
            f"{share_text(after.macs / before.macs, 0)} of the MACs and "
            f"{share_text(after.parameters / before.parameters, 0)} of the parameters are left."
        )
    return section(
        "widths",
        "Widths before and after",
        tag("p", text) if text else None,
        table("Channels of every layer; the pale bar is the dense width", columns, cells),
    )


def _change(before: int, after: int) -> str:
    return f"{before} → {after}" if before != after else str(after)


def cuts(report: facts.PlannedStructure) -> Markup:
    """What each group gave, and what it cost; both predicted."""
    groups = sorted(report.plan.groups, key=lambda g: -g.saved_ms_predicted)
    unit = time_unit([g.saved_ms_predicted for g in groups])
    most = max((g.saved_ms_predicted for g in groups), default=0.0)
    dearest = max((g.cost_nats for g in groups), default=0.0)
    rows = [
        (
            g.name,
            f"{g.channels} → {len(g.kept) or 'block removed'}",
            in_unit(g.saved_ms_predicted, unit),
            charts.small_bar(g.saved_ms_predicted / most if most > 0 else 0, "fill pruned-int8"),
            significant(g.cost_nats),
            charts.small_bar(g.cost_nats / dearest if dearest > 0 else 0, "fill cost"),
            ", ".join(g.layers) + (f" ({g.note})" if g.note else ""),
        )
        for g in groups
    ]
    columns = [
        Column("group"),
        Column("channels", True),
        Column(f"saved, {unit}, predicted", True),
        Column("share of the largest"),
        Column("cost, nats, predicted", True),
        Column("share of the dearest"),
        Column("layers"),
    ]
    frozen = [(", ".join(f.layers), f.reason) for f in report.plan.frozen]
    return section(
        "cuts",
        "What each cut saved",
        tag("p", _plan_sentence(report)),
        table("Channel groups by predicted saving", columns, rows)
        if rows
        else note("No group was cut."),
        tag("h3", "Frozen groups"),
        table(
            "Channels that were not touched, and why", [Column("layers"), Column("reason")], frozen
        )
        if frozen
        else note("None: every group could be cut."),
    )


def saved_note(plan: PruningPlan) -> str:
    """What the savings of the groups are, and what they and all cuts together come to; empty where nothing is cut."""
    if all(len(g.kept) == g.channels for g in plan.groups):
        return ""
    rows_ms = sum(g.saved_ms_predicted for g in plan.groups)
    return (
        f"A group's saving is what its cut brings while all other cuts are made. Groups share kernels, so the savings add up to"
        f" {time_text(rows_ms)}, and all cuts together save {time_text(plan.dense_ms - plan.predicted_ms)}: both predicted, by the latency"
        " model as corrected with whole nets that were timed."
    )


def _plan_sentence(report: facts.PlannedStructure) -> str:
    plan = report.plan
    return (
        f"Chosen for {plan.precision.upper()} by {plan.importance}: dense {time_text(plan.dense_ms)}, budget {time_text(plan.limit_ms)},"
        f" at a predicted cost of {significant(plan.predicted_cost_nats)} nats before healing. {saved_note(plan)} {facts.scope_note(plan)}"
    ).rstrip()


def predictions(report: facts.PlannedStructure) -> Markup:
    """How far the latency model can be trusted."""
    model = report.latency_model
    quality = pairs(
        [
            ("kernels timed", f"{model.kernels_measured}{facts.earlier_kernels(model)}"),
            ("whole nets fitted", str(model.nets_fitted)),
            ("whole nets held out", str(model.nets_held_out)),
            ("mean error, held out", _held_out(report, model.mean_error_ratio)),
            ("worst error, held out", _held_out(report, model.worst_error_ratio)),
            *(
                [("95th percentile, each net from the others", share_text(model.p95_error_ratio))]
                if model.p95_error_ratio is not None
                else []
            ),
        ]
    )
    unit = time_unit([v for c in report.checks for v in (c.predicted_ms, c.measured_ms)])
    rows = [
        (
            str(index),
            in_unit(c.predicted_ms, unit),
            in_unit(c.measured_ms, unit),
            f"{signed(facts.check_error(c.predicted_ms, c.measured_ms) * 100, 1)} %",
            f"{speed_text(c.ratio_to_dense)} (at least {speed_text(c.ratio_high)})",
            significant(c.cost_nats),
            "" if c.loss_nats is None else significant(c.loss_nats),
            tag(
                "span", "yes" if c.within_budget else "no", class_=f"chip {_good(c.within_budget)}"
            ),
        )
        for index, c in enumerate(report.checks, 1)
    ]
    columns = [
        Column("structure"),
        Column(f"predicted before it was timed, {unit}", True),
        Column(f"{report.stamp}, {unit}", True),
        Column("error", True),
        Column("speed-up against dense", True),
        Column("cost, nats, predicted", True),
        Column("loss after repair, nats", True),
        Column("within budget"),
    ]
    checked = table("Structures timed on the device before any training", columns, rows)
    return section(
        "predictions",
        "Predicted against timed",
        tag("h3", "Latency model"),
        quality,
        side_by_side(charts.predicted_against_timed(report), charts.pareto(report)),
        checked if rows else note("No structure was checked on the device before training."),
    )


def _held_out(report: facts.PlannedStructure, error_ratio: float) -> str:
    return share_text(error_ratio) if report.latency_model.nets_held_out else "not judged"


def _good(met: bool) -> str:
    return "good" if met else "bad"
