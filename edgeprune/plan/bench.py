"""From a board and an exported file to a plan that was measured: latency table, corrected model, solve, check, correct, again.

Everything here happens before any training: latency does not depend on what the weights are, so structures are timed with the dense
file's own leading channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.compress.groups.find import ChannelGroup
from edgeprune.devices.board import Board
from edgeprune.devices.plans import SEARCH, TimingPlan
from edgeprune.devices.timing.decide import Decision, decide
from edgeprune.devices.timing.measure import ModelFile, compare, measure
from edgeprune.devices.timing.pool import Pool
from edgeprune.errors import BudgetError
from edgeprune.formats import Kernel, Resizable
from edgeprune.plan.latency import call_overhead as calls
from edgeprune.plan.latency import sampling as sparse
from edgeprune.plan.latency import weight_traffic as traffic
from edgeprune.plan.latency.fill import Point
from edgeprune.plan.latency.grid import admissible, thin
from edgeprune.plan.latency.kernel_times import KernelKey, KernelTime
from edgeprune.plan.latency.model import Factor, LatencyModel, correct, evaluate, sample_nets
from edgeprune.plan.latency.sampling import KernelClass
from edgeprune.plan.latency.table import LatencyTable
from edgeprune.plan.measured import MeasuredNets, MeasuredTable, Staircase
from edgeprune.progress import Progress
from edgeprune.records.budget import Budget
from edgeprune.records.files import sha256_bytes
from edgeprune.records.measurement import Measurement
from edgeprune.records.names import FormatName, Precision
from edgeprune.records.plan import LatencyModelQuality
from edgeprune.records.statistics import nearest_rank
from edgeprune.records.target import ChannelSteps, Runtime

MOST_KERNELS = 250  # timed for one table
WIDTH_TOLERANCE = (
    0.02  # kernels repeat to 0.6-1.7 % (measured by this project); closer widths count as equal
)
NETS_FITTED, NETS_HELD_OUT = 8, 4
N_ENDS = 2  # the dense net and the smallest, which are timed first
CONFIRM_LOOKS = (12, 24, 48)  # pairs; enough to be sure within a percent where blocks vary by two
UNKNOWN_NS = 1.0
LINEAR_OPS = ("fully_connected", "gemm", "matmul")


@dataclass(frozen=True)
class Stand:
    """Where and how the candidate files run. Single kernels may be timed on other boards of the class too: those of ``pool``.

    ``phase`` goes before the purpose of whole files, so that a second search of one run has purposes of its own. ``kernel_runtime`` runs
    single kernels where they are cut from files of another format than whole nets.
    """

    board: Board
    runtime: Runtime
    precision: Precision
    pool: Pool | None = None
    phase: str = ""
    kernel_runtime: Runtime | None = None

    def measure(
        self, files: Mapping[str, bytes], purpose: str, plan: TimingPlan = SEARCH
    ) -> dict[str, Measurement]:
        """Interleaved measurements of whole files, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        models = [ModelFile(n, c, self.precision, sha256_bytes(c)) for n, c in files.items()]
        found = measure(
            self.board,
            models,
            runtime=self.runtime.name,
            threads=self.runtime.threads,
            plan=plan,
            purpose=self.phase + purpose,
        )
        return {m.name: m for m in found}

    def judge(self, candidate: bytes, dense: bytes, budget_ratio: float, purpose: str) -> Decision:
        """One file against a share of the dense one's latency, with more loads than :meth:`measure` takes. ``purpose`` as there."""
        files = [
            ModelFile(name, content, self.precision, sha256_bytes(content))
            for name, content in (("chosen", candidate), ("dense", dense))
        ]
        return decide(
            self.board,
            *files,
            runtime=self.runtime.name,
            threads=self.runtime.threads,
            budget_ratio=budget_ratio,
            looks=CONFIRM_LOOKS,
            purpose=self.phase + purpose,
        )

    def kernels(
        self, files: Mapping[str, bytes], progress: Progress, purpose: str
    ) -> dict[str, float]:
        """Nanoseconds of single kernels, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        runtime = self.kernel_runtime or self.runtime
        pool = self.pool or Pool(self.board, runtime=runtime.name, threads=runtime.threads)
        return pool.time_kernels(files, progress=progress, purpose=purpose)


def measure_table(
    stand: Stand,
    file: Resizable,
    groups: Sequence[ChannelGroup],
    *,
    fingerprint_key: str,
    format_name: FormatName,
    progress: Progress,
    known: dict[KernelKey, float] | None = None,
    most: int = MOST_KERNELS,
    prior: Mapping[str, int] | None = None,
) -> MeasuredTable:
    """Time the kernels of a file at the widths that may matter, and keep the widths that pay.

    How few are enough is :func:`edgeprune.plan.latency.sampling.probe`'s; the dominance filter then leaves the widths that are predicted to
    be faster than every larger one. What is in ``known`` is not timed again; what is timed is added to it, ``most`` kernels at the most
    (but every kernel at full width).

    ``prior`` gives a step for each group where the board only stands in for the one that counts: its own tiles are the wrong ones then, and
    widths are multiples of that step; see :func:`prior_steps`.
    """
    full = {g.name: g.channels for g in groups}
    probes = Probes(stand, file, progress, {} if known is None else known, most)
    classes = _classes(file, full)
    found = sparse.probe(classes, full, {g.name: g.step for g in groups}, probes, prior=prior)
    by_name = {k.signature: k for k in found.kernels}
    tables = [(c, by_name[c.name]) for c in classes]
    staircases = {
        group: Staircase(
            widths=widths, ns=tuple(sparse.touched_ns(tables, full, group, w) for w in widths)
        )
        for group, widths in found.candidates.items()
    }
    grids = {
        group: thin(
            admissible(
                s.widths,
                dict(zip(s.widths, s.ns, strict=True)),
                tolerance=WIDTH_TOLERANCE,
            )
        )
        for group, s in staircases.items()
    }
    table = LatencyTable(
        fingerprint_key=fingerprint_key,
        precision=stand.precision,
        format=format_name,
        kernels=tuple(by_name[c.name] for c in classes),
    )
    return MeasuredTable(
        table=table,
        grids=_with_removal(grids, groups, file),
        staircases=staircases,
        kernels_measured=len(probes.times),
        kernels_taken=probes.taken,
        times=probes.ran(),
    )


def prior_steps(file: Resizable, steps: ChannelSteps) -> dict[str, int]:
    """The step in channels of each group by a profile: a width that is whole in the tile of every kernel that the group touches."""
    found: dict[str, int] = {}
    for kernel in file.kernels:
        step = _step_of(kernel, steps)
        for group in kernel.variables:
            found[group] = math.lcm(found.get(group, 1), step)
    return found


def _step_of(kernel: Kernel, steps: ChannelSteps) -> int:
    op = kernel.op.lower()
    if "depthwise" in op or ("conv" in op and "both" in kernel.roles):
        return steps.depthwise
    if "conv" in op:
        return steps.conv
    return steps.linear if any(word in op for word in LINEAR_OPS) else 1


def _with_removal(
    grids: Mapping[str, tuple[int, ...]], groups: Sequence[ChannelGroup], file: Resizable
) -> dict[str, tuple[int, ...]]:
    """The grids, with width 0 in front where both the model and the file can do without the group's block; it is timed in whole nets."""
    in_file = _groups_by_block(file, [g.name for g in groups])
    removable = {
        g.name
        for g in groups
        if g.block is not None and set(in_file.get(g.name, ())) == set(g.removed_with())
    }
    return {g: (0, *widths) if g in removable else widths for g, widths in grids.items()}


def _groups_by_block(file: Resizable, groups: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of these groups that lies in a block of the file: those of them that do, itself among them."""
    found: dict[frozenset[int], list[str]] = {}
    for name in groups:
        if name in file.blocks:
            found.setdefault(file.blocks[name], []).append(name)
    return {name: tuple(together) for together in found.values() for name in together}


def removed_together(
    file: Resizable, grids: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, ...], ...]:
    """Groups that have width 0 together or not at all, as they lie in one block; a group that is alone in one is a set of its own."""
    removable = [name for name, grid in grids.items() if grid[0] == 0]
    return tuple(dict.fromkeys(_groups_by_block(file, removable).values()))


def _class_of(kernel: Kernel, full: Mapping[str, int]) -> str:
    """Kernels of one class share a table: the same computation, with the same full widths."""
    return f"{kernel.signature}@{','.join(str(full[v]) for v in kernel.variables)}"


def _classes(file: Resizable, full: Mapping[str, int]) -> list[KernelClass]:
    """The kernels of a file by class, in order."""
    found: dict[str, list[Kernel]] = {}
    for kernel in file.kernels:
        found.setdefault(_class_of(kernel, full), []).append(kernel)
    return [
        KernelClass(
            name=name,
            op=first.op,
            kind=first.kind or first.op,
            roles=first.roles or tuple(f"slot {i}" for i in range(len(first.variables))),
            full=tuple(full[v] for v in first.variables),
            members=tuple(k.variables for k in (first, *rest)),
            key=first.index,
        )
        for name, (first, *rest) in found.items()
    ]


class Probes:
    """Kernels timed so far, by computation and widths: nothing is timed twice, and no more than ``most`` in all."""

    def __init__(
        self,
        stand: Stand,
        file: Resizable,
        progress: Progress,
        known: dict[KernelKey, float],
        most: int,
    ) -> None:
        self.times: dict[KernelKey, float] = {}
        self.taken = 0  # times that were known before
        self._silent: set[KernelKey] = set()
        self._known, self._left = known, most
        self._stand, self._file, self._progress = stand, file, progress
        self._kernels = {k.index: k for k in file.kernels}

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be timed."""
        return self._left <= 0

    def known(self, one: KernelClass) -> dict[Point, float]:
        """All times of a class so far."""
        signature = self._kernels[one.key].signature
        return {point: ns for (other, point), ns in self.times.items() if other == signature}

    def silent(self, one: KernelClass) -> set[Point]:
        """Widths at which a class did not run alone."""
        signature = self._kernels[one.key].signature
        return {point for other, point in self._silent if other == signature}

    def ran(self) -> tuple[KernelTime, ...]:
        """The kernels that ran alone, timed now or known before, in order."""
        rows = sorted((key, ns) for key, ns in self.times.items() if key not in self._silent)
        return tuple(KernelTime(signature=s, widths=w, ns=ns) for (s, w), ns in rows)

    def take(self, wanted: Sequence[tuple[KernelClass, Point]], purpose: str) -> None:
        """Time these kernels at these widths, except what is known; the first ones where not all may be. Full widths always are."""
        files: dict[str, bytes] = {}
        keys: dict[str, KernelKey] = {}
        for one, point in wanted:
            kernel = self._kernels[one.key]
            key = (kernel.signature, point)
            if key in self.times or key in keys.values():
                continue
            if key in self._known:
                self.times[key] = self._known[key]
                self.taken += 1
            elif self._left > len(keys) or point == one.full:
                name = str(len(keys))
                keys[name] = key
                files[name] = self._file.kernel(
                    kernel.index, dict(zip(kernel.variables, point, strict=True))
                )
        if not files:
            return
        self._left -= len(files)
        found = self._stand.kernels(files, self._progress, purpose)
        timed = {key: found[name] for name, key in keys.items() if name in found}
        self.times.update(timed)
        self._known.update(timed)
        for name, key in keys.items():
            if name not in found:
                self._silent.add(key)
                self.times[key] = self._unknown_ns(key[0])

    def _unknown_ns(self, signature: str) -> float:
        """For a kernel that does not run alone.

        One that runs at no width counts as free: the correction by whole nets takes it up. One that runs at others must not look free
        where it does not run, or those widths would be preferred: it counts as its slowest known time.
        """
        known = (ns for (other, _), ns in self.times.items() if other == signature)
        return max(known, default=UNKNOWN_NS)


def kernel_model(file: Resizable, measured: MeasuredTable, full: Mapping[str, int]) -> LatencyModel:
    """The uncorrected model: the sum of the kernels' fitted tables over the admissible grid.

    The bytes of their weights and the calls of removed kernels are in it too, and count nothing until whole nets show that they do.
    Where a group's width is 0, the kernels of its block take no time, those included whose shape does not follow the group. Of a block
    with several groups this is true of all its kernels only where all groups have width 0.
    """
    removable = removed_together(file, measured.grids)
    quickest_ms = calls.quickest_ms(measured.table)
    factors, constant_ms = [], 0.0
    for kernel in file.kernels:
        table = measured.table.kernel(_class_of(kernel, full))
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
            factors.append(Factor(gone.variables, (1 - gone.cost_ms) * quickest_ms, calls.OP))
    return LatencyModel(
        grids=measured.grids,
        factors=tuple(factors),
        constant_ms=constant_ms,
        class_scales={traffic.OP: 0.0, calls.OP: 0.0},
    )


def _traffic(file: Resizable, kernel: Kernel, grids: Sequence[Sequence[int]]) -> list[Factor]:
    """The bytes of a kernel's weights, in megabytes, as a factor; none where it has no weights."""
    square = [
        v for v, role in zip(kernel.variables, kernel.roles, strict=False) if role == "square"
    ]
    found = traffic.weight_bytes(
        lambda widths: len(file.kernel(kernel.index, widths)),
        dict(zip(kernel.variables, grids, strict=True)),
        square,
    )
    return [] if found is None else [Factor(kernel.variables, found / 1e6, traffic.OP)]


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
