"""Reading of flatbuffers, field by field, with every offset checked: a file may be hostile, and its own parser may crash on it.

Source: the flatbuffers wire format as documented by the project.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAX_ENTRIES = 200_000
MAX_RANK = 8


class Table:
    """One table of a flatbuffer; absent fields read as their default."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at
        self._vtable = at - unpack("<i", content, at)
        self._vtable_bytes = unpack("<H", content, self._vtable)

    def _slot(self, index: int) -> int:
        place = 4 + 2 * index
        if place + 2 > self._vtable_bytes:
            return 0
        offset = unpack("<H", self._content, self._vtable + place)
        return self._at + offset if offset else 0

    def scalar(self, index: int, code: str) -> int:
        """A number, or 0."""
        at = self._slot(index)
        return unpack(code, self._content, at) if at else 0

    def vector(self, index: int) -> tuple[int, int]:
        """Where a vector's items start and how many there are; (0, 0) when absent."""
        at = self._slot(index)
        if not at:
            return 0, 0
        at += unpack("<I", self._content, at)
        length = unpack("<I", self._content, at)
        if length > len(self._content):
            raise ValueError("a vector is longer than the file")
        return at + 4, length

    def integers(self, index: int, *, most: int = MAX_RANK) -> tuple[int, ...]:
        """A short vector of 32-bit integers: a shape."""
        at, length = self.vector(index)
        if length > most:
            raise ValueError(f"a shape has {length} dimensions")
        return tuple(struct.unpack_from(f"<{length}i", self._content, at)) if length else ()

    def text(self, index: int) -> str:
        """A string, or ``""``."""
        at, length = self.vector(index)
        return self._content[at : at + length].decode("utf-8", "replace")

    def table(self, index: int) -> Table | None:
        """A table, if there is one; also the value of a union, whose type is the field before."""
        at = self._slot(index)
        return Table(self._content, at + unpack("<I", self._content, at)) if at else None

    def tables(self, index: int) -> Iterator[Table]:
        """A vector of tables."""
        at, length = self.vector(index)
        if length > MAX_ENTRIES:
            raise ValueError(f"a list has {length} entries")
        for place in range(at, at + 4 * length, 4):
            yield Table(self._content, place + unpack("<I", self._content, place))


def root(content: bytes) -> Table:
    """The root table of a flatbuffer."""
    return Table(content, unpack("<I", content, 0))


def unpack(code: str, content: bytes, at: int) -> int:
    """One number; :class:`struct.error` or ``ValueError`` where it lies outside."""
    if at < 0:  # struct would count from the end
        raise ValueError("an offset points before the file")
    value: int = struct.unpack_from(code, content, at)[0]
    return value
