"""edgeprune's own solver, whole and with parts taken away, and the plain rules that need no solver."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from edgeprune.compress.groups.find import ChannelGroup, remove_channels
from edgeprune.compress.groups.surgery import kept_outputs
from edgeprune.compress.scores.importance import kept_channels
from edgeprune.compress.size import macs_by_layer
from edgeprune.errors import BudgetError
from edgeprune.plan.latency.model import Factor, LatencyModel
from edgeprune.plan.solver import solve as search
from edgeprune.plan.solver.solve import Problem
from methods.candidate import Candidate, Method

UNALIGNED_POINTS = 16  # of the grid that ignores tiles


@dataclass(frozen=True)
class Cutter:
    """Takes the least important channels of each group out of the dense net."""

    model: nn.Module
    groups: Sequence[ChannelGroup]
    example: torch.Tensor

    def candidate(
        self, widths: Mapping[str, int], orders: Mapping[str, np.ndarray], *, repaired: bool
    ) -> Candidate:
        """The net at these widths; ``repaired`` nets get least squares."""
        full = {g.name: g.channels for g in self.groups}
        chosen = {**full, **widths}
        kept = {name: kept_channels(orders[name], width) for name, width in chosen.items()}
        removed = {n: sorted(set(range(full[n])) - set(k)) for n, k in kept.items()}

        def build() -> nn.Module:
            by_name = {g.name: g for g in self.groups}
            return remove_channels(copy.deepcopy(self.model), by_name, removed, self.example)

        outputs = kept_outputs(self.groups, {n: k for n, k in kept.items() if k})
        return Candidate(chosen, build, outputs if repaired else None)


def solver_method(
    name: str,
    cutter: Cutter,
    problem: Problem,
    orders: Mapping[str, np.ndarray],
    *,
    repaired: bool,
    family: str = "",
) -> Method:
    """The solver over any cost and any idea of latency; the knob moves the limit from dense to the fastest, geometrically."""
    dense = problem.model.predict({})
    # A simplified latency can fall below zero where it was never measured.
    fastest = max(search.fastest(problem).predicted_ms, 0.02 * dense)

    def at(knob: float) -> Candidate:
        limit = dense * (fastest / dense) ** min(max(knob, 0.0), 1.0)
        try:
            widths = search.solve(problem, limit).widths
        except BudgetError:  # rounding at the very end of the range
            widths = search.fastest(problem).widths
        return cutter.candidate(widths, orders, repaired=repaired)

    return Method(name, family or name, at)


def uniform(
    cutter: Cutter, orders: Mapping[str, np.ndarray], *, rounding: int, name: str = "uniform"
) -> Method:
    """The same share of every group, rounded."""

    def at(knob: float) -> Candidate:
        widths = {}
        for group in cutter.groups:
            wanted = group.channels * (1 - 0.95 * min(max(knob, 0.0), 1.0))
            rounded = max(rounding, round(wanted / rounding) * rounding)
            widths[group.name] = min(group.channels, rounded)
        return cutter.candidate(widths, orders, repaired=False)

    return Method(f"{name}-round{rounding}", name, at)


def mac_model(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    grids: Mapping[str, tuple[int, ...]],
    example: torch.Tensor,
) -> LatencyModel:
    """Multiply-accumulates in place of milliseconds: what a pruner without a device minimises."""
    work = macs_by_layer(model, example)
    full = {g.name: g.channels for g in groups}
    touched: dict[str, set[str]] = {}
    for group in groups:
        for coupling in group.couplings:
            touched.setdefault(coupling.layer, set()).add(group.name)
    factors: list[Factor] = []
    constant = 0.0
    for layer, macs in work.items():
        names = tuple(sorted(touched.get(layer, ())))
        if not names:
            constant += macs
            continue
        shares = [np.asarray(grids[n]) / full[n] for n in names]
        table = shares[0] if len(shares) == 1 else np.multiply.outer(shares[0], shares[1])
        factors.append(Factor(names, macs * table, "macs"))
    return LatencyModel(grids=grids, factors=tuple(factors), constant_ms=constant)


def without_removal(model: LatencyModel) -> LatencyModel:
    """The same without the choice to remove a block as a whole: no width 0."""
    factors = []
    for factor in model.factors:
        starts = [int(model.grids[v][0] == 0) for v in factor.variables]
        cost = factor.cost_ms[tuple(slice(s, None) for s in starts)]
        factors.append(replace(factor, cost_ms=cost))
    grids = {n: tuple(w for w in grid if w) for n, grid in model.grids.items()}
    return replace(model, grids=grids, factors=tuple(factors))


def for_grids(
    curves: Mapping[str, np.ndarray], grids: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Cost curves without the point of a removed block, where the grids have none."""
    return {n: np.asarray(c)[len(c) - len(grids[n]) :] for n, c in curves.items()}


def additive(model: LatencyModel) -> LatencyModel:
    """Every kernel's table as a sum of one term for each side, both taken at the full width of the other: no in x out interaction.

    A removed block (width 0) stays free.
    """

    def flat(factor: Factor) -> Factor:
        if len(factor.variables) != 2:
            return factor
        cost = factor.cost_ms
        summed = cost[:, -1:] + cost[-1:, :] - cost[-1, -1]
        for axis, name in enumerate(factor.variables):
            if model.grids[name][0] == 0:
                first = tuple(0 if a == axis else slice(None) for a in range(2))
                summed[first] = cost[first]
        return replace(factor, cost_ms=summed)

    return replace(model, factors=tuple(flat(f) for f in model.factors))


def unaligned(model: LatencyModel, curves: Mapping[str, np.ndarray]) -> Problem:
    """The same latency and costs read off between the tiles: evenly spaced widths, tables interpolated linearly. Blocks are not removed."""
    model = without_removal(model)
    curves = for_grids(curves, model.grids)
    grids = {}
    for name, grid in model.grids.items():
        points = np.linspace(grid[0], grid[-1], min(UNALIGNED_POINTS, grid[-1] - grid[0] + 1))
        grids[name] = tuple(sorted({round(float(p)) for p in points}))
    factors = []
    for factor in model.factors:
        cost = factor.cost_ms
        for axis, name in enumerate(factor.variables):
            old, new = model.grids[name], grids[name]
            cost = np.apply_along_axis(lambda c, o=old, n=new: np.interp(n, o, c), axis, cost)
        factors.append(replace(factor, cost_ms=cost))
    costs = {n: np.interp(grids[n], model.grids[n], curves[n]) for n in grids}
    smooth = replace(model, grids=grids, factors=tuple(factors))
    return Problem(grids=grids, cost_nats=costs, model=smooth)


def sums(
    scores: Mapping[str, np.ndarray], grids: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Cost of each width as the plain sum of the scores of what goes: no calibration between groups."""
    found = {}
    for name, grid in grids.items():
        total = np.concatenate([[0.0], np.cumsum(np.sort(scores[name]))])
        found[name] = np.array([total[len(scores[name]) - w] for w in grid])
    return found


def geometric(start: float, end: float, steps: int) -> list[float]:
    """``steps`` limits from just below ``start`` to ``end``, equal ratios apart.

    >>> [round(v) for v in geometric(16, 1, 4)]
    [8, 4, 2, 1]
    """
    return [start * math.pow(end / start, (i + 1) / steps) for i in range(steps)]
