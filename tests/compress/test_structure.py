"""Widths, parameters and multiply-accumulates equal the arithmetic written here."""

from __future__ import annotations

import torch
from torch import nn
from zoo import ZOO, make

from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.compress.size import layer_widths, work


def test_work_of_a_plain_net_is_the_sum_of_its_layers() -> None:
    model, x = make(ZOO["plain"])
    parameters, macs = work(model, x[:1])
    assert parameters == 9 * (3 * 16 + 16 * 24 + 24 * 32) + 2 * (16 + 24 + 32) + 32 * 5 + 5
    assert macs == 9 * (3 * 16 * 144 + 16 * 24 * 36 + 24 * 32 * 36) + 32 * 5


def test_grouped_and_depthwise_layers_count_only_their_own_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 3, groups=16))
    assert work(model, torch.zeros(1, 8, 6, 6))[1] == 9 * (16 * 2 * 36 + 16 * 16)


def test_a_transposed_convolution_multiplies_once_for_each_input_position() -> None:
    model = nn.ConvTranspose2d(4, 6, 2, 2)
    assert work(model, torch.zeros(1, 4, 5, 5))[1] == 4 * 6 * 4 * 25


def test_convolutions_of_one_and_three_dimensions_are_counted() -> None:
    assert work(nn.Conv1d(4, 6, 5, padding=2), torch.zeros(1, 4, 9))[1] == 4 * 6 * 5 * 9
    assert work(nn.Conv3d(2, 3, 3, padding=1), torch.zeros(1, 2, 4, 4, 4))[1] == 2 * 3 * 27 * 64


def test_a_linear_layer_counts_every_token() -> None:
    assert work(nn.Linear(8, 5), torch.zeros(1, 7, 8))[1] == 7 * 8 * 5


def test_widths_before_and_after_follow_the_cut() -> None:
    model, x = make(ZOO["inverted"])
    groups, _ = find_groups(model, x[:1])
    inner = next(g for g in groups if g.channels == 48)
    smaller = remove_channels(model, {inner.name: inner}, {inner.name: range(8)}, x[:1])
    found = {w.layer: w for w in layer_widths(model, smaller)}
    assert (found["expand.0"].out_before, found["expand.0"].out_after) == (48, 40)
    assert (found["project.0"].in_before, found["project.0"].in_after) == (48, 40)
    assert found["depth.0"].kind == "depthwise 3x3"
    assert found["stem.0"].out_after == 16


def test_work_leaves_the_model_as_it_was() -> None:
    model, x = make(ZOO["u-net"])
    work(model, x[:1])
    assert all(not m._forward_hooks for m in model.modules())
    kinds = {w.layer: w.kind for w in layer_widths(model, model)}
    assert kinds["up"] == "transposed conv 2x2"
