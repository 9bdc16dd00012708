"""What every transport offers: commands on a device, and the byte stream to a running one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_OUTPUT_BYTES = 256 * 1024 * 1024
MAX_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True)
class Completed:
    """A command that ended by itself: its exit code and all it printed. A shell's code for "no such command" is 127."""

    code: int
    stdout: bytes
    stderr: bytes


class Pipe(Protocol):
    """The duplex byte stream to a running process. Deadlines are absolute, in seconds of :func:`time.monotonic`."""

    def write(self, content: bytes, deadline: float) -> None:
        """Send all of it.

        Raises:
            DeadlineExceeded: not taken in time; the pipe is unusable afterwards.
            LinkLost: the connection broke.
            DeviceError: the process is gone.
        """
        ...

    def read(self, n: int, deadline: float) -> bytes:
        """At least 1 and at most ``n`` bytes; ``b""`` when the process ended.

        Raises:
            DeadlineExceeded: nothing came in time; the pipe is unusable afterwards.
            LinkLost: the connection broke, which is no end of the output.
        """
        ...

    def stderr_tail(self) -> str:
        """The last lines of the process's stderr, raw: strip control characters before showing them."""
        ...

    def close(self) -> None:
        """Close stdin and stop listening; a process on this machine is also ended."""
        ...


class Transport(Protocol):
    """A way to run commands on a device. Commands are argument lists; paths are absolute."""

    def start(self, argv: Sequence[str]) -> Pipe:
        """Start a process to talk to. Raises :class:`~edgeprune.errors.DeviceError`."""
        ...

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run a command to its end.

        Raises:
            DeadlineExceeded: it ran longer than ``timeout_s`` in total, whatever it printed meanwhile; the connection may be cut.
            LinkLost: the connection broke before an exit code came.
            DeviceError: a signal ended it, or it printed over 256 MiB.
        """
        ...

    def put(self, content: bytes, remote_path: str) -> None:
        """Write a file for its owner alone: complete or not at all. Folders above it are made.

        Raises:
            DeadlineExceeded: nothing moved for 30 s, or far too little in total.
            LinkLost: the connection broke; the file may be there, complete, or not.
            DeviceError: the disk is full or cannot be written; the message says which.
        """
        ...

    def get(self, remote_path: str) -> bytes:
        """Content of a file. Raises as :meth:`put`."""
        ...

    def close(self) -> None:
        """Free the connection; harmless when it is already closed."""
        ...
