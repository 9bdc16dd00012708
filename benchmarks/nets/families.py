"""Networks of the families that pruning papers report on: for 28x28 grey images, so that two CPU cores can train them, and one for 224x224.

Notation: ``N`` batch, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

CLASSES = 10


def conv_bn(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride) and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n_out),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection; a 1x1 projection where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(n_in, n_out, 3, stride)
        self.second = conv_bn(n_out, n_out, 3)
        same = stride == 1 and n_in == n_out
        self.shortcut: nn.Module = nn.Identity() if same else conv_bn(n_in, n_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project without activation; an identity skip where the shape stays."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = n_in * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(conv_bn(n_in, inner, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(conv_bn(inner, inner, 3, stride, inner), nn.ReLU6())
        self.project = conv_bn(inner, n_out, 1)
        self.has_skip = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_skip else y


class Classifier(nn.Module):
    """Features, global mean, one linear layer: images ``[N, C, H, W]`` to logits ``[N, classes]``."""

    def __init__(self, features: nn.Sequential, width: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[N, C, H, W]`` to logits ``[N, classes]``."""
        return self.head(self.pool(self.features(x)).flatten(1))


def resnet20_wide() -> nn.Module:
    """ResNet-20 with stages of 32, 64 and 128 channels (https://arxiv.org/abs/1512.03385, section 4.2, twice as wide)."""
    layers: list[nn.Module] = [conv_bn(1, 32, 3), nn.ReLU()]
    n_in = 32
    for width, stride in ((32, 1), (64, 2), (128, 2)):
        for number in range(3):
            layers.append(BasicBlock(n_in, width, stride if number == 0 else 1))
            n_in = width
    return Classifier(nn.Sequential(*layers), 128)


# expansion, channels at width 1.0, repeats, stride: table 2 of https://arxiv.org/abs/1801.04381, with the first three strides of the
# net (224 to 28 pixels) left out, since images of 28 pixels start where those of 224 are after them.
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 1),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2_half() -> nn.Module:
    """MobileNetV2 of width 0.5 for 28x28 images, channels rounded to 8."""
    return _mobilenet_v2(inputs=1, width=0.5, last=640, classes=CLASSES, halved=())


def mobilenet_v2_imagenet() -> nn.Module:
    """MobileNetV2 of width 1.0 for 224x224 colour images and 1000 classes, as the paper has it; random weights."""
    return _mobilenet_v2(inputs=3, width=1.0, last=1280, classes=1000, halved=(0, 1, 2))


def _mobilenet_v2(
    *, inputs: int, width: float, last: int, classes: int, halved: Sequence[int]
) -> nn.Module:
    """``halved`` are the places, of those where ``MOBILENET_V2`` keeps the size, that the paper's net halves it at: 0 is the stem."""

    def scaled(channels: int) -> int:
        return max(8, int(channels * width + 4) // 8 * 8)

    n_in = scaled(32)
    layers: list[nn.Module] = [conv_bn(inputs, n_in, 3, 2 if 0 in halved else 1), nn.ReLU6()]
    for place, (expansion, channels, repeats, kept) in enumerate(MOBILENET_V2):
        stride = 2 if place and place in halved else kept
        for number in range(repeats):
            n_out = scaled(channels)
            layers.append(InvertedResidual(n_in, n_out, stride if number == 0 else 1, expansion))
            n_in = n_out
    layers += [conv_bn(n_in, last, 1), nn.ReLU6()]
    return Classifier(nn.Sequential(*layers), last, classes)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "resnet20-wide": resnet20_wide,
    "mobilenetv2-half": mobilenet_v2_half,
}
