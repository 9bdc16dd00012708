"""Which channels have to be removed together, and which must stay: channel groups of a traced model.

The coupling comes from Torch-Pruning's dependency graph. On top of it: names, what kind of group it is, what must stay because the
model's outputs hang on it, and a check by execution (the *mask identity*) that a removal does what it should.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from edgeprune.errors import ModelError
from edgeprune.results import FrozenGroup

MINIMUM_CHANNELS = 8  # a group with fewer channels is not worth a kernel tile
IDENTITY_TOLERANCE = 1e-4  # of the largest output; float32 sums in another order differ by less


@dataclass(frozen=True)
class Coupling:
    """How one layer takes part in a group: the layer's channels ``indices[i]`` go when the group's channel ``i`` goes.

    ``side`` is ``out`` (filters, biases, normalisation) or ``in`` (the weights that read them). Several indices a channel occur where
    channels were flattened (``C * H * W``).
    """

    layer: str
    side: str
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together.

    ``root`` is the layer through which the group is pruned; ``step``: widths must be multiples of it; ``kind`` is ``spine`` where
    several layers write the same channels (residual additions), else ``inner``.
    """

    name: str
    root: str
    channels: int
    step: int
    kind: str
    couplings: tuple[Coupling, ...]

    def layers(self) -> tuple[str, ...]:
        """All layers of the group, producers first, each once."""
        return tuple(dict.fromkeys(c.layer for c in self.couplings))

    def producers(self) -> tuple[str, ...]:
        """Layers whose output channels the group is."""
        return tuple(dict.fromkeys(c.layer for c in self.couplings if c.side == "out"))

    def consumers(self) -> tuple[Coupling, ...]:
        """Layers that read the group's channels."""
        return tuple(c for c in self.couplings if c.side == "in")


def trace(model: nn.Module, example: torch.Tensor) -> tp.DependencyGraph:
    """The dependency graph of a model.

    Args:
        model: in eval mode; its parameters get ``requires_grad`` switched on, nothing else changes.
        example: one input, ``[1, ...]``.

    Raises:
        ModelError: the model cannot be traced; says what went wrong.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return tp.DependencyGraph().build_dependency(model, example_inputs=example)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the model cannot be traced: {first[0][:300]}",
            hint="its forward must run on one input tensor without data-dependent branches",
        ) from error


def find_groups(
    model: nn.Module, example: torch.Tensor
) -> tuple[tuple[ChannelGroup, ...], tuple[FrozenGroup, ...]]:
    """All prunable channel groups, and everything that stays with the reason.

    Args:
        model: in eval mode; not changed.
        example: one real input, ``[1, ...]``.

    Raises:
        ModelError: the model cannot be traced, or nothing in it can be pruned.
    """
    model = copy.deepcopy(model).eval()
    graph = trace(model, example)
    names = {module: name for name, module in model.named_modules()}
    groups: list[ChannelGroup] = []
    frozen: list[FrozenGroup] = []
    for found in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Conv1d, nn.Linear]):
        group = _describe(graph, found, names)
        reason = _reason_to_keep(graph, found, group)
        if reason:
            frozen.append(FrozenGroup(layers=group.producers() or group.layers(), reason=reason))
        else:
            groups.append(group)
    groups, refused = _keep_proven(model, groups, example)
    frozen.extend(refused)
    if not groups:
        raise ModelError(
            "no channel of the model can be removed: "
            + ("; ".join(f"{f.layers[0]}: {f.reason}" for f in frozen[:3]) or "no convolutions")
        )
    return tuple(groups), tuple(frozen)


def _describe(graph: Any, found: Any, names: Mapping[nn.Module, str]) -> ChannelGroup:
    merged: dict[tuple[str, str], dict[int, list[int]]] = {}
    step = 1
    for item in found.items:
        module = item.dep.target.module
        if module not in names or not isinstance(module, nn.Module):
            continue
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels:
            step = max(step, module.groups)
        if isinstance(module, nn.GroupNorm):
            step = max(step, module.num_groups)
        slot = merged.setdefault((names[module], side), {})
        for position, (own, root) in enumerate(
            zip(item.idxs, item.root_idxs or range(len(item.idxs)), strict=False)
        ):
            slot.setdefault(int(root if root is not None else position), []).append(int(own))
    root_module = found[0].dep.target.module
    channels = len(found[0].idxs)
    couplings = tuple(
        Coupling(layer, side, tuple(tuple(at.get(i, ())) for i in range(channels)))
        for (layer, side), at in merged.items()
    )
    writers = [
        c
        for c in couplings
        if c.side == "out"
        and isinstance(_module(names, c.layer), nn.Conv2d | nn.Conv1d | nn.Linear)
        and not _is_depthwise(_module(names, c.layer))
    ]
    name = names[root_module]
    kind = "spine" if len(writers) > 1 else "inner"
    return ChannelGroup(name, name, channels, step, kind, couplings)


def _module(names: Mapping[nn.Module, str], layer: str) -> nn.Module:
    return next(module for module, name in names.items() if name == layer)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _reason_to_keep(graph: Any, found: Any, group: ChannelGroup) -> str | None:
    for item in found.items:
        node = graph.module2node.get(item.dep.target.module)
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if node is not None and out and not node.outputs:
            return "its channels are the model's outputs"
    if not group.consumers():
        return "nothing reads its channels through weights"
    if group.channels < MINIMUM_CHANNELS:
        return (
            f"it has only {group.channels} channels; fewer than {MINIMUM_CHANNELS} are kept whole"
        )
    if group.channels <= group.step:
        return f"its {group.channels} channels form one block of {group.step}"
    return None


def _keep_proven(
    model: nn.Module, groups: Sequence[ChannelGroup], example: torch.Tensor
) -> tuple[list[ChannelGroup], list[FrozenGroup]]:
    """Check the mask identity for all groups at once, and one by one only if that fails."""
    if not groups or _identity_holds(model, groups, example) is None:
        return list(groups), []
    kept: list[ChannelGroup] = []
    refused: list[FrozenGroup] = []
    for group in groups:
        problem = _identity_holds(model, [group], example)
        if problem is None:
            kept.append(group)
        else:
            refused.append(FrozenGroup(layers=group.producers(), reason=problem))
    return kept, refused


def _identity_holds(
    model: nn.Module, groups: Iterable[ChannelGroup], example: torch.Tensor
) -> str | None:
    """``None`` if removing channels equals zeroing what reads them; else what went wrong."""
    removed = {
        g.name: tuple(range(g.channels - g.step * max(1, g.channels // g.step // 4), g.channels))
        for g in groups
    }
    chosen = {g.name: g for g in groups}
    try:
        with torch.no_grad():
            expected = zero_channels(model, chosen, removed)(example)
            found = remove_channels(model, chosen, removed, example)(example)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"removing channels breaks the model ({first[0][:120]})"
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return "removing channels changes the shape of the output"
    error_now = float((found - expected).abs().max())
    if not error_now <= IDENTITY_TOLERANCE * max(1.0, float(expected.abs().max())):
        return f"removing channels is not the same as zeroing them (differs by {error_now:.2g})"
    return None


def zero_channels(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    removed: Mapping[str, Sequence[int]],
) -> nn.Module:
    """A copy of the model in which nothing reads the removed channels: their input weights are zero."""
    masked = copy.deepcopy(model).eval()
    layers = dict(masked.named_modules())
    with torch.no_grad():
        for name, channels in removed.items():
            for consumer in groups[name].consumers():
                weight = layers[consumer.layer].weight
                if not isinstance(weight, torch.Tensor):
                    continue
                for channel in channels:
                    for index in consumer.indices[channel]:
                        weight[:, index] = 0
    return masked


def remove_channels(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    example: torch.Tensor,
) -> nn.Module:
    """A copy of the model without the removed channels of each group.

    Args:
        model: not changed.
        groups: by name.
        removed: group name -> channel indices to remove.
        example: one input, for the trace.

    Raises:
        ModelError: a group cannot be pruned in this model.
    """
    smaller = copy.deepcopy(model).eval()
    graph = trace(smaller, example)
    layers = dict(smaller.named_modules())
    for name, channels in removed.items():
        if not channels:
            continue
        root = layers[groups[name].root]
        prune = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else None
        if prune is None:
            depthwise = _is_depthwise(root)
            prune = (
                tp.prune_depthwise_conv_out_channels if depthwise else tp.prune_conv_out_channels
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.get_pruning_group(root, prune, idxs=sorted(int(c) for c in channels)).prune()
    for parameter in smaller.parameters():
        parameter.grad = None
    return smaller
