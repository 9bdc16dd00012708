"""How much each channel matters: plain functions from a model and data to one score per channel of every group.

An importance is any callable with the signature of :data:`Importance`; pass your own. Scores of :func:`fisher` are in nats of predicted
loss; :func:`cost_curves` turns scores into the cost of keeping each width and calibrates it against real evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeprune.compress.compensate import recalibrate_batchnorm
from edgeprune.compress.evaluate import kl_nats, logits
from edgeprune.compress.groups import ChannelGroup, zero_channels
from edgeprune.progress import Progress, Silent

Scores = dict[str, np.ndarray]
Importance = Callable[[nn.Module, Sequence[ChannelGroup], torch.Tensor, int], Scores]

FLOOR_NATS = (
    1e-9  # a curve stays strictly decreasing, so that a free channel is still the last to come back
)


def random(model: nn.Module, groups: Sequence[ChannelGroup], x: torch.Tensor, seed: int) -> Scores:
    """A control: uniform random scores."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.channels) for group in groups}


def l2(model: nn.Module, groups: Sequence[ChannelGroup], x: torch.Tensor, seed: int) -> Scores:
    """Squared norm of the weights that read each channel, over all consumers."""
    layers = dict(model.named_modules())
    scores: Scores = {}
    for group in groups:
        total = np.zeros(group.channels)
        for consumer in group.consumers():
            weight = layers[consumer.layer].weight
            if not isinstance(weight, torch.Tensor):
                continue
            energy = (
                weight.detach().flatten(2).square().sum((0, 2))
                if weight.dim() > 2
                else (weight.detach().square().sum(0))
            )
            total += [float(energy[list(i)].sum()) for i in consumer.indices]
        scores[group.name] = total
    return scores


def fisher(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    x: torch.Tensor,
    seed: int,
    *,
    batch_size: int = 128,
) -> Scores:
    """Predicted loss increase in nats when a channel is removed from everything that reads it.

    Put a gate ``z_c = 1`` on the channel where its consumers read it. To second order, closing the gate costs ``F_c / 2`` with the
    Fisher information ``F_c = E[(dL/dz_c)^2]``; the gradient of the gate is the sum over positions and consumers of activation times
    gradient. Classes are drawn from the model's own predictions, so no labels are needed, and the first-order term vanishes.
    Source: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 9-11, arXiv:1801.05787.

    Args:
        model: in eval mode; not changed.
        groups: what to score.
        x: inputs, ``[N, ...]``.
        seed: for the drawn classes.
        batch_size: samples a pass.
    """
    layers = dict(model.named_modules())
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    totals = {g.name: torch.zeros(g.channels, dtype=torch.float64) for g in groups}
    gates: dict[str, torch.Tensor] = {}
    indices = {(g.name, c.layer): _index_matrix(c.indices) for g in groups for c in g.consumers()}
    readers: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        for consumer in group.consumers():
            readers.setdefault(consumer.layer, []).append(group)

    def watch(
        layer: str,
    ) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen = args[0].view_as(
                args[0]
            )  # a view of its own: the gradient of this consumer alone

            def collect(gradient: torch.Tensor) -> None:
                product = _per_channel(layers[layer], seen.detach() * gradient)
                for group in readers[layer]:
                    chosen = product[:, indices[group.name, layer]].sum(2)
                    gates[group.name] = gates.get(group.name, 0) + chosen

            seen.register_hook(collect)  # type: ignore[no-untyped-call]
            return (seen, *args[1:])

        return before

    handles = [layers[layer].register_forward_pre_hook(watch(layer)) for layer in readers]
    try:
        for batch in torch.split(x, batch_size):
            gates.clear()
            output = model(batch.to(device).requires_grad_(True))
            with torch.no_grad():
                drawn = torch.multinomial(output.softmax(1).cpu(), 1, generator=generator)[:, 0]
            loss = functional.cross_entropy(output, drawn.to(device), reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            for name, gate in gates.items():
                totals[name] += gate.double().square().sum(0).cpu() / 2
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return {name: (total / len(x)).numpy() for name, total in totals.items()}


def _index_matrix(indices: Sequence[Sequence[int]]) -> torch.Tensor:
    """Consumer indices of each channel, ``[channels, k]``; every channel of a group is read the same number of times."""
    return torch.tensor([list(i) for i in indices], dtype=torch.long)


def _per_channel(layer: nn.Module, product: torch.Tensor) -> torch.Tensor:
    """Sum ``[N, C, ...]`` (or ``[N, ..., C]`` for linear layers) over positions to ``[N, C]``."""
    if isinstance(layer, nn.Linear):
        return product.flatten(1, -2).sum(1) if product.dim() > 2 else product
    return product.flatten(2).sum(2)


BY_NAME: dict[str, Importance] = {"fisher": fisher, "l2": l2, "random": random}


def removal_order(scores: Scores) -> dict[str, np.ndarray]:
    """Channels of each group from the least to the most important; ties go by index."""
    return {name: np.argsort(values, kind="stable") for name, values in scores.items()}


def kept_channels(order: np.ndarray, width: int) -> tuple[int, ...]:
    """The ``width`` most important channels, sorted."""
    return tuple(sorted(int(c) for c in order[len(order) - width :]))


def cost_curves(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    grids: Mapping[str, Sequence[int]],
    x: torch.Tensor,
    *,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Cost in nats of keeping each width of each group, calibrated by real evaluations.

    The raw curve of a group is the sum of the scores of what is removed. Scores of different groups are not comparable, so each group
    is really evaluated twice, at its middle and its smallest width: channels zeroed, BatchNorm recalibrated, KL divergence from the
    dense model. The curve is scaled through both points (in between, the scale is interpolated over the logarithm of the raw cost).

    Args:
        model: the dense model in eval mode; not changed.
        groups: what to score.
        scores: one array ``[channels]`` a group.
        grids: admissible widths of each group, ascending, ending with the full width.
        x: calibration inputs ``[N, ...]``; the first half recalibrates BatchNorm, the second half is evaluated.
        progress: where to show it.

    Returns:
        Group -> ``float64 [len(grid)]``, non-increasing, 0 at full width.
    """
    half = len(x) // 2
    reference = logits(model, x[half:])
    by_name = {group.name: group for group in groups}
    curves: dict[str, np.ndarray] = {}
    with (progress or Silent()).bar("calibrating importance", len(groups)) as bar:
        for group in groups:
            order = np.argsort(scores[group.name], kind="stable")
            cumulative = np.concatenate([[0.0], np.cumsum(scores[group.name][order])])
            grid = list(grids[group.name])
            raw = np.array([cumulative[group.channels - w] for w in grid])
            anchors = sorted({grid[0], grid[len(grid) // 2]} - {group.channels})
            measured = []
            for width in anchors:
                removed = [int(c) for c in order[: group.channels - width]]
                masked = zero_channels(model, by_name, {group.name: removed})
                masked = recalibrate_batchnorm(masked, x[:half])
                found = kl_nats(reference, logits(masked, x[half:]))
                measured.append((cumulative[group.channels - width], found))
            curves[group.name] = _scaled(raw, measured)
            bar.advance(1, group.name)
    return curves


def _scaled(raw: np.ndarray, measured: Sequence[tuple[float, float]]) -> np.ndarray:
    """Scale a raw curve through measured ``(raw, real)`` points, then make it monotone."""
    points = [(max(r, FLOOR_NATS), max(k, FLOOR_NATS)) for r, k in measured]
    if not points:
        return raw
    points.sort()
    log_raw = np.log([r for r, _ in points])
    log_scale = np.log([k / r for r, k in points])
    positive = np.maximum(raw, FLOOR_NATS)
    scaled = np.where(
        raw > 0, positive * np.exp(np.interp(np.log(positive), log_raw, log_scale)), 0.0
    )
    # Keeping more channels never costs more: the running maximum from the full width down.
    monotone: np.ndarray = np.maximum.accumulate(scaled[::-1])[::-1]
    monotone += FLOOR_NATS * np.arange(len(raw))[::-1]
    return monotone
