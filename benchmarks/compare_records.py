"""What ``compare.py`` writes down."""

from __future__ import annotations

from typing import Literal

from edgeprune.records.base import Record
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.plan import LatencyModelQuality

OURS = "edgeprune"  # the method; parts taken away stand behind a dash


class OneShot(Record):
    """Accuracy in torch on the development split before any training: after removal, with fresh batch-norm statistics, and repaired."""

    naive: float
    recalibrated: float
    compensated: float | None


class Trained(Record):
    """One fine-tuned, quantised file: accuracy of the INT8 file on the host. The test split was read once for it."""

    seed: int
    development: float
    test: float
    seconds: float


class Versus(Record):
    """Ours minus this method on the test split, paired by seed and image.

    ``margin`` is in accuracy (ratio), ``only_ours`` and ``only_theirs`` count the images (over all seeds) that one of the two got right
    alone, ``p`` is of McNemar's exact two-sided test on them; images recur over the seeds, so it is nominal. ``margin_low`` and
    ``margin_high`` bound the margin with 95 % by a t-interval over seeds, where there are at least 3.
    """

    margin: float
    only_ours: int
    only_theirs: int
    p: float
    margin_low: float | None = None
    margin_high: float | None = None


class CompareRow(Record):
    """One method at one budget. ``ratio``, ``low`` and ``high`` are of the shipped INT8 file against dense INT8, measured interleaved."""

    method: str
    family: str
    budget: str
    asked_ratio: float
    status: Literal["done", "not reached", "not run"]
    message: str = ""
    widths: dict[str, int] = {}
    structure_ratio: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    macs_ratio: float | None = None
    parameters_ratio: float | None = None
    against_fp32: float | None = None  # dense fp32 latency over that of this file
    one_shot: OneShot | None = None
    trained: tuple[Trained, ...] = ()
    versus: Versus | None = None


class CompareResults(Record):
    """``compare-NET.json``: pruners side by side on one net, one device, at equal measured latency."""

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    net: str
    target: str
    device: str
    precision: Precision
    fingerprint: Fingerprint
    epochs: float
    learning_rate: float
    batch_size: int
    train_images: int
    development_n: int
    test_n: int
    seeds: int
    dense_development: dict[str, float]
    dense_test: dict[str, float]
    dense_ms: dict[str, float]
    latency_model: LatencyModelQuality
    versions: dict[str, str]
    rows: tuple[CompareRow, ...]
    seconds: float
