"""Where the range of a quantised activation should end: from histograms of real values, the same for every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgeprune.formats import QuantizeOptions

BINS = 2048
STEPS = 255  # of an 8-bit scale
SHRINKS = 64  # ranges that are tried for the least squared error, from 1/64 of the full one on

# The values of all tensors of a file, sample by sample; called once for each look at them.
Passes = Callable[[], Iterable[Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class Spread:
    """How the values of one tensor are spread: ``counts`` in :data:`BINS` bins of equal width between ``low`` and ``high``."""

    low: float
    high: float
    counts: np.ndarray

    def centres(self) -> np.ndarray:
        """The middle of every bin."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return np.asarray((edges[1:] + edges[:-1]) / 2)


def spreads(passes: Passes) -> dict[str, Spread]:
    """The spread of every tensor over all samples: one pass for the extremes, and one to count between them.

    A tensor that holds NaN or Inf has such an end, and nothing is counted in it.
    """
    return filled(extremes(passes), passes)


def extremes(passes: Passes) -> dict[str, Spread]:
    """The spread of every tensor over all samples with nothing counted, in one pass."""
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for sample in passes():
        for name, value in sample.items():
            if value.size:
                low[name] = float(np.minimum(low.get(name, np.inf), value.min()))
                high[name] = float(np.maximum(high.get(name, -np.inf), value.max()))
    return {name: Spread(low[name], high[name], np.zeros(BINS, np.int64)) for name in low}


def filled(found: Mapping[str, Spread], passes: Passes) -> dict[str, Spread]:
    """Spreads with the values counted between their ends, in one pass."""
    counts = {name: np.zeros(BINS, np.int64) for name in found}
    for sample in passes():
        for name, value in sample.items():
            if value.size and np.inf > found[name].high > found[name].low > -np.inf:
                ends_ = (found[name].low, found[name].high)
                counts[name] += np.histogram(value, BINS, ends_)[0]
    return {name: Spread(s.low, s.high, counts[name]) for name, s in found.items()}


def ends(spread: Spread, options: QuantizeOptions) -> tuple[float, float]:
    """The range to quantise in; it holds zero, which padding and rectifiers need to be exact."""
    low, high = spread.low, spread.high
    total = int(spread.counts.sum())
    if total and options.ranges == "percentile":
        share = np.cumsum(spread.counts) / total
        edges = np.linspace(low, high, len(share) + 1)
        first = int(np.searchsorted(share, options.tail_ratio, side="right"))
        last = int(np.searchsorted(share, 1 - options.tail_ratio))
        low, high = float(edges[first]), float(edges[min(last, len(share) - 1) + 1])
    elif total and options.ranges == "mse":
        low, high = _least_error(spread)
    return min(low, 0.0), max(high, 0.0)


def _least_error(spread: Spread) -> tuple[float, float]:
    """The range of least expected squared error, of all that shrink both sides alike, and one side alone.

    Inside, rounding to steps of ``d`` costs ``d^2 / 12`` (uniform error); outside, clipping costs the square of the distance.
    """
    values, counts = spread.centres(), spread.counts.astype(np.float64)
    full_low, full_high = min(spread.low, 0.0), max(spread.high, 0.0)
    tried = []
    for i in range(1, SHRINKS + 1):
        share = i / SHRINKS
        pairs = {(share, share), (1.0, share), (share, 1.0)}
        for low, high in ((full_low * a, full_high * b) for a, b in sorted(pairs)):
            outside = np.maximum(low - values, 0) + np.maximum(values - high, 0)
            inside = counts[outside == 0].sum()
            error = inside * ((high - low) / STEPS) ** 2 / 12 + (counts * outside**2).sum()
            tried.append((float(error), -(high - low), low, high))
    _, _, low, high = min(tried)
    return low, high


def saturation(sample: np.ndarray, ends: tuple[float, float]) -> float:
    """Share of values in ``sample`` that lie outside a range by more than half of one of its 8-bit steps."""
    slack = (ends[1] - ends[0]) / STEPS / 2
    return float(((sample < ends[0] - slack) | (sample > ends[1] + slack)).mean())
