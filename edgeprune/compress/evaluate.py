"""How good a torch model's answers are: accuracy, agreement and divergence; and passes through it that are watched or differentiated.

Notation: ``N`` samples, ``K`` classes, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from edgeprune.errors import ModelError
from edgeprune.workload.answers import device_of, evaluating
from edgeprune.workload.batches import batches
from edgeprune.workload.modes import frozen_copy

# Inputs of one batch hold at most this many numbers where hooks or a training mode keep several outputs of it alive.
MAX_WATCHED_NUMBERS, FEWEST_WATCHED = 1 << 22, 16


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
