"""What ``walltime.py`` writes down, and the Markdown that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgeprune.records.base import Record
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.report import StageCost
from edgeprune.report.figures import seconds_text, share_text


class SolverTime(Record):
    """The solver alone, on the costs and the corrected latency model of a search.

    Seconds are by the wall clock, each the median of ``repeats``. ``solve_seconds`` is one structure for the budget, ``pareto_seconds`` the
    whole front, of ``points`` structures; ``choices`` are the widths of all groups that have more than one, which are ``groups``.
    """

    groups: int
    choices: int
    solve_seconds: float
    pareto_seconds: float
    points: int
    repeats: int


class WallTime(Record):
    """``walltime.json``: one search from an empty run folder. ``seconds`` is all of it, by the wall clock; ``stages`` are its parts.

    ``checked`` counts the structures that were measured whole, ``ratio`` is the chosen one's measured share of the dense latency.
    ``solver`` was timed afterwards and is no part of ``seconds``; earlier files lack it.
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
    solver: SolverTime | None = None
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
    stages = table(("stage", "what it is", "time"), rows, left=2)
    return "\n\n".join((intro, stages, *_solver_text(found.solver)))


def _solver_text(solver: SolverTime | None) -> tuple[str, ...]:
    if solver is None:
        return ()
    return (
        f"The solver alone, on the costs and the latency model of that search ({solver.groups} groups, {solver.choices} widths):"
        f" **{seconds_text(solver.solve_seconds)}** for a budget, {seconds_text(solver.pareto_seconds)} for a front of"
        f" {solver.points} structures (medians of {solver.repeats}).",
    )
