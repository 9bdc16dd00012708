"""Random weights for a net whose shape alone is to count."""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.errors import ModelError
from edgeprune.workload.modes import can_train, eval_copy


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model, in eval mode, with the random weights that its layers give themselves when they are built.

    Every module with ``reset_parameters`` (all layers of torch with weights) or ``_reset_parameters`` calls it, inner modules before
    those that hold them. The same seed gives the same weights; torch's own random state is left alone.

    Args:
        model: not changed.
        seed: of the weights.

    Raises:
        ModelError: a parameter belongs to a module that cannot set it anew.
    """
    fresh = eval_copy(model)
    names = {module: name for name, module in fresh.named_modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in reversed(list(fresh.modules())):
            reset = getattr(module, "reset_parameters", None)
            reset = reset or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
                continue
            values = module.named_parameters(recurse=False)
            own = next((name for name, value in values if can_train(value)), None)
            if own is not None:
                place = f"{names[module]}.{own}".lstrip(".")
                raise ModelError(
                    f"start fresh needs layers that can set their weights anew, but nothing sets the parameter {place!r}",
                    hint=f"give {type(module).__name__} a method reset_parameters",
                )
    return fresh
