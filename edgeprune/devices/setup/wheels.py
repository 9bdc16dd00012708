"""Pinned wheels on this computer: from a folder of yours, from the cache, or by pip; never one whose bytes are not the pinned ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from edgeprune.devices.setup.runtime_pins import Wheel
from edgeprune.errors import DeviceError, IntegrityError, SpecError
from edgeprune.progress import Progress
from edgeprune.records.files import atomic_path, sha256_file

DOWNLOAD_S = 1800.0  # for one wheel of at most 22 MB, on a very slow link


def cache_folder() -> Path:
    """Where wheels are kept. The XDG base directory rules say to ignore a relative ``XDG_CACHE_HOME``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "edgeprune" / "wheels"


def fetch(
    pins: Iterable[Wheel], cache: Path, progress: Progress, *, folder: Path | None = None
) -> dict[str, Path]:
    """The files of these wheels, by SHA-256, each with the pinned bytes.

    Args:
        pins: what is wanted.
        cache: wheels of earlier calls; see :func:`cache_folder`.
        progress: shows one bar.
        folder: files of the user, searched first: the way for a computer without a network.

    Raises:
        IntegrityError: a wheel in ``folder``, or one that was downloaded, is not the pinned one.
        SpecError: ``folder`` is no folder, or the cache cannot be written.
        DeviceError: a wheel is nowhere to be had; the hint names it and where to put it.
    """
    if folder is not None and not folder.is_dir():
        raise SpecError(f"wheels must be a folder, but {folder} is not")
    wanted = {wheel.sha256: wheel for wheel in pins}
    found = {}
    with progress.bar("collecting wheels", len(wanted)) as bar:
        for sha256, wheel in wanted.items():
            found[sha256] = _one(wheel, cache, folder)
            bar.advance(1, wheel.file)
    return found


def _one(wheel: Wheel, cache: Path, folder: Path | None) -> Path:
    given = folder / wheel.file if folder is not None else None
    if given is not None and given.is_file():
        if not _is_pinned(given, wheel):
            raise _altered(given, wheel, hint="put the pinned file there, or take it away")
        return given
    kept = cache / wheel.sha256 / wheel.file
    if _is_pinned(kept, wheel):
        return kept
    kept.unlink(missing_ok=True)  # damaged, or altered by someone
    with tempfile.TemporaryDirectory(prefix="edgeprune-wheel-") as temporary:
        fresh = _download(wheel, Path(temporary), folder)
        if not _is_pinned(fresh, wheel):
            raise _altered(fresh, wheel, hint="whoever served it altered it; do not use that index")
        with atomic_path(kept) as part:
            shutil.copyfile(fresh, part)
    return kept


def _is_pinned(path: Path, wheel: Wheel) -> bool:
    try:
        return path.stat().st_size == wheel.size_bytes and sha256_file(path) == wheel.sha256
    except OSError:
        return False


def _altered(path: Path, wheel: Wheel, hint: str) -> IntegrityError:
    return IntegrityError(
        f"{wheel.file} must have {wheel.size_bytes} bytes and sha256 {wheel.sha256[:16]}...,"
        f" but has {path.stat().st_size} bytes and {sha256_file(path)[:16]}...",
        hint=hint,
    )


def _download(wheel: Wheel, into: Path, folder: Path | None) -> Path:
    """One wheel by this Python's pip, with the user's own index, proxy and certificates. pip checks the hash, and we do again."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-input", "--no-deps", "--only-binary=:all:", "--require-hashes"),
        *(*_tags(wheel), f"--dest={into}", f"--requirement={requirements}"),
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=DOWNLOAD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _missing(wheel, f"pip took over {DOWNLOAD_S:.0f} s", folder) from error
    path = into / wheel.file
    if done.returncode == 0 and path.is_file():
        return path
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise IntegrityError(
            f"the {wheel.file} that pip finds is not the pinned one",
            hint="whoever served it altered it; do not use that index",
        )
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = lines[-1] if lines else (done.stderr.strip().splitlines() or ["it found none"])[-1]
    raise _missing(wheel, re.sub(r"\s+", " ", reason)[:200], folder)


def _tags(wheel: Wheel) -> list[str]:
    """Flags that make pip choose for the board instead of for this computer."""
    if not wheel.python.startswith("cp"):
        return []
    version = f"{wheel.python[2]}.{wheel.python[3:]}"
    platforms = [f"--platform={platform}" for platform in wheel.platforms]
    return [*platforms, "--implementation=cp", f"--python-version={version}"]


def _missing(wheel: Wheel, reason: str, folder: Path | None) -> DeviceError:
    place = str(folder) if folder is not None else "a folder"
    return DeviceError(
        f"cannot get {wheel.file}: pip says: {reason}",
        hint=f"without a network, put that file into {place} and name the folder with --wheels",
    )
