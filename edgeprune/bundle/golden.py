"""Golden samples: real inputs and the answers of the shipped file, and whether a runtime still gives them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.bundle.integrity import read_checked
from edgeprune.bundle.manifest import MIN_GOLDEN, Manifest, Tolerance
from edgeprune.errors import IntegrityError, ModelError
from edgeprune.records.arrays import npy_array
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.formats import format_facts
from edgeprune.records.workload import Preprocess
from edgeprune.workload.dataset import model_input, to_layout

# float32 differences of exact quantisation steps may exceed n steps by a rounding error.
_ROUNDING = 1.001
INT8_STEPS = 3
# The kernels inside tflite-runtime 2.14 round sums twice and those of XNNPACK once, which adds up over layers; XNNPACK has no INT8 there.
BUILTIN_STEPS = 8
FP32_ATOL_RATIO = 1e-4
SOFTMAX_STEP = 1 / 256  # in INT8, whatever the range of the answers is; TensorFlow Lite fixes it
# TensorRT runs float files in FP16, and what stands between the INT8 kernels of a net too. Our own bounds; no Jetson was measured.
FP16_ATOL_RATIO, FP16_STEPS = 1e-2, 8
# A choice with room, not a measurement: half precision keeps 11 bits, and an engine may also add in half precision.
HALF_ATOL_RATIO = 0.05


@dataclass(frozen=True)
class GoldenResult:
    """How far the outputs are from the golden ones, in units of the output; ``step`` is its quantisation step, where it has one."""

    n: int
    max_abs_error: float
    limit: float
    argmax_agreement: float
    min_argmax_agreement: float
    mean_abs_error: float = 0.0
    step: float | None = None

    @property
    def ok(self) -> bool:
        """Whether both limits hold."""
        near = self.max_abs_error <= self.limit * _ROUNDING
        return near and self.argmax_agreement >= self.min_argmax_agreement

    def _in_steps(self) -> str:
        if self.step is None:
            return ""
        return f"in steps {self.max_abs_error / self.step:.3g} and {self.mean_abs_error / self.step:.3g}, "

    def __str__(self) -> str:
        return (
            f"{self.n} samples, largest error {self.max_abs_error:.3g} (allowed {self.limit:.3g}), mean {self.mean_abs_error:.3g}, "
            f"{self._in_steps()}"
            f"same class {self.argmax_agreement:.0%} (needed {self.min_argmax_agreement:.0%})"
        )


def default_tolerance(
    model: Artifact, outputs: np.ndarray, runtime: str = "", *, answers: str = "logits"
) -> Tolerance:
    """What two correct runtimes may differ by on this file.

    INT8 kernels round differently between processors: three steps of the output, taken as 1/255 of the golden range when the file's
    output is float; a near-tie may then flip one class in eight. FP32 kernels only add in another order: 1e-4 of the largest output. Half
    precision gets 5 % of the largest output, which nothing measured here stands behind.

    Source: measured by this project on the example network (22 weight layers, 300 images, x86-64): XNNPACK and the built-in INT8
    kernels of LiteRT 2.3.0 differed by at most 2 steps and chose the same class; FP32 runtimes differed from torch by 3e-6. Over 1,000
    images the built-in kernels of tflite-runtime 2.14 on an emulated arm64 board were up to 5 steps from those of LiteRT on x86-64
    (MobileNetV2 of half width, 53 weight layers; ``benchmarks/results/targets.json``), so that runtime gets 8.

    Args:
        model: the shipped file.
        outputs: golden outputs, ``float32 [n, K]``.
        runtime: what runs the file on the board.
        answers: ``logits``, or ``probabilities``, which may all be far below 1.
    """
    is_half = format_facts(model.format).half_engines
    if model.precision == "fp32":
        ratio = FP16_ATOL_RATIO if is_half else FP32_ATOL_RATIO
        atol = ratio * _largest(outputs)
        return Tolerance(atol=atol, min_argmax_agreement=0.85 if is_half else 1.0)
    if model.precision == "fp16":
        atol = HALF_ATOL_RATIO * _largest(outputs)
        return Tolerance(atol=atol, min_argmax_agreement=0.85)
    steps = BUILTIN_STEPS if runtime == "tflite-runtime" else FP16_STEPS if is_half else INT8_STEPS
    if model.outputs[0].scale is not None:
        return Tolerance(max_abs_error_steps=steps, min_argmax_agreement=0.85)
    step = output_step(model, outputs, answers)
    assert step is not None
    return Tolerance(atol=steps * step, min_argmax_agreement=0.85)


def _largest(outputs: np.ndarray) -> float:
    """The size of the largest output: probabilities are small; those of a net that says 0 alone have no size."""
    return max(float(np.abs(outputs).max()), 1e-6)


def output_step(model: Artifact, outputs: np.ndarray, answers: str = "logits") -> float | None:
    """The quantisation step of the output; ``None`` for FP32.

    Where an INT8 file answers in floats, 1/255 of the range of ``outputs``, and of probabilities at least the step of a softmax.
    """
    if model.precision == "fp32":
        return None
    least = SOFTMAX_STEP if answers == "probabilities" else 0.0
    return model.outputs[0].scale or max(float(np.ptp(outputs)) / 255, 1e-6 / 255, least)


def file_input(raw: np.ndarray, preprocess: Preprocess, spec: TensorSpec) -> np.ndarray:
    """Raw samples as the model file wants them.

    Args:
        raw: ``uint8 [N, H, W]`` or ``[N, H, W, C]`` images, or ``float32 [N, ...]`` as the torch model wants it.
        preprocess: the bundle's constants.
        spec: the file's input.

    Returns:
        ``float32 [N, ...]`` in the file's layout; the agent quantises it where the file wants INT8.

    Raises:
        ModelError: the samples do not fit the model.
    """
    if not isinstance(raw, np.ndarray):
        raise ModelError(
            f"samples must be a numpy array with a batch dimension, but are {type(raw).__name__}",
            hint="np.asarray(x) makes one of a tensor or of a list of arrays",
        )
    fits_kind = raw.dtype == np.uint8 if preprocess.kind == "image" else raw.dtype.kind == "f"
    if not (fits_kind or raw.dtype.kind == "f") or raw.ndim < 2:
        raise ModelError(
            f"samples must be {'uint8 images' if preprocess.kind == 'image' else 'float arrays'} "
            f"with a batch dimension, but are {raw.dtype} {list(raw.shape)}"
        )
    if raw.dtype == np.uint8 and raw.ndim not in (3, 4):
        raise ModelError(f"images must be [N, H, W] or [N, H, W, C], but are {list(raw.shape)}")
    channels = raw.shape[-1] if raw.ndim == 4 else 1
    if raw.dtype == np.uint8 and len(preprocess.mean) not in (1, channels):
        raise ModelError(
            f"images must have {len(preprocess.mean)} channels, but have {channels}",
            hint="one image has a batch dimension as well: image[None]" if raw.ndim == 3 else None,
        )
    x = to_layout(model_input(raw, preprocess), spec.layout)
    if x.shape[1:] != spec.shape[1:]:
        raise ModelError(
            f"samples must be {_wanted(raw, preprocess, spec)}, but are {list(raw.shape)}"
        )
    if not np.isfinite(x).all():
        raise ModelError("samples must be finite, but hold NaN or infinity")
    return x


def _wanted(raw: np.ndarray, preprocess: Preprocess, spec: TensorSpec) -> str:
    """The shape that samples must have as they are given: images channels last, floats as the torch model takes them."""
    one = list(spec.shape[1:])
    if len(one) == 3:
        channels, *size = one if spec.layout != "NHWC" else (one[2], *one[:2])
        one = [channels, *size]
        if raw.dtype == np.uint8 and preprocess.kind == "image":
            one = [*size, channels]
    return f"[{', '.join(map(str, ['N', *one]))}]"


def check_golden(raw: np.ndarray, outputs: np.ndarray, classes: int) -> None:
    """Raise unless the arrays can serve as golden samples.

    Raises:
        ModelError: too few samples, or outputs that are not finite ``float32 [n, K]``.
    """
    if raw.dtype != np.uint8 and raw.dtype.kind != "f":
        raise ModelError(f"golden samples must be uint8 images or floats, but are {raw.dtype}")
    if len(raw) < MIN_GOLDEN or len(raw) != len(outputs):
        raise ModelError(
            f"a bundle needs at least {MIN_GOLDEN} golden samples and as many outputs, "
            f"but got {len(raw)} and {len(outputs)}"
        )
    shape_ok = outputs.ndim == 2 and outputs.shape[1] == classes
    if outputs.dtype != np.float32 or not shape_ok or not np.isfinite(outputs).all():
        raise ModelError(
            f"golden outputs must be finite float32 [n, {classes}], one column a label, "
            f"but are {outputs.dtype} {list(outputs.shape)}"
        )


def npy_bytes(array: np.ndarray) -> bytes:
    """The ``.npy`` content of an array, without pickles."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def read_golden(folder: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Golden inputs (raw samples) and outputs (``float32 [n, K]``) of a bundle.

    Raises:
        IntegrityError: they are not what the manifest lists, or not such arrays, or the manifest's tolerance is too wide for them.
    """
    arrays = []
    for path in (manifest.golden.inputs, manifest.golden.outputs):
        content = read_checked(folder, manifest, path)
        try:
            arrays.append(npy_array(content))
        except ValueError as error:
            raise IntegrityError(f"{path} is not a plain .npy array: {error}") from error
        if not arrays[-1].flags.c_contiguous:
            raise IntegrityError(f"{path} must hold rows one after another, not columns")
    raw, outputs = arrays
    try:
        check_golden(raw, outputs, len(manifest.labels))
    except (ModelError, TypeError) as error:
        raise IntegrityError(f"the golden samples do not fit the manifest: {error}") from error
    if len(raw) != manifest.golden.n:
        raise IntegrityError(f"the bundle must hold {manifest.golden.n} golden samples")
    _check_tolerance(manifest, outputs)
    return raw, outputs


def _check_tolerance(manifest: Manifest, outputs: np.ndarray) -> None:
    """Raise when the manifest allows more than edgeprune gives such a file with such outputs.

    Raises:
        IntegrityError: it allows more; says how much and the cap.
    """
    given, output = manifest.golden.tolerance, manifest.model.outputs[0]
    cap = default_tolerance(manifest.model, outputs, manifest.runtime.name)
    what = f"for {manifest.model.precision} files of the format {manifest.model.format}"
    if given.limit(output) > cap.limit(output) * _ROUNDING:
        raise IntegrityError(
            f"golden.tolerance must allow an error of at most {cap.limit(output):.3g} {what}, but allows {given.limit(output):.3g}"
        )
    if given.min_argmax_agreement < cap.min_argmax_agreement:
        raise IntegrityError(
            f"golden.tolerance must need the same class in at least {cap.min_argmax_agreement:.0%} {what},"
            f" but needs it in {given.min_argmax_agreement:.0%}"
        )


def judge(outputs: np.ndarray, golden: np.ndarray, manifest: Manifest) -> GoldenResult:
    """Compare what a runtime answered, ``float32 [n, K]``, with the golden outputs.

    Raises:
        IntegrityError: the runtime answered with another shape or with NaN.
    """
    if outputs.shape != golden.shape or not np.isfinite(outputs).all():
        raise IntegrityError(
            f"the model must answer with finite {list(golden.shape)}, but answered {list(outputs.shape)}"
        )
    tolerance = manifest.golden.tolerance
    return GoldenResult(
        n=len(golden),
        max_abs_error=float(np.abs(outputs - golden).max()),
        mean_abs_error=float(np.abs(outputs - golden).mean()),
        step=output_step(manifest.model, golden, manifest.outputs),
        limit=tolerance.limit(manifest.model.outputs[0]),
        argmax_agreement=float((outputs.argmax(1) == golden.argmax(1)).mean()),
        min_argmax_agreement=tolerance.min_argmax_agreement,
    )
