"""Torch-Pruning as its users call it: an importance, a ratio, and perhaps ``round_to``; version as in constraints.txt."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from edgeprune.compress.groups.find import ChannelGroup
from methods.candidate import Candidate, Method

MOST_REMOVED = 0.95  # of all channels; at 1.0 the library leaves single channels everywhere
ROUNDINGS = (None, 8, 16)
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude-uniform": {"importance": "magnitude", "global_pruning": False},
    "magnitude-global": {"importance": "magnitude", "global_pruning": True},
    "taylor-global": {"importance": "taylor", "global_pruning": True},
    "isomorphic": {"importance": "taylor", "global_pruning": True, "isomorphic": True},
    "random-global": {"importance": "random", "global_pruning": True},
}
IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "random": torch_pruning.importance.RandomImportance,
}


def methods(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    seed: int,
    names: Sequence[str] = tuple(SETTINGS),
) -> Iterator[Method]:
    """Every setting with every rounding.

    Args:
        model: the dense net in eval mode; not changed.
        groups: edgeprune's groups, to read widths off.
        x: training inputs ``[N, ...]``, for gradients.
        y: their classes ``[N]``.
        seed: of the random importance.
        names: which of :data:`SETTINGS`.
    """
    for name in names:
        for rounding in ROUNDINGS:
            label = f"tp-{name}" + ("" if rounding is None else f"-round{rounding}")
            prune = functools.partial(_pruned, model, x, y, name, rounding, seed)

            def at(knob: float, prune: Callable[[float], nn.Module] = prune) -> Candidate:
                pruned = prune(knob)
                return Candidate(widths_of(pruned, groups, model), lambda: copy.deepcopy(pruned))

            yield Method(label, f"tp-{name}", at)


def _pruned(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    name: str,
    rounding: int | None,
    seed: int,
    knob: float,
) -> nn.Module:
    torch.manual_seed(seed)
    pruned = copy.deepcopy(model)
    if knob <= 0:
        return pruned
    settings = dict(SETTINGS[name])
    importance = settings.pop("importance")
    classifier = [m for m in pruned.modules() if isinstance(m, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        x[:1],
        importance=IMPORTANCES[importance](),
        pruning_ratio=min(knob, 1.0) * MOST_REMOVED,
        round_to=rounding,
        ignored_layers=[classifier],
        **settings,
    )
    if importance == "taylor":
        for part, classes in zip(x.split(256), y.split(256), strict=True):
            functional.cross_entropy(pruned(part), classes, reduction="sum").backward()
    pruner.step()
    pruned.zero_grad(set_to_none=True)
    return pruned.eval()


def widths_of(
    pruned: nn.Module, groups: Sequence[ChannelGroup], dense: nn.Module
) -> dict[str, int]:
    """Width of every group, read off the layer that writes it first."""
    after, before = dict(pruned.named_modules()), dict(dense.named_modules())
    return {
        g.name: _outputs(after[g.root]) * g.channels // _outputs(before[g.root]) for g in groups
    }


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]
