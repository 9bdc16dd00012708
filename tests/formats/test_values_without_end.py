"""NaN or Inf inside a net: INT8 refuses it in one line that names the operator and its layer, or keeps it in float and right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeprune import formats
from edgeprune.devices.agent.runtimes import infer, open_model
from edgeprune.errors import FormatError
from edgeprune.formats import Format
from edgeprune.formats.shared.finite import explained, require_bounded, require_finite
from edgeprune.formats.shared.ranges import spreads
from edgeprune.pipeline.files import int8_warnings
from edgeprune.workload.dataset import to_layout
from edgeprune.workload.trace import traced

NEEDS = {
    "tflite": "litert_torch",
    "onnx": "onnxscript",
    "tensorrt": "onnxscript",
    "executorch": "executorch",
    "coreml": "coremltools",
}


class Masked(nn.Module):
    """Self-attention in which no position sees a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        later = torch.ones(16, 16, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ x


class Attention(nn.Module):
    """Patches that attend to each other, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mixer, self.head = nn.Conv2d(3, 12, 2, 2), Masked(), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Exponential(nn.Module):
    """e to a power that float32 cannot hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(200 * x)


class Overflow(nn.Module):
    """Values that leave float32 and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 12, 2, 2), Exponential(), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(self.gate(self.conv(x))).mean((2, 3)))


def samples(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (n, 3, 8, 8)).astype(np.float32)


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


class Pooled(nn.Module):
    """A padding with -inf that the model writes itself, in front of max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.edge = nn.Conv2d(3, 12, 3, 1, 1), nn.ConstantPad2d((1, 1, 1, 1), -torch.inf)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.max_pool2d(self.edge(self.conv(x)), 3, 2).mean((2, 3)))


def quantised(name: str, model: nn.Module, folder: Path) -> tuple[Format, Path]:
    """The INT8 file of a net in a format, of four samples."""
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    form, x = formats.load(name), samples(4)
    fp32, int8 = (folder / f"{p}{form.info.suffix}" for p in ("fp32", "int8"))
    form.export(model, x[:1], fp32)
    form.quantize(fp32, x, int8, model=model)
    return form, int8


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("tflite", Attention, "mixer"),
        ("tflite", Overflow, "gate"),
        ("onnx", Attention, "mixer"),
        ("onnx", Overflow, "gate"),
        ("onnx", Pooled, "edge"),
        ("coreml", Pooled, "edge"),
    ],
)
def test_int8_of_what_has_no_end_is_refused_by_operator_and_layer(
    name: str, kind: type[nn.Module], layer: str, tmp_path: Path
):
    with pytest.raises(FormatError) as refused:
        quantised(name, seeded(kind), tmp_path)
    said = str(refused.value)
    assert "INT8 needs values with an end" in said
    assert f" of {layer} gives" in said
    assert "\n" not in said
    assert refused.value.exit_code == 5


@pytest.mark.parametrize(
    ("name", "kind", "runtime"),
    [
        ("tflite", Pooled, "litert"),
        ("tensorrt", Attention, "onnxruntime"),
        ("tensorrt", Pooled, "onnxruntime"),
        ("executorch", Attention, "executorch"),
        ("executorch", Pooled, "executorch"),
    ],
)
def test_what_a_format_keeps_in_float_or_bounds_is_right(
    name: str, kind: type[nn.Module], runtime: str, tmp_path: Path
):
    model, x = seeded(kind), samples(4)
    form, int8 = quantised(name, model, tmp_path)
    loaded = open_model(int8.read_bytes(), runtime, 1, True)
    found = infer(loaded, np.ascontiguousarray(to_layout(x, form.info.layout)))
    with torch.no_grad():
        wanted = np.asarray(model(torch.from_numpy(x)))
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_the_first_such_operator_of_a_file_is_named():
    makers = {
        "a": ("Conv", "stem", ("x",)),
        "b": ("Exp", "gate", ("a",)),
        "c": ("Add", "sum", ("b",)),
    }
    require_finite({"a": (-1.0, 1.0), "c": (-1.0, 1.0)}, makers)
    for end in (np.inf, -np.inf, np.nan):
        with pytest.raises(FormatError, match="but Exp of gate gives NaN or Inf"):
            require_finite({"c": (-1.0, end), "b": (0.0, end), "a": (-1.0, 1.0)}, makers)
    with pytest.raises(FormatError, match="but Exp of the model itself gives"):
        require_finite({"b": (0.0, np.inf)}, {"b": ("Exp", "", ())})


def test_a_spread_tells_its_infinite_end_and_its_nan():
    values = np.array([[-1.0, 2.0], [0.0, np.inf], [np.nan, 0.0]], np.float32)
    found = spreads(lambda: ({"x": row, "y": np.minimum(row[1:], 3)} for row in values))
    assert np.isnan(found["x"].low)
    assert not found["x"].counts.any()
    assert (found["y"].low, found["y"].high) == (0.0, 3.0)
    assert found["y"].counts.sum() == 3


def test_observers_that_saw_nothing_are_no_fault_and_those_that_saw_an_infinity_are():
    from torch.ao.quantization.observer import MinMaxObserver

    net = nn.Sequential(MinMaxObserver(), nn.Identity())
    require_bounded(net)
    net[0](torch.tensor([1.0, 2.0]))
    require_bounded(net)
    net[0](torch.tensor([-torch.inf, 2.0]))
    with pytest.raises(ArithmeticError):
        require_bounded(net)


def test_an_error_of_a_toolchain_stays_where_every_value_has_an_end():
    error = FormatError("as the toolchain says")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert explained(error, model, samples(2)) is error
    assert "gate" in str(explained(error, seeded(Overflow), samples(2)))


def test_warnings_of_a_net_with_a_mask_do_not_speak_of_infinities(tmp_path: Path):
    pytest.importorskip("onnxscript")
    form, model, x = formats.load("onnx"), seeded(Attention), samples(4)
    form.export(model, x[:1], tmp_path / "a.onnx")
    lines = int8_warnings.warnings(form, tmp_path / "a.onnx", x, traced(model, x[:1]))
    assert not any("inf" in line or "nan" in line for line in lines)
