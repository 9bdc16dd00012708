"""How images and weights lie in memory: channel by channel for each pixel (``channels_last``), which CPU and GPU convolutions prefer.

Not every model runs so: ``x.view(len(x), -1)`` behind a convolution wants its numbers in the plain order, as most nets of textbooks do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.workload.modes import eval_copy, on_device

ONEDNN_BLOCK = 16  # the largest block of channels of its convolutions


def channels_last(x: Tensor) -> Tensor:
    """The same numbers; those of images ``[N, C, H, W]`` lie channel by channel for each pixel."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def runs_channels_last(model: nn.Module, example: Tensor) -> bool:
    """Whether a model runs with weights and images in that order.

    Args:
        model: not changed.
        example: one input ``[1, ...]``.
    """
    try:
        with torch.no_grad():
            fast_copy(model, example.device)(channels_last(example))
    except Exception:  # the model's forward may raise anything
        return False
    return True


def quick_input(model: nn.Module, x: Tensor) -> Tensor:
    """The inputs ``[N, ...]`` in the order that the model is quickest with."""
    return channels_last(x) if runs_channels_last(model, x[:1]) else x.contiguous()


def fast_copy(model: nn.Module, device: torch.device, *, quick: bool = True) -> nn.Module:
    """A copy in eval mode on the device; where it may be ``quick``, its 4-D weights are in ``channels_last`` memory."""
    placed = on_device(eval_copy(model), device)
    if not quick:
        return placed
    nn.Module.to(placed, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu":
        _keep_plain_where_unsafe(placed)
    return placed


def _keep_plain_where_unsafe(model: nn.Module) -> None:
    """Run strided 1x1 convolutions with few inputs in plain memory: in ``channels_last`` their weight gradient overruns a buffer.

    oneDNN rounds the inputs up to a block (8 with AVX2, 16 with AVX-512) in a workspace that was made for the real number: heap
    corruption, a hang, or wrong gradients. Pruned nets have such layers where a shortcut changes the resolution.
    Source: https://github.com/uxlfoundation/oneDNN/issues/6035 (read 2026-11-25), and reproduced with torch 2.13 on AVX2.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.in_channels // module.groups < ONEDNN_BLOCK
        ):
            plain = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.weight.data = plain
            module.register_forward_pre_hook(_plain_input)


def _plain_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])
