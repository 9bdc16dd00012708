"""How channel indices change where one operation hands its output to the next: flatten, concatenation and split.

The shapes come from autograd, which keeps those of every operation's outputs. An operation's channels are counted in its whole output:
after joining for a concatenation, before parting for a split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch_pruning import ops

LOST = -1  # where a channel goes that cannot be followed
Pairs = tuple[np.ndarray, np.ndarray]  # channels here and there: int64, of the same length


@dataclass(frozen=True)
class EdgeView:
    """The channels of one operation as the next one counts them.

    Of the source, channels ``[start, stop)`` are handed over; there each is ``spread`` channels (a flatten), or ``gathered`` of them are
    one (the reverse); ``shift`` is where the first one lands. ``spread`` 0: nobody knows.
    """

    start: int = 0
    stop: float = math.inf
    spread: int = 1
    gathered: int = 1
    shift: int = 0

    def forward(self, indices: np.ndarray) -> Pairs:
        """Of these channels of the source, ``int64 [N]``, those that are handed over, with each that they become at the target."""
        here = indices[(indices >= self.start) & (indices < self.stop)]
        if not self.spread:
            return here, np.full_like(here, LOST)
        first = (here - self.start) // self.gathered * self.spread + self.shift
        return np.repeat(here, self.spread), (first[:, None] + np.arange(self.spread)).ravel()

    def backward(self, indices: np.ndarray) -> Pairs:
        """Of these channels of the target, ``int64 [N]``, those that come from the source, with each that they were there."""
        if not self.spread:
            return indices, np.full_like(indices, LOST)
        first = (indices - self.shift) // self.spread * self.gathered + self.start
        there = first[:, None] + np.arange(self.gathered)
        is_inside = (there >= self.start) & (there < self.stop)
        return np.broadcast_to(indices[:, None], there.shape)[is_inside], there[is_inside]


def edge_views(source: Any, target: Any) -> list[EdgeView]:
    """One view for each time the target reads the source. Both are nodes of the graph."""
    functions = getattr(target.grad_fn, "next_functions", ())
    places = [(k, part) for k, (f, part) in enumerate(functions) if f is source.grad_fn]
    if not places:  # a module that is used several times has one node, but many places
        return (
            [EdgeView()]
            if not split_sizes(source) and target.type != ops.OPTYPE.CONCAT
            else [EdgeView(spread=0)]
        )
    return [_view(source, target, place, part) for place, part in places]


def _view(source: Any, target: Any, place: int, part: int) -> EdgeView:
    start, stop, shift = 0, math.inf, 0
    sizes = split_sizes(source)
    if sizes:
        start = sum(sizes[:part])
        stop = start + sizes[part]
    if target.type == ops.OPTYPE.CONCAT:
        offsets = _concat_offsets(target)
        if offsets is not None:
            shift = offsets[place]
            stop = min(stop, start + offsets[place + 1] - offsets[place])
    spread, gathered = _reshape(target) if target.type == ops.OPTYPE.RESHAPE else (1, 1)
    return EdgeView(start, stop, spread, gathered, shift)


def _output_shape(function: Any, part: int = 0) -> tuple[int, ...]:
    """Shape of an output of the operation that autograd would differentiate by ``function``."""
    return tuple(int(size) for size in function._input_metadata[part].shape)


def _is_channel_dim(dim: int, rank: int) -> bool:
    """Whether a dimension (which autograd may store as an unsigned number) is the channels'.

    Three dimensions are ``[N, C, L]`` or ``[N, tokens, C]``; a wrong guess shows when the group is proven by execution.
    """
    dim = dim - 2**64 if dim >= 2**63 else dim
    return dim % rank in ((1, 2) if rank == 3 else (1,))


def split_sizes(node: Any) -> tuple[int, ...]:
    """Channels in each part of a split along the channels; empty for anything else."""
    if node.type != ops.OPTYPE.SPLIT or not hasattr(node.grad_fn, "_saved_dim"):
        return ()
    shape, dim = node.grad_fn._saved_self_sym_sizes, node.grad_fn._saved_dim
    if not _is_channel_dim(dim, len(shape)):
        return ()
    dim = (dim - 2**64 if dim >= 2**63 else dim) % len(shape)
    return tuple(
        _output_shape(node.grad_fn, k)[dim] for k in range(len(node.grad_fn._input_metadata))
    )


def equal_parts(node: Any) -> int:
    """Channels in each part of a split into equal parts of a number, as ``chunk`` makes them; 0 for anything else.

    A split at sizes that are written into the code cannot change its sizes, so nothing is tied there.
    """
    sizes = split_sizes(node)
    return sizes[0] if len(set(sizes)) == 1 and hasattr(node.grad_fn, "_saved_split_size") else 0


def _concat_offsets(node: Any) -> list[int] | None:
    """Where each input of a concatenation along the channels starts, and the end; ``None`` along another dimension."""
    shape = _output_shape(node.grad_fn)
    dim = node.grad_fn._saved_dim
    if not _is_channel_dim(dim, len(shape)):
        return None
    dim = (dim - 2**64 if dim >= 2**63 else dim) % len(shape)
    sizes = [_output_shape(f, part)[dim] if f else None for f, part in node.grad_fn.next_functions]
    known = sum(size for size in sizes if size is not None)
    blanks = sizes.count(None)
    offsets = [0]
    for size in sizes:
        # An input of the model has no history; one such size is what the others leave over.
        offsets.append(offsets[-1] + ((shape[dim] - known) // blanks if size is None else size))
    return offsets


def _reshape(node: Any) -> tuple[int, int]:
    """(channels that each becomes, channels that become one) of a view or reshape; ``(0, 0)`` if channels are torn apart."""
    before = tuple(int(n) for n in getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    after = _output_shape(node.grad_fn)
    if len(before) < 2 or len(after) < 2:
        return 0, 0
    if before[:2] == after[:2] or before[-1] == after[-1]:
        return 1, 1
    if len(after) == 2 and after[1] == math.prod(before[1:]):
        return math.prod(before[2:]), 1
    if len(before) == 2 and before[1] == math.prod(after[1:]):
        return 1, math.prod(after[2:])
    return 0, 0
