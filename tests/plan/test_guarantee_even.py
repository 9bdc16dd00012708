"""Structures that are cut more evenly than sums of costs ask for: measured, and chosen by what they really lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from clock_fixture import FULL, Clock, Net, basis_of, table_of

from edgeprune.errors import BudgetError
from edgeprune.plan import guarantee
from edgeprune.plan.basis import Basis
from edgeprune.plan.candidates import MEASURED, widened
from edgeprune.plan.net_model import fit, kernel_model, measure_nets
from edgeprune.plan.solver import solve as search
from edgeprune.progress import Silent
from edgeprune.records.budget import parse_budget
from edgeprune.records.plan import PlanCheck


@pytest.fixture
def basis() -> Basis:
    """A basis whose costs say that nothing of group ``c`` is worth its time."""
    clock, file = Clock(noise_ratio=0.0), Net()
    table = table_of(clock)
    nets = measure_nets(clock, file, table.grids, seed=0)  # type: ignore[arg-type]
    model, quality = fit(kernel_model(file, table, FULL), nets, 1)
    found = basis_of(table, nets, model, quality)
    return replace(found, curves={**found.curves, "c": found.curves["c"] * 1e-6})


def unevenness(widths: Mapping[str, int]) -> float:
    """0 where every group keeps the same share."""
    return float(np.std([math.log(width / FULL[group]) for group, width in widths.items()]))


def plan_of(basis: Basis) -> dict[str, int]:
    found = guarantee.make_plan(
        Clock(noise_ratio=0.001),  # type: ignore[arg-type]
        Net(),
        basis,
        budget=parse_budget("50%"),
        progress=Silent(),
    )
    assert all(c.loss_nats is None for c in found.checks) == (basis.loss is None)
    return found.plan.widths()


def test_the_more_unevenness_weighs_the_more_evenly_groups_are_cut(basis):
    limit_ms = 0.5 * basis.nets.dense_ms
    by_weight = [
        search.solve(p, limit_ms).widths
        for p in search.evened(basis.problem(removal_charge=math.inf), (0.0, 10.0, 1e4), limit_ms)
    ]
    plain = search.solve(basis.problem(), limit_ms).widths
    assert by_weight[0] == plain
    assert unevenness(plain) > unevenness(by_weight[1]) >= unevenness(by_weight[2])
    # Under it alone a time that is a product of widths is cut by the same share everywhere, but for the grid and single-sided kernels.
    assert unevenness(by_weight[2]) < 0.35 < unevenness(plain)


def test_what_a_structure_really_loses_decides_whether_even_cuts_are_better(basis):
    alone = plan_of(basis)
    assert unevenness(alone) > 0.35

    def loss(kept: Mapping[str, tuple[int, ...]]) -> float:
        return unevenness({group: len(channels) for group, channels in kept.items()})

    assert unevenness(plan_of(replace(basis, loss=loss))) < unevenness(alone)
    against = replace(basis, loss=lambda kept: -loss(kept))
    assert unevenness(plan_of(against)) >= unevenness(alone) - 1e-9


def test_no_structure_is_repaired_twice_and_only_the_best_of_a_round_are_timed(basis):
    asked: list[tuple[tuple[str, int], ...]] = []

    def loss(kept: Mapping[str, tuple[int, ...]]) -> float:
        asked.append(tuple(sorted((group, len(channels)) for group, channels in kept.items())))
        return unevenness(dict(asked[-1]))

    found = guarantee.make_plan(
        Clock(noise_ratio=0.001, hidden_ns=4000.0),  # type: ignore[arg-type]  # so that the first round fits nothing
        Net(),
        replace(basis, loss=loss),
        budget=parse_budget("50%"),
        progress=Silent(),
    )
    timed = [tuple(sorted(c.widths.items())) for c in found.checks]
    assert len(asked) == len(set(asked)) > MEASURED
    assert set(timed) <= set(asked)
    assert len(timed) < len(asked)


def test_costs_of_nothing_and_limits_that_cannot_be_met_are_no_special_case(basis):
    limit_ms = 0.5 * basis.nets.dense_ms
    free = replace(basis, curves={g: np.zeros_like(c) for g, c in basis.curves.items()})
    assert (
        search.solve(
            search.evened(free.problem(removal_charge=math.inf), (10.0,), limit_ms)[0], limit_ms
        ).predicted_ms
        <= limit_ms
    )
    with pytest.raises(BudgetError):
        search.evened(basis.problem(removal_charge=math.inf), (10.0,), 1e-6)
    gone = replace(free, at_most={"c": min(basis.model.grids["c"])})
    assert search.evened(gone.problem(removal_charge=math.inf), (10.0,), limit_ms)[0].cost_nats[
        "c"
    ].tolist() == [0.0]


def test_every_cost_falls_with_width_and_ends_at_0(basis):
    (problem,) = search.evened(
        basis.problem(removal_charge=math.inf), (10.0,), 0.5 * basis.nets.dense_ms
    )
    for costs in problem.cost_nats.values():
        assert np.all(np.diff(costs) <= 0)
        assert costs[-1] == 0


def _checked(widths: Mapping[str, int], ms: float, loss: float, *, fits: bool = True) -> PlanCheck:
    return PlanCheck(
        widths=dict(widths), predicted_ms=ms, measured_ms=ms, ratio_to_dense=ms, ratio_high=ms, within_budget=fits,
        cost_nats=0.0, loss_nats=loss,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("other_ms", "other_loss", "fits", "settled"),
    [
        (0.98, 0.02, True, True),  # both use the budget
        (0.90, 0.02, True, False),  # a rival that could still be wider
        (1.02, 0.02, False, False),  # a rival that was never seen within the budget
        (0.90, 0.04, True, True),  # far behind: not waited for
        (1.02, 0.04, False, True),
    ],
)
def test_the_other_kind_is_waited_for_only_while_it_is_a_rival(other_ms, other_loss, fits, settled):
    leader = _checked({"a": 8}, 0.98, 0.019)
    other = _checked({"a": 0}, other_ms, other_loss, fits=fits)
    assert guarantee._settled([leader, other], 1.0) == settled


def test_a_leader_that_leaves_budget_unused_is_never_the_end():
    assert not guarantee._settled([_checked({"a": 8}, 0.9, 0.01)], 1.0)
    assert not guarantee._settled([_checked({"a": 8}, 1.1, 0.01, fits=False)], 1.0)


def test_a_leader_that_leaves_budget_unused_is_widened(basis):
    # Of this loss only structures that keep little of group "c" are good, so what leads leaves much of the budget unused.
    narrow = replace(basis, loss=lambda kept: float(len(kept["c"])), curves=basis.curves)
    limit_ms = 0.7 * basis.nets.dense_ms
    lead = _checked({"a": 16, "b": 16, "c": min(basis.model.grids["c"])}, 0.5 * limit_ms, 0.0)
    (found,) = widened(narrow, lead, limit_ms, 0.69 * basis.nets.dense_ms)
    assert all(found.widths[n] >= w for n, w in lead.widths.items())
    assert lead.measured_ms < found.predicted_ms <= 0.69 * basis.nets.dense_ms
    full = lead.model_copy(update={"measured_ms": 0.98 * limit_ms})
    assert widened(narrow, full, limit_ms, limit_ms) == []
    assert widened(narrow, None, limit_ms, limit_ms) == []
    assert widened(narrow, lead, limit_ms, 0.0) == []  # nothing wider is fast enough


def test_a_structure_that_contains_another_goes_before_it():
    small, wide = _checked({"a": 8, "b": 8}, 0.8, 0.010), _checked({"a": 8, "b": 16}, 0.9, 0.011)
    widest = _checked({"a": 16, "b": 16}, 0.99, 0.012)
    apart = _checked({"a": 32, "b": 4}, 0.99, 0.011)
    assert guarantee._best([small, wide]) == wide
    assert guarantee._best([small, apart, widest, wide]) == widest
    assert guarantee._best([small, apart]) == small
    over = widest.model_copy(update={"within_budget": False})
    assert guarantee._best([small, over]) == small
    assert guarantee._best([over]) is None
