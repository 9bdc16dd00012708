"""Points of a kernel's grid that carry a fit, for tests of the fit alone."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from edgeprune.plan.latency.fill import Point

# A product of grids up to this size is taken in full.
ALL_POINTS = 24


def probe_points(grids: Sequence[Sequence[int]], *, interior: int = 4, seed: int) -> list[Point]:
    """Points of one kernel, more than enough for a fit.

    Small products (24 points) are taken in full. Otherwise: each slot over its whole grid with the others at full width, every pair of
    slots at their smallest with the others full, all slots at their smallest, and random points inside, that show whether the fit holds.

    Args:
        grids: one ascending grid per slot; no slots give the one empty point.
        interior: number of random points inside.
        seed: of the random points.
    """
    if math.prod(len(grid) for grid in grids) <= ALL_POINTS:
        return list(itertools.product(*grids))
    full = tuple(grid[-1] for grid in grids)
    points = [
        (*full[:slot], width, *full[slot + 1 :])
        for slot, grid in enumerate(grids)
        for width in grid
    ]
    for pair in itertools.combinations(range(len(grids)), 2):
        points.append(tuple(g[0] if s in pair else g[-1] for s, g in enumerate(grids)))
    points.append(tuple(grid[0] for grid in grids))
    draw = random.Random(seed)
    inner = [grid[:-1] or grid for grid in grids]
    inside = {tuple(draw.choice(grid) for grid in inner) for _ in range(interior)}
    return list(dict.fromkeys(points + sorted(inside)))
