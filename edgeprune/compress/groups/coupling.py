"""Which channels of which layers are one and the same: classes of coupled channels, read off Torch-Pruning's dependency graph.

Torch-Pruning says which operation hands its channels to which; :mod:`~edgeprune.compress.groups.index_maps` says how indices change on the
way. Here every channel of every operation is a point, every hand-over joins two points, and joined points are one class: they have to go
together. On top of the graph come the ties it does not know: grouped convolutions, group norm, equal splits and broadcasting.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping

from edgeprune.compress.groups.index_maps import LOST, Pairs, edge_views, equal_parts, split_sizes
from edgeprune.errors import ModelError
from edgeprune.workload.modes import trainable

WEIGHTED = (_ConvNd, nn.Linear)
SLICEABLE = (*WEIGHTED, _NormBase, nn.GroupNorm, nn.PReLU, nn.Parameter)
OPAQUE = (nn.LayerNorm, nn.LocalResponseNorm, nn.MultiheadAttention, nn.LSTM, nn.Embedding)

MAPPED_BY_LIBRARY = (ops.OPTYPE.SLICE, ops.OPTYPE.UNBIND, ops.OPTYPE.EXPAND)

# (node of the graph, "out" or "in"); both sides are "out" where a layer keeps its channels
Space = tuple[Any, str]
# How often channels may reach one operation anew. Each way there brings its own: 4 is the most that was seen in families that can be cut
# (a FishNet). Where indices grow on a way in a circle, as in attention by plain products, it would never end.
MOST_VISITS = 50
MOST_CHANNEL_BITS = 40  # of the number of a channel; the other bits of an int64 number the spaces
LOST_TRACK = "an operation rearranges its channels in a way that cannot be followed"


@dataclass
class Family:
    """All channels that hang together with one root layer, in classes that live and die together.

    ``classes[i]`` holds ``(node, side) -> indices``; ``problem`` says why none of it may be removed.
    """

    root: nn.Module
    classes: list[dict[Space, list[int]]] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    problem: str | None = None


def trace(model: nn.Module, example: torch.Tensor) -> tp.DependencyGraph:
    """The dependency graph of a model.

    Args:
        model: in eval mode; its parameters get ``requires_grad`` switched on, nothing else changes.
        example: one input, ``[1, ...]``.

    Raises:
        ModelError: the model cannot be traced; names the innermost layer that was running.
    """
    trainable(model)
    entered: list[str] = []
    handles = []
    for name, module in model.named_modules():
        label = (
            f"{name!r} ({type(module).__name__})" if name else f"{type(module).__name__}.forward"
        )
        handles.append(module.register_forward_pre_hook(lambda *_, at=label: entered.append(at)))
        handles.append(module.register_forward_hook(lambda *_: entered.pop() and None))
    try:
        with warnings.catch_warnings(), torch.enable_grad(), _forgiving_maps():
            warnings.simplefilter("ignore")
            return tp.DependencyGraph().build_dependency(
                model, example_inputs=example, forward_fn=lambda m, x: m(x), verbose=False
            )
    except Exception as error:  # the model's forward may raise anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        where = f" in layer {entered[-1]}" if entered else ""
        raise ModelError(
            f"the model cannot be traced{where}: {first[0][:300]}",
            hint="its forward must run on one input tensor without data-dependent branches",
        ) from error
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _forgiving_maps() -> Iterator[None]:
    """Torch-Pruning's index maps of reshapes, concatenations and splits may fail: edgeprune makes its own of these.

    Version 1.6.1 divides by zero at the channel shuffle of a ShuffleNet and adds ``None`` at the roll of a deep Swin.
    """
    original = index_mapping.update_index_mapping

    def update(graph: Any) -> None:
        for module, node in graph.module2node.items():
            try:
                original(_OneNode(graph, {module: node}))
            except Exception:
                if node.type in MAPPED_BY_LIBRARY:
                    raise

    index_mapping.update_index_mapping = update
    try:
        yield
    finally:
        index_mapping.update_index_mapping = original


class _OneNode:
    """A graph of which one node is to be visited."""

    def __init__(self, graph: Any, module2node: dict[Any, Any]) -> None:
        self._graph, self.module2node = graph, module2node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


def moves_whole_groups(layer: object) -> bool:
    """Whether channels of this convolution go by whole groups, inputs and outputs together (depthwise is the usual case).

    Where there are fewer groups than channels in each, every group gives up the same positions instead, and there inputs and
    outputs are independent: that leaves more widths to choose from.
    """
    return isinstance(layer, _ConvNd) and 1 < layer.groups >= layer.in_channels // layer.groups


def families(model: nn.Module, graph: Any) -> Iterator[Family]:
    """The families of all convolutions and linear layers that the trace reached, each layer's outputs in exactly one.

    The root is the first layer of a family in the model's own order, not in the order of the trace.
    """
    done: set[Any] = set()
    for module in model.modules():
        node = graph.module2node.get(module)
        if not isinstance(module, WEIGHTED) or node is None or node in done:
            continue
        width = _width(module, "out") or 1
        family = _explore(graph, node, width) if width > 1 else Family(module, nodes=[node])
        done.update(n for found in family.classes for n, side in found if side == "out")
        yield family


def channel_dim(parameter: torch.Tensor) -> int:
    """Where a free parameter has its channels: dimension 1 of an image-like ``[1, C, H, W]``, else the last one that is not 1."""
    if parameter.dim() == 4 and parameter.shape[1] > 1:
        return 1
    return max((d for d, size in enumerate(parameter.shape) if size > 1), default=0)


def _width(module: object, side: str) -> int | None:
    """Channels on one side of a layer; ``None`` where the operation has no width of its own."""
    if isinstance(module, _ConvNd):
        return module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    if isinstance(module, _NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    if isinstance(module, nn.Parameter):
        return int(module.shape[channel_dim(module)])
    return None


def _explore(graph: Any, root: Any, width: int) -> Family:
    """Follow every hand-over from the outputs of ``root``."""
    joined = _Joined()
    seen: dict[Space, set[int]] = defaultdict(set)
    pending: dict[Space, set[int]] = {(root, "out"): set(range(width))}
    visits: Counter[Space] = Counter()
    problem: str | None = None
    while pending:
        space, indices = pending.popitem()
        visits[space] += 1
        if visits[space] > MOST_VISITS:
            problem = LOST_TRACK
            continue
        fresh = sorted(indices - seen[space])
        seen[space].update(fresh)
        for target, (here, there) in _neighbours(graph, space, np.array(fresh, dtype=np.int64)):
            limit = _width(target[0].module, target[1])
            if limit == 1 and _width(space[0].module, space[1]) != 1:
                continue  # one channel that is broadcast to all
            if (there < 0).any() or (limit is not None and (there >= limit).any()):
                problem = LOST_TRACK
                continue
            if left := set(there.tolist()) - seen[target]:
                pending.setdefault(target, set()).update(left)
            joined.join(space, target, here, there)
    family = Family(
        root.module,
        joined.classes((root, "out"), width, {s: sorted(i) for s, i in seen.items()}),
        list(dict.fromkeys(n for n, _ in seen)),
    )
    family.problem = problem or _problem(family, seen)
    return family


class _Joined:
    """Points that are one: a channel of a space is a number (``int64``), so that millions of hand-overs are arrays."""

    def __init__(self) -> None:
        self._firsts: dict[Space, int] = {}
        self._ends: list[tuple[np.ndarray, np.ndarray]] = []

    def _points(self, space: Space, channels: np.ndarray) -> np.ndarray:
        first = self._firsts.setdefault(space, len(self._firsts) << MOST_CHANNEL_BITS)
        found: np.ndarray = first + channels
        return found

    def join(self, space: Space, target: Space, here: np.ndarray, there: np.ndarray) -> None:
        """Join channels of one space with channels of another, by pairs."""
        self._ends.append((self._points(space, here), self._points(target, there)))

    def classes(
        self, root: Space, width: int, seen: Mapping[Space, list[int]]
    ) -> list[dict[Space, list[int]]]:
        """The classes in the order of the root's channels, each with its channels of every space, ascending."""
        channels = {root: list(range(width)), **seen}
        of_space = [self._points(s, np.array(i, dtype=np.int64)) for s, i in channels.items()]
        empty = np.zeros(0, dtype=np.int64)
        one = np.concatenate([empty, *(a for a, _ in self._ends)])
        other = np.concatenate([empty, *(b for _, b in self._ends)])
        points, places = np.unique(np.concatenate([*of_space, one, other]), return_inverse=True)
        inside = len(places) - 2 * len(one)
        labels = _components(
            len(points), places[inside : inside + len(one)], places[inside + len(one) :]
        )[places[:inside]].tolist()
        found: dict[int, dict[Space, list[int]]] = {
            label: {} for label in labels[: len(channels[root])]
        }
        position = 0
        for space, indices in channels.items():
            for i in indices:
                found[labels[position]].setdefault(space, []).append(i)
                position += 1
        return list(found.values())


def _components(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The connected component of each of ``count`` points, by the smallest point in it; ``one[k]`` and ``other[k]`` are joined.

    Source: Shiloach and Vishkin, J. Algorithms 3 (1982): roots are hooked to smaller ones and paths shortened in turns. SciPy has the
    same, but only the extras bring it.
    """
    labels = np.arange(count)
    while True:
        here, there = labels[one], labels[other]
        apart = here != there
        if not apart.any():
            return labels
        lower, upper = np.minimum(here, there)[apart], np.maximum(here, there)[apart]
        np.minimum.at(labels, upper, lower)
        while not np.array_equal(shorter := labels[labels], labels):
            labels = shorter


def _problem(family: Family, seen: dict[Space, set[int]]) -> str | None:
    """Why the family cannot be pruned, as far as the graph shows it."""
    for node, side in seen:
        if side == "out" and not node.outputs:
            return "its channels are the model's outputs"
    for node in family.nodes:
        module = node.module
        if isinstance(module, OPAQUE):
            return f"a {type(module).__name__} mixes its channels"
        if node.type == ops.OPTYPE.DEPTHWISE_CONV and module.in_channels != module.out_channels:
            return "a grouped convolution merges its channels"
    shapes = {
        frozenset((n, s, len(i)) for (n, s), i in c.items() if isinstance(n.module, SLICEABLE))
        for c in family.classes
    }
    if len(shapes) > 1:
        return "some of its channels are coupled with other layers than the rest"
    return None


def _side(graph: Any, node: Any, function: Any) -> str:
    pruner = graph.get_pruner_of_module(node.module)
    return "out" if function == pruner.prune_out_channels else "in"


def _neighbours(graph: Any, space: Space, indices: np.ndarray) -> Iterator[tuple[Space, Pairs]]:
    """Every space that channels of ``space`` are handed to or tied with, with the pairs (index here, index there)."""
    node, side = space
    pruner = graph.get_pruner_of_module(node.module)
    function = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
    for dependency in node.dependencies:
        if not dependency.is_triggered_by(function):
            continue
        target = dependency.target
        if any(target is n for n in node.outputs):
            yield (target, _side(graph, target, dependency.handler)), _forward(dependency, indices)
        if any(target is n for n in node.inputs):
            yield (target, _side(graph, target, dependency.handler)), _backward(dependency, indices)
    for tied_side, pairs in _ties(node, side, indices):
        yield (node, tied_side), pairs


def _forward(dependency: Any, indices: np.ndarray) -> Pairs:
    if dependency.target.type in MAPPED_BY_LIBRARY:
        return _mapped(dependency, indices)
    views = edge_views(dependency.source, dependency.target)
    return _together([view.forward(indices) for view in views])


def _backward(dependency: Any, indices: np.ndarray) -> Pairs:
    if dependency.source.type in MAPPED_BY_LIBRARY:
        return _mapped(dependency, indices)
    views = edge_views(dependency.target, dependency.source)
    return _together([view.backward(indices) for view in views])


def _together(parts: list[Pairs]) -> Pairs:
    here, there = zip(*parts, strict=True)
    return np.concatenate(here), np.concatenate(there)


def _mapped(dependency: Any, indices: np.ndarray) -> Pairs:
    """Torch-Pruning's own map of slices, repeats and the like; it loses the origin of repeated heads: those cannot be followed."""
    mapped = [_HybridIndex(idx=i, root_idx=i) for i in indices.tolist()]
    if (mapping := dependency.index_mapping[0]) is not None:
        try:
            mapped = mapping(mapped)
        except ZeroDivisionError:  # it has read off heads of no channels, as in a Hiera
            return indices, np.full_like(indices, LOST)
    pairs = [(m.root_idx, m.idx) if m.root_idx is not None else (0, LOST) for m in mapped]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _ties(node: Any, side: str, indices: np.ndarray) -> Iterator[tuple[str, Pairs]]:
    """Channels of one layer that must go together, which the graph does not say."""
    module = node.module
    size = equal_parts(node)
    if size:
        yield "out", _same_position(indices, size, sum(split_sizes(node)))
    if isinstance(module, nn.GroupNorm):
        each = module.num_channels // module.num_groups
        yield "out", _blocks(indices, each, each)
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return
    if node.type == ops.OPTYPE.DEPTHWISE_CONV:
        return
    sizes = {s: (_width(module, s) or 0) // module.groups for s in ("out", "in")}
    here = sizes[side]
    if moves_whole_groups(module):
        for other, each in sizes.items():
            yield other, _blocks(indices, here, each)
    else:
        yield side, _same_position(indices, here, here * module.groups)


def _same_position(indices: np.ndarray, size: int, end: int) -> Pairs:
    """Each index with those at its position in every part of ``size``, below ``end``."""
    there = indices[:, None] % size + np.arange(0, end, size)
    is_inside = there < end
    return np.broadcast_to(indices[:, None], there.shape)[is_inside], there[is_inside]


def _blocks(indices: np.ndarray, here: int, there: int) -> Pairs:
    """Each index, in its block of ``here``, with the whole block of ``there`` of the same number."""
    found = indices[:, None] // here * there + np.arange(there)
    return np.repeat(indices, there), found.ravel()
