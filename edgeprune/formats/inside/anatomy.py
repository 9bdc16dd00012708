"""What a model file computes and in which types, read without the runtime that would run it; see :mod:`edgeprune.formats.inside.weights`.

Source: field numbers of ``schema.fbs`` (Model, SubGraph, Operator, OperatorCode, Tensor) and ``onnx.proto`` (GraphProto, NodeProto).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.errors import IntegrityError
from edgeprune.formats.inside.weights import onnx_graph, onnx_tensor, tflite_graph, tflite_kind
from edgeprune.formats.shared.protobuf import fields

_EIGHT_BIT = {"int8", "uint8"}
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_MAX_OPS, _MAX_INPUTS = 100_000, 10_000


@dataclass(frozen=True)
class Layer:
    """An operator with weights: its torch layer (``""`` where the file does not say), and whether it reads 8-bit values only.

    ``weights`` are what tells a constant from others, its storage type and its number of elements.
    """

    name: str
    eight_bit: bool
    weights: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Anatomy:
    """Operators by name, tensors by storage type, and the operators with weights.

    ``names`` is false where operators are known by number alone. ``schema_version`` and ``versions`` (each operator's own) are those of a
    ``.tflite`` file.
    """

    operators: Counter[str]
    tensors: Counter[str]
    layers: tuple[Layer, ...]
    names: bool = True
    schema_version: int = 0
    versions: tuple[tuple[str, int], ...] = ()

    @property
    def weighted(self) -> int:
        """How many operators have weights."""
        return len(self.layers)

    @property
    def eight_bit(self) -> int:
        """How many of those compute on 8-bit weights and activations."""
        return sum(layer.eight_bit for layer in self.layers)


def anatomy(format_name: str, content: bytes) -> Anatomy | None:
    """What the file computes; ``None`` for a format that is not read here.

    Raises:
        IntegrityError: the file is not of its format.
    """
    reader = _READERS.get(format_name)
    if reader is None:
        return None
    try:
        return reader(content)
    except (struct.error, IndexError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound {format_name} file: {error}") from error


def _tflite(content: bytes) -> Anatomy:
    model, graph, filled = tflite_graph(content)
    known = _tflite_names()
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
        kind, buffer = tflite_kind(tensor), tensor.scalar(2, "<I")
        kinds.append(kind)
        is_constant.append(buffer < len(filled) and filled[buffer])
        shape = tensor.integers(0)
        has_weights.append(kind != "other" and is_constant[-1] and len(shape) >= 2)
        texts.append(tensor.text(3))
        sizes.append(_elements(shape))
    operators: Counter[str] = Counter()
    layers: list[Layer] = []
    for number, op in enumerate(graph.tables(3)):
        if number >= _MAX_OPS:
            raise ValueError(f"it has more than {_MAX_OPS} operators")
        operators[codes[op.scalar(0, "<I")]] += 1
        read = [index for index in op.integers(1, most=_MAX_INPUTS) if index >= 0]
        made = [index for index in op.integers(2, most=_MAX_INPUTS) if index >= 0]
        weights = [index for index in read if has_weights[index]]
        if weights:
            touched = [i for i in [*read, *made] if has_weights[i] or not is_constant[i]]
            is_eight_bit = {kinds[index] for index in touched} <= _EIGHT_BIT
            name = _tflite_layer([texts[i] for i in weights], [texts[i] for i in made])
            stored = tuple((str(i), kinds[i], sizes[i]) for i in weights)
            layers.append(Layer(name, is_eight_bit, stored))
    schema_version = model.scalar(0, "<I")
    return Anatomy(
        operators, Counter(kinds), tuple(layers), bool(known), schema_version, tuple(versions)
    )


def _elements(shape: tuple[int, ...]) -> int:
    """As many as :func:`~edgeprune.formats.inside.weights.weight_elements` counts."""
    return math.prod(shape) if min(shape, default=1) > 0 else 0


def _tflite_layer(weights: list[str], outputs: list[str]) -> str:
    """The torch layer of an operator, by the names that the exporter gives: ``layer/weight``, else ``layer/operator``."""
    for name in weights:
        if name.endswith("/weight"):
            return name.removesuffix("/weight")
    return outputs[0].rpartition("/")[0] if outputs else ""


def _tflite_names() -> dict[int, str]:
    """Names of the built-in operators, where ai-edge-litert is installed."""
    try:
        from ai_edge_litert.schema_py_generated import BuiltinOperator
    except ImportError:
        return {}
    return {
        number: name for name, number in vars(BuiltinOperator).items() if isinstance(number, int)
    }


def _onnx(content: bytes) -> Anatomy:
    weights: dict[str, tuple[str, int]] = {}
    tensors: Counter[str] = Counter()
    nodes: list[_Node] = []
    for number, value, _ in fields(onnx_graph(content)):
        if isinstance(value, int):
            continue
        if number == 5:
            kind, shape, name = onnx_tensor(value)
            tensors[kind or "other"] += 1
            if kind is not None and len(shape) >= 2:
                weights[name] = kind, _elements(shape)
        elif number == 1:
            nodes.append(_onnx_node(value))
    if len(nodes) > _MAX_OPS:
        raise ValueError(f"it has more than {_MAX_OPS} operators")
    maker = {name: node for node in nodes for name in node.made}
    layers: list[Layer] = []
    for node in nodes:
        if node.op in (_QUANTIZE, _DEQUANTIZE):
            continue
        origins = [_origin(name, maker) for name in node.read if name]
        stored = tuple((name, *weights[name]) for name, _ in origins if name in weights)
        if stored:
            # Values and weights come out of a DequantizeLinear; the third input, a bias, may be float: TensorRT wants it so.
            is_eight_bit = all(quantised for _, quantised in origins[:2])
            layers.append(Layer(node.name.rpartition("/")[0], is_eight_bit, stored))
    return Anatomy(Counter(node.op for node in nodes), tensors, tuple(layers))


@dataclass(frozen=True)
class _Node:
    op: str
    name: str  # ``layer/operation``, as the exporter gives it
    read: list[str]
    made: list[str]


def _origin(name: str, maker: dict[str, _Node]) -> tuple[str, bool]:
    """The tensor behind a DequantizeLinear, and whether there is one."""
    node = maker.get(name)
    if node is None or node.op != _DEQUANTIZE or not node.read:
        return name, False
    return node.read[0], True


def _onnx_node(message: memoryview) -> _Node:
    op, title, read, made = "", "", [], []
    for number, value, _ in fields(message):
        if isinstance(value, int):
            continue
        if number == 1:
            read.append(bytes(value).decode())
        elif number == 2:
            made.append(bytes(value).decode())
        elif number == 3:
            title = bytes(value).decode()
        elif number == 4:
            op = bytes(value).decode()
    return _Node(op, title, read, made)


_READERS: dict[str, Callable[[bytes], Anatomy]] = {"tflite": _tflite, "onnx": _onnx}
