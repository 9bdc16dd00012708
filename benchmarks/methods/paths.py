"""Pruners that walk from the dense net to a small one in steps: NetAdapt, and a knapsack in the manner of HALP.

Both are written from the formulas of the papers; no code of theirs is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeprune.compress.groups.find import ChannelGroup, remove_channels
from edgeprune.compress.scores.importance import removal_order
from edgeprune.plan.latency.model import LatencyModel
from edgeprune.progress import Progress
from methods.candidate import Candidate, Method
from methods.solver import Cutter, geometric

SHORT_RATE, SHORT_BATCH = 0.01, 64


def path_method(name: str, steps: Sequence[Candidate]) -> Method:
    """A method whose knob picks a step of a path that is already walked."""

    def at(knob: float) -> Candidate:
        return steps[round(min(max(knob, 0.0), 1.0) * (len(steps) - 1))]

    return Method(name, name, at)


def netadapt(
    cutter: Cutter,
    latency: LatencyModel,
    orders: Mapping[str, np.ndarray],
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    held: tuple[torch.Tensor, torch.Tensor],
    *,
    steps: int,
    short_steps: int,
    progress: Progress,
) -> list[Candidate]:
    """The path of NetAdapt (https://arxiv.org/abs/1804.03230, algorithm 1).

    In each step every group alone is cut until the table says that the next latency is met; each proposal is trained shortly; the one
    with the best accuracy on held-out images goes on.

    The latencies of the steps are spaced geometrically down to the fastest structure, not by a fixed decrement, so that the number of
    short trainings is bounded. Weights are carried along; within a group filters go by l2 norm, as in the paper.

    Args:
        cutter: of the dense net.
        latency: the corrected table.
        orders: channels of each group, the least important first.
        batch: a training batch by number, ``(x, y)``.
        held: images that choose, ``(x, y)``.
        steps: latencies between dense and the fastest.
        short_steps: SGD steps of one short training.
        progress: where to show it.
    """
    model, full = copy.deepcopy(cutter.model), {g.name: g.channels for g in cutter.groups}
    widths = dict(full)
    groups = {g.name: g for g in cutter.groups}
    kept = {name: list(range(n)) for name, n in full.items()}
    smallest = {n: grid[0] for n, grid in latency.grids.items()}
    limits = geometric(latency.predict({}), latency.predict(smallest), steps)
    path = [_frozen(cutter.model, widths)]
    number = 0
    with progress.bar("netadapt", steps) as bar:
        for limit in limits:
            proposals = []
            for name, grid in latency.grids.items():
                fitting = [
                    w
                    for w in grid
                    if w < widths[name] and latency.predict({**widths, name: w}) <= limit
                ]
                if fitting:
                    proposals.append((name, max(fitting)))
            if not proposals:  # no single group reaches it: cut the one that saves most, then go on
                gains = {
                    (n, g[0]): latency.predict({**widths, n: g[0]})
                    for n, g in latency.grids.items()
                    if g[0] < widths[n]
                }
                if not gains:
                    break
                proposals = [min(gains, key=lambda k: gains[k])]
            tried = []
            for name, width in proposals:
                order = [c for c in orders[name] if c in set(kept[name])]
                left = sorted(order[len(order) - width :])
                after = {**kept, name: left}
                removed = {n: sorted(set(range(full[n])) - set(k)) for n, k in after.items()}
                shape = remove_channels(
                    copy.deepcopy(cutter.model), groups, removed, cutter.example
                )
                trained = _shortly(
                    _carried(shape, model, cutter.groups, kept, after), batch, short_steps, number
                )
                number += short_steps
                tried.append((_accuracy(trained, *held), name, width, after, trained))
            _, name, width, kept, model = max(tried, key=lambda t: t[0])
            widths[name] = width
            path.append(_frozen(model, widths))
            bar.advance(1, f"{name} to {width}")
    return path


def _frozen(model: nn.Module, widths: Mapping[str, int]) -> Candidate:
    kept = copy.deepcopy(model).eval()
    return Candidate(dict(widths), lambda: copy.deepcopy(kept))


def _carried(
    shape: nn.Module,
    current: nn.Module,
    groups: Sequence[ChannelGroup],
    before: Mapping[str, Sequence[int]],
    after: Mapping[str, Sequence[int]],
) -> nn.Module:
    """The net of shape ``shape`` with the weights that ``current`` has for its channels."""
    picks: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for c in group.couplings:
            was = sorted(i for k in before[group.name] for i in c.indices[k])
            now = sorted(i for k in after[group.name] for i in c.indices[k])
            place = {index: position for position, index in enumerate(was)}
            picks[c.layer, c.side] = [place[i] for i in now]
    old = current.state_dict()
    fresh = {}
    for name, tensor in shape.state_dict().items():
        layer = name.rpartition(".")[0]
        source = old[name]
        if source.ndim and (layer, "out") in picks and len(source) != len(tensor):
            source = source[picks[layer, "out"]]
        if source.ndim > 1 and (layer, "in") in picks and source.shape[1] != tensor.shape[1]:
            source = source[:, picks[layer, "in"]]
        fresh[name] = source.clone()
    shape.load_state_dict(fresh)
    return shape


def _shortly(
    model: nn.Module,
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    first: int,
) -> nn.Module:
    model = model.train().requires_grad_(True)
    optimiser = torch.optim.SGD(model.parameters(), SHORT_RATE, momentum=0.9, nesterov=True)
    for number in range(first, first + steps):
        x, y = batch(number)
        loss = functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    hits = [
        (model(a).argmax(1) == b).sum() for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(sum(hits)) / len(y)


def halp(
    cutter: Cutter,
    latency: LatencyModel,
    writers: Mapping[str, Sequence[LatencyModel]],
    scores: Mapping[str, np.ndarray],
    *,
    steps: int,
    buckets: int = 2000,
) -> list[Candidate]:
    """The path of a latency knapsack in the manner of HALP (https://arxiv.org/abs/2110.10811, section 3).

    Each bundle of channels has its summed first-order Taylor score as value and, as weight, what the layers that *write* it save while
    all inputs stay at their present widths;
    the value is maximised under the budget by dynamic programming, the budget falls in geometric steps, and weights are taken anew.

    Args:
        cutter: of the dense net.
        latency: the corrected table; its factors are what layers cost.
        writers: for each group the latency of each kernel that writes it, as a model of its own.
        scores: Taylor scores of each group.
        steps: how often the knapsack is solved.
        buckets: resolution of the budget.
    """
    orders = removal_order(dict(scores))
    widths = {g.name: g.channels for g in cutter.groups}
    smallest = {n: grid[0] for n, grid in latency.grids.items()}
    path = [cutter.candidate(widths, orders, repaired=False)]
    for limit in geometric(latency.predict({}), latency.predict(smallest), steps):
        choices = {}
        for name, grid in latency.grids.items():
            allowed = [w for w in grid if w <= widths[name]]
            cost = {w: sum(k.predict({**widths, name: w}) for k in writers[name]) for w in allowed}
            order = np.sort(scores[name])
            value = {w: float(order[len(order) - w :].sum()) for w in allowed}
            choices[name] = [(w, cost[w], value[w]) for w in allowed]
        charged = sum(c[-1][1] for c in choices.values())
        # What the knapsack does not see stays as it is: its budget is the rest.
        room = limit - (latency.predict(widths) - charged)
        widths = _knapsack(choices, max(room, 0.0), buckets)
        path.append(cutter.candidate(widths, orders, repaired=False))
    return path


def _knapsack(
    choices: Mapping[str, Sequence[tuple[int, float, float]]], room: float, buckets: int
) -> dict[str, int]:
    """One width a group, the largest value within the room; the least weight everywhere where nothing fits."""
    names = list(choices)
    least = sum(min(c for _, c, _ in choices[n]) for n in names)
    if least >= room:
        return {n: min(choices[n], key=lambda e: (e[1], -e[2]))[0] for n in names}
    unit = room / buckets
    best = np.full(buckets + 1, -np.inf)
    best[0] = 0.0
    picked: list[np.ndarray] = []
    for n in names:
        after = np.full(buckets + 1, -np.inf)
        pick = np.full(buckets + 1, -1)
        for i, (_, cost, value) in enumerate(choices[n]):
            # Rounded to the nearest bucket: always up would lose half a bucket for every group.
            weight = round(cost / unit)
            if weight > buckets:
                continue
            shifted = np.full(buckets + 1, -np.inf)
            shifted[weight:] = best[: buckets + 1 - weight] + value
            better = shifted > after
            after[better], pick[better] = shifted[better], i
        best = after
        picked.append(pick)
    place = int(np.argmax(best))
    if not np.isfinite(best[place]):
        return {n: min(choices[n], key=lambda e: (e[1], -e[2]))[0] for n in names}
    widths = {}
    for n, pick in zip(reversed(names), reversed(picked), strict=True):
        width, cost, _ = choices[n][pick[place]]
        widths[n] = width
        place -= round(cost / unit)
    return widths
