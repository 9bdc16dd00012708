"""Nets with removable blocks as files of one format, and what a file answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from edgeprune.formats import Format, Resizable


class BlockFiles:
    """What the tests of removed blocks ask of a net's files; who inherits writes ``dense`` and ``variant`` in both precisions."""

    form: Format
    folder: Path
    model: nn.Module
    full: dict[str, int]
    changed: dict[str, int]

    def path(self, name: str, precision: str) -> Path:
        return self.folder / f"{name}.{precision}{self.form.info.suffix}"

    def resizable(self, precision: str) -> Resizable:
        dense, variant = self.path("dense", precision), self.path("variant", precision)
        return self.form.resizable(dense, variant, self.full, self.changed, self.model)

    def counts(self, path: Path) -> dict[str, int]:
        """Operators, without what only changes a number's form."""
        counts = self.form.describe(path).op_counts
        skipped = ("weights:", "int8:", "Quantize", "Dequantize", "QUANTIZE")
        return {op: n for op, n in counts.items() if not op.startswith(skipped)}


def run(content: bytes, form: str, x: np.ndarray) -> np.ndarray:
    """One input through a file; int8 inputs and outputs are scaled."""
    if form == "onnx":
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"input": x})[0])
    interpreters = pytest.importorskip("ai_edge_litert.interpreter")
    net = interpreters.Interpreter(model_content=content)
    net.allocate_tensors()
    (given,), (made,) = net.get_input_details(), net.get_output_details()
    value = x.transpose(0, 2, 3, 1)
    if given["dtype"] == np.int8:
        scale, zero = given["quantization"]
        value = np.clip(np.round(value / scale + zero), -128, 127).astype(np.int8)
    net.set_tensor(given["index"], value)
    net.invoke()
    out = net.get_tensor(made["index"])
    scale, zero = made["quantization"]
    return (out.astype(np.float32) - zero) * scale if out.dtype == np.int8 else out
