"""The section about the INT8 file: what was tried, what stays in float, and the calibration."""

from __future__ import annotations

import pytest
from report_fixture import make_report

from edgeprune.records.int8 import CalibrationReport, Int8Report, Int8Try, LayerFallback
from edgeprune.report.figures import NONE
from edgeprune.report.html import render_html
from edgeprune.report.int8_table import calibration, cells, layer_cells
from edgeprune.report.terminal import render_terminal

FOUND = Int8Report(
    effort="auto",
    metric="accuracy",
    n=800,
    fp32=0.93,
    tries=(
        Int8Try(name="own ranges", quality=0.92, loss_nats=0.031),
        Int8Try(name="mse ranges", quality=0.9275, loss_nats=0.012, note="<b>slower</b>"),
    ),
    chosen="mse ranges",
    layers=(
        LayerFallback(layer="stem", gain_nats=0.01, extra_ms=0.25, in_float=True),
        LayerFallback(layer="head", gain_nats=0.001),
    ),
    calibration=CalibrationReport(
        samples=256, classes=10, classes_missing=(3, 7), held_out_samples=64,
        saturated_ratio=0.00123, worst=(("conv1", 0.02), ("conv2", 0.0)),
    ),
)  # fmt: skip


def test_the_recipes_stand_beside_the_fp32_file_with_what_each_lost():
    assert [row[:3] for row in cells(FOUND)] == [
        ("FP32 file", "93.00%", NONE),
        ("own ranges", "92.00%", "1.00"),
        ("mse ranges", "92.75%", "0.25"),
    ]
    assert [row[-1] for row in cells(FOUND)] == ["reference", "tried", "kept: <b>slower</b>"]


def test_the_calibration_counts_samples_classes_and_what_the_ranges_leave_out():
    assert FOUND.calibration is not None
    assert dict(calibration(FOUND.calibration)) == {
        "calibration samples": "256",
        "classes among them": "8 of 10",
        "classes without a sample": "3, 7",
        "outside the ranges": "0.123% of the values of 64 held-out samples",
        "most of them in": "conv1 2.00%",
    }


def test_a_layer_in_float_is_shown_with_what_a_millisecond_brings():
    free = LayerFallback(layer="free", gain_nats=0.2, extra_ms=0.0)
    rows = layer_cells(FOUND.model_copy(update={"layers": (*FOUND.layers, free)}))
    assert rows == [
        ("stem", "0.0100", "0.250", "0.0400", "stays in float"),
        ("head", "0.00100", "not timed", NONE, "INT8"),
        ("free", "0.200", "0", NONE, "INT8"),
    ]


def test_three_variants_are_not_called_four():
    three = tuple(r for r in make_report().variants if r.measurement != "pruned-int8")
    why = "INT8 was refused: too coarse; FP32 ships"
    report = make_report(variants=three, shipped="fp32", shipped_reason=why, why_fp32=why)
    for text in (render_html(report).decode(), render_terminal(report, width=200)):
        assert "The variants" in text
        assert "The four variants" not in text
        assert why in text


@pytest.mark.parametrize("is_there", [True, False])
def test_both_reports_have_the_section_where_an_int8_file_was_made(is_there):
    report = make_report(int8=FOUND if is_there else None)
    page, text = render_html(report).decode(), render_terminal(report, width=100)
    assert ('id="int8"' in page) is is_there
    assert ('href="#int8"' in page) is is_there
    assert ("800 samples of the selection split" in text) is is_there
    if is_there:
        assert "&lt;b&gt;slower&lt;/b&gt;" in page
        assert "<b>slower" not in page
        assert "stays in float" in text
        assert "0.04" in text.partition("stem")[2].splitlines()[0]  # nats for a millisecond
        assert "nats less per ms" in page
        assert "head" not in text.partition("stem")[2].splitlines()[0]
        assert "classes without a sample: 3, 7" in " ".join(text.split())
