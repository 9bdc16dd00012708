"""Residual blocks whose skip is an identity: which branches can be removed as a whole, found in the trace and proven by execution.

A branch is offered only where nothing outside it reads what it computes. Width 0 of the channel groups in it then means "the block is
removed": of the only one (basic blocks, inverted ones, MLPs), or of all of them together (bottlenecks, squeeze-excite). Whatever is not
understood keeps at least its narrowest width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from edgeprune.compress.groups.surgery import ChannelGroup, RemovableBlock

# What autograd calls operations that only move values: zeros stay zeros.
_VIEWS = ("Permute", "Transpose", "View", "UnsafeView", "ReshapeAlias", "T")


def with_blocks(
    groups: Sequence[ChannelGroup], graph: Any, names: Mapping[Any, str]
) -> list[ChannelGroup]:
    """The groups, each with the smallest identity block that it lies in, where there is one.

    A block is left out where one of its groups lies in a smaller one.

    Args:
        groups: channel groups of the model.
        graph: its trace, as :func:`edgeprune.compress.groups.coupling.trace` makes it.
        names: modules and parameters of the traced model -> their names.
    """
    found: dict[str, RemovableBlock] = {}
    for block in sorted(_blocks(graph, names), key=lambda b: len(b.layers)):
        inside = set(block.layers)
        names_inside = tuple(g.name for g in groups if inside.issuperset(g.layers()))
        if found.keys().isdisjoint(names_inside):
            together = names_inside if len(names_inside) > 1 else ()
            found.update(dict.fromkeys(names_inside, replace(block, groups=together)))
    return [replace(g, block=found.get(g.name)) for g in groups]


def _blocks(graph: Any, names: Mapping[Any, str]) -> list[RemovableBlock]:
    """All branches that are added to what they read."""
    found = []
    for add in dict.fromkeys(graph.module2node.values()):
        if not type(add.grad_fn).__name__.startswith("AddBackward") or len(add.inputs) != 2:
            continue
        for skip, operand in itertools.permutations(add.inputs):
            end = _end(operand, names)
            members = _branch(add, skip, operand)
            if end is not None and members:
                layers = [m for m in names if isinstance(m, nn.Module) and m in members]
                found.append(RemovableBlock(tuple(names[m] for m in layers), end))
    return found


def _end(operand: Any, names: Mapping[Any, str]) -> str | None:
    """Name of the layer whose output is added, save for views in between."""
    while (
        operand.module not in names
        and len(operand.inputs) == 1
        and type(operand.grad_fn).__name__.startswith(tuple(f"{v}Backward" for v in _VIEWS))
    ):
        operand = operand.inputs[0]
    return names.get(operand.module)


def _branch(add: Any, skip: Any, operand: Any) -> set[Any]:
    """Modules on every way from ``skip`` to ``operand``; empty where another value comes in or leaves, or where it has a free parameter."""
    seen: set[Any] = set()
    pending = [operand]
    while pending:
        node = pending.pop()
        if node is skip or node in seen:
            continue
        if _is_weight_view(node):
            continue
        if not node.inputs or isinstance(node.module, nn.Parameter):
            return set()
        seen.add(node)
        pending.extend(node.inputs)
    if any(reader is not add and reader not in seen for node in seen for reader in node.outputs):
        return set()
    return {node.module for node in seen}


def _is_weight_view(node: Any) -> bool:
    """Whether a node is the transposed weight of a linear layer: it comes out of nothing, and no free parameter."""
    return not node.inputs and type(node.grad_fn).__name__.startswith("TBackward")
