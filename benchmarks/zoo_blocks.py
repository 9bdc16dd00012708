"""What ``zoo.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from edgeprune.records.base import Record

HOLDS, FROZEN = "identity holds", "all frozen"
SKIPPED = ("no classifier", "not built")
UNTRIED = ("too slow", "too large")


class ZooRow(Record):
    """One architecture. ``half_ratio``: parameters that are left when half of each group's channels go, as a share."""

    library: str
    architecture: str
    variant: str
    status: str
    message: str = ""
    parameters: int = 0
    groups: int = 0
    half_ratio: float | None = None
    frozen: dict[str, int] = {}
    seconds: float = 0.0


class ZooResults(Record):
    """All architectures, and the versions of the libraries."""

    schema_version: int = 1
    command: str
    versions: dict[str, str]
    rows: tuple[ZooRow, ...]


def zoo_block(results: ZooResults, table: Callable[..., str]) -> str:
    """A table by library, and what did not go through."""
    libraries = list(dict.fromkeys(row.library for row in results.rows))
    lines = [
        _line(lib, [r for r in results.rows if r.library == lib], results.versions.get(lib, ""))
        for lib in libraries
    ]
    columns = (
        "library", "architectures", "cut, equal to zeroed", "kept whole", "refused", "too slow or large to try", "wrong or failed",
        "groups, median", "parameters left at half width, median",
    )  # fmt: skip
    others = [r for r in results.rows if r.status not in (HOLDS, FROZEN, *SKIPPED)]
    named = "".join(
        f"\n- {r.library} `{r.variant}`: {r.status}" + (f" ({r.message})" if r.message else "")
        for r in others
    )
    skipped = sum(r.status in SKIPPED for r in results.rows)
    note = f"{skipped} more that are no image classifiers, or that the library itself could not build, are not counted."
    return f"{table(columns, lines)}\n\n{note}" + (f"\n\nNot cut:\n{named}" if named else "")


def _line(library: str, rows: Sequence[ZooRow], version: str) -> tuple[str, ...]:
    counted = [r for r in rows if r.status not in SKIPPED]
    count = Counter(r.status for r in counted)
    cut = [r for r in counted if r.status == HOLDS]
    halves = [r.half_ratio for r in cut if r.half_ratio is not None]
    known = ((HOLDS,), (FROZEN,), ("refused",), UNTRIED)
    others = set(count) - {status for one in known for status in one}
    return (
        f"{library} {version}".strip(),
        str(len(counted)),
        *(str(sum(count[status] for status in one)) for one in (*known, others)),
        f"{statistics.median(r.groups for r in cut):.0f}" if cut else "",
        f"{statistics.median(halves):.0%}" if halves else "",
    )
