"""The protobuf wire format, as far as ONNX files need it: fields of a message, with every length checked.

Source: https://protobuf.dev/programming-guides/encoding (read 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# Which fields of a message hold messages, and of which kind.
Kinds = Mapping[str, Mapping[int, str]]
_MAX_DEPTH = 100  # what protobuf's own parsers allow


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview, int]]:
    """Number, value and first byte of every field; integers, or bytes for everything that has a length.

    Raises:
        ValueError, IndexError: the bytes are no such message.
    """
    at = 0
    while at < len(message):
        start = at
        key, at = varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = varint(message, at)
            yield number, value, start
            continue
        if wire == 2:
            size, at = varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} is not used")
        if at + size > len(message):
            raise ValueError("a field runs past the end")
        yield number, message[at : at + size], start
        at += size


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer and the place behind it.

    Raises:
        ValueError, IndexError: it is longer than ten bytes, or cut.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer is longer than ten bytes")


def varints(packed: memoryview) -> list[int]:
    """The integers of a packed field."""
    values: list[int] = []
    at = 0
    while at < len(packed):
        value, at = varint(packed, at)
        values.append(value)
    return values


def field_bytes(number: int, content: bytes) -> bytes:
    """A field that holds bytes."""
    return _varint_bytes(number << 3 | 2) + _varint_bytes(len(content)) + content


def _varint_bytes(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def messages(kinds: Kinds, content: bytes | memoryview, wanted: str) -> Iterator[memoryview]:
    """Every message of a kind, however deep, in a ``model``."""
    todo = [("model", memoryview(content), 0)]
    while todo:
        kind, message, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"it nests more than {_MAX_DEPTH} levels")
        if kind == wanted:
            yield message
            continue
        for number, value, _ in fields(message):
            inner = kinds[kind].get(number)
            if inner is not None and not isinstance(value, int):
                todo.append((inner, value, depth + 1))
