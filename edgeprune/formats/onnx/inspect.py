"""What happens inside an .onnx file: the values of its tensors, and the ranges it quantises them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgeprune.formats.onnx.links import (
    DEQUANTIZE,
    QUANTIZE,
    onnx_package,
    parse_model,
    runtime_package,
)


def activations(content: bytes, x: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The float tensors of a file that are no constants, sample by sample."""
    onnxruntime, onnx = runtime_package(), onnx_package()
    model = parse_model(content)
    shown = {value.name for value in model.graph.output}
    shapes = onnx.shape_inference.infer_shapes(model).graph
    floats = [
        value
        for value in shapes.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in shown
    ]
    made = {name for node in model.graph.node for name in node.output}
    model.graph.output.extend(value for value in floats if value.name in made)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Waiting threads would spin: on a busy machine that takes most of the time.
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    entry = session.get_inputs()[0].name
    names = [value.name for value in session.get_outputs()]
    for i in range(len(x)):
        sample = np.ascontiguousarray(x[i : i + 1], np.float32)
        yield {entry: sample, **dict(zip(names, session.run(names, {entry: sample}), strict=True))}


def ranges(content: bytes) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every activation that a QuantizeLinear rounds."""
    onnx = onnx_package()
    graph = parse_model(content).graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != QUANTIZE or node.input[1] not in constants:
            continue
        scale, zero = constants[node.input[1]], constants.get(node.input[2])
        if zero is None or scale.size != 1:
            continue
        limits, step, at = np.iinfo(zero.dtype), float(scale.ravel()[0]), int(zero.ravel()[0])
        ends = ((int(limits.min) - at) * step, (int(limits.max) - at) * step)
        found[str(node.input[0])] = ends
    return found


def layer_of(node: Any) -> str:
    """The torch layer of a node of an exported file, ``""`` where its name says none."""
    layer, _, operation = str(node.name).rpartition("/")
    return layer if operation else ""


def readers(content: bytes) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Operator type, torch layer and inputs of every tensor that a node writes."""
    graph = parse_model(content).graph
    constants = {item.name for item in graph.initializer}
    found: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    for node in graph.node:
        names = tuple(str(n) for n in node.input if n and n not in constants)
        found |= {str(o): (str(node.op_type), layer_of(node), names) for o in node.output}
    return found


def float_nodes(model: Any, layers: Iterable[str]) -> list[str]:
    """Names of the nodes that stay in float when these torch layers do."""
    wanted = set(layers)
    quantisers = (QUANTIZE, DEQUANTIZE)
    return [
        str(node.name)
        for node in model.graph.node
        if node.op_type not in quantisers and layer_of(node) in wanted
    ]
