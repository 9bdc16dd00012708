"""Runs without a pause: how long, what is kept of them, what is judged, and how it is shown."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from measured_fixture import measured_files
from report_fixture import make_fingerprint, make_measurement, make_report
from sshd import matmul_file

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import Timing, TimingPlan
from edgeprune.devices.timing.measure import ModelFile
from edgeprune.devices.timing.sustained import REQUEST_S, sustained
from edgeprune.errors import DeviceError, SpecError
from edgeprune.pipeline.options import Options, chosen_sustained
from edgeprune.pipeline.stages import gates
from edgeprune.progress import Silent
from edgeprune.records.budget import parse_budget, parse_duration
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes
from edgeprune.records.intervals import steady_ms
from edgeprune.records.measurement import Block, SustainedPoint, SustainedRun, Telemetry
from edgeprune.records.report import ProfileReport
from edgeprune.report import render_html, render_terminal
from edgeprune.report.profile_text import render_profile

MODEL = ModelFile("pruned-int8", b"x", "int8", sha256_bytes(b"x"))
ORT: dict[str, Any] = {"runtime": "onnxruntime", "threads": 1}


def run_of(ms: Sequence[float], *, hot_from: int | None = None, **changes: Any) -> SustainedRun:
    points = tuple(
        SustainedPoint(
            t_s=10.0 * i,
            median_ns=round(value * 1e6),
            temperature_c=50.0 + i,
            clock_hz=1_500_000_000,
            throttled=hot_from is not None and i >= hot_from,
        )
        for i, value in enumerate(ms)
    )
    facts: dict[str, Any] = {
        "name": "pruned-int8", "artifact_sha256": "0" * 64, "precision": "int8", "threads": 1,
        "seconds": 10.0 * len(ms), "points": points, "fingerprint_key": "k", "stamp": "stand-in",
        "at": "now",
    }  # fmt: skip
    return SustainedRun(**(facts | changes))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10min", 600), ("1h", 3600), (" 1.5 min ", 90), ("1s", 1), ("24h", 86_400)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds
    assert chosen_sustained(Options(sustained=text)) == seconds


@pytest.mark.parametrize("text", ["", "10", "10m", "0s", "0.5s", "25h", "-1s", "1h30min", "ten s"])
def test_other_durations_are_refused(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
    with pytest.raises(SpecError, match="duration"):
        chosen_sustained(Options(sustained=text))


def test_no_sustained_run_is_made_unless_it_is_asked_for():
    assert chosen_sustained(Options()) is None


def test_start_and_steady_are_medians_of_the_first_tenth_and_the_last_third():
    slowing = [*range(1, 31)]
    run = run_of([float(v) for v in slowing])
    assert run.start_ms == statistics.median(slowing[:3])
    assert run.steady_ms == statistics.median(slowing[20:])
    assert run.slowdown_ratio == run.steady_ms / run.start_ms
    assert run.throttled_from_s is None
    assert run_of([1.0] * 10, hot_from=4).throttled_from_s == 40.0


def test_a_run_of_one_piece_has_all_figures():
    run = run_of([2.0])
    assert (run.start_ms, run.steady_ms, run.slowdown_ratio) == (2.0, 2.0, 1.0)


class FakeBoard:
    """Each piece takes as long as it should, on a clock of its own; the answer slows down with time."""

    def __init__(self, fails_at: float = float("inf")) -> None:
        self.now = 100.0
        self.plans: list[TimingPlan] = []
        self.loaded: set[str] = set()
        self.fails_at = fails_at

    def fingerprint(self, runtime: str, threads: int) -> Any:
        return make_fingerprint()

    def load(self, key: str, content: bytes, **_: Any) -> None:
        self.loaded.add(key)

    def unload(self, keys: Sequence[str]) -> None:
        self.loaded -= set(keys)

    def time(self, keys: Sequence[str], plan: TimingPlan, *, purpose: str = "") -> Timing:
        assert set(keys) == self.loaded
        self.plans.append(plan)
        self.now += plan.rounds * plan.block_ms / 1e3
        if self.now > self.fails_at:
            raise DeviceError("gone")
        hot = self.now > 160
        block = Block(
            round=0,
            calls_per_sample=1,
            samples_ns=(2_000_000 if hot else 1_000_000,),
            rejected="throttled" if hot else None,
        )
        state = Telemetry(temperature_c=85.0 if hot else 60.0, throttled=hot)
        return Timing({keys[0]: (block,)}, Telemetry(), state)


def sustained_on(board: FakeBoard, seconds: float) -> SustainedRun:
    return sustained(
        cast(Board, board), MODEL, **ORT, seconds=seconds, progress=Silent(), clock=lambda: board.now
    )  # fmt: skip


def test_pieces_of_at_most_five_seconds_follow_each_other_until_the_time_is_over():
    board = FakeBoard()
    run = sustained_on(board, 120)
    assert len(run.points) == 24
    assert all(p.rounds * p.block_ms <= 1e3 * REQUEST_S for p in board.plans)
    assert all(p.warmup_ms == 0 for p in board.plans)
    assert [p.t_s for p in run.points] == [5.0 * i for i in range(24)]
    assert not board.loaded
    assert (run.stamp, run.name, run.seconds) == ("stand-in", "pruned-int8", 120)


def test_what_throttling_does_is_part_of_the_result():
    run = sustained_on(FakeBoard(), 120)
    assert (run.start_ms, run.steady_ms, run.slowdown_ratio) == (1.0, 2.0, 2.0)
    assert run.throttled_from_s == 60.0
    assert run.points[-1].temperature_c == 85.0


def test_a_short_run_still_has_twenty_points():
    assert len(sustained_on(FakeBoard(), 10).points) >= 20
    with pytest.raises(ValueError, match="at least 1 s"):
        sustained_on(FakeBoard(), 0.5)


def test_a_board_that_fails_leaves_nothing_loaded():
    board = FakeBoard(fails_at=130)
    with pytest.raises(DeviceError, match="gone"):
        sustained_on(board, 120)
    assert not board.loaded


def test_a_real_file_runs_for_two_seconds():
    content = matmul_file()
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as board:
        run = sustained(
            board,
            ModelFile("m", content, "fp32", sha256_bytes(content)),
            **ORT,
            seconds=2,  # a busy machine gives four points a second
            progress=Silent(),
        )
    assert len(run.points) >= 5
    assert 0 < run.start_ms < 100
    assert all(a.t_s < b.t_s for a, b in itertools.pairwise(run.points))


# The gate


def gate(budget: str, run: SustainedRun | None) -> Any:
    files = measured_files()  # dense int8 8 ms, pruned int8 4 ms
    files = gates.Measured(**(vars(files) | {"sustained": run}))
    return gates.latency_gate(files, parse_budget(budget), "int8")


@pytest.mark.parametrize(
    ("budget", "met", "value"), [("6ms", True, 6.0), ("5ms", False, 6.0), ("75%", True, 0.75), ("60%", False, 0.75)]
)  # fmt: skip
def test_the_steady_latency_is_what_is_judged(budget, met, value):
    found = gate(budget, run_of([4.0] * 10 + [6.0] * 20, hot_from=10))
    assert (found.met, found.value) == (met, value)
    assert "throttled from 100 s on" in found.note
    assert "4 ms at the start" in found.note
    assert gate(budget, None).met  # 4 ms, half of dense


def test_a_steady_latency_is_judged_on_its_upper_end():
    ms = [4.0] * 60 + [5.9, 5.9, 6.1, 6.1, 6.0, 6.0] * 20
    found = gate("6.05ms", run_of(ms))
    assert found.value == 6.0
    assert 6.0 < found.high < 6.2
    assert gate("6.2ms", run_of(ms)).met
    long = steady_ms(run_of([6.0] * 20_000))  # over an hour
    assert (long.low, long.high) == (6.0, 6.0)


def test_a_sustained_run_of_another_file_judges_nothing():
    assert gate("5ms", run_of([6.0] * 9, name="pruned-fp32")).value == 4.0


# How it is shown


def test_page_and_terminal_show_the_run():
    report = make_report(sustained=run_of([6.3] * 10 + [7.9] * 20, hot_from=12))
    page = render_html(report).decode()
    assert 'href="#sustained"' in page
    inner = page.split('<section id="sustained"', 1)[1].split("</section>", 1)[0]
    assert inner.count('class="cross"') == 2 * 18
    assert "temperature, °C" in inner
    for text in (inner, render_terminal(report, width=100)):
        assert "7.90 ms (median of the last third)" in text
        assert "from 2 min 00 s on" in text
        assert "50 to 79 °C" in text
    without = render_html(make_report()).decode()
    assert "#sustained" not in without


def test_a_board_that_does_not_tell_its_state_still_has_a_curve():
    points = tuple(SustainedPoint(t_s=float(i), median_ns=5_000_000) for i in range(9))
    report = make_report(sustained=run_of([1.0], points=points, seconds=9.0))
    page = render_html(report).decode()
    assert "temperature, °C" not in page
    assert "the board does not tell" in page


def unreliable_report(why: str) -> Any:
    report = make_report()
    doubtful = {
        name: m.model_copy(update={"unreliable": why if name == "dense-int8" else None})
        for name, m in report.measurements.items()
    }
    return report.model_copy(update={"measurements": doubtful})


@pytest.mark.parametrize(
    "shown", [lambda r: render_html(r).decode(), lambda r: render_terminal(r, width=100)]
)
def test_unreliable_times_are_called_so_before_any_figure(shown: Callable[[Any], str]):
    why = "the sentinel moved by 12 %"
    text = shown(unreliable_report(why))
    assert text.index(why) < text.index("6.43 ms")
    assert "unreliable times" in text.lower()
    assert "unreliable times" not in shown(make_report()).lower()


def test_a_profile_says_how_its_times_were_taken():
    fingerprint = make_fingerprint()
    fine = make_measurement("fp32", 3.2, "fp32", 1, "stand-in")
    rejected = {0: "foreign CPU", 1: "throttled", 2: "throttled"}
    blocks = tuple(b.model_copy(update={"rejected": rejected.get(b.round)}) for b in fine.blocks)
    bad = fine.model_copy(update={"blocks": blocks, "unreliable": "4 of 14 blocks", "name": "int8"})
    report = ProfileReport(
        model="net.py:build", target="rpi4", device="d", fingerprint=fingerprint,
        measurements={"fp32": fine, "int8": bad}, layers=(), covered_ratio={},
        sizes={"fp32": 4096, "int8": 1024}, sustained=run_of([6.3] * 10),
    )  # fmt: skip
    lines = render_profile(report).splitlines()
    (first, second) = (line for line in lines if line.startswith("dense "))
    assert f"p50 {fine.median_ms:9.4f} ms" in first
    assert f"p90 {fine.p90_ms:9.4f} ms" in first
    assert "spread" in second
    text = "\n".join(lines)
    assert "peak memory 31.4 MB" in text
    assert "sessions 1, 336 samples, blocks left out: none" in text
    assert "blocks left out: 3 of 14: throttled (2 times)" in text
    assert "*** UNRELIABLE: 4 of 14 blocks ***" in text
    assert "6.30 ms (median of the last third)" in text
    few = fine.model_copy(update={"blocks": fine.blocks[:2]})
    text = render_profile(report.model_copy(update={"measurements": {"fp32": few}}))
    assert "p90 (few samples)" in text
