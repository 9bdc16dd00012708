"""What a structure really costs before any training: cut, repaired, and compared with the model that it was cut from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from edgeprune.compress.compensate import recalibrate_batchnorm, repaired
from edgeprune.compress.evaluate import kl_nats, logits
from edgeprune.compress.surgery import ChannelGroup, cut

UNUSABLE_NATS = 1e3  # of a structure at which the model says NaN: finite, and never worth it


@dataclass(frozen=True)
class AfterRepair:
    """KL divergence in nats, on held-out samples, of a structure after the repair that needs no gradient.

    What the model itself loses when its batch norms are recalibrated on as few samples is taken off: it is no cost of the structure.

    Attributes:
        model: the model before the cut, in eval mode; not changed.
        groups: its channel groups.
        x: ``[N, ...]`` prepared inputs; the first half repairs, the second half is evaluated.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    x: torch.Tensor

    @cached_property
    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        half = len(self.x) // 2
        return self.x[:half], self.x[half:]

    @cached_property
    def _reference(self) -> torch.Tensor:
        return logits(self.model, self._halves[1])

    @cached_property
    def _floor(self) -> float:
        fit, held_out = self._halves
        return kl_nats(self._reference, logits(recalibrate_batchnorm(self.model, fit), held_out))

    def __call__(self, kept: Mapping[str, Sequence[int]]) -> float:
        """Nats, at least 0, of the structure with these channels; groups not named keep all, those without a channel lose their block."""
        fit, held_out = self._halves
        smaller, outputs = cut(self.model, self.groups, kept, self.x[:1])
        answers = logits(repaired(smaller, self.model, outputs, fit), held_out)
        found = kl_nats(self._reference, answers)
        return max(found - self._floor, 0.0) if math.isfinite(found) else UNUSABLE_NATS
