"""2:4 sparsity: of every four consecutive input channels of a weight at most two are not zero.

That is what TensorRT asks for before it tries its sparse kernels, for each output channel and each place of the kernel, where the number
of input channels is a multiple of four, in convolutions and fully connected layers, with FP16 or INT8 allowed. It then takes a sparse
kernel only where that was faster.
Source: NVIDIA TensorRT 8.5 Developer Guide, section 6.8 "Sparsity" (read 2026-11-29); that sparse kernels pay from some 256 input
and output channels on is said in https://github.com/NVIDIA/TensorRT/issues/3849 (read 2026-11-29). Nothing of it was run by this project.

Notation: ``O`` output channels, ``C`` input channels, weights ``[O, C, ...]``, patterns along ``C``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgeprune.compress.readings import Layer
from edgeprune.errors import ModelError
from edgeprune.records.sparsity import GROUP, KEPT


def mask_of(weight: Tensor) -> Tensor:
    """Which weights stay: in each group of four along ``C`` the two of largest magnitude.

    Of equals the earlier input channel stays, so that the same weights always give the same mask; what already has the pattern keeps all
    that is not zero. NaN counts as zero. Magnitude alone: once the weights that stay are fitted again, magnitude times the root mean square
    of the input brought nothing on the Fashion-MNIST example.

    Args:
        weight: ``[O, C, ...]``, ``C`` a multiple of 4.

    Returns:
        ``bool``, of the shape of ``weight``, with exactly two of each four ``True``.

    Raises:
        ValueError: ``C`` is not a multiple of 4.

    Source: largest magnitude, as NVIDIA's recipe takes it (https://arxiv.org/abs/2104.08378); times the norm of the input:
    https://arxiv.org/abs/2306.11695, section 3 (both read 2026-11-29).
    """
    size = _grouped(weight.detach()).abs().nan_to_num(nan=0.0)
    first = size.sort(dim=-1, descending=True, stable=True).indices[..., :KEPT]
    kept = torch.zeros_like(size, dtype=torch.bool).scatter(-1, first, True)
    return kept.flatten(-2).movedim(-1, 1)


def _grouped(weight: Tensor) -> Tensor:
    """``[O, C, ...]`` as ``[O, ..., C / 4, 4]``."""
    if weight.ndim < 2 or weight.shape[1] % GROUP:
        raise ValueError(f"C must be a multiple of {GROUP}, but the shape is {list(weight.shape)}")
    last = weight.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, GROUP)


def has_pattern(weight: Tensor) -> bool:
    """Whether every four consecutive input channels of a weight ``[O, C, ...]`` have at most two values that are not zero."""
    if weight.ndim < 2 or weight.shape[1] % GROUP:
        return False
    return bool(((_grouped(weight) != 0).sum(-1) <= KEPT).all())


def reason_to_skip(layer: nn.Module) -> str:
    """Why a layer cannot have the pattern; empty where it can.

    A convolution with groups (depthwise, say) reads too few channels for each output, and TensorRT's rule is for a multiple of four.
    """
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"a {type(layer).__name__} has no such weights"
    if parametrize.is_parametrized(layer):
        return "its weight is computed by a parametrisation"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return "a subclass may compute something else than its parent"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return "grouped convolution"
    if layer.weight.shape[1] % GROUP:
        return f"{layer.weight.shape[1]} input channels are no multiple of {GROUP}"
    return ""


def eligible(model: nn.Module) -> dict[str, Layer]:
    """Layers whose weights can have the pattern, by name."""
    return {name: layer for name, layer in weighted(model).items() if not reason_to_skip(layer)}


def weighted(model: nn.Module) -> dict[str, Layer]:
    """All convolutions and linear layers, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def require_eligible(model: nn.Module) -> dict[str, Layer]:
    """As :func:`eligible`, but never empty.

    Raises:
        ModelError: no layer is eligible.
    """
    found = eligible(model)
    if not found:
        raise ModelError(
            "2:4 sparsity needs a convolution without groups or a linear layer whose input channels are a multiple of 4,"
            " but the model has none",
            hint="leave sparsity out",
        )
    return found


@torch.no_grad()
def masked(model: nn.Module) -> None:
    """Set the smaller weights of every eligible layer to zero, in place."""
    for layer in eligible(model).values():
        layer.weight.masked_fill_(~mask_of(layer.weight), 0.0)


@dataclass(frozen=True)
class Held:
    """A parameter, and where it has to be zero: ``bool`` of its shape."""

    parameter: nn.Parameter
    zero: Tensor


AllHeld: TypeAlias = Sequence[Held]


def held(pattern: str, model: nn.Module, copies: Iterable[nn.Module]) -> tuple[Held, ...]:
    """The parameters of copies of a model that have to keep a pattern, where the model's own weights put it; they have it from now on.

    Args:
        pattern: ``2:4``, or ``none`` for nothing to hold.
        model: whose weights decide; not changed.
        copies: modules with the same layers, anywhere.
    """
    if pattern == "none":
        return ()
    masks = {name: mask_of(layer.weight) for name, layer in eligible(model).items()}
    found = []
    for copied in copies:
        layers = dict(copied.named_modules())
        for name, mask in masks.items():
            parameter = layers[name].weight
            assert isinstance(parameter, nn.Parameter)
            # In the parameter's own memory format, which filling then walks in order.
            zero = torch.empty_like(parameter, dtype=torch.bool).copy_(~mask)
            found.append(Held(parameter, zero))
    hold(found)
    return tuple(found)


@torch.no_grad()
def hold(all_held: AllHeld) -> None:
    """Set to zero again what an update of the weights has moved."""
    for one in all_held:
        one.parameter.masked_fill_(one.zero, 0.0)
