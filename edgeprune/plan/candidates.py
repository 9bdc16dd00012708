"""Which structures are worth the device's time: the best by prediction, others of another kind, and those that lose least when repaired."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from edgeprune.errors import BudgetError
from edgeprune.plan.basis import Basis
from edgeprune.plan.solver import solve as search
from edgeprune.plan.solver.solve import Problem, Solution
from edgeprune.records.plan import (
    PlanCheck,
)

CLOSE_ENOUGH = 0.97  # stop when the measured latency uses this much of the budget
# How many times its own cost the removal of a block is charged in further structures to measure: removals add up to more than their sum.
REMOVAL_CHARGES = (3.0, math.inf)
# How many times the sum of costs the unevenness of the cuts weighs in further structures to measure, see `search.evened`.
EVENNESS = (10.0, 40.0, 1e4)
MEASURED = 3  # structures of a round that are timed: those that lose least after their repair
# Widths by group, sorted: what a dictionary can be asked for.
Structure = tuple[tuple[str, int], ...]


def structure_of(widths: Mapping[str, int]) -> Structure:
    """Widths as a key."""
    return tuple(sorted(widths.items()))


def solutions(basis: Basis, limit_ms: float) -> tuple[Solution, ...]:
    """The best solution and two that differ from it, or the fastest one if the model sees nothing under the limit.

    Also those that cut more evenly, where real losses can tell which is better; and where blocks go, the best ones with fewer removals and
    with none, if there are such.
    """
    try:
        found = search.alternatives(basis.problem(), limit_ms, count=3, min_changes=3)
    except BudgetError:
        return (search.fastest(basis.problem()),)
    if basis.scope == "local":
        return found
    problems: list[Problem] = []
    if not all(all(s.widths.values()) for s in found):
        problems += [basis.problem(removal_charge=charge) for charge in REMOVAL_CHARGES]
    if basis.loss is not None:
        with contextlib.suppress(BudgetError):
            whole = basis.problem(removal_charge=math.inf)
            problems += search.evened(whole, EVENNESS, limit_ms)
    options = list(found)
    for problem in problems:
        with contextlib.suppress(BudgetError):
            other = search.solve(problem, limit_ms)
            cost = sum(basis.cost_nats(n, w) for n, w in other.widths.items())
            if all(other.widths != s.widths for s in options):
                options.append(replace(other, cost_nats=cost))
    return tuple(options)


def untried(options: Sequence[Solution], tried: Collection[Structure]) -> list[Solution]:
    """Those of the structures that were not measured yet."""
    return [s for s in options if structure_of(s.widths) not in tried]


def widened(basis: Basis, best: PlanCheck | None, limit_ms: float, aim_ms: float) -> list[Solution]:
    """The best structure that contains the one that leads, where that one leaves budget unused: it gets what still fits."""
    if best is None or best.measured_ms >= CLOSE_ENOUGH * limit_ms or basis.scope == "local":
        return []
    least = {n: max(w, best.widths[n]) for n, w in {**best.widths, **basis.at_least}.items()}
    with contextlib.suppress(BudgetError):
        return [search.solve(replace(basis, at_least=least).problem(), aim_ms)]
    return []


def promising(
    basis: Basis, options: Sequence[Solution], known: dict[Structure, float], *, always: int = 0
) -> tuple[list[Solution], list[float | None]]:
    """The structures that are worth the device's time, with what they lose after the repair.

    Those are the first ``always``, the best :data:`MEASURED` of a round, and the best with each number of removed blocks. What a
    structure loses is put into ``known``, since the next round may ask for one again that was not timed.
    """
    if basis.loss is None:
        return list(options), [None] * len(options)
    for option in options:
        if structure_of(option.widths) not in known:
            known[structure_of(option.widths)] = basis.loss(basis.kept(option.widths))
    losses = [known[structure_of(s.widths)] for s in options]
    order = sorted(range(len(options)), key=lambda i: (losses[i], i))
    removed = [basis.blocks_removed(options[i].widths) for i in order]
    kinds = {i for n, i in enumerate(order) if removed.index(removed[n]) == n}
    chosen = [i for n, i in enumerate(order) if n < MEASURED or i in kinds or i < always]
    return [options[i] for i in chosen], [losses[i] for i in chosen]
