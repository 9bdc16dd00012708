"""How much each channel matters: plain functions from a model and data to one score per channel of every group.

An importance is a plain function with the signature of :data:`Importance`, selected by its name in :data:`BY_NAME`: another one is one
function and one line there. Here are those that need gradients; those that need the weights alone are in
:mod:`~edgeprune.compress.scores.weights`, those that need activations in :mod:`~edgeprune.compress.scores.reconstruction`, and that which
needs second derivatives in :mod:`~edgeprune.compress.scores.curvature`.
Whatever the scores, :func:`cost_curves` turns them into the cost in nats of keeping each width, calibrated against real evaluations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeprune.compress.evaluate import backward, private_copy
from edgeprune.compress.groups.surgery import ChannelGroup
from edgeprune.compress.scores.curvature import hessian
from edgeprune.compress.scores.reconstruction import obs, variance
from edgeprune.compress.scores.weights import (
    Importance,
    Places,
    Scores,
    bn_scale,
    by_channel,
    fpgm,
    l1,
    l2,
    places,
    random,
)
from edgeprune.compress.structure_loss import AfterRepair
from edgeprune.errors import ModelError
from edgeprune.progress import Progress, Silent
from edgeprune.workload.answers import BATCH, device_of
from edgeprune.workload.outputs import as_logits

# A curve stays strictly decreasing, so that a free channel is still the last to come back.
FLOOR_NATS = 1e-9


def fisher(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    x: torch.Tensor,
    seed: int,
    *,
    batch_size: int = BATCH,
) -> Scores:
    """Predicted loss increase in nats when a channel is removed from everything that reads it.

    Put a gate ``z_c = 1`` on the channel where its consumers read it. To second order, closing the gate costs ``F_c / 2`` with the
    Fisher information ``F_c = E[(dL/dz_c)^2]``; the gradient of the gate is the sum over positions and consumers of activation times
    gradient. Classes are drawn from the model's own predictions, so no labels are needed, and the first-order term vanishes.
    Source: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 9-11, arXiv:1801.05787.

    Args:
        model: not changed; it runs in eval mode.
        groups: what to score.
        x: inputs, ``[N, ...]``.
        seed: for the drawn classes.
        batch_size: samples a pass.

    Raises:
        ModelError: there is no sample, or the model overwrites in place what a layer has read.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(chances: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    return _mean_over_samples(
        model, groups, x, batch_size, drawn, lambda gates: gates.square().sum(0) / 2
    )


def taylor(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    x: torch.Tensor,
    seed: int,
    *,
    batch_size: int = BATCH,
) -> Scores:
    """Size of the first-order change of the loss when a channel's gate (see :func:`fisher`) closes, its mean over samples.

    The loss is against the class that the model itself answers, so no labels are needed.
    Source: Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference", arXiv:1611.06440, eq. 7-9.

    Raises:
        ModelError: as :func:`fisher`.
    """
    return _mean_over_samples(
        model, groups, x, batch_size, lambda c: c.argmax(1), lambda gates: gates.abs().sum(0)
    )


def _mean_over_samples(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    x: torch.Tensor,
    batch_size: int,
    label: Callable[[torch.Tensor], torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> Scores:
    """Gate gradients of the loss against ``label`` of the predicted chances, brought together over the samples of a batch by ``total``."""
    if len(x) == 0:
        raise ModelError("scoring channels needs at least 1 sample, but got 0")
    watched = private_copy(model)
    place = device_of(watched)
    totals = {g.name: torch.zeros(g.channels, dtype=torch.float64) for g in groups}
    gates: dict[str, torch.Tensor] = {}
    _watch(watched, groups, gates)
    for batch in torch.split(x, batch_size):
        gates.clear()
        with torch.enable_grad():
            output = as_logits(watched(batch.to(place)), model)
            classes = label(output.detach().softmax(1).cpu()).to(place)
            loss = functional.cross_entropy(output, classes, reduction="sum")
        if loss.requires_grad:
            backward(loss)
        for name, gate in gates.items():
            totals[name] += total(gate)
    return {name: (found / len(x)).numpy() for name, found in totals.items()}


def _watch(
    model: nn.Module, groups: Sequence[ChannelGroup], gates: dict[str, torch.Tensor]
) -> None:
    """Have every backward pass add the gates' gradients ``float64 [N, channels]`` of each group to ``gates``."""
    layers = dict(model.named_modules())
    readers: dict[str, list[tuple[str, Places]]] = {}
    for group in groups:
        for consumer in group.consumers():
            readers.setdefault(consumer.layer, []).append((group.name, places(consumer.indices)))
    for name, reading in readers.items():
        hook = functools.partial(_read, name, reading, gates)
        layers[name].register_forward_pre_hook(hook)


def _read(
    name: str,
    reading: Sequence[tuple[str, Places]],
    gates: dict[str, torch.Tensor],
    layer: nn.Module,
    args: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Hand a view of its own to the layer, so that its gradient is what this layer alone sends back."""
    given = args[0]
    # The first layer in line that is looked at starts the graph: nothing before it needs a gradient.
    seen = given.view_as(given) if given.requires_grad else given.detach().requires_grad_(True)
    version = seen._version

    def collect(gradient: torch.Tensor) -> None:
        if seen._version != version:
            raise ModelError(
                f"the input of layer {name!r} is overwritten in place after it was read",
                hint="write x = relu(x) in place of relu_(x) in the model's forward",
            )
        product = _summed(layer, seen.detach() * gradient).double().cpu()
        for group, where in reading:
            found = by_channel(product, where)
            gates[group] = gates[group] + found if group in gates else found

    seen.register_hook(collect)  # type: ignore[no-untyped-call]
    return (seen, *args[1:])


def _summed(layer: nn.Module, product: torch.Tensor) -> torch.Tensor:
    """Sum ``[N, C, ...]`` (or ``[N, ..., C]`` for linear layers) over positions to ``[N, C]``."""
    if isinstance(layer, nn.Linear):
        return product.flatten(1, -2).sum(1) if product.dim() > 2 else product
    return product.flatten(2).sum(2)


BY_NAME: dict[str, Importance] = {
    "fisher": fisher,
    "hessian": hessian,
    "taylor": taylor,
    "obs": obs,
    "variance": variance,
    "l2": l2,
    "l1": l1,
    "bn-scale": bn_scale,
    "fpgm": fpgm,
    "random": random,
}


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
    is really evaluated twice, at its middle and its smallest width: channels removed, the layers that read them repaired by least squares
    as they will be (:class:`~edgeprune.compress.structure_loss.AfterRepair`), KL divergence from the dense model. The curve is scaled
    through both points (in between, the scale is interpolated over the logarithm of the raw cost).

    Width 0 (the group's block is removed) is a point of its own: the divergence with the branch bypassed and the layers behind it
    repaired. A narrow branch can learn to add nothing, so no width is taken to cost more than that. Where several groups go with the
    block, the first of them bears its cost, and width 0 of the others costs nothing.

    Args:
        model: the dense model in eval mode; not changed.
        groups: what to score.
        scores: one array ``[channels]`` a group.
        grids: admissible widths of each group, ascending, ending with the full width.
        x: calibration inputs ``[N, ...]``; the first half repairs, the second half is evaluated.
        progress: where to show it.

    Returns:
        Group -> ``float64 [len(grid)]``, non-increasing, 0 at full width; at width 0 as said above.
    """
    divergence = AfterRepair(model, groups, x)
    bypasses: dict[str, float] = {}  # by the first group of the block
    curves: dict[str, np.ndarray] = {}
    with (progress or Silent()).bar("calibrating importance", len(groups)) as bar:
        for group in groups:
            order = np.argsort(scores[group.name], kind="stable")
            cumulative = np.concatenate([[0.0], np.cumsum(scores[group.name][order])])
            grid = [w for w in grids[group.name] if w]
            raw = np.array([cumulative[group.channels - w] for w in grid])
            anchors = sorted({grid[0], grid[len(grid) // 2]} - {group.channels})
            measured = []
            for width in anchors:
                found = divergence({group.name: kept_channels(order, width)})
                measured.append((cumulative[group.channels - width], found))
            curves[group.name] = _scaled(raw, measured)
            if 0 in grids[group.name]:
                together = group.removed_with()
                first = together[0]
                if first not in bypasses:
                    bypasses[first] = divergence(dict.fromkeys(together, ()))
                curves[group.name] = _with_bypass(curves[group.name], bypasses[first])
                if group.name != first:
                    curves[group.name][0] = 0.0
            bar.advance(1, group.name)
    return curves


def _with_bypass(curve: np.ndarray, nats: float) -> np.ndarray:
    """The curve with the cost of the bypass in front, and nowhere above it; strictly decreasing still."""
    steps = FLOOR_NATS * np.arange(len(curve) + 1)[::-1]
    capped = np.minimum(np.concatenate([[max(nats, 0.0)], curve]), max(nats, 0.0))
    capped[-1] = 0.0
    lowered: np.ndarray = capped + steps
    return lowered


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
