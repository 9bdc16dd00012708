"""What commands print: lines without control characters, and lists as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click


def plain(text: str) -> str:
    """One line without control characters: names may come from a board or a file from outside."""
    return "".join(c if c.isprintable() else " " for c in text)


def say(text: str) -> None:
    """One line on stderr, where everything goes that is no result."""
    click.echo(plain(text), err=True)


def print_list(as_json: bool, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Rows by name, all with the same columns: a table with a header for people, or one JSON object."""
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    columns = list(next(iter(rows.values()), {}))
    lines = [
        ["name", *columns],
        *([name, *(row[c] for c in columns)] for name, row in rows.items()),
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo(plain("  ".join(cells)).rstrip())
