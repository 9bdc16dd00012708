"""What commands print: lines without control characters, and lists as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click


def plain(text: str) -> str:
    """One line without control characters: names may come from a board or a file from outside."""
    return "".join(c if c.isprintable() else " " for c in text)


def print_list(as_json: bool, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Rows by name, all with the same columns: a table for people, or one JSON object."""
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(map(len, rows), default=0)
    columns = list(next(iter(rows.values()), {}))
    widths = {c: max(len(row[c]) for row in rows.values()) for c in columns[:-1]}
    for name, row in rows.items():
        cells = [row[c].ljust(widths.get(c, 0)) for c in columns]
        click.echo(plain(f"{name:{width}}  {'  '.join(cells)}").rstrip())
