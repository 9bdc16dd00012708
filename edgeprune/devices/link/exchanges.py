"""Requests and replies as they pass over the wire, and which of them mean the same: what recording and replaying share.

Two requests are the same when they ask for the same work on the same content: numbers, patience and what the client says of itself do not
count, and models count by their files, not by the keys they were loaded under.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgeprune.devices.agent.wire import MAGIC
from edgeprune.devices.link.frames import MAX_BANNER_BYTES, MAX_BLOB_BYTES, MAX_HEADER_BYTES, clean
from edgeprune.errors import DeviceError
from edgeprune.records.files import digest_of

# The work of a board; all else is bookkeeping between a client and a board.
RECORDED = ("runtime", "load", "load_many", "time", "infer", "profile")
_NOT_CONTENT = {"id", "op", "op_id", "session", "client", "limits", "expected_s"}
_SHOWN_KEYS = 4


@dataclass(frozen=True)
class Message:
    """One frame. ``blob`` is empty where only its digest was asked for."""

    header: dict[str, Any]
    blob: bytes
    blob_sha256: str


class FrameStream:
    """Frames out of a byte stream that comes in pieces of any size.

    Args:
        keeps_blobs: whether the blobs are wanted, or only their digests.
        has_banner: whether a magic line, and perhaps text before it, comes first.
    """

    def __init__(self, *, keeps_blobs: bool, has_banner: bool) -> None:
        self._keeps_blobs = keeps_blobs
        self._is_in_banner = has_banner
        self._buffer = bytearray()
        self._header: dict[str, Any] | None = None
        self._missing = 0
        self._digest = hashlib.sha256()
        self._blob = bytearray()

    def feed(self, content: bytes) -> Iterator[Message]:
        """The frames that these bytes complete.

        Raises:
            DeviceError: a part is larger than the wire allows, or a header is no JSON object.
        """
        self._buffer += content
        if self._is_in_banner and not self._skip_banner():
            return
        while True:
            if self._header is None and not self._start():
                return
            taken = self._buffer[: self._missing]
            del self._buffer[: len(taken)]
            self._missing -= len(taken)
            self._digest.update(taken)
            if self._keeps_blobs:
                self._blob += taken
            if self._missing:
                return
            assert self._header is not None
            yield Message(self._header, bytes(self._blob), self._digest.hexdigest())
            self._header = None

    def _skip_banner(self) -> bool:
        found = self._buffer.find(MAGIC)
        if found >= 0:
            del self._buffer[: found + len(MAGIC)]
            self._is_in_banner = False
        elif len(self._buffer) > MAX_BANNER_BYTES + len(MAGIC):
            raise DeviceError("the stream does not begin with the agent's magic line")
        return found >= 0

    def _start(self) -> bool:
        """Take a header and the length of its blob, when both are complete."""
        if len(self._buffer) < 4:
            return False
        (size,) = struct.unpack_from(">I", self._buffer)
        if size > MAX_HEADER_BYTES:
            raise DeviceError(f"a header must be at most {MAX_HEADER_BYTES} bytes, but has {size}")
        if len(self._buffer) < 12 + size:
            return False
        try:
            header = json.loads(self._buffer[4 : 4 + size])
        except (ValueError, RecursionError) as error:
            raise DeviceError("a header is not JSON") from error
        if not isinstance(header, dict):
            raise DeviceError("a header is not a JSON object")
        (self._missing,) = struct.unpack_from(">Q", self._buffer, 4 + size)
        if self._missing > MAX_BLOB_BYTES:
            raise DeviceError(
                f"a blob must be at most {MAX_BLOB_BYTES} bytes, but has {self._missing}"
            )
        del self._buffer[: 12 + size]
        self._header, self._blob, self._digest = header, bytearray(), hashlib.sha256()
        return True


@dataclass(frozen=True)
class Request:
    """What was asked for. ``digest`` is the same for requests that mean the same; ``text`` is for messages."""

    op: str
    digest: str
    text: str


class Requests:
    """Recognises requests on one connection; remembers which content each model was loaded from."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}

    def seen(self, message: Message) -> Request | None:
        """What a request asks for; ``None`` for bookkeeping."""
        header = message.header
        op = str(header.get("op", ""))
        keys = _keys(header)
        if op == "unload":
            for key in keys:
                self._models.pop(key, None)
        if op not in RECORDED:
            return None
        fields = {k: v for k, v in header.items() if k not in _NOT_CONTENT}
        if op == "load":
            fields.pop("key", None)  # the reply does not have it, and another name is no other work
            self._models.update(dict.fromkeys(keys, digest_of(fields)))
        elif op == "load_many":
            self._models.update({k: digest_of([fields, i]) for i, k in enumerate(keys)})
        elif op in ("time", "infer", "profile"):
            fields["models"] = [self._models.get(key, "") for key in keys]
            if op != "time":
                fields.pop("key", None)
        digest = digest_of({"op": op, "fields": fields, "blob": message.blob_sha256})
        return Request(op, digest, _text(op, keys or [str(header.get("name", ""))], header))


def _keys(header: dict[str, Any]) -> list[str]:
    keys = header.get("keys", [header["key"]] if "key" in header else [])
    return [str(key) for key in keys] if isinstance(keys, list) else []


def _text(op: str, names: list[str], header: dict[str, Any]) -> str:
    shown = ", ".join(names[:_SHOWN_KEYS])
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    purpose = header.get("purpose")
    return clean(f"{op} of {shown}{more}" + (f" for {purpose}" if purpose else ""), 300)
