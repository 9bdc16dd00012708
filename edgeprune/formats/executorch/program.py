"""What stands in an ExecuTorch program (``.pte``): operators, XNNPACK nodes, multiply-accumulates, weights. Read without ExecuTorch.

Source: ``schema/program.fbs`` and ``scalar_type.fbs`` (file identifier ET12), the extended header of ``exir/_serialize/_program.py``, and
``backends/xnnpack/serialization/runtime_schema.fbs`` with its header XH00, all of ExecuTorch 1.5.1; field numbers are positions there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgeprune.formats.shared.flatbuffer import MAX_ENTRIES, Table, root, unpack

XNNPACK = "XnnpackBackend"
_SCALARS = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64",
    11: "bool", 15: "bfloat16",
}  # fmt: skip
_XNN_TYPES = {
    1: "float32", 2: "float16", 3: "int8", 4: "uint8", 5: "int32", 6: "int8", 7: "int32", 8: "int4", 9: "int8",
    10: "int4", 11: "int8", 12: "int32", 13: "float32", 14: "bfloat16",
}  # fmt: skip
_XNN_NODES = (
    "none", "Add", "FullyConnected", "Softmax", "Sigmoid", "StaticTranspose", "Clamp", "Conv2d", "Div",
    "StaticResizeBilinear2D", "StaticConstantPad", "AvgPooling2d", "Minimum", "DepthwiseConv2d", "MaxPooling2d", "Multiply",
    "Subtract", "Floor", "Convert", "GlobalAvgPooling2d", "StaticReshape", "ArgMaxPooling2d", "SquareRoot", "Ceiling",
    "Hardswish", "LeakyReLU", "Maximum", "Negate", "Square", "ELU", "Abs", "PReLU", "Concatenate2", "Concatenate3",
    "Concatenate4", "StaticSlice", "ScaledDotProductAttention", "BatchMatrixMultiply", "Concatenate5", "ConvTranspose2d",
    "ReciprocalSquareRoot", "Log", "Gelu", "Tanh", "Exp", "Sin", "Copy", "Cos",
)  # fmt: skip
_CONVOLUTIONS = ("Conv2d", "DepthwiseConv2d", "ConvTranspose2d")
_PRODUCTS = (*_CONVOLUTIONS, "FullyConnected", "BatchMatrixMultiply")
_TENSOR, _KERNEL_CALL = 5, 1  # members of the unions KernelTypes and InstructionArguments
_QUANTIZED_VALUE = 2  # member of XValueUnion
# Delegates may share their data, so that a small file could take hours.
_MAX_DELEGATES, _MAX_OPERATIONS = 1000, 100_000


@dataclass(frozen=True)
class Tensor:
    """One tensor: ``shape`` and ``dtype`` (a numpy name, or ``int4``); ``constant`` where the file holds its values."""

    shape: tuple[int, ...]
    dtype: str
    constant: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Operation:
    """What is run: an operator of the runtime (``aten::mean.out``) or a node inside a delegate (``Conv2d``).

    ``macs`` counts multiply-accumulates of products and convolutions; ``int8`` says whether its inputs and weights are 8-bit integers.
    """

    name: str
    macs: int
    int8: bool = False


@dataclass(frozen=True)
class Program:
    """The method ``forward`` of a file.

    ``calls`` run in the runtime itself, which needs ``operators``; ``nodes`` run in XNNPACK.
    ``weights`` are the constants by type and shape.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: tuple[str, ...]
    calls: tuple[Operation, ...]
    nodes: tuple[Operation, ...]
    weights: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return sum(o.macs for o in (*self.calls, *self.nodes))

    @property
    def delegated_macs(self) -> int:
        """Those that run in XNNPACK."""
        return sum(o.macs for o in self.nodes)

    @property
    def int8_macs(self) -> int:
        """Those that run in XNNPACK on 8-bit integers."""
        return sum(o.macs for o in self.nodes if o.int8)

    def op_counts(self) -> dict[str, int]:
        """Nodes as ``xnnpack:Conv2d``, those on 8-bit integers also as ``int8:Conv2d``, operators of the runtime by name.

        Beside them weights by type, and multiply-accumulates: ``macs``, ``macs:xnnpack``, ``macs:int8``.
        """
        counts = Counter(call.name for call in self.calls)
        counts.update(f"xnnpack:{node.name}" for node in self.nodes)
        counts.update(f"int8:{node.name}" for node in self.nodes if node.int8)
        counts.update(f"weights:{dtype}" for dtype, shape in self.weights if len(shape) >= 2)
        counts["macs"] = self.macs
        counts["macs:xnnpack"] = self.delegated_macs
        counts["macs:int8"] = self.int8_macs
        return dict(sorted(counts.items()))


def read_program(content: bytes) -> Program:
    """Parse a file.

    Raises:
        ValueError, IndexError, struct.error: it is not a sound program.
    """
    if content[4:8] != b"ET12":
        raise ValueError("it does not carry the identifier ET12")
    program = root(content)
    plans = [p for p in program.tables(1) if p.text(0) == "forward"]
    if len(plans) != 1:
        raise ValueError("it has no method forward")
    plan = plans[0]
    values = [_value(v) for v in plan.tables(2)]
    operators = [".".join(filter(None, (o.text(0), o.text(1)))) for o in plan.tables(6)]
    delegates = list(plan.tables(7))
    calls = [c for chain in plan.tables(5) for c in _calls(chain, operators, values)]
    nodes: list[Operation] = []
    weights = [(v.dtype, v.shape) for v in values if v is not None and v.constant]
    if len(delegates) > _MAX_DELEGATES:
        raise ValueError(f"it has more than {_MAX_DELEGATES} delegates")
    for delegate in delegates:
        if delegate.text(0) == XNNPACK:
            found, constants = _graph(_blob(content, program, delegate))
            nodes += found
            weights += constants
        if len(calls) + len(nodes) > _MAX_OPERATIONS:
            raise ValueError(f"it has more than {_MAX_OPERATIONS} operations")
    return Program(
        inputs=_tensors(plan.integers(3, most=MAX_ENTRIES), values),
        outputs=_tensors(plan.integers(4, most=MAX_ENTRIES), values),
        operators=tuple(sorted(set(operators))),
        calls=tuple(calls),
        nodes=tuple(nodes),
        weights=tuple(weights),
    )


def _tensors(indices: Sequence[int], values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    found = [values[i] for i in indices]
    return tuple(t for t in found if t is not None)


def _value(value: Table) -> Tensor | None:
    tensor = value.table(1)
    if value.scalar(0, "<B") != _TENSOR or tensor is None:
        return None
    dtype = _SCALARS.get(tensor.scalar(0, "<b"), "other")
    return Tensor(tensor.integers(2), dtype, tensor.scalar(5, "<I") > 0)


def _calls(
    chain: Table, operators: Sequence[str], values: Sequence[Tensor | None]
) -> Iterator[Operation]:
    for instruction in chain.tables(2):
        call = instruction.table(1)
        if instruction.scalar(0, "<B") == _KERNEL_CALL and call is not None:
            name = operators[call.scalar(0, "<i")]
            yield Operation(name, _call_macs(name, call.integers(1, most=MAX_ENTRIES), values))


def _call_macs(name: str, args: Sequence[int], values: Sequence[Tensor | None]) -> int:
    """Multiply-accumulates of an operator; its tensors by position, the result last. 0 for what multiplies no matrix."""
    tensors = [values[i] if 0 <= i < len(values) else None for i in args]
    out = tensors[-1]
    if name == "aten::convolution.out" and out is not None:
        source, weight = tensors[0], tensors[1]
        if source is None or weight is None:
            return 0
        # The weight is [out, in / groups, ...], transposed [in, out / groups, ...].
        whole = out if weight.shape[0] == out.shape[1] else source
        return whole.size * math.prod(weight.shape[1:])
    left = {"aten::addmm.out": 1, "aten::mm.out": 0, "aten::bmm.out": 0, "aten::linear.out": 0}
    if name in left and out is not None:
        source = tensors[left[name]]
        return out.size * source.shape[-1] if source is not None and source.shape else 0
    return 0


def _blob(content: bytes, program: Table, delegate: Table) -> bytes:
    """What was handed to a delegate: inside the flatbuffer, or in a segment behind it."""
    reference = delegate.table(1)
    if reference is None:
        raise ValueError("a delegate has no data")
    index = reference.scalar(1, "<I")
    if reference.scalar(0, "<b") == 0:
        at, length = [*program.tables(3)][index].vector(0)
        return content[at : at + length]
    if content[8:12] != b"eh00":
        raise ValueError("it has segments and no extended header")
    base = unpack("<Q", content, 24)
    segment = [*program.tables(4)][index]
    start = base + segment.scalar(0, "<Q")
    return content[start : start + segment.scalar(1, "<Q")]


def _graph(blob: bytes) -> tuple[list[Operation], list[tuple[str, tuple[int, ...]]]]:
    """The nodes of an XNNPACK graph, and its constants by type and shape."""
    if blob[4:8] == b"XH00":
        start, size = unpack("<I", blob, 10), unpack("<I", blob, 14)
        blob = blob[start : start + size]
    graph = root(blob)
    values: dict[int, Tensor] = {}
    for entry in graph.tables(2):
        tensor = entry.table(1)
        if entry.scalar(0, "<B") == _QUANTIZED_VALUE and tensor is not None:
            tensor = tensor.table(0)
        if tensor is None:
            raise ValueError("a value of the delegate is empty")
        dtype = _XNN_TYPES.get(tensor.scalar(0, "<h"), "other")
        constant = tensor.scalar(3, "<I") > 0
        values[tensor.scalar(6, "<I")] = Tensor(tensor.integers(2), dtype, constant)
    nodes = [_node(entry, values) for entry in graph.tables(1)]
    return nodes, [(v.dtype, v.shape) for v in values.values() if v.constant]


def _node(entry: Table, values: dict[int, Tensor]) -> Operation:
    kind, node = entry.scalar(0, "<B"), entry.table(1)
    name = _XNN_NODES[kind]
    if node is None:
        raise ValueError(f"the node {name} is empty")
    if name not in _PRODUCTS:
        # The first tensor that a node reads stands at a place of its own in every kind; only products are told apart by type.
        return Operation(name, 0)
    first, second, out = (15, 16, 18) if name in _CONVOLUTIONS else (0, 1, 3)
    if name == "BatchMatrixMultiply":
        out = 2
    source, weight, result = (values[node.scalar(slot, "<I")] for slot in (first, second, out))
    if name in _CONVOLUTIONS:
        window = node.scalar(4, "<I") * node.scalar(5, "<I")
        transposed = name == "ConvTranspose2d"
        per_element = node.scalar(11 if transposed else 10, "<I")
        macs = (source if transposed else result).size * window * per_element
    else:
        macs = result.size * source.shape[-1]
    return Operation(name, macs, {source.dtype, weight.dtype} <= {"int8", "uint8"})
