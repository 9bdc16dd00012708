"""What a torch model says, and how good that is: logits, accuracy, agreement and divergence.

Notation: ``N`` samples, ``K`` classes, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from edgeprune.errors import ModelError
from edgeprune.records.workload import Preprocess
from edgeprune.workload.batches import batches, passes, to_input
from edgeprune.workload.modes import frozen_copy, in_eval, on_device
from edgeprune.workload.outputs import as_logits

# Larger CPU batches are slower: their activations leave the cache and are mapped and unmapped each time (measured: 3x at 500).
BATCH = 64
# Inputs of one batch hold at most this many numbers where hooks or a training mode keep several outputs of it alive.
MAX_WATCHED_NUMBERS, FEWEST_WATCHED = 1 << 22, 16


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model that has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def private_copy(model: nn.Module) -> nn.Module:
    """A copy that may be hooked: parameters want no gradient (activations do), and nothing overwrites what another layer has read."""
    watched = frozen_copy(model)
    for module in watched.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    return watched


def backward(loss: Tensor) -> None:
    """Gradients of a loss. ModelError where the model overwrites in place what it needs for them."""
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be differentiated: {str(error).splitlines()[0][:200]}",
            hint="write x = relu(x) in place of relu_(x) in the model's forward",
        ) from error


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


def watched_batch(x: Tensor, largest: int = 128) -> int:
    """Samples of ``[N, ...]`` in one batch, at most ``largest``, where more than the present output is alive."""
    return min(largest, max(FEWEST_WATCHED, MAX_WATCHED_NUMBERS // max(1, x[0].numel())))


class _Reached(Exception):
    """Everything that was to be seen of a batch has run."""


def run_once(
    model: nn.Module, x: Tensor, handles: Iterable[RemovableHandle], *, last: str = ""
) -> None:
    """One pass of all samples in eval mode, without gradients; the hooks that watch it are removed, come what may.

    ``last`` names a layer, running once a batch, behind which nothing is of interest: each batch ends there.
    """

    def stop(*_: object) -> None:
        raise _Reached

    handles = list(handles)
    if last:  # the hooks of the caller were there first, and run first
        handles.append(dict(model.named_modules())[last].register_forward_hook(stop))
    try:
        with evaluating(model), torch.no_grad():
            place = device_of(model)
            for part in batches(len(x), watched_batch(x), x[0].numel()):
                with contextlib.suppress(_Reached):
                    model(x[part].to(place))
    finally:
        for handle in handles:
            handle.remove()


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


def _top(values: Tensor) -> Tensor:
    """Top class of each row ``[N]``; -1 where a row is not finite, so that broken logits never count as right."""
    finite = values.isfinite().all(dim=1)
    return torch.where(finite, values.argmax(dim=1), -1)


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of rows of ``[N, K]`` whose top class is the label in ``[N]``; rows with a NaN or infinity are wrong."""
    return float((_top(logits) == y).double().mean())


def agreement(logits: Tensor, reference_logits: Tensor) -> float:
    """Share of rows of ``[N, K]`` whose top class is that of the reference; rows that are not finite disagree."""
    top = _top(logits)
    return float(((top == _top(reference_logits)) & (top >= 0)).double().mean())


def kl_nats(reference_logits: Tensor, logits: Tensor) -> float:
    """Mean of KL(reference || model) over rows of ``[N, K]``, in nats: 0 when the two say the same, NaN if one is not finite."""
    reference = functional.log_softmax(reference_logits.double(), dim=1)
    found = functional.log_softmax(logits.double(), dim=1)
    return float((reference.exp() * (reference - found)).sum(dim=1).mean())


def quality(
    logits: Tensor | np.ndarray,
    y: Tensor | np.ndarray | None,
    reference_logits: Tensor | np.ndarray,
) -> tuple[Literal["accuracy", "agreement"], float]:
    """The figure that gates use, in [0, 1]: accuracy where there are labels, else agreement with the dense model.

    Args:
        logits: ``[N, K]`` of the model in question.
        y: classes ``[N]``, or ``None``.
        reference_logits: ``[N, K]`` of the dense model; read only without labels.
    """
    found = torch.as_tensor(logits)
    if y is not None:
        return "accuracy", accuracy(found, torch.as_tensor(y))
    return "agreement", agreement(found, torch.as_tensor(reference_logits))
