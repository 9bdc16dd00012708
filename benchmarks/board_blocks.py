"""Figures about boards as Markdown: recoveries, overheads, set-up, and the failure matrix with the test that shows each row."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.records.base import Record
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.version import VERSION

MATRIX = Path(__file__).parents[1] / "tests" / "devices" / "test_failure_matrix.py"


class Recovery(Record):
    """Seconds from a failure until another client held the board, once for each repeat."""

    failure: str
    seconds: tuple[float, ...]


class Overhead(Record):
    """One timing request: wall time on the host, and the part inside the runtime."""

    request: str
    models: int
    wall_s: float
    inside_s: float

    @property
    def ratio(self) -> float:
        """What the request took beyond the runtime, against the time in it."""
        return self.wall_s / self.inside_s - 1


class BoardResults(Record):
    """``results/boards.json``."""

    schema_version: int = 1
    edgeprune_version: str = VERSION
    fingerprint: Fingerprint
    lease_ttl_s: float
    recoveries: tuple[Recovery, ...]
    overheads: tuple[Overhead, ...]


def boards_block(found: BoardResults, setup: dict[str, Any] | None) -> str:
    """Recoveries and overheads, and the cost of setting a board up where that was measured."""
    lines = [
        f"A real sshd on loopback, stamped `{found.fingerprint.stamp}`"
        f" ({found.fingerprint.cpu_model}); leases of {found.lease_ttl_s:g} s.",
        "",
        _table(
            ("failure", "until another client holds the board: median", "worst", "n"),
            [
                (
                    r.failure,
                    f"{statistics.median(r.seconds):.1f} s",
                    f"{max(r.seconds):.1f} s",
                    str(len(r.seconds)),
                )
                for r in found.recoveries
            ],
        ),
        "",
        _table(
            ("one timing request", "models", "wall", "inside the runtime", "overhead"),
            [
                (
                    o.request,
                    str(o.models),
                    f"{o.wall_s:.2f} s",
                    f"{o.inside_s:.2f} s",
                    f"{o.ratio:.1%}",
                )
                for o in found.overheads
            ],
        ),
    ]
    if setup is not None:
        rows = [
            (name, f"{setup[name]['bytes_sent'] / 1e6:.1f} MB", f"{_seconds(setup[name]):.0f} s")
            for name in ("first", "second")
        ]
        runtimes = ", ".join(f"{r['runtime']} {r['version']}" for r in setup["first"]["runtimes"])
        lines += [
            "",
            f"`devices setup` of {runtimes} on the emulated arm64 board (seconds `emulated`; the agent has {setup['agent_bytes']} bytes):",
            "",
            _table(("set-up", "sent", "time"), rows),
        ]
    return "\n".join(lines)


def _seconds(report: dict[str, Any]) -> float:
    return float(sum(report["seconds"].values()))


def matrix_rows(path: Path = MATRIX) -> list[tuple[int, str, str, str, tuple[str, ...]]]:
    """The rows of the failure matrix, read without running the tests."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "ROWS":
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no ROWS")


def matrix_block() -> str:
    """Every row of the failure matrix: survived, with the tests that show it, or why it cannot be shown here."""
    rows = []
    for number, fault, _, required, cover in matrix_rows():
        reason = next((c for c in cover if ": " in c), "")
        shown = reason or "<br>".join(f"`{c.rpartition('::')[2]}`" for c in cover)
        rows.append((str(number), fault, required, shown))
    return _table(("", "fault", "what has to happen", "shown by"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
