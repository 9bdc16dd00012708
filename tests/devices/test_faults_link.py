"""Failures of the link under a running command, behind a proxy that makes them: each is an error in time, and never a success."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultproxy import FaultProxy
from sshd import Sshd, serve

from edgeprune.devices.link.pipe import Transport
from edgeprune.devices.link.transports import open_transport, ssh
from edgeprune.errors import DeadlineExceeded, DeviceError, LinkLost

CONTENT = os.urandom(200_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def proxy(server: Sshd) -> Iterator[FaultProxy]:
    with FaultProxy(server.port) as running:
        yield running


@pytest.fixture
def transport(server: Sshd, proxy: FaultProxy) -> Iterator[Transport]:
    opened = open_transport(server.device(port=proxy.port))
    yield opened
    opened.close()


def wait_until_empty(folder: Path, seconds: float = 5) -> None:
    """Return when no file is in the folder; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while left := list(folder.iterdir()):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def test_a_reset_during_a_command_is_a_lost_link_at_once(proxy, transport, server):
    proxy.reset(after=5000, way="down")
    start = time.monotonic()
    with pytest.raises(LinkLost):
        transport.run(["head", "-c", "1000000", "/dev/zero"])
    assert time.monotonic() - start < 3
    with pytest.raises(LinkLost):
        transport.run(["true"])
    again = open_transport(server.device(port=proxy.port))
    assert again.run(["echo", "back"]).stdout == b"back\n"
    again.close()


def test_a_link_that_ends_cleanly_is_no_end_of_the_output(proxy, transport):
    pipe = transport.start(["sh", "-c", "echo one; sleep 20"])
    assert pipe.read(100, time.monotonic() + 5) == b"one\n"
    proxy.cut()
    with pytest.raises(LinkLost):
        pipe.read(100, time.monotonic() + 5)
    with pytest.raises(LinkLost):
        pipe.write(b"more", time.monotonic() + 5)


def test_a_program_that_ends_is_an_end_of_the_output_and_no_lost_link(transport):
    pipe = transport.start(["echo", "one"])
    assert pipe.read(100, time.monotonic() + 5) == b"one\n"
    assert pipe.read(100, time.monotonic() + 5) == b""
    with pytest.raises(DeviceError, match="signal") as caught:
        transport.run(["sh", "-c", "kill -9 $$"])
    assert not isinstance(caught.value, LinkLost)
    assert transport.run(["echo", "two"]).stdout == b"two\n"


def test_a_hole_under_a_silent_command_is_noticed_by_tcp(proxy, transport):
    proxy.hole()
    start = time.monotonic()
    with pytest.raises(LinkLost):
        transport.run(["sleep", "30"])
    assert time.monotonic() - start < 13


def test_a_far_end_that_hangs_meets_the_deadline(proxy, transport):
    pipe = transport.start(["cat"])
    proxy.hole(acknowledge=True)
    pipe.write(b"anyone?", time.monotonic() + 5)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        pipe.read(100, start + 0.5)
    assert time.monotonic() - start < 2
    with pytest.raises(LinkLost):
        transport.run(["true"])


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("offset", [0, 2, 3, 9, 60])
def test_a_flipped_bit_is_never_a_success(proxy, transport, way, offset):
    proxy.flip(offset, way)
    with pytest.raises((LinkLost, DeadlineExceeded)):
        transport.run(["echo", "x" * 200], timeout_s=1.5)


def test_a_flipped_bit_in_a_file_never_arrives(proxy, transport, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh, "STALL_S", 1.5)
    proxy.flip(100_000, "up")
    with pytest.raises((LinkLost, DeadlineExceeded)):
        transport.put(CONTENT, str(tmp_path / "file"))
    wait_until_empty(tmp_path)


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_half_a_file_has_never_its_final_name(proxy, transport, tmp_path, fault):
    getattr(proxy, fault)(after=len(CONTENT) // 2, way="up")
    with pytest.raises(LinkLost):
        transport.put(CONTENT, str(tmp_path / "file"))
    wait_until_empty(tmp_path)


def test_an_older_file_survives_a_transfer_that_breaks(proxy, transport, tmp_path):
    (tmp_path / "file").write_bytes(b"older")
    proxy.cut(after=len(CONTENT) // 2, way="up")
    with pytest.raises(LinkLost):
        transport.put(CONTENT, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"older"


def test_a_slow_link_moves_a_file_for_longer_than_it_may_stall(
    proxy, transport, tmp_path, monkeypatch
):
    monkeypatch.setattr(ssh, "STALL_S", 3.5)  # the proxy holds back up to 2.4 s of bytes
    proxy.slow(40_000)
    start = time.monotonic()
    transport.put(CONTENT, str(tmp_path / "file"))
    assert time.monotonic() - start > 3.5
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_slow_link_brings_a_file_for_longer_than_it_may_stall(
    proxy, transport, tmp_path, monkeypatch
):
    monkeypatch.setattr(ssh, "STALL_S", 3.0)
    (tmp_path / "file").write_bytes(CONTENT[:180_000])
    proxy.slow(40_000)
    start = time.monotonic()
    assert transport.get(str(tmp_path / "file")) == CONTENT[:180_000]
    assert time.monotonic() - start > 3.0


def test_a_transfer_that_stands_still_is_given_up(proxy, transport, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh, "STALL_S", 1.0)
    proxy.hole(acknowledge=True, after=50_000, way="up")
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="stood still"):
        transport.put(CONTENT, str(tmp_path / "file"))
    assert time.monotonic() - start < 5
    proxy.heal()
    wait_until_empty(tmp_path)
