"""Whether a model file is all there is: a runtime may take weights from a file beside it, or in the folder that it happens to run in.

A bundle's digests say nothing about such a file, so no model may name one. Every way to a constant is followed, without any runtime.

Source: ``onnx.proto`` (TensorProto ``external_data`` and ``data_location``), ``schema.fbs`` of LiteRT 2.3 (Model, Tensor, Buffer),
``program.fbs`` of ExecuTorch 1.5.1 (ExtraTensorInfo), ``Model.proto`` and ``MIL.proto`` (BlobFileValue) of coremltools 9.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping

from edgeprune.errors import IntegrityError
from edgeprune.formats.inside.eight_bits import file_kind
from edgeprune.formats.shared.flatbuffer import root
from edgeprune.formats.shared.model_bytes import unpacked
from edgeprune.formats.shared.protobuf import fields
from edgeprune.records.artifact import Artifact

# Which fields of a message hold messages, and of which kind.
Kinds = Mapping[str, Mapping[int, str]]
_ONNX: Kinds = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_COREML: Kinds = {
    "model": {502: "program"},
    "program": {2: "functions", 4: "values"},
    "functions": {2: "function"},
    "function": {3: "blocks", 4: "values"},
    "blocks": {2: "block"},
    "block": {3: "operation", 4: "values"},
    "operation": {2: "arguments", 4: "block", 5: "values"},
    "arguments": {2: "argument"},
    "argument": {1: "values"},
    "values": {2: "value"},
    "value": {3: "immediate", 5: "blob"},
    "immediate": {2: "list", 3: "list", 4: "dictionary"},
    "list": {1: "value"},
    "dictionary": {1: "pair"},
    "pair": {1: "value", 2: "value"},
}
_MAX_DEPTH = 100  # what protobuf's own parsers allow
_COREML_FOLDER, _COREML_START = "Data/com.apple.CoreML/", "@model_path/"
_COREML_TYPES = range(200, 3001)  # of models; an ML program is one of them
_PTE_TENSOR = 5


def check_self_contained(model: Artifact, content: bytes) -> None:
    """Raise when a value of a model file lies outside it.

    Raises:
        IntegrityError: one does, or the file is not of its format.
    """
    kind = file_kind(model)
    try:
        found = next(_READERS[kind](content), None)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound {kind} file: {error}") from error
    if found is not None:
        raise IntegrityError(
            f"a model must hold all its values, but {model.path} takes {found!r:.80} from another file",
            hint="write the model as one file",
        )


def _messages(kinds: Kinds, content: bytes | memoryview, wanted: str) -> Iterator[memoryview]:
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


def _onnx(content: bytes) -> Iterator[str]:
    if content[4:8] == b"ORTM":
        raise ValueError("it is of onnxruntime's own format")
    for tensor in _messages(_ONNX, content, "tensor"):
        name, is_outside = "", False
        for number, value, _ in fields(tensor):
            if number == 8 and not isinstance(value, int):
                name = bytes(value).decode()
            is_outside |= number == 13 or (number, value) == (14, 1)
        if is_outside:
            yield name


def _tflite(content: bytes) -> Iterator[str]:
    model = root(content)
    if model.vector(8)[1] or model.vector(9)[1]:
        yield "buffers"
    for buffer in model.tables(4):
        offset, size = buffer.scalar(1, "<Q"), buffer.scalar(2, "<Q")
        if size and offset + size > len(content):
            raise ValueError("a buffer runs past its end")
    for graph in model.tables(2):
        for tensor in graph.tables(0):
            if tensor.scalar(10, "<I"):
                yield tensor.text(3)


def _executorch(content: bytes) -> Iterator[str]:
    for plan in root(content).tables(1):
        for value in plan.tables(2):
            tensor = value.table(1) if value.scalar(0, "<B") == _PTE_TENSOR else None
            more = None if tensor is None else tensor.table(9)
            if more is not None and more.scalar(2, "<b"):
                yield more.text(1)


def _coreml(content: bytes) -> Iterator[str]:
    files = unpacked(content)
    model = memoryview(files[_COREML_FOLDER + "model.mlmodel"])
    if [number for number, _, _ in fields(model) if number in _COREML_TYPES] != [502]:
        raise ValueError("it is no ML program")
    for blob in _messages(_COREML, model, "blob"):
        names = [bytes(v).decode() for n, v, _ in fields(blob) if n == 1 and not isinstance(v, int)]
        for name in names or [""]:
            inside = name.removeprefix(_COREML_START)
            if inside == name or _COREML_FOLDER + inside not in files:
                yield name


_READERS: dict[str, Callable[[bytes], Iterator[str]]] = {
    "onnx": _onnx,
    "tflite": _tflite,
    "executorch": _executorch,
    "coreml": _coreml,
}
