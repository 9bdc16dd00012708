"""Scores equal what gates written out by hand say; curves fall with the width and end at zero."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, head, make

from edgeprune.compress.evaluate import kl_nats
from edgeprune.compress.groups.find import ChannelGroup, find_groups, zero_channels
from edgeprune.compress.groups.surgery import remove_channels
from edgeprune.compress.scores.curvature import hessian
from edgeprune.compress.scores.importance import (
    BY_NAME,
    cost_curves,
    fisher,
    kept_channels,
    removal_order,
    taylor,
)
from edgeprune.compress.scores.reconstruction import obs, variance
from edgeprune.compress.scores.weights import bn_scale, fpgm, l1, l2, random
from edgeprune.errors import ModelError
from edgeprune.pipeline.stages.measure import curve_samples
from edgeprune.workload.answers import logits

SEED = 3


def gated(model: nn.Module, group: ChannelGroup, gates: Tensor) -> nn.Module:
    """A copy whose consumers read every channel of a group times its gate."""
    model = copy.deepcopy(model).eval()
    layers = dict(model.named_modules())
    for consumer in group.consumers():
        layer = layers[consumer.layer]

        def multiplied(
            _: nn.Module, args: tuple[Tensor, ...], layer=layer, consumer=consumer
        ) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
            last = isinstance(layer, nn.Linear)
            width = args[0].shape[-1 if last else 1]
            owner = {i: c for c, own in enumerate(consumer.indices) for i in own}
            one = torch.ones(())
            full = torch.stack([gates[owner[i]] if i in owner else one for i in range(width)])
            shape = [1] * args[0].dim()
            shape[-1 if last else 1] = width
            return (args[0] * full.view(shape),)

        layer.register_forward_pre_hook(multiplied)
    return model


def by_hand(model: nn.Module, group: ChannelGroup, x: Tensor) -> np.ndarray:
    """Half the squared gradient of a gate on every channel, sample by sample, in front of every consumer."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        chances = model(x).softmax(1)
    classes = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(SEED))[:, 0]
    gates = torch.ones(group.channels, requires_grad=True)
    model = gated(model, group, gates)
    total = torch.zeros(group.channels, dtype=torch.float64)
    for sample, label in zip(x, classes, strict=True):
        loss = F.cross_entropy(model(sample[None]), label[None])
        (gradient,) = torch.autograd.grad(loss, gates)
        total += gradient.double() ** 2 / 2
    return (total / len(x)).numpy()


@pytest.mark.parametrize(
    "name",
    [
        "plain", "residual", "inverted", "multiplier", "grouped", "dense", "inception", "squeeze-excite", "flattened", "gated",
        "shared-head", "shared", "layer-norm", "one-dimensional", "mlp", "transposed",
    ],
)  # fmt: skip
def test_fisher_equals_gates_written_out_by_hand(name: str) -> None:
    model, _ = make(ZOO[name])
    x = torch.randn(4, *ZOO[name].shape)
    groups, _ = find_groups(model, x[:1])
    scores = fisher(model, groups, x, SEED, batch_size=len(x))
    for group in groups:
        expected = by_hand(model, group, x)
        assert expected.max() > 0
        np.testing.assert_allclose(
            scores[group.name], expected, rtol=2e-3, atol=1e-4 * expected.max()
        )


def test_a_channel_that_nobody_hears_scores_zero() -> None:
    model, x = make(ZOO["plain"])
    groups, _ = find_groups(model, x[:1])
    deaf = zero_channels(model, {g.name: g for g in groups}, {"0.0": [5]})
    for score in (fisher, l2):
        found = score(deaf, groups, x, SEED)["0.0"]
        assert found[5] == 0
        assert (np.delete(found, 5) > 0).all()


def test_fisher_leaves_the_model_and_its_gradients_alone() -> None:
    model, x = make(ZOO["residual"])
    groups, _ = find_groups(model, x[:1])
    model.train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    wanted = [p.requires_grad for p in model.parameters()]
    fisher(model, groups, x, SEED)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert [p.grad is None for p in model.parameters()] == wanted
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fisher_works_where_gradients_are_switched_off() -> None:
    model, x = make(ZOO["plain"])
    groups, _ = find_groups(model, x[:1])
    with torch.no_grad():
        found = fisher(model, groups, x, SEED)
    assert all((found[k] == v).all() for k, v in fisher(model, groups, x, SEED).items())


class Overwriting(nn.Module):
    """Writes over what a layer has read."""

    def __init__(self, layer: Callable[[int, int], nn.Module], end: nn.Module) -> None:
        super().__init__()
        self.first, self.two, self.one = layer(3, 16), layer(16, 16), layer(16, 16)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.first(x))
        y = self.one(x)
        return self.end(F.relu(y) + x.mul_(2))


@pytest.mark.parametrize("linear", [True, False])
def test_overwriting_what_a_layer_has_read_is_an_error_and_never_a_wrong_score(
    linear: bool,
) -> None:
    torch.manual_seed(0)
    if linear:
        model, x = Overwriting(nn.Linear, nn.Linear(16, 5)).eval(), torch.randn(2, 3)
    else:
        pointwise = functools.partial(nn.Conv2d, kernel_size=1)
        model, x = Overwriting(pointwise, head(16)).eval(), torch.randn(2, 3, 8, 8)
    groups, _ = find_groups(model, x[:1])
    with pytest.raises(ModelError, match=r"'one' is overwritten in place|by an inplace operation"):
        fisher(model, groups, x, SEED)


def test_scores_depend_on_the_seed_alone() -> None:
    model, x = make(ZOO["inverted"])
    groups, _ = find_groups(model, x[:1])
    for score in (fisher, l2, random):
        first, again = score(model, groups, x, 1), score(model, groups, x, 1)
        assert all((first[name] == again[name]).all() for name in first)
        assert all(len(first[g.name]) == g.channels for g in groups)
    other = random(model, groups, x, 2)
    assert any((random(model, groups, x, 1)[n] != other[n]).any() for n in other)


def test_l2_is_the_energy_of_the_weights_that_read_a_channel() -> None:
    model, x = make(ZOO["inception"])
    groups, _ = find_groups(model, x[:1])
    found = l2(model, groups, x, 0)
    columns = model.head.weight[:, 8 * 9 : 9 * 9]
    assert found["three.0"][0] == pytest.approx(float(columns.square().sum()), rel=1e-5)
    readers = [model.one[0], model.three[0], model.pool[0]]
    expected = sum(float(r.weight[:, 4].square().sum()) for r in readers)
    assert found["stem.0"][4] == pytest.approx(expected, rel=1e-5)


def test_the_most_important_channels_stay_and_ties_go_by_index() -> None:
    order = removal_order({"a": np.array([3.0, 1.0, 1.0, 2.0])})["a"]
    assert order.tolist() == [1, 2, 3, 0]
    assert kept_channels(order, 2) == (0, 3)


@pytest.mark.parametrize("name", ["residual", "squeeze-excite", "flattened", "mlp"])
def test_curves_fall_with_the_width_and_are_zero_at_full_width(name: str) -> None:
    model, _ = make(ZOO[name])
    x = torch.randn(16, *ZOO[name].shape)
    groups, _ = find_groups(model, x[:1])
    grids = {g.name: (*range(4, g.channels, 4), g.channels) for g in groups}
    scores = random(model, groups, x, 0)
    curves = cost_curves(model, groups, scores, grids, x)
    again = cost_curves(model, groups, scores, grids, x)
    for group in groups:
        curve = curves[group.name]
        assert len(curve) == len(grids[group.name])
        assert curve[-1] == 0
        assert np.isfinite(curve).all()
        assert (np.diff(curve) < 0).all()
        assert (curve == again[group.name]).all()


def test_a_group_without_a_choice_costs_nothing() -> None:
    model, x = make(ZOO["plain"])
    groups, _ = find_groups(model, x[:1])
    grids = {g.name: (g.channels,) for g in groups}
    curves = cost_curves(model, groups, l2(model, groups, x, 0), grids, torch.cat([x, x]))
    assert all(curve.tolist() == [0.0] for curve in curves.values())


def test_scores_of_zero_give_a_finite_curve() -> None:
    model, x = make(ZOO["plain"])
    groups, _ = find_groups(model, x[:1])
    nothing = {g.name: np.zeros(g.channels) for g in groups}
    grids = {g.name: (8, g.channels) for g in groups}
    curves = cost_curves(model, groups, nothing, grids, torch.cat([x, x]))
    assert all(np.isfinite(c).all() and c[-1] == 0 and c[0] > 0 for c in curves.values())


def reads_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads, ``float64 [N, inputs, positions]``."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return torch.cat(seen).double().flatten(2) if seen[0].dim() > 2 else seen[0].double()[..., None]


@pytest.mark.parametrize("name", ["residual", "squeeze-excite", "flattened", "mlp", "grouped"])
def test_taylor_is_the_mean_size_of_the_gates_gradients(name: str) -> None:
    model, _ = make(ZOO[name])
    x = torch.randn(3, *ZOO[name].shape)
    groups, _ = find_groups(model, x[:1])
    found = taylor(model, groups, x, SEED, batch_size=2)
    with torch.no_grad():
        classes = model(x).argmax(1)
    for group in groups:
        gates = torch.ones(group.channels, requires_grad=True)
        watched, total = gated(model, group, gates), torch.zeros(group.channels)
        for sample, label in zip(x, classes, strict=True):
            loss = F.cross_entropy(watched(sample[None]), label[None])
            total += torch.autograd.grad(loss, gates)[0].abs()
        expected = (total / len(x)).numpy()
        np.testing.assert_allclose(
            found[group.name], expected, rtol=2e-3, atol=1e-4 * expected.max()
        )


def test_variance_is_that_of_what_is_read_times_the_weights_that_read_it() -> None:
    model, _ = make(ZOO["plain"])
    x = torch.randn(5, *ZOO["plain"].shape)
    groups, _ = find_groups(model, x[:1])
    found = variance(model, groups, x, 0)
    layers = dict(model.named_modules())
    for group in groups:
        (consumer,) = group.consumers()
        layer = layers[consumer.layer]
        seen = reads_of(model, layer, x)
        spread = seen.transpose(0, 1).flatten(1).var(1, correction=0)
        weight = layer.weight.detach().double()
        energy = weight.square().transpose(0, 1).flatten(1).sum(1)
        expected = [float((spread * energy)[list(own)].sum()) for own in consumer.indices]
        np.testing.assert_allclose(found[group.name], expected, rtol=1e-6)


class Chain(nn.Module):
    """Two linear layers; what the second reads is what the first writes."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, channels), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def missed(inputs: np.ndarray, weight: np.ndarray, kept: list[int], ridge: float) -> float:
    """Share of the output's energy that the best weights on the kept inputs miss; the pull is toward the old weights, as in the product."""
    x = inputs - inputs.mean(0)
    y = x @ weight
    gone = [i for i in range(x.shape[1]) if i not in kept]
    # Every input stays in the problem with its pull; those that are gone have the weight 0.
    gram = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    best = weight.copy()
    best[gone] = 0
    best[kept] = weight[kept] + np.linalg.solve(
        gram[np.ix_(kept, kept)], gram[np.ix_(kept, gone)] @ weight[gone]
    )
    change = best - weight
    return float(np.sum(change * (gram @ change)) / np.mean(np.sum(y * y, 1)))


def test_obs_finds_the_greedy_order_of_exact_least_squares() -> None:
    torch.manual_seed(4)
    model = Chain().eval()
    x = torch.randn(3000, 6)
    groups, _ = find_groups(model, x[:1])
    (group,) = groups
    found = obs(model, groups, x, 0)[group.name]
    order = np.argsort(found, kind="stable").tolist()
    with torch.no_grad():
        inputs = torch.relu(model.first(x)).double().numpy()
    weight = model.second.weight.detach().double().numpy().T
    centred = inputs - inputs.mean(0)
    ridge = 1e-3 * float(np.mean(centred**2))
    kept, total = list(range(12)), 0.0
    for step, chosen in enumerate(order[:8]):
        costs = {c: missed(inputs, weight, [k for k in kept if k != c], ridge) for c in kept}
        assert chosen == min(costs, key=lambda c: costs[c])
        kept.remove(chosen)
        total += found[chosen]
        assert total >= costs[chosen] * (1 - 1e-6)
        if step == 0:
            assert total == pytest.approx(costs[chosen], rel=1e-5)


def test_obs_sees_through_convolutions_with_many_samples() -> None:
    torch.manual_seed(2)
    first, second = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        first.weight[3], first.bias[3] = 2 * first.weight[8], 2 * first.bias[8]
        second.weight[:, 3] *= 10  # large, and not needed: 8 can stand for it
    x = torch.randn(300, 3, 8, 8)
    groups, _ = find_groups(model, x[:1])
    group = next(g for g in groups if g.root == "0")
    scores = obs(model, groups, x, 0)[group.name]
    assert int(np.argmin(scores)) in (3, 8)
    assert scores.min() < 0.01 * np.median(scores)
    assert int(np.argmin(variance(model, groups, x, 0)[group.name])) not in (3,)


def test_obs_lets_a_channel_go_that_others_can_stand_for() -> None:
    torch.manual_seed(1)
    model = Chain().eval()
    with torch.no_grad():
        model.first.weight[3] = 2 * model.first.weight[8]
        model.first.bias[3] = 2 * model.first.bias[8]
        model.second.weight[:, 3] *= 10  # large, and not needed
    x = torch.randn(2000, 6)
    groups, _ = find_groups(model, x[:1])
    assert int(np.argmin(obs(model, groups, x, 0)[groups[0].name])) in (3, 8)
    assert int(np.argmax(l2(model, groups, x, 0)[groups[0].name])) == 3


@pytest.mark.parametrize(
    "name",
    [
        "plain", "residual", "inverted", "multiplier", "grouped", "dense", "inception", "squeeze-excite", "flattened", "gated",
        "shared-head", "shared", "layer-norm", "one-dimensional", "mlp", "transposed",
    ],
)  # fmt: skip
@pytest.mark.parametrize("importance", sorted(BY_NAME))
def test_every_importance_scores_every_channel_of_every_net(importance: str, name: str) -> None:
    model, _ = make(ZOO[name])
    x = torch.randn(4, *ZOO[name].shape)
    groups, _ = find_groups(model, x[:1])
    before = copy.deepcopy(model.state_dict())
    found = BY_NAME[importance](model, groups, x, SEED)
    again = BY_NAME[importance](model, groups, x, SEED)
    for group in groups:
        scores = found[group.name]
        assert scores.shape == (group.channels,)
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()
        assert len(set(scores.tolist())) > 1
        assert (scores == again[group.name]).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_weights_alone_give_the_scores_that_their_papers_say() -> None:
    model, x = make(ZOO["residual"])
    groups, _ = find_groups(model, x[:1])
    inner = next(g for g in groups if g.root == "b1.0")
    reading = model.b2.weight.detach().double()
    expected = reading.abs().sum((0, 2, 3)).numpy()
    np.testing.assert_allclose(l1(model, groups, x, 0)[inner.name], expected, rtol=1e-6)
    scale = model.b1[1].weight.detach().abs().numpy()
    np.testing.assert_allclose(bn_scale(model, groups, x, 0)[inner.name], scale, rtol=1e-6)
    with torch.no_grad():
        model.b1[0].weight[5] = model.b1[0].weight.mean(0)  # what all others have in common
    assert int(np.argmin(fpgm(model, groups, x, 0)[inner.name])) == 5


def diagonal_by_hand(model: nn.Module, group: ChannelGroup, x: Tensor) -> np.ndarray:
    """Half the diagonal of the whole Hessian of the divergence by the gates of one group."""
    with torch.no_grad():
        dense = copy.deepcopy(model).eval()(x).log_softmax(1)

    def divergence(gates: Tensor) -> Tensor:
        said = gated(model, group, gates)(x).log_softmax(1)
        return F.kl_div(said, dense, reduction="batchmean", log_target=True)

    whole = torch.autograd.functional.hessian(divergence, torch.ones(group.channels))
    return (torch.diagonal(whole).double() / 2).numpy()


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("residual", "shared")), "mlp"]
)
def test_the_hessian_is_the_diagonal_written_out_by_hand(name: str) -> None:
    model, _ = make(ZOO[name])
    x = torch.randn(4, *ZOO[name].shape)
    groups, _ = find_groups(model, x[:1])
    for group in groups:  # one at a time: directions of other groups are noise
        expected = np.maximum(diagonal_by_hand(model, group, x), 0)
        score = hessian(model, [group], x, SEED, batch_size=2, probes=800)[group.name]
        np.testing.assert_allclose(score, expected, rtol=0.3, atol=0.1 * expected.max())


def test_the_hessian_sees_that_a_closed_gate_costs_and_repeats_with_its_seed() -> None:
    model, _ = make(ZOO["inverted"])
    x = torch.randn(8, *ZOO["inverted"].shape)
    groups, _ = find_groups(model, x[:1])
    first, again = (hessian(model, groups, x, SEED) for _ in range(2))
    assert all((first[g.name] == again[g.name]).all() for g in groups)
    assert all((first[g.name] >= 0).all() and first[g.name].max() > 0 for g in groups)
    with torch.no_grad():
        quiet = hessian(model, groups, x, SEED)
    assert all((first[g.name] == quiet[g.name]).all() for g in groups)


@pytest.mark.parametrize("importance", ["fisher", "hessian", "taylor", "obs", "variance"])
def test_scoring_without_a_sample_is_an_error(importance: str) -> None:
    model, x = make(ZOO["plain"])
    groups, _ = find_groups(model, x[:1])
    with pytest.raises(ModelError, match="at least 1 sample"):
        BY_NAME[importance](model, groups, x[:0], SEED)


def test_the_cost_of_a_width_is_what_is_left_after_the_repair():
    torch.manual_seed(0)
    # Two channels that say the same: one of them can go for nothing, once its weights are given to the other.
    first, second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 5, 1)
    with torch.no_grad():
        first.weight[0], first.bias[0] = first.weight[1], first.bias[1]
        second.weight.mul_(3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(128, 3, 8, 8)
    groups, _ = find_groups(model, x[:1])
    (name,) = [g.name for g in groups]
    score = np.arange(8.0) + 1
    curves = cost_curves(model, groups, {name: score}, {name: (4, 7, 8)}, x)
    bare = kl_nats(
        logits(model, x[64:]),
        logits(remove_channels(model, {g.name: g for g in groups}, {name: [0]}, x[:1]), x[64:]),
    )
    assert curves[name][1] < 0.02 * bare
    assert curves[name][0] > 10 * curves[name][1]


def test_large_nets_with_many_groups_are_calibrated_on_fewer_samples():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
    groups = [object()] * 10
    small, large = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 512, 512)
    assert curve_samples(model, groups, small) == 1024
    assert 96 <= curve_samples(model, groups, large) < 1024
    assert curve_samples(model, groups * 100, large) == 96
