"""Real models on this machine's agent: loaded anew, on one processor, and with sums that do not saturate."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sshd import WEIGHT, matmul_file

from edgeprune.devices.agent import worker as worker_module
from edgeprune.devices.agent.wire import Refused
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import TimingPlan
from edgeprune.records.device import Device

QUICK = TimingPlan(rounds=4, block_ms=0.5, min_runs=2, max_runs=6, warmup_ms=1)
ORT = {"runtime": "onnxruntime", "threads": 1}
X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as opened:
        yield opened


def test_models_are_loaded_anew_when_that_is_asked_for(board):
    board.load("one", matmul_file(), **ORT)
    board.load("two", matmul_file(), **ORT)
    plan = dataclasses.replace(QUICK, block_ms=100, max_runs=5000, reload=True)
    timing = board.time(["one", "two"], plan)
    one, two = ([block.load for block in timing.blocks[key]] for key in ("one", "two"))
    assert one == two == sorted(one)
    # How often exactly is shown in test_agent_timing, on a clock of its own: here another program may make a load long.
    assert one[0] == 0
    assert one[-1] >= 1
    assert {block.load for block in board.time(["one"], QUICK).blocks["one"]} == {0}
    np.testing.assert_allclose(board.infer("two", X), X @ WEIGHT, rtol=1e-5)


def test_a_model_that_does_not_load_again_is_gone():
    worker = worker_module.Worker()
    content = matmul_file()
    request = {"keys": ["net"], "sizes": [len(content)], "runtime": "onnxruntime"}
    worker.load({**request, "threads": 1, "delegate": True}, content)
    plan = {"warmup_runs": 1, "warmup_ns": 0, "settle": False, "reload": True}
    worker.warm(
        {"keys": ["net"], "plan": {**plan, "block_ns": 1, "min_runs": 1, "max_runs": 1}}, b""
    )
    worker.files["net"] = b"no model", ("onnxruntime", 1, True)
    with pytest.raises(Refused) as caught:
        worker.reload({"keys": ["net"]}, b"")
    assert caught.value.kind == "load"
    assert "net" not in worker.models


def test_models_with_as_many_threads_share_their_processors(board):
    for key in ("one", "two"):
        board.load(key, matmul_file(), **ORT)
    workers = [pid for pid in children_of(os.getpid()) if b"worker" in command(pid)]
    assert len(workers) >= 2
    assert len({tuple(sorted(os.sched_getaffinity(pid))) for pid in workers}) == 1
    assert len(os.sched_getaffinity(workers[0])) == 1


def children_of(pid: int) -> list[int]:
    """Processes below one."""
    found = []
    for text in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, text.read_text().split()):
            found += [child, *children_of(child)]
    return found


def command(pid: int) -> bytes:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def quantised_sum() -> bytes:
    """A QDQ file whose exact answer is 64: the largest inputs and weights there are, which 16 bits cannot add."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    values = {
        "step": np.float32(1 / 255), "zero": np.uint8(0), "weight": np.full((64, 8), 127, np.int8), "weight_step": np.float32(1 / 127),
        "weight_zero": np.int8(0), "out_step": np.float32(0.5),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_step", "weight_zero"], ["w"]),
        helper.make_node("MatMul", ["d", "w"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "out_step", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "out_step", "zero"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, kinds.FLOAT, [1, n])
        for name, n in (("x", 64), ("y", 8))
    ]
    weights = [numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()]
    graph = helper.make_graph(nodes, "sum", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 13)]
    content: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return content


def test_sums_of_eight_bit_products_do_not_saturate(board):
    board.load("sum", quantised_sum(), **ORT)
    np.testing.assert_allclose(board.infer("sum", np.ones((1, 64), np.float32)), 64.0)
