"""Flags that several commands share; those that stand for keys of ``edgeprune.yaml`` have the same names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from edgeprune.records.paths import located

# Keys under ``recovery`` that have a flag.
SCHEDULE = ("epochs", "steps", "start", "rewind_weights", "sparsity")

Command = Callable[..., Any]


class GivenPath(click.Path):
    """A path that can be used, there or not; ``~`` is the home folder also where the shell has left it."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(path_type=Path, **rules)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises as :func:`edgeprune.records.paths.located`, and click's own error for a rule that it breaks."""
        what = "the path" if param is None else (param.opts or [param.name or ""])[0]
        found: Path = super().convert(located(value, what=what), param, ctx)  # type: ignore[assignment]
        return found


wait_option = click.option(
    "--wait",
    type=float,
    metavar="MINUTES",
    help="For a board that another client holds; default 10, 0 does not wait.",
)


def model_options(command: Command) -> Command:
    """Add the model, and the flags that say what it is, where it is to run and what is shown."""
    options = [
        click.argument("model", required=False),
        click.option(
            "--target",
            "-t",
            help="What to ship for, such as rpi4: see `edgeprune targets list`, or a file.",
        ),
        click.option(
            "--device", "-d", help="Name in devices.yaml; default: one that can time the target."
        ),
        click.option("--weights", help="Weights for the model: safetensors, or a state dict."),
        click.option("--data", help="Image folder, .npz, or file.py:factory."),
        click.option(
            "--task",
            type=click.Choice(["classify"]),
            help="What the model is for; needed where the data has no labels.",
        ),
        click.option("--example", help="Use a shipped example, such as fashion-mnist."),
        click.option(
            "--size", type=(int, int), help="Height and width that images are resized to."
        ),
        click.option("--color", type=click.Choice(["rgb", "grey"]), help="Channels of the images."),
        click.option(
            "--mean", type=float, multiple=True, help="Of pixels in [0, 1]; once per channel."
        ),
        click.option(
            "--std", type=float, multiple=True, help="Of pixels in [0, 1]; once per channel."
        ),
        click.option(
            "--sustained", help="Also run without a pause, such as 10min, and judge the end of it."
        ),
        click.option(
            "--seed", type=click.IntRange(0), help="Seed of everything random; default 0."
        ),
        click.option(
            "--record",
            type=GivenPath(dir_okay=False),
            help="Record all that the device answers, for a replay device (*.epr).",
        ),
        wait_option,
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def budget_options(command: Command) -> Command:
    """Add the flags of the gates, and of the files that a search reads and writes."""
    options = [
        click.option(
            "--latency",
            "-l",
            help="15ms, 60% of dense, or 2.5x faster than dense; default: the target's.",
        ),
        click.option(
            "--max-drop", help="Accuracy points it may lose, such as 1%; default: the target's."
        ),
        click.option(
            "--tables",
            type=GivenPath(dir_okay=False),
            help="File of kernel times of this board, used and added to; default: what this computer timed in"
            " the last 7 days (none with EDGEPRUNE_NO_CACHED_TIMES=1).",
        ),
        click.option(
            "--run",
            type=GivenPath(),
            help="Folder for all results; default runs/<target>-<digest>.",
        ),
        click.option(
            "--resume",
            type=GivenPath(exists=True, file_okay=False),
            help="Go on with the run in this folder.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def importance_options(command: Command) -> Command:
    """Add the flags that say which channels go."""
    options = [
        click.option(
            "--importance",
            default="fisher",
            show_default=True,
            help="How channels are scored: fisher, hessian, taylor, obs, variance, l2, l1, bn-scale, fpgm, random.",
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
            "--io",
            type=click.Choice(["float", "int8"]),
            help="Type of the inputs and outputs of INT8 files.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def formats_option(command: Command) -> Command:
    """Add the flag of the key ``formats``."""
    text = "File format: auto ships the fastest as measured; or a name; default: the target's own."
    return click.option("--formats", help=text)(command)


# The flags behind the keys of ``edgeprune.yaml``, for messages.
AS_FLAGS = {
    "model": "MODEL",
    **{f"recovery.{key}": f"--{key.replace('_', '-')}" for key in SCHEDULE},
    **{f"preprocess.{key}": f"--{key}" for key in ("mean", "std", "size", "color")},
}


def int8_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags say, as keys under ``int8``."""
    return {key: flags[key] for key in ("effort", "io") if flags.get(key) is not None}


def schedule_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags say, as keys under ``recovery``; the record checks them."""
    given = {key: flags[key] for key in SCHEDULE if flags.get(key) is not None}
    if given.get("steps", "").isdecimal():
        given["steps"] = int(given["steps"])
    with contextlib.suppress(ValueError):
        given |= {key: float(given[key]) for key in ("epochs",) if key in given}
    if given.get("start", "rewound") != "rewound":
        # A file named in edgeprune.yaml is for another start.
        given.setdefault("rewind_weights", None)
    return given
