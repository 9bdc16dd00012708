"""The search against enumeration: feasible always, best almost always, never far from it."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_problems import enumerated, is_lawful, random_problem

from edgeprune.errors import BudgetError
from edgeprune.plan.latency.grid import thin
from edgeprune.plan.latency.model import Factor, LatencyModel
from edgeprune.plan.solver.solve import Problem, Solution, alternatives, fastest, pareto, solve


def limit_at(time_ms: np.ndarray, share: float) -> float:
    """A limit between the fastest structure and the dense one, both included whatever the order of summation rounds to."""
    return float(time_ms.min() + share * (time_ms.flat[-1] - time_ms.min())) + 1e-9


def test_small_problems_are_solved_within_the_limit_and_almost_always_exactly() -> None:
    draw = np.random.default_rng(0)
    exact, total = 0, 150
    for _ in range(total):
        problem = random_problem(draw, int(draw.integers(2, 7)), 4)
        time_ms, cost = enumerated(problem)
        limit_ms = limit_at(time_ms, draw.uniform(0.02, 0.98))
        best = float(cost[time_ms <= limit_ms].min())
        found = solve(problem, limit_ms)
        assert problem.model.predict(found.widths) <= limit_ms + 1e-12
        assert found.predicted_ms == pytest.approx(problem.model.predict(found.widths))
        assert found.cost_nats <= 1.05 * best + 1e-3 * cost.max()
        assert found.bound_nats is not None
        assert found.bound_nats <= best + 1e-9
        exact += found.cost_nats <= best + 1e-9
    assert exact >= 0.95 * total


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_larger_limit_never_costs_more(seed: int) -> None:
    draw = np.random.default_rng(seed)
    problem = random_problem(draw, int(draw.integers(2, 7)), 4)
    time_ms, _ = enumerated(problem)
    costs = [
        solve(problem, limit_at(time_ms, share)).cost_nats for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    # Exact solutions are monotone; the 5 % is what local search may leave.
    assert all(b <= 1.05 * a + 1e-9 for a, b in itertools.pairwise(costs))
    assert costs[-1] == 0


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_fastest_structure_is_the_fastest_of_all_and_is_the_last_feasible(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), 5, 4)
    time_ms, _ = enumerated(problem)
    edge = fastest(problem)
    assert edge.predicted_ms == pytest.approx(time_ms.min())
    assert solve(problem, edge.predicted_ms).predicted_ms <= edge.predicted_ms
    with pytest.raises(BudgetError, match=r"the fastest structure is predicted at"):
        solve(problem, 0.999 * edge.predicted_ms)
    with pytest.raises(BudgetError):
        alternatives(problem, 0.999 * edge.predicted_ms, 3, 2)


def test_the_message_of_an_infeasible_budget_names_a_limit_that_works() -> None:
    problem = random_problem(np.random.default_rng(3), 6, 4)
    with pytest.raises(BudgetError) as caught:
        solve(problem, 0.01)
    assert f"{fastest(problem).predicted_ms:.4g} ms" in caught.value.message
    suggested = float(str(caught.value.hint).split("at least ")[1].split(" ms")[0])
    assert solve(problem, suggested).predicted_ms <= suggested


def test_a_limit_above_the_dense_latency_prunes_nothing_that_costs() -> None:
    problem = random_problem(np.random.default_rng(4), 6, 4)
    found = solve(problem, 2 * problem.model.predict({}))
    assert found.cost_nats == 0
    assert found.bound_nats == 0


@given(st.integers(0, 10_000))
def test_the_front_is_the_convex_hull_of_all_structures(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), 4, 4)
    time_ms, cost = enumerated(problem)
    front = pareto(problem)
    times, costs = [s.predicted_ms for s in front], [s.cost_nats for s in front]
    assert times == sorted(times)
    assert costs == sorted(costs, reverse=True)
    assert times[0] == pytest.approx(time_ms.min())
    assert costs[-1] == pytest.approx(0)
    straight = np.vectorize(problem.model.straightened)
    hull = np.interp(straight(time_ms), straight(times), costs)
    assert (cost >= hull - 1e-6 * cost.max()).all()
    assert len(pareto(problem, points=3)) <= 3


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.floats(0.2, 0.8))
def test_alternatives_are_feasible_different_and_nearly_as_good(seed: int, share: float) -> None:
    problem = random_problem(np.random.default_rng(seed), 6, 6)
    time_ms, cost = enumerated(problem)
    limit_ms = limit_at(time_ms, share)
    found = alternatives(problem, limit_ms, 3, 2)
    assert found[0].cost_nats <= solve(problem, limit_ms).cost_nats
    assert [s.cost_nats for s in found] == sorted(s.cost_nats for s in found)
    for i, one in enumerate(found):
        assert problem.model.predict(one.widths) <= limit_ms + 1e-12
        for other in found[:i]:
            assert sum(one.widths[g] != other.widths[g] for g in problem.grids) >= 2
    assert all(s.cost_nats < 0.5 * cost.max() + found[0].cost_nats for s in found)


def test_alternatives_exist_and_cost_little_in_a_net_of_usual_size() -> None:
    problem = random_problem(np.random.default_rng(5), 20, 12)
    low, high = fastest(problem).predicted_ms, problem.model.predict({})
    found = alternatives(problem, (low + high) / 2, 3, 3)
    assert len(found) == 3
    assert found[-1].cost_nats < 1.1 * found[0].cost_nats


def test_the_same_problem_gives_the_same_result() -> None:
    def once() -> tuple[object, ...]:
        problem = random_problem(np.random.default_rng(6), 15, 8)
        low, high = fastest(problem).predicted_ms, problem.model.predict({})
        limit_ms = 0.4 * high + 0.6 * low
        return solve(problem, limit_ms), alternatives(problem, limit_ms, 3, 3), pareto(problem)

    assert once() == once()


def test_groups_without_a_choice_keep_their_width() -> None:
    grids = {"fixed": (24,), "free": (8, 16)}
    factor = Factor(("fixed", "free"), np.array([[1.0, 2.0]]))
    costs = {"fixed": np.zeros(1), "free": np.array([0.5, 0.0])}
    problem = Problem(grids, costs, LatencyModel(grids, (factor,)))
    assert solve(problem, 1.5).widths == {"fixed": 24, "free": 8}
    assert solve(problem, 2.5).widths == {"fixed": 24, "free": 16}
    only = {"fixed": (24,)}
    still = Problem(only, {"fixed": np.zeros(1)}, LatencyModel(only, (), 1.0))
    assert solve(still, 1.0).widths == only_widths(still)
    assert [s.widths for s in pareto(still)] == [only_widths(still)]
    assert len(alternatives(still, 1.0, 3, 3)) == 1
    with pytest.raises(BudgetError):
        solve(still, 0.9)


def only_widths(problem: Problem) -> dict[str, int]:
    return {name: grid[0] for name, grid in problem.grids.items()}


def test_a_net_too_entangled_for_elimination_is_still_solved_within_the_limit() -> None:
    draw = np.random.default_rng(7)
    names = [f"g{i}" for i in range(9)]
    grids = {name: tuple(range(8, 97, 8)) for name in names}
    factors = [
        Factor((a, b), draw.uniform(0.1, 1) * np.multiply.outer(grids[a], grids[b]) / 9216)
        for i, a in enumerate(names)
        for b in names[:i]
    ]
    costs = {name: draw.lognormal() * (96 / np.array(grids[name]) - 1) for name in names}
    problem = Problem(grids, costs, LatencyModel(grids, tuple(factors)))
    dense_ms = problem.model.predict({})
    found = solve(problem, 0.5 * dense_ms)
    assert found.bound_nats is None
    assert found.predicted_ms <= 0.5 * dense_ms
    # Far better than the same ratio everywhere: 64 of 96 channels is the largest uniform net below half the latency.
    uniform = dict.fromkeys(names, 64)
    assert problem.model.predict(uniform) <= 0.5 * dense_ms
    assert found.cost_nats < 0.97 * sum(float(c[7]) for c in costs.values())


def mobile_net(groups: int, widths: int) -> Problem:
    """An inverted-bottleneck chain: one spine a stage, an expanded group a block, its depthwise kernel, and the additions."""
    draw = np.random.default_rng(8)
    names, factors = ["s0"], []
    grids = {"s0": tuple(range(4, 4 * widths + 1, 4))}
    spine = "s0"
    for block in range(groups // 2):
        inner = f"b{block}"
        names.append(inner)
        grids[inner] = tuple(range(24, 24 * widths + 1, 24))
        into, out = spine, spine if block % 3 else f"s{block + 1}"
        if out not in grids:
            names.append(out)
            grids[out] = tuple(range(8, 8 * widths + 1, 8))
        spine = out
        for a, b in ((into, inner), (inner, out)):
            a_, b_ = np.array(grids[a]), np.array(grids[b])
            factors.append(Factor((a, b), 0.01 + 2e-5 * np.multiply.outer(a_, b_)))
        factors.append(Factor((inner,), 0.005 + 2e-4 * np.array(grids[inner])))
        factors.append(Factor((out,), 1e-4 * np.array(grids[out])))
    costs = {}
    for name in names:
        curve = np.sort(draw.exponential(size=widths)).cumsum()[::-1] * draw.lognormal()
        costs[name] = curve - curve[-1]
    return Problem(grids, costs, LatencyModel(grids, tuple(factors), 0.1))


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def test_a_mobile_net_is_solved_in_about_a_second_and_close_to_its_bound() -> None:
    problem = mobile_net(60, 16)
    assert len(problem.grids) >= 40
    low, high = fastest(problem).predicted_ms, problem.model.predict({})
    limit_ms = 0.5 * (low + high)
    found = solve(problem, limit_ms)
    assert found.bound_nats is not None
    assert found.cost_nats <= 1.02 * found.bound_nats
    assert cpu_seconds(lambda: solve(problem, limit_ms)) < 3
    assert cpu_seconds(lambda: pareto(problem)) < 3


class Shape:
    """A net as the search sees it: grids as the dominance filter leaves them, and for each kernel the time of every pair of widths."""

    def __init__(self, step: int) -> None:
        self.step, self.draw = step, np.random.default_rng(9)
        self.grids: dict[str, tuple[int, ...]] = {}
        self.factors: list[Factor] = []
        self.together: list[tuple[str, ...]] = []

    def group(self, name: str, channels: int, *, removable: bool = False) -> str:
        step = self.step if channels > self.step else self.step // 2
        widths = thin(tuple(range(step, channels + 1, step)))
        self.grids[name] = (0, *widths) if removable else widths
        return name

    def kernel(self, *groups: str, macs: int, gone: str = "") -> None:
        """One whose time is whole tiles of each side, with some noise; nothing where the block of ``gone`` is."""
        tiles = [np.ceil(np.array(self.grids[g]) / self.step) * self.step for g in groups]
        work = functools.reduce(np.multiply.outer, tiles) * float(macs)
        cost = (2e-3 + 1e-8 * work) * self.draw.normal(1, 0.01, work.shape)
        if gone in groups and self.grids[gone][0] == 0:
            cost[tuple(0 if g == gone else slice(None) for g in groups)] = 0.0
        elif gone and self.grids[gone][0] == 0:
            groups, cost = (gone, *groups), np.multiply.outer(np.array(self.grids[gone]) > 0, cost)
        self.factors.append(Factor(groups, cost))

    def problem(self) -> Problem:
        costs = {}
        for name, grid in self.grids.items():
            curve = np.sort(self.draw.exponential(size=len(grid))).cumsum()[::-1]
            costs[name] = (curve - curve[-1]) * self.draw.lognormal()
        model = LatencyModel(self.grids, tuple(self.factors), 0.05)
        return Problem(self.grids, costs, model, together=tuple(self.together))


def resnet50(step: int) -> Problem:
    """16 bottlenecks at 224 pixels: two inner groups a block, a spine a stage; all blocks but the first of each stage can go."""
    net = Shape(step)
    spine = net.group("stem", 64)
    net.kernel(spine, macs=147 * 112 * 112)
    for stage, (blocks, side) in enumerate(((3, 56), (4, 28), (6, 14), (3, 7))):
        for block in range(blocks):
            names = tuple(
                net.group(f"b{stage}.{block}.{i}", 64 << stage, removable=block > 0) for i in "ab"
            )
            out = net.group(f"s{stage}", 256 << stage) if block == 0 else spine
            net.kernel(spine, names[0], macs=side * side, gone=names[0])
            net.kernel(*names, macs=9 * side * side, gone=names[0])
            net.kernel(names[1], out, macs=side * side, gone=names[1])
            net.kernel(out, macs=side * side, gone=names[0])  # the addition
            if block == 0:
                net.kernel(spine, out, macs=side * side)
            else:
                net.together.append(names)
            spine = out
    net.kernel(spine, macs=1000)
    return net.problem()


def resnet56(widening: int, step: int) -> Problem:
    """Three stages of nine blocks at 32 pixels: a spine a stage, an inner group a block; all blocks but two can go."""
    net = Shape(step)
    spine = net.group("s0", 16 * widening)
    net.kernel(spine, macs=27 * 32 * 32)
    for stage, side in enumerate((32, 16, 8)):
        for block in range(9):
            is_first = stage > 0 and block == 0
            inner = net.group(f"b{stage}.{block}", 16 * widening << stage, removable=not is_first)
            out = net.group(f"s{stage}", 16 * widening << stage) if is_first else spine
            net.kernel(spine, inner, macs=9 * side * side, gone=inner)
            net.kernel(inner, out, macs=9 * side * side, gone=inner)
            net.kernel(out, macs=side * side, gone=inner)  # the addition
            if is_first:
                net.kernel(spine, out, macs=side * side)
            spine = out
    net.kernel(spine, macs=10)
    return net.problem()


def mobilenet_v2(step: int) -> Problem:
    """17 inverted bottlenecks at 224 pixels: an expanded group a block, a spine for every run of blocks that are added up."""
    net = Shape(step)
    first = net.group("stem", 32)
    net.kernel(first, macs=27 * 112 * 112)
    spine, side = net.group("s0", 16), 112
    net.kernel(first, macs=9 * side * side)
    net.kernel(first, spine, macs=side * side)
    channels, number = 16, 0
    for run, (out_channels, blocks, stride) in enumerate(
        ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)), start=1
    ):
        for block in range(blocks):
            number += 1
            inner = net.group(f"b{number}", 6 * channels, removable=block > 0)
            out = net.group(f"s{run}", out_channels) if block == 0 else spine
            net.kernel(spine, inner, macs=side * side, gone=inner)
            side //= stride if block == 0 else 1
            net.kernel(inner, macs=9 * side * side, gone=inner)
            net.kernel(inner, out, macs=side * side, gone=inner)
            if block > 0:
                net.kernel(out, macs=side * side, gone=inner)
            spine, channels = out, out_channels
    last = net.group("last", 1280)
    net.kernel(spine, last, macs=side * side)
    net.kernel(last, macs=1000)
    return net.problem()


@pytest.mark.parametrize(
    ("problem", "groups"),
    [
        pytest.param(resnet56(1, 8), 30, id="ResNet-56"),
        pytest.param(resnet56(4, 8), 30, id="ResNet-56, four times as wide"),
        pytest.param(resnet50(16), 37, id="ResNet-50"),
        pytest.param(mobilenet_v2(8), 25, id="MobileNetV2"),
        pytest.param(mobilenet_v2(16), 25, id="MobileNetV2, wide tiles"),
    ],
)
def test_nets_of_the_usual_shapes_are_solved_in_under_a_second(
    problem: Problem, groups: int
) -> None:
    assert len(problem.grids) == groups
    low, high = fastest(problem).predicted_ms, problem.model.predict({})
    for share in (0.7, 0.5, 0.3):
        limit_ms = low + share * (high - low)
        found: list[Solution] = []
        seconds = cpu_seconds(lambda limit=limit_ms, to=found: to.append(solve(problem, limit)))  # type: ignore[misc]
        assert seconds < 1
        (solution,) = found
        assert solution.predicted_ms <= limit_ms
        assert is_lawful(problem, solution)
        assert solution.bound_nats is not None
        assert solution.cost_nats <= 1.05 * solution.bound_nats
    assert cpu_seconds(lambda: pareto(problem)) < 2


@pytest.mark.parametrize(
    ("costs", "match"),
    [
        ({"a": np.array([1.0, 2.0, 0.0])}, "must fall to 0"),
        ({"a": np.array([2.0, 1.0, 0.5])}, "must fall to 0"),
        ({"a": np.array([1.0, 0.0])}, "one finite cost"),
        ({"a": np.array([np.inf, 1.0, 0.0])}, "one finite cost"),
        ({"b": np.array([2.0, 1.0, 0.0])}, "same groups"),
    ],
)
def test_costs_that_make_no_sense_are_refused(costs: dict[str, np.ndarray], match: str) -> None:
    grids = {"a": (8, 16, 24)}
    with pytest.raises(ValueError, match=match):
        Problem(grids, costs, LatencyModel(grids, ()))
