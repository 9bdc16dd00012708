"""Which channels have to be removed together, and which must stay: channel groups of a model, each proven by execution.

:mod:`~edgeprune.compress.groups.coupling` says which channels hang together. Here they get names, what must stay is told apart with the
reason, and every group is checked by the *mask identity*: removing channels has to equal zeroing all weights that read them. What fails the
check, for whatever reason, stays whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.compress.groups.blocks import with_blocks
from edgeprune.compress.groups.coupling import (
    SLICEABLE,
    WEIGHTED,
    Family,
    families,
    moves_whole_groups,
    trace,
)
from edgeprune.compress.groups.surgery import ChannelGroup, Coupling, remove_channels, zero_channels
from edgeprune.errors import ModelError
from edgeprune.records.plan import FrozenGroup
from edgeprune.workload.modes import eval_copy

__all__ = [
    "ChannelGroup",
    "Coupling",
    "find_groups",
    "mask_identity",
    "remove_channels",
    "trace",
    "zero_channels",
]

MINIMUM_CHANNELS = 8  # a group with fewer channels is not worth a kernel tile
IDENTITY_TOLERANCE = 1e-4  # of what zeroing changes; a wrong removal differs by a good part of that
# Of the largest output: what sums in another order differ by, where zeroing changes next to nothing.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-5}
PROOF_SEED = 20261123

Asked = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # inputs, and what the model says about them


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
    model = eval_copy(model)
    traced = copy.deepcopy(model)  # it may keep tensors of the trace, and cannot be copied then
    graph = trace(traced, example)
    names: dict[Any, str] = {module: name for name, module in traced.named_modules()}
    names.update({parameter: name for name, parameter in traced.named_parameters()})
    groups: list[ChannelGroup] = []
    frozen: list[FrozenGroup] = []
    for family in families(traced, graph):
        group = _describe(family, names)
        reason = _reason_to_keep(family, group)
        if reason:
            frozen.append(FrozenGroup(layers=_writers(family, names), reason=reason))
        else:
            groups.append(group)
    asked = _asked(model, example)
    groups, refused = _keep_proven(model, groups, asked)
    groups = _proven_blocks(model, with_blocks(groups, graph, names), asked)
    frozen.extend(refused)
    frozen.extend(_unseen(model, groups, frozen))
    if not groups:
        reasons = "; ".join(f"{f.layers[0]}: {f.reason}" for f in frozen[:3])
        raise ModelError(
            f"no channel of the model can be removed: {reasons or 'it has no convolution or linear layer'}"
        )
    return tuple(groups), tuple(frozen)


def _describe(family: Family, names: Mapping[Any, str]) -> ChannelGroup:
    name = names[family.root]
    spaces = dict.fromkeys(space for found in family.classes for space in found)
    couplings = tuple(
        Coupling(
            names[node.module], side, tuple(tuple(c.get((node, side), ())) for c in family.classes)
        )
        for node, side in spaces
        if _takes_part(node.module, side) and node.module in names
    )
    return ChannelGroup(name, name, len(family.classes), 1, _kind(family), couplings)


def _takes_part(module: Any, side: str) -> bool:
    # Where whole groups move, the outputs say it all: the inputs of the same layer go with them.
    single = isinstance(module, nn.PReLU) and module.num_parameters == 1
    return (
        isinstance(module, SLICEABLE)
        and not single
        and not (side == "in" and moves_whole_groups(module))
    )


def _writes(module: Any) -> bool:
    return isinstance(module, WEIGHTED) and not moves_whole_groups(module)


def _writers(family: Family, names: Mapping[Any, str]) -> tuple[str, ...]:
    sides = {space for found in family.classes for space in found}
    found = [
        n.module for n in family.nodes if (n, "out") in sides and isinstance(n.module, WEIGHTED)
    ]
    return tuple(dict.fromkeys(names[m] for m in found if m in names)) or (names[family.root],)


def _kind(family: Family) -> str:
    """``spine`` if several layers write the channels and their outputs are added up; a gate multiplies, and makes no spine."""
    members = set(family.nodes)
    sides = {space for found in family.classes for space in found}
    writers = sum((n, "out") in sides and _writes(n.module) for n in family.nodes)
    added = any(
        type(n.grad_fn).__name__.startswith(("AddBackward", "SubBackward"))
        and len({i for i in n.inputs if i in members}) > 1
        for n in family.nodes
    )
    return "spine" if writers > 1 and added else "inner"


def _reason_to_keep(family: Family, group: ChannelGroup) -> str | None:
    width = _outputs(family.root)
    if width < MINIMUM_CHANNELS and (family.problem is None or width == 1):
        return f"it has only {width} channels; fewer than {MINIMUM_CHANNELS} are kept whole"
    if family.problem:
        return family.problem
    if not group.consumers():
        return "nothing reads its channels through weights"
    if group.channels < 2:
        return f"its {width} channels form one block, which only goes as a whole"
    return None


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def _unseen(
    model: nn.Module, groups: Sequence[ChannelGroup], frozen: Sequence[FrozenGroup]
) -> list[FrozenGroup]:
    """Layers with weights that no group and no reason names yet."""
    named = {layer for g in groups for layer in g.layers()}
    named |= {layer for f in frozen for layer in f.layers}
    missing = tuple(
        name for name, m in model.named_modules() if isinstance(m, WEIGHTED) and name not in named
    )
    reason = "the model's output does not depend on it in a way that can be traced"
    return [FrozenGroup(layers=missing, reason=reason)] if missing else []


def _keep_proven(
    model: nn.Module, groups: Sequence[ChannelGroup], asked: Asked
) -> tuple[list[ChannelGroup], list[FrozenGroup]]:
    """Check the mask identity for all groups at once; if that fails, add them one by one and keep what stays proven together.

    Halves of the groups would not do: two that meet in a channel shuffle are wrong alone and may be right together.
    """
    if not groups or _problem_together(model, groups, asked) is None:
        return list(groups), []
    kept: list[ChannelGroup] = []
    refused: list[FrozenGroup] = []
    for group in groups:
        problem = _problem_together(model, [group], asked)
        if problem is None and kept:
            problem = _problem_together(model, [*kept, group], asked)
        if problem is None:
            kept.append(group)
        else:
            refused.append(FrozenGroup(layers=group.producers(), reason=problem))
    return kept, refused


def _problem_together(model: nn.Module, groups: Sequence[ChannelGroup], asked: Asked) -> str | None:
    """``None`` if two removals keep the mask identity, on the example and on noise: a random one, and the last quarter or a bit more.

    What the latter leaves is odd: a width that the code takes for granted shows then, as in ``x[:, ::2]`` or a shortcut padded with zeros.
    """
    generator = np.random.default_rng(PROOF_SEED)
    odd = {g.name: (g.channels - max(1, g.channels // 4) - 1) // 2 * 2 + 1 for g in groups}
    last = {g.name: range(odd[g.name], g.channels) for g in groups}
    drawn = {
        g.name: generator.permutation(g.channels)[: int(generator.integers(1, g.channels))].tolist()
        for g in groups
    }
    for removed, (x, dense) in zip((last, drawn), asked, strict=True):
        problem = mask_identity(model, groups, removed, x, dense)
        if problem is not None:
            return problem
    return None


def _proven_blocks(
    model: nn.Module, groups: Sequence[ChannelGroup], asked: Asked
) -> list[ChannelGroup]:
    """The groups, without their block where removing that is not the same as adding zeros."""
    by_name = {g.name: g for g in groups}
    refused: set[str] = set()
    for together in dict.fromkeys(g.removed_with() for g in groups if g.block is not None):
        inside = [by_name[name] for name in together]
        everything = {g.name: range(g.channels) for g in inside}
        if any(mask_identity(model, inside, everything, x, dense) for x, dense in asked):
            refused.update(together)
    return [dataclasses.replace(g, block=None) if g.name in refused else g for g in groups]


def _asked(model: nn.Module, example: torch.Tensor) -> Asked:
    """The example, and noise in its shape (the example again where it holds whole numbers), each with what the model says."""
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(PROOF_SEED))
    inputs = (example, noise.to(example) if example.is_floating_point() else example)
    # A copy, because it may keep tensors of these widths.
    speaker = copy.deepcopy(model)
    with torch.no_grad():
        return tuple((x, speaker(x)) for x in inputs)


def mask_identity(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    x: torch.Tensor,
    dense: torch.Tensor | None = None,
) -> str | None:
    """``None`` if removing channels equals zeroing what reads them; else what went wrong.

    How far the two may differ goes by what zeroing changes, not by the size of the outputs, which may be small probabilities. Where
    float32 leaves it open, float64 decides, unless the model does not run in it.

    Args:
        model: in eval mode; not changed.
        groups: at least those that ``removed`` names.
        removed: group name -> channels of the group.
        x: inputs ``[N, ...]``.
        dense: what the model says about them, where that is known.
    """
    chosen = {g.name: g for g in groups}
    try:
        answers = _answers(model, chosen, removed, x, dense)
    except ModelError as error:
        return error.message[:160]
    if not _differ(answers, rounding=0):
        return None
    exact = copy.deepcopy(model)
    nn.Module.double(exact)
    # The forward may make tensors of float32, say: the answers of the model as it is have to do then.
    with contextlib.suppress(Exception):
        answers = _answers(exact, chosen, removed, x.double() if x.is_floating_point() else x)
    return _differ(answers, rounding=ROUNDING.get(answers[0].dtype, ROUNDING[torch.float32]))


def _answers(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    x: torch.Tensor,
    dense: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model says, what it says when nothing reads the channels, and what it says without them.

    Raises:
        ModelError: it does not run without them, or gives no tensors of one shape.
    """
    with torch.no_grad():
        dense = copy.deepcopy(model)(x) if dense is None else dense
        zeroed = zero_channels(model, groups, removed)(x)
        found = remove_channels(model, groups, removed, x)(x)
    for answer in (dense, zeroed, found):
        if not isinstance(answer, torch.Tensor):
            raise ModelError(f"the model returns {type(answer).__name__}, not a tensor")
        if answer.shape != dense.shape:
            raise ModelError("removing channels changes the shape of the output")
    return dense, zeroed, found


def _differ(
    answers: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *, rounding: float
) -> str | None:
    """What is wrong with answers as :func:`_answers` gives them, if anything; ``rounding`` is a share of the largest."""
    dense, zeroed, found = answers
    changed, difference = (float((a - zeroed).abs().max()) for a in (dense, found))
    if difference <= IDENTITY_TOLERANCE * changed + rounding * float(zeroed.abs().max()):
        return None
    return f"removing channels is not the same as zeroing them (differs by {difference:.2g} where that changes {changed:.2g})"
