"""Logging in to a real sshd: who is let in, what is refused, and what is never sent or shown."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import Sshd, free_port, keygen, script, serve, wait_until_gone

from edgeprune.devices.board import open_board
from edgeprune.devices.link.agent_file import agent_bytes, agent_name
from edgeprune.devices.link.frames import Frames
from edgeprune.devices.link.login import seen_host_key
from edgeprune.devices.link.transports import open_transport
from edgeprune.errors import (
    DeadlineExceeded,
    DeviceError,
    EdgepruneError,
    HostKeyMismatch,
    SpecError,
    Unreachable,
)

CANARY = "canary-7f3a91"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Sshd]:
    """A server whose log holds this test alone."""
    with serve(tmp_path) as running:
        yield running


def login_methods(log: str) -> list[str]:
    """Methods that were tried, without the probe ``none``."""
    return [m for m in re.findall(r"userauth-request .* method (\S+)", log) if m != "none"]


def test_a_board_over_ssh_tells_what_it_is(server):
    with open_board("loop", server.device()) as board:
        facts = board.hello()
    assert facts["machine"] == os.uname().machine
    assert facts["cores"] == os.cpu_count()


def test_the_agent_is_pushed_once_and_its_folder_is_private(server):
    device = server.device()
    for _ in range(2):
        open_board("loop", device).close()
    pushed = Path(device.workdir) / agent_name()
    assert pushed.read_bytes() == agent_bytes()
    first = pushed.stat().st_mtime_ns
    open_board("loop", device).close()
    assert pushed.stat().st_mtime_ns == first
    assert Path(device.workdir).stat().st_mode & 0o077 == 0


def test_a_damaged_agent_is_pushed_again(server):
    device = server.device()
    open_board("loop", device).close()
    pushed = Path(device.workdir) / agent_name()
    pushed.write_text("raise SystemExit(3)")
    with open_board("loop", device) as board:
        assert board.hello()["cores"] >= 1


def test_a_tilde_in_the_workdir_is_the_home_of_the_board(server):
    relative = os.path.relpath(server.folder / "tilde", Path.home())
    open_board("loop", server.device(workdir=f"~/{relative}")).close()
    assert list((server.folder / "tilde").glob("agent-*.pyz"))


def test_another_host_key_is_refused_before_any_login(fresh_server):
    pinned = keygen(fresh_server.folder / "other")
    with pytest.raises(HostKeyMismatch) as caught:
        open_transport(fresh_server.device(host_key={"sha256": pinned}))
    assert fresh_server.fingerprint in str(caught.value)
    assert pinned in str(caught.value)
    assert "userauth-request" not in fresh_server.log()


def test_a_host_without_a_key_of_the_pinned_type_is_refused_before_any_login(fresh_server):
    pin = {"sha256": fresh_server.fingerprint, "key_type": "ecdsa-sha2-nistp256"}
    with pytest.raises(HostKeyMismatch, match="ecdsa-sha2-nistp256"):
        open_transport(fresh_server.device(host_key=pin))
    assert "userauth-request" not in fresh_server.log()


def test_the_key_of_a_host_can_be_read_without_a_login(fresh_server):
    key = seen_host_key("127.0.0.1", fresh_server.port, 5)
    assert key.sha256 == fresh_server.fingerprint
    assert "userauth-request" not in fresh_server.log()


def test_a_wrong_login_key_is_refused_after_one_attempt(fresh_server):
    keygen(fresh_server.folder / "wrong")
    auth = {"method": "key", "key_file": str(fresh_server.folder / "wrong")}
    with pytest.raises(DeviceError, match="login refused"):
        open_transport(fresh_server.device(auth=auth))
    assert login_methods(fresh_server.log()) == ["publickey"]


def test_a_server_with_weak_ciphers_alone_is_refused(tmp_path):
    with (
        serve(tmp_path, "Ciphers aes128-cbc") as running,
        pytest.raises(HostKeyMismatch, match="cipher"),
    ):
        open_transport(running.device())


def test_a_password_is_never_part_of_an_error(fresh_server, monkeypatch, tmp_path):
    monkeypatch.setenv("BOARD_PASSWORD", CANARY)
    secret = tmp_path / "secret"
    secret.write_text(CANARY)
    secret.chmod(0o644)
    errors = []
    for reference in ("env:BOARD_PASSWORD", f"file:{secret}"):
        device = fresh_server.device(auth={"method": "password", "password_ref": reference})
        assert CANARY not in repr(device)
        with pytest.raises(EdgepruneError) as caught:
            open_transport(device)
        errors.append(caught.value)
    assert isinstance(errors[0], DeviceError)
    assert isinstance(errors[1], SpecError)
    for error in errors:
        assert CANARY not in str(error) + repr(error)
        assert CANARY not in "".join(traceback.format_exception(error))
    assert CANARY not in fresh_server.log()


def test_a_wrong_passphrase_is_an_error_that_does_not_show_it(server, monkeypatch, tmp_path):
    monkeypatch.setenv("PASSPHRASE", CANARY)
    locked = tmp_path / "locked"
    keygen(locked)
    command = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "right", "-f", str(locked)]
    subprocess.run(command, check=True)
    auth = {"method": "key", "key_file": str(locked), "passphrase_ref": "env:PASSPHRASE"}
    with pytest.raises(SpecError, match="passphrase_ref") as caught:
        open_transport(server.device(auth=auth))
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_a_passphrase_from_a_private_file_opens_the_key(tmp_path):
    with serve(tmp_path) as running:
        command = ["ssh-keygen", "-q", "-p", "-P", "", "-N", CANARY, "-f", str(tmp_path / "login")]
        subprocess.run(command, check=True)
        (tmp_path / "secret").write_text(CANARY + "\n")
        (tmp_path / "secret").chmod(0o600)
        auth = {
            "method": "key",
            "key_file": str(tmp_path / "login"),
            "passphrase_ref": f"file:{tmp_path}/secret",
        }
        transport = open_transport(running.device(auth=auth))
        assert transport.run(["true"]).code == 0
        transport.close()


@pytest.mark.parametrize("spoil", ["missing", "open to others", "a link", "no key"])
def test_an_unusable_key_file_is_an_error_of_the_device_file(server, tmp_path, spoil):
    key = tmp_path / "key"
    if spoil == "open to others":
        keygen(key)
        key.chmod(0o644)
    elif spoil == "a link":
        key.symlink_to(server.folder / "login")
    elif spoil == "no key":
        key.write_text("not a key")
        key.chmod(0o600)
    with pytest.raises(SpecError, match="key"):
        open_transport(server.device(auth={"method": "key", "key_file": str(key)}))


def test_an_unset_secret_is_named_by_its_reference(server, monkeypatch):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    auth = {"method": "password", "password_ref": "env:NOT_SET_HERE"}
    with pytest.raises(SpecError, match="NOT_SET_HERE"):
        open_transport(server.device(auth=auth))


def test_a_closed_port_is_unreachable_at_once(server):
    start = time.monotonic()
    with pytest.raises(Unreachable, match="refused"):
        open_transport(server.device(port=free_port()))
    assert time.monotonic() - start < 5


def test_a_name_without_an_address_is_unreachable(server):
    with pytest.raises(Unreachable, match="address"):
        open_transport(server.device(host="no-such-host.invalid", connect_timeout_s=3))


def test_a_port_that_accepts_and_stays_silent_is_unreachable_in_time(server):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        start = time.monotonic()
        with pytest.raises(Unreachable):
            open_transport(server.device(port=listener.getsockname()[1], connect_timeout_s=0.3))
    assert time.monotonic() - start < 8


def test_noise_of_the_login_shell_is_skipped(tmp_path):
    text = '#!/bin/sh\necho Welcome to the board\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    script(tmp_path / "noisy", text)
    with serve(tmp_path, f"ForceCommand {tmp_path}/noisy") as running:
        with open_board("noisy", running.device()) as board:
            assert board.hello()["cores"] >= 1
        transport = open_transport(running.device())
        assert transport.run(["echo", "x"]).stdout == b"x\n"
        transport.close()


def test_a_login_shell_that_floods_is_refused(tmp_path):
    text = '#!/bin/sh\nhead -c 200000 /dev/zero\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    script(tmp_path / "flood", text)
    with (
        serve(tmp_path, f"ForceCommand {tmp_path}/flood") as running,
        pytest.raises(DeviceError, match="login shell"),
    ):
        open_board("flood", running.device())


def test_a_python_that_is_not_there_is_an_error_that_says_so(server):
    with pytest.raises(DeviceError, match="no-such-python"):
        open_board("loop", server.device(python="/no-such-python"))


def test_an_agent_whose_host_is_gone_stops_in_the_middle_of_its_work(server, tmp_path):
    device = server.device()
    open_board("loop", device).close()
    agent = Path(device.workdir) / agent_name()
    transport = open_transport(device)
    shell = 'echo $$ >"$1"; shift; exec "$@"'
    pid_file = tmp_path / "pid"
    argv = ["sh", "-c", shell, "sh", str(pid_file), device.python, "-B", str(agent)]
    frames = Frames(transport.start(argv), "loop")
    frames.handshake(20)
    pid = int(pid_file.read_text())
    hello = {"workdir": device.workdir, "session": "0" * 32, "lease_file": device.lease_file}
    hello |= {"min_free_bytes": 0, "quota_bytes": 1 << 30}
    frames.request("hello", hello, work_s=20)
    # The runtime is imported in a child, so the agent is busy when the deadline cuts the connection.
    with pytest.raises(DeadlineExceeded):
        frames.request("runtime", {"name": "onnxruntime"}, work_s=0.02)
    wait_until_gone(pid)
    transport.close()
