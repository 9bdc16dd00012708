"""Budgets and drops given as numbers, in Python and in files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from edgeprune.errors import SpecError
from edgeprune.pipeline.options import Options, chosen_gates
from edgeprune.records import catalog
from edgeprune.records.base import read_yaml
from edgeprune.records.budget import budget_text, drop_text
from edgeprune.records.workload import Workload

PLAIN = {"model": "net.py:build", "data": "photos"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.6, "60%"),
        (0.5, "50%"),
        (0.123, "12.3%"),
        (1e-7, "0.00001%"),
        (np.float32(0.6), "60%"),
        (np.float64(0.25), "25%"),
        ("15ms", "15ms"),
    ],
)
def test_a_number_below_one_is_a_share_of_the_dense_latency(value, text):
    assert budget_text(value) == text


@pytest.mark.parametrize(
    ("value", "spellings"),
    [
        (1, ("'1ms'", "'1x'", "'1%'")),
        (1.0, ("'1ms'", "'1x'", "'1%'")),
        (2.5, ("'2.5ms'", "'2.5x'", "'2.5%'")),
        (np.int64(15), ("'15ms'", "'15x'", "'15%'")),
        (150, ("'150ms'", "'150x'")),
        (0, ("0.6 is 60%",)),
        (-0.6, ("-0.6", "0.6 is 60%")),
    ],
)
def test_a_number_with_several_readings_is_refused_with_how_to_write_each(value, spellings):
    with pytest.raises(ValueError, match=r"over 0 and below 1, but got") as caught:
        budget_text(value)
    assert all(spelling in str(caught.value) for spelling in spellings)
    assert "'150%'" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [True, np.True_, float("nan"), np.float32("inf"), Fraction(3, 5), [0.6], np.array([0.6, 0.7])],
    ids=repr,
)
@pytest.mark.parametrize("read", [budget_text, drop_text])
def test_what_is_no_finite_number_is_neither_a_budget_nor_a_drop(value, read):
    with pytest.raises(ValueError, match="must be text or a finite number"):
        read(value)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01, "1%"), (0, "0%"), (-0.0, "0%"), (np.float32(0.005), "0.5%")]
)
def test_a_drop_as_a_number_is_a_ratio(value, text):
    assert drop_text(value) == text


@pytest.mark.parametrize(
    ("value", "hint"), [(1, "'1%'"), (2.5, "'2.5%'"), (-0.01, "but got -0.01")]
)
def test_a_drop_of_one_or_more_is_refused_with_how_to_write_points(value, hint):
    with pytest.raises(ValueError, match=r"at least 0 and below 1, such as 0\.01 for 1%") as caught:
        drop_text(value)
    assert hint in str(caught.value)


def test_numbers_of_a_call_go_before_those_of_the_file_and_the_target():
    workload = Workload(**PLAIN, latency=0.7, max_drop=0.02)
    assert (workload.latency, workload.max_drop) == ("70%", "2%")
    target = catalog.target("this-machine")
    budget, drop = chosen_gates(Options(), workload, target)
    assert (budget.text, drop) == ("70%", 0.02)
    budget, drop = chosen_gates(Options(latency=0.6, max_drop=0), workload, target)
    assert (budget.text, budget.value, drop) == ("60%", 0.6, 0.0)
    with pytest.raises(SpecError, match=r"but got 0; 0\.6 is 60%"):
        chosen_gates(Options(latency=0), workload, target)
    with pytest.raises(SpecError, match="finite number"):
        chosen_gates(Options(max_drop=float("nan")), workload, target)


def test_a_file_may_have_numbers_too(tmp_path: Path):
    path = tmp_path / "edgeprune.yaml"
    path.write_text("model: net.py:build\ndata: photos\nlatency: 0.6\nmax_drop: 0.01\n")
    read = read_yaml(Workload, path)
    assert (read.latency, read.max_drop) == ("60%", "1%")
    for line, words in {
        "latency: 15": "write '15ms', '15x' or '15%'",
        "latency: yes": "finite number, but got True",
        "max_drop: 1": "for 1 points write '1%'",
        "latency: fast": "must look like 15ms, 60% or 2.5x, but got 'fast'",
    }.items():
        path.write_text(f"model: net.py:build\ndata: photos\n{line}\n")
        with pytest.raises(SpecError) as caught:
            read_yaml(Workload, path)
        assert words in str(caught.value)
        assert str(caught.value).count("but got") == 1
