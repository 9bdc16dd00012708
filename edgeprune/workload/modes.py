"""The mode that a model runs in, set without trusting what a model's own ``train``, ``eval`` or ``to`` do and return.

People override them: to keep batch norm frozen, to load data and train, or without a ``return self``. torch's own loops never use what
they return, so nothing here does.
"""

from __future__ import annotations

import contextlib
import copy
import types

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


class Learning(nn.Module):
    """A layer of ours that trains otherwise than it answers."""


# Layers that keep their function while they train; a recurrent one has no gradient in eval mode on a GPU.
LEARNING = (_BatchNorm, _DropoutNd, nn.RNNBase, Learning)


def in_eval(model: nn.Module) -> nn.Module:
    """The same model, every module of it in eval mode."""
    for module in model.modules():
        module.training = False
    return model


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy, every module of it in eval mode."""
    return in_eval(copy.deepcopy(model))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters want no gradient."""
    copied = eval_copy(model)
    for parameter in copied.parameters():
        parameter.requires_grad = False
    return copied


def in_healing(model: nn.Module) -> nn.Module:
    """The same model as it is trained here: batch norm, dropout and the like in training mode, all else in eval mode.

    In training mode as a whole a model may be another function: it answers with auxiliary heads, whose inputs have been pruned, or with
    logits where it gives probabilities in use. Healing is about the answer in use.
    """
    in_eval(model)
    for module in model.modules():
        module.training = isinstance(module, LEARNING)
    return model


def settle(model: nn.Module) -> tuple[str, ...]:
    """Put a model into eval mode as its own ``eval`` does it, then every module for good; from here on nothing overrides that.

    Libraries call ``model.eval()`` on what they are given, so overrides of it and of ``train`` give way to torch's own.

    Args:
        model: changed in place.

    Returns:
        Names of the modules that its own ``eval`` left in training mode.
    """
    # It may merge or swap weights for use; one that is something else altogether may raise anything.
    with contextlib.suppress(Exception):
        model.eval()
    left = tuple(name or type(model).__name__ for name, m in model.named_modules() if m.training)
    for module in model.modules():
        for name in ("train", "eval"):
            plain = getattr(nn.Module, name)
            if getattr(type(module), name) is not plain or name in vars(module):
                vars(module)[name] = types.MethodType(plain, module)
    in_eval(model)
    return left


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model in float32, moved to a device."""
    model.float()
    model.to(device)
    return model


def can_train(tensor: torch.Tensor) -> bool:
    """Whether a parameter can have a gradient; a table of integers or a mask is a constant."""
    return tensor.is_floating_point() or tensor.is_complex()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that can have gradients, each once; they want them from here on."""
    found = [p for p in model.parameters() if can_train(p)]
    for parameter in found:
        parameter.requires_grad = True
    return found
