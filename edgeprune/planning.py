"""From a board and an exported file to a plan that was measured: latency table, corrected model, solve, check, correct, again.

Everything here happens before any training: latency does not depend on what the weights are, so structures are timed with the dense
file's own leading channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.compress.groups import ChannelGroup
from edgeprune.devices.board import Board
from edgeprune.devices.decide import Decision, decide
from edgeprune.devices.measure import ModelFile, compare, measure
from edgeprune.devices.plans import SEARCH
from edgeprune.devices.pool import Pool
from edgeprune.errors import BudgetError
from edgeprune.formats import Kernel, Resizable
from edgeprune.latency.grid import admissible, candidate_widths, thin
from edgeprune.latency.kernel_times import KernelKey
from edgeprune.latency.predictor import Factor, LatencyModel, correct, evaluate, sample_nets
from edgeprune.latency.table import LatencyTable, probe_points, tabulate
from edgeprune.progress import Progress
from edgeprune.records import sha256_bytes
from edgeprune.results import (
    LatencyModelQuality,
    Measurement,
)
from edgeprune.specs import Budget, FormatName, Precision, Runtime
from edgeprune.stage_records import MeasuredNets, MeasuredTable, Staircase

FINEST_STEP = 4  # no kernel library rounds channels to less than 4 (MLAS and NEON fp32 vectors)
WIDTH_TOLERANCE = (
    0.02  # kernels repeat to 0.6-1.7 % (measured by this project); closer widths count as equal
)
NETS_FITTED, NETS_HELD_OUT = 8, 4
CONFIRM_LOOKS = (12, 24)  # pairs; enough to find what is over the budget for sure
PROBE_SEED = 0
UNKNOWN_NS = 1.0


@dataclass(frozen=True)
class Stand:
    """Where and how the candidate files run. Single kernels may be timed on other boards of the class too: those of ``pool``.

    ``phase`` goes before the purpose of whole files, so that a second search of one run has purposes of its own.
    """

    board: Board
    runtime: Runtime
    precision: Precision
    pool: Pool | None = None
    phase: str = ""

    def measure(self, files: Mapping[str, bytes], purpose: str) -> dict[str, Measurement]:
        """Interleaved measurements of whole files, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        models = [ModelFile(n, c, self.precision, sha256_bytes(c)) for n, c in files.items()]
        found = measure(
            self.board,
            models,
            runtime=self.runtime.name,
            threads=self.runtime.threads,
            plan=SEARCH,
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
    known: dict[KernelKey, float] | None = None,
) -> MeasuredTable:
    """Time the kernels of a file at the widths that may matter, and keep the widths that pay.

    First every kernel is timed along each of its groups alone: that shows the staircase, and the dominance filter leaves the widths
    that are faster than every larger one. Then the corners and some inner points of the remaining grid are added. What is in ``known``
    is not timed again; what is timed is added to it.
    """
    full = {g.name: g.channels for g in groups}
    candidates = {
        g.name: candidate_widths(g.channels, step=math.lcm(FINEST_STEP, g.step)) for g in groups
    }
    probes = Probes(stand, file, full, progress, {} if known is None else known)
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
        tabulate(name, k[0].op, slots_of[name], probes.on_grid(k[0], slots_of[name]))
        for name, k in classes.items()
    )
    table = LatencyTable(
        fingerprint_key=fingerprint_key,
        precision=stand.precision,
        format=format_name,
        kernels=kernels,
    )
    return MeasuredTable(
        table=table,
        grids=_with_removal(grids, groups, file),
        staircases=staircases,
        kernels_measured=len(probes.times),
        kernels_taken=probes.taken,
    )


def _with_removal(
    grids: Mapping[str, tuple[int, ...]], groups: Sequence[ChannelGroup], file: Resizable
) -> dict[str, tuple[int, ...]]:
    """The grids, with width 0 in front where both the model and the file can do without the group's block; it is timed in whole nets."""
    removable = {g.name for g in groups if g.block is not None} & file.blocks.keys()
    return {g: (0, *widths) if g in removable else widths for g, widths in grids.items()}


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
        self,
        stand: Stand,
        file: Resizable,
        full: Mapping[str, int],
        progress: Progress,
        known: dict[KernelKey, float],
    ) -> None:
        self.times: dict[KernelKey, float] = {}
        self._known = known
        self.taken = 0  # times that were known before
        self._stand, self._file, self._full, self._progress = stand, file, full, progress

    def measure(self, wanted: Iterable[tuple[Kernel, tuple[int, ...]]], purpose: str) -> None:
        """Time these kernels at these widths, except what is known."""
        missing = {
            (k.signature, p): (k, p) for k, p in wanted if (k.signature, p) not in self.times
        }
        taken = {key: self._known[key] for key in missing if key in self._known}
        self.times.update(taken)
        self.taken += len(taken)
        missing = {key: at for key, at in missing.items() if key not in self._known}
        keys = {str(i): key for i, key in enumerate(missing)}
        files = {}
        for name, key in keys.items():
            kernel, point = missing[key]
            files[name] = self._file.kernel(
                kernel.index, dict(zip(kernel.variables, point, strict=True))
            )
        if files:
            found = self._stand.kernels(files, self._progress, purpose)
            timed = {key: found[name] for name, key in keys.items() if name in found}
            self.times.update(timed)
            self._known.update(timed)
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
    """The uncorrected model: the sum of the kernels' fitted tables over the admissible grid.

    Where a group's width is 0, the kernels of its block take no time, those included whose shape does not follow the group.
    """
    factors, constant_ms = [], 0.0
    for kernel in file.kernels:
        table = measured.table.kernel(_class_of(kernel, full))
        blocks = [
            g
            for g, inside in file.blocks.items()
            if kernel.index in inside and 0 in measured.grids[g]
        ]
        timed = [[w for w in measured.grids[v] if w] for v in kernel.variables]
        for slots, ns in table.arrays(timed):
            variables = tuple(kernel.variables[s] for s in slots)
            factor = Factor(variables, ns / 1e6, kernel.op)
            for group in blocks:
                factor = _removable(factor, group, len(measured.grids[group]))
            if factor.variables:
                factors.append(factor)
            else:
                constant_ms += float(factor.cost_ms)
    return LatencyModel(grids=measured.grids, factors=tuple(factors), constant_ms=constant_ms)


def _removable(factor: Factor, group: str, choices: int) -> Factor:
    """The factor with one more choice of the group in front, at which it takes no time."""
    if group not in factor.variables:
        is_there = np.arange(choices) > 0
        return Factor(
            (group, *factor.variables), np.multiply.outer(is_there, factor.cost_ms), factor.op
        )
    axis = factor.variables.index(group)
    front = [(int(i == axis), 0) for i in range(len(factor.variables))]
    return Factor(factor.variables, np.pad(factor.cost_ms, front), factor.op)


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
