"""What ``walltime.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgeprune import records
from edgeprune.report.figures import seconds_text, share_text
from edgeprune.results import Fingerprint, StageCost
from edgeprune.specs import Precision


class WallTime(records.Record):
    """``walltime.json``: one search from an empty run folder. ``seconds`` is all of it, by the wall clock; ``stages`` are its parts.

    ``checked`` counts the structures that were measured whole, ``ratio`` is the chosen one's measured share of the dense latency.
    """

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    net: str
    target: str
    budget: str
    precision: Precision
    fingerprint: Fingerprint
    seconds: float
    stages: tuple[StageCost, ...]
    groups: int
    kernels: int
    checked: int
    ratio: float
    versions: dict[str, str]


def walltime_block(
    found: WallTime, table: Callable[..., str], stamp: Callable[[Fingerprint], str]
) -> str:
    """Seconds of each stage before the training."""
    intro = (
        f"**{found.net}** (random weights), target `{found.target}` on `{found.fingerprint.device}`"
        f" ({found.fingerprint.cpu_model}, {found.fingerprint.cores} cores; {stamp(found.fingerprint)}), {found.precision}, to"
        f" {found.budget}: **{seconds_text(found.seconds)}** from an empty folder to a measured plan of {found.groups} groups"
        f" ({share_text(found.ratio)} of dense), with {found.kernels} kernels timed and {found.checked} structures measured whole."
    )
    rows = [(s.name, s.kind, seconds_text(s.seconds)) for s in found.stages]
    return f"{intro}\n\n{table(('stage', 'what it is', 'time'), rows, left=2)}"
