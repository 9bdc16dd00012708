"""Which inputs belong to which output of a convolution or linear layer, found by running it.

Notation: ``N`` samples, ``P`` sampled output positions a sample, ``C`` input channels, ``A`` taps of a kernel, ``O`` output channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Layer: TypeAlias = nn.Conv2d | nn.Linear
CHECKED_POSITIONS = 64
TOLERANCE = 1e-6  # of the largest output; the check runs in float64


@dataclass(frozen=True)
class Reading:
    """How to find the inputs of an output.

    ``sources`` are ``int64 [positions, A]`` of a convolution: 0 for padding, else 1 + the number of the pixel; ``None`` of a linear layer.
    """

    sources: Tensor | None

    def rows(self, x: Tensor, where: Tensor) -> Tensor:
        """The inputs that make the outputs at sampled positions, in the order of the flattened weight.

        Args:
            x: the layer's input, ``[N, C, H, W]`` of the height and width that was looked at, or ``[N, ..., T]``.
            where: flat output positions, ``int64 [N, P]``.

        Returns:
            ``[N * P, T]``.
        """
        if self.sources is None:
            tokens = x.reshape(len(x), -1, x.shape[-1])
            return tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[2])).flatten(0, 1)
        pixels = self.sources.to(where.device)[where].flatten(1)  # [N, P * A]
        index = (pixels - 1).clamp_min(0)[:, None].expand(-1, x.shape[1], -1)
        values = x.flatten(2).gather(2, index).masked_fill_((pixels == 0)[:, None], 0.0)
        values = values.view(len(x), x.shape[1], where.shape[1], -1)
        return values.transpose(1, 2).reshape(where.numel(), -1)


def as_positions(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's output as ``[N, positions, O]``."""
    if isinstance(layer, nn.Conv2d):
        return output.flatten(2).transpose(1, 2)
    return output.reshape(len(output), -1, output.shape[-1])


@torch.no_grad()
def reading_of(layer: Layer, shape: torch.Size) -> Reading | None:
    """How a layer reads inputs of one shape; ``None`` where it is no convolution (or product) of its weight.

    A kernel with a single one at one tap answers with the pixel that this tap reads, whatever pads the input, and however. A subclass may
    compute something else than its parent, so it has to give what its reading says for a weight and an input that are drawn by chance.

    Args:
        layer: without groups, and without a parametrisation.
        shape: of one input sample, ``[C, H, W]`` or ``[..., T]``.
    """
    is_plain = type(layer) in (nn.Conv2d, nn.Linear)
    try:
        found = Reading(_sources(layer, shape) if isinstance(layer, nn.Conv2d) else None)
        return found if is_plain or _is_true(layer, found, shape) else None
    except Exception:  # a subclass may do anything with a weight that it was not made for
        return None


def _sources(layer: nn.Conv2d, shape: torch.Size) -> Tensor:
    weight = layer.weight
    area = weight[0, 0].numel()
    kernels = weight.new_zeros(area, weight.shape[1], area, dtype=torch.float64)
    kernels[:, 0] = torch.eye(area, dtype=torch.float64, device=weight.device)
    numbers = weight.new_zeros(1, *shape, dtype=torch.float64)
    pixels = shape[1] * shape[2]
    numbers[0, 0] = torch.arange(1, pixels + 1, device=weight.device).view(shape[1:])
    output = _run(layer, kernels.view(area, *weight.shape[1:]), None, numbers)
    found = output.round()
    if not torch.allclose(found, output, rtol=0, atol=1e-3) or not found.min() >= 0:
        raise ValueError("a tap reads no single pixel")
    if found.max() > pixels:
        raise ValueError("a tap reads no pixel of the input")
    return as_positions(layer, found)[0].long()


def _is_true(layer: Layer, reading: Reading, shape: torch.Size) -> bool:
    generator = torch.Generator().manual_seed(0)
    place = layer.weight.device

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(place)

    x, weight = draw(1, *shape), draw(*layer.weight.shape)
    bias = None if layer.bias is None else draw(len(layer.weight))
    output = as_positions(layer, _run(layer, weight, bias, x))
    where = torch.randint(output.shape[1], (1, CHECKED_POSITIONS), generator=generator).to(place)
    expected = reading.rows(x, where) @ weight.flatten(1).T + (0.0 if bias is None else bias)
    missed = (output[0, where[0]] - expected).abs().max()
    return bool(missed <= TOLERANCE * expected.abs().max())


def _run(layer: Layer, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What the layer gives with other weights; not called as a layer, so that its hooks do not run."""
    twin = copy.copy(layer)
    values = {"weight": weight, "bias": bias}
    if layer.bias is not None and bias is None:
        values["bias"] = weight.new_zeros(len(weight))
    own = {k: None if v is None else nn.Parameter(v, False) for k, v in values.items()}
    twin._parameters = {**layer._parameters, **own}
    output: Tensor = twin.forward(x)
    return output
