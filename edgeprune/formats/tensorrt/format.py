"""ONNX files with explicit quantisation that TensorRT accepts and fuses; the board builds its engine from them.

An engine is not portable (NVIDIA/TensorRT#70, #2177, #2900), so what ships is ONNX. Where the QuantizeLinear (Q) and DequantizeLinear
(DQ) nodes stand decides what TensorRT runs in INT8 and what it can fuse; :func:`placement_problems` proves the rules on a graph.

Sources of the rules:

- Q and DQ take int8 with zero points of 0 only, per tensor or along one axis, with constant scales: docstrings of ``IQuantizeLayer``
  and ``IDequantizeLayer`` in NVIDIA's packages tensorrt-bindings 8.6.1 and tensorrt-cu12-bindings 10.3.0 (read 2026-11-25).
- Q/DQ in front of inputs only, biases in float, weights per output channel (axis 0 of Conv, 1 of ConvTranspose), and in a residual
  addition no Q/DQ on the side that comes straight from the convolution, so that the two fuse: NVIDIA's own ONNX quantiser,
  nvidia-modelopt 0.47.0, ``onnx/quantization/{int8,ort_utils,graph_utils}.py`` (read 2026-11-25); int8 weights with a DQ alone are its
  ``dq_only`` form.
- Opset: the parsers of TensorRT 8.5 and 8.6 (JetPack 5.1, the oldest that knows Orin Nano, and 6.0) are known to read opsets up to 17
  (onnx-tensorrt, docs/operators.md of release/8.5-GA and release/8.6-GA; not read again for this version).

None of these files has been given to a TensorRT parser by this project yet: on a host onnxruntime runs them, as stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import FormatError
from edgeprune.formats import Format, Variant
from edgeprune.formats.onnx.format import OnnxFormat
from edgeprune.formats.onnx.links import DEQUANTIZE, QUANTIZE, onnx_package, parse_model
from edgeprune.formats.onnx.quantize import OnnxTypes
from edgeprune.formats.onnx.resize import encode
from edgeprune.formats.onnx.sparsity import sparse_layers
from edgeprune.records.artifact import Artifact
from edgeprune.records.files import write_bytes
from edgeprune.records.formats import format_facts

if TYPE_CHECKING:
    from torch import nn

OPSET = 17
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POOLS = ("AveragePool", "GlobalAveragePool")
QUANTIZED = (*WEIGHTED, "Add", *POOLS)
FUSED_BEHIND = ("BatchNormalization", "Relu", "Clip")
# Reductions whose axes became an input in opset 18, before which they were an attribute.
REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
TYPES = OnnxTypes(
    activations="int8",
    per_channel=True,
    operators=QUANTIZED,
    extra={
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(QUANTIZED),
    },
)


class TensorrtFormat(OnnxFormat):
    """See :class:`edgeprune.formats.Format`."""

    info = format_facts("tensorrt")

    def __init__(self) -> None:
        super().__init__(TYPES)

    def variants(self) -> tuple[Variant, ...]:
        """None but its own: TensorRT takes no other types."""
        return ()

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """As :meth:`OnnxFormat.export <edgeprune.formats.onnx.format.OnnxFormat.export>`, in opset 17.

        Raises:
            FormatError: also when an operator has no form in that opset.
        """
        super().export(model, example, path)
        proto = parse_model(path.read_bytes())
        lower_opset(proto)
        write_bytes(path, encode(proto))
        return self.describe(path)

    def sparse_layers(self, path: Path) -> dict[str, bool]:
        """See :class:`edgeprune.formats.ShowsSparsity`."""
        return sparse_layers(path.read_bytes())

    def _arrange(self, quantized: Any) -> None:
        _free_fused_additions(quantized.graph)
        problems = placement_problems(quantized)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise FormatError(
                f"TensorRT would not take this quantised graph: {problems[0]}{more}",
                hint="ship the FP32 file, which the board builds in FP16",
            )


def lower_opset(proto: Any) -> None:
    """Rewrite a model of opset 18 in opset 17, in place.

    Raises:
        FormatError: an operator is not in opset 17, or uses what opset 18 added; names it.
    """
    onnx = onnx_package()
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    for node in proto.graph.node:
        settings = {a.name for a in node.attribute}
        if node.op_type in REDUCTIONS and len(node.input) == 2 and node.input[1] in constants:
            axes = [int(a) for a in constants[node.input[1]].ravel()]
            if axes:
                _drop_attributes(node, ("noop_with_empty_axes",))  # which says nothing then
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        elif node.op_type == "Split" and "num_outputs" in settings:
            _drop_attributes(node, ("num_outputs",))  # equal parts are what opset 13 does without
        elif node.op_type == "Resize":
            _drop_attributes(node, ("antialias", "keep_aspect_ratio_policy"), only_default=True)
    used = {name for node in proto.graph.node for name in node.input}
    kept = [
        type(i).FromString(i.SerializeToString()) for i in proto.graph.initializer if i.name in used
    ]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for item in proto.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = min(item.version, OPSET)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200]
        raise FormatError(
            f"the model does not fit opset {OPSET}, the newest that TensorRT 8.5 reads: {first}",
            hint="replace that operation, or try a target with another format",
        ) from error


def _drop_attributes(node: Any, names: tuple[str, ...], *, only_default: bool = False) -> None:
    defaults: dict[str, Any] = {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}
    helper = onnx_package().helper
    kept = [
        type(a).FromString(a.SerializeToString())
        for a in node.attribute
        if a.name not in names
        or (only_default and helper.get_attribute_value(a) != defaults[a.name])
    ]
    del node.attribute[:]
    node.attribute.extend(kept)


class _Wires:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        to_array = onnx_package().numpy_helper.to_array
        self.constants: dict[str, np.ndarray] = {i.name: to_array(i) for i in graph.initializer}
        self.maker = {o: node for node in self.nodes for o in node.output if o}
        self.readers: dict[str, list[Any]] = {v.name: [None] for v in graph.output}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def op(self, name: str) -> str:
        """Operator type that makes a tensor; ``""`` for inputs and constants."""
        return str(self.maker[name].op_type) if name in self.maker else ""

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor comes out of a DQ."""
        return self.op(name) == DEQUANTIZE

    def is_fusible(self, name: str) -> bool:
        """Whether a tensor is the output of a convolution (or product) that nobody else reads."""
        return self.op(name) in WEIGHTED and len(self.readers.get(name, ())) == 1

    def source(self, name: str) -> str:
        """The float tensor behind a Q/DQ pair, or the tensor itself."""
        if not self.is_quantized(name):
            return name
        stored = self.maker[name].input[0]
        return str(self.maker[stored].input[0]) if self.op(stored) == QUANTIZE else name


def _depth(wires: _Wires, name: str) -> int:
    """Longest way from the graph's input to a tensor, in nodes."""
    depths: dict[str, int] = {}
    for node in wires.nodes:  # a graph is stored in topological order
        found = 1 + max((depths.get(n, 0) for n in node.input), default=0)
        depths.update(dict.fromkeys(node.output, found))
    return depths.get(name, 0)


def _free_fused_additions(graph: Any) -> None:
    """Take the Q/DQ pair off one side of every residual addition: the side that comes straight from a convolution.

    TensorRT then adds inside that convolution. Where both sides do, the longer branch is the one that is freed, as NVIDIA's quantiser
    does; the other side stays quantised, which keeps the fused kernel's output in INT8.
    """
    wires = _Wires(graph)
    for node in wires.nodes:
        if node.op_type != "Add" or not all(wires.is_quantized(n) for n in node.input):
            continue
        sources = [wires.source(name) for name in node.input]
        straight = [
            slot
            for slot, name in enumerate(sources)
            if wires.op(name) in WEIGHTED and _only_pair_reads(wires, name, node.input[slot])
        ]
        if straight:
            slot = max(straight, key=lambda s: _depth(wires, sources[s]))
            node.input[slot] = sources[slot]
    _drop_unread(graph)


def _only_pair_reads(wires: _Wires, source: str, dequantized: str) -> bool:
    """Whether a tensor goes through one Q/DQ pair to one reader, and nowhere else."""
    stored = wires.maker[dequantized].input[0]
    return all(len(wires.readers.get(name, ())) == 1 for name in (source, stored, dequantized))


def _drop_unread(graph: Any) -> None:
    """Remove Q and DQ nodes that nobody reads, and constants that only they used, in place."""
    while True:
        read = {n for node in graph.node for n in node.input} | {v.name for v in graph.output}
        gone = [
            node
            for node in graph.node
            if node.op_type in (QUANTIZE, DEQUANTIZE) and not read & set(node.output)
        ]
        if not gone:
            break
        for node in gone:
            graph.node.remove(node)
    unused = [item for item in graph.initializer if item.name not in read]
    for item in unused:
        graph.initializer.remove(item)


def placement_problems(model: Any) -> tuple[str, ...]:
    """What in a quantised ONNX model breaks TensorRT's rules, a line each that names the node and the rule; empty when nothing does.

    Args:
        model: a parsed ``ModelProto``. A model without Q and DQ nodes breaks only the rule of the opset.
    """
    wires = _Wires(model.graph)
    found = [*_opset_problems(model)]
    for node in wires.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            found += _pair_problems(wires, node)
        if node.op_type in WEIGHTED:
            found += _weighted_problems(wires, node)
        if node.op_type == "Add":
            found += _addition_problems(wires, node)
        if node.op_type in FUSED_BEHIND:
            found += _between_problems(wires, node)
    return tuple(found)


def _named(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _opset_problems(model: Any) -> Iterator[str]:
    for item in model.opset_import:
        if item.domain not in ("", "ai.onnx"):
            yield f"the graph must use ONNX operators only, but imports the domain {item.domain}"
        elif item.version > OPSET:
            yield f"the graph must be of opset {OPSET} or older, but is of opset {item.version}"


def _pair_problems(wires: _Wires, node: Any) -> Iterator[str]:
    """Symmetric int8, constant scales, and a DQ behind every Q."""
    what = _named(node)
    scale = wires.constants.get(node.input[1])
    if scale is None or not np.isfinite(scale).all() or not (scale > 0).all():
        yield f"{what} must have a constant, positive scale"
        return
    zero = wires.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None:
        yield f"{what} must name an int8 zero point; without one ONNX means uint8"
    elif zero.dtype != np.int8:
        kind = "a bias in float, not a quantised one" if zero.dtype == np.int32 else "int8"
        yield f"{what} must have {kind}, but has {zero.dtype}"
    elif zero.any():
        yield f"{what} must be symmetric (zero point 0), but has zero point {zero.ravel()[0]}"
    is_constant = node.input[0] in wires.constants
    if node.op_type == QUANTIZE:
        others = {
            r.op_type if r is not None else "the output"
            for r in wires.readers.get(node.output[0], ())
        }
        if others - {DEQUANTIZE}:
            yield f"{what} must be read by {DEQUANTIZE} alone, but {sorted(others - {DEQUANTIZE})[0]} reads it"
        if scale.size > 1 and not is_constant:
            yield f"{what} must have one scale, because it quantises an activation, but has {scale.size}"


def _weighted_problems(wires: _Wires, node: Any) -> Iterator[str]:
    """Data and weights quantised or neither; weights per output channel; the bias in float."""
    what, weight = _named(node), node.input[1]
    settings = {a.name: a.i for a in node.attribute}
    data_is, weight_is = wires.is_quantized(node.input[0]), wires.is_quantized(weight)
    if data_is != weight_is:
        yield f"{what} must have both data and weights quantised, but only its {'data are' if data_is else 'weights are'}"
    if len(node.input) > 2 and wires.is_quantized(node.input[2]):
        yield f"{what} must have its bias in float, but it is quantised"
    if not weight_is or (wires.source(weight) in wires.maker and not _is_weight(wires, weight)):
        return
    pair = wires.maker[weight]
    scale = wires.constants.get(pair.input[1])
    if scale is None or scale.size < 2:
        return
    axis = {a.name: a.i for a in pair.attribute}.get("axis", 1)
    transposed = settings.get("transB", 0)
    wanted = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1}.get(node.op_type)
    if wanted is not None and axis != wanted:
        yield f"{what} must have weight scales along its output channels (axis {wanted}), but they go along axis {axis}"


def _is_weight(wires: _Wires, name: str) -> bool:
    stored = wires.maker[name].input[0]
    return stored in wires.constants or wires.source(name) in wires.constants


def _addition_problems(wires: _Wires, node: Any) -> Iterator[str]:
    """A residual addition runs in INT8 when the side that is not fused into a convolution is quantised."""
    if any(name in wires.constants for name in node.input):
        return
    quantized = [wires.is_quantized(name) for name in node.input]
    if not any(quantized):
        straight = [name for name in node.input if wires.is_fusible(name)]
        convolution = next((wires.maker[n] for n in straight), None)
        if convolution is not None and wires.is_quantized(convolution.input[0]):
            yield f"{_named(node)} must have its skip input quantised, or {_named(convolution)} writes float for it"
        return
    for name, is_quantized in zip(node.input, quantized, strict=True):
        if not is_quantized and not wires.is_fusible(name):
            yield (
                f"{_named(node)} must have {name} quantised too, because no convolution makes it for this addition alone"
            )


def _between_problems(wires: _Wires, node: Any) -> Iterator[str]:
    """A batch norm or activation is fused into the convolution in front of it, unless a Q/DQ pair stands between."""
    source = wires.source(node.input[0])
    if source != node.input[0] and wires.op(source) in (*WEIGHTED, "BatchNormalization", "Add"):
        yield f"{_named(node)} must follow {_named(wires.maker[source])} without Q/DQ between, to be fused with it"


FORMAT: Format = TensorrtFormat()
