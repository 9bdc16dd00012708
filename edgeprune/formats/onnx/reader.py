"""What is in an ONNX file, read without the runtime that would run it.

Source: ``onnx.proto`` (ModelProto, GraphProto, NodeProto, TensorProto with ``external_data`` and ``data_location``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.formats.inside.anatomy import MAX_OPS, Anatomy, Layer, elements
from edgeprune.formats.onnx.texts import OnnxProps
from edgeprune.formats.shared.protobuf import Kinds, fields, messages, varints

_TYPES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 11: "float64", 16: "bfloat16"}
_KINDS: Kinds = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CARRIER = OnnxProps()


def weights(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Storage type and shape of every constant; see :func:`edgeprune.formats.inside.weights.weight_elements`."""
    for number, tensor, _ in fields(_graph(content)):
        if number == 5 and not isinstance(tensor, int):
            kind, shape, _ = _tensor(tensor)
            if kind is not None:
                yield kind, shape


def anatomy(content: bytes) -> Anatomy:
    """What the file computes; see :func:`edgeprune.formats.inside.anatomy.anatomy`."""
    constants: dict[str, tuple[str, int]] = {}
    tensors: Counter[str] = Counter()
    nodes: list[_Node] = []
    for number, value, _ in fields(_graph(content)):
        if isinstance(value, int):
            continue
        if number == 5:
            kind, shape, name = _tensor(value)
            tensors[kind or "other"] += 1
            if kind is not None and len(shape) >= 2:
                constants[name] = kind, elements(shape)
        elif number == 1:
            nodes.append(_node(value))
    if len(nodes) > MAX_OPS:
        raise ValueError(f"it has more than {MAX_OPS} operators")
    maker = {name: node for node in nodes for name in node.made}
    layers: list[Layer] = []
    for node in nodes:
        if node.op in (_QUANTIZE, _DEQUANTIZE):
            continue
        origins = [_origin(name, maker) for name in node.read if name]
        stored = tuple((name, *constants[name]) for name, _ in origins if name in constants)
        if stored:
            # Values and weights come out of a DequantizeLinear; the third input, a bias, may be float: TensorRT wants it so.
            is_eight_bit = all(quantised for _, quantised in origins[:2])
            layers.append(Layer(node.name.rpartition("/")[0], is_eight_bit, stored))
    return Anatomy(Counter(node.op for node in nodes), tensors, tuple(layers))


def outside(content: bytes) -> Iterator[str]:
    """Names of values that lie in another file; see :func:`edgeprune.formats.inside.outside.check_self_contained`."""
    if content[4:8] == b"ORTM":
        raise ValueError("it is of onnxruntime's own format")
    for tensor in messages(_KINDS, content, "tensor"):
        name, is_outside = "", False
        for number, value, _ in fields(tensor):
            if number == 8 and not isinstance(value, int):
                name = bytes(value).decode()
            is_outside |= number == 13 or (number, value) == (14, 1)
        if is_outside:
            yield name


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


def _node(message: memoryview) -> _Node:
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


def _graph(content: bytes) -> memoryview:
    """The graph of an ONNX model.

    Raises:
        ValueError, IndexError: the bytes are no such file.
    """
    whole = memoryview(content)
    graphs = [value for number, value, _ in fields(whole) if number == 7]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise ValueError("it does not hold one graph")
    return graphs[0]


def _tensor(tensor: memoryview) -> tuple[str | None, tuple[int, ...], str]:
    """Storage type, shape and name of a constant; ``None`` for a type that no weights have."""
    kind: str | None = None
    name = ""
    shape: list[int] = []
    for number, value, _ in fields(tensor):
        if number == 1:  # dims: packed or one by one
            shape += [value] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            kind = _TYPES.get(value)
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode()
    return kind, tuple(shape), name
