"""One client at a time: a kernel lock on a file that every user of the board shares.

The kernel frees the lock when its holder dies, whatever it died of, so there is no stale lock to clean up. What the file says is only for
messages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import sys
import time
from typing import Any, Dict, List, Optional

from .machine import boot_id, read_text
from .telemetry import run
from .wire import Refused

MAX_OWNER_BYTES = 4096
GRACE_S = 3.0


class Lease:
    """The lock on the board.

    Args:
        paths: where it may lie; the first whose folder can be used is taken, and every client must name the same ones.
    """

    def __init__(self, paths: List[str]) -> None:
        self._handle = _open_shared(paths)
        self.path = _path_of(self._handle, paths)
        self.held = False

    def acquire(self, owner: Dict[str, Any], session: str) -> None:
        """Take the lock, also from an earlier connection of the same session.

        Raises:
            Refused: ``busy``, with the holder as JSON, when another session has it; ``lease`` when this board has no place for a lock.
        """
        if self.held:
            return
        if self._handle < 0:
            raise Refused("lease", "no lock file can be made on this board")
        if not self._try():
            holder = self.owner() or {}
            if holder.get("session") != session:
                raise Refused("busy", json.dumps(holder))
            self.end_holder()
            if not self._try_for(GRACE_S):
                raise Refused("busy", json.dumps(holder))
        self._write(dict(owner, pid=os.getpid(), session=session))

    def _try(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise Refused("lease", "cannot lock %s: %s" % (self.path, error.strerror)) from error
        self.held = True
        return True

    def _try_for(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _write(self, owner: Dict[str, Any]) -> None:
        entry = dict(owner, boot_id=boot_id(), since_boot_s=_since_boot_s())
        with contextlib.suppress(OSError):  # a file of another user that only allows to be locked
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(entry).encode()[:MAX_OWNER_BYTES], 0)

    def release(self) -> None:
        """Let others have the board."""
        if self.held:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            self.held = False

    def is_taken(self) -> bool:
        """Whether anybody holds the lock, this process included."""
        if self.held or self._handle < 0:
            return self.held
        if self._try():
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            self.held = False
            return False
        return True

    def owner(self) -> Optional[Dict[str, Any]]:
        """Who holds the lock, as they said; ``None`` when nobody does. Only for messages: any user can write the file."""
        if not self.is_taken():
            return None
        found: Dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(os.pread(self._handle, MAX_OWNER_BYTES, 0).decode("utf-8"))
            found = entry if isinstance(entry, dict) else {}
        since = found.get("since_boot_s")
        is_recent = found.get("boot_id") == boot_id() and isinstance(since, float)
        pid = found.get("pid")
        texts = {name: str(found.get(name, ""))[:100] for name in ("user", "host", "job")}
        return dict(
            texts,
            session=re.sub(r"[^0-9a-f]", "", str(found.get("session", "")))[:64],
            pid=pid if isinstance(pid, int) and 0 < pid < 2**31 else 0,
            since_s=max(0.0, _since_boot_s() - float(since or 0.0)) if is_recent else 0.0,
        )

    def end_holder(self) -> bool:
        """Ask the agent that holds the lock to stop, then make it; gives whether the lock is free now.

        Only an agent of the same user can be ended; the kernel sees to that.
        """
        holder = self.owner()
        pid = holder["pid"] if holder else 0
        if not holder or pid == os.getpid() or not _is_agent(pid):
            return not self.is_taken()
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                break
            deadline = time.monotonic() + GRACE_S
            while self.is_taken() and time.monotonic() < deadline:
                time.sleep(0.05)
            if not self.is_taken():
                return True
        return not self.is_taken()


def _path_of(handle: int, paths: List[str]) -> str:
    """The path that was opened, ``""`` for none; by its links in /proc, or, where there is no /proc, by its identity."""
    if handle < 0:
        return ""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/fd/%d" % handle)
    for path in paths:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                return path
    return ""


def _is_agent(pid: int) -> bool:
    """Whether a process looks like an agent: what the lock file says of it is only somebody's word."""
    command = (read_text("/proc/%d/cmdline" % pid) or "").split("\0")
    if command == [""] and sys.platform == "darwin":
        command = (run("/", "/bin/ps", "-p", str(pid), "-o", "command=") or "").split()
    return any(re.search(r"agent-[0-9a-f]{16}\.pyz\Z", part) for part in command)


def _since_boot_s() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _open_shared(paths: List[str]) -> int:
    """A handle of the first path that can be opened or made, or -1.

    An existing file is opened without ``O_CREAT`` first: in a sticky folder the kernel refuses that flag for files of other users
    (``fs.protected_regular``).
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    for path in paths:
        for mode in (os.O_RDWR, os.O_RDONLY):
            with contextlib.suppress(OSError):
                return os.open(path, mode | flags)
        with contextlib.suppress(OSError):
            if os.path.basename(os.path.dirname(path)) != "lock":
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
            os.fchmod(handle, 0o666)  # whatever the umask: other users must be able to lock it
            return handle
        with contextlib.suppress(OSError):  # somebody made it meanwhile
            return os.open(path, os.O_RDWR | flags)
    return -1
