"""The report of a run, and of a profile: every figure that the pages show."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from edgeprune.records.base import Located, Record
from edgeprune.records.formats import FormatName
from edgeprune.records.int8 import Int8Report
from edgeprune.records.measurement import Comparison, Fingerprint, Measurement, SustainedRun
from edgeprune.records.names import Precision, Stamp
from edgeprune.records.plan import LatencyModelQuality, PlanCheck, PruningPlan
from edgeprune.records.sparsity import SparseWeights


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
