"""How much each channel matters: plain functions from a model and data to one score per channel of every group.

An importance is any callable with the signature of :data:`Importance`; pass your own. Scores of :func:`fisher` are in nats of predicted
loss; :func:`cost_curves` turns scores into the cost of keeping each width and calibrates it against real evaluations.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgeprune.compress.compensate import recalibrate_batchnorm
from edgeprune.compress.evaluate import BATCH, device_of, kl_nats, logits
from edgeprune.compress.surgery import ChannelGroup, weights_by_input, zero_channels
from edgeprune.errors import ModelError
from edgeprune.progress import Progress, Silent

Scores = dict[str, np.ndarray]
Importance = Callable[[nn.Module, Sequence[ChannelGroup], torch.Tensor, int], Scores]

Places = tuple[
    torch.Tensor, torch.Tensor, int
]  # input indices, channel of each, number of channels

# A curve stays strictly decreasing, so that a free channel is still the last to come back.
FLOOR_NATS = 1e-9
UNUSABLE_NATS = 1e3  # the cost of a width at which the model says NaN: finite, and never worth it


def random(model: nn.Module, groups: Sequence[ChannelGroup], x: torch.Tensor, seed: int) -> Scores:
    """A control: uniform random scores."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.channels) for group in groups}


def l2(model: nn.Module, groups: Sequence[ChannelGroup], x: torch.Tensor, seed: int) -> Scores:
    """Squared norm of the weights that read each channel, over all consumers."""
    layers = dict(model.named_modules())
    scores: Scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for consumer in group.consumers():
            weights = weights_by_input(layers[consumer.layer]).detach()
            energy = weights.double().square().sum((1, 3)).flatten().cpu()
            total += _by_channel(energy[None], _places(consumer.indices))[0]
        scores[group.name] = total.numpy()
    return scores


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
    if len(x) == 0:
        raise ModelError("scoring channels needs at least 1 sample, but got 0")
    watched = _private_copy(model)
    place = device_of(watched)
    generator = torch.Generator().manual_seed(seed)
    totals = {g.name: torch.zeros(g.channels, dtype=torch.float64) for g in groups}
    gates: dict[str, torch.Tensor] = {}
    _watch(watched, groups, gates)
    for batch in torch.split(x, batch_size):
        gates.clear()
        with torch.enable_grad():
            output = watched(batch.to(place))
            chances = output.detach().softmax(1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(place)
            loss = functional.cross_entropy(output, drawn, reduction="sum")
        if loss.requires_grad:
            _backward(loss)
        for name, gate in gates.items():
            totals[name] += gate.square().sum(0) / 2
    return {name: (total / len(x)).numpy() for name, total in totals.items()}


def _backward(loss: torch.Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be differentiated: {str(error).splitlines()[0][:200]}",
            hint="write x = relu(x) in place of relu_(x) in the model's forward",
        ) from error


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy that may be hooked: parameters want no gradient (activations do), and nothing overwrites what another layer has read."""
    watched = copy.deepcopy(model).eval().requires_grad_(False)
    for module in watched.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    return watched


def _watch(
    model: nn.Module, groups: Sequence[ChannelGroup], gates: dict[str, torch.Tensor]
) -> None:
    """Have every backward pass add the gates' gradients ``float64 [N, channels]`` of each group to ``gates``."""
    layers = dict(model.named_modules())
    readers: dict[str, list[tuple[str, Places]]] = {}
    for group in groups:
        for consumer in group.consumers():
            readers.setdefault(consumer.layer, []).append((group.name, _places(consumer.indices)))
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
        for group, places in reading:
            found = _by_channel(product, places)
            gates[group] = gates[group] + found if group in gates else found

    seen.register_hook(collect)  # type: ignore[no-untyped-call]
    return (seen, *args[1:])


def _places(indices: Sequence[Sequence[int]]) -> Places:
    """Where a consumer reads the channels of a group: input indices, and the channel of each; a channel may have any number."""
    pairs = [(index, channel) for channel, own in enumerate(indices) for index in own]
    flat = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return flat[:, 0], flat[:, 1], len(indices)


def _by_channel(values: torch.Tensor, places: Places) -> torch.Tensor:
    """Sum ``[N, inputs]`` to ``[N, channels]``."""
    index, channel, n = places
    return values.new_zeros(len(values), n).index_add_(1, channel, values[:, index])


def _summed(layer: nn.Module, product: torch.Tensor) -> torch.Tensor:
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
                found = found if math.isfinite(found) else UNUSABLE_NATS
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
