"""The example network as the files that boards run, made on the host from its trained weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
from repo import REPO
from safetensors.torch import load_file

from edgeprune import formats
from edgeprune.records.artifact import Artifact
from edgeprune.records.workload import Preprocess
from edgeprune.workload.dataset import model_input, to_layout

EXAMPLE = REPO / "examples" / "fashion_mnist"
N_IMAGES, N_CALIBRATION = 32, 64


@dataclass(frozen=True)
class ExampleFiles:
    """Model files by format and precision, and images of the test split with their labels.

    ``raw`` is ``uint8 [32, 28, 28]``, ``y`` is ``int64 [32]``.
    """

    folder: Path
    artifacts: dict[tuple[str, str], Artifact]
    raw: np.ndarray
    y: np.ndarray
    preprocess: Preprocess
    labels: tuple[str, ...]

    def path(self, form: str, precision: str) -> Path:
        """Where a file lies."""
        return self.folder / self.artifacts[form, precision].path

    def inputs(self, form: str) -> np.ndarray:
        """The images as files of a format want them."""
        return to_layout(model_input(self.raw, self.preprocess), formats.load(form).info.layout)

    def unfused(self, precision: str) -> np.ndarray:
        """What the ONNX file of a precision computes, in floats, ``float32 [32, 10]``.

        The fused INT8 kernels of onnxruntime for x86 without VNNI add in 16 bits, which saturate: a host like that is no reference.
        """
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = str(self.path("onnx", precision))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        rows = [session.run(None, {name: row[None]})[0] for row in self.inputs("onnx")]
        return np.concatenate(rows)

    def step(self, form: str, precision: str, outputs: np.ndarray) -> float:
        """One INT8 step of a file's output; of files with a float output, 1/255 of the range seen."""
        scale = self.artifacts[form, precision].outputs[0].scale
        return scale if scale is not None else float(np.ptp(outputs)) / 255


def make_example_files(folder: Path) -> ExampleFiles:
    """Export and quantise the trained example for both formats. Skips where its images are not installed."""
    net, data = _module("net"), _module("data")
    try:
        splits = data.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    raw, y = (part[:N_IMAGES] for part in splits["test"])
    preprocess = Preprocess(color="grey", mean=(net.MEAN,), std=(net.STD,))
    calibration = model_input(splits["train"][0][:N_CALIBRATION], preprocess)
    model = net.build()
    model.load_state_dict(load_file(EXAMPLE / "fashion_net.safetensors"))
    model.eval()
    artifacts = {}
    for name in ("tflite", "onnx"):
        form = formats.load(name)
        fp32, int8 = (folder / f"{p}{form.info.suffix}" for p in ("fp32", "int8"))
        artifacts[name, "fp32"] = form.export(model, calibration[:1], fp32)
        artifacts[name, "int8"] = form.quantize(fp32, calibration, int8)
    return ExampleFiles(folder, artifacts, raw, y, preprocess, tuple(net.CLASSES))


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fashion_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
