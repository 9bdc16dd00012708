"""``edgeprune init``: questions on the terminal, and what comes of them in edgeprune.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    pass


@click.command()
@click.option("--model", help="What makes the model: file.py:factory.")
@click.option("--weights", help="Weights for it: safetensors, or a state dict.")
@click.option("--data", help="Image folder, .npz, or file.py:factory.")
@click.option("--target", "-t", default="rpi4", show_default=True, help="What to ship for.")
@click.option("--yes", "-y", is_flag=True, help="Take every proposal without asking.")
def init(model: str | None, weights: str | None, data: str | None, target: str, yes: bool) -> None:
    """Look at this folder, ask, and write edgeprune.yaml."""
    from edgeprune.records import catalog
    from edgeprune.workload.init import initialise

    catalog.target(target)

    def ask(question: str, default: str) -> str:
        return str(click.prompt(question, default=default or None, err=True))

    path = initialise(
        Path.cwd(), model=model, weights=weights, data=data, target=target, ask=None if yes else ask
    )
    click.echo(f"wrote {path}; next: edgeprune deploy --target {target}")
