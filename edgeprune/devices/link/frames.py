"""The host's end of the agent's wire: frames over a :class:`~edgeprune.devices.link.pipe.Pipe`. What comes in is not trusted.

Success is an end frame with the number of the request, and nothing else: an output that ends, however cleanly, is a lost link. While the
board works it sends signs of life; when they stop, the link or the agent is dead, long before the work's own deadline.
"""

from __future__ import annotations

import json
import re
import struct
import threading
import time
from typing import Any

from edgeprune.devices.agent.wire import MAGIC, frame
from edgeprune.devices.link.pipe import Pipe
from edgeprune.errors import DeadlineExceeded, DeviceError, LinkLost, Unreachable

MAX_BANNER_BYTES = 64 * 1024
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_BLOB_BYTES = 256 * 1024 * 1024
SILENCE_S = 15.0  # the agent says every 2.5 s that it lives
STALL_S = 30.0  # a piece of an upload must be taken within this, however long the whole takes
PIECE_BYTES = 1 << 16
# C0, DEL and C1 controls, and the marks that reorder text: none may reach a terminal or a report from a device.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]+")
_CRASH_HINT = "run the command again; if it happens twice, the model may crash the runtime"


def clean(text: str, limit: int = 400) -> str:
    """Text from a device on one line: controls become one space each run, and only the last ``limit`` characters stay."""
    return _CONTROLS.sub(" ", text).strip()[-limit:].strip()


class Refusal(DeviceError):
    """The agent answered that it cannot; ``kind`` is its reason: ``load``, ``runtime``, ``input``, ``unsupported``, ``unknown-key`` ..."""

    def __init__(self, kind: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class Frames:
    """Requests to one agent, one at a time.

    Args:
        pipe: the stream to the agent; owned from here on.
        board: the device's name, for messages.
    """

    def __init__(self, pipe: Pipe, board: str) -> None:
        self._pipe = pipe
        self._board = board
        self._buffer = bytearray()
        self._number = 0
        self._sending = threading.Lock()

    def handshake(self, timeout_s: float) -> None:
        """Read past login banners to the agent's magic line.

        Raises:
            LinkLost: the connection broke.
            DeviceError: the agent did not start, or something printed more than 64 KiB instead.
            DeadlineExceeded: nothing came in time.
        """
        deadline = time.monotonic() + timeout_s
        while (found := self._buffer.find(MAGIC)) < 0 and len(self._buffer) <= MAX_BANNER_BYTES:
            piece = self._read(deadline)
            if not piece:
                tail = clean(self._pipe.stderr_tail())
                self.close()
                raise DeviceError(
                    f"the agent did not start on device {self._board!r}"
                    + (f": {tail}" if tail else ""),
                    hint="check python and workdir of the device",
                )
            self._buffer += piece
        if not 0 <= found <= MAX_BANNER_BYTES:
            self.close()
            raise DeviceError(
                f"device {self._board!r} printed more than {MAX_BANNER_BYTES} bytes before the agent answered",
                hint="silence what its login shell prints (.bashrc, motd)",
            )
        del self._buffer[: found + len(MAGIC)]

    def request(
        self, op: str, fields: dict[str, Any], blob: bytes = b"", *, work_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The reply to one request, without ``id`` and ``ok``.

        Args:
            op: the operation.
            fields: its arguments.
            blob: bytes that go with it.
            work_s: for the board's work. Sending and receiving have no total limit, but must not stall.

        Raises:
            Refusal: the agent answered that it cannot.
            LinkLost: the connection broke, or no sign of life came for 15 s.
            DeviceError: what was sent is not a reply.
            DeadlineExceeded: no reply in time.
        """
        self._number += 1
        header = {**fields, "op": op, "id": self._number}
        text = json.dumps(header, allow_nan=False)
        if len(text) > MAX_HEADER_BYTES:
            raise DeviceError(
                f"a request must be at most {MAX_HEADER_BYTES} bytes, got {len(text)}"
            )
        with self._sending:
            self._send(frame(header, blob))
        deadline = time.monotonic() + work_s
        while True:
            reply = self._header(self._take_block(">I", MAX_HEADER_BYTES, deadline, op, work_s))
            answer = self._take_block(">Q", MAX_BLOB_BYTES, None, op, work_s)
            if "event" not in reply:
                break
        if reply.pop("id", None) != self._number:
            raise self._nonsense("the reply belongs to another request")
        return self._checked(reply), answer

    def beat(self) -> None:
        """Tell the agent that this client lives, unless a request is being sent just now, which tells it too."""
        if self._sending.acquire(blocking=False):
            try:
                self._pipe.write(frame({"op": "beat"}), time.monotonic() + STALL_S)
            finally:
                self._sending.release()

    def _send(self, content: bytes) -> None:
        for start in range(0, len(content), PIECE_BYTES):
            try:
                piece = content[start : start + PIECE_BYTES]
                self._pipe.write(piece, time.monotonic() + STALL_S)
            except DeadlineExceeded as error:
                raise self._lost(f"took nothing for {STALL_S:.0f} s") from error
            except LinkLost:
                self.close()
                raise
            except DeviceError as error:
                raise self._gone() from error

    def _checked(self, header: dict[str, Any]) -> dict[str, Any]:
        ok = header.pop("ok", None)
        if ok is True:
            return header
        if ok is not False:
            raise self._nonsense("the reply does not say whether it went well")
        kind = clean(str(header.get("kind", "fault")), 40)
        raise Refusal(
            kind, f"device {self._board!r} answered: {clean(str(header.get('error', '')), 2000)}"
        )

    def _header(self, text: bytes) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        try:
            header = json.loads(text, parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            raise self._nonsense("the reply is not JSON") from error
        if not isinstance(header, dict):
            raise self._nonsense("the reply is not a JSON object")
        return header

    def _take_block(
        self, length_format: str, limit: int, deadline: float | None, op: str, work_s: float
    ) -> bytes:
        length_bytes = self._take(struct.calcsize(length_format), deadline, op, work_s)
        (length,) = struct.unpack(length_format, length_bytes)
        if length > limit:
            raise self._nonsense(f"a part must be at most {limit} bytes, but announces {length}")
        return self._take(length, None, op, work_s)

    def _take(self, n: int, deadline: float | None, op: str, work_s: float) -> bytes:
        while len(self._buffer) < n:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                self.close()
                raise DeadlineExceeded(
                    f"device {self._board!r} did not finish {op!r} within {work_s:.0f} s"
                )
            silence = now + SILENCE_S
            try:
                piece = self._read(silence if deadline is None else min(silence, deadline))
            except DeadlineExceeded as error:
                if deadline is not None and time.monotonic() >= deadline:
                    self.close()
                    raise DeadlineExceeded(
                        f"device {self._board!r} did not finish {op!r} within {work_s:.0f} s"
                    ) from error
                raise self._lost(f"was silent for {SILENCE_S:.0f} s") from error
            if not piece:
                raise self._gone()
            self._buffer += piece
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken

    def _read(self, deadline: float) -> bytes:
        try:
            return self._pipe.read(1 << 18, deadline)
        except (LinkLost, Unreachable):
            self.close()
            raise

    def _lost(self, what: str) -> LinkLost:
        self.close()
        return LinkLost(f"device {self._board!r}: the link is lost: it {what}", hint=_CRASH_HINT)

    def _gone(self) -> LinkLost:
        tail = clean(self._pipe.stderr_tail())
        self.close()
        return LinkLost(
            f"the agent on device {self._board!r} ended" + (f": {tail}" if tail else ""),
            hint=_CRASH_HINT,
        )

    def _nonsense(self, problem: str) -> DeviceError:
        # After one wrong frame the stream has no known position, so it is not read again.
        self.close()
        return DeviceError(f"device {self._board!r} sent something wrong: {problem}")

    def close(self) -> None:
        """End the agent by closing its stdin."""
        self._pipe.close()
