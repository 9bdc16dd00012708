"""Local search: pairs of moves that no single move can replace, and the way back to feasible states."""

from __future__ import annotations

import numpy as np

from edgeprune.plan.solver.factor_graph import FactorGraph
from edgeprune.plan.solver.local_search import Neighbourhood

PREFERS_ONES = [np.array([1.0, 0.0]), np.array([2.0, 0.0])]


def neighbourhood(table: list[list[float]], limit: float) -> Neighbourhood:
    return Neighbourhood(FactorGraph([2, 2], {(0, 1): np.array(table)}), PREFERS_ONES, limit)


def improved(near: Neighbourhood, *state: int) -> list[int] | None:
    found = near.improve(np.array(state))
    return None if found is None else found.tolist()


def test_two_moves_that_only_fit_together_are_made_together() -> None:
    assert improved(neighbourhood([[0, 10], [10, 1]], 1), 0, 0) == [1, 1]


def test_two_moves_that_only_fit_alone_are_not_made_together() -> None:
    near = neighbourhood([[0, 1], [1, 10]], 2)
    assert improved(near, 0, 0) == [0, 1]
    assert near.cost(np.array([0, 1])) == 1.0


def test_a_state_over_the_limit_goes_to_the_cheapest_feasible_neighbour() -> None:
    assert improved(neighbourhood([[0, 1], [1, 10]], 2), 1, 1) == [0, 1]


def test_a_state_over_the_limit_descends_step_by_step_when_no_pair_is_enough() -> None:
    graph = FactorGraph([3, 3, 3], {(v,): np.array([0.0, 1.0, 2.0]) for v in range(3)})
    costs = [np.array([2.0, 1.0, 0.0]) for _ in range(3)]
    assert improved(Neighbourhood(graph, costs, 0.0), 2, 2, 2) == [0, 0, 0]


def test_no_feasible_state_in_reach_is_said() -> None:
    assert improved(neighbourhood([[5, 5], [5, 5]], 1), 1, 1) is None


def test_many_choices_are_searched_within_reach_and_still_improve() -> None:
    sizes = [400, 400, 400]
    graph = FactorGraph(sizes, {(v,): np.arange(400.0) for v in range(3)})
    costs = [(399.0 - np.arange(400)) ** 2 for _ in range(3)]
    near = Neighbourhood(graph, costs, 600.0)
    found = near.improve(np.array([0, 300, 300]))
    assert found is not None
    assert found.tolist() == [200, 200, 200]


def test_kicks_never_leave_the_limit_and_never_lose() -> None:
    draw = np.random.default_rng(0)
    tables = {(i, i + 1): draw.uniform(0, 1, (5, 5)) for i in range(5)}
    graph = FactorGraph([5] * 6, tables)
    costs = [np.sort(draw.uniform(0, 1, 5))[::-1] for _ in range(6)]
    near = Neighbourhood(graph, costs, 1.5)
    start = graph.minimise([np.zeros(5)] * 6, 1.0)
    assert near.feasible(start)
    found = near.kick(start, seed=0)
    assert near.feasible(found)
    assert near.cost(found) < near.cost(start)
    assert found.tolist() == near.kick(start, seed=0).tolist()
