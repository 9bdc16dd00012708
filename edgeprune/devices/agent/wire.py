"""The wire: a magic line from the board, then frames in both directions.

A frame is 4 bytes header length, a JSON header (at most 4 MiB), 8 bytes blob length, and the blob; integers are big-endian. A request has
``op`` and an integer ``id``; its end frame repeats the ``id`` and says ``ok``, and without one nothing was achieved. Between them come
frames with ``event``: signs of life while the board works.
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO, Callable, Dict, Tuple

MAGIC = b"\0edgeprune-agent/2\n"
MAX_HEADER_BYTES = 4 << 20
MAX_BLOB_BYTES = 1 << 30
PIECE_BYTES = 1 << 16
Message = Tuple[Dict[str, Any], bytes]  # header and blob


class Refused(Exception):
    """A request that cannot be served; ``kind`` tells the host what sort of failure it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_exactly(
    stream: BinaryIO, count: int, limit: int, heard: Callable[[], None] = lambda: None
) -> bytes:
    """``count`` bytes, or :class:`EOFError`. After a part over its limit the stream cannot be trusted, so that ends it too.

    ``heard`` is called for every piece that arrives: on a slow link a single part may take minutes.
    """
    if count > limit:
        raise EOFError
    pieces, missing = [], count
    while missing:
        piece = stream.read(min(missing, PIECE_BYTES))
        if not piece:
            raise EOFError
        heard()
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def read_frame(stream: BinaryIO, heard: Callable[[], None] = lambda: None) -> Message:
    """The next header and blob."""
    (size,) = struct.unpack(">I", read_exactly(stream, 4, 4, heard))
    header = json.loads(read_exactly(stream, size, MAX_HEADER_BYTES, heard).decode("utf-8"))
    if not isinstance(header, dict):
        raise EOFError
    (size,) = struct.unpack(">Q", read_exactly(stream, 8, 8, heard))
    return header, read_exactly(stream, size, MAX_BLOB_BYTES, heard)


def frame(header: Dict[str, Any], blob: bytes = b"") -> bytes:
    """The bytes of one frame."""
    text = json.dumps(header, allow_nan=False).encode()
    return struct.pack(">I", len(text)) + text + struct.pack(">Q", len(blob)) + blob


def write_frame(stream: BinaryIO, header: Dict[str, Any], blob: bytes = b"") -> None:
    """Send one frame."""
    stream.write(frame(header, blob))
    stream.flush()


def error_frame(number: Any, error: Exception) -> Dict[str, Any]:
    """The end frame of a request that failed."""
    kind, text = "fault", "%s: %s" % (type(error).__name__, error)
    if isinstance(error, Refused):
        kind, text = error.kind, str(error)
    return {"id": number, "ok": False, "kind": kind, "error": text[:2000]}
