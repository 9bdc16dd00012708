"""ONNX files for onnxruntime: exported by torch, quantised to QDQ by onnxruntime's own tools, run by its CPU provider."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import EdgepruneError, FormatError, MissingTool
from edgeprune.formats import DEFAULT_OPTIONS, Format, QuantizeOptions, Variant
from edgeprune.formats.onnx import inspect as inspection
from edgeprune.formats.onnx.blocks import drop_zero_additions
from edgeprune.formats.onnx.links import DEQUANTIZE, QUANTIZE, onnx_package, parse_model
from edgeprune.formats.onnx.quantize import OnnxTypes, quantised
from edgeprune.formats.onnx.resize import OnnxResizable, encode
from edgeprune.formats.shared.calibration import calibrated
from edgeprune.formats.shared.finite import require_finite
from edgeprune.formats.shared.inputs import check_calibration
from edgeprune.formats.shared.quiet import silent
from edgeprune.formats.shared.ranges import ends
from edgeprune.formats.shared.widths import WidthDecoder
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.files import sha256_bytes, write_bytes
from edgeprune.records.formats import format_facts

if TYPE_CHECKING:
    from torch import nn

OPSET = 18
# The oldest that opset 18 allows (ONNX 1.13), so that older runtimes on boards load the file.
IR_VERSION = 8
MAX_FILE_BYTES = 2**31 - 1  # protobuf's limit for one message
PRODUCER = "edgeprune"


# What onnxruntime has INT8 kernels for; which of them is fastest differs by processor, so it is measured. The first is the default.
VARIANTS = (
    OnnxTypes(),
    OnnxTypes(activations="int8"),
    OnnxTypes(per_channel=False),
    OnnxTypes(activations="int8", per_channel=False),
)


class OnnxFormat:
    """See :class:`edgeprune.formats.Format`.

    Args:
        types: what :meth:`quantize` writes.
    """

    def __init__(self, types: OnnxTypes | None = None) -> None:
        self.types = types or OnnxTypes()

    @property
    def variant(self) -> str:
        """The integer types that :meth:`quantize` writes, by name."""
        return self.types.name

    def variants(self) -> tuple[Variant, ...]:
        """See :class:`edgeprune.formats.HasVariants`."""
        return tuple(OnnxFormat(types) for types in VARIANTS)

    info = format_facts("onnx")

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """Export with torch: static shapes, one file, input ``input``, output ``output``; batch norms are folded."""
        onnx = onnx_package()
        _require_exporter()
        proto = _export(model, example)
        _drop_notes(proto)
        drop_zero_additions(proto.graph)
        _fold_batch_norms(proto.graph)
        _use_global_pooling(proto.graph)
        _tidy_constants(proto.graph)
        del proto.graph.value_info[:]  # they can go stale; every reader infers shapes anew
        proto.ir_version = IR_VERSION
        if proto.ByteSize() > MAX_FILE_BYTES:
            raise FormatError(f"the model takes {proto.ByteSize()} bytes; one file holds 2 GiB")
        try:
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:
            raise FormatError(f"onnx refused the exported model: {_first_line(error)}") from error
        write_bytes(path, encode(proto))
        return self.describe(path)

    def quantize(
        self,
        fp32: Path,
        calibration: np.ndarray,
        path: Path,
        *,
        model: nn.Module | None = None,
        options: QuantizeOptions = DEFAULT_OPTIONS,
    ) -> Artifact:
        """Static INT8 in QDQ form, by default int8 weights per output channel, uint8 activations; ranges from the samples.

        By default activations are unsigned (U8S8) although onnxruntime's guide proposes S8S8 first. Its x86-64 CPU provider fuses
        quantised operators only for uint8 activations; it rewrites signed ones on loading, but not where a tensor has several
        readers, so that every convolution behind a residual branch would run in float (onnxruntime 1.32: 11 of the 21
        convolutions of the example net). On ARM64 both signs have their own kernels. The weights keep 8 bits: 7
        (``reduce_range``) help only x86 without VNNI, where a 16-bit sum can saturate.

        Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (read 2026-11-23).
        """
        if options.io == "int8":
            raise FormatError(
                "ONNX files take and return float; io int8 is for tflite", hint="set io: float"
            )
        content = fp32.read_bytes()
        proto = parse_model(content)
        check_calibration(calibration, _spec(proto.graph.input[0]).shape)
        floats = inspection.float_nodes(proto, options.float_layers)
        try:
            with silent():
                ranges = _ranges(content, np.asarray(calibration, np.float32), options)
                quantized = quantised(proto, ranges, self.types, floats)
        except EdgepruneError:
            raise
        except Exception as error:
            raise FormatError(
                f"onnxruntime could not quantise the model: {_first_line(error)}"
            ) from error
        require_finite(inspection.ranges(quantized.SerializeToString()), self.readers(fp32))
        del quantized.metadata_props[:]
        del quantized.graph.value_info[:]
        quantized.producer_name, quantized.producer_version = PRODUCER, ""
        quantized.ir_version = IR_VERSION
        self._arrange(quantized)
        write_bytes(path, encode(quantized))
        return self.describe(path)

    def _arrange(self, quantized: Any) -> None:
        """What another runtime of the same files needs changed in a quantised graph, in place."""

    def describe(self, path: Path) -> Artifact:
        """The record of a file.

        ``op_counts`` counts operators by type; ``int8:Conv`` those that read and write quantised activations only;
        ``weights:int8`` the constants of two and more dimensions by dtype.
        """
        onnx = onnx_package()
        content = path.read_bytes()
        graph = parse_model(content).graph
        counts = Counter(str(node.op_type) for node in graph.node)
        counts.update(_quantized_ops(graph))
        for item in graph.initializer:
            if len(item.dims) >= 2:
                counts[f"weights:{onnx.helper.tensor_dtype_to_np_dtype(item.data_type).name}"] += 1
        constants = {item.name for item in graph.initializer}
        return Artifact(
            path=path.name,
            format=self.info.name,
            precision="int8" if counts.get("weights:int8", 0) else "fp32",
            sha256=sha256_bytes(content),
            size_bytes=len(content),
            inputs=tuple(_spec(value) for value in graph.input if value.name not in constants),
            outputs=tuple(_spec(value) for value in graph.output),
            op_counts=dict(sorted(counts.items())),
        )

    def activations(self, fp32: Path, x: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """The values of all tensors for each sample; see :class:`edgeprune.formats.Inspectable`."""
        return inspection.activations(fp32.read_bytes(), np.asarray(x, np.float32))

    def ranges(self, int8: Path) -> dict[str, tuple[float, float]]:
        """What each quantised activation can hold; see :class:`edgeprune.formats.Inspectable`."""
        return inspection.ranges(int8.read_bytes())

    def readers(self, fp32: Path) -> dict[str, tuple[str, str, tuple[str, ...]]]:
        """What writes each tensor; see :class:`edgeprune.formats.Inspectable`."""
        return inspection.readers(fp32.read_bytes())

    def resizable(
        self,
        dense: Path,
        variant: Path,
        full: Mapping[str, int],
        changed: Mapping[str, int],
        model: nn.Module,
    ) -> OnnxResizable:
        """Pair two exports of one precision; see :class:`edgeprune.formats.Format`."""
        leaves = {path for path, module in model.named_modules() if not [*module.children()]}
        decoder = WidthDecoder(full, changed)
        return OnnxResizable(dense.read_bytes(), variant.read_bytes(), decoder, leaves - {""})


def _ranges(
    content: bytes, calibration: np.ndarray, options: QuantizeOptions
) -> dict[str, tuple[float, float]]:
    """Where the range of every float tensor of a file ends."""
    found = calibrated(
        content,
        calibration,
        lambda: inspection.activations(content, calibration),
        counted=options.ranges != "minmax",
    )
    return {name: ends(spread, options) for name, spread in found.items()}


def _require_exporter() -> None:
    try:
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError as error:
        raise MissingTool("onnxscript", "onnx") from error


def _export(model: nn.Module, example: np.ndarray) -> Any:
    import torch

    sample = (torch.from_numpy(np.array(example, np.float32)),)
    program: Any = None
    try:
        with silent(), torch.no_grad():
            program = torch.export.export(model, sample, strict=False)
            exported = torch.onnx.export(
                program,
                sample,
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
    except Exception as error:
        raise FormatError(
            f"torch could not export the model to ONNX: {_reason(error, program)}",
            hint="replace that operation, or try a target with another format",
        ) from error
    return exported.model_proto  # type: ignore[union-attr]


def _reason(error: BaseException, program: Any) -> str:
    """What went wrong, innermost cause first, with the operator and layer that the exporter names."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(item) for item in chain)
    found = [_first_line(chain[-1])]
    if operator := re.search(r"target=torch\.ops\.([\w.]+)", text):
        found.append(f"operator {operator[1]}")
    if node := re.search(r"translating node %(\w+)", text):
        layer = _layer_of_node(program, node[1])
        found += [f"layer {layer}"] if layer else []
    elif code := re.search(r"in forward\n\s*(\S.*)", text):
        found.append(f"at: {code[1].strip()[:120]}")
    return ", ".join(found)


def _layer_of_node(program: Any, name: str) -> str:
    """The module in which a traced operation stands, ``""`` when it is not found or stands in the model itself."""
    with silent():
        nodes = program.run_decompositions().graph.nodes
    stacks = [node.meta.get("nn_module_stack") or {} for node in nodes if node.name == name]
    paths = [str(path) for stack in stacks for path, _ in stack.values()]
    return paths[-1] if paths else ""


def _drop_notes(proto: Any) -> None:
    """Name every node ``layer/operation``, and remove the exporter's notes, which hold source lines and local paths."""
    taken: set[str] = set()
    for node in proto.graph.node:
        name = base = _node_name(node)
        number = 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        node.name, node.doc_string = name, ""
        del node.metadata_props[:]
    for item in [*proto.graph.initializer, *proto.graph.input, *proto.graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.doc_string = proto.graph.doc_string = ""
    proto.producer_name, proto.producer_version = PRODUCER, ""


def _node_name(node: Any) -> str:
    """``layer/operation``: from the weight's parameter path (a folded batch norm leaves its own scope), else from the scope."""
    operation = str(node.op_type).lower()
    weights = [n for n in node.input if n.endswith(".weight")]
    if weights and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return f"{weights[0].removesuffix('.weight')}/{operation}"
    notes = {item.key: item.value for item in node.metadata_props}
    try:
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    except (SyntaxError, ValueError):
        scopes = []
    scope = str(scopes[-2]) if len(scopes) >= 2 else ""
    return f"{scope}/{operation}" if scope else operation


def _constants(graph: Any) -> dict[str, np.ndarray]:
    to_array = onnx_package().numpy_helper.to_array
    return {item.name: to_array(item) for item in graph.initializer}


def _ranks(graph: Any) -> dict[str, int]:
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}


def _fold_batch_norms(graph: Any) -> None:
    """Turn batch norms that follow no convolution into depthwise 1x1 convolutions, in place.

    The exporter folds the others. In this form they have an INT8 kernel, with one scale per channel; as BatchNormalization they
    would run in float.
    """
    onnx = onnx_package()
    constants, ranks = _constants(graph), _ranks(graph)
    for node in graph.node:
        if node.op_type != "BatchNormalization" or ranks.get(node.input[0], 0) < 3:
            continue
        if any(name not in constants for name in node.input[1:]):
            continue
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        gain, offset, mean, variance = (constants[n].astype(np.float64) for n in node.input[1:])
        scale = gain / np.sqrt(variance + settings.get("epsilon", 1e-5))
        spatial = ranks[node.input[0]] - 2
        weight = scale.reshape(-1, *[1] * (spatial + 1))
        for suffix, value in (("scale", weight), ("offset", offset - mean * scale)):
            name = f"{node.output[0]}.{suffix}"
            graph.initializer.append(
                onnx.numpy_helper.from_array(value.astype(np.float32), name=name)
            )
        folded = onnx.helper.make_node(
            "Conv",
            [node.input[0], f"{node.output[0]}.scale", f"{node.output[0]}.offset"],
            [node.output[0]],
            name=node.name,
            group=len(scale),
            kernel_shape=[1] * spatial,
        )
        node.CopyFrom(folded)


def _use_global_pooling(graph: Any) -> None:
    """Write means over all of height and width as GlobalAveragePool, in place: onnxruntime has an INT8 kernel for it only."""
    onnx = onnx_package()
    constants, ranks = _constants(graph), _ranks(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
            continue
        rank = ranks.get(node.input[0], 0)
        axes = sorted(int(a) % rank for a in constants[node.input[1]]) if rank else []
        if rank < 3 or axes != [*range(2, rank)]:
            continue
        keep = {a.name: a.i for a in node.attribute}.get("keepdims", 1)
        output = node.output[0]
        pooled = output if keep else f"{output}.pooled"
        squeeze = onnx.helper.make_node(
            "Squeeze", [pooled, node.input[1]], [output], name=f"{node.name}_squeeze"
        )
        pool = onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)
        nodes[-1:] = [pool] if keep else [pool, squeeze]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _tidy_constants(graph: Any) -> None:
    """Give every use of a small constant its own copy, and drop unused constants, in place.

    The exporter shares equal constants, such as two zero biases; at other widths they are no longer equal.
    """
    constants = {item.name: item for item in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name in taken and len(constants[name].dims) <= 1:
                fresh = f"{name}.{slot}.{node.output[0]}"
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[slot] = fresh
            elif name in constants:
                taken.add(name)
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in graph.output}
    kept = [type(i).FromString(i.SerializeToString()) for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _quantized_ops(graph: Any) -> Counter[str]:
    """Operators whose activations are quantised on all sides, as ``int8:Conv``."""
    made = {o: str(node.op_type) for node in graph.node for o in node.output}
    read: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            read.setdefault(name, []).append(str(node.op_type))
    counts: Counter[str] = Counter()
    for node in graph.node:
        before = {made[n] for n in node.input if n in made}
        after = {op for n in node.output for op in read.get(n, ["output"])}
        if node.op_type not in (QUANTIZE, DEQUANTIZE) and (before, after) == (
            {DEQUANTIZE},
            {QUANTIZE},
        ):
            counts[f"int8:{node.op_type}"] += 1
    return counts


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(int(d.dim_value) for d in kind.shape.dim)
    return TensorSpec(
        name=str(value.name),
        shape=shape,
        dtype=onnx_package().helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
        layout="NCHW" if len(shape) == 4 else "other",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


FORMAT: Format = OnnxFormat()
