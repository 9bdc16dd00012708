"""The host's end of the agent's wire: frames over a :class:`~edgeprune.devices.transports.Pipe`. What comes in is not trusted."""

from __future__ import annotations

import json
import re
import struct
import time
from typing import Any

from edgeprune.devices.transports import Pipe
from edgeprune.errors import DeadlineExceeded, DeviceError, LinkLost

MAGIC = b"\0edgeprune-agent/1\n"
MAX_BANNER_BYTES = 64 * 1024
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_BLOB_BYTES = 256 * 1024 * 1024
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

    def handshake(self, timeout_s: float) -> None:
        """Read past login banners to the agent's magic line.

        Raises:
            DeviceError: the agent did not start, or something printed more than 64 KiB instead.
            DeadlineExceeded: nothing came in time.
        """
        deadline = time.monotonic() + timeout_s
        while (found := self._buffer.find(MAGIC)) < 0 and len(self._buffer) <= MAX_BANNER_BYTES:
            self._receive(deadline, hint="check python and workdir of the device")
        if not 0 <= found <= MAX_BANNER_BYTES:
            self.close()
            raise DeviceError(
                f"device {self._board!r} printed more than {MAX_BANNER_BYTES} bytes before the agent answered",
                hint="silence what its login shell prints (.bashrc, motd)",
            )
        del self._buffer[: found + len(MAGIC)]

    def request(
        self, op: str, fields: dict[str, Any], blob: bytes = b"", *, timeout_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The reply to one request, without ``id`` and ``ok``.

        Args:
            op: the operation.
            fields: its arguments.
            blob: bytes that go with it.
            timeout_s: for everything: sending, the work, receiving.

        Raises:
            Refusal: the agent answered that it cannot.
            DeviceError: the agent is gone, or what it sent is not a reply.
            DeadlineExceeded: no full reply in time.
        """
        self._number += 1
        deadline = time.monotonic() + timeout_s
        text = json.dumps({**fields, "op": op, "id": self._number}, allow_nan=False).encode()
        if len(text) > MAX_HEADER_BYTES:
            raise DeviceError(
                f"a request must be at most {MAX_HEADER_BYTES} bytes, got {len(text)}"
            )
        head = struct.pack(">I", len(text)) + text + struct.pack(">Q", len(blob))
        try:
            self._send(head + blob, deadline)
            header = self._header(self._take_block(">I", MAX_HEADER_BYTES, deadline))
            answer = self._take_block(">Q", MAX_BLOB_BYTES, deadline)
        except DeadlineExceeded as error:
            self.close()
            raise DeadlineExceeded(
                f"device {self._board!r} did not finish {op!r} within {timeout_s:.0f} s"
            ) from error
        if header.pop("id", None) != self._number:
            raise self._nonsense("the reply belongs to another request")
        return self._checked(header), answer

    def _send(self, content: bytes, deadline: float) -> None:
        try:
            self._pipe.write(content, deadline)
        except (DeadlineExceeded, LinkLost):
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
            kind, f"device {self._board!r} answered: {clean(str(header.get('error', '')))}"
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

    def _take_block(self, length_format: str, limit: int, deadline: float) -> bytes:
        length_bytes = self._take(struct.calcsize(length_format), deadline)
        (length,) = struct.unpack(length_format, length_bytes)
        if length > limit:
            raise self._nonsense(f"a part must be at most {limit} bytes, but announces {length}")
        return self._take(length, deadline)

    def _take(self, n: int, deadline: float) -> bytes:
        while len(self._buffer) < n:
            self._receive(deadline)
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken

    def _receive(self, deadline: float, hint: str = _CRASH_HINT) -> None:
        piece = self._pipe.read(1 << 18, deadline)
        if not piece:
            raise self._gone(hint)
        self._buffer += piece

    def _gone(self, hint: str = _CRASH_HINT) -> DeviceError:
        tail = clean(self._pipe.stderr_tail())
        self.close()
        return DeviceError(
            f"the agent on device {self._board!r} ended" + (f": {tail}" if tail else ""),
            hint=hint,
        )

    def _nonsense(self, problem: str) -> DeviceError:
        # After one wrong frame the stream has no known position, so it is not read again.
        self.close()
        return DeviceError(f"device {self._board!r} sent something wrong: {problem}")

    def close(self) -> None:
        """End the agent by closing its stdin."""
        self._pipe.close()
