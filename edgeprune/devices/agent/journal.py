"""What was measured, kept on the board: a client whose link broke asks for a result instead of measuring again."""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any, Dict, Optional

KEPT = 8  # journals of earlier sessions; the board's clock may be wrong, so it is a number and not an age
MAX_LINE_BYTES = 8 << 20
_SESSION = re.compile(r"[0-9a-f]{8,64}\Z")


class Journal:
    """One file per session, one line per finished operation; a torn last line is not there.

    Args:
        workdir: of the device.
        session: the client's name for its session, hexadecimal.
    """

    def __init__(self, workdir: str, session: str) -> None:
        if not _SESSION.match(session):
            raise ValueError("a session must be named by 8 to 64 hexadecimal digits")
        self._folder = os.path.join(workdir, "journal")
        self._path = os.path.join(self._folder, session + ".jsonl")
        self._results: Dict[str, Dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        with contextlib.suppress(OSError), open(self._path, "rb") as stream:
            for line in stream:  # a damaged line costs the result in it and no other
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line.decode("utf-8"))
                    self._results[entry["op_id"]] = entry["result"]

    def find(self, op_id: str) -> Optional[Dict[str, Any]]:
        """The result of an operation of this session, if it was finished."""
        return self._results.get(op_id)

    def add(self, op_id: str, result: Dict[str, Any]) -> bool:
        """Remember a result; gives whether it also reached the disk. A full disk costs nothing but that."""
        self._results[op_id] = result
        line = json.dumps({"op_id": op_id, "result": result}).encode() + b"\n"
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(self._path, flags, 0o600)
        except OSError:
            return False
        try:
            written = os.write(handle, line)
            os.fsync(handle)
        except OSError:
            return False
        finally:
            os.close(handle)
        return written == len(line)

    def sweep(self) -> None:
        """Remove the journals of sessions long gone."""
        with contextlib.suppress(OSError):
            paths = [os.path.join(self._folder, name) for name in os.listdir(self._folder)]
            paths = sorted((p for p in paths if p != self._path), key=os.path.getmtime)
            for path in paths[: max(0, len(paths) - KEPT)]:
                os.unlink(path)
