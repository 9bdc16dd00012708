"""Measured kernels as a record: what was timed, on which device, in which precision, and the time at every admissible width.

Kernels with one signature are the same computation and share a table. Slots and points: see :mod:`edgeprune.plan.latency.fill`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from edgeprune.errors import SpecError, UnknownName
from edgeprune.plan.latency.fill import Point, fit_kernel, fit_terms, leave_out_error, probe_points
from edgeprune.records.base import Record
from edgeprune.records.names import FormatName, Precision


class KernelShape(Protocol):
    """What the latency model needs to know of a kernel of an exported file."""

    @property
    def signature(self) -> str:
        """Equal for two kernels that are the same computation at equal widths."""
        ...

    @property
    def op(self) -> str:
        """The kind of kernel: the class that a correction may scale."""
        ...

    @property
    def variables(self) -> tuple[str, ...]:
        """The channel group in each slot."""
        ...


class ProbeTime(Record):
    """One measured point: a width per slot, and the time of the kernel alone."""

    widths: tuple[int, ...]
    ns: float


class TableTerm(Record):
    """A part of a kernel's time: ``ns`` over the grids of ``slots``, row-major, the last slot running fastest."""

    slots: tuple[int, ...]
    ns: tuple[float, ...]


class KernelTable(Record):
    """One kernel signature: what was measured, and the sum of ``terms`` that gives the time at every point of its grids.

    ``error_ratio`` is the mean relative error at measured points that the fit was not shown (0 when everything was measured). ``sizes``
    is what the time grows with, at every width of each slot's grid (see :func:`.probes.fit_kernel`); empty where that is not known.
    """

    signature: str
    op: str
    slots: int
    grids: tuple[tuple[int, ...], ...]
    points: tuple[ProbeTime, ...]
    terms: tuple[TableTerm, ...]
    error_ratio: float
    sizes: tuple[tuple[float, ...], ...] = ()

    def arrays(self, widths: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """The terms at the given widths of each slot: ``(slots, ns)`` with one axis per slot of the term.

        Raises:
            SpecError: a width is not on the grid.
        """
        if len(widths) != self.slots:
            raise ValueError(f"{self.signature} has {self.slots} slots, but got {len(widths)}")
        places = [
            [self._place(slot, width) for width in wanted] for slot, wanted in enumerate(widths)
        ]
        found = []
        for term in self.terms:
            table = np.array(term.ns).reshape([len(self.grids[slot]) for slot in term.slots])
            found.append((term.slots, table[np.ix_(*(places[slot] for slot in term.slots))]))
        return found

    def _place(self, slot: int, width: int) -> int:
        try:
            return self.grids[slot].index(width)
        except ValueError:
            raise SpecError(
                f"width {width} is not in the latency table of {self.signature}, slot {slot}: {self.grids[slot]}",
                hint="measure this kernel at that width",
            ) from None


def tabulate(
    signature: str,
    op: str,
    grids: Sequence[Sequence[int]],
    points: Mapping[Point, float],
    sizes: Sequence[Sequence[float]] = (),
) -> KernelTable:
    """The table of one kernel from its measured points (ns); ``grids`` ascend and end with the full width of each slot."""
    terms = fit_terms(points, grids, sizes)
    return KernelTable(
        signature=signature,
        op=op,
        slots=len(grids),
        grids=tuple(tuple(grid) for grid in grids),
        points=tuple(ProbeTime(widths=p, ns=float(points[p])) for p in sorted(points)),
        terms=tuple(TableTerm(slots=t.slots, ns=tuple(t.ns.ravel().tolist())) for t in terms),
        error_ratio=leave_out_error(points, grids, sizes)[0],
        sizes=tuple(tuple(float(v) for v in s) for s in sizes),
    )


class LatencyTable(Record):
    """All kernels of a model, timed alone on one device in one precision and format."""

    schema_version: Literal[1] = 1
    fingerprint_key: str
    precision: Precision
    format: FormatName
    kernels: tuple[KernelTable, ...]

    def kernel(self, signature: str) -> KernelTable:
        """The table of one signature.

        Raises:
            UnknownName: it was never measured.
        """
        for kernel in self.kernels:
            if kernel.signature == signature:
                return kernel
        raise UnknownName("kernel", signature, (k.signature for k in self.kernels))

    def lookup(self, signature: str, widths: Sequence[int]) -> float:
        """The time of a kernel in ns at one width per slot. Raises UnknownName and SpecError for what is not in the table."""
        arrays = self.kernel(signature).arrays([(width,) for width in widths])
        return float(sum(ns.item() for _, ns in arrays))

    def merged(self, other: LatencyTable) -> LatencyTable:
        """This table and another of the same device, precision and format; where both measured a point, the other's time stands.

        Raises:
            SpecError: the two were not measured on the same thing.
        """
        for name in ("fingerprint_key", "precision", "format"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise SpecError(
                    f"latency tables of different {name} do not mix: {mine!r} and {theirs!r}",
                    hint="measure again on the device that is to be served",
                )
        kernels = {kernel.signature: kernel for kernel in self.kernels}
        for kernel in other.kernels:
            known = kernels.get(kernel.signature)
            kernels[kernel.signature] = _joined(known, kernel) if known else kernel
        return self.model_copy(update={"kernels": tuple(kernels.values())})


def _joined(first: KernelTable, second: KernelTable) -> KernelTable:
    if first.slots != second.slots:
        raise ValueError(f"{first.signature} has {first.slots} slots and {second.slots}")
    grids = [tuple(sorted({*a, *b})) for a, b in zip(first.grids, second.grids, strict=True)]
    points = {probe.widths: probe.ns for probe in (*first.points, *second.points)}
    sizes = []
    for slot, (grid, mine) in enumerate(zip(grids, first.sizes, strict=False)):
        # Between the known widths as far as is known; the other table's widths lie among them or repeat its ends.
        sizes.append(np.interp(grid, first.grids[slot], mine).tolist())
    return tabulate(first.signature, first.op, grids, points, sizes)


def slot_grids(
    kernels: Iterable[KernelShape], grids: Mapping[str, Sequence[int]]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """For every signature, the widths that its slots take in any of its kernels, given the grid of every group."""
    found: dict[str, list[set[int]]] = {}
    for kernel in kernels:
        slots = found.setdefault(kernel.signature, [set() for _ in kernel.variables])
        if len(slots) != len(kernel.variables):
            raise ValueError(f"kernels of {kernel.signature} differ in their number of slots")
        for slot, variable in zip(slots, kernel.variables, strict=True):
            slot.update(grids[variable])
    return {s: tuple(tuple(sorted(slot)) for slot in slots) for s, slots in found.items()}


__all__ = [
    "KernelShape",
    "KernelTable",
    "LatencyTable",
    "ProbeTime",
    "TableTerm",
    "fit_kernel",
    "probe_points",
    "slot_grids",
    "tabulate",
]
