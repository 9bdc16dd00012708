"""Numbers as text, and what a report implies."""

# ruff: noqa: RUF001  (figures are printed with a true minus sign)

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import make_ledger, make_report

from edgeprune.records.measurement import Comparison
from edgeprune.records.report import LedgerEntry
from edgeprune.report import facts, figures


def entry(
    stage: str, value: float, precision: str = "fp32", metric: str = "accuracy"
) -> LedgerEntry:
    return LedgerEntry(stage=stage, metric=metric, value=value, n=2000, precision=precision)


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(figures)
    assert (found.failed, found.attempted) == (0, 10)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0, "0 ms"),
        (0.0004, "0.400 µs"),
        (0.0982, "98.2 µs"),
        (0.9996, "1000 µs"),
        (9.996, "10.0 ms"),
        (1234.5, "1234 ms"),
        (-0.5, "−500 µs"),
    ],
)
def test_times_keep_three_digits_and_switch_to_microseconds_under_one_millisecond(
    ms: float, text: str
) -> None:
    assert figures.time_text(ms) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (999_700, "1.00 MB"), (45_000, "45.0 kB"), (2_500_000_000, "2.50 GB")],
)
def test_sizes_never_show_a_thousand_of_a_unit(size: int, text: str) -> None:
    assert figures.bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9996, "1.0 s"), (59.97, "1 min 00 s"), (3599.8, "1 h 00 min")]
)
def test_durations_round_up_into_the_next_unit(seconds: float, text: str) -> None:
    assert figures.seconds_text(seconds) == text


@given(st.floats(min_value=1e-9, max_value=1e12))
def test_a_printed_figure_is_within_half_a_unit_of_its_third_digit(value: float) -> None:
    shown = float(figures.significant(value))
    assert shown == pytest.approx(value, rel=0.0051)
    assert "e" not in figures.significant(value)


@given(st.text())
def test_printable_text_has_one_line_and_no_control_or_format_characters(text: str) -> None:
    assert figures.printable(text).isprintable()
    assert len(figures.printable(text)) == len(text)


def test_each_stage_is_judged_against_the_last_one_in_its_precision() -> None:
    steps = facts.ledger_steps(make_ledger())
    against = [(s.entry.stage, s.against.stage if s.against else None) for s in steps]
    assert against == [
        ("dense", None),
        ("dense", None),
        ("pruned", "dense"),
        ("compensated", "pruned"),
        ("recovered", "compensated"),
        ("quantised", "recovered"),
        ("exported", "quantised"),
        ("on-device", "exported"),
    ]
    assert steps[2].against is not None
    assert steps[2].against.precision == "fp32"


def test_the_worst_and_best_stage_and_the_net_change_come_from_the_ledger() -> None:
    steps = facts.ledger_steps(make_ledger())
    worst, best = facts.worst_step(steps), facts.best_step(steps)
    assert worst is not None
    assert best is not None
    assert (worst.entry.stage, best.entry.stage) == ("pruned", "recovered")
    assert facts.net_change(steps) == pytest.approx(0.9218 - 0.9284)


def test_figures_of_different_metrics_are_never_subtracted() -> None:
    steps = facts.ledger_steps([entry("dense", 0.9), entry("pruned", 0.5, metric="agreement")])
    assert [s.change for s in steps] == [None, None]
    assert facts.worst_step(steps) is None
    assert facts.net_change(steps) is None


def test_the_outcome_compares_within_one_precision() -> None:
    report = make_report()
    found = facts.outcome(report)
    assert found is not None
    assert found.ratio == pytest.approx(found.row.median_ms / report.variants[1].median_ms)
    assert found.quality_change == pytest.approx(0.9218 - 0.9262)
    assert found.quality_change_fp32 == pytest.approx(0.9218 - 0.9284)
    assert found.interval is not None
    assert found.interval.candidate == "pruned-int8"


def test_a_comparison_across_precisions_is_not_taken_for_the_speed_up() -> None:
    mixed = Comparison(
        candidate="pruned-int8",
        reference="dense-fp32",
        ratio=0.2,
        low=0.19,
        high=0.21,
        confidence=0.99,
        rounds=9,
    )
    found = facts.outcome(make_report(comparisons=(mixed,)))
    assert found is not None
    assert found.interval is None
    assert found.ratio > 0.4


def test_the_wilson_interval_matches_values_worked_out_by_hand() -> None:
    low, high = facts.wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=2e-4), pytest.approx(0.5962, abs=2e-4))
    assert facts.wilson(1.0, 10)[1] == 1.0


def test_seconds_by_kind_add_up_to_the_whole_run() -> None:
    stages = make_report().stages
    totals = facts.seconds_by_kind(stages)
    assert list(totals) == ["training", "conversion", "measuring", "other"]
    assert sum(totals.values()) == pytest.approx(sum(s.seconds for s in stages))
