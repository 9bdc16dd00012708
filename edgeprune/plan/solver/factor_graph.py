"""Sums of tables over few variables each, minimised exactly by eliminating one variable after another.

Variables are numbered from 0; a *state* holds one choice (a position in the grid) per variable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LARGEST_TABLE = 1_000_000


@dataclass(frozen=True)
class _Step:
    """Eliminate ``variable``: add up these joint tables and earlier results, each reshaped to broadcast over ``scope``."""

    variable: int
    scope: tuple[int, ...]
    joint: tuple[tuple[int, tuple[int, ...]], ...]
    results: tuple[tuple[int, tuple[int, ...]], ...]


class FactorGraph:
    """A function of the state: ``constant + sum of unary[v][state[v]] + sum of joint tables``.

    Args:
        sizes: number of choices of every variable.
        tables: scopes (ascending variables) with their tables, one axis per variable.
        constant: added to everything.
        largest_table: elimination that would need a larger table than this is replaced by coordinate descent, which is not exact.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        tables: Mapping[tuple[int, ...], np.ndarray],
        constant: float = 0.0,
        *,
        largest_table: int = LARGEST_TABLE,
    ) -> None:
        self.sizes = tuple(sizes)
        self.constant = constant
        self.unary = [np.zeros(n) for n in self.sizes]
        self.joint: list[tuple[tuple[int, ...], np.ndarray]] = []
        for scope, table in tables.items():
            if len(scope) == 1:
                self.unary[scope[0]] = self.unary[scope[0]] + table
            else:
                self.joint.append((scope, table))
        self.touching: list[list[int]] = [[] for _ in self.sizes]
        self.pairs: dict[tuple[int, int], list[int]] = {}
        for number, (scope, _) in enumerate(self.joint):
            for variable in scope:
                self.touching[variable].append(number)
            for pair in itertools.combinations(scope, 2):
                self.pairs.setdefault(pair, []).append(number)
        self._plan = self._elimination(largest_table)

    @property
    def exact(self) -> bool:
        """Whether :meth:`minimise` is exact."""
        return self._plan is not None

    def value(self, state: np.ndarray) -> float:
        """The function at one state."""
        total = self.constant
        for variable, choice in enumerate(state):
            total += float(self.unary[variable][choice])
        for scope, table in self.joint:
            total += float(table[tuple(state[list(scope)])])
        return total

    def along(self, state: np.ndarray, variable: int) -> np.ndarray:
        """What the tables with ``variable`` add up to at each of its choices, the others as in ``state``: ``[choices]``."""
        total = self.unary[variable].copy()
        for number in self.touching[variable]:
            scope, table = self.joint[number]
            total += table[tuple(slice(None) if v == variable else state[v] for v in scope)]
        return total

    def interaction(self, state: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
        """What changing both variables adds beyond the sum of changing each: ``[choices of the first, choices of the second]``."""
        first, second = pair
        total = np.zeros((self.sizes[first], self.sizes[second]))
        for number in self.pairs[pair]:
            scope, table = self.joint[number]
            total += table[tuple(slice(None) if v in pair else state[v] for v in scope)]
        here = total[state[first], :][None, :]
        there = total[:, state[second]][:, None]
        result: np.ndarray = total - here - there + total[state[first], state[second]]
        return result

    def minimise(self, costs: Sequence[np.ndarray], weight: float) -> np.ndarray:
        """The state that minimises ``sum of costs[v][state[v]] + weight * this function``; ties go to the smaller choice."""
        own = [cost + weight * unary for cost, unary in zip(costs, self.unary, strict=True)]
        if self._plan is None:
            return self._descend(costs, weight)
        weighted = [weight * table for _, table in self.joint]
        best: list[np.ndarray] = []
        results: list[np.ndarray] = []
        for step in self._plan:
            axis = step.scope.index(step.variable)
            shape = [1] * len(step.scope)
            shape[axis] = self.sizes[step.variable]
            total = own[step.variable].reshape(shape)
            for number, broadcast in step.joint:
                total = total + weighted[number].reshape(broadcast)
            for number, broadcast in step.results:
                total = total + results[number].reshape(broadcast)
            best.append(total.argmin(axis=axis))
            results.append(total.min(axis=axis))
        state = np.zeros(len(self.sizes), dtype=int)
        for step, choice in zip(reversed(self._plan), reversed(best), strict=True):
            others = tuple(state[v] for v in step.scope if v != step.variable)
            state[step.variable] = choice[others]
        return state

    def _elimination(self, largest_table: int) -> list[_Step] | None:
        """The min-fill order with its tables, or None when one of them would be too large."""
        near: dict[int, set[int]] = {v: set() for v in range(len(self.sizes))}
        for first, second in self.pairs:
            near[first].add(second)
            near[second].add(first)
        open_joint = set(range(len(self.joint)))
        open_results: dict[int, tuple[int, ...]] = {}
        plan: list[_Step] = []
        while near:
            variable = min(near, key=lambda v: (_fill(near, v), self._entries(near[v]), v))
            scope = tuple(sorted({variable, *near[variable]}))
            if self._entries(scope) > largest_table:
                return None
            joint = [n for n in self.touching[variable] if n in open_joint]
            results = [n for n, s in open_results.items() if variable in s]
            plan.append(
                _Step(
                    variable,
                    scope,
                    tuple((n, self._broadcast(self.joint[n][0], scope)) for n in joint),
                    tuple((n, self._broadcast(open_results[n], scope)) for n in results),
                )
            )
            open_joint.difference_update(joint)
            for number in results:
                del open_results[number]
            open_results[len(plan) - 1] = tuple(v for v in scope if v != variable)
            neighbours = near.pop(variable)
            for v in neighbours:
                near[v] |= neighbours
                near[v] -= {v, variable}
        return plan

    def _entries(self, scope: Sequence[int] | set[int]) -> int:
        return math.prod(self.sizes[v] for v in scope)

    def _broadcast(self, inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.sizes[v] if v in inner else 1 for v in outer)

    def _descend(self, costs: Sequence[np.ndarray], weight: float) -> np.ndarray:
        """The best of coordinate descents from five uniform states."""
        found = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            state = np.array([round(share * (n - 1)) for n in self.sizes], dtype=int)
            for _ in range(100):
                before = state.copy()
                for v, cost in enumerate(costs):
                    total = cost + weight * self.along(state, v)
                    if total.min() < total[state[v]]:
                        state[v] = int(total.argmin())
                if (state == before).all():
                    break
            own = sum(float(cost[choice]) for cost, choice in zip(costs, state, strict=True))
            found.append((own + weight * self.value(state), state))
        return min(found, key=lambda entry: entry[0])[1]


def _fill(near: Mapping[int, set[int]], variable: int) -> int:
    """How many pairs of neighbours would become neighbours if this variable were eliminated."""
    around = near[variable]
    return sum(len(around - near[v]) - 1 for v in around)
