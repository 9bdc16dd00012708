"""Failures on the way into a board: another host key, an unknown one, a refused login, a server with no room, a shell that floods."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faultproxy import FaultProxy
from pydantic import ValidationError
from sshd import Sshd, keygen, script, serve

from edgeprune.devices.board import open_board
from edgeprune.devices.link.login import seen_host_key
from edgeprune.devices.link.pipe import Transport
from edgeprune.devices.link.transports import open_transport
from edgeprune.errors import AuthFailed, DeviceError, HostKeyMismatch, LinkLost, Unreachable
from edgeprune.records.device import Device


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    """A server whose log holds this test alone."""
    with serve(tmp_path) as running:
        yield running


def login_methods(log: str) -> list[str]:
    """Methods that were tried, without the probe ``none``."""
    return [m for m in re.findall(r"userauth-request .* method (\S+)", log) if m != "none"]


def open_when_there_is_room(device: Device, seconds: float = 5) -> Transport:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return open_transport(device)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def place_of_a_login(port: int) -> Iterator[None]:
    """Hold one of the server's places for clients that have not logged in yet."""
    for _ in range(50):
        with (
            socket.create_connection(("127.0.0.1", port), 2) as holder,
            contextlib.suppress(ConnectionResetError),
        ):
            if holder.recv(4) == b"SSH-":
                yield
                return
        time.sleep(0.1)
    pytest.fail("the server never had room")


def test_a_changed_host_key_ends_before_any_login_and_shows_both_keys(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    with serve(tmp_path / "old") as before:
        pinned = before.fingerprint
        open_transport(before.device()).close()
    with serve(tmp_path / "new") as after:
        with pytest.raises(HostKeyMismatch) as caught:
            open_transport(after.device(host_key={"sha256": pinned}))
        assert caught.value.exit_code == 4
        assert pinned in str(caught.value)
        assert after.fingerprint in str(caught.value)
        assert "userauth-request" not in after.log()


def test_a_device_without_a_pin_is_refused_and_its_key_can_be_read_without_a_login(server):
    with pytest.raises(ValidationError, match="host_key"):
        server.device(host_key=None)
    with pytest.raises(ValidationError, match="sha256"):
        server.device(host_key={"sha256": ""})
    assert seen_host_key("127.0.0.1", server.port, 5).sha256 == server.fingerprint
    assert "userauth-request" not in server.log()


def test_a_refused_key_is_one_attempt_and_the_next_login_still_works(server):
    keygen(server.folder / "wrong")
    auth = {"method": "key", "key_file": str(server.folder / "wrong")}
    with pytest.raises(AuthFailed):
        open_transport(server.device(auth=auth))
    assert login_methods(server.log()) == ["publickey"]
    open_transport(server.device()).close()


def test_a_refused_password_is_one_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("BOARD_PASSWORD", "not the password")
    auth = {"method": "password", "password_ref": "env:BOARD_PASSWORD"}
    with serve(tmp_path, "PasswordAuthentication yes", "MaxAuthTries 1") as running:
        with pytest.raises(AuthFailed) as caught:
            open_transport(running.device(auth=auth))
        assert login_methods(running.log()) == ["password"]
    assert caught.value.exit_code == 4


def test_a_server_with_no_room_is_unreachable_until_there_is_room(tmp_path):
    with serve(tmp_path, "MaxStartups 1") as running:
        open_when_there_is_room(running.device()).close()
        with place_of_a_login(running.port):
            start = time.monotonic()
            with pytest.raises(Unreachable, match="MaxStartups"):
                open_transport(running.device())
            assert time.monotonic() - start < 5
        open_when_there_is_room(running.device()).close()


def test_a_connection_that_breaks_in_the_login_is_no_refused_login(server):
    with FaultProxy(server.port) as proxy:
        device = server.device(port=proxy.port)
        open_transport(device).close()
        whole = proxy.bytes["down"]
        proxy.reset(after=whole // 2, way="down")
        with pytest.raises((Unreachable, LinkLost)):
            open_transport(device)


@pytest.mark.parametrize(
    "flood", ["head -c 5000000 /dev/zero", "exec yes"], ids=["5 MB", "endless"]
)
def test_a_shell_that_floods_is_an_error_and_not_a_hang(tmp_path, flood):
    script(tmp_path / "flood", f"#!/bin/sh\n{flood}\n")
    with serve(tmp_path, f"ForceCommand {tmp_path}/flood") as running:
        start = time.monotonic()
        with pytest.raises(DeviceError, match="login shell"):
            open_board("flood", running.device())
        assert time.monotonic() - start < 8


def test_an_agent_that_starts_in_a_flood_is_refused(tmp_path):
    # The commands before it run well: only the program itself is behind the flood.
    text = '#!/bin/sh\ncase "$2" in *agent-*) head -c 5000000 /dev/zero;; esac\nexec /usr/bin/env python3 "$@"\n'
    python = script(tmp_path / "python", text)
    with (
        serve(tmp_path) as running,
        pytest.raises(DeviceError, match="printed more than"),
    ):
        open_board("flood", running.device(python=python))
