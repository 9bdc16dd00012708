"""Attacks through devices: names as commands, a user's SSH configuration, a man in the middle, boards that lie, secrets in outputs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
import tinynet
import yaml
from fakeagent import LOADED, ORT, QUICK, fake_device
from faultproxy import FaultProxy
from pydantic import ValidationError
from sshd import Sshd, keygen, matmul_file, script, serve

from edgeprune.devices.board import open_board
from edgeprune.devices.link.login import seen_host_key
from edgeprune.devices.link.secrets import Secret, resolve
from edgeprune.devices.link.transports import open_transport
from edgeprune.errors import AuthFailed, DeviceError, EdgepruneError, HostKeyMismatch, SpecError
from edgeprune.records.base import read_yaml
from edgeprune.records.device import Device, DeviceFile
from edgeprune.records.files import write_json

CANARY = "canary-9c41e7d2"
EVIL = (
    "x;touch p",
    "$(touch p)",
    "`touch p`",
    "x\ntouch p",
    "x|touch p",
    "x' p",
    "-oProxyCommand",
    "-oProxyCommand=touch p",
    "--help",
    "x\x00p",
    "x\x1b[2J",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


# Shell


@pytest.mark.parametrize("text", EVIL)
def test_names_and_places_of_a_device_cannot_be_commands_or_options(server, text):
    for key in ("host", "user", "workdir", "python", "lease_file"):
        with pytest.raises(ValidationError, match=key):
            server.device(**{key: text})
    with pytest.raises(ValidationError):
        DeviceFile(devices={text: server.device()})


@pytest.mark.parametrize("text", [*(t for t in EVIL if "\0" not in t), "* ~ $HOME !! # \\", "'\"'"])
def test_arguments_arrive_as_they_are(server, text):
    transport = open_transport(server.device())
    done = transport.run(["sh", "-c", 'cd "$1"; printf %s "$2"', "sh", str(server.folder), text])
    assert done.stdout == text.encode()
    target = server.folder / "put" / text
    transport.put(b"content", str(target))
    assert target.read_bytes() == b"content"
    assert transport.get(str(target)) == b"content"
    transport.close()
    assert not list(server.folder.rglob("p"))
    assert not (Path.home() / "p").exists()


def test_the_ssh_configuration_of_the_user_runs_nothing(server, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / ".ssh").mkdir(mode=0o700)
    lines = ("Host *", f"  ProxyCommand touch {marker}", f'Match exec "touch {marker}"', "")
    (tmp_path / ".ssh" / "config").write_text("\n".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path))
    transport = open_transport(server.device())
    assert transport.run(["echo", "in"]).stdout == b"in\n"
    transport.close()
    assert not marker.exists()


def test_nothing_asks_for_more_rights(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    for name in ("sudo", "su", "doas", "pkexec"):
        script(tmp_path / name, f"#!/bin/sh\ntouch {marker}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with open_board("here", Device(transport="local", targets=())) as board:
        board.load("net", matmul_file(), **ORT)
        board.time(["net"], QUICK)
    assert not marker.exists()


# A man in the middle


class Eavesdropper(paramiko.ServerInterface):
    """A server that lets everybody in and notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def get_allowed_auths(self, username: str) -> str:
        return "password,publickey"

    def check_auth_none(self, username: str) -> int:
        self.heard.append(username)
        return paramiko.AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:
        self.heard.append(password)
        return paramiko.AUTH_SUCCESSFUL

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.heard.append(username)
        return paramiko.AUTH_SUCCESSFUL


@contextlib.contextmanager
def eavesdropping(key_file: Path) -> Iterator[tuple[int, Eavesdropper]]:
    """Port and memory of such a server, for one connection."""
    listener, noted = socket.create_server(("127.0.0.1", 0)), Eavesdropper()
    opened: list[paramiko.Transport] = []

    def accept() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            transport = paramiko.Transport(listener.accept()[0])
            opened.append(transport)
            transport.add_server_key(paramiko.Ed25519Key.from_private_key_file(str(key_file)))
            transport.start_server(server=noted)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], noted
    finally:
        thread.join(5)
        for transport in opened:
            transport.join(2)
            transport.close()
        listener.close()


def test_a_man_in_the_middle_hears_neither_user_nor_password(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BOARD_PASSWORD", CANARY)
    keygen(tmp_path / "other")
    auth = {"method": "password", "password_ref": "env:BOARD_PASSWORD"}
    with eavesdropping(tmp_path / "other") as (port, noted), pytest.raises(HostKeyMismatch):
        open_transport(server.device(port=port, auth=auth))
    assert noted.heard == []


def test_the_pinned_server_hears_the_password_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BOARD_PASSWORD", CANARY)
    pin = {"sha256": keygen(tmp_path / "own")}
    auth = {"method": "password", "password_ref": "env:BOARD_PASSWORD"}
    with eavesdropping(tmp_path / "own") as (port, noted):
        open_transport(server.device(port=port, auth=auth, host_key=pin)).close()
    assert noted.heard.count(CANARY) == 1


# Boards that lie


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"load_ns": float("nan")}, "JSON"),
        ({"first_ns": float("-inf")}, "JSON"),
        ({"first_ns": -1}, "first_ns"),
        ({"load_ns": 10**30}, "load_ns"),
        ({"inputs": [{"name": "x" * 1000, "shape": [1], "dtype": "float32"}]}, "inputs"),
        ({"inputs": [{"name": "x", "shape": [2**40], "dtype": "float32"}]}, "inputs"),
        ({"../../etc/passwd": 1}, "passwd"),
        ({"\x1b[2J": 1}, "wrong"),
    ],
    ids=str,
)
def test_implausible_facts_are_refused_on_one_printable_line(tmp_path, change, why):
    code = f"({{**head, **json.loads({json.dumps(LOADED | change)!r})}}, b'')"
    with (
        open_board("fake", fake_device(tmp_path, code)) as board,
        pytest.raises(DeviceError, match=why) as caught,
    ):
        board.load("net", b"", **ORT)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "reply",
    [
        "(dict(head, blocks={'net': [{'samples_ns': [1] * 10**6}]}, before={}, after={}), b'')",
        "(dict(head, blocks={'net': [], '../../x': []}, before={}, after={}), b'')",
        "(dict(head, blocks={'net': []}, before={'temperature_c': 1e9}, after={}), b'')",
        "(dict(head, blocks={'net': []}, before={'governor': 'x' * 500}, after={}), b'')",
        "(out.write(struct.pack('>I', 2**32 - 1)), 1 / 0)",
        "(out.write(struct.pack('>I', 2) + b'{}' + struct.pack('>Q', 2**63)), 1 / 0)",
    ],
    ids=["samples", "names", "heat", "long text", "header of 4 GB", "blob of 8 EB"],
)
def test_implausible_times_and_sizes_are_refused_before_they_are_kept(tmp_path, reply):
    # The last two announce a size and end: nothing that large is waited for or allocated.
    with open_board("fake", fake_device(tmp_path, reply)) as board, pytest.raises(DeviceError):
        board.time(["net"], QUICK)


def test_names_from_a_board_stay_text(tmp_path):
    evil = [{"name": "../../x\x1b[2J\u202e", "shape": [1], "dtype": "float32"}]
    code = f"({{**head, **json.loads({json.dumps(LOADED | {'inputs': evil})!r})}}, b'')"
    with open_board("fake", fake_device(tmp_path, code)) as board:
        (tensor,) = board.load("net", b"", **ORT).inputs
    assert tensor.name.isprintable()
    assert "\x1b" not in tensor.name


# Files of the board


def test_a_link_in_the_place_of_the_agent_is_replaced_and_its_target_untouched(server, tmp_path):
    device = server.device(workdir=str(tmp_path / "work"))
    open_board("loop", device).close()
    (agent,) = (tmp_path / "work").glob("agent-*")
    (tmp_path / "victim").write_bytes(b"precious")
    agent.unlink()
    agent.symlink_to(tmp_path / "victim")
    with open_board("loop", device) as board:
        assert board.hello()["cores"] >= 1
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not agent.is_symlink()


@pytest.mark.parametrize("kind", ["ssh", "local"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_untouched(server, tmp_path, kind):
    device = server.device() if kind == "ssh" else Device(transport="local", targets=())
    transport = open_transport(device)
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "dangling"):
        transport.put(b"ours", str(tmp_path / name))
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"ours"
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "nothing").exists()
    transport.close()


# Secrets


def test_a_secret_never_shows_itself():
    secret = Secret(CANARY)
    assert secret.reveal() == CANARY
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret!r}", "%s" % secret):  # noqa: UP031
        assert shown == "***"
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        pickle.dumps(secret)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622, 0o660, 0o601])
@pytest.mark.parametrize("ref", ["password", "passphrase"])
def test_a_secret_file_that_others_can_reach_is_refused(server, tmp_path, mode, ref):
    (tmp_path / "secret").write_text(CANARY)
    (tmp_path / "secret").chmod(mode)
    reference = f"file:{tmp_path}/secret"
    auth = {"method": "password", "password_ref": reference}
    if ref == "passphrase":
        auth = {
            "method": "key",
            "key_file": str(server.folder / "login"),
            "passphrase_ref": reference,
        }
    with pytest.raises(SpecError, match="owner alone") as caught:
        open_transport(server.device(auth=auth))
    assert f"chmod 600 {tmp_path}/secret" in str(caught.value)


def test_a_secret_behind_a_link_or_of_another_user_is_refused(tmp_path):
    (tmp_path / "secret").write_text(CANARY)
    (tmp_path / "secret").chmod(0o600)
    assert resolve(f"file:{tmp_path}/secret").reveal() == CANARY
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(SpecError):
        resolve(f"file:{tmp_path}/link")
    if os.geteuid() == 0:
        os.chown(tmp_path / "secret", 65534, 65534)
        with pytest.raises(SpecError, match="owner alone"):
            resolve(f"file:{tmp_path}/secret")


def locked_key(folder: Path, passphrase: str) -> Path:
    keygen(folder / "locked")
    command = ["ssh-keygen", "-q", "-p", "-P", "", "-N", passphrase, "-f", str(folder / "locked")]
    subprocess.run(command, check=True)
    return folder / "locked"


@pytest.mark.parametrize("fault", ["refused", "reset", "hang", "passphrase"])
def test_no_traceback_holds_a_secret_even_with_its_variables(server, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("THE_SECRET", CANARY)
    monkeypatch.setattr("edgeprune.devices.link.login.LOGIN_S", 1.0)
    auth = {"method": "password", "password_ref": "env:THE_SECRET"}
    if fault == "passphrase":
        key_file = locked_key(tmp_path, "another one")
        auth = {"method": "key", "key_file": str(key_file), "passphrase_ref": "env:THE_SECRET"}
    with FaultProxy(server.port) as proxy:
        seen_host_key("127.0.0.1", proxy.port, 5)
        # The exchange of keys, and part of the first answer.
        before_login = proxy.bytes["down"] + 20
        if fault == "reset":
            proxy.reset(after=before_login, way="down")
        if fault == "hang":
            proxy.hole(acknowledge=True, after=before_login, way="down")
        with pytest.raises(EdgepruneError) as caught:
            open_transport(server.device(port=proxy.port, auth=auth))
    seen = "".join(
        traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    )
    assert "open_transport" in seen
    assert CANARY not in seen
    assert "BEGIN OPENSSH" not in seen


LOGGED_LOGIN = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from pathlib import Path
from edgeprune.records.base import read_json
from edgeprune.devices.board import open_board
from edgeprune.records.device import Device
for path in sys.argv[1:]:
    device = read_json(Device, Path(path))
    print(device)
    try:
        with open_board("board", device) as board:
            print(board.hello())
    except Exception:
        logging.exception("failed")
        if path == sys.argv[-1]:
            raise
"""


def test_no_output_of_a_login_holds_a_secret_at_the_debug_level(server, tmp_path):
    locked = locked_key(tmp_path, CANARY)
    public = Path(f"{locked}.pub").read_text()
    with (server.folder / "authorized_keys").open("a") as stream:
        stream.write(public)
    good = {"method": "key", "key_file": str(locked), "passphrase_ref": "env:THE_SECRET"}
    bad = {"method": "password", "password_ref": "env:THE_SECRET"}
    for name, auth in (("good", good), ("bad", bad)):
        write_json(server.device(auth=auth), tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", LOGGED_LOGIN, str(tmp_path / "good"), str(tmp_path / "bad")],
        env=os.environ | {"THE_SECRET": CANARY},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "DEBUG:edgeprune.ssh" in done.stderr
    assert "'cores'" in done.stdout
    assert "AuthFailed" in done.stderr
    assert CANARY not in done.stdout + done.stderr + server.log()
    for path in (server.folder / "work").rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


@pytest.mark.slow  # trains the small network of the project first
def test_a_run_that_cannot_log_in_leaves_no_secret_behind(server, tmp_path):
    home = tinynet.project(tmp_path / "project")
    auth = {"method": "password", "password_ref": "env:THE_SECRET"}
    device = server.device(auth=auth, targets=("this-machine",)).model_dump(mode="json")
    text = yaml.safe_dump({"schema_version": 1, "devices": {"shelf": device}})
    (home / "devices.yaml").write_text(text)
    os.environ["THE_SECRET"] = CANARY
    try:
        args = ("deploy", "--target", "this-machine", "--latency", "1000ms", "--run", "run")
        done = tinynet.edgeprune(home, *args)
    finally:
        del os.environ["THE_SECRET"]
    assert done.returncode == AuthFailed.exit_code, done.stderr
    assert "login refused" in done.stderr
    assert CANARY not in done.stdout + done.stderr
    for path in home.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


# YAML


@pytest.mark.parametrize(
    "auth",
    [
        {"method": "password", "password": CANARY},
        {"method": "password", "password_ref": CANARY},
        {"method": "key", "key_file": "k", "passphrase": CANARY},
        {"method": "key", "key_file": "k", "passphrase_ref": CANARY},
    ],
    ids=["password", "password_ref", "passphrase", "passphrase_ref"],
)
def test_a_secret_written_into_devices_yaml_is_refused_and_not_repeated(tmp_path, auth):
    device = {"transport": "ssh", "targets": [], "host": "pi", "user": "pi", "auth": auth}
    path = tmp_path / "devices.yaml"
    path.write_text(yaml.safe_dump({"schema_version": 1, "devices": {"pi": device}}))
    with pytest.raises(SpecError) as caught:
        read_yaml(DeviceFile, path)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_a_device_file_of_tags_or_bombs_is_refused(tmp_path):
    marker = tmp_path / "marker"
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
    )
    for text in (f"!!python/object/apply:os.mkdir ['{marker}']", bomb, "[" * 5000):
        (tmp_path / "devices.yaml").write_text(text)
        with pytest.raises(SpecError):
            read_yaml(DeviceFile, tmp_path / "devices.yaml")
    assert not marker.exists()
