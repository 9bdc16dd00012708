"""TFLite files for LiteRT: converted by litert-torch, quantised by ai-edge-quantizer, run by ai-edge-litert."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune import records
from edgeprune.datasets import to_layout
from edgeprune.errors import EdgepruneError, FormatError, MissingTool
from edgeprune.formats import Format, FormatInfo
from edgeprune.formats._resize import WidthDecoder
from edgeprune.formats._tflite_graph import (
    DTYPES,
    TfliteResizable,
    is_constant,
    op_name,
    read_model,
    text,
    write_model,
)
from edgeprune.results import Artifact, TensorSpec

SIGNATURE = "serving_default"


class _ChannelsLast(nn.Module):
    """Takes images as ``[N, H, W, C]``, the layout TFLite kernels work in, so that no transpose is left at the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model on channels-last images."""
        return self.model(x.permute(0, 3, 1, 2))  # type: ignore[no-any-return]


@contextlib.contextmanager
def quiet() -> Iterator[Path]:
    """Send what C++ and Python code print to a file; yields its path.

    The converter prints dozens of progress lines on both streams. They are kept, because a failure is explained there.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.NamedTemporaryFile(prefix="edgeprune-converter-", suffix=".log") as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield Path(log.name)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, handle in zip((1, 2), saved, strict=True):
                os.dup2(handle, number)
                os.close(handle)


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

    info = FormatInfo(
        name="tflite",
        suffix=".tflite",
        runtimes=("litert", "tflite-runtime"),
        extra="tflite",
        layout="NHWC",
    )

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """Convert with litert-torch; images become channels-last inputs."""
        converter = _converter()
        wrapped: nn.Module = _ChannelsLast(model) if example.ndim == 4 else model
        sample = torch.from_numpy(to_layout(example, self.info.layout))
        try:
            with records.atomic_path(path) as temporary, quiet():
                edge_model = converter.convert(wrapped.eval(), (sample,))
                target = temporary.with_suffix(".part.tflite")
                try:
                    edge_model.export(str(target))
                    target.replace(temporary)
                finally:
                    target.unlink(missing_ok=True)
        except EdgepruneError:
            raise
        except Exception as error:
            raise FormatError(
                f"litert-torch could not convert the model: {_first_line(error)}",
                hint="replace that operation, or try a target with another format",
            ) from error
        return self.describe(path)

    def quantize(self, fp32: Path, calibration: np.ndarray, path: Path) -> Artifact:
        """Static INT8: weights per output channel, activations per tensor, ranges from the calibration samples."""
        quantizer_module, recipe = _quantizer()
        samples = to_layout(calibration, self.info.layout)
        name = _signature_input(fp32)
        try:
            with quiet():
                quantizer = quantizer_module.Quantizer(str(fp32), recipe.static_wi8_ai8())
                data = {SIGNATURE: [{name: samples[i : i + 1]} for i in range(len(samples))]}
                quantized = quantizer.quantize(quantizer.calibrate(data)).quantized_model
        except Exception as error:
            raise FormatError(
                f"ai-edge-quantizer could not quantise the model: {_first_line(error)}"
            ) from error
        # Rewritten so that every buffer stands inside the flatbuffer: older runtimes read no other form.
        records.write_bytes(path, write_model(read_model(bytes(quantized))))
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
            sha256=records.sha256_bytes(content),
            size_bytes=len(content),
            inputs=tuple(_spec(graph.tensors[i]) for i in graph.inputs),
            outputs=tuple(_spec(graph.tensors[i]) for i in graph.outputs),
            op_counts=dict(sorted(counts.items())),
        )

    def resizable(
        self,
        dense: Path,
        variant: Path,
        full: Mapping[str, int],
        changed: Mapping[str, int],
        model: nn.Module,
    ) -> TfliteResizable:
        """Pair two exports of one precision; see :class:`edgeprune.formats.Format`."""
        decoder = WidthDecoder(full, changed)
        return TfliteResizable(
            dense.read_bytes(), variant.read_bytes(), decoder, layer_name_keys(model)
        )


def layer_name_keys(model: nn.Module) -> dict[str, str]:
    """Text that litert-torch writes into tensor names -> the torch layer's path.

    Each part of a path is written as ``module.Class_attribute``, joined by slashes.
    """
    keys: dict[str, str] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.Conv2d | nn.Conv1d | nn.ConvTranspose2d | nn.Linear):
            continue
        parts = path.split(".") if path else []
        written = []
        for depth, attribute in enumerate(parts):
            kind = type(modules[".".join(parts[: depth + 1])])
            written.append(f"{kind.__module__}.{kind.__qualname__}_{attribute}")
        keys["/".join(written)] = path
    return keys


def _signature_input(path: Path) -> str:
    model = read_model(path.read_bytes())
    return text(model.signatureDefs[0].inputs[0].name)


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


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


FORMAT: Format = TfliteFormat()
