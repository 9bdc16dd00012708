"""Channels that earlier pruning masked become channels removed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgeprune.compress.groups.coupling import WEIGHTED
from edgeprune.compress.groups.surgery import ChannelGroup, remove_channels, weights_by_input
from edgeprune.workload.answers import BATCH, evaluating, logits
from edgeprune.workload.batches import passes
from edgeprune.workload.modes import eval_copy

CONSTANT_TOLERANCE = 1e-6  # of the value: what counts as the same at all positions of all samples
SAME_OUTPUT = 1e-4  # of the largest output
PERTURBATION_SEEDS = (1, 2)
MAX_PERTURBED_SAMPLES = 16


@dataclass
class InputRange:
    """Smallest and largest value of every input channel that a layer was given, ``[C]``, over samples, positions and calls."""

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    def add(self, values: torch.Tensor, channel: int) -> None:
        """Widen by values whose dimension ``channel`` is that of the channels."""
        others = [d for d in range(values.ndim) if d != channel % values.ndim]
        low, high = values.amin(others), values.amax(others)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def constants(self) -> torch.Tensor:
        """The value of each channel, NaN where it varies."""
        assert self.low is not None
        assert self.high is not None
        largest = torch.maximum(self.high.abs(), self.low.abs()).max()
        # Values near 0 are rounded as the large ones of the layer are.
        scale = self.high.abs().clamp(min=min(1.0, float(largest)))
        same = self.high - self.low <= CONSTANT_TOLERANCE * scale
        return torch.where(same, (self.low + self.high) / 2, torch.nan)


@dataclass
class _Removal:
    """What can be taken out, and what has to be added to the layers that read it."""

    removed: dict[str, list[int]] = field(default_factory=dict)
    folds: dict[str, dict[int, float]] = field(default_factory=dict)  # layer -> input -> constant
    notes: list[str] = field(default_factory=list)


def remove_dead(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    dead_channels: Mapping[str, tuple[int, ...]],
    example: torch.Tensor,
    x: torch.Tensor,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model without the channels that are already masked, saying the same as before.

    A channel of a group is dead if whatever reads it gets one constant, no matter what the layers that are not masked write: all its
    filters are zero, or a zero depthwise filter stands in between. A constant that is not zero (a batch norm after a zero filter adds
    one) moves into the bias of what reads it, where that is exact: linear layers, and convolutions without zero padding. Elsewhere the
    channel stays, and a note says so.

    Args:
        model: in eval mode; not changed.
        groups: channel groups of this model.
        dead_channels: layer -> output channels whose weights and bias are zero, of :func:`edgeprune.workload.model.dead_channels`.
        example: one input ``[1, ...]``.
        x: real inputs ``[N, ...]``; the result equals the model on them within 1e-4 of the largest output.

    Returns:
        A new model, and one note on what was removed and on each group in which something had to stay.
    """
    candidates = {g.name: found for g in groups if (found := _candidates(model, g, dead_channels))}
    untouched = eval_copy(model)
    if not candidates:
        return untouched, ()
    by_name = {g.name: g for g in groups if g.name in candidates}
    constants = _constants(untouched, by_name, candidates, dead_channels, x)
    plan = _Removal()
    for name, group in by_name.items():
        _plan_group(untouched, group, candidates[name], constants, plan)
    if not plan.removed:
        return untouched, tuple(plan.notes)
    smaller = copy.deepcopy(untouched)
    _fold(smaller, plan.folds)
    smaller = remove_channels(smaller, by_name, plan.removed, example)
    expected, says = logits(untouched, x), logits(smaller, x)
    difference = float((expected - says).abs().max())
    if not difference <= SAME_OUTPUT * float(expected.abs().max()):
        return untouched, (
            f"masked channels stay: without them the outputs would differ by {difference:.2g}",
        )
    count = sum(len(channels) for channels in plan.removed.values())
    note = f"removed {count} masked channels from {len(plan.removed)} groups"
    return smaller, (note, *plan.notes)


def _candidates(
    model: nn.Module, group: ChannelGroup, dead: Mapping[str, tuple[int, ...]]
) -> list[int]:
    """Channels that at least one layer of the group masks."""
    layers = dict(model.named_modules())
    found: set[int] = set()
    for coupling in group.couplings:
        if coupling.side == "out" and isinstance(layers.get(coupling.layer), WEIGHTED):
            masked = set(dead.get(coupling.layer, ()))
            found |= {c for c, own in enumerate(coupling.indices) if own and masked.issuperset(own)}
    return sorted(found)


def _constants(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    candidates: Mapping[str, Sequence[int]],
    dead: Mapping[str, tuple[int, ...]],
    x: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """What each consumer is given on each input channel, ``[C]``; NaN where it depends on the input or on a living layer.

    The living layers that write a candidate are overwritten with random weights and then with their negatives: what stays the same
    under all of that is out of their reach.
    """
    readers = {c.layer for g in groups.values() for c in g.consumers()}
    ranges = {layer: InputRange() for layer in readers}
    record_inputs(model, x, ranges)
    for seed in PERTURBATION_SEEDS:
        for sign in (1.0, -1.0):
            disturbed = _disturbed(model, groups, candidates, dead, seed, sign)
            record_inputs(disturbed, x[:MAX_PERTURBED_SAMPLES], ranges)
    return {layer: found.constants() for layer, found in ranges.items() if found.low is not None}


def _disturbed(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    candidates: Mapping[str, Sequence[int]],
    dead: Mapping[str, tuple[int, ...]],
    seed: int,
    sign: float,
) -> nn.Module:
    disturbed = copy.deepcopy(model)
    layers = dict(disturbed.named_modules())
    generator = torch.Generator().manual_seed(seed)
    for name, group in groups.items():
        for coupling in group.couplings:
            layer = layers.get(coupling.layer)
            if coupling.side == "in" or not isinstance(layer, WEIGHTED):
                continue
            masked = set(dead.get(coupling.layer, ()))
            living = [i for c in candidates[name] for i in coupling.indices[c] if i not in masked]
            for index in living:
                _randomise(layer, index, generator, sign)
    return disturbed


def _randomise(layer: nn.Module, index: int, generator: torch.Generator, sign: float) -> None:
    with torch.no_grad():
        filters = filter_of(layer, index)
        noise = torch.randn(filters.shape, generator=generator).to(filters)
        filters.copy_(sign * noise)
        if isinstance(layer.bias, torch.Tensor):
            layer.bias[index] = sign * float(torch.randn((), generator=generator))


def filter_of(layer: nn.Module, index: int) -> torch.Tensor:
    """A view of the weights that write output channel ``index``."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs = weight.shape[0] // layer.groups, weight.shape[1]
        group = index // outputs
        return weight[group * inputs : (group + 1) * inputs, index % outputs]
    return weight[index]


def record_inputs(model: nn.Module, x: torch.Tensor, ranges: Mapping[str, InputRange]) -> None:
    """Run the model in eval mode and widen the ranges, by layer name, to what the layers are given."""
    layers = dict(model.named_modules())

    def look(layer: nn.Module, args: tuple[torch.Tensor, ...], *, into: InputRange) -> None:
        given = args[0]
        # Channels last, except for convolutions on images and signals.
        into.add(given, 1 if isinstance(layer, _ConvNd) else -1)

    handles = [
        layers[name].register_forward_pre_hook(functools.partial(look, into=into))
        for name, into in ranges.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            for part in passes(x, BATCH):
                model(x[part])
    finally:
        for handle in handles:
            handle.remove()


def _plan_group(
    model: nn.Module,
    group: ChannelGroup,
    candidates: Sequence[int],
    constants: Mapping[str, torch.Tensor],
    plan: _Removal,
) -> None:
    """Add to the plan what of one group can go; at least ``step`` channels stay."""
    layers = dict(model.named_modules())
    removable: list[int] = []
    folds: dict[str, dict[int, float]] = {}
    kept_for: dict[str, int] = {}
    for channel in candidates:
        own: dict[str, dict[int, float]] = {}
        obstacle = ""
        for consumer in group.consumers():
            values = {
                i: float(constants[consumer.layer][i]) if consumer.layer in constants else 0.0
                for i in consumer.indices[channel]
            }
            obstacle = obstacle or _obstacle(layers[consumer.layer], consumer.layer, values)
            own[consumer.layer] = values
        if obstacle:
            kept_for[obstacle] = kept_for.get(obstacle, 0) + 1
            continue
        removable.append(channel)
        for layer, values in own.items():
            folds.setdefault(layer, {}).update(values)
    for obstacle, count in kept_for.items():
        plan.notes.append(f"{group.name}: {count} masked channels stay, because {obstacle}")
    most = (group.channels - group.step) // group.step * group.step
    cut = min(len(removable) // group.step * group.step, most)
    if cut < len(removable):
        left = len(removable) - cut
        plan.notes.append(f"{group.name}: {left} masked channels stay, because a layer needs some")
    for layer, values in folds.items():
        reading = next(c for c in group.consumers() if c.layer == layer)
        gone = {i for channel in removable[:cut] for i in reading.indices[channel]}
        plan.folds.setdefault(layer, {}).update({i: v for i, v in values.items() if i in gone})
    if cut:
        plan.removed[group.name] = removable[:cut]


def _obstacle(layer: nn.Module, name: str, values: Mapping[int, float]) -> str:
    """Why constant inputs of these values cannot move into the layer's bias; empty if they can."""
    if any(v != v for v in values.values()):
        return f"what {name} reads of them still varies"
    if not any(values.values()) or isinstance(layer, nn.Linear):
        return ""
    if isinstance(layer, _ConvTransposeNd):
        return f"{name} is a transposed convolution, whose borders would change"
    assert isinstance(layer, _ConvNd)
    padded = layer.padding == "same" or any(p != 0 for p in layer.padding if not isinstance(p, str))
    pointwise = layer.padding == "same" and all(k == 1 for k in layer.kernel_size)
    if padded and not pointwise and layer.padding_mode == "zeros":
        return f"{name} pads with zeros, and the constant that they carry would not be there"
    return ""


def _fold(model: nn.Module, folds: Mapping[str, Mapping[int, float]]) -> None:
    """Add what constant inputs contribute to the biases; a layer without a bias gets one."""
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, values in folds.items():
            layer = layers[name]
            weights = weights_by_input(layer).double()
            groups, outputs, inputs, _ = weights.shape
            constants = weights.new_zeros(groups * inputs)
            for index, value in values.items():
                constants[index] = value
            if not constants.any():
                continue
            added = (weights.sum(3) * constants.view(groups, 1, inputs)).sum(2).flatten()
            old = (
                layer.bias
                if isinstance(layer.bias, torch.Tensor)
                else torch.zeros(groups * outputs)
            )
            learns = bool(layer.weight.requires_grad)
            layer.bias = nn.Parameter((old.double() + added).to(old), requires_grad=learns)
