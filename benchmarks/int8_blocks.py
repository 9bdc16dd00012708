"""What ``int8.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgeprune.records.base import Record


class RecipeRow(Record):
    """One way to make the INT8 file of one net. Accuracy and agreement (the class of torch) are on all samples of the split."""

    recipe: str
    accuracy: float
    agreement: float
    loss_nats: float
    note: str = ""


class NetRecipes(Record):
    """One net by every recipe. ``fp32`` is the accuracy of its FP32 file; ``seconds`` that of everything."""

    net: str
    created: str
    where: str
    n: int
    fp32: float
    seconds: float
    versions: dict[str, str]
    rows: tuple[RecipeRow, ...]


class RecipeResults(Record):
    """``int8.json``."""

    schema_version: Literal[1] = 1
    command: str
    split: str
    nets: tuple[NetRecipes, ...]


def int8_block(results: RecipeResults, table: Callable[..., str]) -> str:
    """Every recipe of every net."""
    lines = [
        (
            net.net,
            row.recipe,
            f"{row.accuracy:.2%}",
            f"{100 * (row.accuracy - net.fp32):+.2f}",
            f"{row.agreement:.2%}",
            f"{row.loss_nats:.2g}",
            row.note,
        )
        for net in results.nets
        for row in net.rows
    ]
    head = (
        "net", "recipe", "accuracy", "points against FP32", "same class as torch", "KL from FP32, nats", "note",
    )  # fmt: skip
    sizes = ", ".join(
        f"{net.net} n = {net.n}, FP32 {net.fp32:.2%}, {net.created[:10]}" for net in results.nets
    )
    note = (
        f"Dense nets, {results.split} split, stand-in ({results.nets[0].where}): {sizes}. No training with rounding, no layers in float."
        if results.nets
        else "No net was looked at."
    )
    return f"{table(head, lines, left=2)}\n\n{note}"
