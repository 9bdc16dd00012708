"""Nets that pool over padded edges as ResNet, DenseNet, ShuffleNetV2 and GoogLeNet do: FP32 is torch's, INT8 keeps its steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune import formats
from edgeprune.devices.agent.runtimes import infer, open_model
from edgeprune.formats import Format
from edgeprune.pipeline.files import int8_warnings
from edgeprune.workload.dataset import to_layout
from edgeprune.workload.trace import traced


def conv(
    inside: int, outside: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, rectifier."""
    layer = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside), nn.ReLU())


def stem(channels: int) -> nn.Sequential:
    return nn.Sequential(conv(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = stem(16), nn.Sequential(conv(16, 16), nn.Conv2d(16, 16, 3, 1, 1))
        self.head = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


class Dense(nn.Module):
    """Features are joined, normalised, rectified, and joined again; a transition halves the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 8, 3, 1, 1, bias=False))
            for n in (16, 24)
        )
        self.transition = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.AvgPool2d(2, 2)
        )
        self.head = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(self.transition(x).mean((2, 3)))


class Shuffled(nn.Module):
    """Half of the channels pass by; channels are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(16)
        depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.branch, self.head = (
            nn.Sequential(conv(8, 8, 1), depthwise, conv(8, 8, 1)),
            nn.Linear(16, 6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean((2, 3)))


class Inception(nn.Module):
    """Pooling that rounds up, and a branch that pools at stride 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.branches = nn.ModuleList([
            conv(16, 8, 1),
            nn.Sequential(conv(16, 4, 1), conv(4, 8)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(16, 8, 1)),
        ])  # fmt: skip
        self.last, self.head = nn.MaxPool2d(2, 2, ceil_mode=True), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.last(torch.cat([branch(x) for branch in self.branches], 1))
        return self.head(x.mean((2, 3)))


class Signed(nn.Module):
    """Pooling of what no rectifier cut, as nets do that rectify in front of their convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 16, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.second, self.head = nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.first(x))
        return self.head(torch.relu(self.second(torch.relu(x))).mean((2, 3)))


def settled(kind: type[nn.Module], x: np.ndarray) -> nn.Module:
    """The net with random weights, and with the statistics that the samples give."""
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.from_numpy(x))
    return model.eval()


def answers(form: Format, file: Path, x: np.ndarray) -> np.ndarray:
    model = open_model(file.read_bytes(), next(iter(form.info.runtimes)), 1, True)
    return np.asarray(infer(model, np.ascontiguousarray(to_layout(x, form.info.layout))))


@pytest.mark.parametrize("name", ["tflite", "onnx"])
@pytest.mark.parametrize("kind", [Residual, Dense, Shuffled, Inception, Signed])
def test_padded_pooling_ships_in_both_precisions(kind: type[nn.Module], name: str, tmp_path: Path):
    x = np.random.default_rng(0).normal(0, 1, (24, 3, 32, 32)).astype(np.float32)
    model, form = settled(kind, x), formats.load(name)
    with torch.no_grad():
        wanted = np.asarray(model(torch.from_numpy(x)))
    fp32, int8 = (tmp_path / f"{p}{form.info.suffix}" for p in ("fp32", "int8"))
    form.export(model, x[:1], fp32)
    form.quantize(fp32, x, int8, model=model)
    largest = np.abs(wanted).max()
    assert np.abs(answers(form, fp32, x) - wanted).max() < 1e-5 * largest
    assert np.abs(answers(form, int8, x) - wanted).max() < 0.05 * largest
    int8_warnings.warnings(form, fp32, x, traced(model, x[:1]))
