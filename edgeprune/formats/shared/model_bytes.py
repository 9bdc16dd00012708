"""Models that are folders, such as a Core ML ``.mlpackage``: written whole, and packed to travel and to be told by one digest.

A board, a cache and a record know a model as bytes with one SHA-256. Those of a folder are a zip of its files: stored, sorted by path, with
one fixed time, so that equal files give equal bytes. Inside a bundle and on the user's disk it stays a folder.
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from edgeprune.errors import IntegrityError, NoSpace, SpecError
from edgeprune.records.files import is_full, sync_folder

ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
MAX_FILES = 1000
MAX_BYTES = 2 * 1024**3


def zip_entry(path: str) -> zipfile.ZipInfo:
    """The entry of a regular file in a reproducible zip: no time, no owner, stored."""
    entry = zipfile.ZipInfo(path, ZIP_EPOCH)
    entry.create_system = 3  # Unix, so that the permission bits below mean something
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def packed(files: Mapping[str, bytes]) -> bytes:
    """Files by their relative POSIX path as one reproducible zip."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(files):
            archive.writestr(zip_entry(path), files[path])
    return stream.getvalue()


def unpacked(content: bytes) -> dict[str, bytes]:
    """The files of a packed folder by their relative POSIX path.

    Raises:
        IntegrityError: it is no such zip: compressed, too large, or with a path that leaves the folder.
    """
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES or sum(e.file_size for e in entries) > MAX_BYTES:
                raise IntegrityError(
                    f"a packed model must hold at most {MAX_FILES} files and 2 GiB"
                )
            for entry in entries:
                path = PurePosixPath(entry.filename)
                is_safe = path.parts and not path.is_absolute() and ".." not in path.parts
                if not is_safe or "\\" in entry.filename or entry.filename in files:
                    raise IntegrityError(f"a packed model must not hold {entry.filename!r}")
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise IntegrityError(f"{entry.filename!r} of a packed model must be stored")
                files[entry.filename] = archive.read(entry)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise IntegrityError(f"the model is not a sound packed folder: {error}") from error
    return files


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their relative POSIX path, sorted.

    Raises:
        IntegrityError: it holds a link, or something else that is neither a folder nor a regular file.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
        elif not stat.S_ISDIR(mode):
            raise IntegrityError(f"{path} must be a regular file or a folder")
    return found


def model_bytes(path: Path) -> bytes:
    """The content of a model: of a file its bytes, of a folder its files packed.

    Raises:
        OSError: it cannot be read.
        IntegrityError: as :func:`files_of`.
    """
    return packed(files_of(path)) if path.is_dir() else path.read_bytes()


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder so that a reader sees the old one or the new one, never a part of either.

    Args:
        path: the folder to make, or to replace (a file of that name is replaced too).
        files: contents by relative POSIX path.

    Raises:
        NoSpace: the disk is full; what was there stays, and nothing is left beside it.
        SpecError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            fresh = Path(scratch, "new")
            for name, content in files.items():
                _write_synced(fresh / name, content)
            if path.is_symlink() or path.exists():
                path.rename(Path(scratch, "old"))
            fresh.rename(path)
            sync_folder(path.parent)
    except OSError as error:
        if is_full(error):
            raise NoSpace(
                f"no space left on the disk of {path.parent}", hint="free some and run again"
            ) from error
        raise SpecError(f"cannot write {path}: {error.strerror or error}") from error


def _write_synced(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
