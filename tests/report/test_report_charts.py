"""Scales, ticks and the shapes of the charts."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import make_empty_report, make_report, median_of

from edgeprune.report import charts, timing_charts
from edgeprune.report.markup import Markup, join, tag
from edgeprune.report.svg import Scale, nice_ticks, padded, tick_text


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_the_range_and_are_told_apart(low: float, span: float) -> None:
    high = low + max(span, abs(low) * 1e-6)
    ticks = nice_ticks(low, high, 5)
    slack = 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 11
    assert all(low - slack <= t <= high + slack for t in ticks)
    assert len({tick_text(t, ticks) for t in ticks}) == len(ticks)


@given(st.floats(1e-3, 1e3), st.floats(1.5, 1e4))
def test_logarithmic_ticks_lie_inside_the_range_and_never_crowd(low: float, factor: float) -> None:
    ticks = Scale(low, low * factor, 0, 480, log=True).ticks()
    assert len(ticks) <= 7
    assert all(low * 0.999 <= t <= low * factor * 1.001 for t in ticks)


def test_a_scale_maps_its_ends_and_clips_what_lies_outside() -> None:
    linear = Scale(2.0, 4.0, 100.0, 300.0)
    assert [linear(v) for v in (2, 3, 4, 9, -9)] == [100, 200, 300, 300, 100]
    assert Scale(1.0, 100.0, 0.0, 200.0, log=True)(10) == pytest.approx(100)


@given(st.lists(st.floats(-1e3, 1e3), max_size=5), st.booleans())
def test_a_padded_range_holds_its_values_and_has_a_width(values: list[float], zero: bool) -> None:
    low, high = padded(values, zero=zero)
    assert low < high
    assert all(low <= v <= high for v in values)
    assert not zero or low <= 0 <= high


def test_bars_are_proportional_to_the_medians() -> None:
    report = make_report()
    svg = charts.variant_bars(report)
    assert svg is not None
    widths = {
        name: float(width)
        for width, name in re.findall(r'width="([\d.]+)"[^>]*class="fill ([a-z0-9-]+)"', svg)
    }
    assert list(widths) == ["dense-fp32", "pruned-fp32", "dense-int8", "pruned-int8"]
    for name, width in widths.items():
        expected = median_of(report, name) / median_of(report, "dense-fp32")
        assert width / widths["dense-fp32"] == pytest.approx(expected, abs=0.001)
    assert svg.count('class="limit"') == 1


def test_drift_has_a_dot_for_every_accepted_block_and_a_cross_for_the_rejected_one() -> None:
    svg = timing_charts.drift(make_report())
    assert svg is not None
    assert svg.count('class="mark ') == 4 * 14 - 1
    assert "rejected: another process used the core" in svg


def test_the_distribution_rises_to_all_samples() -> None:
    svg = timing_charts.ecdf(make_report())
    assert svg is not None
    curves = re.findall(r'<path d="([^"]+)" class="curve', svg)
    assert len(curves) == 4
    for curve in curves:
        points = [tuple(map(float, p.split())) for p in curve[1:].split("L")]
        assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(points))
        assert points[-1][1] == pytest.approx(50.0)  # the top of the plot: 100 %


def test_points_on_the_identity_line_are_exact_predictions() -> None:
    report = make_report()
    exact = report.checks[0].model_copy(update={"predicted_ms": 7.0, "measured_ms": 7.0})
    svg = charts.predicted_against_timed(make_report(checks=(exact,)))
    assert svg is not None
    ends = re.search(
        r'x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" class="identity"', svg
    )
    mark = re.search(r'cx="([\d.]+)" cy="([\d.]+)" r="5"', svg)
    assert ends is not None
    assert mark is not None
    x1, y1, x2, y2 = map(float, ends.groups())
    x, y = map(float, mark.groups())
    assert (y - y1) / (y2 - y1) == pytest.approx((x - x1) / (x2 - x1), abs=1e-3)


def test_a_single_point_path_and_equal_samples_still_draw() -> None:
    assert charts.pareto(make_report(pareto=((6.24, 0.3456),))) is not None
    report = make_report()
    same = {
        key: m.model_copy(
            update={
                "blocks": tuple(b.model_copy(update={"samples_ns": (5_000_000,)}) for b in m.blocks)
            }
        )
        for key, m in report.measurements.items()
    }
    assert timing_charts.ecdf(make_report(measurements=same)) is not None
    assert timing_charts.drift(make_report(measurements=same)) is not None


def test_measurements_whose_blocks_were_all_rejected_are_left_out() -> None:
    report = make_report()
    bad = report.measurements["pruned-int8"]
    blocks = tuple(b.model_copy(update={"rejected": "throttled"}) for b in bad.blocks)
    changed = report.measurements | {"pruned-int8": bad.model_copy(update={"blocks": blocks})}
    svg = timing_charts.ecdf(make_report(measurements=changed))
    assert svg is not None
    assert svg.count("<path") == 3


def test_charts_without_data_are_not_drawn() -> None:
    empty = make_empty_report()
    drawn = (
        charts.variant_bars, charts.ledger_steps, charts.pareto, charts.predicted_against_timed,
        charts.stage_bar, timing_charts.drift, timing_charts.ecdf,
    )  # fmt: skip
    assert [draw(empty) for draw in drawn] == [None] * 7


def test_only_markup_passes_unescaped() -> None:
    assert (
        tag("p", "<b>", Markup("<i>x</i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i>x</i></p>'
    )
    assert join("a & b", Markup("<br>")) == "a &amp; b<br>"
    assert (
        tag("a", hidden=True, title=None, class_="k", data_x=1.50)
        == '<a hidden class="k" data-x="1.5"></a>'
    )
