"""What can be repaired without a gradient step: layer-wise least squares and fresh batch-norm statistics.

A layer that lost input channels can often make up for them with the channels it kept. Front to back, each such layer gets the weights
that bring its output closest to the dense layer's, on the inputs that it really sees in the (already repaired) pruned model.

Notation: ``N`` samples, ``P`` sampled output positions a sample, ``T`` input taps (input channels x kernel area), ``O`` output channels.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from edgeprune.compress.evaluate import device_of, kl_nats, logits, run_once
from edgeprune.compress.inputs import batches
from edgeprune.compress.least_squares import Layer, LayerFit, as_positions, input_rows, refit
from edgeprune.compress.surgery import Removed
from edgeprune.errors import ModelError
from edgeprune.progress import Progress, Silent

MIN_SAMPLES = 10  # a fifth of them must be enough to judge by
ROWS_PER_TAP = 16  # beyond this the Gram matrix costs more than its noise is worth
MIN_ROWS, MAX_ROWS = 4096, 24_576
MAX_CACHE_BYTES = 500 * 1024**2  # of dense outputs
MAX_ACTIVATION_BYTES = 1536 * 1024**2  # of the one pass that holds all samples at once
MAX_INPUTS, POSITIONS, RIDGE = 2304, 64, 1e-2  # see compensate
LIVE_ACTIVATIONS = 4  # tensors of the largest size that a residual block holds at its widest point
Solve: TypeAlias = Callable[..., LayerFit | str]  # as refit


@dataclass(frozen=True)
class CompensationReport:
    """What the repair did, and whether it was kept. Divergences are KL(dense || model) in nats on held-out samples."""

    fitted: tuple[LayerFit, ...]
    skipped: tuple[tuple[str, str], ...]  # (layer, reason)
    kl_pruned: float
    kl_recalibrated: float
    kl_compensated: float
    used: bool
    n_samples: int
    seconds: float
    note: str


@dataclass(frozen=True)
class _Site:
    """A layer to repair: which dense outputs it must reproduce, and how many positions a sample are looked at."""

    name: str
    taps: int
    outputs: tuple[int, ...]
    positions: int
    total_positions: int
    centred: bool


@dataclass(frozen=True)
class _Seen:
    """What a probe run saw of one layer."""

    positions: int
    normalised: bool


def recalibrate_batchnorm(model: nn.Module, x: Tensor, *, batch_size: int = 128) -> nn.Module:
    """A copy of the model, in eval mode, whose batch-norm statistics are those of ``x``.

    Every batch weighs the same (cumulative averaging). Dropout and all else stay in eval mode; a model without batch norm comes back
    as a plain copy.

    Args:
        model: not changed.
        x: ``[N, ...]`` prepared inputs, at least 2.
        batch_size: largest batch; batches are equal to within one sample, because a batch of one has no variance.

    Raises:
        ModelError: fewer than two samples.
    """
    fresh = copy.deepcopy(model).eval()
    momenta = _open_batchnorm(fresh)
    if not momenta:
        return fresh
    if len(x) < 2:
        raise ModelError(f"batch-norm statistics need at least 2 samples, but there are {len(x)}")
    place = device_of(fresh)
    n_batches = len(list(batches(len(x), batch_size, x[0].numel())))
    with torch.no_grad():
        for part in x.tensor_split(min(n_batches, len(x) // 2)):
            fresh(part.to(place))
    _close_batchnorm(momenta)
    return fresh


def _open_batchnorm(model: nn.Module) -> list[tuple[_BatchNorm, float | None]]:
    """Reset and open the statistics of every batch norm that has them; the momenta go back by :func:`_close_batchnorm`."""
    found = []
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            found.append((module, module.momentum))
            module.reset_running_stats()
            module.momentum = None  # torch's word for a cumulative average
            module.train()
    return found


def _close_batchnorm(momenta: list[tuple[_BatchNorm, float | None]]) -> None:
    for module, momentum in momenta:
        module.momentum = momentum
        module.eval()


def compensate(
    pruned: nn.Module,
    dense: nn.Module,
    kept_outputs: Mapping[str, tuple[int, ...]],
    x: Tensor,
    *,
    progress: Progress,
    max_inputs: int = MAX_INPUTS,
    positions: int = POSITIONS,
    ridge: float = RIDGE,
) -> tuple[nn.Module, CompensationReport]:
    """The pruned model with repaired weights and fresh batch-norm statistics, if that beats fresh statistics alone.

    Each convolution without groups and each linear layer that lost inputs, or runs behind a removed block, solves
    ``min |X W' - Y|^2 + l |W - W_now|^2`` with ``l = ridge * mean diag(X'X)``: ``X`` its inputs in the pruned model, repaired so far, and
    ``Y`` the dense layer's outputs at the same places. Means are left out where a bias or a batch norm takes them up.

    Args:
        pruned: the pruned model; layers have the names of the dense model. Not changed.
        dense: the model before pruning. Not changed.
        kept_outputs: for each layer whose outputs were pruned, the dense channels that are left, in order.
        x: ``[N, ...]`` prepared inputs, at least 10; the last fifth is held out to judge the repair.
        progress: shown while solving.
        max_inputs: layers with more input taps than this are skipped (the solve grows with the cube).
        positions: output positions looked at in each sample, at most.
        ridge: pull toward the present weights.

    Raises:
        ModelError: too few samples, or ``kept_outputs`` does not fit the layers.

    Source: least-squares reconstruction on sampled patches as in https://arxiv.org/abs/1707.06168 (read 2026-11-22); the pull toward the
    present weights in place of toward zero is ours.
    """
    started = time.monotonic()
    if len(x) < MIN_SAMPLES:
        raise ModelError(f"compensation needs at least {MIN_SAMPLES} samples, but got {len(x)}")
    cut = len(x) - len(x) // 5
    fit, held_out = x[:cut], x[cut:]
    reference = logits(dense, held_out)
    recalibrated = recalibrate_batchnorm(pruned, fit)
    kl_pruned = kl_nats(reference, logits(pruned, held_out))
    kl_recalibrated = kl_nats(reference, logits(recalibrated, held_out))

    solved, fitted, skipped, n_samples = _solved(
        pruned, dense, kept_outputs, fit, max_inputs, positions, ridge, progress
    )
    kl_compensated, repaired = kl_recalibrated, recalibrated
    if solved is not None:
        repaired = recalibrate_batchnorm(solved, fit)
        kl_compensated = kl_nats(reference, logits(repaired, held_out))
    used = kl_compensated < kl_recalibrated
    report = CompensationReport(
        fitted=fitted,
        skipped=tuple(skipped),
        kl_pruned=kl_pruned,
        kl_recalibrated=kl_recalibrated,
        kl_compensated=kl_compensated,
        used=used,
        n_samples=n_samples,
        seconds=time.monotonic() - started,
        note=_note(bool(fitted), used, kl_recalibrated, kl_compensated),
    )
    return (repaired if used else recalibrated), report


def repaired(
    pruned: nn.Module, dense: nn.Module, kept_outputs: Mapping[str, tuple[int, ...]], x: Tensor
) -> nn.Module:
    """The pruned model after the repair of :func:`compensate`, with its defaults, for a caller who judges it on other samples."""
    solved, *_, count = _solved(
        pruned, dense, kept_outputs, x, MAX_INPUTS, POSITIONS, RIDGE, Silent()
    )
    if solved is not None and count == len(x):
        return solved  # the pass that solved it has seen all samples, and left their statistics
    return recalibrate_batchnorm(pruned if solved is None else solved, x)


def solved_in_order(
    model: nn.Module, names: Collection[str], x: Tensor, solve: Solve, *, progress: Progress
) -> tuple[nn.Module, tuple[LayerFit, ...]]:
    """A copy of the model whose named layers are solved front to back, each to give again what it gave, on what then reaches it.

    Layers that do not run exactly once, or have too many input taps, keep their weights. Statistics of batch norms are not renewed.

    Args:
        model: not changed.
        names: convolutions without groups, and linear layers.
        x: ``[N, ...]`` prepared inputs; fewer are used where they would not fit the memory.
        solve: as :func:`edgeprune.compress.least_squares.refit`.
        progress: shown while solving.
    """
    x = x[: _samples_that_fit(model, x)]
    layers = dict(model.named_modules())
    sites = []
    for name, seen in _probe(model, x[:2]).items():
        layer = layers[name]
        if name not in names or _reason_to_skip(layer, seen, MAX_INPUTS):
            continue
        rows = _rows_wanted(layer, seen.positions, len(x), POSITIONS)
        outputs, centred = range(len(layer.weight)), layer.bias is not None or seen.normalised
        sites.append(
            _Site(name, _taps(layer), tuple(outputs), rows // len(x), seen.positions, centred)
        )
    targets = _dense_targets(model, sites, x)
    solved, fitted, _ = _solve_in_order(model, sites, targets, x, RIDGE, progress, solve)
    return solved, fitted


def _solved(
    pruned: nn.Module,
    dense: nn.Module,
    kept_outputs: Mapping[str, tuple[int, ...]],
    x: Tensor,
    max_inputs: int,
    positions: int,
    ridge: float,
    progress: Progress,
) -> tuple[nn.Module | None, tuple[LayerFit, ...], list[tuple[str, str]], int]:
    """The model with its layers refitted (``None`` if none can be), what was fitted, what was skipped and why, and on how many samples."""
    x = x[: _samples_that_fit(pruned, x)]
    sites, skipped = _sites(pruned, dense, kept_outputs, x, max_inputs, positions)
    if not sites:
        return None, (), skipped, len(x)
    targets = _dense_targets(dense, sites, x)
    solved, fitted, unsolved = _solve_in_order(pruned, sites, targets, x, ridge, progress)
    return solved, fitted, [*skipped, *unsolved], len(x)


def _note(any_fitted: bool, used: bool, kl_recalibrated: float, kl_compensated: float) -> str:
    if not any_fitted:
        return "no layer could be repaired; batch-norm statistics are fresh"
    change = f"{kl_recalibrated:.4f} to {kl_compensated:.4f} nats on held-out samples"
    if used:
        return f"least squares changed the divergence from {change}"
    return f"least squares was not kept: it would have changed the divergence from {change}"


def _samples_that_fit(model: nn.Module, x: Tensor) -> int:
    """How many samples can be held at one layer at once within the memory bound."""
    largest = 0

    def note_size(module: nn.Module, args: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output[:1].numel() * 4)

    run_once(model, x[:1], [m.register_forward_hook(note_size) for m in model.modules()])
    return max(2, min(len(x), MAX_ACTIVATION_BYTES // max(1, LIVE_ACTIVATIONS * largest)))


def _sites(
    pruned: nn.Module,
    dense: nn.Module,
    kept_outputs: Mapping[str, tuple[int, ...]],
    x: Tensor,
    max_inputs: int,
    positions: int,
) -> tuple[list[_Site], list[tuple[str, str]]]:
    """Layers that lost inputs or read others, in execution order, and those left alone with the reason."""
    seen = _probe(pruned, x[:2])
    behind = _behind_removed(pruned, x[:2])
    chosen: list[_Site] = []
    skipped: list[tuple[str, str]] = []
    for name, layer, original in _narrowed(pruned, dense, list(seen), behind):
        reason = _reason_to_skip(layer, seen.get(name), max_inputs)
        rows = 0 if reason else _rows_wanted(layer, seen[name].positions, len(x), positions)
        if not reason and rows < 2 * _taps(layer):
            reason = f"{rows} rows are too few for {_taps(layer)} input taps"
        if reason:
            skipped.append((name, reason))
            continue
        chosen.append(
            _Site(
                name=name,
                taps=_taps(layer),
                outputs=_outputs(name, layer, original, kept_outputs),
                positions=rows // len(x),
                total_positions=seen[name].positions,
                centred=layer.bias is not None or seen[name].normalised,
            )
        )
    return _within_cache(chosen, len(x)), skipped


def _behind_removed(model: nn.Module, x: Tensor) -> set[str]:
    """Layers that run after a removed block: what they read is not what it was."""
    removed = [m for m in model.modules() if isinstance(m, Removed)]
    if not removed:
        return set()
    passed: list[nn.Module] = []
    behind: set[str] = set()

    def note_layer(name: str) -> None:
        if passed:
            behind.add(name)

    handles = [m.register_forward_hook(lambda m, _, out: passed.append(m)) for m in removed]
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(lambda *_, n=name: note_layer(n)))
    run_once(model, x, handles)
    return behind


def _narrowed(
    pruned: nn.Module, dense: nn.Module, ran: list[str], behind: set[str]
) -> Iterator[tuple[str, Layer, Layer]]:
    """Layers with fewer inputs than in the dense model, or in ``behind``: first those that ran, in that order, then the others."""
    layers, originals = dict(pruned.named_modules()), dict(dense.named_modules())
    for name in dict.fromkeys([*ran, *layers]):
        layer, original = layers[name], originals.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if not isinstance(original, nn.Conv2d | nn.Linear):
            continue
        if name in behind or layer.weight.shape[1] != original.weight.shape[1]:
            yield name, layer, original


def _reason_to_skip(layer: Layer, seen: _Seen | None, max_inputs: int) -> str:
    if parametrize.is_parametrized(layer):
        return "its weight is computed by a parametrisation"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return "a subclass may compute something else than its parent"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return "grouped convolution"
    if seen is None:
        return "it does not run exactly once on one tensor of all samples"
    if _taps(layer) > max_inputs:
        return f"{_taps(layer)} input taps are over the limit of {max_inputs}"
    return ""


def _taps(layer: Layer) -> int:
    return int(layer.weight[0].numel())


def _outputs(
    name: str,
    layer: Layer,
    original: Layer,
    kept_outputs: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...]:
    n_dense, n_left = len(original.weight), len(layer.weight)
    kept = tuple(kept_outputs.get(name, range(n_dense)))
    if len(kept) != n_left or any(not 0 <= channel < n_dense for channel in kept):
        raise ModelError(
            f"kept_outputs of {name!r} must name {n_left} of {n_dense} channels, but names {len(kept)}"
        )
    return kept


def _rows_wanted(layer: Layer, total_positions: int, n_samples: int, positions: int) -> int:
    target = min(max(ROWS_PER_TAP * _taps(layer), MIN_ROWS), MAX_ROWS)
    each = min(math.ceil(target / n_samples), positions, total_positions)
    return each * n_samples


def _within_cache(sites: list[_Site], n_samples: int) -> list[_Site]:
    """The sites with fewer positions where all dense outputs together would not fit the cache."""
    wanted = sum(4 * n_samples * site.positions * len(site.outputs) for site in sites)
    if wanted <= MAX_CACHE_BYTES:
        return sites
    share = MAX_CACHE_BYTES / wanted
    return [replace(site, positions=max(1, int(site.positions * share))) for site in sites]


def _probe(model: nn.Module, x: Tensor) -> dict[str, _Seen]:
    """Layers that run exactly once, on one tensor of all samples, in the order they run."""
    outputs: dict[str, Tensor] = {}
    normalised: set[int] = set()
    unusual: set[str] = set()

    def note_layer(name: str, args: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and name not in outputs:
            outputs[name] = output
        else:
            unusual.add(name)
        if len(args) != 1 or not isinstance(args[0], Tensor) or len(args[0]) != len(x):
            unusual.add(name)

    def note_norm(module: nn.Module, args: tuple[object, ...]) -> None:
        normalised.update(id(arg) for arg in args)

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hook = functools.partial(note_layer, name)
            handles.append(module.register_forward_hook(lambda _, args, out, h=hook: h(args, out)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(note_norm))
    run_once(model, x, handles)
    # All outputs are alive until here, so an id names one tensor.
    layers = dict(model.named_modules())
    return {
        name: _Seen(as_positions(layers[name], output).shape[1], id(output) in normalised)
        for name, output in outputs.items()
        if name not in unusual
    }


def _dense_targets(
    dense: nn.Module, sites: list[_Site], x: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site the sampled positions ``int64 [N, P]`` and the dense outputs there ``[N * P, O]``."""
    layers = dict(dense.named_modules())
    drawn: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}

    def keep(site: _Site, generator: torch.Generator, layer: nn.Module, output: Tensor) -> None:
        values = as_positions(layer, output)
        where = _positions(len(values), site, generator).to(values.device)
        rows = values.gather(1, where[..., None].expand(-1, -1, values.shape[2]))
        outputs = torch.tensor(site.outputs, device=values.device)
        drawn[site.name].append((where, rows.index_select(2, outputs).flatten(0, 1)))

    handles = []
    for number, site in enumerate(sites):
        hook = functools.partial(keep, site, torch.Generator().manual_seed(number))
        handles.append(layers[site.name].register_forward_hook(lambda m, _, out, h=hook: h(m, out)))
    run_once(dense, x, handles, last=sites[-1].name if sites else "")
    return {
        name: (torch.cat([where for where, _ in parts]), torch.cat([rows for _, rows in parts]))
        for name, parts in drawn.items()
    }


def _positions(n: int, site: _Site, generator: torch.Generator) -> Tensor:
    if site.positions == site.total_positions:
        return torch.arange(site.total_positions).expand(n, -1)
    return torch.randint(site.total_positions, (n, site.positions), generator=generator)


def _solve_in_order(
    pruned: nn.Module,
    sites: list[_Site],
    targets: dict[str, tuple[Tensor, Tensor]],
    x: Tensor,
    ridge: float,
    progress: Progress,
    solve: Solve = refit,
) -> tuple[nn.Module, tuple[LayerFit, ...], list[tuple[str, str]]]:
    """A copy of ``pruned`` with repaired weights, from one pass of all samples.

    Just before a layer runs, a hook solves for its weights on the input that has arrived. Batch norms use the statistics of the same
    pass, so every layer sees what it will see in the finished model.
    """
    model = copy.deepcopy(pruned).eval()
    _open_batchnorm(model)
    layers = dict(model.named_modules())
    fitted: list[LayerFit] = []
    unsolved: list[tuple[str, str]] = []
    with progress.bar("compensating", len(sites)) as bar, torch.no_grad():

        def repair(site: _Site, layer: Layer, x: Tensor) -> None:
            where, wanted = targets.pop(site.name)
            rows = input_rows(layer, x, where)
            found = solve(site.name, layer, rows, wanted, ridge=ridge, centred=site.centred)
            if isinstance(found, LayerFit):
                fitted.append(found)
            else:
                unsolved.append((site.name, found))
            bar.advance(1, note=site.name)

        for site in sites:
            hook = functools.partial(repair, site)
            layers[site.name].register_forward_pre_hook(lambda m, args, h=hook: h(m, args[0]))
        model(x.to(device_of(model)))
    solved = copy.deepcopy(pruned).eval()
    solved.load_state_dict(model.state_dict())
    return solved, tuple(fitted), unsolved
