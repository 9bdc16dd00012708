"""A small classifier of grey images, and its Core ML packages as they lie in ``tests/data``: what a test needs where no converter is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeprune.formats import AppFacts
from edgeprune.formats.shared.model_bytes import files_of
from edgeprune.records.workload import Preprocess

DATA = Path(__file__).parent / "data"
PREPROCESS = Preprocess(color="grey", mean=(0.25,), std=(0.5,))
LABELS = ("cat", "dog", "très loin")
SHAPE = (1, 8, 8)
FACTS = AppFacts(
    preprocess=PREPROCESS,
    labels=LABELS,
    description="three kinds of noise",
    author="the tests",
    license="Apache-2.0",
    version="1.2",
    notes={"target": "iphone"},
)


def build() -> nn.Module:
    """A convolution with a batch norm, a depthwise one, a residual addition, and a linear layer; the weights follow from their index."""
    net = Net().eval()
    with torch.no_grad():
        for number, value in enumerate(net.state_dict().values()):
            if value.is_floating_point():
                wave = torch.sin(torch.arange(value.numel()) * 0.7 + number).reshape(value.shape)
                value.copy_(wave.abs() + 0.5 if value.ndim == 1 and number in (2, 4) else wave / 2)
    return net


class Net(nn.Module):
    """``[N, 1, 8, 8]`` to logits ``[N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.depthwise(x))
        return self.classifier(self.pool(x).flatten(1))


def raw(n: int, seed: int = 5) -> np.ndarray:
    """Images ``uint8 [n, 8, 8]``."""
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE[1:]), dtype=np.uint8)


def seen(images: np.ndarray) -> np.ndarray:
    """Images as the net sees them: ``float32 [n, 1, 8, 8]``."""
    x = (images.astype(np.float32) / 255 - PREPROCESS.mean[0]) / PREPROCESS.std[0]
    return x[:, None]


def package(precision: str) -> Path:
    """A package of :func:`build`: ``fp16`` or ``int8``."""
    return DATA / f"tiny.{precision}.mlpackage"


def files(precision: str) -> dict[str, bytes]:
    """Its files."""
    return files_of(package(precision))
