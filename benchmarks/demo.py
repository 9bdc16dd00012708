"""Keep what the README shows of a run: ``python benchmarks/demo.py runs/rpi4-...`` writes ``benchmarks/results/demo.json``."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from blocks import RESULTS

from edgeprune.errors import EdgepruneError
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json
from edgeprune.records.report import Report


def trimmed(report: Report) -> Report:
    """The report without what no table needs: raw samples and the trade-off curve. Comparisons and their intervals stay."""
    return report.model_copy(update={"measurements": {}, "pareto": ()})


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "demo.json")
def main(run: Path, out: Path) -> None:
    """Copy the report of a finished RUN folder, trimmed."""
    try:
        report = read_json(Report, run / "report.json" if run.is_dir() else run)
        write_json(trimmed(report), out)
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(f"wrote {out}: {report.headline}; next: python benchmarks/readme.py")


if __name__ == "__main__":
    main()
