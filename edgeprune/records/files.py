"""Files as this program writes and tells them: whole or not at all, and by their digest."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.errors import (
    NoSpace,
    SpecError,
)
from edgeprune.records.base import Record


def to_json(record: Record) -> bytes:
    """Canonical bytes of a record: sorted keys, one space of indent, one newline at the end."""
    return to_json_text(record.model_dump(mode="json"))


def to_json_text(value: Any) -> bytes:
    """Canonical bytes of plain data, as :func:`to_json`."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(record: Record, path: Path) -> None:
    """Write a record atomically. Raises as :func:`write_bytes`."""
    write_bytes(path, to_json(record))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        NoSpace: the disk is full; nothing is left behind.
        SpecError: the folder cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(content)


@contextlib.contextmanager
def atomic_path(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path beside ``path``; synced and renamed to it when the block ends well, removed when it does not.

    Args:
        path: the file to replace, or to make.
        mode: permissions of the result.

    Raises:
        NoSpace, SpecError: as :func:`write_bytes`.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if is_full(error):
            raise NoSpace(
                f"no space left on the disk of {path.parent}", hint="free some and run again"
            ) from error
        raise SpecError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_bytes(content: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """A stable 16-digit digest of plain data or records, for cache keys."""

    def plain(item: Any) -> Any:
        if isinstance(item, Record):
            return item.model_dump(mode="json")
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"cannot take the digest of {type(item).__name__}")

    text = json.dumps(value, sort_keys=True, default=plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
