"""What is said about an INT8 file, and what is warned of before any work starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune import formats
from edgeprune.compress.int8.fakequant import FakeQuantised, fake_quantised, folded, plain
from edgeprune.pipeline.files.int8_warnings import calibration_report, warnings
from edgeprune.records.int8 import CalibrationReport, Int8Report, Int8Try, LayerFallback
from edgeprune.workload.trace import traced


def test_lines_say_cost_tries_float_layers_and_missing_classes():
    report = Int8Report(
        effort="auto",
        metric="accuracy",
        n=100,
        fp32=0.9,
        tries=(
            Int8Try(name="own ranges", quality=0.88, loss_nats=0.2),
            Int8Try(name="1 float layers", quality=0.9, loss_nats=0.01),
        ),
        chosen="1 float layers",
        layers=(LayerFallback(layer="conv", gain_nats=0.2, extra_ms=0.5, in_float=True),),
        calibration=CalibrationReport(
            samples=8, classes=3, classes_missing=(2,), held_out_samples=4,
            saturated_ratio=0.001, worst=(("conv/conv_2d", 0.01),),
        ),
    )  # fmt: skip
    lines = report.lines()
    assert lines[0].startswith("INT8 (1 float layers) costs 0.00 points on 100 samples")
    assert "own ranges 2.00" in lines[0]
    assert lines[1] == "layers of the INT8 file that stay in float: conv (+0.5 ms)"
    assert "classes 2:" in lines[2]
    assert "0.100% of the values of 4 held-out samples" in lines[3]
    assert all("\n" not in line for line in lines)


class Risky(nn.Module):
    """A gate, and a concatenation whose inputs differ a hundredfold in range."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.gate, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)
        with torch.no_grad():
            self.wide.weight.mul_(100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(torch.cat([torch.relu(self.wide(x)), torch.relu(self.narrow(x))], 1))
        return self.head(nn.functional.hardswish(x).mean((2, 3)))


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 10, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def risky(tmp_path_factory):
    torch.manual_seed(0)
    form, folder = formats.load("onnx"), tmp_path_factory.mktemp("risky")
    path = folder / "fp32.onnx"
    form.export(Risky().eval(), images(1), path)
    return form, path, folder


def test_gates_and_mixed_ranges_are_warned_of_in_one_line_each(risky):
    form, path, _ = risky
    found = warnings(form, path, images(8), traced(Risky().eval(), images(1)))
    assert all("\n" not in line for line in found)
    assert any("hard-swish: 1 of them, the first at gate" in line for line in found)
    mixed = [line for line in found if "joins tensors whose ranges differ" in line]
    assert len(mixed) == 1


class Excited(nn.Module):
    """A block whose channels are scaled by a gate from their means."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.excite(y))


@pytest.mark.parametrize("name", ["tflite", "onnx"])
@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        (nn.Hardswish(), "hard-swish"),
        (nn.Hardsigmoid(), "hard-sigmoid"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.SiLU(), "sigmoid"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_gate_is_warned_of_in_every_format(tmp_path, name, gate, kind):
    torch.manual_seed(0)
    form = formats.load(name)
    path = tmp_path / f"fp32{form.info.suffix}"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Excited(gate), nn.Flatten(), nn.Linear(512, 4)).eval()
    form.export(model, images(1), path)
    found = [w for w in warnings(form, path, images(8), traced(model, images(1))) if "often" in w]
    (line,) = found
    assert line.startswith(f"INT8 often loses at {kind}: 1 of them, the first at 1.gate; edgeprune")


@pytest.mark.parametrize("name", ["tflite", "onnx"])
def test_a_plain_net_is_not_warned_of(tmp_path, name):
    torch.manual_seed(0)
    form = formats.load(name)
    path = tmp_path / f"x{form.info.suffix}"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
    form.export(model, images(1), path)
    assert warnings(form, path, images(8), traced(model, images(1))) == ()


def test_saturation_is_counted_on_held_out_samples_and_missing_classes_are_named(risky):
    form, path, folder = risky
    int8 = folder / "int8.onnx"
    form.quantize(path, images(8), int8)
    labels = np.array([0, 1, 1, 3])
    facts = {"samples": 8, "classes": 4, "labels": labels}
    same = calibration_report(form, path, int8, images(8), **facts)
    assert same.classes_missing == (2,)
    assert same.saturated_ratio == 0
    wider = calibration_report(form, path, int8, 3 * images(8, seed=1), **facts)
    assert wider.saturated_ratio > 0.01
    assert wider.worst[0][1] >= wider.worst[-1][1] > 0


def test_folding_leaves_what_a_net_says():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    model(torch.randn(16, 3, 10, 10))
    x = torch.randn(4, 3, 10, 10)
    model.eval()
    found = folded(model, x[:1])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found.modules())
    assert torch.allclose(found(x), model(x), atol=1e-5)


def test_rounded_training_rounds_passes_gradients_and_gives_plain_layers_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
    x = torch.randn(16, 3, 10, 10)
    fake = fake_quantised(model, x, frozen_after=2)
    error = (fake(x) - model(x)).abs().max()
    assert 0 < error < 0.05 * model(x).abs().max()
    fake.train()
    before = [m.high.clone() for m in fake.modules() if isinstance(m, FakeQuantised)]
    for _ in range(4):
        fake(2 * x).square().sum().backward()
    layers = [m for m in fake.modules() if isinstance(m, FakeQuantised)]
    assert [int(m.batches) for m in layers] == [2, 2]
    assert all(not torch.equal(b, m.high) for b, m in zip(before, layers, strict=True))
    assert all(float(m.layer.weight.grad.abs().sum()) > 0 for m in layers)
    given = plain(fake)
    assert not any(isinstance(m, FakeQuantised) for m in given.modules())
    assert torch.equal(given(x), model(x))


def test_a_rounded_layer_computes_what_the_int8_file_computes(tmp_path: Path):
    from edgeprune.devices.agent.runtimes import infer, open_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
    x = images(16)
    form = formats.load("onnx")
    form.export(model, x[:1], tmp_path / "fp32.onnx")
    form.quantize(tmp_path / "fp32.onnx", x, tmp_path / "int8.onnx")
    loaded = open_model((tmp_path / "int8.onnx").read_bytes(), "onnxruntime", 1, True)
    file = infer(loaded, x)
    fake = fake_quantised(model, torch.from_numpy(x), frozen_after=1)
    exact = model(torch.from_numpy(x)).detach().numpy()
    with torch.no_grad():
        rounded = fake(torch.from_numpy(x)).numpy()
    # The file also rounds its output; both errors are of the same size.
    assert np.abs(rounded - file).mean() < 2 * np.abs(exact - file).mean()
