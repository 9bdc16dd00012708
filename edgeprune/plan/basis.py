"""What a plan is made from: groups, what their widths cost in ms and nats, and in which order channels go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeprune.compress.groups.find import ChannelGroup
from edgeprune.compress.scores.importance import kept_channels
from edgeprune.plan.latency.model import LatencyModel
from edgeprune.plan.measured import MeasuredNets
from edgeprune.plan.solver.solve import Problem
from edgeprune.records.plan import FrozenGroup, LatencyModelQuality, Scope

Kept = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Basis:
    """What a plan is made from: the groups, what their widths cost in ms and nats, and in which order their channels go.

    ``model`` predicts ms and is ``quality`` good; ``nets`` are the whole nets that it was fitted on. ``curves[group][i]`` is the cost in
    nats of keeping ``model.grids[group][i]`` channels; ``orders[group]`` has the least important channel first. ``at_least`` and
    ``at_most`` bound the widths of the groups that they name: what is gone does not come back. With the ``scope`` local all groups keep the
    same share of their channels. ``loss`` says what a structure, given as the
    channels that stay of each group, really loses after its repair, which the sum of its groups' costs only estimates; ``trial`` what it
    still loses after a short healing.
    """

    groups: Sequence[ChannelGroup]
    frozen: Sequence[FrozenGroup]
    model: LatencyModel
    nets: MeasuredNets
    quality: LatencyModelQuality
    curves: Mapping[str, np.ndarray]
    orders: Mapping[str, np.ndarray]
    importance: str
    scope: Scope = "global"
    at_least: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    loss: Callable[[Kept], float] | None = None
    trial: Callable[[Kept], float] | None = None

    def problem(self, *, removal_charge: float = 1.0) -> Problem:
        """What the solver is asked; the removal of a block is charged so many times its cost, with ``inf`` there is none."""
        least = dict(self.at_least)
        if math.isinf(removal_charge):
            for name, grid in self.model.grids.items():
                smallest = grid[1] if grid[0] == 0 and len(grid) > 1 else grid[0]
                if self.at_most.get(name, smallest) >= smallest:  # else it has gone already
                    least[name] = max(least.get(name, 0), smallest)
        model = self.model.between(least, self.at_most)
        curves = {
            name: np.asarray(
                [self.cost_nats(name, w) * (1 if w else min(removal_charge, 1e6)) for w in grid]
            )
            for name, grid in model.grids.items()
        }
        even = {g.name: g.channels for g in self.groups} if self.scope == "local" else None
        return Problem(model.grids, curves, model, even, self.together)

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """The groups of each block that goes as a whole: they have width 0 all or none. The first bears what that costs."""
        found = dict.fromkeys(g.removed_with() for g in self.groups if g.block is not None)
        return tuple(names for names in found if all(self.model.grids[n][0] == 0 for n in names))

    def without(self, group: ChannelGroup, width: int) -> dict[str, int]:
        """This width of a group, and at width 0 that of all that go with it."""
        return {group.name: width} if width else dict.fromkeys(group.removed_with(), 0)

    def blocks_removed(self, widths: Mapping[str, int]) -> int:
        """How many blocks a structure lacks."""
        with_others = {name for _, *others in self.together for name in others}
        return sum(not w for name, w in widths.items() if name not in with_others)

    def kept(self, widths: Mapping[str, int]) -> Kept:
        """The channels of a structure."""
        return {n: kept_channels(self.orders[n], w) for n, w in widths.items()}

    def cost_nats(self, group: str, width: int) -> float:
        """Cost of keeping a width that is on the group's grid."""
        return float(self.curves[group][self.model.grids[group].index(width)])
