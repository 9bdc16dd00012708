"""Kernel times of earlier searches on the same board, kept by this computer: one file for each board and set-up in the user's cache folder.

Nothing here fails a search: what cannot be read is measured anew, and what cannot be written is not kept; either is said in one line.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from edgeprune.errors import EdgepruneError, IntegrityError
from edgeprune.plan.latency.kernel_times import KernelTime, KernelTimes, read_times, write_times
from edgeprune.records.formats import FormatName
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.paths import user_folder
from edgeprune.records.version import VERSION

SWITCH = "EDGEPRUNE_NO_CACHED_TIMES"  # set to anything but nothing: no times are kept or taken
# Boards drift: dust, summer, a tired power supply. A fingerprint sees the kind of board and its software, and none of these.
MAX_AGE = timedelta(days=7)
# The names of the files that stand here, and of the folders that they stand in; nothing else is ever removed.
_FILE = re.compile(r"[0-9a-f]{16}-[a-z]+-(fp32|int8)\.json")
_FOLDER = re.compile(r"[0-9]+(\.[0-9]+)+[0-9a-z.+]*")
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def now_text() -> str:
    """This moment, as ``created`` of :class:`.KernelTimes` has it."""
    return datetime.now(timezone.utc).strftime(TIME_FORMAT)


def cache_folder() -> Path:
    """Where the files lie. Those of another version are apart: it may time otherwise, and the fingerprint does not tell."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "kernel-times" / VERSION


def remove_expired(root: Path) -> None:
    """Remove the files that are too old for any search, of other versions, too, and folders of other versions that are empty then.

    A file is as old as its last change, and its times are older. Only plain files with the names of this module go; what cannot be looked
    at or removed stays. One that another process writes anew just then may be lost: it is timed again one day.
    """
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if _FOLDER.fullmatch(folder.name) and not folder.is_symlink() and folder.is_dir():
                _remove_expired_of(folder)


def _remove_expired_of(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                found = path.lstat()
                is_old = time.time() - found.st_mtime > MAX_AGE.total_seconds()
                if is_old and stat.S_ISREG(found.st_mode) and _FILE.fullmatch(path.name):
                    path.unlink()
        if folder.name != VERSION:
            folder.rmdir()  # refused where anything is left


@dataclass(frozen=True)
class TimesCache:
    """The file of one board and set-up, whether or not there is one yet. ``say`` is told in one line of what does not work."""

    path: Path
    fingerprint: Fingerprint
    precision: Precision
    format: FormatName
    say: Callable[[str], None]

    def read(self) -> KernelTimes | None:
        """What is known, if it is at most seven days old."""
        try:
            return self._fresh()
        except (EdgepruneError, OSError) as error:
            what = error.message if isinstance(error, EdgepruneError) else error.strerror
            self.say(f"note: earlier kernel times cannot be used and are measured anew: {what}")
            return None

    def keep(self, times: tuple[KernelTime, ...], created: str) -> None:
        """Add times, the oldest of which was taken at ``created``; files that are too old go, of other boards and versions, too.

        The file is written whole or not at all. Of two processes that write at once the later one wins: what the other has timed is timed
        again one day.
        """
        new = KernelTimes(
            created=created,
            fingerprint=self.fingerprint,
            precision=self.precision,
            format=self.format,
            times=times,
        )
        earlier = None
        with contextlib.suppress(EdgepruneError, OSError):  # the one who reads it says so
            earlier = self._fresh()
        try:
            write_times(self.path, earlier, new)
        except EdgepruneError as error:
            self.say(f"note: kernel times are not kept for later searches: {error.message}")
        remove_expired(self.path.parent.parent)

    def _fresh(self) -> KernelTimes | None:
        """The file, unless it is too old.

        Raises:
            IntegrityError, SpecError, OSError: it cannot be read, or is not what stands in its name.
        """
        found = read_times(self.path)
        if found is None:
            return None
        found.check(self.fingerprint, self.precision, self.format, self.path)
        try:
            taken = datetime.strptime(found.created, TIME_FORMAT).replace(tzinfo=timezone.utc)
        except ValueError as error:
            raise IntegrityError(
                f"{self.path} does not say when its times were taken: {found.created!r:.40}"
            ) from error
        # Times of the future are of a clock that was wrong: how old they are is unknown.
        age = datetime.now(timezone.utc) - taken
        return found if timedelta(0) <= age <= MAX_AGE else None


def open_cache(
    fingerprint: Fingerprint, precision: Precision, form: FormatName, say: Callable[[str], None]
) -> TimesCache | None:
    """What this computer keeps of a board and set-up.

    ``None`` where the user wants nothing kept, this computer has no place for it, or the board is emulated: such times mean nothing.
    """
    if os.environ.get(SWITCH) or fingerprint.stamp == "emulated":
        return None
    try:
        path = cache_folder() / f"{fingerprint.key()}-{form}-{precision}.json"
    except RuntimeError:  # nobody's home
        return None
    return TimesCache(path, fingerprint, precision, form, say)
