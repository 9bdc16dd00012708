"""Masked channels become removed channels, and faint channels become constants: the model says the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Residual, conv_bn, head, make

from edgeprune.compress.groups.find import find_groups
from edgeprune.compress.groups.masked import remove_dead
from edgeprune.workload.model import dead_channels

DEAD = (1, 4, 7)


def mask(layer: nn.Module, channels: tuple[int, ...] = DEAD) -> None:
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if isinstance(parameter, Tensor):
                parameter[list(channels)] = 0


def silence(norm: nn.Module, channels: tuple[int, ...] = DEAD) -> None:
    """Make a batch norm say nothing positive for channels whose filters are zero."""
    with torch.no_grad():
        for channel in channels:
            norm.bias[channel] = norm.running_mean[channel] * norm.weight[channel]
            norm.bias[channel] /= (norm.running_var[channel] + norm.eps).sqrt()
            norm.bias[channel] -= 0.5


def removed(model: nn.Module, x: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    before = copy.deepcopy(model.state_dict())
    groups, _ = find_groups(model, x[:1])
    smaller, notes = remove_dead(model, groups, dead_channels(model), x[:1], x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-4)
    return smaller, notes


def test_masked_filters_that_end_in_zero_are_removed_in_front_of_padded_layers() -> None:
    model, x = make(ZOO["plain"])
    mask(model[0][0])
    silence(model[0][1])
    smaller, notes = removed(model, x)
    assert smaller[0][0].out_channels == smaller[1][0].in_channels == 13
    assert notes == ("removed 3 masked channels from 1 groups",)


def test_a_constant_that_is_left_over_moves_into_the_bias_of_a_linear_layer() -> None:
    model, x = make(ZOO["plain"])
    mask(model[2][0])
    with torch.no_grad():
        model[2][1].bias[list(DEAD)] = 2.0
    smaller, _ = removed(model, x)
    assert smaller[2][0].out_channels == smaller[3][2].in_features == 29
    assert not torch.equal(smaller[3][2].bias, model[3][2].bias)


def test_a_constant_after_a_flatten_counts_at_every_position() -> None:
    model, x = make(ZOO["flattened"])
    mask(model[1][0])
    with torch.no_grad():
        model[1][1].bias[list(DEAD)] = 2.0
    smaller, _ = removed(model, x)
    assert smaller[2][1].in_features == 21 * 9


def test_a_constant_in_front_of_zero_padding_stays_and_is_named() -> None:
    model, x = make(ZOO["plain"])
    mask(model[0][0])
    with torch.no_grad():
        model[0][1].bias[list(DEAD)] = 2.0
    smaller, notes = removed(model, x)
    assert smaller[0][0].out_channels == 16
    assert "3 masked channels stay, because 1.0 pads with zeros" in notes[0]


def test_a_convolution_without_padding_and_bias_takes_the_constant_in_a_new_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv_bn(3, 16), nn.Conv2d(16, 12, 3, bias=False), nn.ReLU(), head(12)
    ).eval()
    mask(model[0][0])
    with torch.no_grad():
        model[0][1].bias[list(DEAD)] = 2.0
    smaller, _ = removed(model, torch.randn(4, 3, 12, 12))
    assert smaller[1].in_channels == 13
    assert smaller[1].bias is not None


def test_a_channel_of_a_sum_is_dead_only_if_every_branch_masks_it() -> None:
    model, x = make(ZOO["residual"])
    assert isinstance(model, Residual)
    mask(model.a2)
    mask(model.b2)
    smaller, notes = removed(model, x)
    assert smaller.a2.out_channels == 24
    assert "still varies" in notes[0]
    mask(model.down)
    smaller, _ = removed(model, x)
    assert smaller.a2.out_channels == smaller.down.out_channels == smaller.b2.out_channels == 21


def test_a_masked_depthwise_filter_kills_what_flows_through_it() -> None:
    model, x = make(ZOO["inverted"])
    mask(model.depth[0])
    smaller, _ = removed(model, x)
    assert smaller.expand[0].out_channels == smaller.depth[0].groups == 45
    assert smaller.project[0].in_channels == 45


def test_a_gate_that_lives_does_not_keep_a_channel_that_is_zero() -> None:
    model, x = make(ZOO["squeeze-excite"])
    mask(model.depth)
    smaller, _ = removed(model, x)
    assert smaller.depth.out_channels == smaller.excite.out_channels == 29


def test_a_relu_that_is_shut_for_these_inputs_only_is_not_dead() -> None:
    model, x = make(ZOO["residual"])
    mask(model.a2, (1,))
    mask(model.b2, (1,))
    with torch.no_grad():
        model.down.bias[
            1
        ] = -100  # the sum is zero after its ReLU, but only as long as inputs are small
    smaller, _ = removed(model, x)
    assert smaller.a2.out_channels == 24


def test_a_layer_that_is_masked_as_a_whole_keeps_one_channel() -> None:
    model, x = make(ZOO["biased"])
    mask(model[0], tuple(range(16)))
    smaller, notes = removed(model, x)
    assert smaller[0].out_channels == 1
    assert "a layer needs some" in notes[1]


def test_tied_channels_go_only_together() -> None:
    model, x = make(ZOO["grouped"])
    mask(model[0][0], (0, 8, 16, 24, 1, 9))
    silence(model[0][1], (0, 8, 16, 24, 1, 9))
    smaller, _ = removed(model, x)
    assert smaller[0][0].out_channels == 28


@pytest.mark.parametrize("name", sorted(ZOO))
def test_removing_dead_channels_never_changes_what_a_net_says(name: str) -> None:
    model, x = make(ZOO[name])
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and not isinstance(
            layer, nn.modules.conv._ConvTransposeNd
        ):
            mask(layer, (0, 3) if layer.out_channels > 3 else (0,))
    removed(model, x)


def test_a_model_without_masks_comes_back_as_an_equal_copy() -> None:
    model, x = make(ZOO["plain"])
    smaller, notes = removed(model, x)
    assert smaller is not model
    assert notes == ()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in smaller.state_dict().items())
