"""Variable elimination: exact against enumeration, and what replaces it where tables would be too large."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.plan.solver.factor_graph import FactorGraph


def random_graph(seed: int, **options: int) -> tuple[FactorGraph, list[np.ndarray]]:
    """Up to six variables of up to four choices, tables over one to three of them in any structure, and costs."""
    draw = np.random.default_rng(seed)
    sizes = [int(n) for n in draw.integers(1, 5, size=draw.integers(1, 7))]
    tables = {}
    for _ in range(draw.integers(0, 10)):
        count = min(int(draw.integers(1, 4)), len(sizes))
        scope = tuple(sorted(draw.choice(len(sizes), count, replace=False).tolist()))
        tables[scope] = draw.normal(size=[sizes[v] for v in scope])
    costs = [draw.normal(size=n) for n in sizes]
    return FactorGraph(sizes, tables, float(draw.normal()), **options), costs


def states(graph: FactorGraph) -> list[np.ndarray]:
    return [np.array(s) for s in itertools.product(*(range(n) for n in graph.sizes))]


def total(graph: FactorGraph, costs: list[np.ndarray], weight: float, state: np.ndarray) -> float:
    own = sum(float(cost[i]) for cost, i in zip(costs, state, strict=True))
    return own + weight * graph.value(state)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0, 7.0]))
def test_elimination_finds_the_minimum_of_all_states(seed: int, weight: float) -> None:
    graph, costs = random_graph(seed)
    assert graph.exact
    found = total(graph, costs, weight, graph.minimise(costs, weight))
    best = min(total(graph, costs, weight, state) for state in states(graph))
    assert abs(found - best) < 1e-9


@given(st.integers(0, 10_000))
def test_single_and_pair_changes_add_up_to_the_value(seed: int) -> None:
    graph, _ = random_graph(seed)
    draw = np.random.default_rng(seed)
    state = np.array([draw.integers(n) for n in graph.sizes])
    for pair in graph.pairs:
        first, second = pair
        together = graph.interaction(state, pair)
        for i, j in np.ndindex(together.shape):
            changed = state.copy()
            changed[first], changed[second] = i, j
            alone = [graph.along(state, v) for v in pair]
            steps = alone[0][i] - alone[0][state[first]] + alone[1][j] - alone[1][state[second]]
            expected = graph.value(state) + steps + together[i, j]
            assert abs(graph.value(changed) - expected) < 1e-9


@given(st.integers(0, 10_000))
def test_descent_ends_where_no_single_change_helps(seed: int) -> None:
    graph, costs = random_graph(seed, largest_table=3)
    state = graph.minimise(costs, 1.0)
    reached = total(graph, costs, 1.0, state)
    for variable, size in enumerate(graph.sizes):
        for choice in range(size):
            changed = state.copy()
            changed[variable] = choice
            assert total(graph, costs, 1.0, changed) >= reached - 1e-9


def test_a_long_chain_is_eliminated_with_small_tables_only() -> None:
    sizes = [16] * 200
    tables = {(i, i + 1): np.ones((16, 16)) for i in range(199)}
    assert FactorGraph(sizes, tables, largest_table=256).exact


def test_everything_tied_to_everything_falls_back_to_descent() -> None:
    sizes = [16] * 8
    tables = {pair: np.ones((16, 16)) for pair in itertools.combinations(range(8), 2)}
    assert not FactorGraph(sizes, tables).exact
