"""From a torch model to a Core ML program with coremltools: in half precision, with INT8 weights, or with INT8 weights and activations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgeprune.errors import FormatError, ModelError
from edgeprune.formats.coreml.package import quiet, toolchain
from edgeprune.formats.shared.finite import explained, require_bounded
from edgeprune.workload.batches import passes
from edgeprune.workload.modes import eval_copy, in_eval
from edgeprune.workload.outputs import mark, outputs_of

if TYPE_CHECKING:
    from edgeprune.formats import AppFacts

IMAGE, TENSOR, LOGITS, PROBABILITIES = "image", "input", "output", "probabilities"
DEPLOYMENT = "iOS17"  # the oldest whose programs have quantize and dequantize
OBSERVERS_STAY = 10**9  # a step that never comes
# It merges dequantize, reshape and quantize into a reshape of integers without a look at the two scales, which differ where torch saw
# other ranges before and after a flatten: answers are then wrong by their ratio (coremltools 9.0).
BROKEN_PASS = "common::int_op_canonicalization"  # noqa: S105
POOLINGS = ("aten.max_pool", "aten.avg_pool")
MAX_REASON = 300
CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Entry:
    """How a sample enters the program.

    An image enters as ``scale * raw + bias[c]`` with raw values 0 to 255, which is all that Core ML can do itself; with ``mean`` and
    ``std`` the program goes on with ``(x - mean[c]) / std[c]``. A tensor enters as it is.
    """

    name: str = TENSOR
    is_image: bool = False
    is_grey: bool = False
    scale: float = 1.0
    bias: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    note: str = ""  # why it is no image, where the data are images


def entry_for(facts: AppFacts | None, shape: Sequence[int]) -> Entry:
    """How samples of a model with this input shape ``[1, C, H, W]`` enter its program."""
    if facts is None or facts.preprocess.kind != "image":
        return Entry()
    preprocess, channels = facts.preprocess, 1 if facts.preprocess.color == "grey" else 3
    if len(shape) != 4 or shape[1] != channels:
        return Entry(
            note=f"a tensor input: Core ML takes {preprocess.color} images of {channels} channels,"
            f" and the model {list(shape)}"
        )
    mean, std = (
        tuple(float(v) for v in (values if len(values) == channels else values * channels))
        for values in (preprocess.mean, preprocess.std)
    )
    grey = channels == 1
    if len(set(std)) == 1:
        bias = tuple(-m / std[0] for m in mean)
        return Entry(IMAGE, True, grey, 1 / (255 * std[0]), bias)
    return Entry(IMAGE, True, grey, 1 / 255, (0.0,) * channels, mean, std)


class Dressed(nn.Module):
    """The model as an app meets it: values normalised where the image type cannot, and probabilities beside its own outputs."""

    def __init__(self, model: nn.Module, entry: Entry, with_probabilities: bool) -> None:
        super().__init__()
        self.model, self.with_probabilities = model, with_probabilities
        self.mean: torch.Tensor | None
        self.std: torch.Tensor | None
        for name, values in (("mean", entry.mean), ("std", entry.std)):
            self.register_buffer(
                name, torch.tensor(values).reshape(1, -1, 1, 1) if values else None
            )

    def forward(self, x: torch.Tensor) -> Any:
        """What the model says, and probabilities if they are wanted."""
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        said: torch.Tensor = self.model(x)
        if not self.with_probabilities:
            return said
        if outputs_of(self.model) == "logits":
            return said, torch.softmax(said, 1)
        # Core ML wants an output of its own for the table of the classes; half precision does not sum to 1 exactly.
        return said, said / said.sum(1, keepdim=True)


def check_labels(labels: Sequence[str] | None, model: nn.Module, example: np.ndarray) -> None:
    """Raise unless there are no labels or one for each output.

    Raises:
        ModelError: there are more or fewer, or one stands twice: Core ML tells classes by their label.
    """
    if labels is None:
        return
    with torch.no_grad():
        found = model(torch.from_numpy(example))
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or found.shape[1] != len(labels):
        shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ModelError(
            f"there must be one label for each output, but there are {len(labels)} labels and the model gives {shape}",
            hint="correct labels in edgeprune.yaml, one for each class in the order of the outputs",
        )
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise ModelError(
            f"labels of a Core ML classifier must differ, but {twice[0]!r} stands twice",
            hint="correct labels in edgeprune.yaml",
        )


def float_model(
    model: nn.Module, example: np.ndarray, entry: Entry, with_probabilities: bool
) -> Any:
    """An ``MLModel`` in half precision.

    Raises:
        FormatError: torch or coremltools refuses the model; names the operation, and its layer where it can.
    """
    sample = torch.from_numpy(np.array(example, np.float32))
    dressed = in_eval(Dressed(eval_copy(model), entry, with_probabilities))
    program: Any = None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(dressed, (sample,), strict=False)
            program = program.run_decompositions({})
            _name_strides(program)
            return _converted(program, sample.shape, entry, with_probabilities)
    except Exception as error:
        raise FormatError(
            f"coremltools could not convert the model: {_reason(error, program)}",
            hint="replace that operation, or try a target with another format",
        ) from error


def _name_strides(program: Any) -> None:
    """Give every pooling its stride, in place: torch leaves out one that equals the window, and coremltools 9.0 wants it said."""
    for node in program.graph.nodes:
        name = str(node.target) if node.op == "call_function" else ""
        if name.startswith(POOLINGS) and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
    program.graph_module.recompile()


def weight_only_model(found: Any) -> Any:
    """The same ``MLModel`` with every weight in INT8: symmetric, one scale for each output channel; it computes in half precision."""
    from coremltools.optimize.coreml import (
        OpLinearQuantizerConfig,
        OptimizationConfig,
        linear_quantize_weights,
    )

    config = OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int8", granularity="per_channel", weight_threshold=0
    )
    try:
        with quiet(), np.errstate(all="ignore"):  # a channel of zeros has the scale 0
            return linear_quantize_weights(found, OptimizationConfig(global_config=config))
    except Exception as error:
        raise FormatError(f"coremltools could not quantise the weights: {_first(error)}") from error


def calibrated_model(
    model: nn.Module, calibration: np.ndarray, *, per_channel: bool = True
) -> nn.Module:
    """The model with INT8 weights and activations as torch computes them: values rounded to their steps.

    Weights are symmetric, with one scale for each output channel; activations have one scale a tensor, from the lowest and highest value
    that the samples gave.

    Raises:
        FormatError: the model cannot be traced by ``torch.fx``, which coremltools needs to find what to quantise.
    """
    from coremltools.optimize.torch.quantization import (
        LinearQuantizer,
        LinearQuantizerConfig,
        ModuleLinearQuantizerConfig,
        ObserverType,
    )

    samples = torch.from_numpy(np.asarray(calibration, np.float32))
    settings = ModuleLinearQuantizerConfig(
        quantization_scheme="symmetric",
        weight_per_channel=per_channel,
        weight_observer=ObserverType.min_max,
        activation_observer=ObserverType.min_max,
        # Observers from the first step on, no rounding while they look, batch norms at rest.
        milestones=[0, OBSERVERS_STAY, OBSERVERS_STAY, 0],
    )
    try:
        with quiet(), torch.no_grad():
            quantizer = LinearQuantizer(
                eval_copy(model), LinearQuantizerConfig(global_config=settings)
            )
            prepared = quantizer.prepare(example_inputs=(samples[:1],))
            quantizer.step()
            prepared.eval()
            for part in passes(samples, CALIBRATION_BATCH):
                prepared(samples[part])
            require_bounded(prepared)
            finished: nn.Module = quantizer.finalize().eval()
            mark(finished, outputs_of(model))
    except Exception as error:
        refused = FormatError(
            f"coremltools could not quantise the model: {_first(error)}",
            hint="its forward must be traceable by torch.fx; weight-only INT8 needs no trace (int8_schemes of the profile)",
        )
        raise explained(refused, model, samples.numpy()) from error
    return finished


def quantized_model(
    calibrated: nn.Module, shape: Sequence[int], entry: Entry, with_probabilities: bool
) -> Any:
    """An ``MLModel`` with INT8 weights and activations, from what :func:`calibrated_model` gave."""
    dressed = in_eval(Dressed(calibrated, entry, with_probabilities))
    sample = torch.zeros(tuple(shape))
    try:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(dressed, sample)  # type: ignore[no-untyped-call]
            return _converted(traced, shape, entry, with_probabilities)
    except Exception as error:
        raise FormatError(
            f"coremltools could not convert the quantised model: {_first(error)}",
            hint="try weight-only INT8 (int8_schemes of the profile)",
        ) from error


def weight_bytes(found: Any) -> bytes:
    """The weight file of an ``MLModel``; empty where the program has none."""
    folder = found.weights_dir
    file = Path(folder, "weight.bin") if folder else None
    return file.read_bytes() if file is not None and file.is_file() else b""


def _converted(program: Any, shape: Sequence[int], entry: Entry, with_probabilities: bool) -> Any:
    coremltools = toolchain()
    names = [LOGITS, PROBABILITIES] if with_probabilities else [LOGITS]
    passes = coremltools.PassPipeline()
    passes.remove_passes({BROKEN_PASS})
    return coremltools.convert(
        program,
        source="pytorch",
        inputs=[_input_type(coremltools, shape, entry)],
        outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in names],
        convert_to="mlprogram",
        minimum_deployment_target=getattr(coremltools.target, DEPLOYMENT),
        compute_precision=coremltools.precision.FLOAT16,
        pass_pipeline=passes,
        skip_model_load=True,
    )


def _input_type(coremltools: Any, shape: Sequence[int], entry: Entry) -> Any:
    size = tuple(int(s) for s in shape)
    if not entry.is_image:
        return coremltools.TensorType(name=entry.name, shape=size, dtype=np.float32)
    layout = coremltools.colorlayout.GRAYSCALE if entry.is_grey else coremltools.colorlayout.RGB
    bias: Any = entry.bias[0] if entry.is_grey else list(entry.bias)
    return coremltools.ImageType(
        name=entry.name, shape=size, scale=entry.scale, bias=bias, color_layout=layout
    )


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:MAX_REASON]


def _reason(error: BaseException, program: Any) -> str:
    """What went wrong, with the operation and the layer it stands in, where the converter names one."""
    said, first = str(error), _first(error)
    node = re.search(r"Unsupported fx node (\w+)", said)
    operation = re.search(r"op '(?:\w+::)?(\w+)'", said)
    if program is None or not (node or operation):
        return first
    for found in program.graph.nodes:
        if found.op != "call_function":
            continue
        is_named = node is not None and found.name == node[1]
        if is_named or (operation is not None and f".{operation[1]}." in str(found.target)):
            stack = [str(path) for path, _ in (found.meta.get("nn_module_stack") or {}).values()]
            layer = stack[-1].removeprefix("model").removeprefix(".") if stack else ""
            return ", ".join(
                [first, f"operator {found.target}", *([f"layer {layer}"] if layer else [])]
            )
    return first
