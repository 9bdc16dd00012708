"""Flags that stand for keys of ``edgeprune.yaml``, under the same names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import click

Command = Callable[..., Any]


def importance_options(command: Command) -> Command:
    """Add the flags that say which channels go."""
    options = [
        click.option(
            "--importance",
            default="fisher",
            show_default=True,
            help="fisher, hessian, taylor, obs, variance, l2, l1, bn-scale, fpgm or random.",
        ),
        click.option(
            "--scope",
            type=click.Choice(["global", "local"]),
            default="global",
            show_default=True,
            help="Compare channels between groups, or cut each group to the same share.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def schedule_options(command: Command) -> Command:
    """Add the flags of the keys under ``recovery`` that say how long is trained, and how channels and weights go."""
    options = [
        click.option("--epochs", help="Passes over the training data for healing, such as 0.5."),
        click.option("--steps", help="Prune in 1 to 5 steps, or auto; default 1."),
        click.option("--start", help="Train kept weights (default), rewound or fresh ones."),
        click.option("--rewind-weights", help="Earlier weights of the dense model to rewind to."),
        click.option("--sparsity", help="Pattern of zeros: none (default), or 2:4 for TensorRT."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def int8_options(command: Command) -> Command:
    """Add the flags of the keys under ``int8``."""
    options = [
        click.option(
            "--int8",
            "effort",
            type=click.Choice(["plain", "auto", "thorough"]),
            help="What is done for INT8 accuracy: auto (default) where it costs over 0.3 points.",
        ),
        click.option(
            "--io", type=click.Choice(["float", "int8"]), help="Type of INT8 file inputs, outputs."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def formats_option(command: Command) -> Command:
    """Add the flag of the key ``formats``."""
    text = "Ship auto, the fastest as measured, or a name that the target lists; default its own."
    return click.option("--formats", help=text)(command)


def int8_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags say, as keys under ``int8``."""
    return {key: flags[key] for key in ("effort", "io") if flags.get(key) is not None}


def schedule_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags say, as keys under ``recovery``; the record checks them."""
    names = ("epochs", "steps", "start", "rewind_weights", "sparsity")
    given = {key: flags[key] for key in names if flags.get(key) is not None}
    if given.get("steps", "").isdecimal():
        given["steps"] = int(given["steps"])
    with contextlib.suppress(ValueError):
        given |= {key: float(given[key]) for key in ("epochs",) if key in given}
    if given.get("start", "rewound") != "rewound":
        given.setdefault(
            "rewind_weights", None
        )  # a file named in edgeprune.yaml is for another start
    return given
