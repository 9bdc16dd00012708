"""``--scope local``: one share of the channels for every group, found along the latency model and kept within the measured budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tinynet
from clock_fixture import (
    FULL,
    Clock,
    Net,
    RemovableNet,
    basis_of,
    net_ns,
    removable_basis,
    table_of,
)
from report_fixture import make_report
from report_fixture import make_search_result as search_result
from search_problems import random_problem

from edgeprune.errors import BudgetError, SpecError, UnknownName
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.options import Options, check_names, chosen_scope
from edgeprune.plan import guarantee
from edgeprune.plan.basis import Basis
from edgeprune.plan.net_model import fit, kernel_model, measure_nets
from edgeprune.plan.solver.solve import Problem, alternatives, fastest, pareto, solve
from edgeprune.progress import Silent
from edgeprune.records.base import read_json
from edgeprune.records.budget import parse_budget
from edgeprune.records.plan import PlanResult, PruningPlan, SearchResult
from edgeprune.report.search_page import render_plan, render_search, render_search_html


def share_span(
    widths: Mapping[str, int], grids: Mapping[str, tuple[int, ...]], full: Mapping[str, int]
) -> tuple[float, float]:
    """From which to which share of its channels every group would round to the width it has; empty where there is no such share."""
    low, high = 0.0, 2.0
    for name, width in widths.items():
        grid = [w for w in grids[name] if w]
        at = grid.index(width)
        if at > 0:
            low = max(low, (grid[at - 1] + width) / 2 / full[name])
        if at + 1 < len(grid):
            high = min(high, (grid[at + 1] + width) / 2 / full[name])
    return low, high


def is_even(
    widths: Mapping[str, int], grids: Mapping[str, tuple[int, ...]], full: Mapping[str, int]
) -> bool:
    low, high = share_span(widths, grids, full)
    return low < high


def even(problem: Problem) -> Problem:
    return replace(problem, even={name: grid[-1] for name, grid in problem.grids.items()})


def by_enumeration(problem: Problem) -> Iterator[dict[str, int]]:
    """Every structure of one share, from the narrowest on."""
    assert problem.even is not None
    choices = (
        dict(zip(problem.grids, w, strict=True)) for w in itertools.product(*problem.grids.values())
    )
    found = [w for w in choices if is_even(w, problem.grids, problem.even)]
    yield from sorted(found, key=lambda w: sum(w.values()))


@pytest.mark.parametrize("seed", range(8))
def test_the_answer_is_the_widest_structure_of_one_share_within_the_limit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    problem = even(random_problem(draw, 4, 5))
    structures = list(by_enumeration(problem))
    times = [problem.model.predict(w) for w in structures]
    limit_ms = min(times) + draw.uniform(0, 1) * (max(times) - min(times))
    expected = [w for w, ms in zip(structures, times, strict=True) if ms <= limit_ms][-1]
    found = solve(problem, limit_ms)
    assert found.widths == expected
    assert found.predicted_ms == problem.model.predict(expected)
    assert found.cost_nats == pytest.approx(
        sum(problem.cost_nats[n][problem.grids[n].index(w)] for n, w in expected.items())
    )
    assert alternatives(problem, limit_ms, 3, 3) == (found,)
    assert fastest(problem).predicted_ms == min(times)
    with pytest.raises(BudgetError, match="the fastest structure is predicted at"):
        solve(problem, 0.99 * min(times))


def test_the_front_is_of_structures_of_one_share_too() -> None:
    problem = even(random_problem(np.random.default_rng(3), 30, 12))
    front = pareto(problem)
    assert len(front) > 10
    assert all(is_even(s.widths, problem.grids, problem.even or {}) for s in front)
    times, costs = [s.predicted_ms for s in front], [s.cost_nats for s in front]
    assert times == sorted(set(times))
    assert costs == sorted(costs, reverse=True)
    few = pareto(problem, points=5)
    assert len(few) == 5
    assert (few[0], few[-1]) == (front[0], front[-1])


def local_basis(clock: Clock, file: Net | None = None) -> Basis:
    table = table_of(clock)
    nets = measure_nets(clock, file or Net(), table.grids, seed=0)  # type: ignore[arg-type]
    model, quality = fit(kernel_model(Net(), table, FULL), nets, 1)
    basis = basis_of(table, nets, model, quality)
    # Nothing of group ``c`` is worth its time: a solver that compares groups cuts it first.
    return replace(basis, curves={**basis.curves, "c": basis.curves["c"] * 1e-6})


def plan_of(basis: Basis, clock: Clock, budget: str, file: Net | None = None) -> PlanResult:
    return guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        file or Net(),
        basis,
        budget=parse_budget(budget),
        progress=Silent(),
    )


@pytest.mark.parametrize("budget", ["80%", "60%", "45%"])
def test_a_local_plan_keeps_the_same_share_of_every_group_and_meets_the_budget_as_measured(
    budget: str,
) -> None:
    # What whole nets cost besides is in no kernel: the first prediction is wrong, and the loop has to find out.
    clock = Clock(noise_ratio=0.002, hidden_ns=0.04 * net_ns({}))
    basis = local_basis(clock)
    found = plan_of(replace(basis, scope="local"), clock, budget)
    widths, grids = found.plan.widths(), basis.model.grids
    assert found.plan.scope == "local"
    assert all(is_even(c.widths, grids, FULL) for c in found.checks)
    shares = [w / FULL[g] for g, w in widths.items()]
    assert max(shares) - min(shares) <= 8 / 64  # one step of the smallest group
    limit = parse_budget(budget).value
    measured = (net_ns(widths) + clock.hidden_ns) / net_ns({})
    assert 0.85 * limit < measured <= 1.005 * limit
    (check,) = [c for c in found.checks if c.widths == widths]
    assert check.within_budget
    # Nothing wider of one share would have fitted.
    wider = [
        w
        for w in by_enumeration(replace(basis, scope="local").problem())
        if sum(w.values()) > sum(widths.values())
    ]
    assert (net_ns(wider[0]) + clock.hidden_ns) / net_ns({}) > 0.97 * limit


def test_without_a_scope_groups_are_compared_as_before() -> None:
    clock = Clock(noise_ratio=0.002)
    basis = local_basis(clock)
    assert basis.problem().even is None
    found = plan_of(basis, clock, "60%")
    assert found.plan.scope == "global"
    shares = {g: w / FULL[g] for g, w in found.plan.widths().items()}
    assert shares["c"] < 0.6 * shares["a"]
    # Plans of earlier runs say nothing of a scope.
    plain = found.plan.model_dump(exclude={"scope"})
    assert PruningPlan.model_validate(plain) == found.plan


def test_no_block_is_removed_for_a_share() -> None:
    clock = Clock()
    basis = removable_basis(clock)
    assert basis.model.grids["a"][0] == 0
    found = plan_of(replace(basis, scope="local"), clock, "60%", RemovableNet())
    assert all(c.widths["a"] > 0 for c in found.checks)
    assert all(p.widths["a"] > 0 for p in found.points)
    free = {**basis.curves, "a": np.zeros_like(basis.curves["a"])}  # what is gone costs nothing
    gone = replace(basis, scope="local", curves=free, at_most={"a": 0}).problem()
    assert solve(gone, 1e9).widths == {**FULL, "a": 0}


def test_a_later_step_counts_shares_of_the_dense_net() -> None:
    clock = Clock()
    present = {"a": 48, "b": 96, "c": 96}
    whole = local_basis(clock)
    curves = {
        g: np.array([max(0.0, 1 - w / present[g]) for w in grid])
        for g, grid in whole.model.grids.items()
    }
    problem = replace(whole, scope="local", curves=curves, at_most=present).problem()
    assert problem.even == FULL
    found = solve(problem, 0.5 * problem.model.predict({}))
    assert is_even(found.widths, problem.grids, FULL)
    assert found.widths["b"] < 96


def test_a_budget_that_no_share_meets_names_the_way_out() -> None:
    clock = Clock()
    basis = removable_basis(clock)
    narrowest = {g: min(w for w in grid if w) for g, grid in basis.model.grids.items()}
    percent = int(99 * net_ns(narrowest) / net_ns({}))
    with pytest.raises(BudgetError, match="no structure was measured within") as caught:
        plan_of(replace(basis, scope="local"), clock, f"{percent}%", RemovableNet())
    assert "--scope global" in (caught.value.hint or "")


def test_a_scope_that_does_not_exist_or_a_given_plan_beside_it_is_refused() -> None:
    assert chosen_scope(Options()) == "global"
    assert chosen_scope(Options(scope="local")) == "local"
    loaded = tinynet.loaded()
    wrong = Options(target="this-machine", scope="locale")
    with pytest.raises(UnknownName, match="unknown scope 'locale'"):
        api.resolve(loaded, wrong)
    both = Options(target="this-machine", scope="local", plan=Path("plan.json"))
    with pytest.raises(SpecError, match="cannot be combined"):
        check_names(both, loaded.workload)


def test_only_the_scope_local_changes_the_digest_of_a_run() -> None:
    loaded = tinynet.loaded()
    plain, named, local = (
        api.resolve(loaded, Options(target="this-machine", **changes))
        for changes in ({}, {"scope": "global"}, {"scope": "local"})
    )
    assert pipeline.run_digest(plain) == pipeline.run_digest(named)
    assert pipeline.run_digest(local) != pipeline.run_digest(plain)


def test_text_and_pages_say_that_the_scope_was_local_and_nothing_where_it_was_not() -> None:
    says = "the same share of its channels"
    result = search_result()
    plan = result.plan.model_copy(update={"scope": "local"})
    local = search_result(plan=plan)
    dry = PlanResult(plan=plan, checks=local.checks, quality=local.latency_model, pareto=())
    for text in (render_search(local), render_search_html(local).decode(), render_plan(dry)):
        assert says in text
    usual = dry.model_copy(update={"plan": make_report().plan})
    for text in (render_search(result), render_search_html(result).decode(), render_plan(usual)):
        assert says not in text


def test_a_search_of_scope_local_takes_all_but_the_plan_from_an_earlier_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    home = tinynet.project(tmp_path / "project")
    tinynet.copied_run(tinynet.deployed(tmp_path_factory).folder, home / "run")
    before = {path.name for path in (home / "run" / "stages").iterdir()}
    asked = ("--target", "this-machine", "--latency", "80%", "--run", "run", "--scope", "local")
    done = tinynet.edgeprune_here(home, "search", *asked)
    assert done.returncode == 0, done.stderr
    new = {path.name for path in (home / "run" / "stages").iterdir()} - before
    assert [name.rpartition("-")[0] for name in new] == ["plan"]
    found = read_json(SearchResult, home / "run" / "search.json")
    assert found.plan.scope == "local"
    grids = {c.group: tuple(w.width for w in c.choices) for c in found.curves}
    full = {c.group: c.channels for c in found.curves}
    assert all(is_even(c.widths, grids, full) for c in found.checks)
    assert found.chosen().ratio_high <= 0.8
