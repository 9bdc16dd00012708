"""Scores from what layers really read: how much their output misses when a channel is gone, with or without repair of the weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.compress.evaluate import run_once
from edgeprune.compress.groups.surgery import ChannelGroup, Coupling
from edgeprune.compress.readings import Layer, Reading, reading_of
from edgeprune.compress.scores.weights import Scores, by_channel, places, reader_energy
from edgeprune.errors import ModelError

ROWS_PER_TAP = 4  # sampled outputs for each unknown of a least-squares problem
MIN_ROWS = 2048
MAX_TAPS = 2304  # 256 channels of a 3x3 convolution: 42 MB for its Gram matrix, and some 10^10 products for all its removals
RIDGE = 1e-3  # of the mean diagonal


def variance(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """Variance of each channel where it is read, times the squared norm of the weights that read it, over all consumers.

    What does not vary can be replaced by a bias at no cost, however large it is.
    Source: An et al. 2024, "Fluctuation-based adaptive structured pruning", arXiv:2312.11983, eq. 5.

    Args:
        model: runs in eval mode; not changed.
        groups: what to score.
        x: inputs ``[N, ...]``.
        seed: not used.

    Raises:
        ModelError: there is no sample.
    """
    layers = dict(model.named_modules())
    readers = sorted({c.layer for group in groups for c in group.consumers()})
    moments: dict[str, _Moments] = {name: _Moments() for name in readers}
    _watch(model, x, {name: moments[name].add for name in readers})
    scores: Scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for consumer in group.consumers():
            found = moments[consumer.layer].variance() * reader_energy(layers[consumer.layer])
            total += by_channel(found[None], places(consumer.indices))[0]
        scores[group.name] = total.numpy()
    return scores


def obs(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """What the removal of each channel adds to the error of the layers that read it, their other weights being repaired.

    The error is the share of a layer's output energy (about its mean: a bias takes up the rest) that no weights on the channels that are
    left can bring back, summed over the layers. Channels go one by one, the cheapest first, and a channel's score is what its removal
    added then, at least that of the one before: so scores rise along that order, and their sum is the error. Removing the taps ``S`` of a
    layer with weights ``W`` and input covariance ``H`` adds ``tr(W_S' ((H^-1)_SS)^-1 W_S)``; then ``W`` and ``H^-1`` are updated.

    Source: Hassibi and Stork 1992, "Second order derivatives for network pruning: optimal brain surgeon"; for whole structures: Kurtic et
    al. 2023, "ZipLM", arXiv:2302.04089, eq. 2-4 (formulas only). Layers that this does not hold for (grouped or transposed convolutions,
    over 2304 taps, several calls a pass) count by their :func:`variance`, as a share of its sum.

    Args:
        model: runs in eval mode; not changed.
        groups: what to score.
        x: inputs ``[N, ...]``.
        seed: for the output positions that are sampled.

    Raises:
        ModelError: there is no sample.
    """
    layers = dict(model.named_modules())
    readers = sorted({c.layer for group in groups for c in group.consumers()})
    solvable = [name for name in readers if _is_solvable(layers[name])]
    rows = {name: _LayerRows(layers[name], len(x), seed + i) for i, name in enumerate(solvable)}
    moments = {name: _Moments() for name in readers}

    def look(name: str, given: Tensor) -> None:
        moments[name].add(layers[name], given)
        if name in rows:
            rows[name].add(given)

    _watch(model, x, {name: functools.partial(_named, look, name) for name in readers})
    covariances = {name: found.covariance() for name, found in rows.items()}
    scores: Scores = {}
    for group in groups:
        problems: list[_Removals] = []
        fixed = torch.zeros(group.channels, dtype=torch.float64)
        for consumer in group.consumers():
            layer = layers[consumer.layer]
            covariance = covariances.get(consumer.layer)
            problem = _removals(layer, consumer, covariance) if covariance is not None else None
            if problem is not None:
                problems.append(problem)
                continue
            found = moments[consumer.layer].variance() * reader_energy(layer)
            share = found / max(float(found.sum()), 1e-300)
            fixed += by_channel(share[None], places(consumer.indices))[0]
        scores[group.name] = _greedy(problems, fixed)
    return scores


def _named(look: Callable[[str, Tensor], None], name: str, layer: nn.Module, given: Tensor) -> None:
    look(name, given)


def _watch(
    model: nn.Module, x: Tensor, hooks: dict[str, Callable[[nn.Module, Tensor], None]]
) -> None:
    """One pass over all samples in eval mode, with the input of each named layer shown to its hook."""
    if len(x) == 0:
        raise ModelError("scoring channels needs at least 1 sample, but got 0")
    layers = dict(model.named_modules())
    handles = [
        layers[name].register_forward_pre_hook(lambda layer, args, h=hook: h(layer, args[0]))
        for name, hook in hooks.items()
    ]
    run_once(model, x, handles)


class _Moments:
    """Mean and variance of every input of a layer, over samples and positions."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, layer: nn.Module, given: Tensor) -> None:
        """Count an input ``[N, C, ...]``, or ``[N, ..., C]`` of a linear layer."""
        last = isinstance(layer, nn.Linear)
        values = given.flatten(0, -2) if last else given.transpose(0, 1).flatten(1).T
        values = values.double()
        total, squares = values.sum(0).cpu(), values.square().sum(0).cpu()
        self._count += len(values)
        self._sum = total if self._sum is None else self._sum + total
        self._squares = squares if self._squares is None else self._squares + squares

    def variance(self) -> Tensor:
        """``float64 [inputs]``, at least 0."""
        assert self._sum is not None
        assert self._squares is not None
        mean = self._sum / self._count
        return (self._squares / self._count - mean.square()).clamp_min(0)


def _is_solvable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features <= MAX_TAPS
    return (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.weight[0].numel() <= MAX_TAPS
    )


class _LayerRows:
    """The covariance of what a layer reads, from sampled output positions; ``None`` where the layer ran more than once a pass.

    There is none either where the layer computes something else than its weight says.
    """

    def __init__(self, layer: nn.Module, samples: int, seed: int) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        self._layer: Layer = layer
        self._samples = samples
        self._seen = self._rows = 0
        self._generator = torch.Generator().manual_seed(seed)
        taps = layer.weight[0].numel()
        self._wanted = max(MIN_ROWS, ROWS_PER_TAP * taps)
        self._sum = torch.zeros(taps, dtype=torch.float64)
        self._products = torch.zeros(taps, taps, dtype=torch.float64)

    def add(self, given: Tensor) -> None:
        """Sample the inputs of one call."""
        self._seen += len(given)
        if self._seen > self._samples:
            return
        reading = reading_of(self._layer, given.shape[1:])
        if reading is None:
            return
        total = self._positions(reading, given)
        each = min(total, math.ceil(self._wanted / self._samples))
        where = torch.randint(total, (len(given), each), generator=self._generator)
        if each == total:
            where = torch.arange(total).expand(len(given), -1)
        values = reading.rows(given, where.to(given.device)).double().cpu()
        self._rows += len(values)
        self._sum += values.sum(0)
        self._products += values.T @ values

    @staticmethod
    def _positions(reading: Reading, given: Tensor) -> int:
        if reading.sources is None:
            return given[0].numel() // given.shape[-1]
        return len(reading.sources)

    def covariance(self) -> Tensor | None:
        """``float64 [taps, taps]``."""
        if self._seen != self._samples or self._rows < 2:
            return None
        mean = self._sum / self._rows
        return self._products / self._rows - torch.outer(mean, mean)


@dataclass
class _Removals:
    """One layer while channels go: weights ``[taps, outputs]``, inverse covariance, and the taps of each channel ``[channels, taps]``."""

    weight: Tensor
    inverse: Tensor
    taps: Tensor
    energy: float

    def costs(self, left: Tensor) -> Tensor:
        """What removing each of the channels ``left`` adds to the error, as a share of the output's energy."""
        taps = self.taps[left]
        blocks = self.inverse[taps[:, :, None], taps[:, None, :]]
        weights = self.weight[taps]
        found: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2)) / self.energy
        return found

    def remove(self, channel: int) -> None:
        """Take a channel out: repair the other weights, and take its taps out of the inverse."""
        taps = self.taps[channel]
        columns = self.inverse[:, taps]
        solved = torch.linalg.solve(columns[taps], torch.cat([self.weight[taps], columns.T], 1))
        outputs = self.weight.shape[1]
        self.weight = self.weight - columns @ solved[:, :outputs]
        self.inverse = self.inverse - columns @ solved[:, outputs:]
        self.weight[taps] = 0.0
        # Numbers that should be 0 by now; what is left of them would be divided by.
        self.inverse[taps] = 0.0
        self.inverse[:, taps] = 0.0


def _removals(layer: nn.Module, consumer: Coupling, covariance: Tensor) -> _Removals | None:
    """The problem of one layer, or ``None`` where it has no stable solution."""
    if len(set(map(len, consumer.indices))) > 1 or not consumer.indices[0]:
        return None
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    area = layer.weight[0].numel() // layer.weight.shape[1]
    weight = layer.weight.detach().flatten(1).T.double().cpu()
    energy = float((weight * (covariance @ weight)).sum())
    pull = RIDGE * float(covariance.diagonal().mean())
    if not (0 < energy < math.inf and 0 < pull < math.inf):
        return None
    damped = covariance + pull * torch.eye(len(covariance), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    first = torch.tensor(consumer.indices, dtype=torch.long) * area
    taps = (first[:, :, None] + torch.arange(area)).flatten(1)
    return _Removals(weight, torch.cholesky_inverse(factor), taps, energy)


def _greedy(problems: Sequence[_Removals], fixed: Tensor) -> np.ndarray:
    """Remove the cheapest channel again and again; what each added, never less than the one before, ``float64 [channels]``."""
    left = torch.arange(len(fixed))
    scores = np.zeros(len(fixed))
    added = 0.0
    while len(left):
        costs = fixed[left].clone()
        for problem in problems:
            costs += problem.costs(left).clamp_min(0)
        at = int(costs.nan_to_num(nan=math.inf, posinf=math.inf).argmin())
        chosen = int(left[at])
        # Strictly more, so that sorting the scores gives the order back.
        added = max(added * (1 + 1e-9) + 1e-15, float(costs[at].nan_to_num(nan=0.0)))
        scores[chosen] = added
        for problem in problems:
            problem.remove(chosen)
        left = torch.cat([left[:at], left[at + 1 :]])
    return scores
