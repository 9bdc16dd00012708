"""The widths that cost the least accuracy within a latency limit, and the whole trade-off between the two.

Costs are predicted loss increases in nats, one curve per channel group; latency comes from a
:class:`~edgeprune.plan.latency.model.LatencyModel`. The search minimises the sum of the costs subject to the limit. With a multiplier on
the latency the problem is solved exactly by variable elimination; the multiplier is driven to the limit along the convex hull of the
trade-off, which also yields a lower bound; local search then closes the gap that the hull leaves. The same input gives the same result.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.errors import BudgetError
from edgeprune.plan.latency.model import LatencyModel
from edgeprune.plan.solver.factor_graph import FactorGraph
from edgeprune.plan.solver.local_search import Neighbourhood
from edgeprune.plan.solver.tied import untied

MOST_TURNS = 80  # of the multiplier; about ten are usual


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be decided.

    ``grids`` are the widths of every group, ascending, the full one last; they are the model's. ``cost_nats[group][i]`` is the cost of
    keeping ``grids[group][i]`` channels: never rising with width, and 0 at the full width. Where ``even`` is given, it says how many
    channels each group has when nothing is cut, and only :func:`even_structures` are looked at.

    The groups of each set in ``together`` have width 0 all or none. That is one decision, which costs the sum of their costs at width 0;
    what one of them costs there says nothing alone, and may lie below its cost at the next width.
    """

    grids: Mapping[str, tuple[int, ...]]
    cost_nats: Mapping[str, np.ndarray]
    model: LatencyModel
    even: Mapping[str, int] | None = None
    together: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if set(self.grids) != set(self.cost_nats) or dict(self.grids) != dict(self.model.grids):
            raise ValueError(
                "grids, costs and the latency model must have the same groups and widths"
            )
        for names in self.together:
            kinds = {(self.grids[n][0] == 0, len(self.grids[n]) > 1) for n in names}
            if len(kinds) > 1 and any(has_zero for has_zero, _ in kinds):
                raise ValueError(f"all of {names} must have width 0 and others, or none")
        tied = {name for names in self.tied() for name in names}
        for name, grid in self.grids.items():
            cost = self.cost_nats[name]
            if cost.shape != (len(grid),) or not np.isfinite(cost).all():
                raise ValueError(f"{name} must have one finite cost for each of {grid}, not {cost}")
            cost = cost[1:] if name in tied else cost
            if (np.diff(cost) > 1e-9 * (1 + abs(cost[0]))).any() or abs(cost[-1]) > 1e-9:
                raise ValueError(f"the cost of {name} must fall to 0 at full width, but is {cost}")

    def tied(self) -> list[tuple[str, ...]]:
        """The sets of several groups that have a choice between width 0 and others."""
        several = [names for names in self.together if len(names) > 1]
        grids = [self.grids[names[0]] for names in several]
        return [n for n, g in zip(several, grids, strict=True) if g[0] == 0 and len(g) > 1]


@dataclass(frozen=True)
class Solution:
    """One structure with its predictions. ``bound_nats`` is what no structure within the limit can undercut, where that is known."""

    widths: dict[str, int]
    predicted_ms: float
    cost_nats: float
    bound_nats: float | None = None


def solve(problem: Problem, limit_ms: float) -> Solution:
    """The cheapest structure found that is predicted to stay within the limit.

    Args:
        problem: what is to be decided.
        limit_ms: largest predicted latency, at least 0.

    Raises:
        BudgetError: even the fastest structure is over the limit; names its latency.
    """
    if problem.even is not None:
        return _widest(even_structures(problem), limit_ms)
    search = _Search.of(problem)
    state, bound = search.solve(search.straightened(limit_ms))
    return replace(search.solution(state), bound_nats=bound)


def fastest(problem: Problem) -> Solution:
    """The structure with the lowest predicted latency; among equals the cheapest."""
    if problem.even is not None:
        return min(even_structures(problem), key=lambda s: (s.predicted_ms, s.cost_nats))
    search = _Search.of(problem)
    return search.solution(search.fastest())


def pareto(problem: Problem, *, points: int = 64) -> tuple[Solution, ...]:
    """Structures on the convex hull of (latency without its bend, cost), fastest first, none beaten in both by any structure.

    Args:
        problem: what is to be decided.
        points: at most this many; the widest gaps are filled first.

    Of a problem that is ``even`` they need not lie on the hull, and are at even distances in what there is.
    """
    if problem.even is not None:
        return _even_front(even_structures(problem), points)
    search = _Search.of(problem)
    ends = [search.fastest(), search.cheapest()]
    front = sorted({search.point(state): state for state in ends}.items(), key=lambda e: e[0])
    done: set[tuple[float, float]] = set()
    while len(front) < points:
        gaps = [
            (b[0] - a[0], i)
            for i, ((a, _), (b, _)) in enumerate(itertools.pairwise(front))
            if a not in done
        ]
        if not gaps:
            break
        _, i = max(gaps)
        (fast, _), (cheap, _) = front[i], front[i + 1]
        state = search.between(fast, cheap)
        if state is None:
            done.add(fast)
        else:
            front.insert(i + 1, (search.point(state), state))
    return tuple(search.solution(state) for _, state in front)


def even_structures(problem: Problem) -> list[Solution]:
    """The structures in which every group keeps the same share of its channels, from the narrowest to the widest.

    A group takes the width nearest to its share, the wider of two at the same distance. No block is removed for it, so width 0 is only
    that of a group which has no other.
    """
    full = problem.even or {name: grid[-1] for name, grid in problem.grids.items()}
    grids = {name: [w for w in grid if w] or [0] for name, grid in problem.grids.items()}
    turns = {
        name: [(a + b) / 2 / full[name] for a, b in itertools.pairwise(grid)]
        for name, grid in grids.items()
    }
    found = []
    for share in sorted({0.0}.union(*turns.values())):
        widths = {n: grid[bisect.bisect_right(turns[n], share)] for n, grid in grids.items()}
        cost = sum(
            float(problem.cost_nats[n][problem.grids[n].index(w)]) for n, w in widths.items()
        )
        found.append(Solution(widths, problem.model.predict(widths), cost))
    return found


def _widest(structures: Sequence[Solution], limit_ms: float) -> Solution:
    """The last structure within the limit; BudgetError if none is."""
    fitting = [s for s in structures if s.predicted_ms <= limit_ms]
    if not fitting:
        raise _out_of_reach(limit_ms, min(s.predicted_ms for s in structures))
    return fitting[-1]


def _even_front(structures: Sequence[Solution], points: int) -> tuple[Solution, ...]:
    """The structures that are faster than all wider ones, fastest first; as many of them."""
    front: list[Solution] = []
    for structure in reversed(structures):
        if not front or structure.predicted_ms < front[-1].predicted_ms:
            front.append(structure)
    chosen = np.unique(np.linspace(0, len(front) - 1, min(points, len(front))).round().astype(int))
    return tuple(front[i] for i in reversed(chosen))


def _out_of_reach(limit_ms: float, reach_ms: float) -> BudgetError:
    return BudgetError(
        f"the limit is {limit_ms:.4g} ms, but the fastest structure is predicted at {reach_ms:.4g} ms",
        hint=f"allow at least {math.ceil(1000 * reach_ms) / 1000:.3f} ms, or let more layers be pruned",
    )


def evened(problem: Problem, weights: Sequence[float], limit_ms: float) -> list[Problem]:
    """The problem, once for each weight, with costs that also grow with how unevenly groups are cut.

    The cost of a group is measured with all other groups whole. Where every group is cut deep, that says too little: a width that the
    others made up for is missed once they are narrow, too. ``t log(W / w)`` knows nothing of the weights: ``w`` of ``W`` channels stay,
    ``t`` ms are what the group can save. Under it every group is cut by the same share where latency is a product of widths, and by more
    where the device gains more. Both costs are scaled by those of the best structure without it.

    Args:
        problem: no width is 0 but that of a group which has no other.
        weights: of the second cost against the first, at least 0.
        limit_ms: largest predicted latency.

    Raises:
        BudgetError: no structure is predicted to be fast enough.

    Source: our own derivation. What it brings is in ``benchmarks/results/compare-resnet20-wide.json`` (``edgeprune-minus-evenness``).
    """
    plain, thinning = problem.cost_nats, _thinning(problem.model)
    first = solve(problem, limit_ms).widths

    def total(costs: Mapping[str, np.ndarray]) -> float:
        return sum(float(costs[g][problem.grids[g].index(w)]) for g, w in first.items())

    of_plain, of_thinning = (1 / max(total(costs), 1e-12) for costs in (plain, thinning))
    return [
        replace(
            problem,
            cost_nats={g: plain[g] * of_plain + thinning[g] * of_thinning * weight for g in plain},
        )
        for weight in weights
    ]


def _thinning(model: LatencyModel) -> dict[str, np.ndarray]:
    """``t log(W / w)`` of every width of every group: see :func:`evened`."""
    widest = {name: grid[-1] for name, grid in model.grids.items()}
    whole_ms = model.predict(widest)
    found = {}
    for name, grid in model.grids.items():
        saved_ms = max(0.0, whole_ms - model.predict({**widest, name: grid[0]}))
        found[name] = saved_ms * np.log([grid[-1] / w if w else 1.0 for w in grid])
    return found


def alternatives(
    problem: Problem, limit_ms: float, count: int, min_changes: int
) -> tuple[Solution, ...]:
    """Cheap structures within the limit that differ from each other in many groups, so that one bad prediction does not spoil all.

    Args:
        problem: what is to be decided.
        limit_ms: as for :func:`solve`.
        count: how many, the one of :func:`solve` included.
        min_changes: every two differ in at least this many groups (in all of them, where there are fewer).

    Returns:
        Up to ``count`` solutions, the cheapest first; fewer where the limit leaves no room for more, one where the problem is ``even``.

    Raises:
        BudgetError: as :func:`solve`.
    """
    if problem.even is not None:  # there is but one ratio
        return (solve(problem, limit_ms),)
    search = _Search.of(problem)
    limit_ms = search.straightened(limit_ms)
    state, _ = search.solve(limit_ms)
    found = [state]
    while len(found) < count:
        other = search.solve_apart(limit_ms, found, min_changes)
        if other is None:
            break
        found.append(other)
    solutions = (search.solution(state) for state in found)
    return tuple(sorted(solutions, key=lambda s: s.cost_nats))


@dataclass(frozen=True, eq=False)
class _Search:
    """A problem as numbered variables: only groups that have a choice take part. A *point* is (latency in ms, cost in nats).

    Latencies and limits are those of the model without its bend, which does not change their order: see :meth:`LatencyModel.bent`.

    Of groups that have width 0 together only the first has that choice, and bears what it costs. The widths of the others then change no
    latency, so that the full one, which costs nothing, is the best of them: the coupling needs no table of its own, and stays exact.
    """

    grids: Mapping[str, tuple[int, ...]]
    names: list[str]
    costs: list[np.ndarray]
    graph: FactorGraph
    model: LatencyModel
    together: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, problem: Problem) -> _Search:
        """The search for a problem."""
        together = problem.tied()
        model = untied(problem.model, together)
        curves = {name: np.asarray(cost, dtype=float) for name, cost in problem.cost_nats.items()}
        for first, *others in together:
            curves[first] = curves[first].copy()
            curves[first][0] += sum(float(curves[name][0]) for name in others)
            curves.update((name, curves[name][1:]) for name in others)
        names = [name for name, grid in model.grids.items() if len(grid) > 1]
        number = {name: i for i, name in enumerate(names)}
        constant, factors = model.merged()
        tables: dict[tuple[int, ...], np.ndarray] = {}
        for factor in factors:
            free = [number[name] for name in factor.variables if name in number]
            scope = tuple(sorted(free))
            # A group without a choice has an axis of length 1, which goes.
            table = np.transpose(factor.cost_ms.squeeze(), [free.index(v) for v in scope])
            tables[scope] = tables[scope] + table if scope in tables else table
        constant += float(tables.pop((), np.zeros(())))
        costs = [curves[name] for name in names]
        graph = FactorGraph([len(c) for c in costs], tables, constant)
        return cls(model.grids, names, costs, graph, model, together)

    def straightened(self, limit_ms: float) -> float:
        """The limit without the bend; what is predicted to take exactly the limit is within it in spite of rounding."""
        bend = self.model.bend_per_ms
        return self.model.straightened(limit_ms) * (1 + 1e-12) if bend else limit_ms

    @property
    def total_cost(self) -> float:
        """Cost of the worst choice everywhere, as the unit of what is negligible."""
        return max(sum(float(cost.max()) for cost in self.costs), 1e-300)

    def solution(self, state: np.ndarray) -> Solution:
        """The state in words."""
        state = self._settled(state)
        time, cost = self.point(state)
        return Solution(self._widths(state), self.model.bent(time), cost)

    def _widths(self, state: np.ndarray) -> dict[str, int]:
        widths = {name: grid[-1] for name, grid in self.grids.items()}
        for name, choice in zip(self.names, state, strict=True):
            widths[name] = self.grids[name][choice]
        for first, *others in self.together:
            if widths[first] == 0:
                widths.update(dict.fromkeys(others, 0))
        return widths

    def _settled(self, state: np.ndarray) -> np.ndarray:
        """The state in which all that has no width costs nothing of its own."""
        state = state.copy()
        for variable in self._without_choice(state):
            state[variable] = self.graph.sizes[variable] - 1
        return state

    def _without_choice(self, state: np.ndarray) -> set[int]:
        """Variables of groups that have width 0 because the first of their set has."""
        if not self.together:
            return set()
        place = {name: i for i, name in enumerate(self.names)}
        gone = [others for first, *others in self.together if state[place[first]] == 0]
        return {place[name] for others in gone for name in others if name in place}

    def point(self, state: np.ndarray) -> tuple[float, float]:
        """Latency and cost of a state."""
        cost = sum(float(c[choice]) for c, choice in zip(self.costs, state, strict=True))
        return self.graph.value(state), cost

    def fastest(self) -> np.ndarray:
        """The state of least latency; a trace of the costs breaks ties."""
        trace = 1e-9 * self._typical_ms() / self.total_cost
        return self.graph.minimise([trace * cost for cost in self.costs], 1.0)

    def cheapest(self) -> np.ndarray:
        """The state of least cost; a trace of the latency breaks ties."""
        return self.graph.minimise(
            self.costs, 1e-9 * max(self.total_cost, 1e-9) / self._typical_ms()
        )

    def between(self, fast: tuple[float, float], cheap: tuple[float, float]) -> np.ndarray | None:
        """A state on the hull strictly between two points of it, or ``None`` if the hull is straight there."""
        span_ms, span_nats = cheap[0] - fast[0], fast[1] - cheap[1]
        if span_ms <= 1e-12 * abs(cheap[0]) or span_nats <= 1e-12 * self.total_cost:
            return None
        weight = span_nats / span_ms
        state = self.graph.minimise(self.costs, weight)
        time, cost = self.point(state)
        gain = (fast[1] + weight * fast[0]) - (cost + weight * time)
        if gain <= 1e-9 * span_nats or not fast[0] < time < cheap[0]:
            return None
        return state

    def solve(self, limit_ms: float, *, kicks: bool = True) -> tuple[np.ndarray, float | None]:
        """The best state found within the limit, and the lower bound of the cost where elimination is exact."""
        fast, cheap = self._within(limit_ms), self.cheapest()
        if self.graph.value(cheap) <= limit_ms:
            return cheap, self.point(cheap)[1]
        starts = [fast, cheap]
        low, high = self.point(fast), self.point(cheap)
        for _ in range(MOST_TURNS):
            state = self.between(low, high)
            if state is None:
                break
            starts.append(state)
            if self.graph.value(state) <= limit_ms:
                low = self.point(state)
            else:
                high = self.point(state)
        slope = (low[1] - high[1]) / (high[0] - low[0])
        bound = max(0.0, low[1] - slope * (limit_ms - low[0])) if self.graph.exact else None
        return self._repair(limit_ms, starts, kicks=kicks), bound

    def _within(self, limit_ms: float) -> np.ndarray:
        """The fastest state; BudgetError if it is over the limit."""
        fast = self.fastest()
        if self.graph.value(fast) <= limit_ms:
            return fast
        if not self.graph.exact:  # the descent may have stopped short of the fastest
            found = Neighbourhood(self.graph, self.costs, limit_ms).improve(fast)
            if found is not None:
                return found
        raise _out_of_reach(self.model.bent(limit_ms), self.model.bent(self.graph.value(fast)))

    def _repair(self, limit_ms: float, starts: list[np.ndarray], *, kicks: bool) -> np.ndarray:
        """The cheapest state that local search reaches from the points nearest to the limit, on both sides of it."""
        near = Neighbourhood(self.graph, self.costs, limit_ms)
        starts = sorted(starts, key=lambda s: abs(self.graph.value(s) - limit_ms))
        within = min((s for s in starts if near.feasible(s)), key=near.cost)
        reached = [near.improve(state) for state in (within, *starts[:4])]
        best = min((state for state in reached if state is not None), key=near.cost)
        return near.kick(best, seed=0) if kicks else best

    def solve_apart(
        self, limit_ms: float, others: list[np.ndarray], min_changes: int
    ) -> np.ndarray | None:
        """A cheap state that differs from each of the others in enough variables: what they chose is charged extra, ever more."""
        min_changes = max(1, min(min_changes, len(self.costs)))
        typical = max(self.total_cost / max(len(self.costs), 1), 1e-9)
        for charge in np.geomspace(1e-3, 1e2, 11) * typical:
            costs = [cost.copy() for cost in self.costs]
            for other in others:
                free = self._without_choice(other)
                for variable, choice in enumerate(other):
                    if variable not in free:
                        costs[variable][choice] += charge
            try:
                state, _ = replace(self, costs=costs).solve(limit_ms, kicks=False)
            except BudgetError:  # at the edge of what is feasible the charge can tip a tie over it
                return None
            if all(self._changes(state, other) >= min_changes for other in others):
                return state
        return None

    def _changes(self, state: np.ndarray, other: np.ndarray) -> int:
        """How many groups have another width."""
        mine, theirs = self._widths(state), self._widths(other)
        return sum(mine[name] != theirs[name] for name in mine)

    def _typical_ms(self) -> float:
        state = np.array([n - 1 for n in self.graph.sizes], dtype=int)
        return max(abs(self.graph.value(state)), 1e-12)
