"""Conversations that outlive their connections."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakeagent import fake_device
from sshd import WEIGHT, Sshd, matmul_file, serve

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.link import session as sessions
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.link.session import allowed_load
from edgeprune.devices.plans import TimingPlan
from edgeprune.errors import DeviceError, LinkLost
from edgeprune.records.device import Device

QUICK = TimingPlan(rounds=4, block_ms=0.5, min_runs=2, max_runs=6, warmup_ms=1)
ORT = {"runtime": "onnxruntime", "threads": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


def agent_pid(board: Board) -> int:
    owner = board.request("who", {})[0]["owner"]
    assert owner is not None
    pid: int = owner["pid"]
    return pid


def test_models_are_back_under_their_keys_after_the_agent_was_killed(server):
    x = np.ones((2, 4), np.float32)
    with open_board("loop", server.device(), backoff_s=(0.05, 0.2)) as board:
        board.load("net", matmul_file(), **ORT)
        board.load_many({"a": matmul_file(), "b": matmul_file(2 * WEIGHT)}, **ORT)
        sent = board.session.bytes_sent
        os.kill(agent_pid(board), signal.SIGKILL)
        np.testing.assert_allclose(board.infer("net", x), x @ WEIGHT, rtol=1e-5)
        np.testing.assert_allclose(board.infer("b", x), 2 * x @ WEIGHT, rtol=1e-5)
        assert board.session.bytes_sent == sent  # the files were still there
        assert len(board.notes) == 1


def test_a_file_that_the_board_has_is_not_sent_again(server):
    content = os.urandom(100_000)
    with open_board("loop", server.device()) as board:
        assert board.push(content) == len(content)
        assert board.push(content) == 0


def test_a_file_that_was_sent_in_part_goes_on_where_it_stopped(server):
    content = os.urandom(300_000)
    with open_board("loop", server.device()) as board:
        fields = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "offset": 0}
        board.request("cache_write", fields, content[:200_000])
        assert board.push(content) == 100_000


def test_a_part_that_is_not_of_this_file_is_written_anew(server):
    content = os.urandom(300_000)
    with open_board("loop", server.device()) as board:
        fields = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "offset": 0}
        board.request("cache_write", fields, b"x" * 200_000)
        assert board.push(content) == len(content)


def test_a_part_that_the_board_lost_on_the_way_is_sent_again(server, monkeypatch):
    content = os.urandom(250_000)
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(sessions, "CHUNK_BYTES", 100_000)
    with open_board("loop", server.device()) as board:
        ask, pieces = board.session.request, 0

        def losing(op: str, *args: Any, **options: Any) -> Any:
            nonlocal pieces
            answer = ask(op, *args, **options)
            pieces += op == "cache_write"
            if pieces == 1 and op == "cache_write":  # another client trimmed the cache
                for part in (server.folder / "work").rglob(f"{sha256}.part"):
                    part.unlink()
            return answer

        monkeypatch.setattr(board.session, "request", losing)
        board.push(content)
        assert board.push(content) == 0
        assert pieces > 3


# Asked for a measurement, the first agent writes it down and dies before it answers, as over a link that breaks.
DIES_AFTER_WORK = """
import os
flag = {flag!r}
done = {{"blocks": {{"net": [{{"round": i, "calls_per_sample": 1, "samples_ns": [1000 + i] * 2}} for i in range(4)]}},
        "before": {{}}, "after": {{}}, "peak_memory_bytes": {{}}, "stop_reason": "rounds", "notes": []}}
def answer(head, request):
    if request["op"] == "time":
        if os.path.exists(flag):
            raise SystemExit("measured twice")
        open(flag, "w").write(request["op_id"])
        raise SystemExit("the link broke")
    if request["op"] == "result":
        assert open(flag).read() == request["op_id"]
        return dict(head, **done), b""
    return dict(head), b""
"""


def test_a_measurement_that_was_finished_is_asked_for_and_not_made_again(tmp_path):
    prelude = DIES_AFTER_WORK.format(flag=str(tmp_path / "flag"))
    device = fake_device(tmp_path, "answer(head, request)", prelude)
    with open_board("fake", device, backoff_s=(0.01,)) as board:
        timing = board.time(["net"], QUICK)
    assert [b.samples_ns[0] for b in timing.blocks["net"]] == [1000, 1001, 1002, 1003]


def test_a_board_that_does_not_come_back_is_given_up_after_the_tries(tmp_path):
    device = fake_device(tmp_path, "sys.exit('gone')")
    with open_board("fake", device, backoff_s=(0.01, 0.01, 0.01)) as board:
        with pytest.raises(LinkLost):
            board.request("status", {})
        assert len(board.notes) == 3


def test_a_restart_of_the_board_is_noticed(tmp_path):
    prelude = f"""
import os
USUAL["hello"]["boot_id"] = "b" if os.path.exists({str(tmp_path / "flag")!r}) else "a"
def answer(head, request):
    if not os.path.exists({str(tmp_path / "flag")!r}):
        open({str(tmp_path / "flag")!r}, "w").close()
        raise SystemExit("power cut")
    return head, b""
"""
    device = fake_device(tmp_path, "answer(head, request)", prelude)
    with open_board("fake", device, backoff_s=(0.01,)) as board:
        board.request("unusual", {})
        assert any("started anew" in note for note in board.notes)


def test_a_refusal_keeps_the_connection(server):
    with open_board("loop", server.device()) as board:
        pid = agent_pid(board)
        with pytest.raises(Refusal):
            board.load("bad", b"no model", **ORT)
        assert agent_pid(board) == pid


def test_a_board_is_free_while_it_rests_and_its_models_are_back_after(server):
    x = np.ones((1, 4), np.float32)
    with open_board("loop", server.device()) as board:
        board.load("net", matmul_file(), **ORT)
        with board.rested():
            open_board("other", server.device()).close()
        np.testing.assert_allclose(board.infer("net", x), x @ WEIGHT, rtol=1e-5)


def test_a_model_that_kills_its_process_costs_neither_the_agent_nor_the_others(tmp_path):
    lease = str(tmp_path / "lease")
    device = Device(transport="local", targets=(), stand_in=True, lease_file=lease)
    with open_board("here", device) as board:
        board.load("good", matmul_file(), **ORT)
        board.load("doomed", matmul_file(), **ORT)
        pid = agent_pid(board)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        with pytest.raises(Refusal, match="signal 9") as caught:
            board.time(["good", "doomed"], QUICK)
        assert caught.value.kind == "crash"
        assert agent_pid(board) == pid
        board.time(["good"], QUICK)


def test_a_command_that_only_looks_needs_no_lease_but_timing_does(tmp_path):
    lease = str(tmp_path / "lease")
    device = Device(transport="local", targets=(), stand_in=True, lease_file=lease)
    with open_board("here", device, exclusive=False) as board:
        board.load("net", matmul_file(), **ORT)
        with pytest.raises(DeviceError, match="does not hold"):
            board.time(["net"], QUICK)


def test_who_lets_others_have_the_cores_is_not_held_up_by_their_load():
    assert [allowed_load(ratio) for ratio in (0.05, 0.3, 0.5)] == [0.3, 0.3, 0.5]
    assert allowed_load(1.0) > 1000
