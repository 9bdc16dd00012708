"""Local search that closes the gap which a Lagrange multiplier leaves: the cheapest state near a given one, within a limit.

A *move* gives one variable another choice; moves of all variables are numbered in one row. Notation as in
:mod:`edgeprune.plan.solver.factor_graph`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.plan.solver.factor_graph import FactorGraph

MOST_MOVES = 1000  # pairs of moves are all tried, so this bounds a step to about a million sums
KICK_WORK = 4_000_000  # pairs of moves that one round of kicks may try, roughly


class Neighbourhood:
    """Searches around states for less cost with ``graph`` at most ``limit``.

    Args:
        graph: the latency.
        costs: cost of every choice, one array per variable.
        limit: largest value of ``graph`` that counts as feasible.
    """

    def __init__(self, graph: FactorGraph, costs: Sequence[np.ndarray], limit: float) -> None:
        self.graph, self.costs, self.limit = graph, costs, limit
        self._variable = np.repeat(np.arange(len(graph.sizes)), graph.sizes)
        self._choice = np.concatenate([np.arange(n) for n in graph.sizes])

    def cost(self, state: np.ndarray) -> float:
        """Total cost of a state."""
        return sum(float(cost[choice]) for cost, choice in zip(self.costs, state, strict=True))

    def feasible(self, state: np.ndarray) -> bool:
        """Whether the state is within the limit."""
        return self.graph.value(state) <= self.limit

    def improve(self, state: np.ndarray) -> np.ndarray | None:
        """The state reached by always taking the best move or pair of moves; ``None`` if no feasible one is reached.

        A feasible state goes where the cost falls most; an infeasible one goes to the cheapest feasible neighbour, or else where
        the latency falls most for its cost.
        """
        state = state.copy()
        while True:
            slack = self.limit - self.graph.value(state)
            moves, extra_cost, extra_time = self._moves(state)
            chosen = self._best_single(extra_cost, extra_time, slack)
            if chosen is None:
                chosen = self._best_pair(state, moves, extra_cost, extra_time, slack)
            if chosen is None:
                return state if slack >= 0 else None
            for move in moves[list(chosen)]:
                state[self._variable[move]] = self._choice[move]

    def kick(self, state: np.ndarray, seed: int) -> np.ndarray:
        """The best state found by disturbing a feasible one at random and improving again, a bounded number of times."""
        draw = np.random.default_rng(seed)
        best, best_cost = state, self.cost(state)
        tries = int(np.clip(KICK_WORK // min(len(self._choice), MOST_MOVES) ** 2, 2, 30))
        for _ in range(tries):
            kicked = best.copy()
            for variable in draw.integers(len(state), size=min(3, len(state))):
                kicked[variable] = draw.integers(self.graph.sizes[variable])
            found = self.improve(kicked)
            if found is not None and self.cost(found) < best_cost:
                best, best_cost = found, self.cost(found)
        return best

    def _moves(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The moves to try, with what each adds to the cost and to the latency; staying put is among them, with zeros."""
        time = np.concatenate([self.graph.along(state, v) for v in range(len(state))])
        cost = np.concatenate(self.costs)
        first = np.concatenate([[0], np.cumsum(self.graph.sizes)[:-1]])
        here = (first + state)[self._variable]
        moves = np.arange(len(time))
        distance = np.abs(self._choice - state[self._variable])
        reach = int(distance.max(initial=0))
        while reach > 1 and (distance <= reach).sum() > MOST_MOVES:
            reach -= 1
        moves = moves[distance <= reach]
        return moves, (cost - cost[here])[moves], (time - time[here])[moves]

    def _best_single(
        self, extra_cost: np.ndarray, extra_time: np.ndarray, slack: float
    ) -> tuple[int, ...] | None:
        """The feasible move that lowers the cost most, from a feasible state."""
        if slack < 0:
            return None
        allowed = np.where(extra_time <= slack, extra_cost, np.inf)
        best = int(allowed.argmin())
        return (best,) if allowed[best] < -self._negligible() else None

    def _best_pair(
        self,
        state: np.ndarray,
        moves: np.ndarray,
        extra_cost: np.ndarray,
        extra_time: np.ndarray,
        slack: float,
    ) -> tuple[int, ...] | None:
        """The best pair of moves of different variables, or one move where it is paired with staying put."""
        owner = self._variable[moves]
        time = extra_time[:, None] + extra_time[None, :]
        start = np.searchsorted(owner, np.arange(len(state) + 1))
        for first, second in self.graph.pairs:
            rows, columns = moves[owner == first], moves[owner == second]
            together = self.graph.interaction(state, (first, second))
            block = together[np.ix_(self._choice[rows], self._choice[columns])]
            time[start[first] : start[first + 1], start[second] : start[second + 1]] += block
        cost = extra_cost[:, None] + extra_cost[None, :]
        # One order of each pair is enough; two moves of one variable are no pair, but one of them alone is usable (the diagonal).
        unusable = owner[:, None] >= owner[None, :]
        np.fill_diagonal(unusable, False)
        np.fill_diagonal(time, extra_time)
        np.fill_diagonal(cost, extra_cost)
        feasible = (time <= slack) & ~unusable
        allowed = np.where(feasible, cost, np.inf)
        if slack >= 0:
            score, bar = allowed, -self._negligible()
        elif feasible.any():
            score, bar = allowed, np.inf
        else:
            gain = np.where((time < 0) & ~unusable, -time, 0.0)
            score, bar = -gain / (np.maximum(cost, 0.0) + self._negligible()), 0.0
        place = int(score.argmin())
        if not score.flat[place] < bar:
            return None
        row, column = divmod(place, len(moves))
        return (row,) if row == column else (row, column)

    def _negligible(self) -> float:
        """Cost differences up to this are rounding."""
        return 1e-12 * (1.0 + sum(float(cost.max()) for cost in self.costs))
