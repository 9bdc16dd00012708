"""Residual blocks in TFLite graphs: how a file is written without one, and additions of zero that stand for a removed one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.formats._branches import Bypass, Graph, Step, branch_of
from edgeprune.formats._tflite_graph import (
    constant_value,
    is_constant,
    is_quantized,
    op_name,
    schema,
    shape_of,
)

# Operators that take int8 inputs of any scale to outputs of another: what reads a sum may read the skip in its place.
RESCALING = frozenset({
    "ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "DEQUANTIZE", "FULLY_CONNECTED", "MEAN", "MUL", "QUANTIZE", "SUB", "TRANSPOSE_CONV",
})  # fmt: skip


@dataclass
class TfliteBypass(Bypass[int]):
    """As :class:`Bypass`, with operators that take the place of an addition: number of the operator -> name of the new one."""

    changed: dict[int, str] = field(default_factory=dict)


def find_bypasses(
    model: Any, touched: Mapping[str, Collection[int]]
) -> dict[str, TfliteBypass]:
    """For each channel group whose operators all lie in one residual branch: how to leave the branch out.

    An activation that the addition ends with stays as an operator, unless the skip comes out of the same one. Where an int8 sum is read
    by something that keeps scales (pooling, a reshape), a QUANTIZE takes the addition's place.

    Args:
        model: the dense file.
        touched: group -> operators that change with its width.
    """
    tensors = model.subgraphs[0].tensors
    graph = _graph(model)
    adds = {i for i, op in enumerate(model.subgraphs[0].operators) if op_name(model, op) == "ADD"}
    branches = graph.branches(adds)
    bypasses = {}
    for group, ops in touched.items():
        branch = branch_of(branches, ops)
        if branch is None:
            continue
        bypass = TfliteBypass({*branch.steps})
        activation = _lasting_activation(model, graph, branch.add, branch.skip)
        names = {op_name(model, model.subgraphs[0].operators[i]) for i in graph.readers[branch.total]}
        if activation == "" and is_quantized(tensors[branch.total]) and not names <= RESCALING:
            activation = "QUANTIZE"
        if activation == "":
            bypass.gone.add(branch.add)
            bypass.instead[branch.total] = branch.skip
        elif activation is not None:
            bypass.changed[branch.add] = activation
            bypass.skips[branch.add] = branch.skip
        if activation is not None:
            bypasses[group] = bypass
    return bypasses
