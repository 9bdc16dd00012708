"""The latency table: kernels timed alone until the times at all other widths are known, and the widths of each group that pay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from edgeprune.compress.groups.find import ChannelGroup
from edgeprune.formats import Kernel, Resizable
from edgeprune.plan.bench import Stand
from edgeprune.plan.latency import sampling
from edgeprune.plan.latency.fill import Point
from edgeprune.plan.latency.grid import admissible, thin
from edgeprune.plan.latency.kernel_times import KernelKey, KernelTime
from edgeprune.plan.latency.sampling import KernelClass
from edgeprune.plan.latency.table import LatencyTable
from edgeprune.plan.measured import MeasuredTable, Staircase
from edgeprune.progress import Progress
from edgeprune.records.formats import FormatName
from edgeprune.records.target import ChannelSteps

MOST_KERNELS = 250  # timed for one table
# Kernels repeat to 0.6-1.7 % (measured by this project); closer widths count as equal.
WIDTH_TOLERANCE = 0.02
UNKNOWN_NS = 1.0
LINEAR_OPS = ("fully_connected", "gemm", "matmul")


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
    found = sampling.probe(classes, full, {g.name: g.step for g in groups}, probes, prior=prior)
    by_name = {k.signature: k for k in found.kernels}
    tables = [(c, by_name[c.name]) for c in classes]
    staircases = {
        group: Staircase(
            widths=widths, ns=tuple(sampling.touched_ns(tables, full, group, w) for w in widths)
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


def class_of(kernel: Kernel, full: Mapping[str, int]) -> str:
    """Kernels of one class share a table: the same computation, with the same full widths."""
    return f"{kernel.signature}@{','.join(str(full[v]) for v in kernel.variables)}"


def _classes(file: Resizable, full: Mapping[str, int]) -> list[KernelClass]:
    """The kernels of a file by class, in order."""
    found: dict[str, list[Kernel]] = {}
    for kernel in file.kernels:
        found.setdefault(class_of(kernel, full), []).append(kernel)
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
