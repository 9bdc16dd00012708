"""The table of what was asked and what was reached: verdicts from the figures, never from the text."""

from __future__ import annotations

import shutil

import pytest
from blocks import RESULTS, table
from goals import Goal, goals, goals_block, points


def goal(found: float | None, **changes: object) -> Goal:
    plain: dict[str, object] = {"must": -0.005, "aim": 0.0, "text": points, **changes}
    return Goal("points", "accuracy", found=found, **plain)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "changes", "reached"),
    [
        (0.0, {}, "aim"),
        (-0.0049, {}, "asked"),
        (-0.0051, {}, "missed"),
        (None, {}, "not run"),
        (-0.02, {"must": None}, "missed"),
        (0.03, {"must": 0.03, "aim": 0.015, "is_most": True}, "asked"),
        (0.031, {"must": 0.03, "aim": 0.015, "is_most": True}, "missed"),
        (0.014, {"must": 0.03, "aim": 0.015, "is_most": True}, "aim"),
    ],
)
def test_a_figure_is_judged_by_its_bounds(found, changes, reached):
    assert goal(found, **changes).reached == reached


def test_a_miss_keeps_its_line_and_gets_its_reason():
    text = goals_block((goal(-0.01), goal(0.001)), table)
    lines = text.splitlines()
    bounds = f"| accuracy | {points(-0.005)} | {points(0.0)} |"
    assert f"{bounds} {points(-0.01)} | missed |  |" in lines
    assert f"{bounds} {points(0.001)} | aim |  |" in lines
    assert sum(line.startswith("- ") for line in lines) == 1
    assert "and why" not in goals_block((goal(0.001),), table)


def test_what_was_not_measured_says_so(tmp_path):
    found = tuple(goals(tmp_path))
    assert found
    assert {g.reached for g in found} == {"not run"}


def test_the_figures_are_those_of_the_results_files(tmp_path):
    for name in ("walltime.json", "compare-resnet20-wide.json"):
        shutil.copy(RESULTS / name, tmp_path)
    found = {g.quantity: g for g in goals(tmp_path)}
    timed = next(g for q, g in found.items() if q.startswith("wall time"))
    assert timed.found is not None
    assert 0 < timed.found < 60
    at_3x = found["ResNet-20-wide, INT8 against dense INT8 at 3x"]
    assert at_3x.found == pytest.approx(-0.0005, abs=0.01)
    assert found["margin over the best other pruner at 3x, the example"].found is None
