"""Failures under a session that measures: a real agent behind a real sshd and a proxy, and what the measurement is worth afterwards."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakeagent import fake_device
from faultproxy import FaultProxy
from small_disk import mounted
from sshd import WEIGHT, Sshd, matmul_file, serve

from edgeprune.devices.board import Board, Timing, TimingPlan, open_board
from edgeprune.devices.link import frames, session
from edgeprune.devices.link.frames import Refusal
from edgeprune.records.device import Device

# Two seconds and more, so that a fault after half a second meets the middle of it.
LONG = TimingPlan(rounds=24, block_ms=100, min_runs=2, max_runs=1000, warmup_ms=1)
QUICK = TimingPlan(rounds=4, block_ms=0.5, min_runs=2, max_runs=6, warmup_ms=1)
ORT = {"runtime": "onnxruntime", "threads": 1}
BACKOFF_S = (0.1, 0.3, 1.0, 2.0)
QUIET_S = 6.0  # instead of 15 s: the agent says every 2.5 s that it lives
X = np.ones((2, 4), np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def proxy(server: Sshd) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as running:
        yield running


def agent_pid(board: Board) -> int:
    owner = board.request("who", {})[0]["owner"]
    assert owner is not None
    pid: int = owner["pid"]
    return pid


def worker_pids(board: Board) -> list[int]:
    """Processes of the loaded models, in the order of loading."""
    agent = agent_pid(board)
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text()
    return [int(pid) for pid in children.split()]


def timed_with(board: Board, fault: Callable[[], object], plan: TimingPlan = LONG) -> Timing:
    """A measurement of ``net`` in whose middle the fault happens."""
    timer = threading.Timer(0.5, fault)
    timer.start()
    try:
        return board.time(["net"], plan)
    finally:
        timer.cancel()


def check_complete(board: Board, timing: Timing) -> None:
    """Every round is there once, and the board computes what numpy computes."""
    rounds = [block.round for block in timing.blocks["net"]]
    assert rounds == list(range(len(rounds)))
    assert len(rounds) >= LONG.rounds
    np.testing.assert_allclose(board.infer("net", X), X @ WEIGHT, rtol=1e-5)


def test_a_reset_within_a_measurement_costs_one_reconnect_and_no_byte_twice(server, proxy):
    with open_board("loop", server.device(port=proxy.port), backoff_s=BACKOFF_S) as board:
        board.load("net", matmul_file(), **ORT)
        sent, before = board.session.bytes_sent, agent_pid(board)
        timing = timed_with(board, proxy.reset)
        check_complete(board, timing)
        assert len(board.notes) == 1
        assert agent_pid(board) != before
        assert board.session.bytes_sent == sent


@pytest.mark.slow
def test_a_black_hole_within_a_measurement_is_noticed_and_survived(server, proxy, monkeypatch):
    monkeypatch.setattr(frames, "SILENCE_S", QUIET_S)
    device = server.device(port=proxy.port)
    said: list[str] = []

    def noticed(line: str) -> None:
        said.append(line)
        proxy.heal()

    with open_board("loop", device, say=noticed, backoff_s=BACKOFF_S) as board:
        board.load("net", matmul_file(), **ORT)
        plan = TimingPlan(rounds=24, block_ms=500, min_runs=2, max_runs=3000, warmup_ms=1)
        timing = timed_with(board, proxy.hole, plan)
        assert said
        check_complete(board, timing)


def test_behind_a_black_hole_the_board_is_free_for_others_when_the_lease_ends(server, proxy):
    device = server.device(port=proxy.port, lease_ttl_s=3)
    first = open_board("loop", device, say=lambda _: proxy.heal(), backoff_s=BACKOFF_S)
    first.load("net", matmul_file(), **ORT)
    proxy.hole()
    start = time.monotonic()
    open_board("other", server.device(), wait_s=20).close()
    assert time.monotonic() - start < 3 + 6
    proxy.heal()
    with first:
        np.testing.assert_allclose(first.infer("net", X), X @ WEIGHT, rtol=1e-5)
        assert first.notes


def test_a_quiet_client_keeps_even_a_short_lease(server):
    with open_board("loop", server.device(lease_ttl_s=2), backoff_s=()) as board:
        before = agent_pid(board)
        time.sleep(4.5)
        assert agent_pid(board) == before


# Both ways are flipped in the tests of links; here it is what comes after.
@pytest.mark.parametrize("way", [pytest.param("up", marks=pytest.mark.slow), "down"])
def test_a_flipped_bit_within_a_measurement_costs_a_reconnect_and_nothing_else(
    server, proxy, monkeypatch, way
):
    monkeypatch.setattr(frames, "SILENCE_S", QUIET_S)
    device = server.device(port=proxy.port, lease_ttl_s=3)  # a beat every second goes up
    with open_board("loop", device, backoff_s=BACKOFF_S) as board:
        board.load("net", matmul_file(), **ORT)
        timing = timed_with(board, lambda: proxy.flip(20, way))
        check_complete(board, timing)
        assert board.notes


def test_a_model_that_hangs_is_ended_in_time_and_the_others_live_on(server, monkeypatch):
    monkeypatch.setattr(session, "PATIENCE_S", 1.0)
    with open_board("loop", server.device()) as board:
        board.load("good", matmul_file(), **ORT)
        board.load("net", matmul_file(), **ORT)
        agent, stuck = agent_pid(board), worker_pids(board)[1]
        start = time.monotonic()
        with pytest.raises(Refusal, match="did not answer in time") as caught:
            timed_with(board, lambda: os.kill(stuck, signal.SIGSTOP))
        assert caught.value.kind == "timeout"
        assert time.monotonic() - start < 10
        assert not Path(f"/proc/{stuck}").exists()
        board.time(["good"], QUICK)
        assert agent_pid(board) == agent


@pytest.mark.slow
def test_an_agent_that_hangs_is_replaced_by_one_of_the_same_session(server, monkeypatch):
    monkeypatch.setattr(frames, "SILENCE_S", QUIET_S)
    with open_board("loop", server.device(), backoff_s=BACKOFF_S) as board:
        board.load("net", matmul_file(), **ORT)
        stuck = agent_pid(board)
        try:
            check_complete(board, timed_with(board, lambda: os.kill(stuck, signal.SIGSTOP)))
            assert agent_pid(board) != stuck
            assert "silent" in board.notes[0]
        finally:
            if Path(f"/proc/{stuck}").exists():
                os.kill(stuck, signal.SIGKILL)


POWER_CUT = """
import os
flag = {flag!r}
USUAL["hello"]["boot_id"] = "b" if os.path.exists(flag) else "a"
done = {{"blocks": {{"net": [{{"round": i, "calls_per_sample": 1, "samples_ns": [1000 + i] * 2}} for i in range(4)]}},
        "before": {{}}, "after": {{}}, "peak_memory_bytes": {{}}, "stop_reason": "rounds", "notes": []}}
def answer(head, request):
    if request["op"] == "result":
        return dict(id=head["id"], ok=False, kind="missing", error="that operation was not finished"), b""
    if not os.path.exists(flag):
        open(flag, "w").close()
        raise SystemExit("power cut")
    return dict(head, **done), b""
"""


def test_a_measurement_that_a_power_cut_ended_is_made_again_once_and_noted(tmp_path):
    prelude = POWER_CUT.format(flag=str(tmp_path / "flag"))
    device = fake_device(tmp_path, "answer(head, request)", prelude)
    with open_board("fake", device, backoff_s=BACKOFF_S) as board:
        timing = board.time(["net"], QUICK)
        assert [b.samples_ns[0] for b in timing.blocks["net"]] == [1000, 1001, 1002, 1003]
        assert len(board.notes) == 2
        assert "started anew" in board.notes[1]


def test_a_disk_that_fills_up_on_the_board_costs_no_result(server, tmp_path):
    with mounted(tmp_path / "disk", "size=4m,mode=700") as disk:
        device = server.device(workdir=str(disk), min_free_bytes=0)
        with open_board("loop", device) as board:
            board.load("net", matmul_file(), **ORT)
            with pytest.raises(OSError, match="No space"):
                (disk / "fill").write_bytes(b"x" * (8 << 20))
            check_complete(board, board.time(["net"], LONG))
            assert sum(path.stat().st_size for path in disk.glob("journal/*")) == 0


def test_a_model_that_gets_no_memory_costs_neither_the_agent_nor_the_others(server):
    with open_board("loop", server.device()) as board:
        board.load("good", matmul_file(), **ORT)
        board.load("greedy", matmul_file(), **ORT)
        agent, greedy = agent_pid(board), worker_pids(board)[1]
        pages = int(Path(f"/proc/{greedy}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (8 << 20)
        resource.prlimit(greedy, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(Refusal) as caught:
            board.infer("greedy", np.ones((4_000_000, 4), np.float32))
        assert caught.value.kind in ("memory", "crash")
        np.testing.assert_allclose(board.infer("good", X), X @ WEIGHT, rtol=1e-5)
        assert agent_pid(board) == agent


CLIENT = """
import signal, sys, time
import numpy as np
from edgeprune.cli import main as cli
from edgeprune.devices.board import TimingPlan, open_board
from edgeprune.records.device import Device

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

@cli.cli.command("hold")
def hold():
    device = Device.model_validate_json({device!r})
    with open_board("loop", device, backoff_s=(0.1, 0.3, 1.0, 2.0)) as board:
        board.load("net", open({file!r}, "rb").read(), runtime="onnxruntime", threads=1)
        print("held", flush=True)
        sys.stdin.readline()
        timing = board.time(["net"], TimingPlan(4, 0.5, 2, 6, 1))
        print("timed", len(timing.blocks["net"]), len(board.notes), flush=True)

cli.main(["hold"])
"""


@pytest.fixture
def holder(server: Sshd, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own that holds the board, with two seconds of lease, until it reads a line."""
    (tmp_path / "net.onnx").write_bytes(matmul_file())
    device = server.device(lease_ttl_s=2).model_dump_json()
    program = CLIENT.format(device=device, file=str(tmp_path / "net.onnx"))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_host_that_slept_lost_the_board_and_goes_on_when_it_wakes(server, holder):
    holder.send_signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        open_board("other", server.device(), wait_s=20).close()
        assert time.monotonic() - start < 2 + 6
    finally:
        holder.send_signal(signal.SIGCONT)
    said, errors = holder.communicate("\n", timeout=60)
    assert holder.returncode == 0, errors
    assert said.split()[:2] == ["timed", "4"]
    assert int(said.split()[2]) >= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_interrupted_frees_the_board(server, holder, number, code):
    holder.send_signal(number)
    assert holder.wait(10) == code
    ended = time.monotonic()
    with open_board("other", server.device(), exclusive=False) as looking:
        while looking.request("who", {})[0]["owner"] is not None:
            assert time.monotonic() - ended < 4
            time.sleep(0.05)


def random_file() -> bytes:
    """An ONNX file that adds another noise to ``x @ w`` in every run."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(matmul_file())
    graph = model.graph
    graph.node[0].output[0] = "product"
    noise = onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[1, WEIGHT.shape[1]])
    graph.node.extend([noise, onnx.helper.make_node("Add", ["product", "noise"], ["y"])])
    content: bytes = model.SerializeToString()
    return content


def test_a_model_whose_outputs_differ_from_call_to_call_is_refused_as_such(server):
    with open_board("loop", server.device()) as board:
        board.load("net", random_file(), **ORT)
        with pytest.raises(Refusal, match="other outputs") as caught:
            board.time(["net"], QUICK)
        assert caught.value.kind == "nondeterministic"
        board.load("net", matmul_file(), **ORT)
        board.time(["net"], QUICK)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_workdir_that_others_can_write_is_refused_before_anything_in_it_runs(
    server, tmp_path, mode
):
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(mode)
    with pytest.raises(Refusal, match="written by other users") as caught:
        open_board("loop", server.device(workdir=str(work)))
    assert caught.value.kind == "workdir"
    assert list(work.iterdir()) == []
    work.chmod(0o755)
    open_board("loop", server.device(workdir=str(work))).close()


def test_a_workdir_of_another_user_is_refused_also_behind_a_link(server, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    work, link = tmp_path / "work", tmp_path / "link"
    work.mkdir(mode=0o700)
    os.chown(work, 12345, 12345)
    link.symlink_to(work)
    for path in (work, link):
        with pytest.raises(Refusal, match="belongs to user 12345"):
            open_board("loop", server.device(workdir=str(path)))
    assert list(work.iterdir()) == []


def test_a_missing_workdir_is_made_for_its_owner_alone(tmp_path):
    work = tmp_path / "new" / "work"
    device = Device(transport="local", targets=(), stand_in=True, workdir=str(work))
    open_board("here", device).close()
    assert work.stat().st_mode & 0o077 == 0
