"""How the INT8 file came about: what was tried, which layers stay in float, and how well the calibration samples stand for the data."""

from __future__ import annotations

from edgeprune.records.int8 import SCHEME_WORDS, CalibrationReport, Int8Report
from edgeprune.records.report import Report
from edgeprune.report.figures import NONE, significant
from edgeprune.report.markup import Column, Markup, pairs, table, tag
from edgeprune.report.sections import note, section

HEAD = ("recipe", "quality", "points lost", "KL, nats", "verdict")
LAYER_HEAD = ("layer", "nats less in float", "ms more in float", "nats less per ms", "verdict")


def title(found: Int8Report) -> str:
    """What the figures are and of what."""
    return f"The INT8 file: {found.metric} of {found.n} samples of the selection split"


def cells(found: Int8Report) -> list[tuple[str, ...]]:
    """A row for each recipe, in the order of :data:`HEAD`, after that of the FP32 file."""
    rows: list[tuple[str, ...]] = [("FP32 file", f"{found.fp32:.2%}", NONE, NONE, "reference")]
    for one in found.tries:
        verdict = "kept" if one.name == found.chosen else "tried"
        rows.append(
            (
                one.name,
                f"{one.quality:.2%}",
                f"{100 * found.drop(one.name):.2f}",
                significant(one.loss_nats),
                f"{verdict}: {one.note}" if one.note else verdict,
            )
        )
    return rows


def layer_cells(found: Int8Report) -> list[tuple[str, ...]]:
    """A row for each layer that was tried in float, in the order of :data:`LAYER_HEAD`."""
    return [
        (
            layer.layer,
            significant(layer.gain_nats),
            "not timed" if layer.extra_ms is None else significant(layer.extra_ms),
            NONE if layer.nats_per_ms is None else significant(layer.nats_per_ms),
            "stays in float" if layer.in_float else "INT8",
        )
        for layer in found.layers
    ]


def calibration(found: CalibrationReport) -> list[tuple[str, str]]:
    """Names and values: the samples, the classes among them, and the values that the ranges leave out."""
    missing = ", ".join(map(str, found.classes_missing[:10]))
    more = " and more" if len(found.classes_missing) > 10 else ""
    rows = [
        ("calibration samples", str(found.samples)),
        ("classes among them", f"{found.classes - len(found.classes_missing)} of {found.classes}"),
    ]
    if missing:
        rows.append(("classes without a sample", missing + more))
    if found.saturated_ratio is not None:
        share = f"{found.saturated_ratio:.3%} of the values of {found.held_out_samples} held-out samples"
        rows.append(("outside the ranges", share))
        worst = ", ".join(f"{name} {ratio:.2%}" for name, ratio in found.worst[:5] if ratio > 0)
        rows += [("most of them in", worst)] if worst else []
    return rows


def int8(report: Report) -> Markup | None:
    """The section of the page; nothing where no INT8 file was made."""
    found = report.int8
    if found is None:
        return None
    parts = [
        table(
            title(found),
            [Column(name, 0 < i < len(HEAD) - 1) for i, name in enumerate(HEAD)],
            cells(found),
            row_classes=["", *("shipped" if t.name == found.chosen else "" for t in found.tries)],
        )
    ]
    if found.layers:
        columns = [Column(name, 0 < i < len(LAYER_HEAD) - 1) for i, name in enumerate(LAYER_HEAD)]
        parts.append(table("Layers that were tried in float", columns, layer_cells(found)))
    if found.calibration is not None:
        parts += [tag("h3", "Calibration"), pairs(calibration(found.calibration))]
    parts.append(
        note(
            f"Effort {found.effort}. KL is the divergence of the INT8 file's answers from the FP32 file's on those samples; the gates"
            f" are judged on the development split. What targets and profiles call"
            f" such a file: {SCHEME_WORDS}."
        )
    )
    return section("int8", "The INT8 file", *parts)
