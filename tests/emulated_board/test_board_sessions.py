"""Clients of the emulated board that meet, die or lose their agent: locks, signals and processes of a real arm64 Python under qemu."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from emulated_board import processes
from example_files import ExampleFiles
from sshd import wait_until_gone

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.plans import Timing, TimingPlan
from edgeprune.errors import Busy
from edgeprune.records.device import Device

pytestmark = [pytest.mark.board, pytest.mark.timeout(900)]
LONG = TimingPlan(rounds=20, block_ms=1, min_runs=2, max_runs=2, warmup_ms=1)
CLIENT = """
import sys
from edgeprune.devices.board import open_board
from edgeprune.devices.plans import TimingPlan
from edgeprune.records.device import Device

board = open_board("pi", Device.model_validate_json(sys.argv[1]), job="a long measurement")
board.load("net", open(sys.argv[2], "rb").read(), runtime="litert", threads=1)
print("measuring", flush=True)
board.time(["net"], TimingPlan(rounds=1000, block_ms=1, min_runs=2, max_runs=2, warmup_ms=1))
"""


def load_net(board: Board, files: ExampleFiles) -> None:
    content = files.path("tflite", "int8").read_bytes()
    board.load("net", content, runtime="litert", threads=1)


@contextmanager
def measuring(board: Board) -> Iterator[list[Timing]]:
    """A timing in a thread of its own, in the middle of which the block starts; its result is in the list after the block."""
    found: list[Timing] = []
    thread = threading.Thread(target=lambda: found.append(board.time(["net"], LONG)))
    thread.start()
    time.sleep(2)  # longer than the request takes to arrive, and far shorter than it takes
    assert thread.is_alive()
    yield found
    thread.join(300)
    assert not thread.is_alive()


def take_lease(board: Board, seconds: float) -> None:
    """Take the lease, which must become free within ``seconds``: no time limit of an agent has to run out for that."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            board.request("lease", {})
            return
        except Refusal as error:
            if error.kind != "busy" or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def agent_of(worker: int) -> int:
    """The process that started a worker."""
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_second_client_is_told_who_holds_the_board_and_gets_it_once_it_is_free(arm64_board):
    with open_board("pi", arm64_board, job="profile for rpi4") as first:
        assert first.request("status", {})[0]["lease_file"] == "/run/lock/edgeprune.lock"
        with pytest.raises(Busy, match=r"is held by \S+@\S+ .*profile for rpi4") as caught:
            open_board("pi", arm64_board)
        assert caught.value.exit_code == 75
        waiting: list[Board] = []
        second = threading.Thread(
            target=lambda: waiting.append(open_board("pi", arm64_board, wait_s=60))
        )
        second.start()
        time.sleep(1)
        assert not waiting
    second.join(60)
    (board,) = waiting
    assert board.request("status", {})[0]["mine"] is True
    board.close()


def test_an_agent_killed_within_a_request_frees_the_board_and_its_session_goes_on(
    arm64_board, files
):
    patient = (8.0, 8.0)
    with open_board("pi", arm64_board, backoff_s=patient) as first:
        load_net(first, files)
        (worker,) = processes("worker")
        with measuring(first) as found, open_board("pi", arm64_board, exclusive=False) as other:
            os.kill(agent_of(worker), signal.SIGKILL)
            take_lease(other, 3)
            wait_until_gone(worker, 3)  # the kernel ends it with its parent
            assert other.request("status", {})[0]["mine"] is True
        (timing,) = found
        assert len(timing.blocks["net"]) >= LONG.rounds
        assert any("trying again" in note for note in first.notes)
        assert first.request("status", {})[0]["mine"] is True


def test_a_client_killed_within_a_request_frees_the_board(arm64_board: Device, files):
    argv = [sys.executable, "-c", CLIENT, arm64_board.model_dump_json()]
    client = subprocess.Popen(
        [*argv, str(files.path("tflite", "int8"))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "measuring\n"
        (worker,) = processes("worker")
        with open_board("pi", arm64_board, exclusive=False) as other:
            owner = other.request("who", {})[0]["owner"]
            assert owner["job"] == "a long measurement"
            client.kill()
            take_lease(other, 6)
            wait_until_gone(worker, 3)
    finally:
        client.kill()
        client.communicate()


def test_a_holder_of_the_same_user_can_be_ended_from_another_connection(arm64_board):
    with open_board("pi", arm64_board, job="forgotten") as holder:
        with open_board("pi", arm64_board, exclusive=False) as other:
            reply, _ = other.request("break", {})
            assert reply["owner"]["job"] == "forgotten"
            assert reply["ended"] is True
            assert other.request("who", {})[0]["owner"] is None
        assert holder.request("status", {})[0]["mine"] is True  # it came back when it was asked
