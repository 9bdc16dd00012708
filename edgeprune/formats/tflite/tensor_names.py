"""Short, stable tensor names (``block.conv1/weight``) in place of the converter's, and transposes that are not needed.

litert-torch names tensors after Python modules and classes, which differ between machines and say which private file a model came from.
For the conversion every module of a copy gets a class with a number in its name; the numbers are read off the tensor names afterwards, so
that each tensor finds its layer, whatever containers, loops or shared modules the model is built of.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from edgeprune.formats.tflite.graph import WEIGHT, constant_value, is_constant, op_name, text

MARK = "edgeprune_layer"
_LABEL = re.compile(rf"{MARK}\.n(\d+)(?=[_/]|$)")
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "CONV_3D")
_WEIGHT_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
)
_TO_NCHW = (0, 3, 1, 2)


def labelled(model: nn.Module) -> tuple[nn.Module, list[tuple[str, bool]]]:
    """A copy of the model for the converter, and ``(path, has weights)`` of each module by its number."""
    copied = copy.deepcopy(model)
    paths = []
    for number, (path, module) in enumerate(copied.named_modules()):
        paths.append((path, isinstance(module, _WEIGHT_LAYERS)))
        kind = type(module)
        module.__class__ = type(f"n{number}", (kind,), {"__module__": MARK})
    return copied, paths


def rename_tensors(model: Any, paths: Sequence[tuple[str, bool]]) -> None:
    """Give every tensor a name of its own, in place: ``layer/operator``, ``layer/weight``, ``input``, ``output``.

    Args:
        model: what litert-torch made of a :func:`labelled` model.
        paths: as :func:`labelled` returned.
    """
    graph = model.subgraphs[0]
    names: dict[int, str] = {}
    for number, index in enumerate(graph.inputs):
        names[int(index)] = _numbered("input", number, len(graph.inputs))
    for number, index in enumerate(graph.outputs):
        names.setdefault(int(index), _numbered("output", number, len(graph.outputs)))
    taken = {*names.values()}
    for op in graph.operators:
        kind = op_name(model, op)
        layer = _layer(graph, op, kind, paths)
        for slot, index in [*enumerate(op.inputs), *((-1, i) for i in op.outputs)]:
            if index < 0 or int(index) in names:
                continue
            constant = is_constant(model, graph.tensors[index])
            role = _role(kind, slot) if constant else kind.lower()
            names[int(index)] = name = _free(f"{layer}/{role}" if layer else role, taken)
            taken.add(name)
    for index, tensor in enumerate(graph.tensors):
        tensor.name = names.get(index) or _free("unused", taken)
        taken.add(tensor.name)
    _rename_signature(model, names)


def _rename_signature(model: Any, names: Mapping[int, str]) -> None:
    for signature in model.signatureDefs or []:
        for entry in [*signature.inputs, *signature.outputs]:
            entry.name = names[int(entry.tensorIndex)]


def _numbered(name: str, number: int, count: int) -> str:
    return name if count == 1 else f"{name}_{number}"


def _free(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _role(kind: str, slot: int) -> str:
    if kind not in _WEIGHTED:
        return f"{kind.lower()}/constant"
    if kind == "TRANSPOSE_CONV":
        return {0: "shape", 1: WEIGHT, 3: "bias"}.get(slot, "constant")
    return {1: WEIGHT, 2: "bias"}.get(slot, "constant")


def _layer(graph: Any, op: Any, kind: str, paths: Sequence[tuple[str, bool]]) -> str:
    """Path of the module that an operator came from: the layer whose weights it reads, else the one its output is named after."""

    def found(index: int) -> list[int]:
        # Fused operators join the names of several modules by semicolons; in each, the innermost module stands last.
        parts = text(graph.tensors[index].name).split(";")
        return [int(numbers[-1]) for part in parts if (numbers := _LABEL.findall(part))]

    if kind in ("TRANSPOSE", "RESHAPE"):
        return ""  # the converter's own, whatever module they happen to be named after
    outputs = [number for i in op.outputs for number in found(i)]
    if kind in _WEIGHTED:
        inputs = [number for i in op.inputs[1:] if i >= 0 for number in found(i)]
        weighted = [n for n in [*found(op.inputs[1]), *reversed(outputs), *inputs] if paths[n][1]]
        if weighted:
            return paths[weighted[0]][0]
    return paths[outputs[0]][0] if outputs else ""


def drop_transposed_means(model: Any) -> None:
    """Let means over height and width read channels-last tensors directly, in place.

    The converter computes ``x.mean((2, 3))`` on a tensor that it first transposes to channels-first, which costs a pass over the memory.
    """
    graph = model.subgraphs[0]
    reads = [int(i) for op in graph.operators for i in op.inputs] + [int(i) for i in graph.outputs]
    dropped = set()
    for number, op in enumerate(graph.operators):
        if op_name(model, op) != "TRANSPOSE" or reads.count(int(op.outputs[0])) != 1:
            continue
        reader = next((o for o in graph.operators if op.outputs[0] in o.inputs), None)
        if reader is None or op_name(model, reader) != "MEAN" or reader.builtinOptions.keepDims:
            continue
        order, axes = (graph.tensors[o.inputs[1]] for o in (op, reader))
        if not is_constant(model, order) or not is_constant(model, axes):
            continue
        spatial = sorted(int(a) % 4 for a in constant_value(model, axes).ravel()) == [2, 3]
        if tuple(constant_value(model, order).tolist()) != _TO_NCHW or not spatial:
            continue
        reader.inputs = np.asarray([op.inputs[0], _channels_last_axes(model, reader)], np.int32)
        dropped.add(number)
    graph.operators = [op for i, op in enumerate(graph.operators) if i not in dropped]
    drop_unused(model)


def _channels_last_axes(model: Any, reader: Any) -> int:
    """Index of a new constant with the axes 1 and 2, like the one the operator reads."""
    graph = model.subgraphs[0]
    old = graph.tensors[reader.inputs[1]]
    tensor, buffer = copy.copy(old), copy.copy(model.buffers[old.buffer])
    axes = np.asarray([1, 2], constant_value(model, old).dtype)
    buffer.data = np.frombuffer(axes.tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def drop_unused(model: Any) -> None:
    """Remove tensors and buffers that nothing refers to any more, in place."""
    graph = model.subgraphs[0]
    used = {int(i) for op in graph.operators for i in [*op.inputs, *op.outputs] if i >= 0}
    used |= {int(i) for i in [*graph.inputs, *graph.outputs]}
    new = {old: number for number, old in enumerate(sorted(used))}
    new[-1] = -1
    for owner in [*graph.operators, graph]:
        owner.inputs = np.asarray([new[int(i)] for i in owner.inputs], np.int32)
        owner.outputs = np.asarray([new[int(i)] for i in owner.outputs], np.int32)
    for signature in model.signatureDefs or []:
        for entry in [*signature.inputs, *signature.outputs]:
            entry.tensorIndex = new[int(entry.tensorIndex)]
    graph.tensors = [graph.tensors[i] for i in sorted(used)]
    owners = [*graph.tensors, *(model.metadata or [])]
    kept = sorted({0, *(int(owner.buffer) for owner in owners)})
    for owner in owners:
        owner.buffer = kept.index(int(owner.buffer))
    model.buffers = [model.buffers[i] for i in kept]
