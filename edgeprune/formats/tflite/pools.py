"""Max pooling over padded edges in TFLite graphs, with no infinity in the file.

litert-torch pads with -inf where torch's padding is not that of ``SAME``, as at the stem of every ResNet. In INT8 an infinite value has no
scale. Every window holds at least one real value, so there are finite paddings that never win, for any input and in every precision: the
input's own edge, and zero where no value is below it, which is also the lowest level of such a tensor in INT8.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.formats.tflite.graph import (
    DTYPES,
    buffer_like,
    constant_value,
    is_constant,
    op_name,
    operator_code,
    schema,
    shape_of,
)
from edgeprune.formats.tflite.tensor_names import drop_unused

FLOAT = 0  # TensorType
SAME = 0  # Padding
HEIGHT, WIDTH = 1, 2
LOWEST = np.finfo(np.float32).min
RECTIFIERS = (1, 3)  # ActivationFunctionType: RELU and RELU6
NEVER_NEGATIVE = frozenset({"ABS", "EXP", "LOGISTIC", "RELU", "RELU6", "RELU_0_TO_1", "SOFTMAX", "SQUARE"})  # fmt: skip
# Of inputs that are never negative they make what is not either.
KEEPS_SIGN = frozenset({
    "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "MAX_POOL_2D", "MEAN", "MUL", "PAD", "RESHAPE", "SLICE", "TRANSPOSE",
})  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """One axis of a pooling: its window, and what stands before and behind the values that it reads."""

    size: int
    window: int
    stride: int
    count: int
    before: int

    @property
    def after(self) -> int:
        """Padding behind the values that a window reaches; what the converter wrote behind that is not read."""
        return max(0, (self.count - 1) * self.stride + self.window - self.size - self.before)

    @property
    def is_same(self) -> bool:
        """Whether ``SAME`` pads alike; no padding at all is left as it is."""
        count = -(-self.size // self.stride)
        total = max(0, (count - 1) * self.stride + self.window - self.size)
        return (self.count, self.before, self.after) == (count, total // 2, total - total // 2)

    @property
    def is_real(self) -> bool:
        """Whether every window holds a real value."""
        return (
            self.before < self.window and (self.count - 1) * self.stride - self.before < self.size
        )


def bound_pools(model: Any) -> None:
    """Let max pooling read finite paddings, in place.

    A pooling whose geometry is that of ``SAME`` needs no padding of its own. One behind a rectifier gets zeros, in the operator that
    XNNPACK takes. Others get their outermost rows and columns once more: the same maximum, and no value that was not there.
    """
    _pad_behind_transposes(model)
    graph = model.subgraphs[0]
    makers, positive = _makers(graph), _never_negative(model)
    operators: list[Any] = []
    for op in graph.operators:
        pad = makers.get(int(op.inputs[0])) if op_name(model, op) == "MAX_POOL_2D" else None
        sides = _sides(model, pad, op) if pad is not None and _pads_lowest(model, pad) else None
        if pad is not None and sides is not None:
            source, writer = int(pad.inputs[0]), _Writer(model, pad)
            added: list[Any] = []
            if all(side.is_same for side in sides):
                op.builtinOptions.padding = SAME
            elif source in positive:
                added = [_zeros(writer, source, sides)]
            else:
                added = _edges(writer, source, sides)
            op.inputs = added[-1].outputs if added else np.asarray([source], np.int32)
            operators += added
        operators.append(op)
    graph.operators = operators
    _drop_unread(model)


def _pad_behind_transposes(model: Any) -> None:
    """Pad channels-last what is padded channels-first and then transposed, in place; two transposes that cancel are left out."""
    graph = model.subgraphs[0]
    makers = _makers(graph)
    operators: list[Any] = []
    for op in graph.operators:
        pad = makers.get(int(op.inputs[0])) if op_name(model, op) == "TRANSPOSE" else None
        order = _order(model, op)
        if pad is None or order is None or not _pads_lowest(model, pad):
            operators.append(op)
            continue
        writer, source = _Writer(model, pad), int(pad.inputs[0])
        before = makers.get(source)
        turned = None if before is None else _order(model, before)
        if (
            before is not None
            and turned is not None
            and [turned[i] for i in order] == sorted(order)
        ):
            source = int(before.inputs[0])
        else:
            shape = writer.shape(source)[order]
            operators.append(writer.operator("TRANSPOSE", [source, int(op.inputs[1])], shape))
            source = int(operators[-1].outputs[0])
        pads = writer.numbers(constant_value(model, graph.tensors[pad.inputs[1]])[order])
        moved = copy.copy(pad)
        moved.inputs = np.asarray([source, pads, pad.inputs[2]], np.int32)
        moved.outputs = op.outputs
        operators.append(moved)
    graph.operators = operators


def _makers(graph: Any) -> dict[int, Any]:
    return {int(i): op for op in graph.operators for i in op.outputs}


def _order(model: Any, op: Any) -> list[int] | None:
    """The order that a transpose puts dimensions in; ``None`` for another operator, or an order that the file does not say."""
    tensors = model.subgraphs[0].tensors
    if op_name(model, op) != "TRANSPOSE" or not is_constant(model, tensors[op.inputs[1]]):
        return None
    return [int(i) for i in constant_value(model, tensors[op.inputs[1]])]


def _drop_unread(model: Any) -> None:
    """Remove paddings and transposes that nothing reads any more, in place."""
    graph = model.subgraphs[0]
    read, kept = {int(i) for i in graph.outputs}, []
    for op in reversed(graph.operators):
        if read.isdisjoint(map(int, op.outputs)) and op_name(model, op) in ("PADV2", "TRANSPOSE"):
            continue
        read |= {int(i) for i in op.inputs}
        kept.append(op)
    if len(kept) < len(graph.operators):
        graph.operators = kept[::-1]
        drop_unused(model)


def _pads_lowest(model: Any, op: Any) -> bool:
    """Whether an operator pads with the lowest float that there is, or with -inf."""
    tensors = model.subgraphs[0].tensors
    if op_name(model, op) != "PADV2" or tensors[op.outputs[0]].type != FLOAT:
        return False
    constants = [tensors[i] for i in op.inputs[1:]]
    if not all(is_constant(model, tensor) for tensor in constants):
        return False
    pads, value = (constant_value(model, tensor) for tensor in constants)
    return pads.shape == (4, 2) and bool((value <= LOWEST).all())


def _sides(model: Any, pad: Any, pool: Any) -> tuple[_Side, _Side] | None:
    """Height and width of a pooling behind a padding; ``None`` where a window reads padding alone, whose maximum is the padding."""
    tensors, options = model.subgraphs[0].tensors, pool.builtinOptions
    pads = constant_value(model, tensors[pad.inputs[1]])
    if options.padding == SAME or pads[[0, 3]].any():
        return None
    sizes, counts = shape_of(tensors[pad.inputs[0]]), shape_of(tensors[pool.outputs[0]])
    windows = {HEIGHT: options.filterHeight, WIDTH: options.filterWidth}
    strides = {HEIGHT: options.strideH, WIDTH: options.strideW}
    high, wide = (
        _Side(sizes[a], windows[a], strides[a], counts[a], int(pads[a, 0])) for a in (HEIGHT, WIDTH)
    )
    return (high, wide) if high.is_real and wide.is_real else None


def _never_negative(model: Any) -> set[int]:
    """Tensors in which no value can be below zero, whatever the input."""
    graph = model.subgraphs[0]
    found = {
        number
        for number, tensor in enumerate(graph.tensors)
        if tensor.type != FLOAT
        or (is_constant(model, tensor) and bool((constant_value(model, tensor) >= 0).all()))
    }
    found -= {int(i) for i in graph.inputs}
    for op in graph.operators:
        name = op_name(model, op)
        fused = getattr(op.builtinOptions, "fusedActivationFunction", 0)
        kept = name in KEEPS_SIGN and found.issuperset(int(i) for i in op.inputs)
        if kept or name in NEVER_NEGATIVE or fused in RECTIFIERS:
            found |= {int(i) for i in op.outputs}
    return found


class _Writer:
    """Writes operators into a model; what they make is named after the padding that it stands for, and so after its layer."""

    def __init__(self, model: Any, pad: Any) -> None:
        self._model, self._graph = model, model.subgraphs[0]
        self._pads, self._padded = (self._graph.tensors[i] for i in (pad.inputs[1], pad.outputs[0]))

    def shape(self, index: int) -> np.ndarray:
        """The dimensions of a tensor, a fresh array."""
        return np.asarray(shape_of(self._graph.tensors[index]), np.int32)

    def numbers(self, values: np.ndarray) -> int:
        """Index of a new constant of whole numbers."""
        tensor = copy.copy(self._pads)
        buffer = buffer_like(self._model.buffers[tensor.buffer], values.astype(DTYPES[tensor.type]))
        self._model.buffers.append(buffer)
        tensor.buffer = len(self._model.buffers) - 1
        return self._add(tensor, values.shape)

    def operator(self, name: str, inputs: Sequence[int], shape: np.ndarray) -> Any:
        """A new operator, with an output of this shape."""
        operator = schema().OperatorT()
        operator.opcodeIndex = operator_code(self._model, name)
        options = f"{name.title()}Options"
        operator.builtinOptionsType = getattr(schema().BuiltinOptions, options)
        operator.builtinOptions = getattr(schema(), f"{options}T")()
        output = self._add(copy.copy(self._padded), tuple(shape))
        operator.inputs, operator.outputs = (np.asarray(i, np.int32) for i in (inputs, [output]))
        return operator

    def _add(self, tensor: Any, shape: Sequence[int]) -> int:
        tensor.shape, tensor.shapeSignature = np.asarray(shape, np.int32), None
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1


def _zeros(writer: _Writer, source: int, sides: tuple[_Side, _Side]) -> Any:
    """A padding of a tensor with zeros."""
    pads = np.zeros((4, 2), np.int32)
    pads[[HEIGHT, WIDTH]] = [(side.before, side.after) for side in sides]
    return writer.operator(
        "PAD", [source, writer.numbers(pads)], writer.shape(source) + pads.sum(1)
    )


def _edges(writer: _Writer, source: int, sides: tuple[_Side, _Side]) -> list[Any]:
    """Operators that put the outermost rows and columns of a tensor once more around it; the last one makes the whole."""
    made = []
    for axis, side in ((HEIGHT, sides[0]), (WIDTH, sides[1])):
        parts, shape = [source], writer.shape(source)
        for at, times in ((0, side.before), (side.size - 1, side.after)):
            if times:
                begin, size = np.zeros_like(shape), writer.shape(source)
                begin[axis], size[axis] = at, 1
                numbers = [writer.numbers(values) for values in (begin, size)]
                made.append(writer.operator("SLICE", [source, *numbers], size))
                edge = [int(made[-1].outputs[0])] * times
                parts = [*parts, *edge] if at else [*edge, *parts]
        if len(parts) > 1:
            shape[axis] += len(parts) - 1
            made.append(writer.operator("CONCATENATION", parts, shape))
            made[-1].builtinOptions.axis = axis
            source = int(made[-1].outputs[0])
    return made
