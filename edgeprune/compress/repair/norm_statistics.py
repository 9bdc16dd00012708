"""Statistics of batch norms: fresh ones, the dense model's, or the middle of both, whichever is best on samples that were held out.

Fresh statistics follow what a cut changed, and miss what the few samples that they come from do not show; the dense model's know all
training data, and nothing of the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune.compress.evaluate import kl_nats, watched_batch
from edgeprune.errors import ModelError
from edgeprune.workload.answers import device_of, logits
from edgeprune.workload.batches import batches
from edgeprune.workload.modes import eval_copy

BATCH = 128


@dataclass(frozen=True)
class HeldOut:
    """Samples ``[N, ...]`` that judge a repair, and what the dense model says about them, ``[N, K]``."""

    x: Tensor
    reference: Tensor

    def nats(self, model: nn.Module) -> float:
        """KL(dense || model); infinite where the model does not say a number."""
        found = kl_nats(self.reference, logits(model, self.x))
        return found if found == found else float("inf")


def held_back(x: Tensor, dense: nn.Module) -> tuple[Tensor, HeldOut]:
    """Samples ``[N, ...]`` in a fair order, parted: those to repair with, and the last fifth to judge by."""
    cut = len(x) - len(x) // 5
    return x[:cut], HeldOut(x[cut:], logits(dense, x[cut:]))


@dataclass(frozen=True)
class JudgedStatistics:
    """A model with one choice of statistics (``kept``, ``fresh`` or ``mixed``), and its divergence on held-out samples."""

    model: nn.Module
    statistics: str
    nats: float


def judged(model: nn.Module, fit: Tensor, held_out: HeldOut) -> tuple[JudgedStatistics, ...]:
    """The model with each choice of statistics, ``kept`` first; that alone where no batch norm has any.

    Args:
        model: its own statistics are those that are kept; not changed.
        fit: ``[N, ...]`` prepared inputs that fresh statistics come from, at least 2.
        held_out: other samples.
    """
    found = [JudgedStatistics(model, "kept", held_out.nats(model))]
    if not any(_has_statistics(module) for module in model.modules()):
        return tuple(found)
    fresh = recalibrate_batchnorm(model, fit)
    for name, other in (("mixed", _middle(model, fresh)), ("fresh", fresh)):
        found.append(JudgedStatistics(other, name, held_out.nats(other)))
    return tuple(found)


def best(candidates: Sequence[JudgedStatistics]) -> JudgedStatistics:
    """The candidate that diverges least; the first of equals."""
    return min(candidates, key=lambda found: found.nats)


def recalibrate_batchnorm(model: nn.Module, x: Tensor, *, batch_size: int = BATCH) -> nn.Module:
    """A copy of the model, in eval mode, whose batch-norm statistics are those of ``x``.

    Every batch weighs the same (cumulative averaging). Dropout and all else stay in eval mode; a model without batch norm comes back
    as a plain copy.

    Args:
        model: not changed.
        x: ``[N, ...]`` prepared inputs, at least 2.
        batch_size: largest batch; batches are equal to within one sample, because a batch of one has no variance.

    Raises:
        ModelError: fewer than two samples.
    """
    fresh = eval_copy(model)
    momenta = _open_batchnorm(fresh)
    if not momenta:
        return fresh
    if len(x) < 2:
        raise ModelError(f"batch-norm statistics need at least 2 samples, but there are {len(x)}")
    place = device_of(fresh)
    n_batches = len(list(batches(len(x), watched_batch(x, batch_size), x[0].numel())))
    with torch.no_grad():
        for part in x.tensor_split(min(n_batches, len(x) // 2)):
            fresh(part.to(place))
    for module, momentum in momenta:
        module.momentum = momentum
        module.training = False
    return fresh


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _open_batchnorm(model: nn.Module) -> list[tuple[_BatchNorm, float | None]]:
    """Reset and open the statistics of every batch norm that has them. Their momenta, which are to be put back."""
    found = []
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            found.append((module, module.momentum))
            module.reset_running_stats()
            module.momentum = None  # torch's word for a cumulative average
            module.training = True
    return found


def _middle(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with statistics half way to those of another one."""
    mixed = copy.deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(mixed.modules(), other.modules(), strict=True):
            if _has_statistics(mine):
                for name in ("running_mean", "running_var"):
                    getattr(mine, name).lerp_(getattr(theirs, name), 0.5)
    return mixed
