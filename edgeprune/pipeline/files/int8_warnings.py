"""What is known to go wrong in INT8, looked for before any work starts; and how well calibration samples stand for the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.export import ExportedProgram

from edgeprune.formats import Format, Inspectable, QuantizeOptions
from edgeprune.formats.shared.ranges import Spread, ends, saturation, spreads
from edgeprune.pipeline.files.operators import THE_MODEL, place_of
from edgeprune.records.int8 import CalibrationReport
from edgeprune.records.operators import word_of

SAMPLES = 32
HELD_OUT = 64
MOST_WARNINGS = 2  # of each kind
# Between the inputs of a concatenation: three of eight bits are lost to the narrower one.
MIXED_RANGES = 8.0
# The full range against the one that holds all but 0.1 % at each end: two bits are lost.
HEAVY_TAIL = 4.0
UNEVEN_CHANNELS = 64.0  # the widest against the median channel of a depthwise layer
# By their words in the traced net: a converter may write a gate as several plain operators.
GATES = {
    "hard_swish": "hard-swish",
    "hard_sigmoid": "hard-sigmoid",
    "sigmoid": "sigmoid",
    "silu": "sigmoid",
}
CONCATENATIONS = ("CONCATENATION", "Concat")
DEPTHWISE = ("DEPTHWISE_CONV_2D",)
ACTION = "edgeprune measures what it costs and, above 0.3 points, tries other ranges, float layers and quantisation-aware training"


def warnings(form: Format, fp32: Path, x: np.ndarray, program: ExportedProgram) -> tuple[str, ...]:
    """One line for each thing in a float file that often costs accuracy in INT8; the worst of each kind first.

    Args:
        form: of the file; one that cannot show what happens inside gives no warnings.
        fp32: the float file.
        x: real inputs as the torch model sees them; a few are looked at.
        program: the trace of the model that the file was made from.
    """
    if not isinstance(form, Inspectable):
        return ()
    made, few = form.readers(fp32), x[:SAMPLES]
    widths = _Widths({tensor: layer for tensor, (op, layer, _) in made.items() if op in DEPTHWISE})
    found = spreads(lambda: map(widths.note, form.activations(fp32, few)))
    # What stays in float may be infinite, as the scores behind a mask are.
    seen = {name: s for name, s in found.items() if np.isfinite((s.low, s.high)).all()}
    return (
        *_gates(program),
        *_concatenations(made, seen),
        *_tails(made, seen),
        *_depthwise(widths),
    )


def _gates(program: ExportedProgram) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        word = word_of(str(node.target)) if node.op == "call_function" else None
        if word in GATES:
            where = place_of(node) or place_of(node.args[0]) or THE_MODEL
            found.setdefault(GATES[word], []).append(where)
    for kind, places in sorted(found.items()):
        yield f"INT8 often loses at {kind}: {len(places)} of them, the first at {places[0]}; {ACTION}"


def _concatenations(
    made: dict[str, tuple[str, str, tuple[str, ...]]], seen: dict[str, Spread]
) -> Iterator[str]:
    found = []
    for tensor, (op, _, inputs) in made.items():
        if op not in CONCATENATIONS:
            continue
        sizes = {n: max(abs(seen[n].low), abs(seen[n].high)) for n in inputs if n in seen}
        if sizes and min(sizes.values()) > 0:
            found.append(
                (
                    max(sizes.values()) / min(sizes.values()),
                    tensor,
                    min(sizes, key=lambda n: sizes[n]),
                )
            )
    for ratio, tensor, narrow in sorted(found, reverse=True)[:MOST_WARNINGS]:
        if ratio > MIXED_RANGES:
            yield f"{tensor} joins tensors whose ranges differ {ratio:.0f} times, in INT8 {narrow} gets few steps; {ACTION}"


def _tails(
    made: dict[str, tuple[str, str, tuple[str, ...]]], seen: dict[str, Spread]
) -> Iterator[str]:
    inner = QuantizeOptions(ranges="percentile", tail_ratio=1e-3)
    found = []
    for tensor, spread in seen.items():
        low, high = ends(spread, inner)
        wide = max(spread.high, 0.0) - min(spread.low, 0.0)
        if tensor in made and high > low:
            found.append((wide / (high - low), tensor))
    for ratio, tensor in sorted(found, reverse=True)[:MOST_WARNINGS]:
        if ratio > HEAVY_TAIL:
            layer = made[tensor][1] or tensor
            yield f"the values of {layer} have a heavy tail, {ratio:.0f} times the range of 99.8 % of them; {ACTION}"


@dataclass
class _Widths:
    """Largest absolute value of each channel ``[C]`` of the tensors that depthwise layers write, which are named by tensor."""

    layers: dict[str, str]
    largest: dict[str, np.ndarray] = field(default_factory=dict)

    def note(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take in one sample, and pass it on; to see one twice changes nothing."""
        for tensor in self.layers:
            found = np.abs(sample[tensor]).reshape(-1, sample[tensor].shape[-1]).max(0)
            self.largest[tensor] = np.maximum(self.largest.get(tensor, found), found)
        return sample


def _depthwise(widths: _Widths) -> Iterator[str]:
    found = []
    for tensor, width in widths.largest.items():
        alive = width[width > 0]
        if len(alive):
            found.append((float(alive.max() / np.median(alive)), widths.layers[tensor] or tensor))
    for ratio, layer in sorted(found, reverse=True)[:MOST_WARNINGS]:
        if ratio > UNEVEN_CHANNELS:
            yield (
                f"channels of the depthwise layer {layer} differ {ratio:.0f} times in range;"
                " edgeprune tries cross-layer equalisation where INT8 costs more than 0.3 points"
            )


def calibration_report(
    form: Format,
    fp32: Path,
    int8: Path,
    held_out: np.ndarray,
    *,
    samples: int,
    classes: int,
    labels: np.ndarray | None,
) -> CalibrationReport:
    """How many samples, which classes among them, and how much of other samples lies outside the ranges that they gave.

    Args:
        form: of both files.
        fp32: the float file whose tensors are looked at.
        int8: the file with the ranges.
        held_out: inputs that were not among the calibration samples.
        samples: how many calibration samples there were.
        classes: how many classes the model knows.
        labels: those of the calibration samples, where there are any.
    """
    missing: tuple[int, ...] = ()
    if labels is not None:
        missing = tuple(sorted(set(range(classes)) - {int(v) for v in labels}))
    report = CalibrationReport(samples=samples, classes=classes, classes_missing=missing)
    if not isinstance(form, Inspectable) or not len(held_out):
        return report
    limits = form.ranges(int8)
    outside: dict[str, float] = {}
    x, total, out = held_out[:HELD_OUT], 0, 0.0
    for sample in form.activations(fp32, x):
        for name in sample.keys() & limits.keys():
            share = saturation(sample[name], limits[name])
            outside[name] = outside.get(name, 0.0) + share / len(x)
            total, out = total + sample[name].size, out + share * sample[name].size
    worst = sorted(
        ((n, s) for n, s in outside.items() if s > 0), key=lambda item: (-item[1], item[0])
    )
    return report.model_copy(
        update={
            "held_out_samples": len(x),
            "saturated_ratio": out / total if total else None,
            "worst": tuple(worst[:5]),
        }
    )
