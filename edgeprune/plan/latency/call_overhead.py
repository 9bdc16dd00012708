"""What a kernel costs alone that it does not cost in a net: the call of its own file, as a part of the latency model.

A whole net is called once. While nothing is removed whole, the calls that were timed too much are the same number in every structure, and
the offset of the correction has them. A removed block takes its kernels' times out of the sum, calls included, and so too much. The
correction may give that back, for each kernel that is gone. ``benchmarks/predictor.py`` measures the error that is left: of the example
four blocks with 15 kernels in all can go.
"""

from __future__ import annotations

from edgeprune.plan.latency.table import LatencyTable

OP = "calls of removed kernels"  # the class of these factors; a scale of 1 stands for the time of the quickest kernel


def quickest_ms(table: LatencyTable) -> float:
    """Milliseconds of the quickest kernel that was timed, its call included: no call takes longer. 0 where nothing was timed."""
    found = [point.ns for kernel in table.kernels for point in kernel.points if point.ns > 0]
    return min(found, default=0.0) / 1e6
