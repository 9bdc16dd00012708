"""Which operators a format's converter, or its runtime, does not take: what ``forbidden_ops`` of the profiles are written from.

``python scripts/probe_conversions.py [FORMAT ...]`` converts one small net for each operator word of ``edgeprune/records/operators.py`` to
every format, and runs the file where a runtime is on this machine. A line for each word: ``ok``, or who refused and in which words. Files
for TensorRT are run by onnxruntime, not by TensorRT, and Core ML packages are not run; ``tflite`` files are also held against the tables of
the oldest runtimes.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from probe_xnnpack_ops import OPERATIONS, SIDE, Between

from edgeprune import formats
from edgeprune.devices.agent.runtimes import infer, open_model
from edgeprune.errors import EdgepruneError, FormatError
from edgeprune.formats import check_runtime
from edgeprune.workload.dataset import to_layout

PACKAGES = ("torch", "ai-edge-litert", "litert-torch", "onnxruntime", "executorch", "coremltools")
FORMATS = ("tflite", "onnx", "tensorrt", "executorch", "coreml")
RUNTIMES = {
    "tflite": "litert",
    "onnx": "onnxruntime",
    "tensorrt": "onnxruntime",
    "executorch": "executorch",
}
LONGEST, TOLERANCE = 110, 1e-3


def _run(form: str, path: Path, x: np.ndarray) -> np.ndarray | None:
    """What the runtime of this machine answers; ``None`` where there is none."""
    if form not in RUNTIMES:
        return None
    model = open_model(path.read_bytes(), RUNTIMES[form], 1, True)
    return infer(model, to_layout(x, formats.load(form).info.layout))


def probe(word: str, form: str, folder: Path) -> str:
    """``ok``, or who refused the operation, in one line."""
    torch.manual_seed(0)
    model, x = Between(OPERATIONS[word]), torch.randn(1, 3, SIDE, SIDE)
    expected = model(x).detach().numpy().reshape(1, -1)
    path = folder / f"x{formats.load(form).info.suffix}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            formats.load(form).export(model.eval(), x.numpy().astype(np.float32), path)
    except (EdgepruneError, RuntimeError, NotImplementedError, ValueError) as error:
        return f"converter: {_line(error)}"
    try:
        found = _run(form, path, x.numpy())
    except Exception as error:
        return f"runtime: {_line(error)}"
    if found is not None:
        # Files with channels last answer in that order; what is compared is the set of values.
        error_of = np.abs(np.sort(found.reshape(1, -1)) - np.sort(expected)).max()
        if error_of > TOLERANCE:
            return f"runtime: differs from torch by {error_of:.2g}"
    if form == "tflite":
        for runtime in ("tflite-runtime", "litert"):
            try:
                check_runtime(formats.load(form), path, runtime)
            except FormatError as error:
                return f"old runtime: {_line(error)}"
    return "ok"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:LONGEST]


def main() -> None:
    """Print a line for every format and operation."""
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    for form in sys.argv[1:] or FORMATS:
        for word in OPERATIONS:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{form:10} {word:26} {probe(word, form, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
