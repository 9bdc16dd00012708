"""How far the median of a measurement may be off: what other loads of the same file would have shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from edgeprune.orderstats import Centre, centre
from edgeprune.results import Block, Measurement


def median_ms(blocks: Sequence[Block]) -> Centre:
    """The centre of the latency in milliseconds over the loads of a file, by its accepted blocks, with an interval of 99 %.

    Where the file was loaded once, each block is a value. With under 8 values the interval is their full range; see
    :func:`edgeprune.orderstats.centre`.

    Raises:
        ValueError: no block was accepted.
    """
    loads: dict[tuple[int, int], list[float]] = {}
    for block in blocks:
        if block.rejected is None:
            found = loads.setdefault((block.session, block.load), [])
            found.append(statistics.median(block.samples_ns) / 1e6)
    values = [statistics.median(medians) for medians in loads.values()]
    return centre(values if len(values) > 1 else next(iter(loads.values()), []))


def interval_ms(measurement: Measurement) -> Centre:
    """The median that is reported, with the interval of :func:`median_ms`, which is widened where it does not hold it."""
    found, median = median_ms(measurement.blocks), measurement.median_ms
    return replace(found, estimate=median, low=min(found.low, median), high=max(found.high, median))
