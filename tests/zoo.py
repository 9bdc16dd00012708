"""Small seeded nets, one per way in which channels can be coupled. All take images ``[N, 3, 12, 12]`` unless their name says else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Specimen:
    """A net, the shape of its input, and layers that are expected to be prunable and to stay."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 12, 12)
    prunable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def make(specimen: Specimen, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The net in eval mode with random weights and statistics, and two inputs."""
    torch.manual_seed(seed)
    model = specimen.build().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.6)
    return model, torch.randn(2, *specimen.shape)


def conv_bn(cin: int, cout: int, k: int = 3, s: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(cin, cout, k, s, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    )


def head(channels: int) -> nn.Sequential:
    """Global average pool and a classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Residual(nn.Module):
    """A block with a projection, then one with the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.a1, self.a2 = conv_bn(16, 24, s=2), nn.Conv2d(24, 24, 3, 1, 1)
        self.down = nn.Conv2d(16, 24, 1, 2)
        self.b1, self.b2 = conv_bn(24, 20), nn.Conv2d(20, 24, 3, 1, 1)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.a2(self.a1(x)) + self.down(x))
        x = F.relu(self.b2(self.b1(x)) + x)
        return self.head(x)


class Inverted(nn.Module):
    """MobileNetV2: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.expand, self.depth = conv_bn(16, 48, 1), conv_bn(48, 48, 3, groups=48)
        self.project = nn.Sequential(nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.depth(self.expand(x))))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it, after a norm over the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, 1, 1)
        self.n1, self.b = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, 1, 1)
        self.n2, self.c = nn.BatchNorm2d(28), nn.Conv2d(28, 12, 3, 1, 1)
        self.n3, self.head = nn.BatchNorm2d(40), head(40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c(F.relu(self.n2(x)))], 1)
        return self.head(F.relu(self.n3(x)))


class Inception(nn.Module):
    """Parallel branches, concatenated, flattened with their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, s=2)
        self.one, self.three = conv_bn(16, 8, 1), conv_bn(16, 12, 3)
        self.pool = conv_bn(16, 10, 1)
        self.head = nn.Linear(30 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.pool(F.max_pool2d(x, 3, 1, 1))], 1)
        return self.head(F.avg_pool2d(x, 2).flatten(1))


class SqueezeExcite(nn.Module):
    """A multiplicative gate between depthwise and projection, with hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.expand, self.depth = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project, self.head = nn.Conv2d(32, 16, 1), head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.depth(F.hardswish(self.expand(x))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(x + self.project(y * gate))


class Shared(nn.Module):
    """One convolution used twice in a row, and a norm after each use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = conv_bn(3, 16), nn.Conv2d(16, 16, 3, 1, 1)
        self.after, self.head = nn.Conv2d(16, 24, 3, 1, 1), head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(self.stem(x)))))
        return self.head(F.relu(self.after(x)))


class SharedHead(nn.Module):
    """One convolution applied to two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv_bn(3, 16), conv_bn(16, 16, s=2)
        self.both, self.head = nn.Conv2d(16, 24, 3, 1, 1), head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(F.relu(self.both(x))) + self.head(F.relu(self.both(self.two(x))))


class LayerNormed(nn.Module):
    """Layer norm over the channels, as ConvNeXt has it; the widened part in between is free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), head(16)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return self.head(x + (self.scale * y).permute(0, 3, 1, 2))


class LayerScale(nn.Module):
    """A free parameter a channel in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 16), nn.Conv2d(16, 16, 3, 1, 1)
        self.scale, self.shift = (
            nn.Parameter(torch.rand(16, 1, 1)),
            nn.Parameter(torch.rand(1, 16, 1, 1)),
        )
        self.next, self.head = nn.Conv2d(16, 24, 3, 1, 1), head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.next(x + self.scale * self.conv(x) + self.shift)))


class Gated(nn.Module):
    """Equal halves, one gating the other; then halves that go separate ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pair = conv_bn(3, 16), nn.Conv2d(16, 32, 3, 1, 1)
        self.wide = nn.Conv2d(16, 32, 3, 1, 1)
        self.left, self.right = nn.Conv2d(16, 12, 3, 1, 1), nn.Conv2d(16, 12, 3, 1, 1)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(self.stem(x)).chunk(2, 1)
        c, d = self.wide(a * torch.sigmoid(b)).chunk(2, 1)
        return self.head(torch.cat([F.relu(self.right(d)), F.relu(self.left(c))], 1))


class FixedSplit(nn.Module):
    """A split at sizes written into the code: the convolution before it cannot change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split = conv_bn(3, 16), nn.Conv2d(16, 32, 3, 1, 1)
        self.left, self.head = nn.Conv2d(20, 12, 3, 1, 1), head(24)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.stem(x)).split([20, 12], 1)
        return self.head(torch.cat([F.relu(self.left(a)), b], 1))


class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 12), conv_bn(12, 20, s=2)
        self.c = conv_bn(20, 28, s=2)
        self.up = nn.ConvTranspose2d(28, 16, 2, 2)
        self.d, self.e = conv_bn(36, 16), conv_bn(28, 10)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        x = self.d(torch.cat([self.up(self.c(b)), b], 1))
        x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), a], 1)
        return self.head(self.e(x))


class OneDimensional(nn.Module):
    """Signals ``[N, 4, 32]``, flattened with their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv1d(4, 16, 5, 2, 2), nn.BatchNorm1d(16)
        self.b, self.head = nn.Conv1d(16, 24, 5, 2, 2), nn.Linear(24 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.n(self.a(x))))).flatten(1))


class Attention(nn.Module):
    """One transformer block over patches; only the widened part of its MLP is free."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 9, 16))
        self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        q, k, v = self.qkv(self.n1(x)).reshape(len(x), 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 9, 16)
        x = x + self.out(mixed)
        return self.head((x + self.down(F.gelu(self.up(self.n2(x))))).mean(1))


class Shuffled(nn.Module):
    """Pixel shuffle turns channels into positions; channel shuffle interleaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = conv_bn(3, 16), nn.Conv2d(16, 32, 3, 1, 1)
        self.low, self.mixed = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(F.pixel_shuffle(self.wide(self.stem(x)), 2))
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.mixed(x)))


class SpatialGate(nn.Module):
    """A map of one channel, broadcast over all channels, and one made of the channels' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.next = conv_bn(3, 16), nn.Conv2d(16, 1, 3, 1, 1), conv_bn(16, 24)
        self.mean, self.head = nn.Conv2d(1, 1, 3, 1, 1), head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.next(x * torch.sigmoid(self.gate(x)))
        return self.head(x * torch.sigmoid(self.mean(x.mean(1, keepdim=True))))


class Functional(nn.Module):
    """A convolution whose weight is a free parameter, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = conv_bn(3, 16), nn.Parameter(torch.randn(16, 16, 3, 3))
        self.next, self.unused, self.head = conv_bn(16, 24), nn.Conv2d(3, 16, 1), head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.next(F.conv2d(self.stem(x), self.weight, padding=1)))


class InputSkip(nn.Module):
    """The image itself is concatenated and added: its channels are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 16), nn.Conv2d(19, 3, 3, 1, 1), conv_bn(3, 24)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(x + self.b(torch.cat([x, self.a(x)], 1))))


def _plain() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), conv_bn(16, 24, s=2), conv_bn(24, 32), head(32))


def _multiplier() -> nn.Module:
    depthwise = nn.Conv2d(12, 24, 3, 1, 1, groups=12)
    return nn.Sequential(
        conv_bn(3, 12), depthwise, nn.BatchNorm2d(24), conv_bn(24, 16, 1), head(16)
    )


def _grouped() -> nn.Module:
    return nn.Sequential(conv_bn(3, 32), conv_bn(32, 48, groups=4), conv_bn(48, 16), head(16))


def _cardinality() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 32, 1), conv_bn(32, 32, groups=16), conv_bn(32, 16, 1), head(16)
    )


def _group_norm() -> nn.Module:
    norm, single = nn.GroupNorm(8, 16), nn.GroupNorm(1, 24)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        norm,
        nn.Conv2d(16, 24, 3),
        single,
        nn.Conv2d(24, 12, 3),
        nn.ReLU(),
        head(12),
    )


def _flattened() -> nn.Module:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(24 * 9, 32), nn.ReLU(), nn.Linear(32, 5))
    return nn.Sequential(conv_bn(3, 16, s=2), conv_bn(16, 24, s=2), flat)


def _biased() -> nn.Module:
    """No batch norm: an unbatched trace would still run."""
    a, b, c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 3)
    norm = nn.InstanceNorm2d(16, affine=True)
    return nn.Sequential(a, nn.PReLU(16), b, nn.PReLU(), c, norm, nn.ReLU(), head(16))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )


def _transposed_groups() -> nn.Module:
    up = nn.ConvTranspose2d(16, 16, 2, 2, groups=16)
    few = nn.ConvTranspose2d(24, 32, 3, 1, 1, groups=2)
    return nn.Sequential(
        conv_bn(3, 16), up, conv_bn(16, 24), few, nn.ReLU(), conv_bn(32, 16), head(16)
    )


ZOO: dict[str, Specimen] = {
    "plain": Specimen(_plain, prunable=("0.0", "1.0", "2.0"), frozen=("3.2",)),
    "residual": Specimen(Residual, prunable=("stem.0", "a1.0", "a2", "down", "b1.0", "b2")),
    "inverted": Specimen(Inverted, prunable=("stem.0", "expand.0", "depth.0", "project.0")),
    "multiplier": Specimen(_multiplier, prunable=("0.0", "1", "3.0")),
    "grouped": Specimen(_grouped, prunable=("0.0", "1.0", "2.0")),
    "cardinality": Specimen(_cardinality, prunable=("0.0", "1.0", "2.0")),
    "dense": Specimen(Dense, prunable=("a", "b", "c")),
    "inception": Specimen(Inception, prunable=("stem.0", "one.0", "three.0", "pool.0")),
    "squeeze-excite": Specimen(
        SqueezeExcite, prunable=("stem.0", "expand", "depth", "squeeze", "excite")
    ),
    "flattened": Specimen(_flattened, prunable=("0.0", "1.0", "2.1")),
    "shared": Specimen(Shared, prunable=("stem.0", "twice", "after")),
    "shared-head": Specimen(SharedHead, prunable=("one.0", "two.0", "both")),
    "group-norm": Specimen(_group_norm, prunable=("0", "4"), frozen=("2",)),
    "layer-norm": Specimen(LayerNormed, prunable=("up",), frozen=("stem", "down")),
    "layer-scale": Specimen(LayerScale, prunable=("stem.0", "conv", "scale", "shift", "next")),
    "gated": Specimen(Gated, prunable=("stem.0", "pair", "wide", "left", "right")),
    "fixed-split": Specimen(FixedSplit, prunable=("stem.0", "left"), frozen=("split",)),
    "u-net": Specimen(UNet, prunable=("a.0", "b.0", "c.0", "up", "d.0", "e.0")),
    "biased": Specimen(_biased, prunable=("0", "2", "4")),
    "one-dimensional": Specimen(OneDimensional, (4, 32), prunable=("a", "b")),
    "mlp": Specimen(_mlp, (20,), prunable=("0", "3")),
    "attention": Specimen(Attention, prunable=("up",), frozen=("patch", "qkv", "out")),
    "shuffled": Specimen(Shuffled, prunable=("stem.0", "mixed"), frozen=("wide", "low")),
    "spatial-gate": Specimen(SpatialGate, prunable=("stem.0",), frozen=("gate", "next.0", "mean")),
    "functional": Specimen(Functional, prunable=("next.0",), frozen=("stem.0", "unused")),
    "input-skip": Specimen(InputSkip, prunable=("c.0",), frozen=("b",)),
    "transposed": Specimen(_transposed_groups, prunable=("0.0", "1", "2.0", "3", "5.0")),
}
