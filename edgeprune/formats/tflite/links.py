"""Two TFLite exports side by side, and which of their dimensions are the same ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeprune.errors import FormatError
from edgeprune.formats.shared.widths import Links, Pair, Place, WidthDecoder
from edgeprune.formats.tflite.graph import (
    constant_value,
    op_name,
    read_model,
    shape_of,
    text,
    unshare_constants,
)

# Operators whose inputs and outputs have the same dimensions, counted from the last one, save for broadcasting.
ALIGNED = re.compile(
    "ABS|ADD|AVERAGE_POOL_2D|BROADCAST_TO|CAST|DEQUANTIZE|DIV|ELU|EXP|GELU|HARD_SWISH|LEAKY_RELU|LOGISTIC|LOG_SOFTMAX|MAXIMUM"
    "|MAX_POOL_2D|MEAN|MINIMUM|MUL|NEG|POW|PRELU|QUANTIZE|REDUCE_MAX|REDUCE_MIN|RELU|RELU6|RELU_0_TO_1|RELU_N1_TO_1"
    "|RESIZE_BILINEAR|RESIZE_NEAREST_NEIGHBOR|RSQRT|SELECT_V2|SOFTMAX|SQRT|SQUARE|SQUARED_DIFFERENCE|SUB|SUM|TANH"
)
VIEWS = frozenset({"RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS"})
SHIFTS = frozenset({"PAD", "PADV2", "MIRROR_PAD", "SLICE", "STRIDED_SLICE"})
# The output's shape.
SHAPE_SLOTS = {"RESHAPE": 1, "BROADCAST_TO": 1, "SLICE": 2, "TRANSPOSE_CONV": 0}


class Twins:
    """Two exports of one model side by side: the same operators on the same tensors.

    Raises:
        FormatError: they are not the same graph.
    """

    def __init__(self, dense: bytes, variant: bytes) -> None:
        self.dense, self.variant = read_model(dense), read_model(variant)
        for model in (self.dense, self.variant):
            unshare_constants(model)
        ours, theirs = (m.subgraphs[0].operators for m in (self.dense, self.variant))
        names = [op_name(self.dense, op) for op in ours]
        if names != [op_name(self.variant, op) for op in theirs]:
            raise FormatError("the dense and the narrower export are not the same graph")
        self.operators = [*zip(names, ours, theirs, strict=True)]
        self._twin: dict[int, int] = {}
        for name, op, peer in self.operators:
            if len(op.inputs) != len(peer.inputs) or len(op.outputs) != len(peer.outputs):
                raise FormatError(f"a {name} has other inputs in the two exports")
            for mine, yours in zip(both_sides(op), both_sides(peer), strict=True):
                if self._twin.setdefault(mine, yours) != yours:
                    raise FormatError(f"a {name} is wired differently in the two exports")
        self._twin.pop(-1, None)
        tensors = self.dense.subgraphs[0].tensors
        if any(a.type != b.type for a, b in map(self.pair, self._twin)):
            raise FormatError("the dense and the narrower export must have the same precision")
        self.places = {i: Place("tensor", i, text(tensors[i].name)) for i in self._twin}

    def pair(self, index: int) -> tuple[Any, Any]:
        """A tensor of the dense file and its twin."""
        ours, theirs = self.dense.subgraphs[0].tensors, self.variant.subgraphs[0].tensors
        return ours[index], theirs[self._twin[index]]

    def sizes(self, index: int) -> list[Pair]:
        """Both sizes of each dimension of a tensor.

        Raises:
            FormatError: they have other numbers of dimensions.
        """
        a, b = (shape_of(t) for t in self.pair(index))
        if len(a) != len(b):
            raise FormatError(f"{self.places[index]} has {len(a)} or {len(b)} dimensions")
        return [*zip(a, b, strict=True)]

    def values(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Both values of a constant."""
        a, b = self.pair(index)
        return constant_value(self.dense, a), constant_value(self.variant, b)


def both_sides(op: Any) -> list[int]:
    """Tensors that an operator reads and writes; -1 for an input that is left out."""
    return [int(i) for i in [*op.inputs, *op.outputs]]


def find_links(twins: Twins, decoder: WidthDecoder, sizes: Mapping[Place, Sequence[Pair]]) -> Links:
    """How the dimensions of all tensors, shape constants and options hang together.

    Args:
        twins: the two graphs.
        decoder: knows the groups.
        sizes: of the tensors by :attr:`Twins.places`, and of the constants and options that change.

    Raises:
        FormatError: the parts of a join do not add up.
    """
    links = Links(decoder, sizes)
    for number, (name, op, _) in enumerate(twins.operators):
        inputs = [twins.places.get(int(i)) for i in op.inputs]
        outputs = [twins.places[int(i)] for i in op.outputs]
        present = [place for place in inputs if place is not None]
        if name in ("CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "DEPTHWISE_CONV_2D"):
            _link_layer(links, name, inputs, outputs[0])
        elif name == "CONCATENATION":
            axis = op.builtinOptions.axis
            links.join((outputs[0], axis), [(p, axis) for p in present], where=name)
        elif name in ("SPLIT", "SPLIT_V"):
            data, where = (present[1], present[0]) if name == "SPLIT" else (present[0], present[2])
            axis = int(twins.values(where.number)[0].ravel()[0])
            links.join((data, axis), [(p, axis) for p in outputs], where=name)
        elif name in SHIFTS:
            links.shift(present[0], outputs[0], where=name)
        elif name in VIEWS:
            links.view(present[0], outputs[0])
        elif ALIGNED.fullmatch(name):
            links.align(outputs[0], *present)
        if name in SHAPE_SLOTS and SHAPE_SLOTS[name] < len(op.inputs):
            index = int(op.inputs[SHAPE_SLOTS[name]])
            for place in (_values(twins, index), Place("newShape", number, name)):
                if len(sizes.get(place, ())) == len(sizes[outputs[0]]):
                    links.align(outputs[0], place)
    _link_slices(twins, links, sizes)
    return links


def _values(twins: Twins, index: int) -> Place:
    """Where the numbers in a constant stand among the sizes."""
    place = twins.places[index]
    return Place("values", place.number, place.name)


def _link_layer(links: Links, name: str, inputs: Sequence[Place | None], output: Place) -> None:
    """Filters write the last dimension of the output and read the last one of the input; weights are stored filters first."""
    swapped = name == "TRANSPOSE_CONV"
    data, weight = (inputs[2], inputs[1]) if swapped else (inputs[0], inputs[1])
    bias = next(iter(inputs[3 if swapped else 2 :]), None)
    assert data is not None
    assert weight is not None
    channel = (weight, -1) if name == "DEPTHWISE_CONV_2D" else (weight, 0)
    links.same((weight, -1), (data, -1))
    if name != "DEPTHWISE_CONV_2D":
        links.written(channel)
    links.same(channel, (output, -1))
    if bias is not None:
        links.same((bias, 0), channel)


def _link_slices(twins: Twins, links: Links, sizes: Mapping[Place, Sequence[Pair]]) -> None:
    """Where one slice of a tensor ends the next one begins."""
    slices: dict[int, list[tuple[Place, np.ndarray, Place]]] = {}
    for name, op, _ in twins.operators:
        if name == "SLICE":
            begin = np.stack([v.ravel() for v in twins.values(int(op.inputs[1]))], 1)
            entry = _values(twins, int(op.inputs[1])), begin, twins.places[int(op.outputs[0])]
            slices.setdefault(int(op.inputs[0]), []).append(entry)
    for siblings in slices.values():
        for (place, begin, _), (before, start, size) in itertools.permutations(siblings, 2):
            for axis, (a, b) in enumerate(begin.tolist()):
                first, second = start[axis].tolist()
                ends = first + sizes[size][axis][0], second + sizes[size][axis][1]
                if a == b or ends != (a, b):
                    continue
                fixed = first == second
                parts = [(size, axis), *([] if fixed else [(before, axis)])]
                links.join((place, axis), parts, plus=first if fixed else 0, where="SLICE")
