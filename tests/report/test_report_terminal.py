"""The report as text, and reports beside each other: the same figures as the page, in any width."""

# ruff: noqa: RUF001  (figures are printed with a true minus sign)

from __future__ import annotations

import subprocess
import sys

import pytest
from report_fixture import make_empty_report, make_report, median_of

from edgeprune.devices.board import judged
from edgeprune.devices.plans import Timing
from edgeprune.records.measurement import Telemetry
from edgeprune.report import compare_text, render_html, render_terminal
from edgeprune.report.timing_text import rejected_text

TIMES = "\N{MULTIPLICATION SIGN}"


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_text_has_the_headline_figures_of_the_page() -> None:
    report = make_report()
    text, page = flat(render_terminal(report, width=100)), render_html(report).decode()
    ratio = median_of(report, "dense-int8") / median_of(report, "pruned-int8")
    for figure in (
        "PASSED",
        report.headline,
        f"{median_of(report, 'pruned-int8'):.2f} ms",
        f"{ratio:.2f}{TIMES}",
        "92.18 %",
        "−0.44 pp against dense INT8",
        "−0.66 pp against dense FP32",
        "445 kB",
        "47.91 % of dense int8",
        "−51.52 pp",
        "2.1 %",
        "91.99 %",
    ):
        assert figure in text, figure
        assert figure in page, figure


@pytest.mark.parametrize("width", [60, 80, 110])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    text = render_terminal(make_report(), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert text.endswith("\n")
    for figure in ("dense FP32", "pruned INT8", "445 kB", "21.5 M"):
        assert figure in text


def test_the_stamp_stands_above_the_figures_unless_a_board_was_measured() -> None:
    stand_in = flat(render_terminal(make_report(), width=100))
    assert stand_in.index("Stand-in figures") < stand_in.index("Result")
    assert "ms stand-in; judged on 47.91 % of dense int8" in stand_in
    assert "Emulated board" in flat(render_terminal(make_report(stamp="emulated"), width=100))
    measured = flat(render_terminal(make_report(stamp="measured"), width=100))
    assert "Stand-in figures" not in measured
    assert "Emulated" not in measured
    assert "ms measured; judged on" in measured


def test_a_promise_that_doubtful_times_keep_says_so() -> None:
    report = make_report()
    doubtful = {
        name: m.model_copy(update={"unreliable": "9 of 24 blocks were disturbed"})
        for name, m in report.measurements.items()
    }
    text = render_terminal(report.model_copy(update={"measurements": doubtful}), width=100)
    assert text.startswith("PASSED ON UNRELIABLE TIMES\n")
    assert "UNRELIABLE TIMES: 9 of 24 blocks were disturbed" in text
    page = render_html(report.model_copy(update={"measurements": doubtful})).decode()
    assert ">PASSED ON UNRELIABLE TIMES<" in page


def test_disturbed_blocks_that_all_count_are_never_called_left_out_or_rejected() -> None:
    report = make_report()
    name, one = next((n, m) for n, m in report.measurements.items() if not m.rejections())
    times = Timing(
        {"m": tuple(b.model_copy(update={"rejected": "foreign CPU"}) for b in one.blocks)},
        Telemetry(),
        Telemetry(),
    )
    found = judged(times)
    update = {"blocks": found.blocks["m"], "unreliable": found.unreliable}
    doubtful = one.model_copy(update=update)
    n = len(one.blocks)
    said = f"{n} of {n} blocks that were timed together were disturbed, most by: foreign CPU; too many to leave out, so all of them count"
    assert rejected_text(doubtful) == "none"
    shown = report.model_copy(update={"measurements": {**report.measurements, name: doubtful}})
    text = flat(render_terminal(shown, width=100))
    assert f"UNRELIABLE TIMES: {said}" in text
    assert "blocks left out" in text
    assert said in render_html(shown).decode()
    for sentence in (text, render_html(shown).decode()):
        assert "rejected 0 of" not in sentence


def test_a_budget_in_milliseconds_is_judged_on_the_median() -> None:
    report = make_report()
    gates = tuple(
        g.model_copy(update={"unit": "ms", "value": 6.31, "limit": 6.6})
        if g.name == "latency"
        else g
        for g in report.gates
    )
    text = flat(render_terminal(report.model_copy(update={"gates": gates}), width=100))
    assert "ms stand-in; budget 6.60 ms" in text


@pytest.mark.parametrize("width", [60, 100])
def test_the_interval_stands_beside_the_value_and_it_is_said_which_end_was_judged(
    width: int,
) -> None:
    report = make_report()
    gates = tuple(
        g.model_copy(update={"low": 0.47, "high": 0.4849}) if g.name == "latency" else g
        for g in report.gates
    )
    judged_on = report.model_copy(update={"gates": gates})
    text = render_terminal(judged_on, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    for shown in (flat(text), render_html(judged_on).decode()):
        assert "47.91 % of dense int8, up to 48.49 %" in shown or width == 60
        assert "Latency is judged on the upper end of its interval" in shown
    assert "is judged on the upper end" not in flat(render_terminal(report, width=100))


def test_a_best_effort_names_the_missed_gates() -> None:
    gates = tuple(g.model_copy(update={"met": g.name != "latency"}) for g in make_report().gates)
    text = render_terminal(make_report(passed=False, gates=gates), width=100)
    assert text.startswith("BEST EFFORT\n")
    assert "missed: latency" in text
    assert "PASSED" not in text


def test_an_empty_report_still_prints() -> None:
    text = render_terminal(make_empty_report(), width=80)
    assert text.startswith("BEST EFFORT\nNothing was timed\n")
    assert "error not judged" in text


def test_hostile_names_reach_the_terminal_neither_as_escapes_nor_as_markup() -> None:
    text = render_terminal(
        make_report(model="\x1b[2J[bold red]evil[/]\r:boom:", notes=("a\nb",)), width=100
    )
    assert "\x1b" not in text
    assert "\r" not in text
    assert "[bold red]evil[/] :boom:" in text
    assert "- a b" in text


def test_colour_only_comes_when_asked_for_and_changes_no_word() -> None:
    import re

    report = make_report()
    colored = render_terminal(report, width=90, color=True)
    assert "\x1b[" in colored
    plain = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert flat(plain) == flat(render_terminal(report, width=90))


def test_many_groups_are_cut_short_with_the_number_left_out() -> None:
    plan = make_report().plan
    many = tuple(
        g.model_copy(update={"name": f"{g.name}{i}"}) for g in plan.groups for i in range(3)
    )
    text = render_terminal(make_report(plan=plan.model_copy(update={"groups": many})), width=90)
    assert f"and {len(many) - 12} more in the page" in text


def test_compared_runs_stand_in_columns() -> None:
    first = make_report()
    second = make_report(model="other.py:net", passed=False, budget="9ms", limit_ms=9.0)
    text = compare_text([first, second], width=100)
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert "PASSED" in lines["result"]
    assert "BEST EFFORT" in lines["result"]
    assert "net.py:build" in lines["model"]
    assert "other.py:net" in lines["model"]
    assert "50% (6.60 ms)" in lines["budget"]
    assert "9ms (9.00 ms)" in lines["budget"]
    assert lines["speed-up*"].count(TIMES) == 4  # value and interval, twice
    assert "!" not in text


def test_a_run_with_unreliable_times_is_called_that_in_a_comparison() -> None:
    report = make_report()
    doubtful = {
        name: m.model_copy(update={"unreliable": "9 of 24 blocks were disturbed"})
        for name, m in report.measurements.items()
    }
    other = report.model_copy(update={"measurements": doubtful})
    text = compare_text([report, other], width=110)
    (result,) = (line for line in text.splitlines() if line.startswith("result"))
    assert result.split("  ")[-1].strip() == "PASSED, UNRELIABLE"
    assert "! the times of run 2 are unreliable: 9 of 24 blocks were disturbed" in flat(text)
    assert "run 1 are unreliable" not in text


def test_runs_that_do_not_compare_are_called_out() -> None:
    other = make_report(stamp="measured", ledger=make_report().ledger[:1])
    fewer = other.model_copy(update={"ledger": (other.ledger[0].model_copy(update={"n": 50}),)})
    text = flat(compare_text([make_report(), fewer], width=110))
    assert "different devices or set-ups" in text
    assert "different stamps" in text
    assert "on other samples" in text


def test_runs_with_missing_parts_and_no_runs_at_all_still_compare() -> None:
    text = compare_text([make_empty_report(), make_report()], width=100)
    assert next(line for line in text.splitlines() if line.startswith("latency")).split()[1] == "—"
    assert compare_text([], width=80) == "No run to compare.\n"


def test_the_report_never_imports_torch() -> None:
    code = "import sys, edgeprune.report; sys.exit('torch' in sys.modules or 'rich.table' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
