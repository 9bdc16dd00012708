"""Two more small networks for 28x28 grey images: squeeze-excite with hard swish, and skips that are concatenated.

Notation: ``N`` batch, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from families import CLASSES, Classifier, conv_bn
from torch import nn
from torch.nn import functional


class SqueezeExcite(nn.Module):
    """A gate for each channel from the global mean: linear, ReLU, linear, hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, channels // 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of ``[N, C, H, W]``."""
        gate = self.excite(torch.relu(self.squeeze(self.pool(x))))
        return x * functional.hardsigmoid(gate)


class GatedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project; table 1 of https://arxiv.org/abs/1905.02244 calls the whole ``bneck``."""

    def __init__(self, n_in: int, n_out: int, stride: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(conv_bn(n_in, inner, 1), nn.Hardswish())
        self.depthwise = nn.Sequential(conv_bn(inner, inner, kernel, stride, inner), nn.Hardswish())
        self.gate = SqueezeExcite(inner)
        self.project = conv_bn(inner, n_out, 1)
        self.has_skip = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.has_skip else y


# channels, stride, inner channels, kernel of the depthwise convolution
MOBILENET_V3 = (
    (16, 2, 32, 3),
    (24, 1, 64, 3),
    (24, 1, 72, 5),
    (40, 2, 96, 5),
    (40, 1, 120, 5),
    (64, 1, 192, 3),
)


def mobilenet_v3_tiny() -> nn.Module:
    """Six blocks after MobileNetV3; its layers are those of the paper, its widths are not."""
    layers: list[nn.Module] = [conv_bn(1, 16, 3), nn.Hardswish()]
    n_in = 16
    for n_out, stride, inner, kernel in MOBILENET_V3:
        layers.append(GatedResidual(n_in, n_out, stride, inner, kernel))
        n_in = n_out
    layers += [conv_bn(n_in, 256, 1), nn.Hardswish()]
    return Classifier(nn.Sequential(*layers), 256)


def conv_relu(n_in: int, n_out: int) -> nn.Sequential:
    """A 3x3 convolution, its batch norm and a ReLU."""
    return nn.Sequential(conv_bn(n_in, n_out, 3), nn.ReLU())


class UNetClassifier(nn.Module):
    """Down to a quarter of the size and up again, as in https://arxiv.org/abs/1505.04597, then the global mean of the finest map.

    A classifier, not a segmenter: there are labels for images only. Maps of odd size are cut on the way down and
    resized to their skip on the way up.
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = conv_relu(1, fine)
        self.down1 = conv_relu(fine, middle)
        self.down2 = nn.Sequential(conv_relu(middle, coarse), conv_relu(coarse, coarse))
        self.up1 = conv_relu(coarse + middle, middle)
        self.up2 = conv_relu(middle + fine, middle)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(middle, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[N, 1, H, W]`` to logits ``[N, 10]``."""
        fine = self.stem(x)
        middle = self.down1(functional.max_pool2d(fine, 2))
        coarse = self.down2(functional.max_pool2d(middle, 2))
        y = functional.interpolate(coarse, size=middle.shape[-2:], mode="nearest")
        y = self.up1(torch.cat([y, middle], 1))
        y = functional.interpolate(y, size=fine.shape[-2:], mode="nearest")
        y = self.up2(torch.cat([y, fine], 1))
        return self.head(self.pool(y).flatten(1))


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "mobilenetv3-tiny": mobilenet_v3_tiny,
    "unet-classifier": UNetClassifier,
}
