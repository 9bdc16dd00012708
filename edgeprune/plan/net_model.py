"""The latency model of whole nets: built from the table, fitted to nets that were timed whole, and held against the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edgeprune.devices.timing.measure import compare
from edgeprune.errors import BudgetError
from edgeprune.formats import Kernel, Resizable
from edgeprune.plan.bench import Stand
from edgeprune.plan.latency import call_overhead, weight_traffic
from edgeprune.plan.latency.correct import correct, evaluate
from edgeprune.plan.latency.model import Factor, LatencyModel, sample_nets
from edgeprune.plan.measured import MeasuredNets, MeasuredTable
from edgeprune.plan.table import class_of, removed_together
from edgeprune.records.budget import Budget
from edgeprune.records.plan import LatencyModelQuality
from edgeprune.records.statistics import nearest_rank

NETS_FITTED, NETS_HELD_OUT = 8, 4
N_ENDS = 2  # the dense net and the smallest, which are timed first


def kernel_model(file: Resizable, measured: MeasuredTable, full: Mapping[str, int]) -> LatencyModel:
    """The uncorrected model: the sum of the kernels' fitted tables over the admissible grid.

    The bytes of their weights and the calls of removed kernels are in it too, and count nothing until whole nets show that they do.
    Where a group's width is 0, the kernels of its block take no time, those included whose shape does not follow the group. Of a block
    with several groups this is true of all its kernels only where all groups have width 0.
    """
    removable = removed_together(file, measured.grids)
    quickest_ms = call_overhead.quickest_ms(measured.table)
    factors, constant_ms = [], 0.0
    for kernel in file.kernels:
        table = measured.table.kernel(class_of(kernel, full))
        inside = [together for together in removable if kernel.index in file.blocks[together[0]]]
        # One group of the block says whether it is there: one that the kernel's shape follows anyway, so that tables stay small.
        blocks = [
            g
            for together in inside
            for g in [v for v in kernel.variables if v in together] or together[:1]
        ]
        timed = [[w for w in measured.grids[v] if w] for v in kernel.variables]
        parts = [
            Factor(tuple(kernel.variables[s] for s in slots), ns / 1e6, kernel.op)
            for slots, ns in table.arrays(timed)
        ]
        for part in (*parts, *_traffic(file, kernel, timed)):
            factor = _removable(part, blocks, measured.grids)
            if factor.variables:
                factors.append(factor)
            else:
                constant_ms += float(factor.cost_ms)
        if blocks:
            there = Factor(parts[0].variables, np.ones_like(parts[0].cost_ms))
            gone = _removable(there, blocks, measured.grids)
            factors.append(
                Factor(gone.variables, (1 - gone.cost_ms) * quickest_ms, call_overhead.OP)
            )
    return LatencyModel(
        grids=measured.grids,
        factors=tuple(factors),
        constant_ms=constant_ms,
        class_scales={weight_traffic.OP: 0.0, call_overhead.OP: 0.0},
    )


def _traffic(file: Resizable, kernel: Kernel, grids: Sequence[Sequence[int]]) -> list[Factor]:
    """The bytes of a kernel's weights, in megabytes, as a factor; none where it has no weights."""
    square = [
        v for v, role in zip(kernel.variables, kernel.roles, strict=False) if role == "square"
    ]
    found = weight_traffic.weight_bytes(
        lambda widths: len(file.kernel(kernel.index, widths)),
        dict(zip(kernel.variables, grids, strict=True)),
        square,
    )
    return [] if found is None else [Factor(kernel.variables, found / 1e6, weight_traffic.OP)]


def _removable(factor: Factor, groups: Sequence[str], grids: Mapping[str, Sequence[int]]) -> Factor:
    """The factor with one more choice of each of these groups in front, at which it takes no time."""
    for group in groups:
        if group in factor.variables:
            axis = factor.variables.index(group)
            front = [(int(i == axis), 0) for i in range(len(factor.variables))]
            factor = Factor(factor.variables, np.pad(factor.cost_ms, front), factor.op)
        else:
            is_there = np.arange(len(grids[group])) > 0
            cost = np.multiply.outer(is_there, factor.cost_ms)
            factor = Factor((group, *factor.variables), cost, factor.op)
    return factor


def measure_nets(
    stand: Stand, file: Resizable, grids: Mapping[str, tuple[int, ...]], *, seed: int
) -> MeasuredNets:
    """Time the dense net, the smallest and random ones between, all in the same rounds.

    The times are ratios to the dense net of the same round, times the dense median: regime changes of the board cancel.
    """
    smallest = {g: widths[0] for g, widths in grids.items()}
    together = removed_together(file, grids)
    nets = [smallest, *sample_nets(grids, NETS_FITTED + NETS_HELD_OUT, seed, together)]
    found = stand.measure(
        {"dense": file.resized({}), **{str(i): file.resized(w) for i, w in enumerate(nets)}},
        "nets",
    )
    dense = found["dense"]
    ms = [compare(found[str(i)], dense).ratio * dense.median_ms for i in range(len(nets))]
    full = {g: widths[-1] for g, widths in grids.items()}
    return MeasuredNets(dense_ms=dense.median_ms, widths=(full, *nets), ms=(dense.median_ms, *ms))


def fit(
    model: LatencyModel, nets: MeasuredNets, kernels_measured: int, kernels_taken: int = 0
) -> tuple[LatencyModel, LatencyModelQuality]:
    """Correct the kernel model with whole nets; judge it on those that were held out, then use all."""
    samples = [(w, ms, 1.0) for w, ms in zip(nets.widths, nets.ms, strict=True)]
    fitted, held_out = samples[:-NETS_HELD_OUT], samples[-NETS_HELD_OUT:]
    mean, worst = evaluate(correct(model, fitted), [(w, ms) for w, ms, _ in held_out])
    # Without the dense or the smallest net the others are no frame: what lies outside is never predicted.
    each = [
        evaluate(correct(model, samples[:i] + samples[i + 1 :]), [samples[i]])[0]
        for i in range(N_ENDS, len(samples))
    ]
    quality = LatencyModelQuality(
        kernels_measured=kernels_measured,
        nets_fitted=len(fitted),
        nets_held_out=len(held_out),
        mean_error_ratio=mean,
        worst_error_ratio=worst,
        p95_error_ratio=nearest_rank(each, 0.95),
        kernels_taken=kernels_taken,
    )
    return correct(model, samples), quality


def check_budget(budget: Budget, nets: MeasuredNets) -> None:
    """Raise unless the fastest net that was measured is within the budget.

    Raises:
        BudgetError: it is not; names the fastest admissible latency. Nothing was trained yet.
    """
    limit_ms, fastest_ms = budget.limit_ms(nets.dense_ms), min(nets.ms)
    if fastest_ms > limit_ms:
        share = fastest_ms / nets.dense_ms
        raise BudgetError(
            f"the budget {budget.text} ({limit_ms:.4g} ms) is below the fastest admissible latency,"
            f" {fastest_ms:.4g} ms ({share:.1%} of dense)",
            hint=f"ask for at least {math.ceil(share * 100) + 1}%",
        )
