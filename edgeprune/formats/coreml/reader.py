"""What is in a Core ML package, packed into one run of bytes, read without the runtime that would run it.

Source: ``Model.proto`` and ``MIL.proto`` (BlobFileValue) of coremltools 9.0.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.formats.shared.model_bytes import unpacked
from edgeprune.formats.shared.protobuf import Kinds, fields, messages

_TYPES = {10: "float16", 11: "float32", 21: "int8", 31: "uint8"}
_KINDS: Kinds = {
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
_FOLDER, _START = "Data/com.apple.CoreML/", "@model_path/"
_MODELS = range(200, 3001)  # of models; an ML program is one of them


def weights(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Constants of an ML program that lie in its weight file. Field numbers of ``Model.proto`` and ``MIL.proto`` of coremltools 9.0."""
    model = memoryview(unpacked(content)[_FOLDER + "model.mlmodel"])
    # mlProgram, functions, value, block_specializations, value
    for block in _at(model, 502, 2, 2, 3, 2):
        for operation in _at(block, 3):
            for value in _at(operation, 5, 2):  # attributes, value
                if any(True for _ in _at(value, 5)):  # blobFileValue
                    for tensor in _at(value, 2, 1):  # type, tensorType
                        yield _tensor(tensor)


def outside(content: bytes) -> Iterator[str]:
    """Names of values that lie in another file; see :func:`edgeprune.formats.inside.outside.check_self_contained`."""
    files = unpacked(content)
    model = memoryview(files[_FOLDER + "model.mlmodel"])
    if [number for number, _, _ in fields(model) if number in _MODELS] != [502]:
        raise ValueError("it is no ML program")
    for blob in messages(_KINDS, model, "blob"):
        names = [bytes(v).decode() for n, v, _ in fields(blob) if n == 1 and not isinstance(v, int)]
        for name in names or [""]:
            inside = name.removeprefix(_START)
            if inside == name or _FOLDER + inside not in files:
                yield name


def _tensor(tensor: memoryview) -> tuple[str, tuple[int, ...]]:
    kinds = [v for number, v, _ in fields(tensor) if number == 1 and isinstance(v, int)]
    sizes = []
    for constant in _at(tensor, 3, 1):  # dimensions, constant
        sizes += [v for number, v, _ in fields(constant) if number == 1 and isinstance(v, int)]
    return _TYPES.get(kinds[0] if kinds else 0, "other"), tuple(sizes)


def _at(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at a path of field numbers."""
    for number, value, _ in fields(message):
        if number == path[0] and not isinstance(value, int):
            if len(path) == 1:
                yield value
            else:
                yield from _at(value, *path[1:])
