"""What ``targets.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgeprune.records.base import Record
from edgeprune.records.int8 import LayerFallback

LEDGER_FROM = 0.005  # accuracy that INT8 loses against FP32 before its layers are looked at
SHOWN_LAYERS = 5
EMULATED = "emulated arm64 board"
WORKED_OUT = "worked out on this machine, not run"


class TargetRow(Record):
    """One net as one file of one target's format.

    ``agreement`` is with torch, on ``n`` images, those of the whole table where it is ``None``; ``error_steps`` the largest difference of
    an INT8 file's answers from those of the FP32 file of its format, in steps of 1/255 of their range. Both are ``None`` where nothing here
    runs the file, unless ``where`` is :data:`WORKED_OUT`: torch computed the operations of the file then. ``created`` is empty where it is
    that of the whole file.
    ``from_host_steps`` of a row of the emulated board is the largest difference from this machine's answers of the same file;
    ``host_kernels`` computed those where the board's runtime has others than XNNPACK for INT8. ``costs`` says, where INT8 lost more than
    :data:`LEDGER_FROM`, what each layer alone in float brings back.
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
    created: str = ""
    from_host_steps: float | None = None
    host_kernels: str = ""
    n: int | None = None
    costs: tuple[LayerFallback, ...] = ()


class TargetResults(Record):
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
    results: TargetResults,
    table: Callable[..., str],
    *,
    precisions: tuple[str, ...] = (),
    nets: tuple[str, ...] = (),
) -> str:
    """Every net by every target; of some precisions and nets only, where they are named."""
    if nets:
        rows = tuple(row for row in results.rows if row.net in nets)
        known_nets = {k: v for k, v in results.torch_accuracy.items() if k in nets}
        results = results.model_copy(update={"rows": rows, "torch_accuracy": known_nets})
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
            f"{row.seconds:.1f} s" if row.seconds else "",
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
    if any(row.where == WORKED_OUT for row in results.rows):
        note += f" `{WORKED_OUT}`: torch computed the operations in the file, one by one, which is no run of its runtime."
    parts = [table(columns, lines), note]
    costly = [row for row in results.rows if row.costs]
    if costly:
        parts.append(
            f"Where INT8 costs more than {LEDGER_FROM:.1%}, the layers that cost it: nats of KL from FP32 that go away when the layer alone"
            " stays in float."
        )
        parts.append("\n".join(_ledger(row) for row in costly))
    return "\n\n".join(parts)


def merged(old: tuple[TargetRow, ...], new: tuple[TargetRow, ...]) -> tuple[TargetRow, ...]:
    """Rows of an earlier run, those that were made again replaced where they stood; new ones at the end."""
    made = {_place(row) for row in new}
    kept: list[TargetRow] = []
    for row in old:
        place = _place(row)
        if place not in made:
            kept.append(row)
        elif place not in {_place(k) for k in kept}:
            kept += [r for r in new if _place(r) == place]
    here = {_place(row) for row in kept}
    return tuple(sorted((*kept, *(r for r in new if _place(r) not in here)), key=lambda r: r.net))


def _place(row: TargetRow) -> tuple[str, str, bool]:
    return row.net, row.target, row.where.endswith(EMULATED)


def _ledger(row: TargetRow) -> str:
    worst = sorted(row.costs, key=lambda cost: -cost.gain_nats)[:SHOWN_LAYERS]
    told = ", ".join(f"`{cost.layer}` {cost.gain_nats:.3g}" for cost in worst)
    return f"- {row.net}, {row.format} ({row.target}): {told}"


def _where(row: TargetRow) -> str:
    """Who ran the file: this machine stands in for every board and phone."""
    if row.from_host_steps is not None:
        by = f" by its {row.host_kernels} kernels" if row.host_kernels else ""
        return f"{row.where}; {row.from_host_steps:.1f} steps from this machine's answers{by}"
    is_run = row.agreement is not None and row.where != WORKED_OUT
    is_stand_in = is_run and row.target != "this-machine"
    if is_stand_in:
        return f"{row.where} (stand-in)"
    where = row.where if row.n is None else f"{row.where}; n = {row.n}"
    return ": ".join(part for part in (where, row.message) if part)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
