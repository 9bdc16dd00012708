"""The search where groups have width 0 together or not at all, against enumeration."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_problems import enumerated, is_lawful, random_problem

from edgeprune.plan.latency.model import Factor, LatencyModel
from edgeprune.plan.solver.solve import Problem, alternatives, fastest, pareto, solve


def tied_problem(draw: np.random.Generator, groups: int, widths: int) -> Problem:
    """A random problem in which some groups lie in blocks of one to three; at width 0 kernels take any time, and costs are any."""
    plain = random_problem(draw, groups, widths)
    order = draw.permutation(list(plain.grids)).tolist()
    together, sizes = [], draw.integers(1, 4, size=2)
    for size in sizes:
        together.append(tuple(order[:size]))
        order = order[size:]
    removable = {name for names in together for name in names}
    grids = {n: (0, *grid) if n in removable else grid for n, grid in plain.grids.items()}
    costs = {
        n: np.concatenate([[draw.exponential()], c]) if len(c) < len(grids[n]) else c
        for n, c in plain.cost_nats.items()
    }
    for (name,) in (names for names in together if len(names) == 1):
        costs[name][0] += costs[name][1]
    factors = []
    for factor in plain.model.factors:
        front = [(int(name in removable), 0) for name in factor.variables]
        table = np.pad(factor.cost_ms, front)
        table[table == 0] = draw.uniform(0, 0.3, (table == 0).sum())
        factors.append(replace(factor, cost_ms=table))
    model = replace(plain.model, grids=grids, factors=tuple(factors))
    return Problem(grids, costs, model, together=tuple(n for n in together if len(n) > 1))


def lawful(problem: Problem) -> np.ndarray:
    """Which structures have whole blocks, one axis per group."""
    names = list(problem.grids)
    found = np.ones([len(grid) for grid in problem.grids.values()], dtype=bool)
    for together in problem.together:
        gone = [
            (np.arange(len(problem.grids[n])) == 0).reshape(
                [-1 if name == n else 1 for name in names]
            )
            for n in together
        ]
        found &= functools.reduce(np.logical_and, gone) | ~functools.reduce(np.logical_or, gone)
    return found


def test_groups_of_a_block_are_removed_together_and_almost_always_where_that_is_best() -> None:
    draw = np.random.default_rng(11)
    exact, removed, total = 0, 0, 150
    for _ in range(total):
        problem = tied_problem(draw, int(draw.integers(6, 8)), 3)
        time_ms, cost = enumerated(problem)
        allowed = lawful(problem)
        assert problem.together == () or not allowed.all()
        low, high = time_ms[allowed].min(), problem.model.predict({})
        limit_ms = float(low + draw.uniform(0.02, 0.98) * (high - low)) + 1e-9
        best = float(cost[allowed & (time_ms <= limit_ms)].min())
        found = solve(problem, limit_ms)
        assert is_lawful(problem, found)
        assert problem.model.predict(found.widths) <= limit_ms + 1e-12
        assert found.predicted_ms == pytest.approx(problem.model.predict(found.widths))
        own = sum(problem.cost_nats[n][problem.grids[n].index(w)] for n, w in found.widths.items())
        assert found.cost_nats == pytest.approx(own)
        assert found.bound_nats is not None
        assert found.bound_nats <= best + 1e-9
        exact += found.cost_nats <= best + 1e-9
        removed += any(not found.widths[n] for names in problem.together for n in names)
    assert exact >= 0.95 * total
    assert 0.1 * total < removed < 0.9 * total


@given(st.integers(0, 10_000))
def test_the_front_of_whole_blocks_is_the_hull_of_all_structures_that_have_them(seed: int) -> None:
    problem = tied_problem(np.random.default_rng(seed), 6, 3)
    time_ms, cost = enumerated(problem)
    allowed = lawful(problem)
    front = pareto(problem)
    assert all(is_lawful(problem, s) for s in front)
    times, costs = [s.predicted_ms for s in front], [s.cost_nats for s in front]
    assert times[0] == pytest.approx(time_ms[allowed].min())
    assert fastest(problem).predicted_ms == pytest.approx(times[0])
    assert costs[-1] == pytest.approx(cost[allowed].min())
    straight = np.vectorize(problem.model.straightened)
    hull = np.interp(straight(time_ms[allowed]), straight(times), costs)
    assert (cost[allowed] >= hull - 1e-6 * cost.max()).all()


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.floats(0.2, 0.8))
def test_alternatives_differ_in_widths_and_not_only_in_what_is_gone(
    seed: int, share: float
) -> None:
    problem = tied_problem(np.random.default_rng(seed), 7, 3)
    low, high = fastest(problem).predicted_ms, problem.model.predict({})
    limit_ms = low + share * max(0.0, high - low) + 1e-9
    found = alternatives(problem, limit_ms, 3, 2)
    for i, one in enumerate(found):
        assert is_lawful(problem, one)
        assert problem.model.predict(one.widths) <= limit_ms + 1e-12
        for other in found[:i]:
            assert sum(one.widths[g] != other.widths[g] for g in problem.grids) >= 2


def test_a_block_that_has_no_choice_is_left_as_it_is_and_half_a_choice_is_refused() -> None:
    grids = {"a": (0,), "b": (0,), "c": (8, 16)}
    costs = {"a": np.zeros(1), "b": np.zeros(1), "c": np.array([1.0, 0.0])}
    model = LatencyModel(grids, (Factor(("a", "c"), np.array([[1.0, 2.0]])),))
    gone = Problem(grids, costs, model, together=(("a", "b"),))
    assert solve(gone, 1.5).widths == {"a": 0, "b": 0, "c": 8}
    for other in ((8, 16), (0, 8)):
        mixed = {"a": (0,), "b": other}
        halves = {"a": np.zeros(1), "b": np.array([1.0, 0.0])}
        with pytest.raises(ValueError, match="must have width 0 and others, or none"):
            Problem(mixed, halves, LatencyModel(mixed, ()), together=(("a", "b"),))
