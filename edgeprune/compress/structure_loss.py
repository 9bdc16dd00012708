"""What a structure really costs before any training: cut, repaired, and compared with the model that it was cut from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from edgeprune.compress.groups.surgery import ChannelGroup, cut
from edgeprune.compress.heal.recover import recover, updates_per_epoch
from edgeprune.compress.repair.compensate import repaired
from edgeprune.compress.repair.norm_statistics import HeldOut, JudgedStatistics
from edgeprune.progress import Silent
from edgeprune.records.workload import Preprocess, Recovery
from edgeprune.workload.answers import logits
from edgeprune.workload.dataset import Split

# A trial: enough updates to see what heals, and a bound of its multiply-accumulates. One sample costs the teacher's forward pass, and
# about three passes through a student of half its size.
TRIAL_UPDATES, FEWEST_UPDATES, TRIAL_MACS, TRIAL_COST = 64, 16, 2e12, 2.5
UNUSABLE_NATS = 1e3  # of a structure at which the model says NaN: finite, and never worth it


@dataclass(frozen=True)
class AfterRepair:
    """KL divergence in nats, on held-out samples, of a structure after the repair that needs no gradient.

    Attributes:
        model: the model before the cut, in eval mode; not changed.
        groups: its channel groups.
        x: ``[N, ...]`` prepared inputs in a fair order; the first half repairs, the second half is evaluated.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    x: torch.Tensor

    @cached_property
    def _held_out(self) -> HeldOut:
        x = self.x[len(self.x) // 2 :]
        return HeldOut(x, logits(self.model, x))

    def __call__(self, kept: Mapping[str, Sequence[int]]) -> float:
        """Nats, at least 0, of the structure with these channels; groups not named keep all, those without a channel lose their block."""
        return max(_usable(self._repaired(kept).nats), 0.0)

    def repaired(self, kept: Mapping[str, Sequence[int]]) -> nn.Module:
        """The model with these channels alone, after the repair."""
        return self._repaired(kept).model

    def _repaired(self, kept: Mapping[str, Sequence[int]]) -> JudgedStatistics:
        smaller, outputs = cut(self.model, self.groups, kept, self.x[:1])
        fit = self.x[: len(self.x) // 2]
        return repaired(smaller, self.model, outputs, fit, self._held_out)

    def divergence(self, changed: nn.Module) -> float:
        """Nats between the answers of the model and those of another one, on the held-out half."""
        return _usable(self._held_out.nats(changed))


def _usable(nats: float) -> float:
    return nats if math.isfinite(nats) else UNUSABLE_NATS


@dataclass(frozen=True)
class AfterHealing:
    """KL divergence in nats, on held-out samples, of a structure after the repair and a short healing.

    What gradients bring back is not what least squares does: a net that lost whole blocks may start better and heal less.

    Attributes:
        repair: cuts, repairs and judges.
        teacher: the dense model.
        train: raw samples.
        selection: raw samples that pick the best epoch.
        settings: of the short healing, see :func:`trial_settings`.
        preprocess: the recorded constants of the input.
        seed: of the order of samples.
    """

    repair: AfterRepair
    teacher: nn.Module
    train: Split
    selection: Split
    settings: Recovery
    preprocess: Preprocess
    seed: int

    def __call__(self, kept: Mapping[str, Sequence[int]]) -> float:
        """Nats of the structure with these channels; see :class:`AfterRepair`."""
        healed = recover(
            self.repair.repaired(kept),
            self.teacher,
            self.train,
            self.selection,
            self.settings,
            preprocess=self.preprocess,
            seed=self.seed,
            progress=Silent(),
        )
        return self.repair.divergence(healed.model)


def trial_settings(settings: Recovery, samples: int, macs: int) -> Recovery | None:
    """The settings of a healing that is short enough to try several structures; ``None`` where too few updates are affordable to tell.

    Args:
        settings: of the whole healing; a trial is never longer.
        samples: training samples.
        macs: multiply-accumulates of the dense model for one sample.
    """
    per_epoch = updates_per_epoch(settings, samples)
    affordable = TRIAL_MACS / (TRIAL_COST * macs * min(settings.batch_size, samples))
    updates = min(TRIAL_UPDATES, int(affordable), int(settings.epochs * per_epoch))
    if settings.start != "kept" or updates < FEWEST_UPDATES:
        return None
    changes: dict[str, Any] = {"epochs": updates / per_epoch, "steps": 1, "max_minutes": None}
    changes["sparsity"] = "none"  # of every structure alike, so it tells none from another
    return settings.model_copy(update=changes)
