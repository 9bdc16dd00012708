"""What was measured and scored for a plan, as the run folder keeps it."""

from __future__ import annotations

from edgeprune.plan.latency.kernel_times import KernelTime
from edgeprune.plan.latency.table import LatencyTable
from edgeprune.records.base import Record


class ScoresResult(Record):
    """Importance of every channel and the calibrated cost of every width."""

    scores: dict[str, tuple[float, ...]]
    curves: dict[str, tuple[float, ...]]


class Staircase(Record):
    """Time of everything a group touches, at each width of it, all other groups full."""

    widths: tuple[int, ...]
    ns: tuple[float, ...]


class MeasuredTable(Record):
    """The result of :func:`edgeprune.plan.table.measure_table`: kernel times, and the widths of each group that pay.

    ``times`` are those of single kernels that ran, the oldest taken at ``times_created`` (UTC; older stages lack it). ``kernels_taken`` of
    ``kernels_measured`` were not timed now but by an earlier search on the same board. ``boards`` counts the kernels that each board has
    timed; ``scales`` is what the times of the boards besides the run's own were multiplied by.
    """

    table: LatencyTable
    grids: dict[str, tuple[int, ...]]
    staircases: dict[str, Staircase]
    kernels_measured: int
    boards: dict[str, int] = {}
    scales: dict[str, float] = {}
    kernels_taken: int = 0
    times: tuple[KernelTime, ...] = ()
    times_created: str = ""

    def taken(self) -> str:
        """How many times are earlier ones, in words; empty when all were taken now."""
        if not self.kernels_taken:
            return ""
        day = f", {self.times_created[:10]}" if self.times_created else ""
        return f"{self.kernels_taken} of {self.kernels_measured} kernel times from an earlier search on this board{day}"


class MeasuredNets(Record):
    """Whole nets at random widths, timed beside the dense one."""

    dense_ms: float
    widths: tuple[dict[str, int], ...]
    ms: tuple[float, ...]
