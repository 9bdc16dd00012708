"""The fixed model that shows whether a board stayed the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from repo import REPO

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import Timing, TimingPlan
from edgeprune.devices.timing import sentinel as sentinels
from edgeprune.devices.timing.sentinel import KEY, SENTINELS, Sentinel, judge_drift, sentinel_file
from edgeprune.errors import DeviceError, IntegrityError
from edgeprune.records.device import Device
from edgeprune.records.measurement import Block, Telemetry

QUICK = TimingPlan(rounds=3, block_ms=1, min_runs=2, max_runs=5, warmup_ms=1)


class FakeBoard:
    """Answers with given block medians, one request after the other."""

    def __init__(self, *answers: Sequence[int], rejected: Sequence[int] = ()) -> None:
        self.answers, self.rejected = list(answers), rejected
        self.loaded: list[str] = []

    def load(self, key: str, content: bytes, **_: Any) -> None:
        self.loaded.append(key)

    def unload(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.loaded.remove(key)

    def time(self, keys: Sequence[str], plan: TimingPlan, *, purpose: str = "") -> Timing:
        blocks = tuple(
            Block(
                round=i,
                calls_per_sample=1,
                samples_ns=(ns,),
                rejected="hot" if ns in self.rejected else None,
            )
            for i, ns in enumerate(self.answers.pop(0))
        )
        return Timing({keys[0]: blocks}, Telemetry(), Telemetry())


def sentinel(board: FakeBoard, **options: Any) -> Sentinel:
    return Sentinel(cast(Board, board), "onnxruntime", 1, **options)


@pytest.mark.parametrize("runtime", SENTINELS)
def test_sentinels_are_small_and_are_what_their_digest_says(runtime):
    assert 1000 < len(sentinel_file(runtime)) < 100_000


def test_a_sentinel_that_was_changed_is_refused(monkeypatch):
    file, _ = SENTINELS["onnxruntime"]
    monkeypatch.setitem(SENTINELS, "onnxruntime", (file, "0" * 64))
    with pytest.raises(IntegrityError, match=r"sentinel\.onnx"):
        sentinel_file("onnxruntime")
    board = FakeBoard()
    with pytest.raises(IntegrityError):
        sentinel(board).start()
    assert board.loaded == []


@pytest.mark.parametrize(
    ("drift", "verdict"),
    [
        (0.0, "ok"),
        (0.03, "ok"),
        (-0.03, "ok"),
        (0.031, "repeat"),
        (-0.08, "repeat"),
        (0.081, "unreliable"),
        (-0.5, "unreliable"),
    ],
)
def test_a_drift_counts_in_both_directions(drift, verdict):
    assert judge_drift(drift) == verdict


def test_the_drift_is_between_medians_of_blocks():
    board = FakeBoard((100, 104, 500), (110, 109, 50))
    with sentinel(board) as watched:
        watched.start()
        assert board.loaded == [KEY]
        assert watched.end() == pytest.approx(109 / 104 - 1)
    assert board.loaded == []


def test_disturbed_blocks_count_only_where_all_are():
    board = FakeBoard((100, 100, 900), (900, 900, 200), rejected=(900,))
    watched = sentinel(board)
    watched.start()
    assert watched.end() == 1.0
    board = FakeBoard((900, 900, 900), (900, 900, 900), rejected=(900,))
    watched = sentinel(board)
    watched.start()
    assert watched.end() == 0.0


def test_it_is_looked_at_every_ten_minutes():
    now = [0.0]
    watched = sentinel(FakeBoard((100,), (102,), (104,)), clock=lambda: now[0])
    watched.start()
    assert watched.check() is None
    assert watched.check(599.0) is None
    now[0] = 600.0
    assert watched.check() == pytest.approx(0.02)
    assert watched.check(1199.0) is None
    assert watched.check(1200.0) == pytest.approx(0.04)


def test_a_drift_needs_a_start():
    with pytest.raises(ValueError, match="started"):
        sentinel(FakeBoard()).end()


@pytest.mark.parametrize("runtime", ["onnxruntime", "litert", "executorch"])
def test_the_sentinels_run_and_give_finite_answers(runtime):
    pytest.importorskip({"litert": "ai_edge_litert"}.get(runtime, runtime))
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as board:
        with Sentinel(board, runtime, 1, plan=QUICK) as watched:
            watched.start()
            layout = (1, 64, 64, 3) if runtime == "litert" else (1, 3, 64, 64)
            answers = [board.infer(KEY, np.full(layout, x, np.float32)) for x in (0.5, 1.0)]
            assert answers[0].shape == (1, 8)
            assert not np.allclose(answers[0], answers[1])
            assert abs(watched.end()) < 100
        with pytest.raises(DeviceError, match=KEY):
            board.infer(KEY, np.zeros(layout, np.float32))


def test_all_sentinels_are_the_same_net_and_the_script_writes_the_same_onnx_file():
    pytest.importorskip("onnx")
    path = REPO / "scripts" / "make_sentinels.py"
    spec = importlib.util.spec_from_file_location("make_sentinels", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.onnx_file() == sentinel_file("onnxruntime")
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as board:
        board.load("onnx", sentinel_file("onnxruntime"), runtime="onnxruntime", threads=1)
        board.load("tflite", sentinel_file("litert"), runtime="litert", threads=1)
        board.load("pte", sentinel_file("executorch"), runtime="executorch", threads=1)
        ours = board.infer("onnx", x)
        theirs = board.infer("tflite", np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
        third = board.infer("pte", x)
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(ours, third, atol=1e-4)


def test_the_pinned_runtimes_are_those_that_have_a_sentinel():
    assert set(sentinels.SENTINELS) == {"litert", "tflite-runtime", "onnxruntime", "executorch"}
