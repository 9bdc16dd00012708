"""What a model file computes and in which types, read without the runtime that would run it; see :mod:`edgeprune.bundle.weights`.

Source: field numbers of ``schema.fbs`` (Model, SubGraph, Operator, OperatorCode, Tensor) and ``onnx.proto`` (GraphProto, NodeProto).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.bundle.weights import onnx_graph, onnx_tensor, tflite_graph, tflite_kind
from edgeprune.errors import IntegrityError
from edgeprune.formats._protobuf import fields

_EIGHT_BIT = {"int8", "uint8"}
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_MAX_OPS, _MAX_INPUTS = 100_000, 10_000


@dataclass(frozen=True)
class Anatomy:
    """Operators by name, tensors by storage type, and how many operators with weights there are and read 8-bit values only.

    ``names`` is false where operators are known by number alone.
    """

    operators: Counter[str]
    tensors: Counter[str]
    weighted: int
    eight_bit: int
    names: bool = True

    @property
    def eight_bit_ratio(self) -> float:
        """Share of the operators with weights that compute on 8-bit weights and activations; 0 without any."""
        return self.eight_bit / self.weighted if self.weighted else 0.0


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
    codes = [max(c.scalar(0, "<b"), c.scalar(3, "<i")) for c in model.tables(1)]
    known = _tflite_names()
    kinds: list[str] = []
    is_constant: list[bool] = []
    has_weights: list[bool] = []
    for tensor in graph.tables(0):
        kind, buffer = tflite_kind(tensor), tensor.scalar(2, "<I")
        kinds.append(kind)
        is_constant.append(buffer < len(filled) and filled[buffer])
        is_weight = kind != "other" and is_constant[-1] and len(tensor.integers(0)) >= 2
        has_weights.append(is_weight)
    operators: Counter[str] = Counter()
    weighted = eight_bit = 0
    for number, op in enumerate(graph.tables(3)):
        if number >= _MAX_OPS:
            raise ValueError(f"it has more than {_MAX_OPS} operators")
        code = codes[op.scalar(0, "<I")]
        operators[known.get(code, f"OP_{code}")] += 1
        read = [index for index in op.integers(1, most=_MAX_INPUTS) if index >= 0]
        made = [index for index in op.integers(2, most=_MAX_INPUTS) if index >= 0]
        if any(has_weights[index] for index in read):
            weighted += 1
            touched = [i for i in [*read, *made] if has_weights[i] or not is_constant[i]]
            eight_bit += {kinds[index] for index in touched} <= _EIGHT_BIT
    return Anatomy(operators, Counter(kinds), weighted, eight_bit, bool(known))


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
    weights: dict[str, str] = {}
    tensors: Counter[str] = Counter()
    nodes: list[tuple[str, list[str], list[str]]] = []
    for number, value, _ in fields(onnx_graph(content)):
        if isinstance(value, int):
            continue
        if number == 5:
            kind, shape, name = onnx_tensor(value)
            tensors[kind or "other"] += 1
            if kind is not None and len(shape) >= 2:
                weights[name] = kind
        elif number == 1:
            nodes.append(_onnx_node(value))
    if len(nodes) > _MAX_OPS:
        raise ValueError(f"it has more than {_MAX_OPS} operators")
    maker = {name: node for node in nodes for name in node[2]}
    weighted = eight_bit = 0
    for op, read, _ in nodes:
        if op in (_QUANTIZE, _DEQUANTIZE):
            continue
        origins = [_origin(name, maker) for name in read if name]
        if any(name in weights for name, _ in origins):
            weighted += 1
            # Values and weights come out of a DequantizeLinear; the third input, a bias, may be float: TensorRT wants it so.
            eight_bit += all(quantised for _, quantised in origins[:2])
    return Anatomy(Counter(op for op, _, _ in nodes), tensors, weighted, eight_bit)


def _origin(name: str, maker: dict[str, tuple[str, list[str], list[str]]]) -> tuple[str, bool]:
    """The tensor behind a DequantizeLinear, and whether there is one."""
    node = maker.get(name)
    if node is None or node[0] != _DEQUANTIZE or not node[1]:
        return name, False
    return node[1][0], True


def _onnx_node(message: memoryview) -> tuple[str, list[str], list[str]]:
    op, read, made = "", [], []
    for number, value, _ in fields(message):
        if isinstance(value, int):
            continue
        if number == 1:
            read.append(bytes(value).decode())
        elif number == 2:
            made.append(bytes(value).decode())
        elif number == 4:
            op = bytes(value).decode()
    return op, read, made


_READERS: dict[str, Callable[[bytes], Anatomy]] = {"tflite": _tflite, "onnx": _onnx}
