"""From a board and an exported file to a plan that was measured: latency table, corrected model, solve, check, correct, again.

Everything here happens before any training: latency does not depend on what the weights are, so structures are timed with the dense
file's own leading channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune import search
from edgeprune.compress.groups import ChannelGroup
from edgeprune.compress.importance import kept_channels
from edgeprune.devices.board import Board
from edgeprune.devices.measure import ModelFile, compare, measure
from edgeprune.devices.plans import SEARCH
from edgeprune.devices.pool import Pool
from edgeprune.errors import BudgetError
from edgeprune.formats import Kernel, Resizable
from edgeprune.latency.grid import admissible, candidate_widths, thin
from edgeprune.latency.predictor import Factor, LatencyModel, correct, evaluate, sample_nets
from edgeprune.latency.table import LatencyTable, probe_points, tabulate
from edgeprune.progress import Progress
from edgeprune.records import sha256_bytes
from edgeprune.results import (
    FrozenGroup,
    GroupPlan,
    LatencyModelQuality,
    Measurement,
    PlanCheck,
    PruningPlan,
)
from edgeprune.search import Problem, Solution
from edgeprune.specs import Budget, FormatName, Precision, Runtime
from edgeprune.stage_records import MeasuredNets, MeasuredTable, PlanResult, Staircase

FINEST_STEP = 4  # no kernel library rounds channels to less than 4 (MLAS and NEON fp32 vectors)
WIDTH_TOLERANCE = (
    0.02  # kernels repeat to 0.6-1.7 % (measured by this project); closer widths count as equal
)
NETS_FITTED, NETS_HELD_OUT = 8, 4
CHECK_ROUNDS = 6
PROBE_SEED = 0
UNKNOWN_NS = 1.0
# A plan must fit into this much of the budget: the last measurement is another session.
PLAN_SHARE = 0.995
TWO_SIDED = 0.90  # so that the upper end of an interval is an upper bound of 95 %
CLOSE_ENOUGH = 0.97  # stop when the measured latency uses this much of the budget


@dataclass(frozen=True)
class Stand:
    """Where and how the candidate files run. Single kernels may be timed on other boards of the class too: those of ``pool``."""

    board: Board
    runtime: Runtime
    precision: Precision
    pool: Pool | None = None

    def measure(self, files: Mapping[str, bytes], purpose: str) -> dict[str, Measurement]:
        """Interleaved measurements of whole files, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        models = [ModelFile(n, c, self.precision, sha256_bytes(c)) for n, c in files.items()]
        found = measure(
            self.board,
            models,
            runtime=self.runtime.name,
            threads=self.runtime.threads,
            plan=SEARCH,
            purpose=purpose,
        )
        return {m.name: m for m in found}

    def kernels(
        self, files: Mapping[str, bytes], progress: Progress, purpose: str
    ) -> dict[str, float]:
        """Nanoseconds of single kernels, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        pool = self.pool or Pool(
            self.board, runtime=self.runtime.name, threads=self.runtime.threads
        )
        return pool.time_kernels(files, progress=progress, purpose=purpose)


def measure_table(
    stand: Stand,
    file: Resizable,
    groups: Sequence[ChannelGroup],
    *,
    fingerprint_key: str,
    format_name: FormatName,
    progress: Progress,
) -> MeasuredTable:
    """Time the kernels of a file at the widths that may matter, and keep the widths that pay.

    First every kernel is timed along each of its groups alone: that shows the staircase, and the dominance filter leaves the widths
    that are faster than every larger one. Then the corners and some inner points of the remaining grid are added.
    """
    full = {g.name: g.channels for g in groups}
    candidates = {
        g.name: candidate_widths(g.channels, step=math.lcm(FINEST_STEP, g.step)) for g in groups
    }
    probes = Probes(stand, file, full, progress)
    probes.measure(
        ((k, p) for k in file.kernels for p in _marginals([candidates[v] for v in k.variables])),
        "kernels-alone",
    )
    staircases = {
        group: Staircase(widths=widths, ns=tuple(probes.touched_ns(group, w) for w in widths))
        for group, widths in candidates.items()
    }
    grids = {
        group: thin(
            admissible(s.widths, dict(zip(s.widths, s.ns, strict=True)), tolerance=WIDTH_TOLERANCE)
        )
        for group, s in staircases.items()
    }
    classes: dict[str, list[Kernel]] = {}
    for kernel in file.kernels:
        classes.setdefault(_class_of(kernel, full), []).append(kernel)
    points = {}
    slots_of = {}
    for name, members in classes.items():
        slots = [
            sorted({w for k in members for w in grids[k.variables[slot]]})
            for slot in range(len(members[0].variables))
        ]
        slots_of[name] = slots
        points[name] = probe_points(slots, seed=PROBE_SEED)
    probes.measure(
        ((classes[name][0], p) for name, wanted in points.items() for p in wanted), "kernels-grid"
    )
    kernels = tuple(
        tabulate(
            name,
            members[0].op,
            slots_of[name],
            probes.on_grid(members[0], slots_of[name]),
        )
        for name, members in classes.items()
    )
    table = LatencyTable(
        fingerprint_key=fingerprint_key,
        precision=stand.precision,
        format=format_name,
        kernels=kernels,
    )
    return MeasuredTable(
        table=table, grids=grids, staircases=staircases, kernels_measured=len(probes.times)
    )


def _class_of(kernel: Kernel, full: Mapping[str, int]) -> str:
    """Kernels of one class share a table: the same computation, with the same full widths."""
    return f"{kernel.signature}@{','.join(str(full[v]) for v in kernel.variables)}"


def _marginals(candidates: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    full = tuple(c[-1] for c in candidates)
    points = {full}
    for slot, widths in enumerate(candidates):
        points.update((*full[:slot], w, *full[slot + 1 :]) for w in widths)
    return sorted(points)


class Probes:
    """Kernels timed so far, by computation and widths: nothing is timed twice."""

    def __init__(
        self, stand: Stand, file: Resizable, full: Mapping[str, int], progress: Progress
    ) -> None:
        self.times: dict[tuple[str, tuple[int, ...]], float] = {}
        self._stand, self._file, self._full, self._progress = stand, file, full, progress

    def measure(self, wanted: Iterable[tuple[Kernel, tuple[int, ...]]], purpose: str) -> None:
        """Time these kernels at these widths, except what is known."""
        missing = {
            (k.signature, p): (k, p) for k, p in wanted if (k.signature, p) not in self.times
        }
        keys = {str(i): key for i, key in enumerate(missing)}
        files = {}
        for name, key in keys.items():
            kernel, point = missing[key]
            files[name] = self._file.kernel(
                kernel.index, dict(zip(kernel.variables, point, strict=True))
            )
        if files:
            found = self._stand.kernels(files, self._progress, purpose)
            self.times.update({key: found[name] for name, key in keys.items() if name in found})
            for name, key in keys.items():
                if name not in found:
                    self.times[key] = self._unknown_ns(key[0])

    def _unknown_ns(self, signature: str) -> float:
        """For a kernel that does not run alone.

        One that runs at no width counts as free: the correction by whole nets takes it up. One that runs at others must not look free
        where it does not run, or those widths would be preferred: it counts as its slowest known time.
        """
        known = (ns for (other, _), ns in self.times.items() if other == signature)
        return max(known, default=UNKNOWN_NS)

    def touched_ns(self, group: str, width: int) -> float:
        """Time of every kernel that a group touches, at one width of it."""
        total = 0.0
        for kernel in self._file.kernels:
            if group in kernel.variables:
                point = tuple(width if v == group else self._full[v] for v in kernel.variables)
                total += self.times[kernel.signature, point]
        return total

    def on_grid(
        self, kernel: Kernel, slots: Sequence[Sequence[int]]
    ) -> dict[tuple[int, ...], float]:
        """All known times of a computation whose widths lie on the grid of every slot."""
        return {
            point: ns
            for (signature, point), ns in self.times.items()
            if signature == kernel.signature
            and all(w in slot for w, slot in zip(point, slots, strict=True))
        }


def kernel_model(file: Resizable, measured: MeasuredTable, full: Mapping[str, int]) -> LatencyModel:
    """The uncorrected model: the sum of the kernels' fitted tables over the admissible grid."""
    factors, constant_ms = [], 0.0
    for kernel in file.kernels:
        table = measured.table.kernel(_class_of(kernel, full))
        for slots, ns in table.arrays([measured.grids[v] for v in kernel.variables]):
            if slots:
                variables = tuple(kernel.variables[s] for s in slots)
                factors.append(Factor(variables, ns / 1e6, kernel.op))
            else:
                constant_ms += float(ns) / 1e6
    return LatencyModel(grids=measured.grids, factors=tuple(factors), constant_ms=constant_ms)


def measure_nets(
    stand: Stand, file: Resizable, grids: Mapping[str, tuple[int, ...]], *, seed: int
) -> MeasuredNets:
    """Time the dense net, the smallest and random ones between, all in the same rounds.

    The times are ratios to the dense net of the same round, times the dense median: regime changes of the board cancel.
    """
    smallest = {g: widths[0] for g, widths in grids.items()}
    nets = [smallest, *sample_nets(grids, NETS_FITTED + NETS_HELD_OUT, seed)]
    found = stand.measure(
        {"dense": file.resized({}), **{str(i): file.resized(w) for i, w in enumerate(nets)}},
        "nets",
    )
    dense = found["dense"]
    ms = [compare(found[str(i)], dense).ratio * dense.median_ms for i in range(len(nets))]
    full = {g: widths[-1] for g, widths in grids.items()}
    return MeasuredNets(dense_ms=dense.median_ms, widths=(full, *nets), ms=(dense.median_ms, *ms))


def fit(
    model: LatencyModel, nets: MeasuredNets, kernels_measured: int
) -> tuple[LatencyModel, LatencyModelQuality]:
    """Correct the kernel model with whole nets; judge it on those that were held out, then use all."""
    samples = [(w, ms, 1.0) for w, ms in zip(nets.widths, nets.ms, strict=True)]
    fitted, held_out = samples[:-NETS_HELD_OUT], samples[-NETS_HELD_OUT:]
    mean, worst = evaluate(correct(model, fitted), [(w, ms) for w, ms, _ in held_out])
    quality = LatencyModelQuality(
        kernels_measured=kernels_measured,
        nets_fitted=len(fitted),
        nets_held_out=len(held_out),
        mean_error_ratio=mean,
        worst_error_ratio=worst,
    )
    return correct(model, samples), quality


def check_budget(budget: Budget, nets: MeasuredNets) -> None:
    """Nothing, when the fastest net that was measured is within the budget.

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


def make_plan(
    stand: Stand,
    file: Resizable,
    groups: Sequence[ChannelGroup],
    frozen: Sequence[FrozenGroup],
    *,
    model: LatencyModel,
    nets: MeasuredNets,
    quality: LatencyModelQuality,
    curves: Mapping[str, np.ndarray],
    orders: Mapping[str, np.ndarray],
    budget: Budget,
    importance: str,
    progress: Progress,
) -> PlanResult:
    """Solve, measure what was solved beside the dense net, correct the model, and repeat until the *measured* latency fits.

    Source: the guarantee loop of this project's design; each failing round lowers the effective budget, and the smallest net bounds it.

    Raises:
        BudgetError: no structure on the grid is fast enough; names the fastest, as measured.
    """
    limit_ms = budget.limit_ms(nets.dense_ms)
    samples = [(w, ms, 1.0) for w, ms in zip(nets.widths, nets.ms, strict=True)]
    aim_ms = PLAN_SHARE * limit_ms / (1 + min(quality.mean_error_ratio, 0.05))
    checks: list[PlanCheck] = []
    failures = 0  # rounds in a row in which nothing fitted
    with progress.bar("checking structures on the device", CHECK_ROUNDS) as bar:
        for number in range(CHECK_ROUNDS):
            problem = Problem(grids=model.grids, cost_nats=dict(curves), model=model)
            tried = {tuple(sorted(c.widths.items())) for c in checks}
            options = [
                s for s in _options(problem, aim_ms) if tuple(sorted(s.widths.items())) not in tried
            ]
            found = _check(stand, file, options, nets.dense_ms, limit_ms, f"check-{number}")
            checks.extend(found)
            samples += [(c.widths, c.measured_ms, 3.0) for c in found]
            model = correct(model, samples)
            best = _best(checks)
            bar.advance(1, f"best {best.measured_ms / limit_ms:.1%} of budget" if best else "")
            if best is not None and (not found or best.measured_ms >= CLOSE_ENOUGH * limit_ms):
                break
            failures = 0 if any(c.within_budget for c in found) else failures + 1
            aim_ms = _next_aim(limit_ms, checks, model) * 0.99**failures
    best = _best(checks)
    if best is None:
        best = _smallest_if_it_fits(stand, file, model, curves, nets, limit_ms, checks, budget)
    plan = _plan(best, groups, frozen, orders, curves, model, stand, limit_ms, nets, importance)
    front = search.pareto(Problem(grids=model.grids, cost_nats=dict(curves), model=model))
    return PlanResult(
        plan=plan,
        checks=tuple(checks),
        quality=quality,
        pareto=tuple((s.predicted_ms, s.cost_nats) for s in front),
    )


def _options(problem: Problem, limit_ms: float) -> tuple[Solution, ...]:
    """The best solution and two that differ from it, or the fastest one if the model sees nothing under the limit."""
    try:
        return search.alternatives(problem, limit_ms, count=3, min_changes=3)
    except BudgetError:
        return (search.fastest(problem),)


def _check(
    stand: Stand,
    file: Resizable,
    options: Sequence[Solution],
    dense_ms: float,
    limit_ms: float,
    purpose: str,
) -> list[PlanCheck]:
    if not options:
        return []
    files = {str(i): file.resized(s.widths) for i, s in enumerate(options)}
    found = stand.measure({"dense": file.resized({}), **files}, purpose)
    checks = []
    for i, solution in enumerate(options):
        comparison = compare(found[str(i)], found["dense"], confidence=TWO_SIDED)
        checks.append(
            PlanCheck(
                widths=dict(solution.widths),
                predicted_ms=solution.predicted_ms,
                measured_ms=comparison.ratio * dense_ms,
                ratio_to_dense=comparison.ratio,
                ratio_high=comparison.high,
                within_budget=comparison.high * dense_ms <= PLAN_SHARE * limit_ms,
                cost_nats=solution.cost_nats,
            )
        )
    return checks


def _best(checks: Sequence[PlanCheck]) -> PlanCheck | None:
    fitting = [c for c in checks if c.within_budget]
    return min(fitting, key=lambda c: c.cost_nats) if fitting else None


def _next_aim(limit_ms: float, checks: Sequence[PlanCheck], model: LatencyModel) -> float:
    """The prediction to solve for, so that the upper bound of its measurement ends at the budget.

    Two things lie between a prediction and that bound: what the corrected model still gets wrong, and the width of the interval.
    """
    bias = statistics.median(c.measured_ms / model.predict(c.widths) for c in checks)
    interval = statistics.median(c.ratio_high / c.ratio_to_dense for c in checks)
    return PLAN_SHARE * limit_ms / (bias * interval)


def _smallest_if_it_fits(
    stand: Stand,
    file: Resizable,
    model: LatencyModel,
    curves: Mapping[str, np.ndarray],
    nets: MeasuredNets,
    limit_ms: float,
    checks: list[PlanCheck],
    budget: Budget,
) -> PlanCheck:
    """The smallest structure, checked last; nothing else fitted."""
    problem = Problem(grids=model.grids, cost_nats=dict(curves), model=model)
    smallest = [search.fastest(problem)]
    found = _check(stand, file, smallest, nets.dense_ms, limit_ms, "check-smallest")
    checks.extend(found)
    if not found[0].within_budget:
        fastest = min(c.measured_ms for c in checks)
        raise BudgetError(
            f"no structure was measured within {budget.text} ({limit_ms:.4g} ms);"
            f" the fastest took {fastest:.4g} ms ({fastest / nets.dense_ms:.1%} of dense)",
            hint=f"ask for at least {math.ceil(fastest / nets.dense_ms * 100) + 1}%",
        )
    return found[0]


def _plan(
    chosen: PlanCheck,
    groups: Sequence[ChannelGroup],
    frozen: Sequence[FrozenGroup],
    orders: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray],
    model: LatencyModel,
    stand: Stand,
    limit_ms: float,
    nets: MeasuredNets,
    importance: str,
) -> PruningPlan:
    predicted = model.predict(chosen.widths)
    entries = []
    for group in groups:
        width = chosen.widths[group.name]
        # What the cut of this group saves, all other cuts being made.
        back = model.predict({**chosen.widths, group.name: group.channels}) - predicted
        grid = list(model.grids[group.name])
        entries.append(
            GroupPlan(
                name=group.name,
                channels=group.channels,
                kept=kept_channels(orders[group.name], width),
                layers=group.layers(),
                saved_ms_predicted=max(0.0, back),
                cost_nats=float(curves[group.name][grid.index(width)]),
                note=group.kind,
            )
        )
    return PruningPlan(
        groups=tuple(entries),
        frozen=tuple(frozen),
        precision=stand.precision,
        importance=importance,
        limit_ms=limit_ms,
        dense_ms=nets.dense_ms,
        predicted_ms=predicted,
        predicted_cost_nats=chosen.cost_nats,
    )
