"""The score that needs second derivatives: the diagonal of the Hessian of the divergence from the dense model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compress.evaluate import backward, private_copy
from edgeprune.compress.groups.surgery import ChannelGroup
from edgeprune.compress.scores.weights import Places, Scores, places
from edgeprune.errors import ModelError
from edgeprune.workload.answers import BATCH, device_of
from edgeprune.workload.outputs import as_logits

PROBES = 64  # random directions over the whole of the data: the score of a channel is known to about 1 / sqrt(PROBES) of its row
STEP = 0.01  # of the difference, in gates: float32 gradients keep four digits, and few units change their side

Reading = Sequence[tuple[str, Places]]


def hessian(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    x: Tensor,
    seed: int,
    *,
    batch_size: int = BATCH,
    probes: int = PROBES,
) -> Scores:
    """Half the second derivative, by each channel's gate, of the divergence in nats from what the model says with all gates open.

    A gate ``z_c = 1`` multiplies the channel where its consumers read it. The first derivative of the divergence is 0 there, so closing a
    gate costs ``H_cc / 2`` to second order. :func:`~edgeprune.compress.scores.importance.fisher` is the part of it that comes from the
    answers; this has the curvature of the net itself, too, and no noise from drawn classes, but that of the directions: the diagonal is the
    mean of ``v * H v`` over random signs ``v``. ``H v`` is a central difference of gradients, so that a model needs first derivatives
    alone; the gradient is near 0 on both sides, so a kink that lies between adds little. A channel whose estimate is below 0 scores 0.
    Source: Bekas et al. 2007, "An estimator for the diagonal of a matrix", eq. 1; for pruning by curvature: LeCun et al. 1989, "Optimal
    brain damage", and Yu et al. 2022, "Hessian-aware pruning and optimal neural implant", arXiv:2101.08940.

    Args:
        model: not changed; it runs in eval mode.
        groups: what to score.
        x: inputs, ``[N, ...]``.
        seed: for the directions.
        batch_size: samples a pass.
        probes: directions in all, spread over the batches, at least one each.

    Raises:
        ModelError: as :func:`~edgeprune.compress.scores.importance.fisher`.
    """
    if len(x) == 0:
        raise ModelError("scoring channels needs at least 1 sample, but got 0")
    watched = private_copy(model)
    place = device_of(watched)
    gates = {g.name: torch.ones(g.channels, device=place, requires_grad=True) for g in groups}
    _gate(watched, groups, gates)
    generator = torch.Generator().manual_seed(seed)
    totals = {name: torch.zeros(len(gate), dtype=torch.float64) for name, gate in gates.items()}
    batches = torch.split(x, batch_size)
    turns = -(-probes // len(batches))
    for batch in batches:
        found = _diagonal(watched, batch.to(place), gates, generator, turns)
        for name, values in found.items():
            totals[name] += values * len(batch)
    return {name: (total / len(x) / 2).clamp_min(0).numpy() for name, total in totals.items()}


def _diagonal(
    model: nn.Module,
    x: Tensor,
    gates: Mapping[str, Tensor],
    generator: torch.Generator,
    turns: int,
) -> dict[str, Tensor]:
    """Estimate of the Hessian's diagonal at open gates, of the mean divergence of one batch."""
    found = {name: torch.zeros(len(gate), dtype=torch.float64) for name, gate in gates.items()}
    with torch.no_grad():
        dense = as_logits(model(x), model).log_softmax(1)
    for _ in range(turns):
        signs = {
            name: (torch.randint(0, 2, gate.shape, generator=generator) * 2.0 - 1).to(gate.device)
            for name, gate in gates.items()
        }
        ahead, behind = (
            _slopes(model, x, dense, gates, {n: STEP * side * s for n, s in signs.items()})
            for side in (1, -1)
        )
        for name, sign in signs.items():
            row = (ahead[name] - behind[name]) / (2 * STEP)
            found[name] += (sign * row).double().cpu() / turns
    return found


def _slopes(
    model: nn.Module,
    x: Tensor,
    dense: Tensor,
    gates: Mapping[str, Tensor],
    shift: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients by the gates, each opened by ``1 + shift``."""
    for name, gate in gates.items():
        gate.data = 1 + shift[name]
        gate.grad = None
    with torch.enable_grad():
        said = as_logits(model(x), model).log_softmax(1)
        loss = functional.kl_div(said, dense, reduction="batchmean", log_target=True)
    if loss.requires_grad:
        backward(loss)
    return {n: torch.zeros_like(g) if g.grad is None else g.grad for n, g in gates.items()}


def _gate(model: nn.Module, groups: Sequence[ChannelGroup], gates: Mapping[str, Tensor]) -> None:
    """Have every consumer read its channels times their gates."""
    layers = dict(model.named_modules())
    pairs = ((c.layer, (g.name, places(c.indices))) for g in groups for c in g.consumers())
    by_layer = itertools.groupby(sorted(pairs, key=lambda p: p[0]), key=lambda p: p[0])
    for name, reading in by_layer:
        hook = functools.partial(_multiplied, [r for _, r in reading], gates)
        layers[name].register_forward_pre_hook(hook)


def _multiplied(
    reading: Reading, gates: Mapping[str, Tensor], layer: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    given = args[0]
    axis = given.dim() - 1 if isinstance(layer, nn.Linear) else 1
    shape = [1] * given.dim()
    shape[axis] = given.shape[axis]
    for name, (index, channel, _) in reading:
        gate = gates[name]
        full = torch.ones(given.shape[axis], device=gate.device)
        # Each input of a layer belongs to one channel at most, so that nothing is added twice.
        full = full.index_add(0, index.to(gate.device), gate[channel.to(gate.device)] - 1)
        given = given * full.view(shape)
    return (given, *args[1:])
