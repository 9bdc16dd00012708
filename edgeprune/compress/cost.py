"""Multiply-accumulates and parameters by arithmetic from layer shapes. These count work, never time: no speed is claimed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerShape:
    """The numbers that fix a layer's work.

    ``kernel`` and ``out_hw`` are (height, width); a linear layer has the kernel (1, 1), and in ``out_hw`` the number of positions it is
    applied to: (1, 1), or (1, tokens).
    """

    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    out_hw: tuple[int, int] = (1, 1)
    bias: bool = False

    def __post_init__(self) -> None:
        if min(self.in_channels, self.out_channels, self.groups, *self.kernel, *self.out_hw) < 1:
            raise ValueError(f"every size of a layer must be at least 1, but got {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups must divide the channels, but got {self}")
        if self.kind == "linear" and (self.kernel != (1, 1) or self.groups != 1):
            raise ValueError(f"a linear layer has kernel (1, 1) and one group, but got {self}")


def macs(layer: LayerShape) -> int:
    """Multiply-accumulates of one sample; the bias is not counted."""
    positions = layer.out_hw[0] * layer.out_hw[1]
    return positions * _weights(layer)


def parameters(layer: LayerShape) -> int:
    """Weights and, where there is one, the bias."""
    return _weights(layer) + (layer.out_channels if layer.bias else 0)


def _weights(layer: LayerShape) -> int:
    window = layer.kernel[0] * layer.kernel[1]
    return layer.out_channels * (layer.in_channels // layer.groups) * window
