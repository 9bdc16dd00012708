"""Measured kernels as a record: what was timed, on which device, in which precision, and the time at every admissible width.

Kernels with one signature are the same computation and share a table. Slots and points: see :mod:`edgeprune.plan.latency.fill`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from edgeprune.errors import SpecError, UnknownName
from edgeprune.plan.latency.fill import Point, fit_terms, leave_out_error
from edgeprune.records.base import Record
from edgeprune.records.formats import FormatName
from edgeprune.records.names import Precision


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
    is what the time grows with, at every width of each slot's grid (see :mod:`edgeprune.plan.latency.fill`); empty where that is not known.
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
