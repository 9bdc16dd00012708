"""What long work says in a log, where no bar can move."""

from __future__ import annotations

import re

import pytest

from edgeprune.cli.progress import Terminal, duration


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def said(capsys: pytest.CaptureFixture[str], seconds_a_step: float, steps: int) -> list[str]:
    """The lines about so many steps of one bar."""
    clock = Clock()
    with Terminal(clock).bar("recovering", steps) as bar:
        for step in range(steps):
            clock.now += seconds_a_step
            bar.advance(1, note=f"epoch {1 + 10 * step // steps} of 10")
    found = capsys.readouterr()
    assert found.out == ""
    return found.err.splitlines()


def test_a_log_is_told_where_long_work_is_and_how_long_it_still_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(capsys, seconds_a_step=3.0, steps=100)
    assert lines[0] == "      recovering: epoch 1 of 10, 10%, about 4 min left"
    assert lines[3] == "      recovering: epoch 4 of 10, 40%, about 3 min left"
    assert len(lines) == 9


def test_work_that_is_soon_done_is_not_commented_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, seconds_a_step=0.29, steps=100) == []
    assert said(capsys, seconds_a_step=29.0, steps=1) == []


@pytest.mark.parametrize("seconds_a_step", [0.2, 1.0, 30.0, 600.0])
def test_a_bar_has_at_most_ten_lines_however_long_it_takes(
    capsys: pytest.CaptureFixture[str], seconds_a_step: float
) -> None:
    lines = said(capsys, seconds_a_step, steps=1000)
    assert 5 <= len(lines) <= 10
    shares = [int(found[1]) for line in lines if (found := re.search(r"(\d+)%", line))]
    assert len(shares) == len(lines)
    assert shares == sorted(set(shares))
    assert max(shares) < 100


def test_the_first_word_of_very_long_work_comes_after_half_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(capsys, seconds_a_step=30.0, steps=1000)
    assert lines[0] == "      recovering: epoch 1 of 10, 0%"  # one step gives no pace
    assert lines[1] == "      recovering: epoch 1 of 10, 10%, about 7.5 h left"


def test_steps_of_an_earlier_run_do_not_count_as_pace(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Terminal(clock).bar("recovering", 100) as bar:
        bar.advance(50, note="epoch 6 of 10")
        clock.now += 60
        bar.advance(1, note="epoch 6 of 10")
    assert capsys.readouterr().err == "      recovering: epoch 6 of 10, 51%, about 49 min left\n"


def test_a_line_in_a_log_is_one_line_whatever_its_length(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Terminal().say("word " * 60)
    assert capsys.readouterr().err == "word " * 60 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "about 10 s left"),
        (52, "about 50 s left"),
        (100, "about 2 min left"),
        (3599, "about 60 min left"),
        (9000, "about 2.5 h left"),
    ],
)
def test_durations_are_as_rough_as_they_are_known(seconds: float, text: str) -> None:
    assert duration(seconds) == text
