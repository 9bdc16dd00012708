"""Residual blocks in TFLite graphs: how a file is written without one, and additions of zero that stand for a removed one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from edgeprune.formats.shared.branches import Branch, Bypass, Graph, Step, branch_of
from edgeprune.formats.tflite.graph import (
    constant_value,
    is_constant,
    is_quantized,
    op_name,
    operator_code,
    shape_of,
)

# Operators that take int8 inputs of any scale to outputs of another: what reads a sum may read the skip in its place.
RESCALING = frozenset({
    "ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "DEQUANTIZE", "FULLY_CONNECTED", "MEAN", "MUL", "QUANTIZE", "SUB", "TRANSPOSE_CONV",
})  # fmt: skip
ACTIVATIONS = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6")  # ActivationFunctionType, by number


class _Net:
    """Names of operators, and who makes and reads each activation."""

    def __init__(self, model: Any) -> None:
        graph = model.subgraphs[0]
        self.tensors, self.operators = graph.tensors, graph.operators
        self.names = [op_name(model, op) for op in graph.operators]
        steps = [
            Step(
                tuple(
                    int(i)
                    for i in op.inputs
                    if i >= 0 and not is_constant(model, graph.tensors[int(i)])
                ),
                tuple(int(i) for i in op.outputs),
            )
            for op in graph.operators
        ]
        self.graph: Graph[int] = Graph(steps, {int(i) for i in graph.outputs})

    def activation(self, op: int) -> str:
        """The activation that an operator ends with or is; ``""`` for none."""
        if self.names[op] in ACTIVATIONS:
            return self.names[op]
        number = getattr(self.operators[op].builtinOptions, "fusedActivationFunction", 0)
        return "" if number == 0 else (ACTIVATIONS[number] if number < len(ACTIVATIONS) else "?")

    def left_over(self, add: int, skip: int) -> str | None:
        """What has to stay of ``skip + 0``: ``""`` for nothing, the name of an operator, ``None`` where none can say it."""
        own = self.activation(add)
        maker = self.graph.maker.get(skip)
        if own and (maker is None or self.activation(maker) != own):
            return None if own == "?" else own
        total = self.graph.steps[add].outputs[0]
        readers = {self.names[i] for i in self.graph.readers.get(total, []) if i >= 0}
        rescaled = not is_quantized(self.tensors[total]) or readers <= RESCALING
        return "" if rescaled else "QUANTIZE"


def find_bypasses(model: Any, touched: Mapping[str, Collection[int]]) -> dict[str, Bypass[int]]:
    """For each channel group whose operators all lie in one residual branch: how to leave the branch out; one bypass a branch.

    An activation that the addition ends with stays as an operator, unless the skip comes out of the same one. Where an int8 sum is read
    by something that keeps scales (pooling, a reshape), a QUANTIZE takes the addition's place.

    Args:
        model: the dense file.
        touched: group -> operators that change with its width.
    """
    net = _Net(model)
    branches = net.graph.branches({i for i, name in enumerate(net.names) if name == "ADD"})
    around = {group: branch_of(branches, ops) for group, ops in touched.items()}
    made = {b: _bypass(net, b) for b in dict.fromkeys(around.values()) if b is not None}
    found = {group: made[branch] for group, branch in around.items() if branch is not None}
    return {group: bypass for group, bypass in found.items() if bypass is not None}


def _bypass(net: _Net, branch: Branch[int]) -> Bypass[int] | None:
    left = net.left_over(branch.add, branch.skip)
    if left is None:
        return None
    if left:
        return Bypass({*branch.steps}, {}, {branch.add: (left, branch.skip)})
    return Bypass({*branch.steps, branch.add}, {branch.total: branch.skip})


def bypassed(model: Any, op: Any, number: int, bypass: Bypass[int]) -> Any:
    """A copy of an operator that reads what the bypass says; where it stays of an addition, another operator on the skip alone."""
    op = copy.copy(op)
    inputs = [int(i) for i in op.inputs]
    if number in bypass.changed:
        name, skip = bypass.changed[number]
        op.opcodeIndex = operator_code(model, name)
        op.builtinOptionsType, op.builtinOptions = 0, None
        inputs = [skip]
    op.inputs = np.asarray([bypass.read(i) for i in inputs], np.int32)
    return op


def drop_zero_additions(model: Any) -> bool:
    """Leave out, in place, what a removed block left: additions of constant zeros in the shape of the sum, and an activation twice.

    An activation that such an addition ends with stays as an operator, unless what is left comes out of the same one. An addition whose
    sum is the model's output stays. The caller drops tensors that nothing reads any more.

    Returns:
        Whether anything changed.
    """
    net = _Net(model)
    graph = model.subgraphs[0]
    bypass: Bypass[int] = Bypass()
    for number, name in enumerate(net.names):
        inputs = net.graph.steps[number].inputs
        op = graph.operators[number]
        total = int(op.outputs[0])
        if name in ACTIVATIONS and -1 not in net.graph.readers.get(total, []):
            skip = bypass.read(inputs[0])
            maker = net.graph.maker.get(skip)
            if maker is not None and net.activation(maker) == name:
                bypass.gone.add(number)
                bypass.instead[total] = skip
        if name != "ADD" or len(inputs) != 1:
            continue
        other = next(int(i) for i in op.inputs if int(i) != inputs[0])
        shape = shape_of(graph.tensors[total])
        if shape_of(graph.tensors[other]) != shape or shape_of(graph.tensors[inputs[0]]) != shape:
            continue
        if constant_value(model, graph.tensors[other]).any():
            continue
        skip = bypass.read(inputs[0])
        left = net.left_over(number, skip)
        if left == "" and -1 not in net.graph.readers.get(total, []):
            bypass.gone.add(number)
            bypass.instead[total] = skip
        elif left:
            bypass.changed[number] = (left, skip)
    if not bypass.gone and not bypass.changed:
        return False
    graph.operators = [
        bypassed(model, op, i, bypass)
        for i, op in enumerate(graph.operators)
        if i not in bypass.gone
    ]
    return True
