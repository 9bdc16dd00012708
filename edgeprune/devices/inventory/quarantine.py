"""Boards whose times were found not to be trusted: remembered on this computer until somebody has looked.

``$XDG_STATE_HOME/edgeprune/quarantine.json`` holds them by device name. A board in it is not chosen by itself and does not help another
one; when the user names it, it is used, with a note.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from edgeprune.errors import IntegrityError
from edgeprune.records.base import Record, read_json
from edgeprune.records.files import write_json
from edgeprune.records.paths import user_folder

MAX_REASON = 300  # characters


class QuarantineEntry(Record):
    """Why a device is in quarantine, and since when (UTC, ISO 8601)."""

    reason: str
    at: str


class _QuarantineFile(Record):
    schema_version: Literal[1] = 1
    devices: dict[str, QuarantineEntry] = {}


def path() -> Path:
    """The file."""
    return user_folder("XDG_STATE_HOME", ".local/state") / "quarantine.json"


def entries() -> dict[str, QuarantineEntry]:
    """Every device in quarantine, by name.

    Raises:
        IntegrityError: the file is not what :func:`put` wrote.
    """
    if not path().exists():
        return {}
    try:
        return dict(read_json(_QuarantineFile, path()).devices)
    except IntegrityError as error:
        raise IntegrityError(
            error.message, hint=f"remove {path()}: devices in quarantine are then trusted again"
        ) from error


def reason(name: str) -> str | None:
    """Why a device is in quarantine; ``None`` when it is not. Raises as :func:`entries`."""
    entry = entries().get(name)
    return None if entry is None else entry.reason


def put(name: str, reason: str) -> None:
    """Quarantine a device, also one that is in already: the newer reason counts.

    Raises:
        SpecError, NoSpace: the file cannot be written.
        IntegrityError: as :func:`entries`.
    """
    line = "".join(c if c.isprintable() else " " for c in reason)[:MAX_REASON]
    at = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    with _locked():
        _write({**entries(), name: QuarantineEntry(reason=line, at=at)})


def lift(name: str) -> bool:
    """Trust a device again; gives whether it was in quarantine. Raises as :func:`put`."""
    with _locked():
        left = entries()
        if left.pop(name, None) is None:
            return False
        _write(left)
        return True


def _write(devices: dict[str, QuarantineEntry]) -> None:
    write_json(_QuarantineFile(devices=dict(sorted(devices.items()))), path())


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One writer at a time, over threads and processes: each reads what the one before has written."""
    lock = path().with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # the write below says what is wrong with the folder
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
