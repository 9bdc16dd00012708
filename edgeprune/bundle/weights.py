"""How the weights of a model file are stored, read without the runtime that would run it.

A runtime's parser may crash on a hostile file, so this reads only the few fields it needs, in Python, with every offset checked.
Weights are constants of rank 2 and more: biases, scales and shape vectors are not counted.

Source: the TensorFlow Lite schema (``schema.fbs``, file identifier TFL3) and ``onnx.proto`` (ModelProto, GraphProto, TensorProto), field
numbers as published with each project; the flatbuffers and protobuf wire formats as documented by them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator

from edgeprune.errors import IntegrityError
from edgeprune.folders import unpacked

_TFLITE_TYPES = {0: "float32", 1: "float16", 3: "uint8", 9: "int8", 10: "float64", 17: "int4"}
_ONNX_TYPES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 11: "float64", 16: "bfloat16"}
_MIL_TYPES = {10: "float16", 11: "float32", 21: "int8", 31: "uint8"}
_COREML_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_MAX_SUBGRAPHS = 64
_MAX_TENSORS = 200_000
_MAX_RANK = 8


def weight_elements(format_name: str, content: bytes) -> dict[str, int] | None:
    """Number of weight elements by storage type (``int8``, ``float32`` ...), or ``None`` for a format that is not read here.

    Raises:
        IntegrityError: the file is not of its format.
    """
    reader = _READERS.get(format_name)
    if reader is None:
        return None
    counts: dict[str, int] = {}
    try:
        for kind, shape in reader(content):
            if len(shape) >= 2 and min(shape) > 0:
                counts[kind] = counts.get(kind, 0) + math.prod(shape)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound {format_name} file: {error}") from error
    return counts


def eight_bit_ratio(counts: dict[str, int]) -> float:
    """Share of the weight elements that are stored in 8 bits or fewer; 0 when there are none."""
    total = sum(counts.values())
    narrow = sum(counts.get(kind, 0) for kind in ("int8", "uint8", "int4"))
    return narrow / total if total else 0.0


class _Table:
    """One table of a flatbuffer; absent fields read as their default."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at
        self._vtable = at - _unpack("<i", content, at)
        self._vtable_bytes = _unpack("<H", content, self._vtable)

    def _slot(self, index: int) -> int:
        place = 4 + 2 * index
        if place + 2 > self._vtable_bytes:
            return 0
        offset = _unpack("<H", self._content, self._vtable + place)
        return self._at + offset if offset else 0

    def scalar(self, index: int, code: str) -> int:
        """A number, or 0."""
        at = self._slot(index)
        return _unpack(code, self._content, at) if at else 0

    def vector(self, index: int) -> tuple[int, int]:
        """Where a vector's items start and how many there are; (0, 0) when absent."""
        at = self._slot(index)
        if not at:
            return 0, 0
        at += _unpack("<I", self._content, at)
        length = _unpack("<I", self._content, at)
        if length > len(self._content):
            raise ValueError("a vector is longer than the file")
        return at + 4, length

    def integers(self, index: int) -> tuple[int, ...]:
        """A short vector of 32-bit integers: a shape."""
        at, length = self.vector(index)
        if length > _MAX_RANK:
            raise ValueError(f"a shape has {length} dimensions")
        return tuple(struct.unpack_from(f"<{length}i", self._content, at)) if length else ()

    def tables(self, index: int) -> Iterator[_Table]:
        """A vector of tables."""
        at, length = self.vector(index)
        if length > _MAX_TENSORS:
            raise ValueError(f"a list has {length} entries")
        for place in range(at, at + 4 * length, 4):
            yield _Table(self._content, place + _unpack("<I", self._content, place))


def _unpack(code: str, content: bytes, at: int) -> int:
    if at < 0:  # struct would count from the end
        raise ValueError("an offset points before the file")
    value: int = struct.unpack_from(code, content, at)[0]
    return value


def _tflite(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    if content[4:8] != b"TFL3":
        raise ValueError("it does not carry the identifier TFL3")
    model = _Table(content, _unpack("<I", content, 0))
    # A constant is a tensor whose buffer holds bytes (field 0), or lies behind the flatbuffer (offset and size, fields 1 and 2).
    filled = [buffer.vector(0)[1] > 0 or buffer.scalar(2, "<Q") > 1 for buffer in model.tables(4)]
    for number, graph in enumerate(model.tables(2)):
        if number >= _MAX_SUBGRAPHS:
            raise ValueError(f"it has more than {_MAX_SUBGRAPHS} subgraphs")
        for tensor in graph.tables(0):
            buffer = tensor.scalar(2, "<I")
            kind = _TFLITE_TYPES.get(tensor.scalar(1, "<b"))
            if kind is not None and buffer < len(filled) and filled[buffer]:
                yield kind, tensor.integers(0)


def _onnx(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    whole = memoryview(content)
    graphs = [value for number, value in _fields(whole) if number == 7]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise ValueError("it does not hold one graph")
    for number, tensor in _fields(graphs[0]):
        if number == 5 and not isinstance(tensor, int):
            kind, shape = _onnx_tensor(tensor)
            if kind is not None:
                yield kind, shape


def _onnx_tensor(tensor: memoryview) -> tuple[str | None, tuple[int, ...]]:
    kind: str | None = None
    shape: list[int] = []
    for number, value in _fields(tensor):
        if number == 1:  # dims: packed or one by one
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            kind = _ONNX_TYPES.get(value)
    return kind, tuple(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a protobuf message: integers, or bytes for everything that has a length."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} is not used")
        if at + size > len(message):
            raise ValueError("a field runs past the end")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer is longer than ten bytes")


def _varints(packed: memoryview) -> list[int]:
    values: list[int] = []
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values


def _coreml(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Constants of an ML program that lie in its weight file. Field numbers of ``Model.proto`` and ``MIL.proto`` of coremltools 9.0."""
    model = memoryview(unpacked(content)[_COREML_MODEL])
    for block in _at(
        model, 502, 2, 2, 3, 2
    ):  # mlProgram, functions, value, block_specializations, value
        for operation in _at(block, 3):
            for value in _at(operation, 5, 2):  # attributes, value
                if any(True for _ in _at(value, 5)):  # blobFileValue
                    for tensor in _at(value, 2, 1):  # type, tensorType
                        yield _coreml_tensor(tensor)


def _coreml_tensor(tensor: memoryview) -> tuple[str, tuple[int, ...]]:
    kinds = [v for number, v in _fields(tensor) if number == 1 and isinstance(v, int)]
    sizes = []
    for constant in _at(tensor, 3, 1):  # dimensions, constant
        sizes += [v for number, v in _fields(constant) if number == 1 and isinstance(v, int)]
    return _MIL_TYPES.get(kinds[0] if kinds else 0, "other"), tuple(sizes)


def _at(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at a path of field numbers."""
    for number, value in _fields(message):
        if number == path[0] and not isinstance(value, int):
            if len(path) == 1:
                yield value
            else:
                yield from _at(value, *path[1:])


_READERS: dict[str, Callable[[bytes], Iterator[tuple[str, tuple[int, ...]]]]] = {
    "tflite": _tflite,
    "onnx": _onnx,
    "coreml": _coreml,
}
