"""Which weights of an .onnx file are 2:4 sparse, read off the numbers that lie in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprune.formats.onnx.inspect import layer_of
from edgeprune.formats.onnx.links import DEQUANTIZE, QUANTIZE, onnx_package, parse_model
from edgeprune.records.sparsity import GROUP, KEPT


def sparse_layers(content: bytes) -> dict[str, bool]:
    """For each convolution and product with constant weights whether they are 2:4 sparse, by torch layer, else by node.

    Along the input channels of each output channel and each place of the kernel at most two of every four weights are not zero. Of INT8
    weights the stored integers are looked at: their zero point is 0, so a zero stands for zero. A convolution with groups, or with input
    channels that are no multiple of four, never counts as sparse.
    """
    onnx = onnx_package()
    graph = parse_model(content).graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    found: dict[str, bool] = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weight = _stored(str(node.input[1]), constants, maker)
        if weight is not None:
            name = layer_of(node) or str(node.name or node.output[0])
            found[name] = found.get(name, True) and _is_sparse(node, weight)
    return found


def _stored(
    name: str, constants: dict[str, np.ndarray], maker: dict[str, Any]
) -> np.ndarray | None:
    """The numbers that a tensor has in the file, before they are dequantised; ``None`` for what is computed."""
    while name not in constants:
        node = maker.get(name)
        if node is None or node.op_type not in (QUANTIZE, DEQUANTIZE):
            return None
        if node.op_type == DEQUANTIZE and len(node.input) > 2:
            zero = constants.get(str(node.input[2]))
            if zero is None or zero.any():  # a stored zero is no zero then
                return None
        name = str(node.input[0])
    return constants[name]


def _is_sparse(node: Any, weight: np.ndarray) -> bool:
    settings = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv":
        if settings.get("group", 1) != 1:
            return False
    elif weight.ndim != 2:
        return False
    elif not (node.op_type == "Gemm" and settings.get("transB", 0)):
        weight = weight.T  # [inputs, outputs] as it lies there
    if weight.shape[1] % GROUP:
        return False
    last = np.moveaxis(weight, 1, -1)
    fours = last.reshape(*last.shape[:-1], -1, GROUP)
    return bool((np.count_nonzero(fours, axis=-1) <= KEPT).all())
