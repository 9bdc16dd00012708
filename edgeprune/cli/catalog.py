"""The commands that show what can be shipped for: ``targets`` and ``profiles``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.console import print_list

if TYPE_CHECKING:
    pass


@click.group()
def targets() -> None:
    """What edgeprune can ship for."""


@click.group()
def profiles() -> None:
    """What is known of each processor: facts with sources."""


@targets.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def targets_list(as_json: bool) -> None:
    """All targets."""
    from edgeprune.records import catalog

    found = {name: catalog.target(path) for name, path in catalog.targets().items()}
    print_list(
        as_json,
        {
            n: {"format": t.format, "profile": t.profile, "summary": t.summary}
            for n, t in found.items()
        },
    )


@profiles.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def profiles_list(as_json: bool) -> None:
    """All profiles."""
    from edgeprune.records import catalog

    found = {name: catalog.profile(path) for name, path in catalog.profiles().items()}
    print_list(as_json, {n: {"isa": p.isa, "summary": p.summary} for n, p in found.items()})


@targets.command("show")
@click.argument("name")
def targets_show(name: str) -> None:
    """One target as YAML, with a line on what its INT8 scheme means."""
    from edgeprune.records import catalog

    _print_yaml(catalog.target(name))


@profiles.command("show")
@click.argument("name")
def profiles_show(name: str) -> None:
    """One profile as YAML, every fact with its source."""
    from edgeprune.records import catalog

    _print_yaml(catalog.profile(name))


def _print_yaml(record: Any) -> None:
    import yaml

    from edgeprune.records.int8 import SCHEME_WORDS

    click.echo(f"# {SCHEME_WORDS}")
    plain = record.model_dump(mode="json", exclude_none=True)  # what is not set is not said
    click.echo(yaml.safe_dump(plain, sort_keys=False), nl=False)
