"""Training with INT8 in mind: weights and inputs of layers are rounded on the way forward as the INT8 file will round them.

The scheme is that of the files: weights symmetric with one scale an output channel, activations asymmetric with one scale a tensor.
Gradients pass rounding unchanged inside the range and are zero outside of it (straight-through estimator, Jacob et al. 2018,
arXiv:1712.05877, section 3). Batch norms are folded before, as the converters fold them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgeprune.compress.evaluate import run_once
from edgeprune.compress.int8.equalise import rounded
from edgeprune.compress.int8.faint_channels import norms_behind
from edgeprune.workload.modes import Learning, eval_copy, in_eval

STEPS = 255
MOMENTUM = 0.01  # of the moving range
KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class FakeQuantised(Learning):
    """A layer whose input and weights are rounded. While it trains its range follows the input, until ``frozen_after`` batches."""

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, layer: nn.Module, frozen_after: int) -> None:
        super().__init__()
        self.layer = layer
        self.frozen_after = frozen_after
        self.watching = False
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for the rounded input."""
        if self.watching or (self.training and int(self.batches) < self.frozen_after):
            self._follow(x.detach())
        if self.watching:
            return self.layer(x)  # type: ignore[no-any-return]
        weight = self.layer.weight
        exact: Tensor = weight  # type: ignore[assignment]
        fake = exact + (rounded(exact.detach()) - exact.detach())
        inputs = self._rounded_input(x)
        return torch.func.functional_call(  # type: ignore[no-any-return]
            self.layer, {"weight": fake}, (inputs,), strict=False
        )

    def _follow(self, x: Tensor) -> None:
        low, high = x.float().amin().clamp(max=0), x.float().amax().clamp(min=0)
        if self.watching:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        else:
            self.low.lerp_(low, MOMENTUM)
            self.high.lerp_(high, MOMENTUM)
            self.batches += 1

    def _rounded_input(self, x: Tensor) -> Tensor:
        step = ((self.high - self.low) / STEPS).clamp_min(1e-12)
        inside = torch.minimum(torch.maximum(x.float(), self.low), self.high)
        zero = (self.low / step).round()
        steps = ((inside / step).round() - zero).clamp(0, STEPS)
        value = (steps + zero) * step
        return inside + (value - inside).detach()


def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model in which batch norms behind convolutions have become part of their weights and biases."""
    copied = eval_copy(model)
    for name, norm_name in norms_behind(copied, example).items():
        layer, norm = copied.get_submodule(name), copied.get_submodule(norm_name)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and isinstance(norm, _BatchNorm):
            copied.set_submodule(name, fuse_conv_bn_eval(layer, norm))
            copied.set_submodule(norm_name, nn.Identity())
    return copied


def fake_quantised(model: nn.Module, x: Tensor, *, frozen_after: int) -> nn.Module:
    """The folded model with every convolution and linear layer rounded; ranges start at those of ``x``.

    Args:
        model: in eval mode; not changed.
        x: calibration inputs ``[N, ...]``.
        frozen_after: batches of training after which the ranges no longer move.
    """
    prepared = folded(model, x[:1])
    names = [n for n, m in prepared.named_modules() if isinstance(m, KINDS)]
    wrapped = []
    for name in names:
        layer = FakeQuantised(prepared.get_submodule(name), frozen_after)
        layer.watching = True
        prepared.set_submodule(name, layer)
        wrapped.append(layer)
    run_once(prepared, x, [])
    for layer in wrapped:
        layer.watching = False
    return in_eval(prepared)


def plain(model: nn.Module) -> nn.Module:
    """The trained model without rounding: its layers, with batch norms still folded."""
    copied = eval_copy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, FakeQuantised):
            copied.set_submodule(name, module.layer)
    return copied
