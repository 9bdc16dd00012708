"""Is a bundle whole? Names, schema and hashes, checked before anything parses the model."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeprune.bundle.archive import check_names, extract, files_under
from edgeprune.bundle.manifest import (
    LABELS,
    MANIFEST,
    RECIPE,
    SIGNATURE,
    SUMS,
    TOLERANCE,
    GoldenFile,
    Manifest,
    Recipe,
)
from edgeprune.errors import DeviceError, IntegrityError
from edgeprune.formats.inside.outside import check_self_contained
from edgeprune.formats.shared.model_bytes import packed
from edgeprune.records.base import read_json
from edgeprune.records.files import sha256_bytes, sha256_file

MAX_MANIFEST_BYTES = 8 * 1024**2
MAX_SHOWN = 3
_SUMS_LINE = re.compile(r"^([0-9a-f]{64})  (.+)$")


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[Path]:
    """The folder of a bundle; a ``.zip`` is unpacked into a private folder that is removed at the end.

    Raises:
        IntegrityError: there is nothing at ``path``, or the zip breaks a rule of :func:`~edgeprune.bundle.archive.extract`.
        DeviceError: there is no folder for temporary files.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise IntegrityError(f"there is no bundle at {path}", hint="give its folder or its .zip")
    try:
        made = tempfile.TemporaryDirectory(prefix="edgeprune-bundle-")
    except OSError as error:
        raise DeviceError(
            f"this computer has no room to unpack {path.name}: {error.strerror or error}",
            hint="set TMPDIR to a folder that you can write",
        ) from error
    with made as scratch:
        extract(path, Path(scratch))
        yield Path(scratch)


def check_structure(folder: Path) -> Manifest:
    """The manifest, once every name in the folder is safe and the manifest follows its schema.

    Raises:
        IntegrityError: a link, an unsafe name, or a manifest that is missing or breaks a rule.
    """
    present = files_under(folder)
    for name in (MANIFEST, SUMS):
        if name not in present:
            inside = folder / "bundle" / name
            raise IntegrityError(
                f"the bundle must hold {name}, but {folder.resolve().name} does not",
                hint=f"that is a run: give {inside.parent}" if inside.is_file() else None,
            )
        if (folder / name).stat().st_size > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{name} must be at most {MAX_MANIFEST_BYTES} bytes")
    return read_json(Manifest, folder / MANIFEST)


def check_hashes(folder: Path, manifest: Manifest) -> int:
    """The number of files checked, once ``SHA256SUMS``, the manifest and the files all say the same.

    Raises:
        IntegrityError: a file is missing, extra or changed; names it.
    """
    present = set(files_under(folder)) - {SUMS, SIGNATURE}
    sums = _read_sums(folder / SUMS)
    listed = {file.path: file for file in manifest.files}
    for what, expected in ((SUMS, set(sums)), (MANIFEST, {*listed, MANIFEST})):
        _check_same(what, expected, present)
    for path in sorted(present):
        try:
            actual, size_bytes = sha256_file(folder / path), (folder / path).stat().st_size
        except OSError as error:
            raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
        if actual != sums[path] or (path in listed and actual != listed[path].sha256):
            raise IntegrityError(
                f"{path} is not what its digest says: expected {sums[path][:12]}..., got {actual[:12]}...",
                hint="copy the bundle again from its source",
            )
        if path in listed and size_bytes != listed[path].size_bytes:
            raise IntegrityError(f"{path} must have {listed[path].size_bytes} bytes")
    return len(present)


def check_small_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless the files that sample programs read repeat the manifest exactly.

    Raises:
        IntegrityError: names the file that says something else.
    """
    same = {
        RECIPE: read_json(Recipe, folder / RECIPE) == manifest.recipe(),
        TOLERANCE: read_json(GoldenFile, folder / TOLERANCE) == manifest.golden_file(),
        LABELS: (folder / LABELS).read_bytes() == labels_text(manifest.labels),
    }
    for path, equal in same.items():
        if not equal:
            raise IntegrityError(f"{path} does not say what {MANIFEST} says")


def read_model(folder: Path, manifest: Manifest) -> bytes:
    """The model, read once and checked once more, so that what is run is what was checked; a model that is a folder comes packed.

    Raises:
        IntegrityError: the content is not the manifest's, or a value of the model lies in another file.
    """
    path, parts = manifest.model.path, manifest.model_parts()
    pieces = [read_checked(folder, manifest, part) for part in parts or (path,)]
    content = pieces[0]
    if parts:
        start = len(path) + 1
        content = packed({p[start:]: piece for p, piece in zip(parts, pieces, strict=True)})
    if sha256_bytes(content) != manifest.model.sha256:
        raise IntegrityError(f"the files of {path} are not the model that the manifest names")
    size_bytes = sum(map(len, pieces))
    if size_bytes != manifest.model.size_bytes:
        raise IntegrityError(
            f"{path} must have the {manifest.model.size_bytes} bytes of size_bytes, but has {size_bytes}"
        )
    check_self_contained(manifest.model, content)
    return content


def read_checked(folder: Path, manifest: Manifest, path: str) -> bytes:
    """The content of a listed file, which is the content that the manifest lists.

    Raises:
        IntegrityError: it is not.
    """
    wanted = next(file.sha256 for file in manifest.files if file.path == path)
    try:
        content = (folder / path).read_bytes()
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
    if sha256_bytes(content) != wanted:
        raise IntegrityError(f"{path} is not what its digest says")
    return content


def sums_text(folder: Path) -> bytes:
    """``SHA256SUMS`` of a folder, in the format of the ``sha256sum`` program, sorted by path; all files but itself and the signature."""
    paths = [path for path in files_under(folder) if path not in (SUMS, SIGNATURE)]
    return "".join(f"{sha256_file(folder / path)}  {path}\n" for path in paths).encode()


def labels_text(labels: tuple[str, ...]) -> bytes:
    """``labels.txt``: one label a line, in the order of the model's outputs."""
    return "".join(f"{label}\n" for label in labels).encode()


def _read_sums(path: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{SUMS} is not UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        match = _SUMS_LINE.match(line)
        if match is None or match[2] in sums:
            raise IntegrityError(f"{SUMS} line {number} is not one digest and one new path")
        sums[match[2]] = match[1]
    check_names(list(sums))
    return sums


def _check_same(what: str, expected: set[str], present: set[str]) -> None:
    for verb, paths in (("is missing", expected - present), ("is not listed", present - expected)):
        if paths:
            shown = ", ".join(sorted(paths)[:MAX_SHOWN])
            more = f" and {len(paths) - MAX_SHOWN} more" if len(paths) > MAX_SHOWN else ""
            raise IntegrityError(f"{shown}{more} {verb} (compared with {what})")
