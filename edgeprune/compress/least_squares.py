"""The weights of one layer that bring its output closest to what was wanted, from sampled rows.

Notation: ``N`` samples, ``P`` sampled output positions a sample, ``T`` input taps (input channels x kernel area), ``O`` output channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class LayerFit:
    """One repaired layer. The errors are shares of the dense output's energy that the layer misses, on the fitted samples."""

    name: str
    taps: int
    rows: int
    error_before: float
    error_after: float


def as_positions(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's output as ``[N, positions, O]``."""
    if isinstance(layer, nn.Conv2d):
        return output.flatten(2).transpose(1, 2)
    return output.reshape(len(output), -1, output.shape[-1])


def input_rows(layer: Layer, x: Tensor, where: Tensor) -> Tensor:
    """The inputs that make the outputs at sampled positions, in the order of the flattened weight.

    Args:
        layer: its padding, stride and dilation say which inputs belong to an output; a convolution must have no groups.
        x: the layer's input, ``[N, C, H, W]`` or ``[N, ..., T]``.
        where: flat output positions, ``int64 [N, P]``.

    Returns:
        ``[N * P, T]``.
    """
    if isinstance(layer, nn.Linear):
        tokens = x.reshape(len(x), -1, x.shape[-1])
        return tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[2])).flatten(0, 1)
    padded = _padded(layer, x)
    (kernel_h, kernel_w), (step_y, step_x) = layer.kernel_size, layer.stride
    gap_y, gap_x = layer.dilation
    width = padded.shape[3]
    out_width = (width - gap_x * (kernel_w - 1) - 1) // step_x + 1
    top, left = where // out_width * step_y, where % out_width * step_x
    rows = top[..., None, None] + torch.arange(kernel_h, device=x.device)[:, None] * gap_y
    columns = left[..., None, None] + torch.arange(kernel_w, device=x.device) * gap_x
    taps = (rows * width + columns).flatten(1)  # [N, P * kernel area]
    channels = padded.shape[1]
    values = padded.flatten(2).gather(2, taps[:, None, :].expand(-1, channels, -1))
    values = values.view(len(x), channels, where.shape[1], kernel_h * kernel_w)
    return values.transpose(1, 2).reshape(len(x) * where.shape[1], -1)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    sides: list[int] = []
    for axis in (1, 0):  # functional.pad counts from the last axis
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        elif layer.padding == "valid":
            sides += [0, 0]
        else:
            sides += [int(layer.padding[axis])] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(x, sides, mode=mode)


@torch.no_grad()
def refit(
    name: str,
    layer: Layer,
    x: Tensor,
    y: Tensor,
    *,
    ridge: float,
    centred: bool,
) -> LayerFit | str:
    """Set the layer's weight, and its bias where it has one, to the least-squares solution near its present weight.

    Args:
        name: of the layer, for the answer.
        layer: changed in place, unless the answer is a reason.
        x: its inputs ``[rows, T]``, as :func:`input_rows` returns them.
        y: the wanted outputs ``[rows, O]``.
        ridge: pull toward the present weight, as a share of the mean diagonal of ``X'X``.
        centred: fit deviations from the means; right where a bias or a batch norm takes the means up.

    Returns:
        What it brought, or the reason why the layer was left alone.
    """
    found = normal_equations(x, y, ridge=ridge, centred=centred)
    if found is None:
        return "its inputs or the dense outputs do not vary"
    gram, cross, pull = found.gram, found.cross, found.pull
    now = layer.weight.flatten(1).T.double()
    damped = gram + pull * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    best = torch.cholesky_solve(cross + pull * now, factor)
    if int(failed) or not bool(best.isfinite().all()):
        return "its least-squares problem has no stable solution"
    layer.weight.copy_(best.T.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(found.y_mean.double() - found.x_mean.double() @ best)
    return LayerFit(name, x.shape[1], len(x), found.missed(now), found.missed(best))


@dataclass(frozen=True)
class NormalEquations:
    """``(gram + pull I) W = cross + pull W_now`` for weights ``W`` of ``[T, O]``; ``energy`` is that of the wanted outputs."""

    gram: Tensor
    cross: Tensor
    x_mean: Tensor
    y_mean: Tensor
    pull: float
    energy: float

    def missed(self, weight: Tensor) -> float:
        """The share of the energy that weights ``float64 [T, O]`` miss."""
        fitted = float((weight * (self.gram @ weight)).sum())
        left = self.energy - 2 * float((weight * self.cross).sum()) + fitted
        return max(0.0, left / self.energy)


def normal_equations(
    x: Tensor, y: Tensor, *, ridge: float, centred: bool
) -> NormalEquations | None:
    """The problem of :func:`refit`, whose arguments these are; ``None`` where inputs or outputs do not vary."""
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    if centred:
        x, y = x - x_mean, y - y_mean
    gram, cross = _products(x, y)
    pull = ridge * float(gram.diagonal().mean())
    energy = float(y.double().square().sum())
    if not (0 < pull < math.inf and 0 < energy < math.inf):
        return None
    return NormalEquations(gram, cross, x_mean, y_mean, pull, energy)


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``X'X`` and ``X'Y`` in float64; single precision inside pieces, where its error is far below the ridge, for half the time."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(torch.split(x, 4096), torch.split(y, 4096), strict=True):
        gram += (a.T @ a).double()
        cross += (a.T @ b).double()
    return gram, cross
