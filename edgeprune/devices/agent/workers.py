"""The agent's end of its worker processes: start one, ask it something with a limit, and tell why it died."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List

from .engines import FOLDER_VARIABLE
from .machine import read_text
from .wire import MAX_BLOB_BYTES, MAX_HEADER_BYTES, Message, Refused, frame

LOOK_S = 0.5  # how often the link is looked after while a worker works
MAX_TAIL_BYTES = 4096
SLOW_FACTOR = 10.0  # a worker may take ten times what is expected, and the client's patience


class Cancelled(Exception):
    """The client gave up on the operation."""


class WorkerProcess:
    """A running worker.

    Args:
        python: the interpreter that has the runtime.
        program: the agent's own file.
        cpus: processors it may use; all when empty.
        attend: called about twice a second while it works; may raise :class:`Cancelled`.
        log: a file for what the runtime prints.
        patience_s: how much longer than ten times the expected time an answer may take.
    """

    def __init__(
        self,
        python: str,
        program: str,
        cpus: List[int],
        attend: Callable[[], None],
        log: str,
        patience_s: float,
    ) -> None:
        self._attend, self._log, self._patience_s = attend, log, patience_s
        self._buffer = bytearray()
        self._oom_kills = _oom_kills()
        argv = [python, "-B", program, "worker", str(os.getpid()), ",".join(map(str, cpus))]
        environment = dict(
            os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", ORT_DISABLE_TELEMETRY="1"
        )
        environment[FOLDER_VARIABLE] = os.path.join(os.path.dirname(log), "engines")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            errors = os.open(log, flags, 0o600)
        except OSError:  # a full disk, say: its last words are all that is lost
            errors = os.open(os.devnull, os.O_WRONLY)
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise Refused("runtime", "cannot start %s: %s" % (python, error.strerror)) from error
        finally:
            os.close(errors)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._in, self._out = self._child.stdin, self._child.stdout
        os.set_blocking(self._in.fileno(), False)
        self.pid = self._child.pid

    def ask(self, header: Dict[str, Any], blob: bytes = b"", expected_s: float = 0.0) -> Message:
        """The reply to one request.

        Raises:
            Refused: the worker's own refusal; ``timeout`` when it took too long and was killed; ``memory`` when the kernel killed it for
                memory; ``crash`` when it died otherwise.
            Cancelled: the client gave up; the worker was killed.
        """
        deadline = time.monotonic() + SLOW_FACTOR * expected_s + self._patience_s
        try:
            self._send(frame(header, blob), deadline)
            (size,) = struct.unpack(">I", self._take(4, deadline))
            if size > MAX_HEADER_BYTES:
                raise EOFError
            reply = json.loads(self._take(size, deadline).decode("utf-8"))
            (size,) = struct.unpack(">Q", self._take(8, deadline))
            if size > MAX_BLOB_BYTES:
                raise EOFError
            answer = self._take(size, deadline)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._death() from None
        except BaseException:
            self.end()
            raise
        if not reply.pop("ok", False):
            raise Refused(str(reply.get("kind", "fault")), str(reply.get("error", "")))
        return reply, answer

    def _send(self, content: bytes, deadline: float) -> None:
        view = memoryview(content)
        while view:
            self._wait(self._in.fileno(), selectors.EVENT_WRITE, deadline)
            view = view[os.write(self._in.fileno(), view[: 1 << 16]) :]

    def _take(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            self._wait(self._out.fileno(), selectors.EVENT_READ, deadline)
            piece = os.read(self._out.fileno(), 1 << 18)
            if not piece:
                raise EOFError
            self._buffer += piece
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _wait(self, handle: int, event: int, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(handle, event)
            while not selector.select(LOOK_S):
                self._attend()
                if time.monotonic() > deadline:
                    raise Refused("timeout", "the model did not answer in time and was ended")

    def _death(self) -> Refused:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        code = self._child.poll()
        self.end()
        said = self._last_words()
        if code is not None and code < 0:
            name = _signal_name(-code)
            if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
                return Refused(
                    "memory", "the board ran out of memory and ended the model's process"
                )
            return Refused("crash", "the model's process died of %s%s" % (name, said))
        return Refused("crash", "the model's process ended with code %s%s" % (code, said))

    def _last_words(self) -> str:
        try:
            with open(self._log, "rb") as stream:
                stream.seek(max(0, os.path.getsize(self._log) - MAX_TAIL_BYTES))
                lines = stream.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return ": " + lines[-1][:300] if lines else ""

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._child.poll() is None

    def end(self) -> None:
        """Kill the process and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._child.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(10)
        for stream in (self._in, self._out):
            with contextlib.suppress(OSError):
                stream.close()


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return "signal %d" % number
    meaning = {"SIGILL": ", an instruction that this processor lacks", "SIGSEGV": ", a bad address"}
    return "signal %d (%s%s)" % (number, name, meaning.get(name, ""))


def _oom_kills() -> int:
    """How many processes the kernel has ended for memory since it started; 0 where it does not count."""
    for line in (read_text("/proc/vmstat") or "").splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def own_python() -> str:
    """The interpreter that runs this program."""
    return sys.executable
