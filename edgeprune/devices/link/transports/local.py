"""Processes on this machine, without a shell and with a clean environment."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from edgeprune.devices.link.pipe import MAX_OUTPUT_BYTES, MAX_TAIL_BYTES, Completed
from edgeprune.errors import DeadlineExceeded, DeviceError, EdgepruneError, NoSpace
from edgeprune.records.device import Device
from edgeprune.records.files import write_bytes


class LocalPipe:
    """A child process in a session of its own, so that Ctrl-C reaches this program first."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        self._child = child
        self._stdin, self._stdout, self._stderr = child.stdin, child.stdout, child.stderr
        os.set_blocking(self._stdin.fileno(), False)
        self._tail = b""
        self._drain = threading.Thread(target=self._drain_stderr, daemon=True)
        self._drain.start()

    def _drain_stderr(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(self._stderr.fileno(), 1 << 16):
                self._tail = (self._tail + piece)[-MAX_TAIL_BYTES:]

    def _wait(self, stream: IO[bytes], event: int, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(stream, event)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                self.close()
                raise DeadlineExceeded("the process did not answer before its deadline")

    def write(self, content: bytes, deadline: float) -> None:
        """As :meth:`Pipe.write <edgeprune.devices.link.pipe.Pipe.write>`."""
        view = memoryview(content)
        try:
            while view:
                self._wait(self._stdin, selectors.EVENT_WRITE, deadline)
                view = view[os.write(self._stdin.fileno(), view) :]
        except (OSError, ValueError) as error:
            raise DeviceError("the process on this machine has ended") from error

    def read(self, n: int, deadline: float) -> bytes:
        """As :meth:`Pipe.read <edgeprune.devices.link.pipe.Pipe.read>`."""
        try:
            self._wait(self._stdout, selectors.EVENT_READ, deadline)
            return os.read(self._stdout.fileno(), n)
        except (OSError, ValueError):
            return b""

    def stderr_tail(self) -> str:
        """Last 16 KiB of stderr; waits a moment for a process that is just ending."""
        self._drain.join(0.5)
        return self._tail.decode(errors="replace")

    def close(self) -> None:
        """End the child and everything it started."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(0.5)
        _kill_session(self._child)
        self._drain.join(1)
        self._stdout.close()
        self._stderr.close()


class LocalTransport:
    """This machine."""

    def start(self, argv: Sequence[str]) -> LocalPipe:
        """As :meth:`Transport.start <edgeprune.devices.link.pipe.Transport.start>`."""
        return LocalPipe(_spawn(argv))

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """As :meth:`Transport.run <edgeprune.devices.link.pipe.Transport.run>`."""
        try:
            child = _spawn(argv)
        except DeviceError as error:
            return Completed(127, b"", str(error).encode())
        try:
            out, err = child.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(f"{argv[0]} ran longer than {timeout_s:g} s") from error
        finally:
            _kill_session(child)
        if len(out) + len(err) > MAX_OUTPUT_BYTES:
            raise DeviceError(f"{argv[0]} printed more than {MAX_OUTPUT_BYTES} bytes")
        if child.returncode < 0:
            raise DeviceError(f"{argv[0]!r} was ended by signal {-child.returncode}")
        return Completed(child.returncode, out, err)

    def put(self, content: bytes, remote_path: str) -> None:
        """As :meth:`Transport.put <edgeprune.devices.link.pipe.Transport.put>`."""
        path = Path(remote_path)
        try:
            # For its owner alone whatever the umask: what lies there is executed.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(path, content)
            path.chmod(0o600)
        except NoSpace as error:
            free = shutil.disk_usage(path.parent).free
            raise DeviceError(
                f"the disk of {remote_path!r} on this machine is full: {len(content)} bytes needed, {free} bytes available",
                hint="free space there, or set workdir of the device to another disk",
            ) from error
        except (EdgepruneError, OSError) as error:
            raise DeviceError(
                f"cannot write {remote_path!r} on this machine: {error}",
                hint="set workdir of the device to a folder that you can write",
            ) from error

    def get(self, remote_path: str) -> bytes:
        """As :meth:`Transport.get <edgeprune.devices.link.pipe.Transport.get>`."""
        try:
            return Path(remote_path).read_bytes()
        except OSError as error:
            raise DeviceError(f"cannot read {remote_path!r}: {error.strerror}") from error

    def close(self) -> None:
        """Nothing is held open."""


def _home() -> str:
    """The home folder of who runs this.

    Raises:
        DeviceError: there is none.
    """
    try:
        home = Path.home()
    except RuntimeError as error:  # no HOME, and no entry of the user
        raise DeviceError(
            "this machine does not say where the home folder is", hint="set HOME to a folder"
        ) from error
    if not home.is_dir():
        raise DeviceError(
            f"the home folder {str(home)!r} is not there", hint="set HOME to a folder that is"
        )
    return str(home)


def _spawn(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": _home(),
        "LANG": "C.UTF-8",
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime reports by default; a measurement should not
    }
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
    except (OSError, ValueError) as error:
        raise DeviceError(f"cannot start {argv[0]!r}: {error}") from error


def _kill_session(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs, with its whole group. The id of one that was waited for may already be another's."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def open_transport(device: Device) -> LocalTransport:
    """This machine needs no connection."""
    return LocalTransport()
