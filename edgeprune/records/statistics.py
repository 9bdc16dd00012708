"""What sorted samples say about a distribution, without any assumption on its shape: ranks that bound a centre or a percentile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Centre:
    """The Hodges-Lehmann estimate of a centre, and an interval that holds the true one with probability ``coverage``."""

    estimate: float
    low: float
    high: float
    coverage: float


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (above 0, at most 1) of the values do not exceed.

    >>> nearest_rank([3.0, 1.0, 2.0], 0.95)
    3.0
    """
    return sorted(values)[math.ceil(share * len(values)) - 1]


def centre(values: Sequence[float], confidence: float = CONFIDENCE) -> Centre:
    """Where values that scatter evenly about something have their centre: the median of all means of two of them.

    Its interval is that of Wilcoxon's signed-rank test. Neither assumes a shape, only symmetry, which log-ratios of blocks in
    alternating order have. It is nearly as sharp as the mean where noise is normal, and holds where it has long tails. Compared with the
    sign test's interval for the median, it takes a third fewer values for the same width.

    Source: Hollander, Wolfe, Chicken, Nonparametric Statistical Methods (3rd edition), sections 3.1-3.3.

    Args:
        values: independent values, at least one.
        confidence: in (0, 1). With under 8 values no interval has 99 %; then it is the full range, and ``coverage`` says what that covers.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("a centre must have at least one value")
    x = np.asarray(values, np.float64)
    rows, columns = np.triu_indices(len(x))
    means = np.sort(x[rows] / 2 + x[columns] / 2)
    rank, coverage = signed_rank(len(x), confidence)
    return Centre(float(np.median(means)), float(means[rank - 1]), float(means[-rank]), coverage)


@lru_cache(maxsize=1024)
def signed_rank(n: int, confidence: float = CONFIDENCE) -> tuple[int, float]:
    """The highest rank ``k`` so that the k-th smallest and k-th largest mean of two of ``n`` values hold the centre that surely, or 1.

    Returns:
        ``k``, and the probability that they do: ``1 - 2 P(T < k)`` with Wilcoxon's statistic ``T``, the sum of those of the numbers 1 to
        ``n`` for which a fair coin shows heads.
    """
    chances = np.ones(1)
    for number in range(1, n + 1):
        heads = np.pad(chances, (number, 0))
        chances = (np.pad(chances, (0, number)) + heads) / 2
    coverage = 1.0 - 2.0 * np.cumsum(chances)  # of ranks 1, 2, ...
    rank = max(1, int(np.searchsorted(-coverage, -confidence, side="right")))
    return rank, float(max(0.0, coverage[rank - 1]))


@lru_cache(maxsize=1024)
def percentile_overs(n: int, percentile: float, confidence: float = CONFIDENCE) -> int | None:
    """How many of ``n`` values may lie over a percentile's early-stopping estimate: that is the ``t``-th largest of them.

    ``t`` is the largest number for which ``sum_{i=0..t} C(n, i) (1 - p)^i p^(n - i) <= 1 - confidence``: were the true percentile higher
    than the estimate, so few values over it would be that unlikely. For p = 0.9 and confidence 0.99 it needs 64 values, for p = 0.99 662.

    Source: the early stopping of MLPerf Inference, scenario SingleStream, with tolerance d = 0 (mlcommons/inference,
    ``loadgen/early_stopping.cc`` and ``loadgen/results.cc``). It takes the values as independent. Consecutive latencies are not, so the
    confidence is nominal; the estimate errs to the slow side.

    Args:
        n: number of values.
        percentile: in (0, 1).
        confidence: in (0, 1).

    Returns:
        ``t``, at least 1; ``None`` where ``n`` is too small for an estimate.
    """
    log_over, log_under = math.log1p(-percentile), math.log(percentile)
    total, overs = 0.0, -1
    for i in range(n + 1):
        log_ways = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        total += math.exp(log_ways + i * log_over + (n - i) * log_under)
        if total > 1.0 - confidence:
            break
        overs = i
    return overs if overs >= 1 else None
