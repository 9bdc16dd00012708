"""Scores that need the weights alone, and how scores of a layer's inputs become scores of a group's channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from edgeprune.compress.groups.masked import filter_of
from edgeprune.compress.groups.surgery import ChannelGroup, weights_by_input

Scores: TypeAlias = dict[str, np.ndarray]
Importance: TypeAlias = Callable[[nn.Module, Sequence[ChannelGroup], Tensor, int], Scores]
Places: TypeAlias = tuple[Tensor, Tensor, int]  # input indices, channel of each, number of channels


def places(indices: Sequence[Sequence[int]]) -> Places:
    """Where a layer has the channels of a group: its indices, and the channel of each; a channel may have any number."""
    pairs = [(index, channel) for channel, own in enumerate(indices) for index in own]
    flat = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return flat[:, 0], flat[:, 1], len(indices)


def by_channel(values: Tensor, where: Places) -> Tensor:
    """Sum ``[N, inputs]`` to ``[N, channels]``."""
    index, channel, n = where
    return values.new_zeros(len(values), n).index_add_(1, channel, values[:, index])


def random(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """A control: uniform random scores."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.channels) for group in groups}


def l1(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """Sum of the absolute weights that read each channel, over all consumers."""
    return _of_readers(model, groups, lambda weights: weights.abs())


def l2(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """Squared norm of the weights that read each channel, over all consumers."""
    return _of_readers(model, groups, lambda weights: weights.square())


def reader_energy(layer: nn.Module) -> Tensor:
    """Squared norm of the weights that read each input of a layer, ``float64 [inputs]``."""
    return weights_by_input(layer).detach().double().square().sum((1, 3)).flatten().cpu()


def _of_readers(
    model: nn.Module, groups: Sequence[ChannelGroup], size: Callable[[Tensor], Tensor]
) -> Scores:
    layers = dict(model.named_modules())
    scores: Scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for consumer in group.consumers():
            weights = weights_by_input(layers[consumer.layer]).detach()
            found = size(weights.double()).sum((1, 3)).flatten().cpu()
            total += by_channel(found[None], places(consumer.indices))[0]
        scores[group.name] = total.numpy()
    return scores


def bn_scale(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """Size of each channel's normalisation weight, its mean over the group's normalisations; a group without any gets :func:`l2`.

    Source: Liu et al. 2017, "Learning efficient convolutional networks through network slimming", arXiv:1708.06519, without its sparse
    training: on a model that was trained without a penalty the scale says less.
    """
    layers = dict(model.named_modules())
    scores = l2(model, groups, x, seed)
    for group in groups:
        found = []
        for coupling in group.couplings:
            layer = layers.get(coupling.layer)
            weight = getattr(layer, "weight", None)
            is_norm = isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm)
            if coupling.side == "out" and is_norm and isinstance(weight, Tensor):
                sizes = weight.detach().double().abs().flatten().cpu()
                where = places(coupling.indices)
                each = torch.tensor([max(1, len(own)) for own in coupling.indices])
                found.append(by_channel(sizes[None], where)[0] / each)
        if found:
            scores[group.name] = torch.stack(found).mean(0).numpy()
    return scores


def fpgm(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, seed: int) -> Scores:
    """How far each channel's filter is from the others of its layer: one that others can stand for scores low, however large it is.

    The sum of the distances of a filter to all filters of the layer, divided by the mean sum, so that every layer that writes the
    group counts alike.
    Source: He et al. 2019, "Filter pruning via geometric median", arXiv:1811.00250, eq. 4.
    """
    layers = dict(model.named_modules())
    scores: Scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for coupling in group.couplings:
            layer = layers.get(coupling.layer)
            is_weighted = isinstance(layer, nn.Linear | _ConvNd)
            if (
                coupling.side != "out"
                or not is_weighted
                or len(set(map(len, coupling.indices))) > 1
            ):
                continue
            assert layer is not None
            filters = torch.stack(
                [
                    torch.cat([filter_of(layer, i).detach().flatten() for i in own])
                    for own in coupling.indices
                ]
            ).double()
            sums = torch.cdist(filters, filters).sum(1).cpu()
            total += sums / sums.mean().clamp_min(torch.finfo(torch.float64).tiny)
        scores[group.name] = total.numpy()
    return scores
