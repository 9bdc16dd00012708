"""Transposes before a flattening: the order of the positions moves into the weights of the layer that reads them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from edgeprune.formats.tflite.graph import constant_value, is_constant, op_name, shape_of
from edgeprune.formats.tflite.tensor_names import drop_unused

_TO_NCHW = (0, 3, 1, 2)


def drop_flattened_transposes(model: Any) -> None:
    """Let linear layers read flattened channels-last tensors directly, in place.

    ``x.flatten(1)`` of images orders positions channels-first, for which the converter transposes the whole tensor. The columns of the
    linear layer behind it are put into channels-last order instead, once, so that nothing is moved when the file runs.
    """
    graph = model.subgraphs[0]
    dropped = set()
    for number, op in enumerate(graph.operators):
        found = _flattening(model, op)
        if found is None:
            continue
        reshape, readers = found
        _, height, width, channels = shape_of(graph.tensors[op.inputs[0]])
        # Where channels-last position i stands in channels-first order.
        places = np.arange(channels * height * width).reshape(channels, height, width)
        order = places.transpose(1, 2, 0).ravel()
        for reader in readers:
            reader.inputs = np.asarray(
                [
                    reader.inputs[0],
                    _columns(model, int(reader.inputs[1]), order),
                    *reader.inputs[2:],
                ],
                np.int32,
            )
        reshape.inputs = np.asarray([op.inputs[0], *reshape.inputs[1:]], np.int32)
        dropped.add(number)
    if dropped:
        graph.operators = [op for i, op in enumerate(graph.operators) if i not in dropped]
        drop_unused(model)


def _flattening(model: Any, op: Any) -> tuple[Any, list[Any]] | None:
    """The reshape behind a transpose to channels-first, and the linear layers that alone read it."""
    graph = model.subgraphs[0]
    if op_name(model, op) != "TRANSPOSE" or not is_constant(model, graph.tensors[op.inputs[1]]):
        return None
    if tuple(constant_value(model, graph.tensors[op.inputs[1]]).ravel().tolist()) != _TO_NCHW:
        return None
    behind = _readers(graph, int(op.outputs[0]))
    if len(behind) != 1 or op_name(model, behind[0]) != "RESHAPE":
        return None
    flat = int(behind[0].outputs[0])
    shape = shape_of(graph.tensors[flat])
    before = shape_of(graph.tensors[op.inputs[0]])
    if len(shape) != 2 or shape[0] != before[0] or shape[1] != int(np.prod(before[1:])):
        return None
    readers = _readers(graph, flat)
    linear = [
        r
        for r in readers
        if op_name(model, r) == "FULLY_CONNECTED"
        and int(r.inputs[0]) == flat
        and is_constant(model, graph.tensors[r.inputs[1]])
        and shape_of(graph.tensors[r.inputs[1]])[1] == shape[1]
    ]
    if not readers or len(linear) != len(readers):
        return None
    return behind[0], linear


def _readers(graph: Any, index: int) -> list[Any]:
    """Operators that read a tensor; a network output counts as none that can be changed."""
    found = [op for op in graph.operators if index in [int(i) for i in op.inputs]]
    return [] if index in [int(i) for i in graph.outputs] else found


def _columns(model: Any, index: int, order: np.ndarray) -> int:
    """Index of a new constant: the weights with their columns in this order."""
    graph = model.subgraphs[0]
    old = graph.tensors[index]
    tensor, buffer = copy.copy(old), copy.copy(model.buffers[old.buffer])
    value = np.ascontiguousarray(constant_value(model, old)[:, order])
    buffer.data = np.frombuffer(value.tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
