"""``edgeprune doctor``: what this machine has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from edgeprune.records.version import VERSION

if TYPE_CHECKING:
    pass


@click.command()
def doctor() -> None:
    """What this machine has: packages, formats, devices."""
    from importlib import metadata

    from edgeprune.records import catalog
    from edgeprune.records.formats import all_facts

    click.echo(f"edgeprune {VERSION}, Python {sys.version.split()[0]}")
    wanted = {
        "core": ("torch", "torch-pruning", "paramiko", "numpy"),
        **{facts.name: facts.tools for facts in all_facts() if facts.tools},
    }
    for extra, packages in wanted.items():
        found = []
        for package in packages:
            try:
                found.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                found.append(f"{package} MISSING (pip install 'edgeprune[{extra}]')")
        click.echo(f"{extra:10} {', '.join(found)}")
    click.echo(f"devices    {', '.join(catalog.devices())}")
