"""Convolutions of a class of their own take part in the repair where running them shows that they are convolutions."""

from __future__ import annotations

import pytest
import torch
from repair_fixture import KEPT, KEPT_OUTPUTS, ConvNet, dense_net, samples, without_channels
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compress.groups.find import find_groups
from edgeprune.compress.readings import as_positions, reading_of
from edgeprune.compress.repair.compensate import compensate
from edgeprune.compress.scores.reconstruction import obs
from edgeprune.compress.scores.weights import Scores
from edgeprune.progress import Silent


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does: more behind than in front, by the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for axis in (1, 0):
            size, step = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            total = max((-(-size // step) - 1) * step + reach - size, 0)
            sides += [total // 2, total - total // 2]
        x = functional.pad(x, sides)
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation)


class StaticPadding(nn.Conv2d):
    """Has its padding as a module."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Computes with another weight than it has."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Rectified(nn.Conv2d):
    """Does more than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Scaled(nn.Linear):
    """Computes with a part of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


@pytest.mark.parametrize(
    "layer",
    [
        SamePadding(3, 4, 3, stride=2),
        SamePadding(3, 4, (2, 5), dilation=2, bias=False),
        StaticPadding(3, 4, 3, stride=2),
    ],
)
def test_a_convolution_of_a_class_of_its_own_says_by_running_what_it_reads(
    layer: nn.Conv2d,
) -> None:
    x = torch.randn(2, 3, 9, 8)
    output = as_positions(layer, layer(x)).detach()
    reading = reading_of(layer, x.shape[1:])
    assert reading is not None
    where = torch.randint(output.shape[1], (2, 20))
    expected = torch.stack([output[n, where[n]] for n in range(2)]).flatten(0, 1)
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    rows = reading.rows(x, where)
    torch.testing.assert_close(rows @ layer.weight.detach().flatten(1).T + bias, expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Standardised(3, 4, 3), (3, 8, 8)),
        (Rectified(3, 4, 3), (3, 8, 8)),
        (Scaled(3, 4), (3,)),
    ],
)
def test_a_layer_that_computes_something_else_is_seen_by_running_it(layer, shape) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert reading_of(layer, torch.Size(shape)) is None
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def with_mix(net: ConvNet, kind: type[nn.Conv2d]) -> ConvNet:
    """The net with its mixing convolution of another class and the same weight."""
    mix = kind(net.mix.in_channels, 16, 3, stride=2, padding=1).eval()
    mix.load_state_dict(net.mix.state_dict())
    net.mix = mix
    return net


@pytest.mark.parametrize(("kind", "fitted"), [(SamePadding, ["mix"]), (Standardised, [])])
def test_the_repair_takes_such_layers_in_and_leaves_others_with_the_reason(kind, fitted) -> None:
    dense, pruned = (with_mix(n, kind) for n in (dense_net(), without_channels(dense_net(), KEPT)))
    _, report = compensate(pruned, dense, KEPT_OUTPUTS, samples(200), progress=Silent())
    assert [fit.name for fit in report.fitted] == fitted
    if fitted:
        assert report.used
        assert report.kl_compensated < 0.8 * report.kl_recalibrated
    else:
        reason = "a Standardised computes something else than its weight says"
        assert dict(report.skipped) == {"mix": reason}


def test_scores_by_reconstruction_know_such_layers_too() -> None:
    def scores(kind: type[nn.Conv2d]) -> Scores:
        net = with_mix(dense_net(), kind)
        return obs(net, find_groups(net, samples(1))[0], samples(64), 0)

    class Same(nn.Conv2d):
        """A convolution under another name."""

    plain, same, other = (scores(kind) for kind in (nn.Conv2d, Same, Rectified))
    for name in plain:
        assert plain[name] == pytest.approx(same[name])
    assert any(plain[name] != pytest.approx(other[name], rel=1e-2) for name in plain)
