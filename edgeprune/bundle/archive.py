"""The ``.zip`` of a bundle: reproducible bytes out, and an extractor that trusts nothing that comes in."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path

from edgeprune.bundle.manifest import check_distinct, check_path
from edgeprune.errors import IntegrityError
from edgeprune.formats.shared.model_bytes import zip_entry
from edgeprune.records.files import atomic_path

MAX_FILES = 10_000
MAX_TOTAL_BYTES = 2 * 1024**3
MAX_RATIO = 200
MAX_DIRECTORY_BYTES = 4 * 1024**2
_END = b"PK\x05\x06"
_END_BYTES = 22
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP64_LOCATOR_BYTES = 20
_PIECE = 1 << 20


def files_under(folder: Path) -> list[str]:
    """Relative POSIX paths of the files in a folder, sorted.

    Raises:
        IntegrityError: a link, a device, an unsafe name, two names that differ only in case, or more than the caps allow.
    """
    found: list[str] = []
    total = 0
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=False):
        for name in [*folders, *names]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(f"{relative} must be a regular file, not a link or a device")
            found.append(relative)
            total += status.st_size
            if len(found) > MAX_FILES or total > MAX_TOTAL_BYTES:
                raise IntegrityError(_cap_message(len(found), total))
    check_names(found)
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise IntegrityError(f"cannot read {error.filename}: {error.strerror}") from error


def check_names(paths: list[str]) -> None:
    """Raise unless every path is safe and no two are the same file.

    Raises:
        IntegrityError: names the first path that is not.
    """
    try:
        for path in paths:
            check_path(path)
        check_distinct(paths)
    except ValueError as error:
        raise IntegrityError(str(error)) from error


def write_zip(folder: Path, archive: Path, *, top: str) -> None:
    """Write all files of a folder under ``top/``: stored, sorted, with one fixed time, so that equal files give equal bytes.

    Raises:
        NoSpace, SpecError: the archive cannot be written.
    """
    with (
        atomic_path(archive) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as out,
    ):
        for path in files_under(folder):
            out.writestr(zip_entry(f"{top}/{path}"), (folder / path).read_bytes())


def extract(archive: Path, into: Path) -> None:
    """Unpack a bundle's zip into an empty folder, without its single top folder.

    Only regular files with safe, distinct names are written; sizes, counts and ratios are capped before and while unpacking.

    Raises:
        IntegrityError: the archive breaks a rule; names the entry.
    """
    try:
        _check_directory_size(archive)
        with zipfile.ZipFile(archive) as source:
            for entry, relative in _checked_entries(source.infolist()):
                _copy(source, entry, into / relative)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise IntegrityError(f"{archive.name} is not a sound zip: {error}") from error
    except OSError as error:
        raise IntegrityError(f"cannot unpack {archive.name}: {error.strerror or error}") from error


def _check_directory_size(archive: Path) -> None:
    """Refuse a central directory that would cost memory to parse, before zipfile parses all of it."""
    size = archive.stat().st_size
    if size > MAX_TOTAL_BYTES + MAX_DIRECTORY_BYTES:
        raise IntegrityError(f"{archive.name} has {size} bytes, over the cap of 2 GiB")
    with archive.open("rb") as stream:
        stream.seek(max(0, size - _END_BYTES - 65535 - _ZIP64_LOCATOR_BYTES))
        tail = stream.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise IntegrityError(f"{archive.name} is not a zip, or was cut short")
    if tail[max(0, at - _ZIP64_LOCATOR_BYTES) : at].startswith(_ZIP64_LOCATOR):
        raise IntegrityError(f"{archive.name} uses zip64, which no bundle needs")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    if directory > MAX_DIRECTORY_BYTES:
        raise IntegrityError(f"{archive.name} lists more than {MAX_FILES} files")


def _checked_entries(entries: list[zipfile.ZipInfo]) -> list[tuple[zipfile.ZipInfo, str]]:
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_FILES or total > MAX_TOTAL_BYTES:
        raise IntegrityError(_cap_message(len(entries), total))
    files = [entry for entry in entries if _checked_kind(entry)]
    check_names([entry.filename for entry in files])
    tops = {entry.filename.partition("/")[0] for entry in files}
    if len(tops) != 1 or not all("/" in entry.filename for entry in files):
        raise IntegrityError("the zip of a bundle must hold exactly one top folder")
    return [(entry, entry.filename.partition("/")[2]) for entry in files]


def _checked_kind(entry: zipfile.ZipInfo) -> bool:
    """True for a file, False for a folder; anything else is refused."""
    name = entry.filename
    if entry.orig_filename != name:  # zipfile cuts a name at NUL: two names for one entry
        raise IntegrityError(f"entry {entry.orig_filename!r} has a name that reads in two ways")
    if entry.flag_bits & 0x1:
        raise IntegrityError(f"entry {name!r} must not be encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise IntegrityError(f"entry {name!r} must be stored or deflated")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if entry.is_dir():
        check_names([name.rstrip("/")])
        if kind not in (0, stat.S_IFDIR) or entry.file_size:
            raise IntegrityError(f"entry {name!r} must be a plain folder")
        return False
    if kind not in (0, stat.S_IFREG):
        raise IntegrityError(f"entry {name!r} must be a regular file, not a link or a device")
    if entry.file_size > MAX_RATIO * max(1, entry.compress_size):
        raise IntegrityError(
            f"entry {name!r} unpacks to over {MAX_RATIO} times its packed size "
            f"({entry.compress_size} to {entry.file_size} bytes)"
        )
    return True


def _copy(source: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with source.open(entry) as packed, path.open("xb") as out:
        while piece := packed.read(_PIECE):
            written += len(piece)
            if written > entry.file_size:
                raise IntegrityError(f"entry {entry.filename!r} is larger than it says")
            out.write(piece)
    if written != entry.file_size:
        raise IntegrityError(f"entry {entry.filename!r} is shorter than it says")


def _cap_message(files: int, total: int) -> str:
    return f"a bundle must hold at most {MAX_FILES} files and 2 GiB, but has {files} and {total} bytes or more"
