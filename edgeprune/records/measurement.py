"""What was measured on a board: blocks of runs, what was read beside them, and comparisons.

Times are integer nanoseconds in records (``_ns``) and milliseconds where people read them (``_ms``). Ratios are in [0, 1].
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field

from edgeprune.records.base import Record
from edgeprune.records.formats import FilePrecision
from edgeprune.records.names import Sha256, Stamp
from edgeprune.records.statistics import percentile_overs

P99_SAMPLES = 1000


class Fingerprint(Record):
    """What a measurement was made on. Tables and artefacts of different fingerprints never mix."""

    device: str
    transport: str
    hostname_digest: str
    machine: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    cores: int
    memory_bytes: int
    page_size_bytes: int
    kernel: str
    python: str
    governor: str | None
    runtime: str
    runtime_version: str
    threads: int
    stamp: Stamp

    def key(self) -> str:
        """Digest of everything that changes latency."""
        from edgeprune.records.files import digest_of

        return digest_of(self)


class Telemetry(Record):
    """State of the board at one moment; a field that the board does not show is ``None``.

    ``clock_hz`` is the real clock where the board tells it (``vcgencmd measure_clock`` on a Raspberry Pi), else the one that was asked for.
    ``throttle`` names what limits the board now (``under-voltage``, ``frequency-capped``, ``throttled``, ``soft-limit``), ``throttle_seen``
    what has since the last reset; ``throttle_events`` counts over-current events (Jetson).
    """

    load_1min: float | None = None
    temperature_c: float | None = None
    temperature_limit_c: float | None = None
    clock_hz: int | None = None
    clock_limit_hz: int | None = None
    governor: str | None = None
    power_mode: str | None = None
    throttled: bool | None = None
    throttle: tuple[str, ...] = ()
    throttle_seen: tuple[str, ...] = ()
    throttle_events: int | None = None
    available_memory_bytes: int | None = None
    cpus_online: int | None = None
    foreign_cpu_ratio: float | None = None


class Block(Record):
    """Consecutive runs of one model within one round; every sample is the mean of ``calls_per_sample`` calls.

    ``rejected`` says why a block does not count; its samples are kept all the same. ``session`` counts the fresh processes that the model
    was timed in; rounds go on counting over sessions. ``load`` counts the loads within a request: after each the model lies elsewhere in
    memory, which moves its speed for as long as it stays there.
    """

    round: int
    calls_per_sample: int
    samples_ns: tuple[int, ...]
    rejected: str | None = None
    session: int = 0
    load: int = 0


class Measurement(Record):
    """The latency of one model file on one device: every sample, never only a mean.

    Figures come from the blocks that were not rejected. ``sentinel_drift_ratio`` is how far a fixed model moved over the session that
    moved most: 0.02 is 2 %. ``stop_reason`` is ``rounds``, ``runs`` (as many runs as were asked for) or ``time`` (not all of them).
    """

    name: str
    artifact_sha256: Sha256
    precision: FilePrecision
    threads: int
    load_ns: int
    first_ns: int
    blocks: tuple[Block, ...]
    before: Telemetry
    after: Telemetry
    fingerprint_key: str
    stamp: Stamp
    at: str  # UTC, ISO 8601
    peak_memory_bytes: int | None = None  # of the process that ran the model, runtime included
    unreliable: str | None = None  # why the figure should not be trusted
    stop_reason: str = "rounds"
    sentinel_drift_ratio: float | None = None
    notes: tuple[str, ...] = ()

    def samples_ns(self) -> list[int]:
        """All samples of the blocks that were not rejected."""
        return [s for b in self.blocks if b.rejected is None for s in b.samples_ns]

    def block_medians_ns(self) -> dict[int, float]:
        """Median of each accepted block, by round."""
        return {b.round: statistics.median(b.samples_ns) for b in self.blocks if b.rejected is None}

    def session_medians_ms(self) -> dict[int, float]:
        """Median of the block medians of each session that has an accepted block."""
        medians: dict[int, list[float]] = {}
        for block in self.blocks:
            if block.rejected is None:
                medians.setdefault(block.session, []).append(statistics.median(block.samples_ns))
        return {session: statistics.median(found) / 1e6 for session, found in medians.items()}

    def rejections(self) -> Counter[str]:
        """How many blocks were rejected, by reason."""
        return Counter(b.rejected for b in self.blocks if b.rejected is not None)

    @property
    def median_ms(self) -> float:
        """Median of the session medians, each the median of the session's block medians."""
        return statistics.median(self.session_medians_ms().values())

    @property
    def session_range_ms(self) -> tuple[float, float]:
        """Lowest and highest session median: what another fresh process may change."""
        medians = self.session_medians_ms().values()
        return min(medians), max(medians)

    @property
    def p90_method(self) -> Literal["early stopping", "plain"]:
        """How :attr:`p90_ms` was found; ``plain`` where there are fewer than 64 samples."""
        overs = percentile_overs(len(self.samples_ns()), 0.9)
        return "plain" if overs is None else "early stopping"

    @property
    def p90_ms(self) -> float:
        """90th percentile of all accepted samples, by the early-stopping rule of MLPerf Inference (confidence 0.99, tolerance 0).

        It is the ``t``-th largest of ``n`` samples, with the largest ``t`` for which ``sum_{i=0..t} C(n, i) 0.1^i 0.9^(n - i) <= 0.01``;
        source and limits stand at :func:`edgeprune.records.statistics.percentile_overs`. Under 64 samples there is no such ``t``: then it
        is the plain percentile of the samples, and :attr:`p90_method` says so.
        """
        samples = sorted(self.samples_ns())
        overs = percentile_overs(len(samples), 0.9)
        if overs is None:
            return samples[min(len(samples) - 1, int(0.9 * len(samples)))] / 1e6
        return samples[-overs] / 1e6

    @property
    def p99_ms(self) -> float | None:
        """99th percentile of all accepted samples; ``None`` under 1000 of them, which would leave fewer than ten above it."""
        samples = sorted(self.samples_ns())
        return samples[int(0.99 * len(samples))] / 1e6 if len(samples) >= P99_SAMPLES else None

    @property
    def spread_ratio(self) -> float:
        """Half the inter-quartile range of the block medians over their median: how far blocks disagree."""
        medians = sorted(self.block_medians_ns().values())
        low, high = medians[len(medians) // 4], medians[(3 * len(medians)) // 4]
        return (high - low) / 2 / statistics.median(medians)


class SustainedPoint(Record):
    """One piece of a sustained run: its median, and the board right after it. ``t_s`` is when it began, in seconds of the run."""

    t_s: float
    median_ns: int
    temperature_c: float | None = None
    clock_hz: int | None = None
    throttled: bool | None = None

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return self.median_ns / 1e6


class SustainedRun(Record):
    """One model run without a pause for ``seconds``; at least one point."""

    name: str
    artifact_sha256: Sha256
    precision: FilePrecision
    threads: int
    seconds: float
    points: Annotated[tuple[SustainedPoint, ...], Field(min_length=1)]
    fingerprint_key: str
    stamp: Stamp
    at: str  # UTC, ISO 8601

    @property
    def start_ms(self) -> float:
        """Median over the first tenth of the run."""
        end_s = 0.1 * self.seconds
        return statistics.median(
            p.median_ms for i, p in enumerate(self.points) if p.t_s < end_s or i == 0
        )

    @property
    def steady_ms(self) -> float:
        """Median over the last third of the run: what the model takes on a board that has warmed up."""
        return statistics.median(self.steady_medians())

    def steady_medians(self) -> list[float]:
        """Medians in milliseconds of the pieces of that third, the last piece at least."""
        last = len(self.points) - 1
        points = enumerate(self.points)
        return [p.median_ms for i, p in points if p.t_s >= self.seconds * 2 / 3 or i == last]

    @property
    def slowdown_ratio(self) -> float:
        """Steady over start: 1.2 is a fifth slower."""
        return self.steady_ms / self.start_ms

    @property
    def throttled_from_s(self) -> float | None:
        """When the board was first seen to throttle; ``None`` when it never was, or does not tell."""
        return next((p.t_s for p in self.points if p.throttled), None)


class Comparison(Record):
    """A candidate against a reference measured in the same rounds.

    ``ratio`` is the centre of candidate / reference over ``rounds`` independent comparisons, a load of both files each; ``low`` and
    ``high`` bound it at ``confidence``.
    """

    candidate: str
    reference: str
    ratio: float
    low: float
    high: float
    confidence: float
    rounds: int
