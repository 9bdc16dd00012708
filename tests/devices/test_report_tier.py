"""Measurements for reports: sessions, enough runs, the sentinel's gate, and the figures that are made of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from sshd import matmul_file

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import REPORT, Loaded, Timing, TimingPlan
from edgeprune.devices.timing.measure import ModelFile, compare, measure
from edgeprune.devices.timing.report_tier import measure_report, report_options
from edgeprune.devices.timing.sentinel import KEY
from edgeprune.errors import DeviceError, Unreliable
from edgeprune.records.device import Device, ReportTier
from edgeprune.records.files import sha256_bytes
from edgeprune.records.measurement import Block, Fingerprint, Measurement, Telemetry

ORT: dict[str, Any] = {"runtime": "onnxruntime", "threads": 1}
QUICK = TimingPlan(rounds=2, block_ms=0.5, min_runs=2, max_runs=5, warmup_ms=0.5)
FAST, SLOW = (ModelFile(n, n.encode(), "fp32", sha256_bytes(n.encode())) for n in ("fast", "slow"))


class FakeBoard:
    """Times ``fast`` at 1 ms and ``slow`` at 100 ms, and the sentinel as told; block lengths follow the plan."""

    def __init__(
        self,
        *,
        sentinel_ns: Sequence[int] = (1_000_000,),
        rejected: Callable[[str, int], str | None] = lambda key, at: None,
        stamp: str = "measured",
        transport: str = "replay",
    ) -> None:
        self.device = Device(transport=transport, targets=(), recording="x", stand_in=False)  # type: ignore[arg-type]
        self.sentinel_ns = itertools.chain(sentinel_ns, itertools.repeat(sentinel_ns[-1]))
        self.rejected, self.stamp = rejected, stamp
        self.loads: list[str] = []
        self.loaded: set[str] = set()
        self.asked: list[tuple[tuple[str, ...], int]] = []

    def fingerprint(self, runtime: str, threads: int) -> Fingerprint:
        return Fingerprint(
            device="d", transport="replay", hostname_digest="0" * 12, machine="aarch64",
            cpu_model="c", cpu_flags=(), cores=4, memory_bytes=1, page_size_bytes=4096,
            kernel="6", python="3.11", governor=None, runtime=runtime, runtime_version="1",
            threads=threads, stamp=self.stamp,  # type: ignore[arg-type]
        )  # fmt: skip

    def load(self, key: str, content: bytes, **_: Any) -> Loaded:
        self.loads.append(key)
        self.loaded.add(key)
        return Loaded(key, 1000 + len(self.loads), 2000, (), ())

    def unload(self, keys: Sequence[str]) -> None:
        self.loaded -= set(keys)

    def time(self, keys: Sequence[str], plan: TimingPlan, *, purpose: str = "") -> Timing:
        if list(keys) != [KEY]:
            self.asked.append((tuple(keys), plan.rounds))
        blocks = {}
        for key in keys:
            assert key in self.loaded
            ns = {"fast": 1_000_000, "slow": 100_000_000}.get(key) or next(self.sentinel_ns)
            runs = max(plan.min_runs, min(plan.max_runs, round(plan.block_ms * 1e6 / ns)))
            blocks[key] = tuple(
                Block(round=i, calls_per_sample=1, samples_ns=(ns,) * runs, rejected=self.rejected(key, i), load=i)
                for i in range(plan.rounds)
            )  # fmt: skip
        peaks: dict[str, int | None] = {key: 10**6 * len(self.loads) for key in keys}
        return Timing(blocks, Telemetry(), Telemetry(), peaks, notes=("waited 3 s to cool",))


def measured(board: FakeBoard, *models: ModelFile, **options: Any) -> list[Measurement]:
    return measure_report(cast(Board, board), models or (FAST,), **ORT, **options)


def test_every_session_is_a_fresh_process_with_rounds_of_its_own():
    board = FakeBoard()
    (found,) = measured(board)
    assert board.loads == [KEY, "fast"] * 3
    assert not board.loaded
    assert board.asked == [(("fast",), 8)] * 3  # 3 * 8 blocks of 200 runs are more than 1024
    assert [b.round for b in found.blocks] == list(range(24))
    assert [b.session for b in found.blocks] == [0] * 8 + [1] * 8 + [2] * 8
    assert all(len(b.samples_ns) == 200 for b in found.blocks)
    assert (found.stop_reason, found.unreliable, found.sentinel_drift_ratio) == ("runs", None, 0)
    assert found.load_ns == 1004  # the median of three
    assert found.peak_memory_bytes == 6 * 10**6
    assert found.notes == ("waited 3 s to cool",)


def test_a_model_that_lacks_runs_gets_more_rounds_within_its_minute():
    board = FakeBoard()
    fast, slow = measured(board, FAST, SLOW)
    # 8 blocks of 5 runs take 4 s; 20 s of a session leave room for 32 more.
    assert board.asked == [(("fast", "slow"), 8), (("slow",), 32)] * 3
    assert (fast.stop_reason, slow.stop_reason) == ("runs", "time")
    assert sum(slow.samples_ns()) == 3 * 20 * 10**9
    enough = measured(FakeBoard(), SLOW, min_runs=150)[0]
    assert len(enough.samples_ns()) == 150
    assert enough.stop_reason == "runs"


def test_extra_rounds_of_one_model_do_not_disturb_a_comparison():
    fast, slow = measured(FakeBoard(), FAST, SLOW)
    found = compare(fast, slow)
    assert (found.ratio, found.rounds) == (pytest.approx(0.01), 24)


def test_a_session_in_which_the_sentinel_moved_is_measured_again():
    board = FakeBoard(sentinel_ns=(1_000_000, 1_050_000, 1_000_000, 1_010_000, 1_000_000))
    (found,) = measured(board)
    assert board.loads.count("fast") == 4
    assert [b.session for b in found.blocks[:16]] == [0] * 16
    assert {b.rejected for b in found.blocks[:8]} == {"the sentinel moved"}
    assert {b.rejected for b in found.blocks[8:]} == {None}
    assert found.sentinel_drift_ratio == pytest.approx(0.01)
    assert found.unreliable is None
    assert "session 1 was measured again: the sentinel moved by +5.0%" in found.notes


def test_a_sentinel_that_moves_a_little_again_is_noted():
    board = FakeBoard(sentinel_ns=(1_000_000, 1_050_000, 1_000_000, 950_000, 1_000_000))
    (found,) = measured(board)
    assert found.unreliable is None
    assert found.sentinel_drift_ratio == pytest.approx(-0.05)
    assert "the sentinel moved by -5.0% over session 1 again" in found.notes


def test_a_sentinel_that_moves_far_twice_makes_it_unreliable():
    moving = (1_000_000, 1_100_000, 1_000_000, 1_090_000, 1_000_000)
    board = FakeBoard(sentinel_ns=moving)
    with pytest.raises(Unreliable, match=r"\+9.0% over session 1, twice in a row"):
        measured(board)
    assert not board.loaded
    for lenient in (
        FakeBoard(sentinel_ns=moving, stamp="stand-in"),
        FakeBoard(sentinel_ns=moving, transport="local"),
    ):
        (found,) = measured(lenient)
        assert found.unreliable is not None
        assert "the sentinel moved" in found.unreliable
        assert len(found.session_medians_ms()) == 3


def test_too_many_rejected_blocks_are_unreliable():
    def hot(key: str, at: int) -> str | None:
        return "throttled" if key == "fast" and at % 2 else None

    with pytest.raises(Unreliable, match="12 of 24 blocks of fast were rejected"):
        measured(FakeBoard(rejected=hot))
    (found,) = measured(FakeBoard(rejected=hot, stamp="stand-in"))
    assert found.unreliable == "12 of 24 blocks of fast were rejected"
    assert found.rejections() == {"throttled": 12}


@pytest.mark.parametrize("call", [measured, lambda b: measure(cast(Board, b), [FAST], **ORT, plan=QUICK)])  # fmt: skip
def test_a_model_without_one_block_that_counts_is_an_error_everywhere(call):
    board = FakeBoard(rejected=lambda key, _: "hot" if key != KEY else None, stamp="stand-in")
    with pytest.raises(Unreliable, match=r"all .* blocks of fast were rejected, .* because: hot"):
        call(board)


def test_a_runtime_without_a_sentinel_is_measured_without_one():
    board = FakeBoard()
    (found,) = measure_report(cast(Board, board), [FAST], runtime="tensorrt", threads=1)
    assert KEY not in board.loads
    assert found.sentinel_drift_ratio is None


def test_a_board_that_fails_leaves_nothing_loaded():
    class Broken(FakeBoard):
        def time(self, keys: Sequence[str], plan: TimingPlan, *, purpose: str = "") -> Timing:
            if list(keys) != [KEY]:
                raise DeviceError("gone")
            return super().time(keys, plan)

    board = Broken()
    with pytest.raises(DeviceError, match="gone"):
        measured(board)
    assert not board.loaded


def test_two_models_of_one_name_cannot_be_measured():
    with pytest.raises(ValueError, match="different names"):
        measured(FakeBoard(), FAST, FAST)


def test_real_files_are_measured_in_three_sessions():
    contents = {"small": matmul_file(), "big": matmul_file(np.ones((256, 256), np.float32))}
    models = [ModelFile(n, c, "fp32", sha256_bytes(c)) for n, c in contents.items()]
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as board:
        small, big = measure_report(
            board, models, **ORT, plan=QUICK, sentinel_plan=QUICK, min_runs=20
        )
        for name in (*contents, KEY):
            with pytest.raises(DeviceError, match=name):
                board.infer(name, np.ones((1, 4), np.float32))
    assert set(small.session_medians_ms()) == {0, 1, 2}
    assert small.median_ms < big.median_ms
    assert len(big.samples_ns()) >= 20
    assert small.sentinel_drift_ratio is not None
    assert compare(small, big).ratio < 1


# Figures of a measurement


def with_blocks(*sessions: Sequence[Sequence[int]]) -> Measurement:
    numbers = itertools.count()
    blocks = tuple(
        Block(round=next(numbers), calls_per_sample=1, samples_ns=tuple(samples), session=i)
        for i, session in enumerate(sessions)
        for samples in session
    )
    return Measurement(
        name="m", artifact_sha256="0" * 64, precision="fp32", threads=1, load_ns=1, first_ns=1,
        blocks=blocks, before=Telemetry(), after=Telemetry(), fingerprint_key="k", stamp="stand-in",
        at="now",
    )  # fmt: skip


def test_the_median_is_that_of_the_sessions():
    ms = 1_000_000
    found = with_blocks([[ms], [ms], [ms], [ms]], [[3 * ms], [3 * ms]], [[2 * ms]])
    assert found.session_medians_ms() == {0: 1.0, 1: 3.0, 2: 2.0}
    assert found.median_ms == 2.0  # the median of all blocks would be 1.0
    assert found.session_range_ms == (1.0, 3.0)
    one = with_blocks([[ms], [3 * ms], [9 * ms]])
    assert (one.median_ms, one.session_range_ms) == (3.0, (3.0, 3.0))


def test_the_90th_percentile_errs_to_the_slow_side():
    rng = random.Random(3)
    true_ms = 1.0 + 0.1 * 2.302585  # of 1 ms plus an exponential with a mean of 0.1 ms
    over = 0
    for _ in range(200):
        samples = [round(1e6 * (1 + rng.expovariate(10))) for _ in range(300)]
        found = with_blocks([samples])
        assert found.p90_method == "early stopping"
        over += found.p90_ms >= true_ms
    assert over >= 0.97 * 200


def test_few_samples_have_a_plain_90th_percentile_that_says_so():
    found = with_blocks([[i * 1_000_000 for i in range(1, 64)]])
    assert (found.p90_ms, found.p90_method) == (57.0, "plain")
    more = with_blocks([[i * 1_000_000 for i in range(1, 65)]])
    assert (more.p90_ms, more.p90_method) == (64.0, "early stopping")


def test_the_99th_percentile_needs_a_thousand_samples():
    assert with_blocks([range(1, 1000)]).p99_ms is None
    assert with_blocks([range(1, 1001)]).p99_ms == 991 / 1e6


def test_an_entry_of_a_device_says_how_long_its_reports_take():
    usual = report_options(ReportTier())
    assert (usual["sessions"], usual["plan"], usual["min_runs"]) == (3, REPORT, 1024)
    assert "sentinel_plan" not in usual
    board = FakeBoard()
    tier = ReportTier(sessions=2, rounds=4, block_ms=10, min_runs=5, sentinel=False)
    (found,) = measured(board, **report_options(tier))
    assert board.loads == ["fast"] * 2
    assert board.asked == [(("fast",), 4)] * 2
    assert found.sentinel_drift_ratio is None
