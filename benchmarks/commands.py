"""Commands as they may stand in a results file, and what every benchmark says before it starts."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from edgeprune.plan.latency.times_cache import SWITCH

_FOLDER_FLAGS = ("--run", "--resume", "--out")


def public_command(command: str) -> str:
    """A command without what is of one machine only: its folders are left out, and the last part of other absolute paths stays."""
    words: list[str] = []
    skip = False
    for word in shlex.split(command):
        if skip or word.split("=", 1)[0] in _FOLDER_FLAGS:
            skip = not skip and "=" not in word
            continue
        name, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(name + mark + (Path(value).name if Path(value).is_absolute() else value))
    return shlex.join(words)


def time_every_kernel() -> None:
    """Take no kernel times of earlier searches from here on: a figure must not depend on what else this computer has done this week."""
    os.environ[SWITCH] = "1"
