"""Groups that have width 0 together or not at all, because they lie in one residual block: the same model with a free choice for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgeprune.plan.latency.model import Factor, LatencyModel


def untied(model: LatencyModel, together: Sequence[Sequence[str]]) -> LatencyModel:
    """The model on grids of which only the first group of each set has width 0: there, the widths of the others change nothing.

    What the model says of structures in which a set has width 0 as a whole, or nowhere, stays as it is; it says nothing of others any more.

    Args:
        model: every group of a set has width 0 in front of its grid, and at least one more.
        together: sets of groups; no group is in two.
    """
    factors, grids = model.factors, dict(model.grids)
    for first, *others in together:
        factors = tuple(_led(f, first, others, len(grids[first])) for f in factors)
        grids.update((name, grids[name][1:]) for name in others)
    return replace(model, grids=grids, factors=factors)


def _led(factor: Factor, first: str, others: Sequence[str], choices: int) -> Factor:
    """The factor with one choice less of the others, in which the first says whether the set has width 0."""
    tied = [name for name in others if name in factor.variables]
    if not tied:
        return factor
    variables, cost = factor.variables, factor.cost_ms
    if first not in variables:
        variables, cost = (first, *variables), np.broadcast_to(cost, (choices, *cost.shape))
    gone = cost[tuple(slice(1) if v in (first, *tied) else slice(None) for v in variables)]
    there = cost[tuple(slice(1, None) if v in (first, *tied) else slice(None) for v in variables)]
    axis = variables.index(first)
    shape = tuple(1 if i == axis else n for i, n in enumerate(there.shape))
    joined = np.concatenate([np.broadcast_to(gone, shape), there], axis)
    return replace(factor, variables=variables, cost_ms=joined)
