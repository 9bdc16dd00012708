"""The shape of a model in numbers: widths of its layers, parameters and multiply-accumulates. These count work, never time."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgeprune.compress.groups.surgery import Removed
from edgeprune.records.report import LayerWidth


def layer_widths(before: nn.Module, after: nn.Module) -> tuple[LayerWidth, ...]:
    """Input and output channels of every convolution and linear layer, before and after, in the order of the model.

    A layer of a removed block has none after.
    """
    later = dict(after.named_modules())
    found = []
    for name, layer in before.named_modules():
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        now = later[name]
        (in_before, out_before), (in_after, out_after) = _channels(layer), (0, 0)
        if not isinstance(now, Removed):
            in_after, out_after = _channels(now)
        found.append(
            LayerWidth(
                layer=name,
                kind=_kind(layer),
                in_before=in_before,
                in_after=in_after,
                out_before=out_before,
                out_after=out_after,
            )
        )
    return tuple(found)


def _channels(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, _ConvNd)
    return layer.in_channels, layer.out_channels


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    assert isinstance(layer, _ConvNd)
    size = "x".join(map(str, layer.kernel_size))
    up = "transposed " if isinstance(layer, _ConvTransposeNd) else ""
    if layer.groups == layer.in_channels > 1:
        return f"{up}depthwise {size}"
    return f"{up}conv {size}" if layer.groups == 1 else f"grouped {up}conv {size}"


def work(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """Parameters of the model, and multiply-accumulates of one sample in its convolutions and linear layers.

    Args:
        model: in eval mode; not changed.
        example: one input ``[1, ...]``.
    """
    total = sum(macs_by_layer(model, example).values())
    return sum(p.numel() for p in model.parameters()), total


def macs_by_layer(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Multiply-accumulates of one sample in every convolution and linear layer that runs, over all its calls.

    Args:
        model: in eval mode; not changed.
        example: one input ``[1, ...]``.
    """
    found: dict[str, int] = {}

    def count(
        name: str, layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        # A transposed convolution multiplies once for each position of its input, any other for each of its output.
        upward = isinstance(layer, _ConvTransposeNd)
        done = macs(_shape(layer, given[0] if upward else output))
        found[name] = found.get(name, 0) + done

    handles = [
        layer.register_forward_hook(functools.partial(count, name))
        for name, layer in model.named_modules()
        if isinstance(layer, (_ConvNd, nn.Linear))
    ]
    try:
        with torch.inference_mode():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shape(layer: nn.Module, places: torch.Tensor) -> LayerShape:
    """The layer, applied at the positions of ``places``; all dimensions but the last count as height."""
    if isinstance(layer, nn.Linear):
        positions = places[0].numel() // layer.out_features
        return LayerShape("linear", layer.in_features, layer.out_features, out_hw=(1, positions))
    assert isinstance(layer, _ConvNd)
    *leading, width = places.shape[2:]
    *taps, columns = layer.kernel_size
    return LayerShape(
        "conv",
        layer.in_channels,
        layer.out_channels,
        kernel=(math.prod(taps), columns),
        groups=layer.groups,
        out_hw=(math.prod(leading), width),
    )


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

    def __post_init__(self) -> None:
        if min(self.in_channels, self.out_channels, self.groups, *self.kernel, *self.out_hw) < 1:
            raise ValueError(f"every size of a layer must be at least 1, but got {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups must divide the channels, but got {self}")
        if self.kind == "linear" and (self.kernel != (1, 1) or self.groups != 1):
            raise ValueError(f"a linear layer has kernel (1, 1) and one group, but got {self}")


def macs(layer: LayerShape) -> int:
    """Multiply-accumulates of one sample; the bias is not counted."""
    positions, window = math.prod(layer.out_hw), math.prod(layer.kernel)
    return positions * layer.out_channels * (layer.in_channels // layer.groups) * window
