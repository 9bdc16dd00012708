"""The latency of a whole net as a sum of tables over few groups each, corrected by nets that were timed whole.

Notation: a *structure* is one width per channel group, each from that group's grid. ``S`` is the sum of the kernels timed alone; with
``L = a S + c``, the predicted time is ``T = L + b L^2``. The scale ``a``, the offset ``c`` and the bend ``b``, which is 0 or more, are
fitted to whole nets. The bend is what a large net loses because its parts push each other out of the caches. It keeps the order of
structures, so a solver works on ``L``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeprune.errors import SpecError


@dataclass(frozen=True, eq=False)
class Factor:
    """A time that depends on some groups: ``cost_ms`` has one axis per variable, over that group's grid. ``op`` is its kernel class."""

    variables: tuple[str, ...]
    cost_ms: np.ndarray
    op: str = ""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicted latency of any structure on the grids.

    ``L = scale * sum of class_scales[op] * factor + offset_ms``, where ``constant_ms`` is one more factor, of the class ``""``, and
    ``T = L + bend_per_ms * L^2``; a class without an entry has scale 1. The classes of :mod:`edgeprune.plan.latency.weight_traffic` and
    :mod:`edgeprune.plan.latency.call_overhead` hold no times, and have scale 0 until a correction gives them one.
    """

    grids: Mapping[str, tuple[int, ...]]
    factors: tuple[Factor, ...]
    constant_ms: float = 0.0
    scale: float = 1.0
    offset_ms: float = 0.0
    class_scales: Mapping[str, float] = field(default_factory=dict)
    bend_per_ms: float = 0.0

    def __post_init__(self) -> None:
        for factor in self.factors:
            if len(set(factor.variables)) != len(factor.variables):
                raise ValueError(f"a factor must name each group once, but got {factor.variables}")
            shape = tuple(len(self.grids[name]) for name in factor.variables)
            if factor.cost_ms.shape != shape:
                raise ValueError(
                    f"the factor of {factor.variables} must have shape {shape}, but has {factor.cost_ms.shape}"
                )

    def predict(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of a structure; groups that are not named keep their full width.

        Raises:
            SpecError: a width is not on its group's grid, or a group does not exist.
        """
        classes = self.by_class(widths)
        total = sum(self.class_scales.get(op, 1.0) * ms for op, ms in classes.items())
        return float(bent(self.scale * total + self.offset_ms, self.bend_per_ms))

    def bent(self, linear_ms: float) -> float:
        """The prediction of a structure whose factors of :meth:`merged` add up to this."""
        return float(bent(linear_ms, self.bend_per_ms))

    def straightened(self, ms: float) -> float:
        """What the factors of :meth:`merged` add up to where the prediction is this: the inverse of :meth:`bent`."""
        return float(straightened(ms, self.bend_per_ms))

    def by_class(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Uncorrected milliseconds of a structure by kernel class; the constant counts under ``""``."""
        place = {name: self._place(name, width) for name, width in widths.items()}
        found = {"": self.constant_ms}
        for factor in self.factors:
            at = tuple(place.get(name, -1) for name in factor.variables)
            found[factor.op] = found.get(factor.op, 0.0) + float(factor.cost_ms[at])
        return found

    def merged(self) -> tuple[float, tuple[Factor, ...]]:
        """``L`` with nothing left to scale: a constant in ms, and one factor per set of groups (variables sorted); see :meth:`bent`."""
        fixed = self.class_scales.get("", 1.0) * self.constant_ms
        constant = self.scale * fixed + self.offset_ms
        merged: dict[tuple[str, ...], np.ndarray] = {}
        for factor in self.factors:
            order = sorted(range(len(factor.variables)), key=lambda i: factor.variables[i])
            names = tuple(factor.variables[i] for i in order)
            weight = self.scale * self.class_scales.get(factor.op, 1.0)
            cost = weight * np.transpose(factor.cost_ms, order)
            merged[names] = merged[names] + cost if names in merged else cost
        constant += float(merged.pop((), np.zeros(())))
        return constant, tuple(Factor(names, cost) for names, cost in merged.items())

    def between(self, least: Mapping[str, int], most: Mapping[str, int]) -> LatencyModel:
        """The same prediction on narrower grids: widths from ``least`` to ``most`` (both in it), where a group is named there."""
        places = {
            name: [
                i for i, w in enumerate(grid) if least.get(name, 0) <= w <= most.get(name, grid[-1])
            ]
            for name, grid in self.grids.items()
        }
        return replace(
            self,
            grids={n: tuple(g[i] for i in places[n]) for n, g in self.grids.items()},
            factors=tuple(
                replace(f, cost_ms=np.asarray(f.cost_ms[np.ix_(*(places[v] for v in f.variables))]))
                for f in self.factors
            ),
        )

    def _place(self, name: str, width: int) -> int:
        try:
            return self.grids[name].index(width)
        except (KeyError, ValueError):
            grid = self.grids.get(name, "no such group")
            raise SpecError(f"width {width} of {name!r} is not on the grid: {grid}") from None


def bent(ms: Any, bend_per_ms: float) -> Any:
    """``T`` of ``L``, for numbers and arrays; see the module."""
    return ms + bend_per_ms * ms * ms


def straightened(ms: Any, bend_per_ms: float) -> Any:
    """``L`` of ``T``: the inverse of :func:`bent` for times from 0 on."""
    return 2 * ms / (1 + np.sqrt(1 + 4 * bend_per_ms * np.maximum(ms, 0.0)))


def sample_nets(
    grids: Mapping[str, tuple[int, ...]],
    count: int,
    seed: int,
    together: Sequence[Sequence[str]] = (),
) -> list[dict[str, int]]:
    """Random structures whose overall size spans the whole range; any first few of them span it too.

    The overall size follows the golden-ratio sequence, which fills an interval evenly at every length; around it every group draws its
    own width, so that kernel classes do not all grow together.

    Args:
        grids: of every group.
        count: number of structures.
        seed: of the widths.
        together: groups that have width 0 together or not at all; the first of each set decides.
    """
    draw = random.Random(seed)
    golden = (5**0.5 - 1) / 2
    nets = []
    for number in range(count):
        size = (0.5 + number * golden) % 1
        net = {}
        for name, grid in grids.items():
            share = min(1.0, max(0.0, size + draw.uniform(-0.3, 0.3)))
            net[name] = grid[round(share * (len(grid) - 1))]
        for first, *others in together:
            for name in others:
                net[name] = (net[name] or grids[name][1]) if net[first] else 0
        nets.append(net)
    return nets
