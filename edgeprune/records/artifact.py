"""What the program writes: measurements, plans, ledgers, artefacts and the report.

Times are integer nanoseconds in records (``_ns``) and milliseconds where people read them (``_ms``). Ratios are in [0, 1].
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from edgeprune.records.base import Located, Record
from edgeprune.records.int8 import Int8Report
from edgeprune.records.names import FilePrecision, FormatName, Precision, Stamp
from edgeprune.records.plan import LatencyModelQuality, PlanCheck, PruningPlan
from edgeprune.records.sparsity import SparseWeights
from edgeprune.records.statistics import percentile_overs

P99_SAMPLES = 1000
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorSpec(Record):
    """One input or output of a model file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Literal["NCHW", "NHWC", "other"] = "other"
    scale: float | None = None
    zero_point: int | None = None


class Artifact(Record):
    """One model file, by content. ``path`` is relative to the run folder or the bundle.

    ``operators`` are what the runtime must have beside its delegates; ``notes`` is what the user of the file should know of its conversion.
    """

    path: str
    format: FormatName
    precision: FilePrecision
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_counts: dict[str, int] = {}
    operators: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
        from edgeprune.records.base import digest_of

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
    def mean_ms(self) -> float:
        """Mean of all accepted samples. Disturbances pull it up: compare medians."""
        return statistics.fmean(self.samples_ns()) / 1e6

    @property
    def mad_ms(self) -> float:
        """Median absolute deviation of all accepted samples from their median: the width of the bulk, blind to outliers."""
        samples = self.samples_ns()
        centre = statistics.median(samples)
        return statistics.median(abs(s - centre) for s in samples) / 1e6

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


class LedgerEntry(Record):
    """Quality after one stage, on the development split."""

    stage: Literal[
        "dense",
        "pruned",
        "compensated",
        "sparsified",
        "recovered",
        "quantised",
        "exported",
        "on-device",
    ]
    metric: Literal["accuracy", "agreement"]
    value: float
    n: int
    precision: Precision
    split: Literal["development"] = "development"
    where: str = "torch"
    note: str = ""


class VariantRow(Record):
    """One of the four files that are always shown together."""

    variant: Literal["dense", "pruned"]
    precision: Precision
    median_ms: float
    p90_ms: float
    spread_ratio: float
    ratio_to_dense: float  # against the dense model in the same precision
    quality: float
    size_bytes: int
    parameters: int
    macs: int
    measurement: str  # key of Report.measurements


class StageCost(Record):
    """Wall time of one stage. ``kind`` says what the time went into."""

    name: str
    seconds: float
    kind: Literal["training", "conversion", "measuring", "other"]
    cached: bool = False


class FormatRow(Record):
    """The dense model in one format and precision, on the device.

    ``ratio`` is its time over that of the target's own format in the same precision and rounds, with its interval. ``agreement`` is the
    share of samples whose class is torch's. ``reason`` says why it was not measured, or must not ship.
    """

    format: FormatName
    runtime: str
    precision: Precision | None = None  # ``None``: the format failed as a whole
    median_ms: float | None = None
    spread_ratio: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    agreement: float | None = None
    holds: bool = False
    reason: str = ""


class FormatChoice(Record):
    """Which of the formats of a target ships, by measurement of the dense model; ``samples`` is what the agreement was asked on."""

    own: FormatName
    chosen: FormatName
    precision: Precision | None  # of the row that won
    reason: str
    rows: tuple[FormatRow, ...]
    samples: int
    device: str
    stamp: Stamp

    def row(self) -> FormatRow | None:
        """The row that won, where one was measured."""
        wanted = (self.chosen, self.precision)
        return next((r for r in self.rows if r.holds and (r.format, r.precision) == wanted), None)


class LayerWidth(Record):
    """One layer before and after pruning."""

    layer: str
    kind: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int


class LayerTime(Record):
    """One kernel of the exported file and its share of the latency."""

    name: str
    op: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    fp32_ms: float | None
    int8_ms: float | None
    method: Literal["runtime profiler", "isolated kernel"]


class ProfileReport(Record):
    """What ``edgeprune profile`` found. ``covered_ratio`` is the sum of the kernels over the whole file, by precision."""

    schema_version: Literal[1] = 1
    model: str
    target: str
    device: str
    fingerprint: Fingerprint
    measurements: dict[str, Measurement]
    layers: tuple[LayerTime, ...]
    covered_ratio: dict[str, float]
    sizes: dict[str, int]
    sustained: SustainedRun | None = None


class Gate(Record):
    """One promise, judged on the exported file on the device; ``not_run`` where nothing here runs it: then neither met nor missed.

    ``low`` and ``high`` bound the value where it was measured with an interval; then ``high`` is what was judged.
    """

    name: Literal["latency", "accuracy", "agreement", "numerics"]
    limit: float
    value: float
    unit: str
    met: bool
    note: str = ""
    not_run: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def missed(self) -> bool:
        """Whether it was judged and broken."""
        return not self.met and not self.not_run

    @model_validator(mode="after")
    def _check_not_run(self) -> Gate:
        if self.not_run and self.met:
            raise ValueError("a gate that was not run must not be met")
        return self


class Report(Located):
    """Everything a reader needs to believe the result, and to make it again; ``folder`` is that of the run."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    model: str
    target: str
    profile: str
    device: str
    stamp: Stamp
    fingerprint: Fingerprint
    budget: str
    limit_ms: float
    shipped: Precision
    shipped_reason: str
    why_fp32: str | None = None  # where it ships in place of an INT8 file that was refused
    gates: tuple[Gate, ...]
    passed: bool
    headline: str
    variants: tuple[VariantRow, ...]
    comparisons: tuple[Comparison, ...]
    measurements: dict[str, Measurement]
    sustained: SustainedRun | None = None  # of the shipped file
    ledger: tuple[LedgerEntry, ...]
    plan: PruningPlan
    layer_widths: tuple[LayerWidth, ...]
    checks: tuple[PlanCheck, ...]
    latency_model: LatencyModelQuality
    pareto: tuple[tuple[float, float], ...]  # (predicted ms, predicted cost in nats)
    test_quality: dict[str, float]
    test_n: int
    stages: tuple[StageCost, ...]
    peak_memory_bytes: int
    versions: dict[str, str]
    settings: dict[str, str | int | float | bool | None]
    notes: tuple[str, ...]
    bundle_name: str = Field(alias="bundle")  # in the folder of the run
    int8: Int8Report | None = None
    formats: FormatChoice | None = None
    sparsity: SparseWeights | None = None  # of the file that ships

    @property
    def bundle(self) -> Path:
        """The folder of the bundle, absolute. SpecError as for ``folder``."""
        return self.folder / self.bundle_name
