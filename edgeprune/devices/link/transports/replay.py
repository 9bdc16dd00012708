"""A recording instead of a board: requests are answered as the board answered them, without any process or connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from edgeprune.devices.agent.wire import MAGIC, frame
from edgeprune.devices.link.exchanges import RECORDED, FrameStream, Message, Requests
from edgeprune.devices.link.pipe import Completed
from edgeprune.devices.link.recording import Recording, recording_path, uncovered
from edgeprune.errors import DeadlineExceeded, DeviceError, IntegrityError
from edgeprune.records.device import Device

# What is between a client and a board, and no board's work: any board would say this.
_USUAL: dict[str, dict[str, Any]] = {
    "lease": {"lease_file": ""},
    "release": {},
    "bye": {},
    "unload": {},
    "who": {"owner": None},
    "tune": {"changed": []},
    "restore": {"restored": []},
    "cache_state": {"have": True, "offset": 0, "prefix_sha256": ""},
    "cache_write": {"done": True},
    "ready": {"reasons": [], "telemetry": {}},
}


class ReplayPipe:
    """Talks like an agent. The same request several times gets the recorded replies in their order, then the last one again."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._requests = Requests()
        self._stream = FrameStream(keeps_blobs=False, has_banner=False)
        self._times_asked: dict[str, int] = {}
        self._output = bytearray(MAGIC)
        self._is_closed = False
        self._changed = threading.Condition()

    def write(self, content: bytes, deadline: float) -> None:
        """As :meth:`Pipe.write <edgeprune.devices.link.pipe.Pipe.write>`."""
        with self._changed:
            if self._is_closed:
                raise DeviceError("the replay was closed")
            for message in self._stream.feed(content):
                number = message.header.get("id")
                if isinstance(number, int):  # a sign of life or a cancellation has no answer
                    self._output += self._framed(number, message)
            self._changed.notify_all()

    def _framed(self, number: int, message: Message) -> bytes:
        header, blob = self._answer(message)
        try:
            return frame({**header, "id": number}, blob)
        except (ValueError, RecursionError):
            header, blob = _refusal(
                "damaged", f"{self._recording.path} has an answer that is no JSON"
            )
            return frame({**header, "id": number}, blob)

    def _answer(self, message: Message) -> tuple[dict[str, Any], bytes]:
        op = str(message.header.get("op", ""))
        request = self._requests.seen(message)
        if op == "hello":
            return {"ok": True, **self._recording.origin.hello.model_dump(mode="json")}, b""
        if op in _USUAL:
            return {"ok": True, **_USUAL[op]}, b""
        if request is None:
            return _refusal("unsupported", f"a recording answers {', '.join(RECORDED)}, not {op}")
        known = self._recording.answers.get(request.digest)
        if not known:
            return _refusal("uncovered", uncovered(self._recording, request))
        asked = self._times_asked.get(request.digest, 0)
        self._times_asked[request.digest] = asked + 1
        try:
            return self._recording.answer(known[min(asked, len(known) - 1)])
        except (IntegrityError, ValueError) as error:
            return _refusal("damaged", str(error))

    def read(self, n: int, deadline: float) -> bytes:
        """As :meth:`Pipe.read <edgeprune.devices.link.pipe.Pipe.read>`."""
        with self._changed:
            while not self._output:
                if self._is_closed:
                    return b""
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    self._is_closed = True
                    raise DeadlineExceeded("nothing was asked of the replay")
            taken = bytes(self._output[:n])
            del self._output[:n]
            return taken

    def stderr_tail(self) -> str:
        """Nothing: there is no process."""
        return ""

    def close(self) -> None:
        """Answer no more."""
        with self._changed:
            self._is_closed = True
            self._output.clear()
            self._changed.notify_all()


class ReplayTransport:
    """A recorded board. It runs no commands and has no files."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def start(self, argv: Sequence[str]) -> ReplayPipe:
        """A conversation with the recorded agent, whatever the command."""
        return ReplayPipe(self._recording)

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Always a ``DeviceError``."""
        self._refuse(f"run {argv[0]!r}")

    def put(self, content: bytes, remote_path: str) -> None:
        """Always a ``DeviceError``."""
        self._refuse(f"write {remote_path!r}")

    def get(self, remote_path: str) -> bytes:
        """Always a ``DeviceError``."""
        self._refuse(f"read {remote_path!r}")

    def _refuse(self, what: str) -> NoReturn:
        raise DeviceError(
            f"cannot {what}: a replay of a recording runs no commands and has no files",
            hint="use the board that was recorded",
        )

    def close(self) -> None:
        """Close the recording."""
        self._recording.close()


def _refusal(kind: str, text: str) -> tuple[dict[str, Any], bytes]:
    return {"ok": False, "kind": kind, "error": text}, b""


def open_transport(device: Device) -> ReplayTransport:
    """The recording of a device.

    Raises:
        SpecError: there is no such file.
        IntegrityError: it is damaged, or no recording.
    """
    return ReplayTransport(Recording(recording_path(device)))
