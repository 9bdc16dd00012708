"""Measurements that share rounds, and what may be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sshd import WEIGHT, matmul_file

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.timing.measure import (
    CHUNK_FILES,
    ModelFile,
    compare,
    measure,
    paired_log_ratios,
    time_kernels,
)
from edgeprune.errors import DeviceError
from edgeprune.progress import Silent
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes
from edgeprune.records.measurement import Block, Measurement, Telemetry
from edgeprune.records.statistics import centre

QUICK = TimingPlan(rounds=4, block_ms=0.2, min_runs=2, max_runs=4, warmup_ms=0.5)
ORT = {"runtime": "onnxruntime", "threads": 1}


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as opened:
        yield opened


def model(name: str, weight: np.ndarray = WEIGHT) -> ModelFile:
    content = matmul_file(weight)
    return ModelFile(name, content, "fp32", sha256_bytes(content))


def measurement(name: str, medians: Sequence[int], at: str = "2026-01-01") -> Measurement:
    blocks = tuple(
        Block(round=i, calls_per_sample=1, samples_ns=(median,)) for i, median in enumerate(medians)
    )
    return Measurement(
        name=name,
        artifact_sha256="0" * 64,
        precision="fp32",
        threads=1,
        load_ns=1,
        first_ns=1,
        blocks=blocks,
        before=Telemetry(),
        after=Telemetry(),
        fingerprint_key="f" * 16,
        stamp="stand-in",
        at=at,
    )


def test_every_model_is_measured_in_every_round(board):
    big = np.ones((256, 256), np.float32)
    found = measure(board, [model("small"), model("big", big)], **ORT, plan=QUICK)
    assert [m.name for m in found] == ["small", "big"]
    assert [set(m.block_medians_ns()) for m in found] == [{0, 1, 2, 3}] * 2
    assert {m.stamp for m in found} == {"stand-in"}
    assert {m.fingerprint_key for m in found} == {board.fingerprint(**ORT).key()}
    assert found[0].artifact_sha256 == model("small").sha256
    assert found[1].median_ms > found[0].median_ms  # 5000 times the work


def test_models_are_forgotten_once_they_are_measured(board):
    measure(board, [model("gone")], **ORT, plan=QUICK)
    with pytest.raises(DeviceError, match="gone"):
        board.infer("gone", np.ones((1, 4), np.float32))


def test_a_file_that_does_not_load_leaves_no_other_behind(board):
    bad = ModelFile("bad", b"no model", "fp32", sha256_bytes(b"no model"))
    with pytest.raises(DeviceError):
        measure(board, [model("first"), bad], **ORT, plan=QUICK)
    with pytest.raises(DeviceError, match="first"):
        board.infer("first", np.ones((1, 4), np.float32))


def test_two_models_of_one_name_cannot_be_measured(board):
    with pytest.raises(ValueError, match="different names"):
        measure(board, [model("same"), model("same")], **ORT, plan=QUICK)


def test_measured_models_can_be_compared(board):
    big = np.ones((256, 256), np.float32)
    small, large = measure(board, [model("small"), model("large", big)], **ORT, plan=QUICK)
    found = compare(small, large)
    assert (found.candidate, found.reference, found.rounds) == ("small", "large", 4)
    assert found.low <= found.ratio <= found.high
    assert found.ratio < 1


def test_a_drift_that_meets_both_models_cancels():
    drift = [1000, 1300, 900, 2000, 1100, 1700, 1000, 1500]
    found = compare(measurement("a", [d // 2 for d in drift]), measurement("b", drift))
    assert (found.ratio, found.low, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("rounds", [3, 8, 12, 18])
def test_the_interval_is_the_signed_rank_interval_of_the_rounds(rounds):
    medians = [1000 + i for i in range(rounds)]
    found = compare(measurement("a", medians), measurement("b", [1000] * rounds))
    expected = centre([math.log(m / 1000) for m in medians])
    assert found.ratio == pytest.approx(math.exp(expected.estimate))
    assert (found.low, found.high) == (math.exp(expected.low), math.exp(expected.high))
    assert found.confidence == expected.coverage
    assert (found.confidence >= 0.99) == (rounds >= 8)


def test_rounds_of_one_load_are_one_value():
    def blocks(medians, loads):
        return [
            Block(round=i, calls_per_sample=1, samples_ns=(ns,), load=load)
            for i, (ns, load) in enumerate(zip(medians, loads, strict=True))
        ]

    loads = [0, 0, 1, 1, 1]
    candidate, reference = blocks([200, 100, 300, 300, 300], loads), blocks([100] * 5, loads)
    expected = [math.log(2) / 2, math.log(3)]
    assert paired_log_ratios(candidate, reference) == pytest.approx(expected)
    once = [0] * 5
    ratios = paired_log_ratios(blocks([200, 100, 300, 300, 300], once), blocks([100] * 5, once))
    assert ratios == pytest.approx([math.log(x) for x in (2, 1, 3, 3, 3)])


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_the_interval_holds_the_ratio_and_swaps_with_the_models(medians):
    reference = [1000] * len(medians)
    one = compare(measurement("a", medians), measurement("b", reference))
    other = compare(measurement("b", reference), measurement("a", medians))
    assert one.low <= one.ratio <= one.high
    assert one.low == pytest.approx(1 / other.high)
    assert one.high == pytest.approx(1 / other.low)


def test_measurements_of_different_calls_cannot_be_compared():
    with pytest.raises(ValueError, match="together"):
        compare(measurement("a", [1], at="2026-01-01"), measurement("b", [1], at="2026-01-02"))


def test_kernels_of_several_chunks_are_all_timed(board):
    content = matmul_file()
    files = {f"kernel-{i}": content for i in range(CHUNK_FILES + 3)}
    times = time_kernels(board, files, **ORT, progress=Silent(), plan=QUICK)
    assert list(times) == list(files)
    assert all(0 < ns < 1e9 for ns in times.values())


def test_a_kernel_that_does_not_load_is_named_and_left_out(board):
    said: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    files = {"good": matmul_file(), "broken": b"no model"}
    times = time_kernels(board, files, **ORT, progress=Listener(), plan=QUICK)
    assert list(times) == ["good"]
    assert len(said) == 1
    assert "broken" in said[0]


def test_kernels_none_of_which_loads_are_an_error(board):
    with pytest.raises(DeviceError, match="broken"):
        time_kernels(board, {"broken": b"no model"}, **ORT, progress=Silent(), plan=QUICK)
    assert time_kernels(board, {}, **ORT, progress=Silent(), plan=QUICK) == {}
