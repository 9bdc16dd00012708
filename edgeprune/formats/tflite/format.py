"""TFLite files for LiteRT: converted by litert-torch, quantised by ai-edge-quantizer, run by ai-edge-litert."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.errors import EdgepruneError, FormatError, MissingTool
from edgeprune.formats import DEFAULT_OPTIONS, Format, QuantizeOptions
from edgeprune.formats.shared.calibration import calibrated
from edgeprune.formats.shared.finite import require_finite
from edgeprune.formats.shared.inputs import check_calibration
from edgeprune.formats.shared.quiet import MAX_REASON, Log, quiet
from edgeprune.formats.shared.ranges import ends
from edgeprune.formats.shared.widths import WidthDecoder
from edgeprune.formats.tflite import inspect as inspection
from edgeprune.formats.tflite.blocks import drop_zero_additions
from edgeprune.formats.tflite.graph import (
    DTYPES,
    is_constant,
    op_name,
    read_model,
    shape_of,
    text,
    write_model,
)
from edgeprune.formats.tflite.pools import bound_pools
from edgeprune.formats.tflite.resize import TfliteResizable
from edgeprune.formats.tflite.tensor_names import (
    drop_transposed_means,
    drop_unused,
    labelled,
    rename_tensors,
)
from edgeprune.formats.tflite.transposes import drop_flattened_transposes
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.files import sha256_bytes, write_bytes
from edgeprune.records.formats import format_facts
from edgeprune.workload.dataset import to_layout
from edgeprune.workload.memory import runs_channels_last
from edgeprune.workload.modes import in_eval

SIGNATURE = "serving_default"


class _ChannelsLast(nn.Module):
    """Takes images as ``[N, H, W, C]``, the layout TFLite kernels work in, so that no transpose is left at the input."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.runs_so = runs_channels_last(model, example)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model on channels-last images."""
        x = x.permute(0, 3, 1, 2)
        return self.model(x if self.runs_so else x.contiguous())  # type: ignore[no-any-return]


def _converter() -> Any:
    try:
        with quiet():
            import litert_torch
    except ImportError as error:
        raise MissingTool("litert-torch", "tflite") from error
    return litert_torch


def _quantizer() -> tuple[Any, Any]:
    try:
        with quiet():
            from ai_edge_quantizer import quantizer, recipe
    except ImportError as error:
        raise MissingTool("ai-edge-quantizer", "tflite") from error
    return quantizer, recipe


class TfliteFormat:
    """See :class:`edgeprune.formats.Format`."""

    info = format_facts("tflite")

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """Convert with litert-torch; images become channels-last inputs."""
        converter = _converter()
        copied, paths = labelled(model)
        x = torch.from_numpy(np.array(example, np.float32))
        wrapped = in_eval(_ChannelsLast(copied, x) if example.ndim == 4 else copied)
        sample = torch.from_numpy(to_layout(np.array(example, np.float32), self.info.layout))
        log = Log()
        try:
            with quiet() as log, torch.no_grad():
                content = bytes(converter.convert(wrapped, (sample,)).model_content())
        except Exception as error:
            raise FormatError(
                f"litert-torch could not convert the model: {_reason(error, log, wrapped, sample)}",
                hint="replace that operation, or try a target with another format",
            ) from error
        converted = read_model(content)
        if drop_zero_additions(converted):
            drop_unused(converted)
        bound_pools(converted)
        drop_transposed_means(converted)
        drop_flattened_transposes(converted)
        rename_tensors(converted, paths)
        write_bytes(path, write_model(converted))
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
        """Static INT8: weights per output channel, activations per tensor, ranges from the calibration samples.

        Raises:
            ModelError: a sample is not finite, or there is none.
            FormatError: an operator gives NaN or Inf, or the toolchain refuses the file.
        """
        quantizer_module, _ = _quantizer()
        content = fp32.read_bytes()
        samples = _as_stored(calibration)
        float_model = read_model(content)
        entry = float_model.signatureDefs[0].inputs[0]
        check_calibration(samples, shape_of(float_model.subgraphs[0].tensors[entry.tensorIndex]))
        log = Log()
        try:
            with quiet() as log:
                quantizer = quantizer_module.Quantizer(str(fp32), _recipe(float_model, options))
                feeds = [{text(entry.name): samples[i : i + 1]} for i in range(len(samples))]
                ranges = _ranges(content, samples, options, quantizer, feeds)
                quantized = bytes(quantizer.quantize(ranges).quantized_model)
        except EdgepruneError:
            raise
        except Exception as error:
            raise FormatError(
                f"ai-edge-quantizer could not quantise the model: {_reason(error, log)}"
            ) from error
        # Rewritten so that every buffer stands inside the flatbuffer: older runtimes read no other form.
        write_bytes(path, write_model(read_model(quantized)))
        return self.describe(path)

    def describe(self, path: Path) -> Artifact:
        """The record of a file; ``op_counts`` counts operators, and constants by dtype as ``weights:int8``."""
        content = path.read_bytes()
        model = read_model(content)
        graph = model.subgraphs[0]
        counts = Counter(op_name(model, op) for op in graph.operators)
        for tensor in graph.tensors:
            if is_constant(model, tensor):
                counts[f"weights:{DTYPES.get(tensor.type, np.dtype(object)).name}"] += 1
        int8 = counts.get("weights:int8", 0) > 0
        return Artifact(
            path=path.name,
            format=self.info.name,
            precision="int8" if int8 else "fp32",
            sha256=sha256_bytes(content),
            size_bytes=len(content),
            inputs=tuple(_spec(graph.tensors[i]) for i in graph.inputs),
            outputs=tuple(_spec(graph.tensors[i]) for i in graph.outputs),
            op_counts=dict(sorted(counts.items())),
        )

    def check_versions(self, path: Path, runtime: str) -> tuple[str, ...]:
        """Refuse what the oldest runtime cannot load, and name inner transposes; see :class:`edgeprune.formats.Versioned`."""
        inspection.check_versions(path.read_bytes(), runtime)
        count = self.describe(path).op_counts.get("TRANSPOSE", 0)
        if not count:
            return ()
        return (
            f"{path.name} holds {count} TRANSPOSE operators, which move memory and compute nothing",
        )

    def activations(self, fp32: Path, x: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """The values of all tensors for each sample; see :class:`edgeprune.formats.Inspectable`."""
        return inspection.activations(fp32.read_bytes(), _as_stored(x))

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
    ) -> TfliteResizable:
        """Pair two exports of one precision; see :class:`edgeprune.formats.Format`."""
        leaves = {path for path, module in model.named_modules() if not [*module.children()]}
        decoder = WidthDecoder(full, changed)
        return TfliteResizable(dense.read_bytes(), variant.read_bytes(), decoder, leaves - {""})


def _as_stored(x: np.ndarray) -> np.ndarray:
    """Samples in the file's layout; images are a view, because a copy of all of them would be of no use."""
    samples = np.asarray(x, np.float32)
    return samples.transpose(0, 2, 3, 1) if samples.ndim == 4 else samples


def _ranges(
    content: bytes,
    samples: np.ndarray,
    options: QuantizeOptions,
    quantizer: Any,
    feeds: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    """The range of every activation in the quantiser's own terms, with our ends: its own smooth extremes over samples, and so clip them."""
    found = calibrated(
        content,
        samples,
        lambda: inspection.activations(content, samples),
        counted=options.ranges != "minmax",
    )
    require_finite({n: (s.low, s.high) for n, s in found.items()}, inspection.readers(content))
    ranges: dict[str, Any] = quantizer.calibrate({SIGNATURE: feeds[:1]})
    if ranges.keys() - found.keys():  # tensors of its own, which it has to see all samples of
        ranges = quantizer.calibrate({SIGNATURE: feeds})
    for name in ranges.keys() & found.keys():
        low, high = ends(found[name], options)
        shape = np.shape(ranges[name]["min"])
        ranges[name] |= {
            "min": np.full(shape, low, np.float32),
            "max": np.full(shape, high, np.float32),
        }
    return ranges


def _recipe(float_model: Any, options: QuantizeOptions) -> Any:
    """INT8 everywhere but in the layers, inputs and outputs that stay in float."""
    from ai_edge_quantizer import qtyping, recipe_manager

    everything, skip = qtyping.TFLOperationName.ALL_SUPPORTED, "no_quantize"
    manager = recipe_manager.RecipeManager()
    manager.add_static_config(
        regex=".*", operation_name=everything, activation_num_bits=8, weight_num_bits=8
    )
    if options.io == "float":
        for edge in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            manager.add_quantization_config(regex=".*", operation_name=edge, algorithm_key=skip)
    graph = float_model.subgraphs[0]
    for op in graph.operators:
        if inspection.layer_of(float_model, op) in options.float_layers:
            scope = "".join(f"{text(graph.tensors[i].name)};" for i in op.outputs)
            manager.add_quantization_config(
                regex=f"^{re.escape(scope)}$", operation_name=everything, algorithm_key=skip
            )
    return manager.get_quantization_recipe()


def _spec(tensor: Any) -> TensorSpec:
    shape = tuple(int(d) for d in tensor.shape)
    quantization = tensor.quantization
    scaled = quantization is not None and quantization.scale is not None and len(quantization.scale)
    return TensorSpec(
        name=text(tensor.name),
        shape=shape,
        dtype=DTYPES.get(tensor.type, np.dtype(object)).name,
        layout="NHWC" if len(shape) == 4 else "other",
        scale=float(quantization.scale[0]) if scaled else None,
        zero_point=int(quantization.zeroPoint[0]) if scaled else None,
    )


def _reason(
    error: Exception,
    log: Log,
    model: nn.Module | None = None,
    sample: torch.Tensor | None = None,
) -> str:
    """What went wrong, with the operator and the layer where the converter names a node, and its own last error line."""
    said = str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = [(lines[0] if lines else type(error).__name__)[:MAX_REASON]]
    if operator := re.search(r"target=torch\.ops\.([\w.]+)", said):
        found.append(f"operator {operator[1]}")
    node = re.search(r"While executing %(\w+)", said)
    if node and model is not None and sample is not None:
        layer = _layer_of_node(model, sample, node[1])
        found += [f"layer {layer}"] if layer else []
    elif code := re.findall(r'File "[^"]*", line \d+, in \S+\n\s*(\S.*)', said):
        found.append(f"at: {code[-1].strip()[:120]}")
    if log.last_error() and log.last_error() not in found[0]:
        found.append(f"converter: {log.last_error()}")
    return ", ".join(found)


def _layer_of_node(model: nn.Module, sample: torch.Tensor, name: str) -> str:
    """The module in which a traced operation stands, ``""`` when it is not found or stands in the model itself."""
    try:
        with quiet():
            program = torch.export.export(model, (sample,), strict=False)
            graphs = (program.graph, program.run_decompositions().graph)
    except Exception:  # an error is being explained; failing to find the layer is no further error
        return ""
    nodes = [node for graph in graphs for node in graph.nodes if node.name == name]
    stacks = [node.meta.get("nn_module_stack") or {} for node in nodes]
    paths = [str(path) for stack in stacks for path, _ in stack.values()]
    inner = paths[-1] if paths else ""
    return inner.removeprefix("model").removeprefix(".") if sample.ndim == 4 else inner


FORMAT: Format = TfliteFormat()
