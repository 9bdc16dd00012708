"""What every compared pruner offers: a knob between 0 (dense) and 1 (as small as it goes), and the pruned net at that setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Candidate:
    """A pruned net that nothing has repaired yet.

    ``widths`` are those of edgeprune's channel groups, which decide the latency. ``build`` gives a fresh copy of the net, with the dense
    weights of what was kept. ``kept_outputs`` names for each layer the dense output channels that are left: with it the net is repaired
    by least squares, without it batch norm is recalibrated only.
    """

    widths: Mapping[str, int]
    build: Callable[[], nn.Module] = field(repr=False)
    kept_outputs: Mapping[str, tuple[int, ...]] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """What decides the latency."""
        return tuple(sorted(self.widths.items()))


@dataclass(frozen=True)
class Method:
    """One pruner. ``at`` maps the knob to a net, deterministically; of the settings of one ``family`` the best counts."""

    name: str
    family: str
    at: Callable[[float], Candidate] = field(repr=False)
