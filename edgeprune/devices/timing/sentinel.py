"""A small fixed model that is timed before and after the real ones: when it moves, the board moved.

It is a gate, never a correction: dividing by a sentinel that was timed around each session did not narrow the spread between sessions
(coefficient of variation 4.2 % without it, 4.0 % with it, measured by this project on a shared computer), because a disturbance does not
slow all models alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

from edgeprune.devices.board import Board
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.timing.measure import forget
from edgeprune.errors import IntegrityError
from edgeprune.records.files import sha256_bytes
from edgeprune.records.formats import all_facts, folders

# File by runtime, and what it must be. scripts/make_sentinels.py writes them; another file would be another yardstick.
SENTINELS: dict[str, tuple[Path, str]] = {
    runtime: (folders()[facts.name] / f"sentinel{facts.suffix}", facts.sentinel)
    for facts in all_facts()
    if facts.sentinel
    for runtime in facts.runtimes
}

PLAN = TimingPlan(rounds=3, block_ms=200, min_runs=5, max_runs=500, warmup_ms=200)
CHECK_EVERY_S = 600.0
OK_DRIFT, REPEAT_DRIFT = 0.03, 0.08
KEY = "edgeprune-sentinel"


def sentinel_file(runtime: str) -> bytes:
    """The sentinel that a runtime reads.

    Raises:
        KeyError: there is none for this runtime; see :data:`SENTINELS`.
        IntegrityError: the file is not the one that this version was made with.
    """
    path, digest = SENTINELS[runtime]
    content = path.read_bytes()
    if sha256_bytes(content) != digest:
        raise IntegrityError(
            f"{path.name} is not the sentinel that its digest names",
            hint="install edgeprune again",
        )
    return content


def judge_drift(drift_ratio: float) -> Literal["ok", "repeat", "unreliable"]:
    """What a drift, in either direction, means: up to 3 % is ok, over 8 % is unreliable, between them the session is measured again."""
    size = abs(drift_ratio)
    if size <= OK_DRIFT:
        return "ok"
    return "repeat" if size <= REPEAT_DRIFT else "unreliable"


class Sentinel:
    """The sentinel on a board; use as a context manager, so that it is unloaded however the work between ends.

    Args:
        board: where it runs.
        runtime: one of :data:`SENTINELS`.
        threads: those of the models it stands beside.
        plan: how it is timed; three blocks.
        clock: seconds, for :meth:`check`.
    """

    def __init__(
        self,
        board: Board,
        runtime: str,
        threads: int,
        *,
        plan: TimingPlan = PLAN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._runtime, self._threads = board, runtime, threads
        self._plan, self._clock = plan, clock
        self._baseline_ns: float | None = None
        self._checked_s = 0.0

    def __enter__(self) -> Sentinel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._board.unload([KEY])
        else:
            forget(self._board, [KEY])

    def start(self) -> None:
        """Load it and take the baseline."""
        content = sentinel_file(self._runtime)
        self._board.load(KEY, content, runtime=self._runtime, threads=self._threads)
        self._baseline_ns = self._time_ns()

    def check(self, now: float | None = None) -> float | None:
        """The drift so far when ten minutes have passed since the last look, else ``None``; ``now`` is in seconds of the clock."""
        now = self._clock() if now is None else now
        return self._drift() if now - self._checked_s >= CHECK_EVERY_S else None

    def end(self) -> float:
        """The drift from the baseline to now, as a ratio: 0.02 is 2 % slower, -0.02 is 2 % faster."""
        return self._drift()

    def _drift(self) -> float:
        if self._baseline_ns is None:
            raise ValueError("a sentinel must be started before it can tell a drift")
        return self._time_ns() / self._baseline_ns - 1

    def _time_ns(self) -> float:
        """Median of the block medians; disturbed blocks count only where all are."""
        blocks = self._board.time([KEY], self._plan).blocks[KEY]
        counted = [b for b in blocks if b.rejected is None] or list(blocks)
        self._checked_s = self._clock()
        return statistics.median(statistics.median(b.samples_ns) for b in counted)
