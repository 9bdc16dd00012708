"""The agent and the host's end of it: real runtimes on this machine, and boards that lie."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakeagent import LOADED, ORT, QUICK, fake_device
from hypothesis import given
from hypothesis import strategies as st
from sshd import WEIGHT, matmul_file, script, serve, wait_until_gone

from edgeprune.devices.agent import runtimes
from edgeprune.devices.agent.samples import realistic
from edgeprune.devices.board import Board, judged, open_board
from edgeprune.devices.link.agent_file import AGENT_FOLDER, agent_bytes
from edgeprune.devices.link.frames import Frames, Refusal, clean
from edgeprune.devices.link.transports import open_transport
from edgeprune.devices.plans import KERNEL, Timing, TimingPlan
from edgeprune.errors import DeadlineExceeded, DeviceError, LinkLost
from edgeprune.records.device import Device
from edgeprune.records.measurement import Block, Telemetry


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as opened:
        yield opened


def inputs(n: int = 5) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 4)).astype(np.float32)


def test_the_fingerprint_says_what_and_where_and_that_it_is_a_stand_in(board):
    found = board.fingerprint("onnxruntime", 2)
    assert (found.device, found.transport, found.threads) == ("here", "local", 2)
    assert found.stamp == "stand-in"
    assert found.machine == os.uname().machine
    assert found.page_size_bytes == os.sysconf("SC_PAGE_SIZE")
    assert list(found.cpu_flags) == sorted(found.cpu_flags)
    assert f'"{os.uname().nodename}"' not in found.model_dump_json()


def test_a_device_that_is_no_stand_in_is_stamped_measured():
    with open_board("here", Device(transport="local", targets=()), exclusive=False) as opened:
        assert opened.fingerprint("onnxruntime", 1).stamp == "measured"


def test_core_ml_times_are_never_those_of_a_phone():
    with open_board("mac", Device(transport="local", targets=()), exclusive=False) as opened:
        opened._versions["coreml"] = "9.0"  # as a Mac would answer
        assert opened.fingerprint("coreml", 1).stamp == "stand-in"


def test_a_loaded_model_computes_what_numpy_computes(board):
    loaded = board.load("net", matmul_file(), **ORT)
    assert [(t.name, t.shape, t.dtype) for t in loaded.inputs] == [("x", (1, 4), "float32")]
    assert [t.shape for t in loaded.outputs] == [(1, 3)]
    assert loaded.load_ns > 0
    assert loaded.first_ns > 0
    outputs = board.infer("net", inputs())
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, inputs() @ WEIGHT, rtol=1e-5, atol=1e-6)


def test_models_are_timed_in_the_same_rounds(board):
    board.load("one", matmul_file(), **ORT)
    board.load("two", matmul_file(), **ORT)
    timing = board.time(["one", "two"], QUICK)
    assert set(timing.blocks) == {"one", "two"}
    for blocks in timing.blocks.values():
        assert [block.round for block in blocks] == [0, 1, 2, 3]
        assert all(2 <= len(block.samples_ns) <= 6 for block in blocks)
        assert all(block.calls_per_sample > 1 for block in blocks)  # microseconds a call
    assert timing.before.load_1min is not None


def test_one_file_among_many_that_does_not_load_is_reported_by_its_key(board):
    loaded = board.load_many({"good": matmul_file(), "bad": b"no model"}, **ORT)
    assert loaded["good"].key == "good"
    assert isinstance(loaded["bad"], str)
    assert list(loaded) == ["good", "bad"]
    board.time(["good"], QUICK)


def test_a_file_that_is_no_model_is_refused_as_such(board):
    with pytest.raises(Refusal) as caught:
        board.load("bad", b"no model", **ORT)
    assert caught.value.kind == "load"


def test_an_unloaded_model_is_gone(board):
    board.load("gone", matmul_file(), **ORT)
    board.unload(["gone", "never-there"])
    with pytest.raises(Refusal, match="gone"):
        board.infer("gone", inputs())


@pytest.mark.parametrize(
    "x",
    [
        np.full((2, 4), np.nan, np.float32),
        np.full((2, 4), np.inf, np.float32),
        np.zeros((2, 5), np.float32),
        np.zeros((0, 4), np.float32),
    ],
    ids=["nan", "inf", "another shape", "none"],
)
def test_inputs_that_are_not_finite_or_do_not_fit_are_refused(board, x):
    board.load("net", matmul_file(), **ORT)
    with pytest.raises(Refusal) as caught:
        board.infer("net", x)
    assert caught.value.kind == "input"


def test_the_profiler_of_the_runtime_names_every_node(board):
    board.load("net", matmul_file(), **ORT)
    nodes = board.profile("net", 5)
    assert nodes is not None
    assert [(node.name, node.op) for node in nodes] == [("product", "MatMul")]
    assert nodes[0].provider == "CPUExecutionProvider"


def test_a_runtime_that_is_not_installed_says_how_to_get_it(board):
    with pytest.raises(DeviceError, match="pip install tflite-runtime"):
        board.fingerprint("tflite-runtime", 1)


def test_a_plan_of_too_many_samples_is_refused_before_it_runs(board):
    board.load("net", matmul_file(), **ORT)
    plan = TimingPlan(rounds=1000, block_ms=1, min_runs=1, max_runs=1000, warmup_ms=1)
    with pytest.raises(DeviceError, match="max_runs"):
        board.time(["net"], plan)


def test_a_board_over_ssh_answers_like_this_machine(board, tmp_path):
    board.load("net", matmul_file(), **ORT)
    with serve(tmp_path) as server, open_board("loop", server.device()) as remote:
        remote.load("net", matmul_file(), **ORT)
        np.testing.assert_array_equal(remote.infer("net", inputs()), board.infer("net", inputs()))
        assert len(remote.time(["net"], KERNEL).blocks["net"]) == KERNEL.rounds
        assert remote.fingerprint("onnxruntime", 1).transport == "ssh"


@pytest.fixture(scope="module")
def conv_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A converted convolution, an input for it in the file's layout, and what torch computes."""
    litert_torch = pytest.importorskip("litert_torch")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 4, 3, padding=1).eval()
    path = tmp_path_factory.mktemp("tflite") / "conv.tflite"
    x = torch.randn(2, 3, 8, 8)
    litert_torch.convert(module, (x[:1],)).export(str(path))
    return path.read_bytes(), x.numpy(), module(x).detach().numpy()


@pytest.mark.parametrize("delegate", [True, False], ids=["delegate", "built-in kernels"])
def test_a_tflite_file_computes_what_torch_computes(board, conv_file, delegate):
    content, x, expected = conv_file
    loaded = board.load("conv", content, runtime="litert", threads=1, delegate=delegate)
    assert loaded.inputs[0].shape == (1, *x.shape[1:])
    assert loaded.inputs[0].scale is None
    np.testing.assert_allclose(board.infer("conv", x), expected, rtol=1e-4, atol=1e-5)
    assert len(board.time(["conv"], QUICK).blocks["conv"]) == QUICK.rounds
    assert board.profile("conv", 3) is None


@given(
    scale=st.floats(1e-3, 10),
    zero_point=st.integers(-128, 127),
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
)
def test_quantised_values_come_back_within_half_a_step_or_at_the_end_of_the_range(
    scale, zero_point, values
):
    spec = {"dtype": "int8", "scale": scale, "zero_point": zero_point}
    x = np.asarray(values, np.float32)
    q = runtimes.quantised(x, spec)
    assert q.dtype == np.int8
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    expected = np.clip(x, low, high)
    error = np.abs(runtimes.dequantised(q, spec) - expected)
    assert (error <= scale * 0.5001 + 1e-4).all()


def test_random_inputs_are_seeded_fill_their_range_and_are_never_all_zero():
    for dtype in ("float32", "int8", "uint8", "int64", "bool"):
        spec = {"shape": [2000], "dtype": dtype}
        x = realistic(spec, 3)
        assert x.dtype == np.dtype(dtype)
        assert x.any()
        np.testing.assert_array_equal(x, realistic(spec, 3))
    assert {-128, 127} <= set(realistic({"shape": [5000], "dtype": "int8"}, 0))


# Boards that end, hang or lie


def test_a_truthful_fake_is_believed(tmp_path):
    device = fake_device(tmp_path, f"({{**head, **{LOADED!r}}}, b'')")
    with open_board("fake", device) as opened:
        assert opened.load("net", b"", **ORT).first_ns == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"load_ns": -5},
        {"load_ns": 0},
        {"load_ns": 3600 * 10**9},
        {"load_ns": 1.5},
        {"load_ns": float("nan")},
        {"load_ns": float("inf")},
        {"load_ns": "1000"},
        {"load_ns": None},
        {"inputs": []},
        {"inputs": [{"name": "x", "shape": [0], "dtype": "float32"}]},
        {"inputs": [{"name": "x", "shape": [1], "dtype": "../../x"}]},
        {"inputs": [{"name": "x", "shape": [1], "dtype": "int8", "scale": -1.0}]},
        {"more": 1},
    ],
    ids=json.dumps,
)
def test_implausible_facts_about_a_model_are_refused(tmp_path, change):
    answer = json.dumps(LOADED | change)
    code = f"({{**head, **json.loads({answer!r})}}, b'')"
    with (
        open_board("fake", fake_device(tmp_path, code)) as opened,
        pytest.raises(DeviceError, match="sent"),
    ):
        opened.load("net", b"", **ORT)


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ("{'net': []}", "rounds"),
        ("{'other': []}", "other models"),
        ("{'net': [dict(good, round=i) for i in (0, 2, 1, 3)]}", "rounds"),
        ("{'net': [dict(good, round=i, samples_ns=[1] * 100) for i in range(4)]}", "100 samples"),
        ("{'net': [dict(good, round=i, samples_ns=[10**11] * 2) for i in range(4)]}", "longer"),
        ("{'net': [dict(good, round=i, calls_per_sample=0) for i in range(4)]}", "calls_per"),
    ],
)
def test_implausible_times_are_refused(tmp_path, blocks, why):
    good = {"calls_per_sample": 1, "samples_ns": [1000, 1000]}
    code = f"(dict(head, blocks={blocks}, before={{}}, after={{}}, peak_memory_bytes={{}},"
    code += " stop_reason='rounds', notes=[]), b'')"
    device = fake_device(tmp_path, code, prelude=f"good = {good!r}")
    with open_board("fake", device) as opened, pytest.raises(DeviceError, match=why):
        opened.time(["net"], QUICK)


@pytest.mark.parametrize(
    "reply",
    [
        "(b'not json', b'')",
        "(b'[' * 100_000, b'')",
        "(b'[1]', b'')",
        "({'id': request['id']}, b'')",
        "({'id': request['id'] + 1, 'ok': True}, b'')",
        "({'id': request['id'], 'ok': 'yes'}, b'')",
        "(b'x' * (5 << 20), b'')",
    ],
)
def test_what_is_not_a_reply_is_refused_and_nothing_more_is_read(tmp_path, reply):
    with open_board("fake", fake_device(tmp_path, reply)) as opened:
        with pytest.raises(DeviceError, match="something wrong"):
            opened.request("status", {})
        assert opened.hello()["cores"] == 4  # the next request starts afresh


@pytest.mark.parametrize(
    "array",
    [
        "[[1.0, float('nan')]] * 2",
        "[[1.0]] * 3",
        "np.float64([[1.0]] * 2)",
        "np.array([[{}]] * 2, dtype=object)",
    ],
    ids=["nan", "count", "type", "pickle"],
)
def test_outputs_that_are_not_finite_float32_of_the_right_count_are_refused(tmp_path, array):
    values = array if "np." in array else f"np.float32({array})"
    prelude = f"import io, numpy as np; b = io.BytesIO(); np.save(b, {values}, allow_pickle=True)"
    device = fake_device(tmp_path, "(head, b.getvalue())", prelude)
    with open_board("fake", device) as opened, pytest.raises(DeviceError, match="outputs"):
        opened.infer("net", np.zeros((2, 4), np.float32))


def test_text_from_a_board_cannot_steer_the_terminal(tmp_path):
    error = "bad\x1b[2J\x1b]0;owned\x07\r\nline \u202e\x9b1m end"
    code = f"({{'id': request['id'], 'ok': False, 'kind': 'load', 'error': {error!r}}}, b'')"
    with (
        open_board("fake", fake_device(tmp_path, code)) as opened,
        pytest.raises(Refusal) as caught,
    ):
        opened.load("net", b"", **ORT)
    assert str(caught.value).isprintable()
    assert "bad" in str(caught.value)


@given(st.text())
def test_cleaned_text_has_one_printable_line(text):
    assert "\n" not in clean(text)
    assert "\x1b" not in clean(text)
    assert clean(clean(text)) == clean(text)


def test_a_flood_before_the_magic_line_is_refused(tmp_path):
    device = fake_device(tmp_path, "(head, b'')", prelude="out.write(b'x' * 200_000)")
    with pytest.raises(DeviceError, match="printed more than"):
        open_board("fake", device)


def test_a_banner_before_the_magic_line_is_skipped(tmp_path):
    prelude = "out.write(b'Welcome!\\n' * 1000)"
    device = fake_device(tmp_path, f"({{**head, **{LOADED!r}}}, b'')", prelude)
    with open_board("fake", device) as opened:
        assert opened.load("net", b"", **ORT).load_ns == 1000


def test_an_agent_that_dies_leaves_its_last_words(tmp_path):
    device = fake_device(tmp_path, "sys.exit('out of memory, sorry')")
    with (
        open_board("fake", device, backoff_s=(0.01,)) as opened,
        pytest.raises(LinkLost, match="out of memory, sorry"),
    ):
        opened.request("status", {})
    assert len(opened.notes) == 1


def test_an_agent_that_never_answers_is_given_up(tmp_path):
    device = fake_device(tmp_path, "time.sleep(60)")
    frames = Frames(open_transport(device).start([device.python]), "fake")
    frames.handshake(20)
    with pytest.raises(DeadlineExceeded, match="status"):
        frames.request("status", {}, work_s=0.2)


@pytest.fixture
def pid_device(tmp_path: Path) -> tuple[Device, Path]:
    """This machine, with an agent and workers that leave their process ids in a file, one a line."""
    text = f'#!/bin/sh\necho $$ >>{tmp_path}/pid\nexec {sys.executable} "$@"\n'
    path = script(tmp_path / "python-here", text)
    lease = str(tmp_path / "lease")
    facts = {"transport": "local", "targets": (), "stand_in": True, "lease_file": lease}
    return Device(**facts, python=path), tmp_path / "pid"


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


def test_an_agent_that_is_killed_is_started_again_and_the_measurement_made(pid_device):
    device, pid_file = pid_device
    with open_board("here", device, backoff_s=(0.05,)) as opened:
        opened.load("net", matmul_file(), **ORT)
        os.kill(pids(pid_file)[0], signal.SIGKILL)
        assert len(opened.time(["net"], QUICK).blocks["net"]) == QUICK.rounds
        assert "the link broke" in opened.notes[0]


def test_every_model_has_a_process_that_ends_with_its_agent(pid_device):
    device, pid_file = pid_device
    with open_board("here", device) as opened:
        opened.load("one", matmul_file(), **ORT)
        opened.load("two", matmul_file(), **ORT)
        agent, *_ = found = pids(pid_file)
        workers = [pid for pid in found if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 0  # workers run this interpreter directly
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        assert len(children) == 2
        os.kill(agent, signal.SIGKILL)
        for child in children:
            wait_until_gone(int(child))


def test_closing_a_board_ends_its_agent(pid_device):
    device, pid_file = pid_device
    open_board("here", device).close()
    wait_until_gone(pids(pid_file)[0])


@pytest.mark.parametrize("path", sorted(AGENT_FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_the_agent_is_written_in_the_python_of_old_boards(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_the_agent_is_the_same_file_every_time_and_holds_its_modules_alone():
    packed = agent_bytes()
    agent_bytes.cache_clear()
    assert agent_bytes() == packed
    names = zipfile.ZipFile(io.BytesIO(packed)).namelist()
    assert names[0] == "__main__.py"
    assert set(names[1:]) == {f"edgeprune_agent/{p.name}" for p in AGENT_FOLDER.glob("*.py")}


def test_the_agent_runs_where_nothing_but_python_is_installed(tmp_path):
    bare = shutil.which("python3", path="/usr/bin:/bin")
    if bare is None:
        pytest.skip("this system has no Python of its own")
    with open_board(
        "bare", Device(transport="local", targets=(), python=bare), exclusive=False
    ) as opened:
        assert opened.hello()["cores"] == os.cpu_count()
        with pytest.raises(DeviceError, match="pip install ai-edge-litert"):
            opened.runtime_version("litert")


def test_of_equally_frequent_disturbances_the_first_is_named():
    # The order of a set of texts is another one in every process: a replay would tell another reason than the run that it replays.
    for i in range(50):
        reasons = (f"b{i}", f"a{i}", None)
        blocks = tuple(
            Block(round=n, calls_per_sample=1, samples_ns=(10,), rejected=r)
            for n, r in enumerate(reasons)
        )
        found = judged(Timing({"m": blocks}, Telemetry(), Telemetry()))
        assert found.unreliable == (
            f"2 of 3 blocks that were timed together were disturbed, most by: b{i};"
            " too many to leave out, so all of them count"
        )
        assert [b.rejected for b in found.blocks["m"]] == [None] * 3
