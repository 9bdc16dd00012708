"""How the weights of a model file are stored, read without the runtime that would run it.

A runtime's parser may crash on a hostile file, so this reads only the few fields it needs, in Python, with every offset checked.
Weights are constants of rank 2 and more: biases, scales and shape vectors are not counted.

Files of ExecuTorch are read by :mod:`edgeprune.formats.executorch.program`.

Source: the TensorFlow Lite schema (``schema.fbs``, file identifier TFL3) and ``onnx.proto`` (ModelProto, GraphProto, TensorProto), field
numbers as published with each project; the flatbuffers and protobuf wire formats as documented by them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator

from edgeprune.errors import IntegrityError
from edgeprune.formats.executorch.program import read_program
from edgeprune.formats.shared.flatbuffer import Table, root
from edgeprune.formats.shared.model_bytes import unpacked
from edgeprune.formats.shared.protobuf import fields, varints

_TFLITE_TYPES = {0: "float32", 1: "float16", 3: "uint8", 9: "int8", 10: "float64", 17: "int4"}
_ONNX_TYPES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 11: "float64", 16: "bfloat16"}
_MIL_TYPES = {10: "float16", 11: "float32", 21: "int8", 31: "uint8"}
_COREML_MODEL = "Data/com.apple.CoreML/model.mlmodel"
_MAX_SUBGRAPHS = 64


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


def tflite_graph(content: bytes) -> tuple[Table, Table, list[bool]]:
    """The model, its first graph, and which buffers hold something.

    Raises:
        ValueError, IndexError, struct.error: the bytes are no such file.
    """
    model, filled = _tflite_model(content)
    graph = next(model.tables(2), None)
    if graph is None:
        raise ValueError("it has no graph")
    return model, graph, filled


def tflite_kind(tensor: Table) -> str:
    """Storage type of a tensor; ``other`` for one that no weights have."""
    return _TFLITE_TYPES.get(tensor.scalar(1, "<b"), "other")


def _tflite_model(content: bytes) -> tuple[Table, list[bool]]:
    if content[4:8] != b"TFL3":
        raise ValueError("it does not carry the identifier TFL3")
    model = root(content)
    # A constant is a tensor whose buffer holds bytes (field 0), or lies behind the flatbuffer (offset and size, fields 1 and 2).
    filled = [buffer.vector(0)[1] > 0 or buffer.scalar(2, "<Q") > 1 for buffer in model.tables(4)]
    return model, filled


def _tflite(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, filled = _tflite_model(content)
    for number, graph in enumerate(model.tables(2)):
        if number >= _MAX_SUBGRAPHS:
            raise ValueError(f"it has more than {_MAX_SUBGRAPHS} subgraphs")
        for tensor in graph.tables(0):
            buffer = tensor.scalar(2, "<I")
            kind = _TFLITE_TYPES.get(tensor.scalar(1, "<b"))
            if kind is not None and buffer < len(filled) and filled[buffer]:
                yield kind, tensor.integers(0)


def onnx_graph(content: bytes) -> memoryview:
    """The graph of an ONNX model.

    Raises:
        ValueError, IndexError: the bytes are no such file.
    """
    whole = memoryview(content)
    graphs = [value for number, value, _ in fields(whole) if number == 7]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise ValueError("it does not hold one graph")
    return graphs[0]


def _onnx(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number, tensor, _ in fields(onnx_graph(content)):
        if number == 5 and not isinstance(tensor, int):
            kind, shape, _ = onnx_tensor(tensor)
            if kind is not None:
                yield kind, shape


def onnx_tensor(tensor: memoryview) -> tuple[str | None, tuple[int, ...], str]:
    """Storage type, shape and name of a constant; ``None`` for a type that no weights have."""
    kind: str | None = None
    name = ""
    shape: list[int] = []
    for number, value, _ in fields(tensor):
        if number == 1:  # dims: packed or one by one
            shape += [value] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            kind = _ONNX_TYPES.get(value)
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode()
    return kind, tuple(shape), name


def _executorch(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from read_program(content).weights


def _coreml(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Constants of an ML program that lie in its weight file. Field numbers of ``Model.proto`` and ``MIL.proto`` of coremltools 9.0."""
    model = memoryview(unpacked(content)[_COREML_MODEL])
    # mlProgram, functions, value, block_specializations, value.
    for block in _at(model, 502, 2, 2, 3, 2):
        for operation in _at(block, 3):
            for value in _at(operation, 5, 2):  # attributes, value
                if any(True for _ in _at(value, 5)):  # blobFileValue
                    for tensor in _at(value, 2, 1):  # type, tensorType
                        yield _coreml_tensor(tensor)


def _coreml_tensor(tensor: memoryview) -> tuple[str, tuple[int, ...]]:
    kinds = [v for number, v, _ in fields(tensor) if number == 1 and isinstance(v, int)]
    sizes = []
    for constant in _at(tensor, 3, 1):  # dimensions, constant
        sizes += [v for number, v, _ in fields(constant) if number == 1 and isinstance(v, int)]
    return _MIL_TYPES.get(kinds[0] if kinds else 0, "other"), tuple(sizes)


def _at(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at a path of field numbers."""
    for number, value, _ in fields(message):
        if number == path[0] and not isinstance(value, int):
            if len(path) == 1:
                yield value
            else:
                yield from _at(value, *path[1:])


_READERS: dict[str, Callable[[bytes], Iterator[tuple[str, tuple[int, ...]]]]] = {
    "tflite": _tflite,
    "onnx": _onnx,
    "executorch": _executorch,
    "tensorrt": _onnx,  # ships ONNX; the board builds its engine
    "coreml": _coreml,
}
