"""Taking channels out of a model: layer by layer, from the indices that a group states; no trace, so no order matters."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgeprune.compress.groups.coupling import channel_dim, moves_whole_groups
from edgeprune.errors import ModelError
from edgeprune.workload.modes import eval_copy


@dataclass(frozen=True)
class Coupling:
    """How one layer takes part in a group: the layer's channels ``indices[i]`` go when the group's channel ``i`` goes.

    ``side`` is ``out`` (filters, biases, normalisation, free parameters) or ``in`` (the weights that read them). Several indices a
    channel occur where channels were flattened (``C * H * W``) or are tied (grouped convolution, gated halves).
    """

    layer: str
    side: str
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RemovableBlock:
    """The branch of a residual block ``y = x + branch(x)`` whose skip hands ``x`` on as it is: without the branch, ``y = x``.

    ``layers`` are all its layers that have weights or statistics, in the order of the model; ``end`` is the one whose output is added.
    ``groups`` names the channel groups that lie in the branch where there are several: they lose all their channels together or not at all.
    """

    layers: tuple[str, ...]
    end: str
    groups: tuple[str, ...] = ()


class Removed(nn.Module):
    """Stands where a layer of a removed block was: zeros in the shape of what comes in, so that the block adds nothing."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """Zeros like ``x``; a tensor of its own, which may be written to in place."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together.

    ``channels`` counts what can go on its own: where channels are tied, each of the group's channels is several of the layer's.
    ``root`` is the first layer that writes them; ``step``: widths must be multiples of it; ``kind`` is ``spine`` where several layers
    write the same channels (residual additions), else ``inner``. ``block`` is the residual branch that the group lies in, where removing
    all channels of all groups in it means to remove that branch; ``None`` where at least one channel has to stay.
    """

    name: str
    root: str
    channels: int
    step: int
    kind: str
    couplings: tuple[Coupling, ...]
    block: RemovableBlock | None = None

    def layers(self) -> tuple[str, ...]:
        """All layers of the group, producers first, each once."""
        ordered = sorted(self.couplings, key=lambda c: c.side != "out")
        return tuple(dict.fromkeys(c.layer for c in ordered))

    def producers(self) -> tuple[str, ...]:
        """Layers whose output channels the group is."""
        return tuple(dict.fromkeys(c.layer for c in self.couplings if c.side == "out"))

    def removed_with(self) -> tuple[str, ...]:
        """Names of the groups that lose all their channels when this one does; itself among them."""
        return (self.block.groups if self.block else ()) or (self.name,)

    def consumers(self) -> tuple[Coupling, ...]:
        """Layers that read the group's channels."""
        return tuple(c for c in self.couplings if c.side == "in")


def narrowed_groups(
    groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> tuple[ChannelGroup, ...]:
    """The same groups, by the same names, in the model that :func:`remove_channels` leaves; those without a channel are left out.

    Args:
        groups: of the model before.
        kept: group name -> channels that stayed, ascending: channel ``kept[i]`` of a group becomes its channel ``i``.
    """
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    for group in groups:
        for channel in set(range(group.channels)) - set(kept[group.name]):
            for coupling in group.couplings:
                gone[coupling.layer, coupling.side].update(coupling.indices[channel])
    ordered = {place: sorted(indices) for place, indices in gone.items()}
    return tuple(
        replace(
            group,
            channels=len(kept[group.name]),
            couplings=tuple(
                _renumbered(c, kept[group.name], ordered.get((c.layer, c.side), []))
                for c in group.couplings
            ),
        )
        for group in groups
        if kept[group.name]
    )


def _renumbered(coupling: Coupling, kept: Sequence[int], gone: list[int]) -> Coupling:
    indices = (coupling.indices[channel] for channel in kept)
    return replace(
        coupling,
        indices=tuple(tuple(i - bisect.bisect_left(gone, i) for i in own) for own in indices),
    )


def weights_by_input(layer: nn.Module) -> torch.Tensor:
    """The weights that read each input channel, as a view ``[groups, outputs of a group, inputs of a group, taps]``.

    Input channel ``i`` is at ``[i // k, :, i % k]`` with ``k`` inputs a group; a write to the view changes the layer.

    Raises:
        ModelError: the layer is neither a convolution nor linear.
    """
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, nn.Linear):
        return weight.view(1, *weight.shape, 1)
    if not isinstance(layer, _ConvNd):
        raise ModelError(
            f"only convolutions and linear layers read channels, not {type(layer).__name__}"
        )
    if isinstance(layer, _ConvTransposeNd):  # stored [inputs, outputs of a group, ...]
        split = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel())
        return split.transpose(1, 2)
    return weight.view(layer.groups, -1, weight.shape[1], weight[0, 0].numel())


def zero_channels(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    removed: Mapping[str, Sequence[int]],
) -> nn.Module:
    """A copy of the model in which nothing reads the removed channels: their input weights are zero.

    Where all channels of all groups of a block are removed, what the block's branch adds is zero instead.

    Args:
        model: not changed.
        groups: by name.
        removed: group name -> channels of the group.
    """
    masked = eval_copy(model)
    layers = dict(masked.named_modules())
    with torch.no_grad():
        for name, channels in removed.items():
            if block := _whole_block(name, groups, removed):
                layers[block.end].register_forward_hook(_silence)
                continue
            for consumer in groups[name].consumers():
                weights = weights_by_input(layers[consumer.layer])
                each = weights.shape[2]
                for index in (i for c in channels for i in consumer.indices[int(c)]):
                    weights[index // each, :, index % each] = 0
    return masked


def _silence(layer: nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def _whole_block(
    name: str, groups: Mapping[str, ChannelGroup], removed: Mapping[str, Sequence[int]]
) -> RemovableBlock | None:
    """The block of a group, if it goes with these channels."""
    return None if _left_over(name, groups, removed) else groups[name].block


def _left_over(
    name: str, groups: Mapping[str, ChannelGroup], removed: Mapping[str, Sequence[int]]
) -> list[str]:
    """Groups of the same block, or only this one where it has none, that keep a channel."""
    return [
        n
        for n in groups[name].removed_with()
        if n not in groups or len({int(c) for c in removed.get(n, ())}) < groups[n].channels
    ]


def remove_block(model: nn.Module, layers: Sequence[str]) -> None:
    """Put :class:`Removed` in the place of these layers, in place.

    Raises:
        AttributeError: the model has no such layer.
    """
    for path in layers:
        parent, _, name = path.rpartition(".")
        removed = Removed()
        removed.training = model.get_submodule(path).training
        setattr(model.get_submodule(parent), name, removed)


def remove_channels(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    example: torch.Tensor,
) -> nn.Module:
    """A copy of the model without the removed channels of each group.

    Args:
        model: the one that the groups were found in (or one of the same shapes); not changed.
        groups: by name, all that the model has.
        removed: group name -> channels of the group to remove; any order.
        example: one input ``[1, ...]``; the result is run on it once.

    Raises:
        ModelError: a channel does not exist, none would be left (and the group lies in no block that goes as a whole), or the result does
            not run.
    """
    smaller = eval_copy(model)
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    blocks: dict[str, None] = {}
    for name, channels in removed.items():
        group = groups[name]
        chosen = {int(c) for c in channels}
        if block := _whole_block(name, groups, removed):
            blocks.update(dict.fromkeys(block.layers))
            continue
        if group.block is not None and len(chosen) == group.channels:
            left = ", ".join(_left_over(name, groups, removed))
            raise ModelError(
                f"{name!r} can lose all its channels only together with {left}: they lie in one residual block"
            )
        if not chosen <= set(range(group.channels)) or len(chosen) == group.channels:
            raise ModelError(
                f"channels to remove from {name!r} must be some of its {group.channels}, but are {sorted(chosen)[:8]}"
            )
        for coupling in group.couplings:
            gone[coupling.layer, coupling.side] |= {i for c in chosen for i in coupling.indices[c]}
    remove_block(smaller, tuple(blocks))
    layers = dict(smaller.named_modules())
    # A convolution that lost inputs, now or earlier, may look as if it moved whole groups; one that does has no inputs of its own.
    reading = {c.layer for group in groups.values() for c in group.consumers()}
    whole = {n for n, layer in layers.items() if moves_whole_groups(layer) and n not in reading}
    for (name, side), indices in gone.items():
        if indices and name in layers and name not in blocks:
            _cut(layers[name], side, indices, whole_groups=name in whole)
        elif indices and name not in blocks:
            _cut_parameter(smaller, name, indices)
    try:
        with torch.no_grad():
            smaller(example)
    except Exception as error:  # the model's forward may raise anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"removing channels breaks the model: {first[0][:200]}") from error
    return smaller


def _cut(layer: nn.Module, side: str, indices: set[int], *, whole_groups: bool) -> None:
    if isinstance(layer, _ConvNd):
        if whole_groups:
            _cut_conv_groups(layer, indices)
        elif side == "out":
            _cut_conv_outputs(layer, indices)
        else:
            _cut_conv_inputs(layer, indices)
    elif isinstance(layer, nn.Linear):
        width = layer.out_features if side == "out" else layer.in_features
        left = _left(width, indices)
        _select(layer, "weight", 0 if side == "out" else 1, left)
        if side == "out":
            _select(layer, "bias", 0, left)
            layer.out_features = len(left)
        else:
            layer.in_features = len(left)
    elif isinstance(layer, nn.PReLU):
        left = _left(layer.num_parameters, indices)
        _select(layer, "weight", 0, left)
        layer.num_parameters = len(left)
    else:
        _cut_norm(layer, indices)


def _cut_norm(layer: nn.Module, indices: set[int]) -> None:
    if isinstance(layer, nn.GroupNorm):
        each = layer.num_channels // layer.num_groups
        left = _left(layer.num_channels, indices)
        layer.num_channels, layer.num_groups = len(left), len(left) // each
    else:
        assert isinstance(layer, _NormBase)
        left = _left(layer.num_features, indices)
        layer.num_features = len(left)
    for name in ("weight", "bias", "running_mean", "running_var"):
        _select(layer, name, 0, left)


def _cut_conv_outputs(layer: _ConvNd, indices: set[int]) -> None:
    left = _left(layer.out_channels, indices)
    if isinstance(layer, _ConvTransposeNd):
        # All groups give up the same positions, so the first group's positions stand for all.
        each = layer.out_channels // layer.groups
        _select(layer, "weight", 1, [i for i in left if i < each])
    else:
        _select(layer, "weight", 0, left)
    _select(layer, "bias", 0, left)
    layer.out_channels = len(left)


def _cut_conv_inputs(layer: _ConvNd, indices: set[int]) -> None:
    left = _left(layer.in_channels, indices)
    if isinstance(layer, _ConvTransposeNd):
        _select(layer, "weight", 0, left)
    else:
        each = layer.in_channels // layer.groups
        _select(layer, "weight", 1, [i for i in left if i < each])
    layer.in_channels = len(left)


def _cut_conv_groups(layer: _ConvNd, indices: set[int]) -> None:
    """Take whole groups, inputs and outputs, out of a grouped convolution; ``indices`` are its outputs."""
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    left = _left(layer.out_channels, indices)
    groups = sorted({i // outputs for i in left})
    if isinstance(layer, _ConvTransposeNd):
        _select(layer, "weight", 0, [g * inputs + i for g in groups for i in range(inputs)])
    else:
        _select(layer, "weight", 0, left)
    _select(layer, "bias", 0, left)
    layer.out_channels, layer.in_channels = len(left), len(groups) * inputs
    layer.groups = len(groups)


def _cut_parameter(model: nn.Module, path: str, indices: set[int]) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    value = owner.get_parameter(name)
    dim = channel_dim(value)
    _select(owner, name, dim, _left(int(value.shape[dim]), indices))


def _left(width: int, gone: set[int]) -> list[int]:
    return [i for i in range(width) if i not in gone]


def _select(owner: nn.Module, name: str, dim: int, left: list[int]) -> None:
    """Keep only some entries of a parameter or buffer, where the layer has it."""
    old = getattr(owner, name, None)
    if not isinstance(old, torch.Tensor):
        return
    chosen = old.detach().index_select(dim, torch.tensor(left, device=old.device)).clone()
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(chosen, requires_grad=old.requires_grad))
    else:
        setattr(owner, name, chosen)


def cut(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: Mapping[str, Sequence[int]],
    example: torch.Tensor,
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """A copy of the model with these channels alone, and for every layer of it the outputs that it kept, in order.

    Args:
        model: not changed.
        groups: the groups of the model.
        kept: group name -> channels that stay; groups not named keep all.
        example: one input, for a trial run.
    """
    removed = {
        g.name: sorted(set(range(g.channels)) - set(kept[g.name])) for g in groups if g.name in kept
    }
    smaller = remove_channels(model, {g.name: g for g in groups}, removed, example)
    layers = {name for name, _ in smaller.named_modules()}
    return smaller, {n: own for n, own in kept_outputs(groups, kept).items() if n in layers}


def kept_outputs(
    groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Output channels that each layer keeps, in order, given the channels that each group keeps. Groups not named keep all."""
    return {
        coupling.layer: tuple(sorted(i for c in kept[g.name] for i in coupling.indices[c]))
        for g in groups
        if g.name in kept
        for coupling in g.couplings
        if coupling.side == "out"
    }
