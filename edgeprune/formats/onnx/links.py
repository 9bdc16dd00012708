"""Parsed ONNX files, and which dimensions of two exports are the same ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import FormatError, MissingTool
from edgeprune.formats.shared.widths import Links, Pair, Place, WidthDecoder

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})  # move no data
# Operators whose inputs and outputs have the same dimensions, counted from the last one, save for broadcasting.
ALIGNED = re.compile(
    "Abs|Add|AveragePool|Cast|Clip|Div|Elu|Erf|Exp|Expand|Gelu|GlobalAveragePool|HardSigmoid|HardSwish|LeakyRelu|LogSoftmax"
    "|Max|MaxPool|Min|Mish|Mul|Neg|PRelu|Pow|Reciprocal|Relu|Resize|Sigmoid|Softmax|Softplus|Sqrt|Sub|Tanh|Where"
)


def onnx_package() -> Any:
    """The ``onnx`` package.

    Raises:
        MissingTool: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingTool("onnx", "onnx") from error
    return onnx


def runtime_package() -> Any:
    """The ``onnxruntime`` package.

    Raises:
        MissingTool: it is not installed.
    """
    # The published wheels report usage over the network from the import on, unless this is set before.
    # Source: https://github.com/microsoft/onnxruntime/pull/27379 (read 2026-11-23)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingTool("onnxruntime", "onnx") from error
    return onnxruntime


def parse_model(content: bytes) -> Any:
    """The protobuf of a model file.

    Raises:
        FormatError: the bytes are no ONNX model.
    """
    onnx = onnx_package()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise FormatError("not an ONNX model: the protobuf cannot be read") from error
    if not model.graph.node:
        raise FormatError("not an ONNX model: its graph has no nodes")
    return model


@dataclass(frozen=True)
class GraphView:
    """A parsed file: nodes, constants by name, and ``(element type, dimensions)`` of every tensor."""

    model: Any
    nodes: tuple[Any, ...]
    constants: dict[str, np.ndarray]
    tensors: dict[str, tuple[int, tuple[int, ...]]]

    @classmethod
    def read(cls, content: bytes) -> GraphView:
        """Parse a file and infer all shapes once.

        Raises:
            FormatError: no ONNX model, or one whose shapes are not static.
        """
        onnx = onnx_package()
        model = parse_model(content)
        tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
        constants: dict[str, np.ndarray] = {}
        for item in model.graph.initializer:
            constants[item.name] = onnx.numpy_helper.to_array(item)
            tensors[item.name] = (item.data_type, tuple(item.dims))
        try:
            graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        except Exception as error:
            raise FormatError(f"onnx could not infer the shapes: {str(error)[:200]}") from error
        for value in [*graph.input, *graph.value_info, *graph.output]:
            kind = value.type.tensor_type
            if any(not d.HasField("dim_value") for d in kind.shape.dim):
                raise FormatError(f"tensor {value.name} must have a static shape")
            tensors[value.name] = (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim))
        return cls(model, tuple(model.graph.node), constants, tensors)

    def dimensions(self, name: str) -> tuple[int, ...]:
        """Dimensions of a tensor.

        Raises:
            FormatError: shape inference gave none.
        """
        if name not in self.tensors:
            raise FormatError(f"the shape of tensor {name} is not known")
        return self.tensors[name][1]


def find_links(
    graph: GraphView, decoder: WidthDecoder, sizes: Mapping[Place, Sequence[Pair]]
) -> Links:
    """How the dimensions of all tensors, shape constants and attributes hang together.

    Args:
        graph: the dense file.
        decoder: knows the groups.
        sizes: of the tensors (``Place("tensor", 0, name)``), and of the constants and attributes that change.

    Raises:
        FormatError: the parts of a join do not add up.
    """
    links = Links(decoder, sizes)
    for number, node in enumerate(graph.nodes):
        op, where = str(node.op_type), f"{node.op_type} {node.name}"
        inputs = [Place("tensor", 0, n) for n in node.input]
        outputs = [Place("tensor", 0, n) for n in node.output if n]
        settings = {a.name: a.i for a in node.attribute}
        axis = settings.get("axis", 0)
        if op in ("Conv", "ConvTranspose"):
            _link_convolution(links, inputs, outputs[0], turned=op == "ConvTranspose")
            group = Place("group", number, where)
            if group in sizes:
                links.same((group, 0), (inputs[0], 1))
        elif op in ("Gemm", "MatMul") and len(sizes[inputs[1]]) == 2:
            _link_product(links, inputs, outputs[0], turned=bool(settings.get("transB", 0)))
        elif op in (QUANTIZE, DEQUANTIZE):
            links.align(outputs[0], inputs[0])
            for parameter in inputs[1:]:
                if len(sizes[parameter]) == 1:
                    links.same((parameter, 0), (inputs[0], settings.get("axis", 1)))
        elif op == "Concat":
            links.join((outputs[0], axis), [(p, axis) for p in inputs], where=where)
        elif op == "Split":
            links.join((inputs[0], axis), [(p, axis) for p in outputs], where=where)
            _link_shape(links, sizes, inputs, [(p, axis) for p in outputs])
        elif op in ("Pad", "Slice"):
            links.shift(inputs[0], outputs[0], where=where)
        elif op in VIEWS or op in ("Transpose", "ReduceMean"):
            links.view(inputs[0], outputs[0])
        elif ALIGNED.fullmatch(op):
            links.align(outputs[0], *(p for p in inputs if p.name))
        if op in ("Reshape", "Expand"):
            _link_shape(
                links, sizes, inputs, [(outputs[0], i) for i in range(len(sizes[outputs[0]]))]
            )
    return links


def _link_shape(
    links: Links,
    sizes: Mapping[Place, Sequence[Pair]],
    inputs: Sequence[Place],
    dims: Sequence[tuple[Place, int]],
) -> None:
    """The second input of some operators lists dimensions of their outputs."""
    values = Place("values", 0, inputs[1].name if len(inputs) > 1 else "")
    if len(sizes.get(values, ())) == len(dims):
        for i, dim in enumerate(dims):
            links.same((values, i), dim)


def _link_convolution(
    links: Links, inputs: Sequence[Place], output: Place, *, turned: bool
) -> None:
    """Weights are stored ``[out, in / groups, ...]``; for a transposed convolution ``[in, out / groups, ...]``."""
    data, weight = inputs[0], inputs[1]
    writes, reads = (1, 0) if turned else (0, 1)
    links.same((weight, reads), (data, 1))
    if not turned and links.equal((weight, 0), (data, 1)) and links.fixed((weight, 1)):
        links.same((weight, 0), (data, 1))  # depthwise
    else:
        links.written((weight, writes))
    links.same((weight, writes), (output, 1))
    if len(inputs) > 2:
        links.same((inputs[2], 0), (weight, writes))


def _link_product(links: Links, inputs: Sequence[Place], output: Place, *, turned: bool) -> None:
    """A matrix of weights, ``[in, out]`` or turned ``[out, in]``."""
    weight = inputs[1]
    writes, reads = (0, 1) if turned else (1, 0)
    links.same((weight, reads), (inputs[0], -1))
    links.written((weight, writes))
    links.same((weight, writes), (output, -1))
    if len(inputs) > 2:
        links.same((inputs[2], -1), (weight, writes))
