"""The commands that show finished runs again: ``report`` and ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.options import (
    GivenPath,
)
from edgeprune.errors import SpecError

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("run", type=GivenPath())
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(run: Path, as_json: bool) -> None:
    """Show the report of a finished run again."""
    from edgeprune.records.files import to_json
    from edgeprune.report import render_terminal

    found = _read_report(run)
    click.echo(to_json(found).decode() if as_json else render_terminal(found), nl=False)


@click.command()
@click.argument("runs", type=GivenPath(), nargs=-1, required=True)
def compare(runs: Sequence[Path]) -> None:
    """Show finished runs side by side."""
    from edgeprune.report import compare_text

    click.echo(compare_text([_read_report(run) for run in runs]), nl=False)


def _read_report(run: Path) -> Any:
    from edgeprune.records.base import read_json
    from edgeprune.records.report import Report

    path = run / "report.json" if run.is_dir() else run
    if not path.exists():
        folder = run if run.is_dir() else path.parent
        why = "give a run folder, such as runs/rpi4-0123, or its report.json"
        if (folder / "search.html").exists():
            why = f"this was a search: see {folder / 'search.html'}"
        elif run.is_dir() and (folder / "run.json").exists():
            why = "the run has not finished yet"
        raise SpecError(f"there is no report at {path}", hint=why)
    return read_json(Report, path)
