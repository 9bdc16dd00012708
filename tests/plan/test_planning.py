"""The guarantee loop on a stand whose clock is a known cost function: what is promised is what is measured, before any training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from clock_fixture import (
    CHAIN,
    FULL,
    TILE,
    Clock,
    Net,
    basis_of,
    groups,
    kernel_ns,
    net_ns,
    table_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import BudgetError, SpecError, UnknownName
from edgeprune.plan import guarantee
from edgeprune.plan.latency.kernel_times import KernelKey
from edgeprune.plan.measured import MeasuredNets, MeasuredTable
from edgeprune.plan.net_model import check_budget, fit, kernel_model, measure_nets
from edgeprune.plan.table import UNKNOWN_NS, measure_table
from edgeprune.progress import Progress, Silent
from edgeprune.records.budget import parse_budget
from edgeprune.records.plan import FrozenGroup, PlanResult


def planned(clock: Clock, budget: str, *, table: MeasuredTable | None = None) -> PlanResult:
    """All that happens before training, for a cost of each channel that grows as the group narrows."""
    file, table = Net(), table or table_of(clock)
    nets = measure_nets(clock, file, table.grids, seed=0)  # type: ignore[arg-type]
    wanted = parse_budget(budget)
    check_budget(wanted, nets)
    model, quality = fit(kernel_model(file, table, FULL), nets, table.kernels_measured)
    return guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        file,
        replace(
            basis_of(table, nets, model, quality),
            frozen=(FrozenGroup(layers=("head",), reason="its channels are the model's outputs"),),
        ),
        budget=wanted,
        progress=Silent(),
    )


@pytest.mark.parametrize("budget", ["80%", "60%", "45%", "2x"])
def test_the_chosen_plan_is_within_the_budget_and_uses_it(budget):
    plan = planned(Clock(), budget).plan
    share = net_ns(plan.widths()) / net_ns({})  # the truth, without the noise
    wanted = parse_budget(budget).value
    assert share <= wanted * 1.005
    assert share >= wanted * 0.95


def test_what_was_chosen_was_measured_and_its_upper_bound_is_within_the_budget():
    found = planned(Clock(), "60%")
    chosen = [c for c in found.checks if c.widths == found.plan.widths()]
    assert any(
        c.within_budget and c.ratio_high * found.plan.dense_ms <= found.plan.limit_ms
        for c in chosen
    )


def test_of_all_structures_that_fit_the_one_that_costs_least_is_chosen():
    found = planned(Clock(), "60%")
    fitting = [c.cost_nats for c in found.checks if c.within_budget]
    assert found.plan.predicted_cost_nats == min(fitting)
    assert found.plan.predicted_cost_nats == pytest.approx(
        sum(g.cost_nats for g in found.plan.groups)
    )


def test_a_model_that_is_wrong_about_whole_nets_is_corrected_until_the_measured_time_fits():
    clock = Clock(hidden_ns=0.08 * net_ns({}))
    table = table_of(clock)
    plan = planned(clock, "60%", table=table).plan
    true_ns = net_ns(plan.widths()) + clock.hidden_ns
    assert true_ns <= 0.6 * net_ns({}) * 1.005


def test_a_plan_for_a_net_that_was_cut_before_takes_no_channel_back():
    clock, file = Clock(), Net()
    table = table_of(clock)
    nets = measure_nets(clock, file, table.grids, seed=0)  # type: ignore[arg-type]
    model, quality = fit(kernel_model(file, table, FULL), nets, 1)
    present = {"a": 48, "b": 64, "c": 128}
    whole = basis_of(table, nets, model, quality)
    curves = {
        g: np.array([max(0.0, 1 - w / present[g]) ** 2 for w in grid])
        for g, grid in table.grids.items()
    }
    found = guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        file,
        replace(whole, curves=curves, at_most=present),
        budget=parse_budget("45%"),
        progress=Silent(),
    )
    assert all(c.widths[g] <= present[g] for c in found.checks for g in present)
    assert found.plan.widths() != present
    assert net_ns(found.plan.widths()) <= 0.45 * net_ns({}) * 1.005
    # The figures of the plan stay those against the dense net.
    assert [c.choices[-1].width for c in found.curves] == list(FULL.values())


def test_no_widths_are_offered_that_save_no_time():
    grids = table_of(Clock(noise_ratio=0)).grids
    assert all(width % TILE == 0 for grid in grids.values() for width in grid)
    assert {group: grid[-1] for group, grid in grids.items()} == FULL


def test_a_group_on_both_sides_of_one_kernel_is_timed_at_one_width_on_both():
    staircase = table_of(Clock(noise_ratio=0)).staircases["b"]
    for width, ns in zip(staircase.widths, staircase.ns, strict=True):
        widths = {**FULL, "b": width}
        assert ns == pytest.approx(sum(kernel_ns(v, widths) for v in CHAIN if "b" in v))


def test_without_noise_the_model_predicts_every_net_exactly():
    clock = Clock(noise_ratio=0)
    table = table_of(clock)
    nets = measure_nets(clock, Net(), table.grids, seed=3)  # type: ignore[arg-type]
    _, quality = fit(kernel_model(Net(), table, FULL), nets, 1)
    assert quality.worst_error_ratio < 0.01
    assert (quality.nets_fitted, quality.nets_held_out) == (10, 4)


@pytest.mark.parametrize("broken", [frozenset({2}), frozenset({1, 4})])
def test_kernels_that_do_not_run_alone_are_taken_up_by_whole_nets(broken):
    plan = planned(Clock(broken=broken), "70%").plan
    assert net_ns(plan.widths()) <= 0.7 * net_ns({}) * 1.005


def test_a_kernel_that_runs_at_some_widths_only_is_not_taken_for_free_at_the_others():
    exact, partly = table_of(Clock(noise_ratio=0)), table_of(Clock(noise_ratio=0, broken_below=48))
    for width in (24, 40):
        at = partly.staircases["b"].widths.index(width)
        assert partly.staircases["b"].ns[at] >= exact.staircases["b"].ns[at]
    assert min(partly.grids["b"]) >= 48


def test_kernels_are_never_timed_twice():
    clock = Clock()
    counted: list[str] = []
    answer = clock.kernels

    def counting(files: Mapping[str, bytes], progress: Progress, purpose: str) -> dict[str, float]:
        counted.extend(content.decode() for content in files.values())
        return answer(files, progress, purpose)

    clock.kernels = counting  # type: ignore[method-assign]
    table = table_of(clock)
    assert len(counted) == len(set(counted)) == table.kernels_measured


def table_with(clock: Clock, known: dict[KernelKey, float]) -> MeasuredTable:
    return measure_table(
        clock,  # type: ignore[arg-type]
        Net(), groups(), fingerprint_key="clock", format_name="onnx", progress=Silent(), known=known,
    )  # fmt: skip


def test_kernels_whose_times_are_known_are_not_timed_again():
    known: dict[KernelKey, float] = {}
    first = table_with(Clock(), known)
    assert len(known) == first.kernels_measured
    assert first.kernels_taken == 0
    assert {(t.signature, t.widths): t.ns for t in first.times} == known

    class Deaf(Clock):
        """Cannot time any kernel."""

        def kernels(
            self, files: Mapping[str, bytes], _: Progress, purpose: str
        ) -> dict[str, float]:
            raise AssertionError(f"asked for {len(files)} kernels")

    again = table_with(Deaf(), known)
    assert again.kernels_taken == again.kernels_measured == first.kernels_measured
    assert (again.table, again.grids, again.times) == (first.table, first.grids, first.times)


def test_only_real_times_become_known():
    known: dict[KernelKey, float] = {}
    table_with(Clock(broken=frozenset({2})), known)
    assert known
    assert all(ns > UNKNOWN_NS for ns in known.values())
    assert not any(signature == "sig2" for signature, _ in known)


def test_the_chosen_structure_is_measured_once_more_alone():
    clock = Clock()
    plan = planned(clock, "60%").plan
    assert clock.judged == [plan.widths()]


def test_a_structure_that_is_over_the_budget_when_it_is_measured_again_gives_way():
    clock = Clock(late_ns=0.02 * net_ns({}))
    found = planned(clock, "60%")
    assert len(clock.judged) > 1
    truly = (net_ns(found.plan.widths()) + clock.late_ns) / net_ns({})
    assert truly <= 0.6 * 1.005
    first = next(c for c in found.checks if c.widths == clock.judged[0])
    assert not first.within_budget
    assert first.ratio_to_dense > 0.6


def test_the_result_says_what_else_was_possible():
    found = planned(Clock(), "60%")
    assert set(found.pareto) <= {(p.predicted_ms, p.cost_nats) for p in found.points}
    assert all(set(p.widths) == set(FULL) for p in found.points)
    for curve in found.curves:
        assert curve.channels == FULL[curve.group]
        assert [c.width for c in curve.choices] == sorted(c.width for c in curve.choices)
        assert (curve.choices[-1].saved_ms, curve.choices[-1].cost_nats) == (0, 0)
        saved = [c.saved_ms for c in curve.choices]
        assert saved == sorted(saved, reverse=True)
        assert found.plan.widths()[curve.group] in {c.width for c in curve.choices}


def given_plan_of(clock: Clock, budget: str, widths: dict[str, int]) -> PlanResult:
    """A plan that somebody wrote."""
    table = table_of(clock)
    nets = measure_nets(clock, Net(), table.grids, seed=0)  # type: ignore[arg-type]
    model, quality = fit(kernel_model(Net(), table, FULL), nets, 1)
    return guarantee.given_plan(
        clock,  # type: ignore[arg-type]
        Net(), basis_of(table, nets, model, quality), widths,
        budget=parse_budget(budget), progress=Silent(),
    )  # fmt: skip


def test_a_given_plan_is_measured_and_kept_as_it_is_whether_it_fits_or_not():
    found = given_plan_of(Clock(), "60%", {"a": 32, "c": 64})
    assert found.plan.widths() == {"a": 32, "b": FULL["b"], "c": 64}
    (check,) = found.checks
    assert check.ratio_to_dense == pytest.approx(net_ns(found.plan.widths()) / net_ns({}), rel=0.03)
    assert not given_plan_of(Clock(), "20%", {"a": 32}).checks[0].within_budget


def test_a_given_plan_with_a_wrong_group_or_width_is_refused():
    with pytest.raises(UnknownName, match="unknown group 'd'"):
        given_plan_of(Clock(), "60%", {"d": 32})
    with pytest.raises(SpecError, match=r"the width of a must be one of 16, 24, 32.* has 31"):
        given_plan_of(Clock(), "60%", {"a": 31})


def test_a_budget_that_everything_meets_cuts_nothing():
    plan = planned(Clock(), "1000ms").plan
    assert plan.widths() == FULL
    assert plan.predicted_cost_nats == 0


def test_kept_channels_are_the_most_important_ones_in_order():
    plan = planned(Clock(), "60%").plan
    for group in plan.groups:
        assert group.kept == tuple(range(group.channels - len(group.kept), group.channels))
        assert group.saved_ms_predicted >= 0


def test_frozen_groups_are_kept_in_the_plan():
    assert planned(Clock(), "80%").plan.frozen[0].layers == ("head",)


def test_the_same_measurements_give_the_same_plan():
    assert planned(Clock(), "60%") == planned(Clock(), "60%")


def test_a_budget_below_the_fastest_net_says_what_the_fastest_is():
    clock = Clock()
    nets = measure_nets(clock, Net(), table_of(clock).grids, seed=0)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="below the fastest admissible latency") as caught:
        check_budget(parse_budget("1%"), nets)
    assert f"{min(nets.ms):.4g} ms" in caught.value.message
    share = math.ceil(min(nets.ms) / nets.dense_ms * 100) + 1
    assert caught.value.hint == f"ask for at least {share}%"
    check_budget(parse_budget(f"{share}%"), nets)  # the hint holds


def test_a_budget_that_only_the_noise_reaches_is_refused_with_the_fastest_measured():
    clock = Clock(noise_ratio=0)
    table = table_of(clock)
    nets = measure_nets(clock, Net(), table.grids, seed=0)  # type: ignore[arg-type]
    edge = min(nets.ms) / nets.dense_ms * 100
    slow = Clock(noise_ratio=0, hidden_ns=0.05 * net_ns({}))
    model, quality = fit(kernel_model(Net(), table, FULL), nets, 1)
    with pytest.raises(BudgetError, match=r"no structure was measured within .* the fastest took"):
        guarantee.make_plan(
            slow,  # type: ignore[arg-type]
            Net(), basis_of(table, nets, model, quality),
            budget=parse_budget(f"{edge + 0.5:.2f}%"), progress=Silent(),
        )  # fmt: skip


@settings(max_examples=25)
@given(
    dense=st.floats(0.01, 1000),
    shares=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6),
    percent=st.integers(1, 100),
)
def test_a_budget_passes_exactly_when_some_measured_net_meets_it(dense, shares, percent):
    ms = (dense, *(share * dense for share in shares))
    nets = MeasuredNets(dense_ms=dense, widths=({},) * len(ms), ms=ms)
    budget = parse_budget(f"{percent}%")
    if min(ms) <= budget.limit_ms(dense):
        check_budget(budget, nets)
    else:
        with pytest.raises(BudgetError):
            check_budget(budget, nets)
