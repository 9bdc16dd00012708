"""What was found out about the INT8 file of a deployment: what was tried, what it brought, and how well its ranges hold."""

from __future__ import annotations

from typing import Literal

from edgeprune.records.base import Record

# For whoever meets these names in a target, a profile or a report.
SCHEME_WORDS = (
    "static-int8: weights and activations are INT8, their ranges fixed beforehand by calibration samples; per-channel: a weight scale for"
    " each output channel of a layer, per-tensor: one for the whole layer"
)


class Int8Try(Record):
    """One way to make the INT8 file: its quality on the selection split, and KL from the FP32 file, in nats."""

    name: str
    quality: float
    loss_nats: float
    note: str = ""


class LayerFallback(Record):
    """A layer that was tried in float: what that brings (nats of KL less) and what it costs (ms more; ``None`` where it was not timed)."""

    layer: str
    gain_nats: float
    extra_ms: float | None = None
    in_float: bool = False

    @property
    def nats_per_ms(self) -> float | None:
        """What a millisecond in this layer brings; ``None`` where it was not timed or costs no time."""
        return self.gain_nats / self.extra_ms if self.extra_ms else None


class CalibrationReport(Record):
    """How well the calibration samples stand for the data.

    ``saturated_ratio`` is the share of values of held-out samples outside the ranges of the file, over all tensors; ``worst`` names the
    tensors where it is largest.
    """

    samples: int
    classes: int
    classes_missing: tuple[int, ...]
    held_out_samples: int = 0
    saturated_ratio: float | None = None
    worst: tuple[tuple[str, float], ...] = ()


class Int8Report(Record):
    """How the INT8 file that ships came about. ``fp32`` and the tries are qualities on ``n`` samples of the selection split."""

    effort: Literal["plain", "auto", "thorough"]
    metric: Literal["accuracy", "agreement"]
    n: int
    fp32: float
    tries: tuple[Int8Try, ...]
    chosen: str
    layers: tuple[LayerFallback, ...] = ()
    calibration: CalibrationReport | None = None

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Layers of the chosen file that were left in float on purpose."""
        return tuple(sorted(layer.layer for layer in self.layers if layer.in_float))

    def drop(self, name: str = "") -> float:
        """Quality lost against the FP32 file by a try, by default the chosen one."""
        return self.fp32 - next(t.quality for t in self.tries if t.name == (name or self.chosen))

    def lines(self) -> tuple[str, ...]:
        """What a reader must know, one line each."""
        by_name = {t.name: t for t in self.tries}
        cost = 100 * self.drop()
        told = f"INT8 ({self.chosen}) costs {cost:.2f} points on {self.n} samples of the selection split"
        if len(by_name) > 1:
            others = [f"{t.name} {100 * self.drop(t.name):.2f}" for t in self.tries]
            told += f"; tried: {', '.join(others)}"
        found = [told]
        kept = [
            f"{x.layer} (+{x.extra_ms:.3g} ms)" if x.extra_ms is not None else x.layer
            for x in self.layers
            if x.in_float
        ]
        if kept:
            found.append(f"layers of the INT8 file that stay in float: {', '.join(kept)}")
        report = self.calibration
        if report is not None:
            if report.classes_missing:
                missing = ", ".join(map(str, report.classes_missing[:10]))
                found.append(
                    f"no calibration sample is of the classes {missing}: their ranges may not hold; raise calibration_samples"
                )
            if report.saturated_ratio is not None:
                worst = ", ".join(f"{name} {ratio:.2%}" for name, ratio in report.worst[:3])
                found.append(
                    f"INT8 ranges of {report.samples} samples: {report.saturated_ratio:.3%} of the values of"
                    f" {report.held_out_samples} held-out samples lie outside"
                    + (f"; most in {worst}" if worst else "")
                )
        return tuple(found)
