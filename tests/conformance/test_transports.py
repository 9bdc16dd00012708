"""Every transport keeps the promises of :mod:`edgeprune.devices.link.transports`."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import serve, wait_until_gone

from edgeprune.devices.agent.wire import MAGIC, frame
from edgeprune.devices.board import open_board
from edgeprune.devices.link import transports
from edgeprune.devices.link.pipe import Transport
from edgeprune.devices.link.transports import open_transport
from edgeprune.errors import DeadlineExceeded, DeviceError
from edgeprune.records.device import Device

ODD_TEXT = "a b'c\"d $HOME $(touch x) `x` ;|&*?\\ \n\té -n"
ODD_NAME = "a b'c;$(x) é -n"
CONTENT = bytes(range(256)) * 4096  # 1 MiB with every byte value


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Device]]:
    with serve(tmp_path_factory.mktemp("sshd")) as server:
        yield {"local": Device(transport="local", targets=()), "ssh": server.device()}


# Those that run commands keep every promise; a replay keeps those that are left without any.
RUNNING = tuple(name for name in transports.names() if name != "replay")


@pytest.fixture(params=RUNNING)
def transport(request, devices) -> Iterator[Transport]:
    opened = open_transport(devices[request.param])
    yield opened
    opened.close()


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def test_arguments_arrive_as_they_are(transport):
    done = transport.run(["printf", "%s", ODD_TEXT])
    assert (done.code, done.stdout, done.stderr) == (0, ODD_TEXT.encode(), b"")


def test_input_and_output_of_a_command_may_be_large(transport):
    assert transport.run(["cat"], stdin=CONTENT).stdout == CONTENT


def test_a_command_may_leave_its_input_unread(transport):
    assert transport.run(["true"], stdin=CONTENT).code == 0


def test_exit_code_and_stderr_come_back(transport):
    done = transport.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.code, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_a_command_that_is_not_there_has_the_code_of_a_shell(transport):
    done = transport.run(["no-such-command-here"])
    assert done.code == 127
    assert b"no-such-command-here" in done.stderr


def test_a_command_that_a_signal_ended_is_an_error(transport):
    with pytest.raises(DeviceError, match="signal"):
        transport.run(["sh", "-c", "kill -9 $$"])


def test_a_command_that_keeps_printing_is_cut_at_its_total_deadline(transport):
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        transport.run(["sh", "-c", "while :; do echo x; sleep 0.1; done"], timeout_s=0.7)
    assert time.monotonic() - start < 8


def test_the_home_folder_is_known_and_the_environment_of_the_host_is_not(transport, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CANARY", "seen")
    done = transport.run(["sh", "-c", 'echo "$HOME:$EDGEPRUNE_CANARY"'])
    home, _, canary = done.stdout.decode().strip().partition(":")
    assert home.startswith("/")
    assert canary == ""


def test_a_file_comes_back_as_it_was_put(transport, tmp_path):
    path = tmp_path / "new folder" / ODD_NAME
    transport.put(b"old", str(path))
    transport.put(CONTENT, str(path))
    assert path.read_bytes() == CONTENT
    assert transport.get(str(path)) == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == [ODD_NAME]
    assert path.stat().st_mode & 0o077 == 0


def test_an_empty_file_can_be_put(transport, tmp_path):
    transport.put(b"", str(tmp_path / "empty"))
    assert transport.get(str(tmp_path / "empty")) == b""


def test_a_file_cannot_be_put_where_a_folder_is(transport, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DeviceError, match="folder"):
        transport.put(b"content", str(tmp_path / "folder"))
    assert list((tmp_path / "folder").iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_missing_file_is_an_error_that_names_it(transport, tmp_path):
    with pytest.raises(DeviceError, match="not-there"):
        transport.get(str(tmp_path / "not-there"))


def test_a_pipe_carries_bytes_both_ways(transport):
    pipe = transport.start(["cat"])
    received = b""
    for part in (b"first", CONTENT[:60_000]):
        pipe.write(part, soon())
        expected = len(received) + len(part)
        while len(received) < expected:
            received += pipe.read(1 << 16, soon())
    assert received == b"first" + CONTENT[:60_000]
    pipe.close()


def test_the_end_of_a_command_reads_as_no_bytes(transport):
    pipe = transport.start(["sh", "-c", "echo why >&2; printf x"])
    assert pipe.read(10, soon()) == b"x"
    assert pipe.read(10, soon()) == b""
    assert "why" in pipe.stderr_tail()
    pipe.close()


def test_unread_stderr_does_not_stall_a_pipe(transport):
    noisy = "head -c 5000000 /dev/zero | tr '\\0' e >&2; echo done; cat"
    pipe = transport.start(["sh", "-c", noisy])
    assert pipe.read(10, soon()) == b"done\n"
    assert pipe.stderr_tail().endswith("e")
    assert len(pipe.stderr_tail()) <= 16 * 1024
    pipe.close()


def test_a_silent_pipe_ends_at_its_deadline(transport):
    pipe = transport.start(["cat"])
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        pipe.read(1, start + 0.3)
    assert time.monotonic() - start < 8
    pipe.close()


def test_writing_to_a_command_that_ended_is_an_error(transport):
    pipe = transport.start(["true"])
    assert pipe.read(1, soon()) == b""
    with pytest.raises(DeviceError):
        pipe.write(CONTENT * 8, soon())
    pipe.close()


def test_closing_a_pipe_ends_a_command_that_reads_its_input(transport, tmp_path):
    pid_file = tmp_path / "pid"
    pipe = transport.start(["sh", "-c", f"echo $$ >{pid_file}; echo ready; exec cat"])
    assert pipe.read(10, soon()) == b"ready\n"
    pipe.close()
    wait_until_gone(int(Path(pid_file).read_text()))


def test_closing_twice_is_harmless(transport):
    transport.close()
    transport.close()


def test_every_transport_is_tested_here(devices):
    assert {*devices, "replay"} == set(transports.names())


@pytest.fixture
def replay(tmp_path) -> Iterator[Transport]:
    path = tmp_path / "board.epr"
    local = Device(transport="local", targets=(), stand_in=True)
    with open_board("here", local, record=path) as board:
        board.runtime_version("onnxruntime")
    opened = open_transport(Device(transport="replay", targets=(), recording=str(path)))
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t.run(["true"]),
        lambda t: t.put(b"content", "/tmp/file"),
        lambda t: t.get("/etc/hostname"),
    ],
)
def test_a_replay_runs_no_command_and_has_no_file(replay, use):
    with pytest.raises(DeviceError, match="runs no commands and has no files"):
        use(replay)


def test_a_pipe_of_a_replay_gives_bytes_that_were_asked_for_and_ends_at_its_deadline(replay):
    pipe = replay.start(["anything"])
    taken = b"".join(pipe.read(1, soon()) for _ in MAGIC)
    assert taken == MAGIC
    pipe.write(frame({"op": "runtime", "name": "onnxruntime", "id": 7}), soon())
    (size,) = struct.unpack(">I", pipe.read(4, soon()))
    reply = json.loads(pipe.read(size, soon()))
    assert (reply["id"], reply["ok"]) == (7, True)
    assert pipe.read(8, soon()) == bytes(8)
    assert pipe.stderr_tail() == ""
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        pipe.read(1, start + 0.2)
    assert time.monotonic() - start < 8


def test_a_pipe_of_a_replay_that_was_closed_reads_as_no_bytes_and_cannot_be_written(replay):
    pipe = replay.start(["anything"])
    pipe.close()
    pipe.close()
    assert pipe.read(1, soon()) == b""
    with pytest.raises(DeviceError):
        pipe.write(b"x", soon())
    replay.close()
    replay.close()
