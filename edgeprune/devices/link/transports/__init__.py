"""The transport seam: one module a transport, found by its file name. See :class:`Transport`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeprune.errors import UnknownName
from edgeprune.records.device import Device

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


def names() -> list[str]:
    """Names of the transports that have a module here."""
    import edgeprune.devices.link.transports as package

    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
    )


def open_transport(device: Device) -> Transport:
    """A connection to the device, by the module that its ``transport`` names.

    Raises:
        UnknownName: no such transport.
        DeviceError: the device cannot be reached, is not the pinned one, or refuses the login.
    """
    if device.transport not in names():
        raise UnknownName("transport", device.transport, names())
    module = importlib.import_module(f"edgeprune.devices.link.transports.{device.transport}")
    opened: Transport = module.open_transport(device)
    return opened


__all__ = ["Completed", "Pipe", "Transport", "names", "open_transport"]
