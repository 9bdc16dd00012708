"""Where whole blocks can go: what chooses between structures with and without them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from clock_fixture import FULL, Clock, Net, RemovableNet, basis_of, removable_basis, table_of

from edgeprune.plan import guarantee
from edgeprune.plan.net_model import fit, kernel_model, measure_nets
from edgeprune.progress import Silent
from edgeprune.records.budget import parse_budget


@pytest.mark.parametrize("removal_is_dear", [True, False])
def test_a_block_is_removed_where_the_repaired_structure_loses_less_without_it(removal_is_dear):
    clock = Clock()
    asked: list[dict[str, tuple[int, ...]]] = []

    def loss(kept: Mapping[str, tuple[int, ...]]) -> float:
        asked.append(dict(kept))
        return float((not kept["a"]) == removal_is_dear)

    found = guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        RemovableNet(),
        replace(removable_basis(clock), loss=loss),
        budget=parse_budget("60%"),
        progress=Silent(),
    )
    assert {bool(c.widths["a"]) for c in found.checks} == {True, False}
    assert bool(found.plan.widths()["a"]) == removal_is_dear
    assert all(c.loss_nats is not None for c in found.checks)
    assert len(asked) >= len(found.checks)  # what loses more than others is not timed


@pytest.mark.parametrize("heals_worse_without_the_block", [True, False])
def test_a_short_healing_has_the_last_word_on_removed_blocks(heals_worse_without_the_block):
    clock = Clock()
    tried: list[bool] = []

    def trial(kept: Mapping[str, tuple[int, ...]]) -> float:
        tried.append(bool(kept["a"]))
        return float((not kept["a"]) == heals_worse_without_the_block)

    found = guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        RemovableNet(),
        replace(removable_basis(clock), loss=lambda kept: float(bool(kept["a"])), trial=trial),
        budget=parse_budget("60%"),
        progress=Silent(),
    )
    assert sorted(tried) == [False, True]  # the best of each kind alone
    assert bool(found.plan.widths()["a"]) == heals_worse_without_the_block
    assert sum(c.trial_nats is not None for c in found.checks) == 2


def test_where_no_block_can_go_nothing_is_healed_to_choose():
    clock, file = Clock(), Net()
    table = table_of(clock)
    nets = measure_nets(clock, file, table.grids, seed=0)  # type: ignore[arg-type]
    model, quality = fit(kernel_model(file, table, FULL), nets, 1)

    def trial(_: Mapping[str, tuple[int, ...]]) -> float:
        raise AssertionError("a trial is not free")

    basis = replace(basis_of(table, nets, model, quality), trial=trial)
    found = guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        file,
        basis,
        budget=parse_budget("60%"),
        progress=Silent(),
    )
    assert all(c.trial_nats is None for c in found.checks)


def test_without_removals_a_problem_has_no_width_0_and_a_charge_leaves_all_else_as_it_is():
    basis = removable_basis(Clock())
    assert basis.problem().grids["a"][0] == 0
    assert all(basis.problem(removal_charge=math.inf).grids["a"])
    plain, charged = (
        basis.problem().cost_nats["a"],
        basis.problem(removal_charge=3.0).cost_nats["a"],
    )
    assert charged[0] == pytest.approx(3 * plain[0])
    assert np.array_equal(charged[1:], plain[1:])


def test_a_block_that_has_gone_before_stays_gone_where_no_removal_is_allowed():
    basis = removable_basis(Clock())
    # What is gone costs no more.
    costs = {**basis.curves, "a": np.zeros(len(basis.model.grids["a"]))}
    basis = replace(basis, curves=costs, at_most={"a": 0})
    assert basis.problem(removal_charge=math.inf).grids["a"] == (0,)
