"""Cross-layer equalisation leaves what a net says, and bias correction takes back what rounding adds."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn

from edgeprune.compress.int8.equalise import Pair, correct_biases, equalise, pairs, rounded


def uneven() -> tuple[nn.Module, torch.Tensor]:
    """Two convolutions with batch norm and ReLU between them, whose channels differ in scale by up to 2^12."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    factor = 2.0 ** torch.linspace(-6, 6, 12)
    with torch.no_grad():
        model[1].weight.mul_(factor)
        model[1].bias.add_(0.1).mul_(factor)
        model[3].weight.div_(factor.reshape(1, -1, 1, 1))
    return model, torch.randn(32, 3, 12, 12)


def with_rounded_weights(model: nn.Module) -> nn.Module:
    quantised = copy.deepcopy(model)
    with torch.no_grad():
        for module in quantised.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(rounded(module.weight))
    return quantised


def test_equalised_layers_say_the_same_and_survive_rounding():
    model, x = uneven()
    before = copy.deepcopy(model.state_dict())
    found, note = equalise(model, x[:1], x)
    assert note == "1 pairs of layers equalised"
    wanted = model(x)
    assert torch.allclose(found(x), wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    ranges = found[3].weight.abs().transpose(0, 1).flatten(1).amax(1)
    assert float(ranges.max() / ranges.min()) < 4  # 2^12 before
    error = (with_rounded_weights(model)(x) - wanted).square().mean()
    assert (with_rounded_weights(found)(x) - wanted).square().mean() < 0.1 * error


def test_depthwise_layers_are_part_of_a_pair():
    model, x = zoo.make(zoo.ZOO["inverted"])
    assert Pair("expand.0", "expand.1", "depth.0") in pairs(model, x[:1])
    assert Pair("depth.0", "depth.1", "project.0") in pairs(model, x[:1])


@pytest.mark.parametrize(
    "name", ["inverted", "residual", "grouped", "multiplier", "u-net", "mlp", "shared"]
)
def test_equalisation_never_changes_what_a_net_says(name):
    model, x = zoo.make(zoo.ZOO[name])
    found, _ = equalise(model, x[:1], x)
    wanted = model(x)
    assert torch.allclose(found(x), wanted, atol=2e-3 * float(wanted.abs().max()))


def test_layers_with_several_readers_or_a_bounded_activation_are_no_pair():
    model, x = zoo.make(zoo.ZOO["squeeze-excite"])
    found = pairs(model, x[:1])
    assert all(p.first not in ("stem.0", "expand", "depth", "excite") for p in found)
    assert any((p.first, p.second) == ("squeeze", "excite") for p in found)


def test_shared_weights_are_no_pair():
    model, x = zoo.make(zoo.ZOO["shared"])
    assert all("twice" not in (p.first, p.second) for p in pairs(model, x[:1]))


def test_corrected_biases_take_back_the_shift_of_rounding():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)).eval()
    x = torch.rand(64, 3, 12, 12) + 1
    with torch.no_grad():
        model[3].weight[:, ::40] *= 60  # wide ranges round the rest coarsely
    found, note = correct_biases(model, x)
    assert note == "the biases of 2 layers corrected"
    wanted = model(x).mean(0)
    shift = (with_rounded_weights(model)(x).mean(0) - wanted).abs().max()
    left = (with_rounded_weights(found)(x).mean(0) - wanted).abs().max()
    assert left < 0.2 * shift


def test_a_batch_norm_takes_the_correction_of_a_layer_without_bias():
    model, x = uneven()
    found, _ = correct_biases(model, x)
    assert not torch.equal(found[1].running_mean, model[1].running_mean)
    assert torch.equal(found[0].weight, model[0].weight)
