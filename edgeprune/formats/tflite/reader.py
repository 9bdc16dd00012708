"""What is in a ``.tflite`` file, read without the runtime that would run it.

Source: the TensorFlow Lite schema (``schema.fbs`` of LiteRT 2.3, file identifier TFL3), field numbers as published with the project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from edgeprune.formats.inside.anatomy import MAX_OPS, Anatomy, Layer, elements
from edgeprune.formats.shared.flatbuffer import Table, root
from edgeprune.formats.tflite.texts import ZipTail
from edgeprune.formats.tflite.versions import oldest

_TYPES = {0: "float32", 1: "float16", 3: "uint8", 9: "int8", 10: "float64", 17: "int4"}
_EIGHT_BIT = {"int8", "uint8"}
_MAX_INPUTS = 10_000
_MAX_SUBGRAPHS = 64
CARRIER = ZipTail()


def weights(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Storage type and shape of every constant; see :func:`edgeprune.formats.inside.weights.weight_elements`."""
    model, filled = _model(content)
    for number, graph in enumerate(model.tables(2)):
        if number >= _MAX_SUBGRAPHS:
            raise ValueError(f"it has more than {_MAX_SUBGRAPHS} subgraphs")
        for tensor in graph.tables(0):
            buffer = tensor.scalar(2, "<I")
            kind = _TYPES.get(tensor.scalar(1, "<b"))
            if kind is not None and buffer < len(filled) and filled[buffer]:
                yield kind, tensor.integers(0)


def anatomy(content: bytes) -> Anatomy:
    """What the file computes; see :func:`edgeprune.formats.inside.anatomy.anatomy`."""
    model, graph, filled = _graph(content)
    known = operator_names()
    codes: list[str] = []
    versions: list[tuple[str, int]] = []
    for entry in model.tables(1):
        code = max(entry.scalar(0, "<b"), entry.scalar(3, "<i"))
        codes.append(known.get(code, f"OP_{code}"))
        versions.append((codes[-1], entry.scalar(2, "<i") or 1))  # absent is version 1
    kinds: list[str] = []
    is_constant: list[bool] = []
    has_weights: list[bool] = []
    texts: list[str] = []
    sizes: list[int] = []
    for tensor in graph.tables(0):
        kind, buffer = _kind(tensor), tensor.scalar(2, "<I")
        kinds.append(kind)
        is_constant.append(buffer < len(filled) and filled[buffer])
        shape = tensor.integers(0)
        has_weights.append(kind != "other" and is_constant[-1] and len(shape) >= 2)
        texts.append(tensor.text(3))
        sizes.append(elements(shape))
    operators: Counter[str] = Counter()
    layers: list[Layer] = []
    for number, op in enumerate(graph.tables(3)):
        if number >= MAX_OPS:
            raise ValueError(f"it has more than {MAX_OPS} operators")
        operators[codes[op.scalar(0, "<I")]] += 1
        read = [index for index in op.integers(1, most=_MAX_INPUTS) if index >= 0]
        made = [index for index in op.integers(2, most=_MAX_INPUTS) if index >= 0]
        constants = [index for index in read if has_weights[index]]
        if constants:
            touched = [i for i in [*read, *made] if has_weights[i] or not is_constant[i]]
            is_eight_bit = {kinds[index] for index in touched} <= _EIGHT_BIT
            name = _layer([texts[i] for i in constants], [texts[i] for i in made])
            stored = tuple((str(i), kinds[i], sizes[i]) for i in constants)
            layers.append(Layer(name, is_eight_bit, stored))
    schema_version = model.scalar(0, "<I")
    return Anatomy(
        operators, Counter(kinds), tuple(layers), bool(known), schema_version, tuple(versions)
    )


def outside(content: bytes) -> Iterator[str]:
    """Names of values that lie in another file; see :func:`edgeprune.formats.inside.outside.check_self_contained`."""
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


def operator_names() -> dict[int, str]:
    """Names of the built-in operators, where ai-edge-litert is installed."""
    try:
        from ai_edge_litert.schema_py_generated import BuiltinOperator
    except ImportError:
        return {}
    return {
        number: name for name, number in vars(BuiltinOperator).items() if isinstance(number, int)
    }


def _graph(content: bytes) -> tuple[Table, Table, list[bool]]:
    """The model, its first graph, and which buffers hold something.

    Raises:
        ValueError, IndexError, struct.error: the bytes are no such file.
    """
    model, filled = _model(content)
    graph = next(model.tables(2), None)
    if graph is None:
        raise ValueError("it has no graph")
    return model, graph, filled


def _kind(tensor: Table) -> str:
    """Storage type of a tensor; ``other`` for one that no weights have."""
    return _TYPES.get(tensor.scalar(1, "<b"), "other")


def _model(content: bytes) -> tuple[Table, list[bool]]:
    if content[4:8] != b"TFL3":
        raise ValueError("it does not carry the identifier TFL3")
    model = root(content)
    # A constant is a tensor whose buffer holds bytes (field 0), or lies behind the flatbuffer (offset and size, fields 1 and 2).
    filled = [buffer.vector(0)[1] > 0 or buffer.scalar(2, "<Q") > 1 for buffer in model.tables(4)]
    return model, filled


def _layer(weights: list[str], outputs: list[str]) -> str:
    """The torch layer of an operator, by the names that the exporter gives: ``layer/weight``, else ``layer/operator``."""
    for name in weights:
        if name.endswith("/weight"):
            return name.removesuffix("/weight")
    return outputs[0].rpartition("/")[0] if outputs else ""


__all__ = ["CARRIER", "anatomy", "oldest", "operator_names", "outside", "weights"]
