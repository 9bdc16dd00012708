"""What each stage of a deployment leaves in the run folder."""

from __future__ import annotations

from edgeprune.records.artifact import Artifact
from edgeprune.records.base import Record
from edgeprune.records.int8 import Int8Report
from edgeprune.records.measurement import Comparison, Fingerprint, Measurement
from edgeprune.records.names import Precision
from edgeprune.records.report import LedgerEntry


class TypesRow(Record):
    """One way to quantise an ONNX file, on the board: ``ratio`` is its time over that of the first way, with the upper end of its interval.

    ``agreement`` is the share of samples of the selection split whose class is torch's; ``holds`` whether that is close enough to the best.
    """

    name: str
    median_ms: float
    ratio: float
    ratio_high: float
    agreement: float
    holds: bool


class _NetFiles(Record):
    """A net as files in both precisions.

    ``fp32`` and ``int8`` are timed and asked whole. Where they cannot be cut, ``cuttable`` has their twins, by precision; where they are
    not what ships, because that runs nowhere here, ``shipping`` has the files that do. ``built_in_agreement`` is ``None`` where the
    runtime has no built-in kernels to compare with.
    """

    fp32: Artifact
    int8: Artifact | None
    cuttable: dict[Precision, Artifact] = {}
    shipping: dict[Precision, Artifact] = {}
    built_in_agreement: float | None
    notes: tuple[str, ...] = ()

    def whole(self, precision: Precision) -> Artifact:
        """The file that is timed and asked."""
        if precision == "fp32":
            return self.fp32
        if self.int8 is None:
            raise ValueError("the INT8 file was refused: there is none")
        return self.int8

    def cut_from(self, precision: Precision) -> Artifact:
        """The file that kernels are cut from."""
        return self.cuttable.get(precision, self.whole(precision))

    def shipped(self, precision: Precision) -> Artifact:
        """The file that ships."""
        return self.shipping.get(precision, self.whole(precision))


class DenseFiles(_NetFiles):
    """The dense model as files, checked against torch. ``int8_types`` are those that were chosen of ``types``, where there was a choice.

    ``int8_refused`` says why the net cannot ship as INT8, where that is known already; empty where it can.
    """

    int8: Artifact
    int8_refused: str = ""
    parity_error_ratio: float
    int8_types: str = ""
    types: tuple[TypesRow, ...] = ()


class DenseLatency(Record):
    """Dense FP32 beside dense INT8 on the device, and the precision that the search uses."""

    fingerprint: Fingerprint
    measurements: dict[str, Measurement]
    precision: Precision


class VariantFile(Record):
    """The narrower export that shows which dimension belongs to which group."""

    widths: dict[str, int]
    artifact: Artifact


class PrunedResult(Record):
    """Quality before and after compensation, and where weights were made sparse after that, on the development split."""

    entries: tuple[LedgerEntry, ...]
    compensation: str


class StepResult(Record):
    """A step before the last: the limit that it was solved for, the dense channels of each group that it left, and how good that was."""

    limit_ms: float
    predicted_ms: float
    cost_nats: float
    kept: dict[str, tuple[int, ...]]
    pruned: PrunedResult


class RecoveredResult(Record):
    """What the distillation did."""

    entry: LedgerEntry
    epochs_run: float
    best_epoch: float
    interrupted: bool


class PrunedFiles(_NetFiles):
    """The pruned model as files. ``sparse`` counts layers with sparse weights, and all with weights, where a pattern was asked for.

    ``int8`` is ``None`` where the INT8 file was refused; ``int8_refused`` says why.
    """

    int8: Artifact | None = None
    int8_refused: str = ""
    quantised: Int8Report | None = None
    sparse: dict[Precision, tuple[int, int]] = {}

    def float_layers(self, precision: Precision) -> tuple[str, ...]:
        """Layers of the file that ships that were left in float on purpose; files that are not searched but converted have none."""
        if precision != "int8" or self.shipping or self.quantised is None:
            return ()
        return self.quantised.float_layers


class FinalLatency(Record):
    """The four files measured in the same rounds; without ``pruned-int8`` where that was refused."""

    measurements: dict[str, Measurement]
    comparisons: tuple[Comparison, ...]


class FinalQuality(Record):
    """Quality of the four files on the development split; the pruned ones as the device answers."""

    by_variant: dict[str, float]
    metric: str
    entries: tuple[LedgerEntry, ...]
    device_agreement: dict[str, float]


class TestQuality(Record):
    """The test split, read once per final artefact."""

    values: dict[str, float]
    n: int
