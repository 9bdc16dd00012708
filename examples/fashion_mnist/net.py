"""The example network: residual blocks, plain and depthwise, in three stages of 32, 64 and 128 channels.

Small enough to train on two CPU cores, and shaped like the nets people put on boards: a stem, residual stages with projection
shortcuts, inverted depthwise blocks with linear bottlenecks, global pooling and one linear classifier.

Notation: ``N`` batch, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import torch
from torch import nn

MEAN, STD = 0.2860, 0.3530  # of the training images scaled to [0, 1]

CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection; a 1x1 projection where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class DepthwiseBlock(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, with an identity skip (the MobileNetV2 block)."""

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C, H, W]``."""
        y = torch.relu(self.bn1(self.expand(x)))
        y = torch.relu(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class FashionNet(nn.Module):
    """Classifier for 28x28 grey images: ``[N, 1, 28, 28]`` to logits ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.stage1 = nn.Sequential(BasicBlock(32, 32, stride=2), BasicBlock(32, 32))
        self.stage2 = nn.Sequential(BasicBlock(32, 64), DepthwiseBlock(64))
        self.stage3 = nn.Sequential(
            BasicBlock(64, 128, stride=2), DepthwiseBlock(128), DepthwiseBlock(128)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[N, 1, 28, 28]`` to logits ``[N, 10]``."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(self.pool(x).flatten(1))


def build() -> nn.Module:
    """A fresh, untrained network, as ``edgeprune deploy examples/fashion_mnist/net.py:build`` expects."""
    return FashionNet()
