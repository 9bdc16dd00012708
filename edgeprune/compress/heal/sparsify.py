"""Bring 2:4 sparsity into a trained model at the least cost that is possible without a gradient step.

Notation: ``T`` input taps (input channels x kernel area), ``O`` output channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.compress.heal import two_of_four
from edgeprune.compress.readings import Layer
from edgeprune.compress.repair.compensate import MIN_SAMPLES, solved_in_order
from edgeprune.compress.repair.least_squares import LayerFit, RowSums, set_weight
from edgeprune.compress.repair.norm_statistics import best, held_back, judged
from edgeprune.errors import ModelError
from edgeprune.progress import Progress

MAX_SOLVE_BYTES = 256 * 1024**2  # of the systems that are solved at once


@dataclass(frozen=True)
class Sparsified:
    """What the pattern cost. Divergences are KL(model before || model after) in nats on held-out samples."""

    layers: tuple[str, ...]
    kl_masked: float  # smallest magnitudes set to zero, with the best statistics of batch norms
    kl_refitted: float  # the same, with the weights that stay fitted again
    refitted: bool  # whether that was taken
    note: str


def sparsified(model: nn.Module, x: Tensor, *, progress: Progress) -> tuple[nn.Module, Sparsified]:
    """A copy of the model with 2:4 sparse weights in every eligible layer, and the batch-norm statistics that suit it.

    Each layer keeps the larger two weights of each group of four. Front to back, those are fitted again, so that the layer gives what it
    gave before on the inputs that it now gets from the layers in front. Where that diverges more on held-out samples, it is not kept.

    Args:
        model: in eval mode; not changed.
        x: ``[N, ...]`` prepared inputs in a fair order, at least 10; the last fifth is held out.
        progress: shown while solving.

    Raises:
        ModelError: no layer is eligible, or too few samples.
    """
    names = tuple(two_of_four.require_eligible(model))
    if len(x) < MIN_SAMPLES:
        raise ModelError(f"2:4 sparsity needs at least {MIN_SAMPLES} samples, but got {len(x)}")
    fit, held_out = held_back(x, model)
    plain = best(judged(masked_by_magnitude(model), fit, held_out))
    solved, _ = solved_in_order(model, names, fit, _solve, progress=progress)
    two_of_four.masked(solved)  # also the layers that could not be solved
    fitted = best(judged(solved, fit, held_out))
    kl_masked, kl_refitted = plain.nats, fitted.nats
    refitted = kl_refitted < kl_masked
    taken = f"{kl_refitted:.4f} with the weights that stay fitted again"
    if not refitted:
        taken = f"fitting the weights that stay again was not kept: {kl_refitted:.4f}"
    note = f"2:4 sparse in {len(names)} layers; masked by magnitude {kl_masked:.4f} nats, {taken}"
    found = Sparsified(names, kl_masked, kl_refitted, refitted, note)
    return (fitted if refitted else plain).model, found


def masked_by_magnitude(model: nn.Module) -> nn.Module:
    """A copy of the model with 2:4 sparse weights in every eligible layer, the smaller ones being set to zero.

    Raises:
        ModelError: no layer is eligible.
    """
    two_of_four.require_eligible(model)
    copied = copy.deepcopy(model)
    two_of_four.masked(copied)
    return copied


@torch.no_grad()
def _solve(name: str, layer: Layer, sums: RowSums, *, ridge: float) -> LayerFit | str:
    """Mask a layer and fit what stays; arguments and answer as of :func:`edgeprune.compress.repair.least_squares.refit`."""
    kept = two_of_four.mask_of(layer.weight)
    found = sums.equations(ridge)
    if found is None:
        return "its inputs or the dense outputs do not vary"
    now = layer.weight.flatten(1).double()
    solved = _restricted(found.gram, found.cross.T + found.pull * now, found.pull, kept.flatten(1))
    if solved is None:
        return "its least-squares problem has no stable solution"
    before, after = found.missed(now.T), found.missed(solved.T)
    set_weight(layer, solved.T, sums)
    return LayerFit(name, now.shape[1], sums.rows, before, after)


def _restricted(gram: Tensor, wanted: Tensor, pull: float, kept: Tensor) -> Tensor | None:
    """Rows ``w`` that solve ``(gram + pull I) w = wanted`` on their kept taps alone and are zero elsewhere, ``float64 [O, T]``.

    Args:
        gram: ``float64 [T, T]``.
        wanted: ``float64 [O, T]``.
        pull: added to the diagonal.
        kept: ``bool [O, T]``, as many ``True`` in every row.
    """
    count = int(kept[0].sum())
    taps = kept.nonzero()[:, 1].reshape(len(kept), count)
    damped = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    best = torch.zeros_like(wanted)
    at_once = max(1, MAX_SOLVE_BYTES // (8 * count * count))
    for rows in torch.split(torch.arange(len(kept), device=kept.device), at_once):
        own = taps[rows]
        factor, failed = torch.linalg.cholesky_ex(damped[own[:, :, None], own[:, None, :]])
        solved = torch.cholesky_solve(wanted[rows].gather(1, own)[..., None], factor)[..., 0]
        if bool(failed.any()) or not bool(solved.isfinite().all()):
            return None
        best[rows] = torch.zeros_like(wanted[rows]).scatter(1, own, solved)
    return best
