"""Put the figures of ``benchmarks/results`` into README.md and docs: ``python benchmarks/readme.py``, or ``--check`` to only look.

A block stands between ``<!-- figures:NAME -->`` and ``<!-- /figures:NAME -->`` on lines of their own. A block whose results file does
not exist is emptied: no figure stands in a page without a file behind it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import click
from blocks import RESULTS
from pages import load_blocks, load_plots

from edgeprune.errors import EdgepruneError, SpecError, UnknownName
from edgeprune.records.files import write_bytes

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"^<!-- (?P<end>/?)figures:(?P<name>[a-z0-9-]+) -->$")


def filled(text: str, blocks: Mapping[str, str | None], *, where: str) -> str:
    """A page with every block replaced.

    Raises:
        UnknownName: a block that no results file makes.
        SpecError: a block that is not closed, or closed without being open.
    """
    lines: list[str] = []
    inside: str | None = None
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        fenced ^= inside is None and line.startswith("```")
        mark = None if fenced else _MARK.match(line)
        if mark is None:
            if inside is None:
                lines.append(line)
            continue
        name, ends = mark["name"], bool(mark["end"])
        if ends != (inside is not None) or (ends and name != inside):
            raise SpecError(
                f"blocks of figures must open and close in turn, but {where} line {number} has {line!r}"
            )
        if name not in blocks:
            raise UnknownName("block", name, blocks, where=where)
        lines.append(line)
        if not ends:
            block = blocks[name]
            lines += [] if block is None else ["", block, ""]
        inside = None if ends else name
    if inside is not None:
        raise SpecError(f"the block {inside!r} in {where} is not closed")
    return "\n".join(lines) + "\n"


def pages(root: Path) -> list[Path]:
    """The pages that may hold figures."""
    return [p for p in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if p.is_file()]


def stale(root: Path, results: Path) -> dict[Path, str]:
    """The pages whose blocks, and the pictures that, are not what the results say; what they should be. Raises as :func:`filled`."""
    blocks = load_blocks(results)
    found = {}
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        wanted = filled(text, blocks, where=path.name)
        if wanted != text:
            found[path] = wanted
    for place, drawn in load_plots(results).items():
        path = root / place
        if not path.is_file() or path.read_text(encoding="utf-8") != drawn:
            found[path] = drawn
    return found


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if a page is stale.")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, help="Of the checkout.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(check: bool, root: Path, results: Path) -> None:
    """Rewrite the blocks of figures in README.md and docs/*.md."""
    try:
        found = stale(root, results)
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    for path, text in found.items():
        if not check:
            write_bytes(path, text.encode())
        click.echo(f"{path.name}: {'stale' if check else 'rewritten'}")
    if check and found:
        click.echo("run: python benchmarks/readme.py", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
