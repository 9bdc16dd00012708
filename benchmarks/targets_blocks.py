"""What ``targets.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgeprune import records


class TargetRow(records.Record):
    """One net as one file of one target's format.

    ``agreement`` is with torch, on ``n`` images; ``error_steps`` the largest difference of an INT8 file's answers from those of the FP32
    file of its format, in steps of 1/255 of their range. Both are ``None`` where nothing here runs the file.
    """

    net: str
    target: str
    format: str
    precision: str
    where: str
    seconds: float
    size_bytes: int
    agreement: float | None = None
    error_steps: float | None = None
    accuracy: float | None = None
    int8_ops: int = 0
    message: str = ""


class TargetResults(records.Record):
    """``targets.json``."""

    schema_version: Literal[1] = 1
    command: str
    created: str
    split: str
    n: int
    torch_accuracy: dict[str, float]
    versions: dict[str, str]
    rows: tuple[TargetRow, ...]


def targets_block(
    results: TargetResults, table: Callable[..., str], *, precisions: tuple[str, ...] = ()
) -> str:
    """Every net by every target; of some precisions only, where they are named."""
    lines = [
        (
            row.net,
            row.target,
            f"{row.format}, {row.precision}",
            _where(row),
            _percent(row.agreement),
            "" if row.error_steps is None else f"{row.error_steps:.1f}",
            _percent(row.accuracy),
            f"{row.size_bytes / 1000:.0f} kB" if row.size_bytes else "",
            f"{row.seconds:.1f} s" if row.size_bytes else "",
        )
        for row in results.rows
        if not precisions or row.precision in precisions
    ]
    columns = (
        "net", "target", "file", "run by", "same class as torch", "largest error, INT8 steps", "accuracy", "size", "conversion",
    )  # fmt: skip
    known = ", ".join(f"{net} {share:.2%}" for net, share in results.torch_accuracy.items())
    note = (
        f"Dense nets, {results.n} images of the {results.split} split; nothing is pruned or trained here. torch itself: {known}."
        " Times of conversion are of a shared machine. A file that nothing here runs says `not run`."
    )
    return f"{table(columns, lines)}\n\n{note}"


def _where(row: TargetRow) -> str:
    """Who ran the file: this machine stands in for every board and phone."""
    is_stand_in = row.agreement is not None and row.target != "this-machine"
    return f"{row.where} (stand-in)" if is_stand_in else row.where or row.message


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
