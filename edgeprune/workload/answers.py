"""What a torch model says: its outputs, and the logits behind them, batch by batch.

Notation: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.records.workload import Preprocess
from edgeprune.workload.batches import passes, to_input
from edgeprune.workload.modes import in_eval, on_device
from edgeprune.workload.outputs import as_logits

# Larger CPU batches are slower: their activations leave the cache and are mapped and unmapped each time (measured: 3x at 500).
BATCH = 64


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model that has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own mode comes back when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    in_eval(model)
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def answers(
    model: nn.Module, x: Tensor, *, batch_size: int = BATCH, device: torch.device | None = None
) -> Tensor:
    """What the model says about prepared inputs, in eval mode and without gradients: its outputs as they are.

    Args:
        model: not changed; it runs where it is, or as a copy on ``device``.
        x: ``[N, ...]`` as the model wants it.
        batch_size: largest batch; large inputs use smaller ones.
        device: where to run; ``None`` means where the model is.

    Returns:
        ``float32 [N, K]`` on the CPU.

    Raises:
        ModelError: there are no samples, or the model does not return one row of logits a sample.
    """
    runner = _placed(model, device)
    place = device_of(runner)
    found = []
    with evaluating(runner), torch.no_grad():
        for part in passes(x, batch_size):
            found.append(_checked(runner(x[part].to(place)), part.stop - part.start))
    return _joined(found)


def logits(
    model: nn.Module, x: Tensor, *, batch_size: int = BATCH, device: torch.device | None = None
) -> Tensor:
    """:func:`answers` as logits; of a model that answers with probabilities, their logarithm."""
    return as_logits(answers(model, x, batch_size=batch_size, device=device), model)


def raw_logits(
    model: nn.Module,
    raw: np.ndarray,
    preprocess: Preprocess,
    *,
    batch_size: int = BATCH,
    device: torch.device | None = None,
) -> Tensor:
    """:func:`logits` of raw samples (as :attr:`edgeprune.workload.dataset.Split.x`), prepared batch by batch."""
    runner = _placed(model, device)
    place = device_of(runner)
    found = []
    with evaluating(runner), torch.no_grad():
        for part in passes(raw, batch_size):
            # The copy makes a read-only or memory-mapped array safe to wrap.
            x = to_input(torch.from_numpy(raw[part].copy()).to(place), preprocess)
            found.append(_checked(runner(x), part.stop - part.start))
    return as_logits(_joined(found), model)


def _placed(model: nn.Module, device: torch.device | None) -> nn.Module:
    if device is None or device_of(model) == device:
        return model
    return on_device(copy.deepcopy(model), device)


def _checked(output: object, n: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the model must return one tensor of logits [N, K], but returned {type(output).__name__}",
            hint="wrap it in a module that returns the logits alone",
        )
    if output.ndim != 2 or len(output) != n:
        raise ModelError(
            f"the model must return logits [{n}, K], but returned {list(output.shape)}",
            hint="edgeprune prunes classifiers",
        )
    return output.float().cpu()


def _joined(parts: list[Tensor]) -> Tensor:
    if not parts:
        raise ModelError("a split must have at least one sample, but has none")
    return torch.cat(parts)
