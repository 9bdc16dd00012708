"""The plan that was chosen, and what else was possible, as records."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from edgeprune.compress.groups.find import ChannelGroup
from edgeprune.compress.scores.importance import kept_channels
from edgeprune.errors import BudgetError
from edgeprune.plan.basis import Basis
from edgeprune.plan.bench import Stand
from edgeprune.plan.solver import solve as search
from edgeprune.records.plan import (
    SHARES,
    GroupCurve,
    GroupPlan,
    ParetoPoint,
    PlanCheck,
    PlanResult,
    PruningPlan,
    WidthChoice,
)

BLOCK_REMOVED = "block removed"


def plan_result(plan: PruningPlan, checks: Sequence[PlanCheck], basis: Basis) -> PlanResult:
    """The plan with what else was possible."""
    problem = basis.problem()
    front = search.pareto(problem)
    found = {(s.predicted_ms, s.cost_nats): s for s in front}
    for share in SHARES:  # the front is a hull: the best within a budget may lie above it
        with contextlib.suppress(BudgetError):
            best = search.solve(problem, share * plan.dense_ms)
            found.setdefault((best.predicted_ms, best.cost_nats), best)
    return PlanResult(
        plan=plan,
        checks=tuple(checks),
        quality=basis.quality,
        pareto=tuple((s.predicted_ms, s.cost_nats) for s in front),
        points=tuple(
            ParetoPoint(predicted_ms=s.predicted_ms, cost_nats=s.cost_nats, widths=s.widths)
            for _, s in sorted(found.items(), key=lambda e: e[0])
        ),
        curves=tuple(_curve(group, basis) for group in basis.groups),
    )


def _curve(group: ChannelGroup, basis: Basis) -> GroupCurve:
    """Each width of a group; width 0 is that of its whole block."""
    dense_ms = basis.model.predict({})
    choices = [basis.without(group, width) for width in basis.model.grids[group.name]]
    return GroupCurve(
        group=group.name,
        channels=group.channels,
        choices=tuple(
            WidthChoice(
                width=widths[group.name],
                saved_ms=max(0.0, dense_ms - basis.model.predict(widths)),
                cost_nats=sum(basis.cost_nats(name, width) for name, width in widths.items()),
            )
            for widths in choices
        ),
    )


def pruning_plan(chosen: PlanCheck, basis: Basis, stand: Stand, limit_ms: float) -> PruningPlan:
    """The structure that was chosen, group by group: which channels stay, and what each cut saves and costs."""
    model = basis.model
    predicted, full = model.predict(chosen.widths), {g.name: g.channels for g in basis.groups}
    entries = []
    for group in basis.groups:
        width = chosen.widths[group.name]
        # What the cut of this group saves, all other cuts being made; what a block saves counts once, with its first group.
        whole = {n: full[n] for n in basis.without(group, width)}
        is_counted = width or group.name == group.removed_with()[0]
        back = model.predict({**chosen.widths, **whole}) - predicted if is_counted else 0.0
        entries.append(
            GroupPlan(
                name=group.name,
                channels=group.channels,
                kept=kept_channels(basis.orders[group.name], width),
                layers=group.block.layers if group.block and not width else group.layers(),
                saved_ms_predicted=max(0.0, back),
                cost_nats=basis.cost_nats(group.name, width),
                note=group.kind if width else BLOCK_REMOVED,
            )
        )
    return PruningPlan(
        groups=tuple(entries),
        frozen=tuple(basis.frozen),
        precision=stand.precision,
        importance=basis.importance,
        scope=basis.scope,
        limit_ms=limit_ms,
        dense_ms=basis.nets.dense_ms,
        predicted_ms=predicted,
        predicted_cost_nats=chosen.cost_nats,
    )
