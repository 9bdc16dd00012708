"""The weights of one layer that bring its output closest to what was wanted, from sampled rows that come batch by batch.

Notation: ``T`` input taps (input channels x kernel area), ``O`` output channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeprune.compress.readings import Layer


@dataclass(frozen=True)
class LayerFit:
    """One repaired layer. The errors are shares of the dense output's energy that the layer misses, on the fitted samples."""

    name: str
    taps: int
    rows: int
    error_before: float
    error_after: float


@dataclass
class RowSums:
    """What a least-squares problem has to know of its rows, which need not be there at once.

    ``centred``: fit deviations from the means; right where a bias or a batch norm takes the means up.
    """

    centred: bool
    rows: int = 0
    _found: dict[str, Tensor] = field(default_factory=dict)

    def beside(self) -> RowSums:
        """Sums of other rows of the same layer, which can be added to these."""
        origin = {name: self._found[name] for name in ("x0", "y0")}
        return RowSums(self.centred, 0, origin)

    def __add__(self, other: RowSums) -> RowSums:
        """The sums of all rows of both; ``other`` comes from :meth:`beside`."""
        found = dict(self._found)
        for name, value in other._found.items():
            found[name] = value if name in ("x0", "y0") else found[name] + value
        return RowSums(self.centred, self.rows + other.rows, found)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count inputs ``[rows, T]`` and the wanted outputs ``[rows, O]``."""
        if not self._found:
            # What all rows share is taken off first: squares of large means would drown what varies.
            share = float(self.centred)
            self._found = {"x0": x.mean(0) * share, "y0": y.mean(0) * share}
        x, y = x - self._found["x0"], y - self._found["y0"]
        self.rows += len(x)
        # Single precision inside pieces, where its error is far below the ridge, for half the time.
        for a, b in zip(torch.split(x, 4096), torch.split(y, 4096), strict=True):
            self._add("gram", a.T @ a)
            self._add("cross", a.T @ b)
        self._add("x", x.double().sum(0))
        self._add("y", y.double().sum(0))
        self._add("energy", y.double().square().sum())

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self._found[name] = self._found[name] + value if name in self._found else value

    @property
    def x_mean(self) -> Tensor:
        """Of the inputs, ``float64 [T]``."""
        return self._found["x0"].double() + self._found["x"] / self.rows

    @property
    def y_mean(self) -> Tensor:
        """Of the wanted outputs, ``float64 [O]``."""
        return self._found["y0"].double() + self._found["y"] / self.rows

    def equations(self, ridge: float) -> NormalEquations | None:
        """The problem with a pull of this share of the mean diagonal of ``X'X``; ``None`` where inputs or outputs do not vary."""
        if not self.rows:
            return None
        gram, cross, energy = (self._found[name] for name in ("gram", "cross", "energy"))
        if self.centred:
            x, y = self._found["x"], self._found["y"]
            gram = gram - torch.outer(x, x) / self.rows
            cross = cross - torch.outer(x, y) / self.rows
            energy = energy - y.square().sum() / self.rows
        pull = ridge * float(gram.diagonal().mean())
        if not (0 < pull < math.inf and 0 < float(energy) < math.inf):
            return None
        return NormalEquations(gram, cross, pull, float(energy))


@dataclass(frozen=True)
class NormalEquations:
    """``(gram + pull I) W = cross + pull W_now`` for weights ``W`` of ``[T, O]``; ``energy`` is that of the wanted outputs."""

    gram: Tensor
    cross: Tensor
    pull: float
    energy: float

    def solved_near(self, now: Tensor) -> Tensor | None:
        """The solution for weights that are now ``float64 [T, O]``; ``None`` where it is not stable."""
        unit = torch.eye(len(now), dtype=torch.float64, device=now.device)
        factor, failed = torch.linalg.cholesky_ex(self.gram + self.pull * unit)
        best = torch.cholesky_solve(self.cross + self.pull * now, factor)
        return None if int(failed) or not bool(best.isfinite().all()) else best

    def missed(self, weight: Tensor) -> float:
        """The share of the energy that weights ``float64 [T, O]`` miss."""
        fitted = float((weight * (self.gram @ weight)).sum())
        left = self.energy - 2 * float((weight * self.cross).sum()) + fitted
        return max(0.0, left / self.energy)


@torch.no_grad()
def refit(name: str, layer: Layer, sums: RowSums, *, ridge: float) -> LayerFit | str:
    """Set the layer's weight, and its bias where it has one, to the least-squares solution near its present weight.

    Args:
        name: of the layer, for the answer.
        layer: changed in place, unless the answer is a reason.
        sums: of its inputs, as :meth:`edgeprune.compress.readings.Reading.rows` gives them, and of the wanted outputs.
        ridge: pull toward the present weight, as a share of the mean diagonal of ``X'X``.

    Returns:
        What it brought, or the reason why the layer was left alone.
    """
    found = sums.equations(ridge)
    if found is None:
        return "its inputs or the dense outputs do not vary"
    now = layer.weight.flatten(1).T.double()
    best = found.solved_near(now)
    if best is None:
        return "its least-squares problem has no stable solution"
    set_weight(layer, best, sums)
    return LayerFit(name, len(now), sums.rows, found.missed(now), found.missed(best))


@torch.no_grad()
def best_ridge(layer: Layer, fit: RowSums, check: RowSums, ridges: Sequence[float]) -> float:
    """Of some ridges the one whose solution from ``fit`` misses least of what ``check`` wants; the first where none can tell."""
    judge, now = check.equations(1.0), layer.weight.flatten(1).T.double()
    missed: dict[float, float] = {}
    for ridge in ridges if judge is not None and len(ridges) > 1 else ():
        found = fit.equations(ridge)
        weight = None if found is None else found.solved_near(now)
        if weight is not None and judge is not None:
            missed[ridge] = judge.missed(weight)
    return min(missed, key=lambda ridge: missed[ridge], default=ridges[0])


def set_weight(layer: Layer, best: Tensor, sums: RowSums) -> None:
    """Give a layer the weights ``[T, O]``; a bias makes its mean output the wanted one."""
    layer.weight.copy_(best.T.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(sums.y_mean - sums.x_mean @ best)
