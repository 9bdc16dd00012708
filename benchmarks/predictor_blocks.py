"""What ``predictor.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edgeprune.records.base import Record
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.plan import LatencyModelQuality
from edgeprune.report.figures import seconds_text, share_text


class HeldOut(Record):
    """One structure: predicted and measured share of the dense latency, and half of the 99 % interval of the latter."""

    predicted_ratio: float
    measured_ratio: float
    noise_ratio: float


class Predictor(Record):
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


class PredictorResults(Record):
    """``predictor.json``."""

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    most_kernels: int
    held_out_seed: int
    versions: dict[str, str]
    rows: tuple[Predictor, ...]


def predictor_block(
    results: PredictorResults, table: Callable[..., str], stamp: Callable[[Fingerprint], str]
) -> str:
    """Predicted against measured latency of structures that the latency model has never seen."""
    rows = [
        (
            f"{Path(r.model).name}, {r.precision}",
            f"{r.target}, {r.fingerprint.runtime} ({stamp(r.fingerprint)})",
            share_text(r.mean_error_ratio),
            share_text(r.p95_error_ratio),
            share_text(r.worst_error_ratio),
            str(len(r.held_out)),
            share_text(statistics.median(h.noise_ratio / h.measured_ratio for h in r.held_out)),
            str(r.kernels),
            str(r.nets),
            seconds_text(r.table_seconds + r.nets_seconds),
        )
        for r in results.rows
    ]
    head = (
        "network, precision",
        "target, runtime",
        "error: mean",
        "95th percentile",
        "worst",
        "structures",
        "noise of their measurement",
        "kernels timed",
        "whole nets timed",
        "time",
    )
    intro = (
        "Random structures that took no part in the fit, timed whole beside the dense net. The noise is half the 99 % interval of the"
        " measured share, relative to it, the median over structures: no prediction can be seen to be better than that."
    )
    return f"{intro}\n\n{table(head, rows, left=2)}"
