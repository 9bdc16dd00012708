"""How far the median of a measurement may be off: what other loads of the same file would have shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from edgeprune.records.measurement import Block, Measurement, SustainedRun
from edgeprune.records.statistics import Centre, centre

STRETCHES = 30  # of a sustained run; neighbouring moments of one are much alike


def median_ms(blocks: Sequence[Block]) -> Centre:
    """The centre of the latency in milliseconds over the loads of a file, by its accepted blocks, with an interval of 99 %.

    Where the file was loaded once, each block is a value. With under 8 values the interval is their full range; see
    :func:`edgeprune.records.statistics.centre`.

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
    return _around(measurement.median_ms, median_ms(measurement.blocks))


def steady_ms(run: SustainedRun) -> Centre:
    """The steady latency with an interval for the centre of its medians, those of up to 30 stretches."""
    ms = run.steady_medians()
    step = math.ceil(len(ms) / STRETCHES)
    parts = [statistics.median(ms[at : at + step]) for at in range(0, len(ms), step)]
    return _around(run.steady_ms, centre(parts))


def _around(median: float, found: Centre) -> Centre:
    return replace(found, estimate=median, low=min(found.low, median), high=max(found.high, median))
