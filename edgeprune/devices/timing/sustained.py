"""How fast a model is after minutes of work: the same model back to back, with heat and clock beside every figure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone

from edgeprune.devices.board import Board
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.timing.measure import ModelFile, forget
from edgeprune.progress import Progress
from edgeprune.records.measurement import SustainedPoint, SustainedRun

REQUEST_S = 5.0  # the longest piece; the state of the board is read between pieces
_PIECES = 20  # at least: the first tenth of a run is two of them
_MAX_RUNS = 50_000  # of one piece; 5 s of the shortest samples (0.2 ms) are half of it


def sustained(
    board: Board,
    model: ModelFile,
    *,
    runtime: str,
    threads: int,
    seconds: float,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> SustainedRun:
    """Run one model without a pause, as an app that watches a camera does.

    The board works in pieces of at most 5 s; between two there is only the way of one request. A block that the board rejects, because it
    throttles for one, counts here all the same: that is what is looked for.

    Args:
        board: where to run.
        model: the file.
        runtime: what runs it.
        threads: threads of the runtime.
        seconds: how long, at least a second; the piece that crosses the end is finished.
        progress: a bar of seconds, with the last figure beside it.
        clock: seconds on this machine, for the time of each point only.

    Raises:
        DeviceError: the file did not load, or the board failed.
    """
    if seconds < 1:
        raise ValueError(f"a sustained run must last at least 1 s, got {seconds:g}")
    fingerprint = board.fingerprint(runtime, threads)
    piece_ms = 1e3 * min(REQUEST_S, seconds / _PIECES)
    plan = TimingPlan(
        rounds=1, block_ms=piece_ms, min_runs=1, max_runs=_MAX_RUNS, warmup_ms=0, tolerant=True
    )
    key = f"sustained {model.name}"
    points: list[SustainedPoint] = []
    try:
        board.load(key, model.content, runtime=runtime, threads=threads)
        with progress.bar(f"sustained run of {model.name}, seconds", seconds) as bar:
            start = before = clock()
            while before - start < seconds:
                point = _point(board, key, plan, before - start)
                points.append(point)
                now = clock()
                bar.advance(now - before, _note(point))
                before = now
    except BaseException:
        forget(board, [key])
        raise
    board.unload([key])
    return SustainedRun(
        name=model.name,
        artifact_sha256=model.sha256,
        precision=model.precision,
        threads=threads,
        seconds=seconds,
        points=tuple(points),
        fingerprint_key=fingerprint.key(),
        stamp=fingerprint.stamp,
        at=datetime.now(timezone.utc).isoformat(),
    )


def _point(board: Board, key: str, plan: TimingPlan, t_s: float) -> SustainedPoint:
    timing = board.time([key], plan)
    (block,) = timing.blocks[key]
    after = timing.after
    return SustainedPoint(
        t_s=t_s,
        median_ns=round(statistics.median(block.samples_ns)),
        temperature_c=after.temperature_c,
        clock_hz=after.clock_hz,
        throttled=after.throttled,
    )


def _note(point: SustainedPoint) -> str:
    heat = "" if point.temperature_c is None else f", {point.temperature_c:.0f} °C"
    return f"{point.median_ms:.4g} ms{heat}{', throttled' if point.throttled else ''}"
