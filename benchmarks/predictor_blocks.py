"""What ``predictor.py`` writes down."""

from __future__ import annotations

from typing import Literal

from edgeprune import records
from edgeprune.results import Fingerprint, LatencyModelQuality
from edgeprune.specs import Precision


class HeldOut(records.Record):
    """One structure: predicted and measured share of the dense latency, and half of the 90 % interval of the latter."""

    predicted_ratio: float
    measured_ratio: float
    noise_ratio: float


class Predictor(records.Record):
    """One network on one target in one precision. Errors are relative, over ``held_out``; seconds are of the wall clock."""

    model: str
    target: str
    device: str
    fingerprint: Fingerprint
    precision: Precision
    dense_ms: float
    groups: int
    kernels: int
    fit: LatencyModelQuality
    nets: int
    table_seconds: float
    nets_seconds: float
    mean_error_ratio: float
    p95_error_ratio: float
    worst_error_ratio: float
    rank_correlation: float
    held_out: tuple[HeldOut, ...]


class PredictorResults(records.Record):
    """``predictor.json``."""

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    most_kernels: int
    held_out_seed: int
    versions: dict[str, str]
    rows: tuple[Predictor, ...]
