"""The emulated board as a device: the host's sshd on loopback, with the arm64 root as the only thing its one user can see."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from build_board import DEFAULT_PROCESSOR, HOME, board_folder, ensure_board, isolated
from sshd import serve

from edgeprune.records.device import Device

USER = "edgeprune-board"
COMMENT = "emulated board of the edgeprune tests"
WORKDIR = ".local/share/edgeprune"  # below the home of the user
# Debian's, without numpy, pip or a runtime, on the usual processor.
BARE_PYTHON = f"/{HOME}/bin/python3"
PYTHONS = {
    "litert": "/opt/litert/bin/python",
    "tflite-runtime": "/opt/tflite/bin/python",
    "onnxruntime": "/opt/ort/bin/python",
}


@contextmanager
def emulated_board() -> Iterator[Device]:
    """An SSH device that is a Debian bookworm arm64 under qemu, with its key pinned and LiteRT as its Python.

    Raises:
        BoardUnavailable: this machine cannot hold it.
    """
    root = ensure_board()
    with _alone(), _user() as account, tempfile.TemporaryDirectory(prefix="edgeprune-") as keys:
        home = root / HOME
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        os.chown(home, account.pw_uid, account.pw_gid)
        _bare_python(root / BARE_PYTHON[1:])
        Path(keys).chmod(0o755)  # sshd reads the authorized keys as the user
        only = (f"AllowUsers {USER}", "AllowTcpForwarding no", f"ChrootDirectory {root}")
        with serve(Path(keys), *only, prefix=isolated(proc=f"{root}/proc")) as server:
            yield server.device(
                targets=("rpi4", "rpi3-32bit"),
                user=USER,
                workdir=f"~/{WORKDIR}",
                python=PYTHONS["litert"],
                lease_file=None,  # the shared one, in /run/lock
                stand_in=False,
            )


def _bare_python(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nQEMU_CPU={DEFAULT_PROCESSOR} exec /usr/bin/python3 "$@"\n')
    path.chmod(0o755)


def workdir() -> Path:
    """The workdir of the board, as this machine sees it."""
    return board_folder() / "root" / HOME / WORKDIR


def processes(word: str = "") -> set[int]:
    """Processes of the board's user whose command line has a word, such as ``worker``, by the ids that they have here."""
    uid = pwd.getpwnam(USER).pw_uid
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if place.stat().st_uid == uid and word in (place / "cmdline").read_bytes().decode():
                found.add(int(place.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


@contextmanager
def _alone() -> Iterator[None]:
    """Two test runs cannot share the user and its home."""
    with (board_folder() / "in-use").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _user() -> Iterator[pwd.struct_passwd]:
    """An account of the host without a password, for the time of the tests. One that a killed run left behind is taken over."""
    try:
        found = pwd.getpwnam(USER)
        if found.pw_gecos != COMMENT:
            pytest.skip(f"no emulated board here: this machine has a user {USER} of its own")
    except KeyError:
        # "*" is no password; "!", the default, would lock the account for keys too.
        facts = ["--comment", COMMENT, "--home-dir", f"/{HOME}", "--shell", "/bin/sh"]
        options = ["--system", "--no-create-home", "--gid", "nogroup", "--password", "*"]
        subprocess.run(["useradd", *options, *facts, USER], check=True, timeout=30)
    try:
        yield pwd.getpwnam(USER)
    finally:
        _wait_until_idle()
        subprocess.run(["userdel", USER], check=True, timeout=30, capture_output=True)


def _wait_until_idle(seconds: float = 10) -> None:
    """Return when no process of this user is left: they are killed with their sshd, but not at once."""
    deadline = time.monotonic() + seconds
    while processes():
        if time.monotonic() > deadline:
            pytest.fail(f"processes of the user {USER} still run")
        time.sleep(0.05)


def write_devices(folder: Path, board: Device) -> None:
    """A ``devices.yaml`` with the board once for every runtime, by the runtime's name."""
    devices = {
        name: board.model_copy(update={"python": python}).model_dump(mode="json")
        for name, python in PYTHONS.items()
    }
    text = yaml.safe_dump({"schema_version": 1, "devices": devices})
    (folder / "devices.yaml").write_text(text)
