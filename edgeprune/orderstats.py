"""What sorted samples say about a distribution, without any assumption on its shape: ranks that bound a median or a percentile."""

from __future__ import annotations

import math
from functools import lru_cache

CONFIDENCE = 0.99


@lru_cache(maxsize=1024)
def median_rank(n: int, confidence: float = CONFIDENCE) -> int:
    """The highest rank ``k`` so that the k-th smallest and k-th largest of ``n`` values hold the median that surely, or 1."""
    rank = 1
    while 2 * (rank + 1) <= n and median_coverage(n, rank + 1) >= confidence:
        rank += 1
    return rank


def median_coverage(n: int, rank: int) -> float:
    """Probability that the median lies between the values of rank ``rank`` from below and from above.

    Fewer than ``rank`` of ``n`` values lie on one side of the median with the binomial probability of ``n`` fair coins.
    """
    return 1.0 - 2.0 * sum(math.comb(n, below) for below in range(rank)) / 2.0**n


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
