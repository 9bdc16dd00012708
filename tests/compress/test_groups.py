"""Channel groups: everything found keeps the mask identity, everything else is named with a reason."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch_pruning.dependency import index_mapping
from zoo import ZOO, conv_bn, head, make

from edgeprune.compress.groups import coupling
from edgeprune.compress.groups import find as groups_module
from edgeprune.compress.groups.find import (
    ChannelGroup,
    find_groups,
    mask_identity,
    remove_channels,
    zero_channels,
)
from edgeprune.errors import ModelError

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def groups_of(name: str) -> tuple[nn.Module, Tensor, dict[str, ChannelGroup], dict[str, str]]:
    """A net, its inputs, its groups by producer, and reasons by frozen layer."""
    model, x = make(ZOO[name])
    groups, frozen = find_groups(model, x[:1])
    return (
        model,
        x,
        {layer: g for g in groups for layer in g.producers()},
        {layer: f.reason for f in frozen for layer in f.layers},
    )


def drawn(groups: tuple[ChannelGroup, ...], seed: int) -> dict[str, list[int]]:
    generator = np.random.default_rng(seed)
    return {
        g.name: generator.permutation(g.channels)[: generator.integers(0, g.channels)].tolist()
        for g in groups
    }


@pytest.mark.parametrize("name", sorted(ZOO))
def test_any_removal_equals_zeroing_what_reads_the_channels(name: str) -> None:
    model, x = make(ZOO[name])
    groups, _ = find_groups(model, x[:1])
    for seed in range(5):
        assert mask_identity(model, groups, drawn(groups, seed), x) is None


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zeroing_matters_so_that_the_identity_says_something(name: str) -> None:
    model, x = make(ZOO[name])
    groups, _ = find_groups(model, x[:1])
    with torch.no_grad():
        for group in groups:
            masked = zero_channels(model, {group.name: group}, {group.name: range(group.channels)})
            assert not torch.allclose(masked(x), model(x), rtol=1e-3, atol=1e-5), group.name


@pytest.mark.parametrize("name", sorted(ZOO))
def test_expected_layers_are_prunable_and_every_other_one_has_a_reason(name: str) -> None:
    model, _, by_layer, reasons = groups_of(name)
    assert set(ZOO[name].prunable) <= set(by_layer)
    assert set(ZOO[name].frozen) <= set(reasons)
    weighted = {n for n, m in model.named_modules() if isinstance(m, WEIGHTED)}
    assert weighted <= set(by_layer) | set(reasons)
    assert all(len(reason) > 15 for reason in reasons.values())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_is_left_is_a_plain_model_with_true_attributes(name: str) -> None:
    model, x = make(ZOO[name])
    groups, _ = find_groups(model, x[:1])
    # A quarter goes, so that something is left to prune once more.
    order = np.random.default_rng(7).permutation
    quarter = {g.name: order(g.channels)[: g.channels // 4].tolist() for g in groups}
    smaller = remove_channels(model, {g.name: g for g in groups}, quarter, x[:1])
    assert type(smaller) is type(model)
    for module in smaller.modules():
        assert not module._forward_hooks
        if isinstance(module, nn.modules.conv._ConvNd):
            across = (module.in_channels, module.out_channels)
            first, second = across if module.transposed else across[::-1]
            assert tuple(module.weight.shape[:2]) == (first, second // module.groups)
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.num_features == len(module.running_mean) == len(module.weight)
    again, _ = find_groups(smaller, x[:1])
    assert mask_identity(smaller, again, drawn(again, 3), x) is None


@pytest.mark.parametrize("name", ["residual", "dense", "u-net", "flattened", "gated"])
def test_one_cut_for_all_groups_equals_cuts_in_any_order(name: str) -> None:
    model, x = make(ZOO[name])
    groups, _ = find_groups(model, x[:1])
    by_name, removed = {g.name: g for g in groups}, drawn(groups, 1)
    whole = remove_channels(model, by_name, removed, x[:1])
    backwards = remove_channels(model, by_name, dict(reversed(removed.items())), x[:1])
    with torch.no_grad():
        assert torch.equal(whole(x), backwards(x))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_neither_search_nor_cut_changes_the_model(name: str) -> None:
    model, x = make(ZOO[name])
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    groups, _ = find_groups(model, x[:1])
    remove_channels(model, {g.name: g for g in groups}, drawn(groups, 2), x[:1])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_groups_are_named_after_their_first_layer_in_the_order_of_the_model() -> None:
    model, x = make(ZOO["residual"])
    groups, _ = find_groups(model, x[:1])
    assert [g.name for g in groups] == ["stem.0", "a1.0", "a2", "b1.0"]
    assert find_groups(model, x[:1])[0] == groups


def test_a_sum_of_layers_is_a_spine_and_a_gate_is_not() -> None:
    _, _, residual, _ = groups_of("residual")
    assert residual["a2"] is residual["down"] is residual["b2"]
    assert {n: residual[n].kind for n in ("stem.0", "a2", "b1.0")} == {
        "stem.0": "inner", "a2": "spine", "b1.0": "inner",
    }  # fmt: skip
    _, _, gated, _ = groups_of("squeeze-excite")
    assert gated["expand"] is gated["excite"]
    assert gated["excite"].kind == "inner"
    assert gated["project"].kind == "spine"


def test_a_depthwise_layer_goes_with_the_channels_that_flow_through_it() -> None:
    _, _, groups, _ = groups_of("inverted")
    assert groups["expand.0"] is groups["depth.0"]
    assert [c.layer for c in groups["expand.0"].consumers()] == ["project.0"]


def test_a_depthwise_multiplier_ties_several_outputs_to_one_input() -> None:
    _, _, groups, _ = groups_of("multiplier")
    multiplied = next(c for c in groups["1"].couplings if c.layer == "1")
    assert groups["1"].channels == 12
    assert multiplied.indices[5] == (10, 11)


def test_few_groups_give_up_the_same_positions_and_many_go_as_a_whole() -> None:
    _, _, few, _ = groups_of("grouped")
    assert few["0.0"].channels == 8
    assert few["0.0"].consumers()[0].indices[1] == (1, 9, 17, 25)
    _, _, many, _ = groups_of("cardinality")
    assert many["0.0"] is many["1.0"]
    assert many["0.0"].channels == 16


def test_group_norm_gives_up_whole_groups_and_a_single_one_keeps_all() -> None:
    model, x, groups, reasons = groups_of("group-norm")
    smaller = remove_channels(model, {"0": groups["0"]}, {"0": [1, 5]}, x[:1])
    assert (smaller[1].num_groups, smaller[1].num_channels) == (6, 12)
    assert "one block" in reasons["2"]


def test_flattened_channels_are_read_at_every_position() -> None:
    _, _, groups, _ = groups_of("flattened")
    reader = groups["1.0"].consumers()[0]
    assert reader.indices[2] == tuple(range(18, 27))


def test_concatenated_branches_stay_groups_of_their_own() -> None:
    _, _, groups, _ = groups_of("inception")
    assert len({groups[n].name for n in ("one.0", "three.0", "pool.0")}) == 3
    assert groups["three.0"].consumers()[0].indices[0] == tuple(range(8 * 9, 9 * 9))


def test_reasons_say_what_stands_in_the_way() -> None:
    reasons = {name: groups_of(name)[3] for name in ("layer-norm", "functional", "spatial-gate")}
    assert reasons["layer-norm"]["stem"] == "a LayerNorm mixes its channels"
    assert "can be traced" in reasons["functional"]["unused"]
    assert "1 channels" in reasons["spatial-gate"]["gate"]
    assert "not the same as zeroing" in reasons["spatial-gate"]["next.0"]
    assert reasons["layer-norm"]["head.2"] == "its channels are the model's outputs"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner, self.head = conv_bn(3, 16), Choosing(), head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.body(x)))


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if x.shape[-1] < 100:
            raise NotImplementedError("images under 100 pixels")
        return x


def test_a_model_that_cannot_be_traced_names_the_layer() -> None:
    with pytest.raises(ModelError, match=r"'inner' \(Choosing\): images under 100"):
        find_groups(Branching().eval(), torch.zeros(1, 3, 12, 12))


def test_a_model_in_which_nothing_can_go_says_why() -> None:
    with pytest.raises(ModelError, match=r"0: its channels are the model's outputs"):
        find_groups(nn.Sequential(nn.Linear(12, 10)), torch.zeros(1, 12))
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        find_groups(nn.ReLU(), torch.zeros(1, 12, requires_grad=True))


def test_channels_that_do_not_exist_or_would_all_go_are_refused() -> None:
    model, x, groups, _ = groups_of("plain")
    for wrong in ([16], [-1], range(16)):
        with pytest.raises(ModelError, match="must be some of its 16"):
            remove_channels(model, {"0.0": groups["0.0"]}, {"0.0": wrong}, x[:1])


@pytest.mark.parametrize("operation", ["reshape", "concat", "split"])
def test_maps_that_the_tracing_library_cannot_make_are_not_needed(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch-Pruning 1.6.1 divides by zero at the channel shuffle of ShuffleNet V2 and adds ``None`` at the roll of Swin."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    for name in ("shuffled", "inception", "gated"):
        model, x = make(ZOO[name])
        before = find_groups(model, x[:1])
        with monkeypatch.context() as patch:
            patch.setattr(index_mapping, f"update_{operation}_index_mapping", broken)
            assert find_groups(model, x[:1]) == before


class LogitsOf(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits  # type: ignore[no-any-return]


def _from_library(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_sizes": [32, 64], "depths": [1, 2], "num_labels": 5}
    settings: dict[str, dict[str, Any]] = {
        "ResNet": {**small, "embedding_size": 16, "layer_type": "bottleneck"},
        "RegNet": {**small, "embedding_size": 16, "groups_width": 8, "layer_type": "y"},
        "MobileNetV1": {"depth_multiplier": 0.25, "num_labels": 5},
        "MobileNetV2": {"depth_multiplier": 0.35, "num_labels": 5},
        "ConvNext": {**small, "num_stages": 2},
    }
    config = getattr(transformers, f"{name}Config")(**settings[name])
    return LogitsOf(getattr(transformers, f"{name}ForImageClassification")(config)).eval()


def test_heads_that_the_library_has_read_off_wrongly_cannot_be_followed() -> None:
    # What it finds in a Hiera: heads of no channels, by which it divides.
    mapping = index_mapping._GQAIndexMapping(repeat=2, head_dim=0, reverse=True)
    dependency = SimpleNamespace(index_mapping=[mapping])
    here, there = coupling._mapped(dependency, np.array([0, 3]))
    assert here.tolist() == [0, 3]
    assert there.tolist() == [coupling.LOST] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet", "RegNet", "MobileNetV1", "MobileNetV2", "ConvNext"])
def test_nets_of_a_model_library_keep_the_identity(name: str) -> None:
    torch.manual_seed(0)
    model, x = _from_library(name), torch.randn(1, 3, 64, 64)
    groups, frozen = find_groups(model, x)
    assert len(groups) >= 3
    assert all("removing channels" not in f.reason for f in frozen)
    for seed in range(2):
        assert mask_identity(model, groups, drawn(groups, seed), x) is None


class FactoredAttention(nn.Module):
    """Attention by plain products of tensors that one layer wrote: on the way round, their channels land on ever new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = (
            nn.Conv2d(3, 16, 4, 4),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
        )
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = q @ (k.softmax(dim=2).transpose(-1, -2) @ v)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, 16))
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


@pytest.mark.timeout(60)
def test_channels_that_go_in_circles_are_kept_and_the_search_for_groups_ends() -> None:
    torch.manual_seed(0)
    groups, frozen = find_groups(FactoredAttention().eval(), torch.randn(1, 3, 12, 12))
    assert [g.name for g in groups] == ["patch", "up"]
    reasons = {layer: f.reason for f in frozen for layer in f.layers}
    assert "cannot be followed" in reasons["qkv"]


class Remembering(nn.Module):
    """Keeps a tensor that was computed from a parameter, as attention with cached biases does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv_bn(3, 16), nn.Conv2d(16, 24, 3, 1, 1), head(24)
        self.bias, self.kept = nn.Parameter(torch.randn(1, 1, 1, 1)), {}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["bias"] = 2 * self.bias
        return self.head(functional.relu(self.mid(self.stem(x))) + self.kept["bias"])


def test_a_model_that_keeps_tensors_of_its_forward_pass_has_groups_too() -> None:
    torch.manual_seed(0)
    model = Remembering().eval()
    groups, _ = find_groups(model, torch.randn(1, 3, 8, 8))
    assert {g.name for g in groups} == {"stem.0", "mid"}
    assert not model.kept


@given(
    edges=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60),
)
def test_components_are_those_of_a_walk_along_the_edges(edges: list[tuple[int, int]]) -> None:
    one, other = (np.array([e[k] for e in edges], dtype=np.int64) for k in (0, 1))
    found = coupling._components(30, one, other).tolist()
    for start in range(30):
        reached, todo = {start}, [start]
        while todo:
            at = todo.pop()
            near = {b for a, b in edges if a == at} | {a for a, b in edges if b == at}
            todo += near - reached
            reached |= near
        assert found[start] == min(reached)


def test_where_one_group_of_many_fails_it_alone_is_kept_whole(monkeypatch) -> None:
    model, x = make(ZOO["squeeze-excite"])
    every, _ = find_groups(model, x[:1])
    broken = every[len(every) // 2].name
    asked = []

    def identity(model, groups, removed, x, dense):
        asked.append([g.name for g in groups])
        return (
            "it fails" if broken in asked[-1] else mask_identity(model, groups, removed, x, dense)
        )

    monkeypatch.setattr(groups_module, "mask_identity", identity)
    left, frozen = find_groups(model, x[:1])
    assert [g.name for g in left] == [g.name for g in every if g.name != broken]
    assert [f.reason for f in frozen].count("it fails") == 1


class ShuffledHalves(nn.Module):
    """Branches that are joined and shuffled, again and again: each pair is right while it has an even number of channels together."""

    def __init__(self, units: int = 8) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 16), head(16)
        self.units = nn.ModuleList(
            nn.ModuleDict(
                {
                    "left": nn.Conv2d(16, 24, 1),
                    "right": nn.Conv2d(16, 24, 1),
                    "mixed": nn.Conv2d(48, 16, 3, 1, 1),
                }
            )
            for _ in range(units)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            x = torch.cat([unit["left"](x), unit["right"](x)], dim=1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            x = functional.relu(unit["mixed"](x))
        return self.head(x)


def test_groups_that_are_right_only_together_are_kept_whole() -> None:
    torch.manual_seed(0)
    model, x = ShuffledHalves().eval(), torch.randn(1, 3, 8, 8)
    groups, _ = find_groups(model, x)
    assert {"units.0.mixed", "units.7.mixed"} <= {g.name for g in groups}
    assert not [g.name for g in groups if g.name.endswith(("left", "right"))]
    for seed in range(5):
        assert mask_identity(model, groups, drawn(groups, seed), x) is None
