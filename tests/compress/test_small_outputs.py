"""Checks by execution judge by what matters to a model, not by the size of its outputs: probabilities of 1000 classes are about 0.001."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, conv_bn, make

from edgeprune.bundle.golden import default_tolerance
from edgeprune.compress.groups.find import (
    find_groups,
    mask_identity,
    remove_channels,
    zero_channels,
)
from edgeprune.compress.groups.masked import remove_dead
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.workload.model import dead_channels

WIDE = 1000


class Padded(nn.Module):
    """A shortcut of a CIFAR ResNet: every second pixel, and channels of zeros on both sides. The stem's channels cannot go one by one."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.stem, self.one, self.last = conv_bn(3, 16), conv_bn(16, 32, s=2), conv_bn(32, 32)
        self.two, self.norm = nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        self.out, self.ending = nn.Linear(32, WIDE), ending

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        y = self.out(self.last(F.relu(self.norm(self.two(self.one(x))) + short)).mean((2, 3)))
        # As attention is often written; such a model does not run in float64.
        if self.ending == "in float32":
            y = F.linear(y, torch.eye(WIDE)).softmax(1)
        return {"probabilities": y.softmax(1), "tiny": 1e-6 * y}.get(self.ending, y)


def padded(ending: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Padded(ending).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("ending", ["logits", "probabilities", "tiny", "in float32"])
def test_a_wrong_group_is_found_out_whatever_the_size_of_the_outputs(ending: str) -> None:
    model, x = padded(ending)
    groups, frozen = find_groups(model, x[:1])
    assert {g.name for g in groups} == {"one.0", "last.0"}
    assert any("not the same as zeroing" in f.reason for f in frozen if "stem.0" in f.layers)


@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("name", ["residual", "dense", "grouped", "inverted"])
def test_right_groups_hold_whatever_the_size_of_the_outputs(name: str, factor: float) -> None:
    model, x = make(ZOO[name])
    expected, _ = find_groups(model, x[:1])
    found, _ = find_groups(nn.Sequential(model, Times(factor)).eval(), x[:1])
    assert [g.name for g in found] == [f"0.{g.name}" for g in expected]


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("share", [0.0, 1e-12, 1e-6])
@pytest.mark.parametrize("ending", ["logits", "in float32"])
def test_right_groups_hold_where_zeroing_changes_next_to_nothing(ending: str, share: float) -> None:
    model, x = padded(ending)
    with torch.no_grad():
        model.out.weight.mul_(share)
    groups, _ = find_groups(model, x[:1])
    assert {"one.0", "last.0"} <= {g.name for g in groups}


class TakenForGranted(nn.Module):
    """Right while its channels are even in number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        n, c, h, w = x.shape
        if self.kind == "swapped in pairs, and back":
            for _ in range(2):
                x = x.reshape(n, c // 2, 2, h, w).flip(2).reshape(n, c, h, w)
        else:  # what is left over in the end is lost
            x = torch.cat([x[:, : c // 2 * 2], x[:, c // 2 * 2 :] * 0], 1)
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["swapped in pairs, and back", "in whole pairs"])
def test_a_width_that_must_be_even_is_found_out(kind: str) -> None:
    torch.manual_seed(0)
    model = TakenForGranted(kind).eval()
    groups, frozen = find_groups(model, torch.randn(1, 3, 8, 8))
    assert [g.name for g in groups] == ["b"]
    assert "a" in {layer for f in frozen for layer in f.layers}


def test_the_identity_says_by_how_much_it_fails() -> None:
    model, x = make(ZOO["plain"])
    groups, _ = find_groups(model, x[:1])
    group = groups[0]
    mixed = tuple(
        replace(c, indices=tuple(reversed(c.indices))) if c.side == "in" else c
        for c in group.couplings
    )
    wrong = replace(group, couplings=mixed)
    problem = mask_identity(model, [wrong], {wrong.name: [0, 1, 2]}, x)
    assert problem is not None
    found = remove_channels(model, {wrong.name: wrong}, {wrong.name: [0, 1, 2]}, x[:1])
    expected = zero_channels(model, {wrong.name: wrong}, {wrong.name: [0, 1, 2]})
    with torch.no_grad():
        difference, changed = ((m(x) - expected(x)).abs().max() for m in (found, model))
    assert f"differs by {difference:.2g} where that changes {changed:.2g}" in problem


@pytest.mark.parametrize("factor", [1.0, 1e-5])
def test_masked_channels_stay_where_their_removal_shows_also_in_small_outputs(
    factor: float,
) -> None:
    model, x = make(ZOO["plain"])
    with torch.no_grad():
        model[0][0].weight[0] = 0
        model[0][1].bias[0] = -5  # shut by the ReLU
    model = nn.Sequential(*model, Times(factor)).eval()
    groups, _ = find_groups(model, x[:1])
    dead = {"0.0": dead_channels(model)["0.0"]}
    _, notes = remove_dead(model, groups, dead, x[:1], x)
    assert notes == ("removed 1 masked channels from 1 groups",)
    # A group that gives up the wrong statistics.
    first = next(g for g in groups if g.name == "0.0")
    mixed = tuple(
        replace(c, indices=tuple(reversed(c.indices))) if c.layer == "0.1" else c
        for c in first.couplings
    )
    same, notes = remove_dead(model, [replace(first, couplings=mixed)], dead, x[:1], x)
    assert notes[0].startswith("masked channels stay")
    assert same[0][0].out_channels == model[0][0].out_channels


@pytest.mark.parametrize("largest", [1e-3, 0.25, 40.0])
def test_golden_samples_allow_a_share_of_the_largest_output(largest: float) -> None:
    spec = TensorSpec(name="y", shape=(1, 4), dtype="float32")
    outputs = np.full((8, 4), largest, np.float32)
    for precision, ratio in (("fp32", 1e-4), ("fp16", 0.05)):
        artifact = Artifact.model_construct(format="onnx", precision=precision, outputs=(spec,))
        assert default_tolerance(artifact, outputs).atol == pytest.approx(ratio * largest)
