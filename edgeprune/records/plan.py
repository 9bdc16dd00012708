"""What a search decides and leaves behind: the plan, its checks, what else was possible, and the file that a user may edit.

Units as in :mod:`edgeprune.records.measurement`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from edgeprune.errors import SpecError, UnknownName
from edgeprune.records.base import Record
from edgeprune.records.names import Precision, Stamp

Scope: TypeAlias = Literal["global", "local"]  # of importance: compared between groups, or not


class GroupPlan(Record):
    """One channel group: what it couples and which channels stay. ``kept`` is sorted; without any, the group's block is removed.

    What removing a block saves and costs counts once, with the first of its groups.
    """

    name: str
    channels: int
    kept: tuple[int, ...]
    layers: tuple[str, ...]
    saved_ms_predicted: float
    cost_nats: float
    note: str = ""


class FrozenGroup(Record):
    """Channels that are not touched, and why."""

    layers: tuple[str, ...]
    reason: str


class PruningPlan(Record):
    """Which channels of every group stay, and what that is predicted to cost and to bring.

    Times are predicted by the latency model as it is at the end of the search, corrected with all whole nets that were timed, of which this
    may be one.
    With the ``scope`` local all groups keep the same share of their channels, as near as their widths come to it.
    """

    schema_version: Literal[1] = 1
    groups: tuple[GroupPlan, ...]
    frozen: tuple[FrozenGroup, ...]
    precision: Precision
    importance: str
    scope: Scope = "global"
    limit_ms: float
    dense_ms: float
    predicted_ms: float
    predicted_cost_nats: float

    def widths(self) -> dict[str, int]:
        """Kept width of every group, by name."""
        return {group.name: len(group.kept) for group in self.groups}


class LatencyModelQuality(Record):
    """How well the latency model predicts whole nets that it was not fitted on.

    ``p95_error_ratio`` is the 95th percentile (nearest rank) over the whole nets between the smallest and the dense, each predicted
    from all others; with the 14 of a search that is the worst of them. Earlier reports lack it. ``kernels_taken`` of
    ``kernels_measured`` were timed by an earlier search on the same board.
    """

    kernels_measured: int
    nets_fitted: int
    nets_held_out: int
    mean_error_ratio: float
    worst_error_ratio: float
    p95_error_ratio: float | None = None
    kernels_taken: int = 0


class PlanCheck(Record):
    """One structure that was measured on the device before any training; ``predicted_ms`` is from before it was.

    ``cost_nats`` adds up what its groups cost one by one; ``loss_nats`` is what the whole structure loses once it is repaired (KL from the
    dense model on held-out samples), unknown for a plan that was given; ``trial_nats`` what it still loses after a short healing, known
    where structures with and without removed blocks were to be chosen between. ``unreliable`` says why its time, or that of the dense net
    beside it, should not be trusted.
    """

    widths: dict[str, int]
    predicted_ms: float
    measured_ms: float
    ratio_to_dense: float
    ratio_high: float
    within_budget: bool
    cost_nats: float
    loss_nats: float | None = None
    trial_nats: float | None = None
    unreliable: str | None = None


# Budgets that are looked at besides, of the dense latency.
SHARES = (
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
    0.1,
)


class WidthChoice(Record):
    """What it is predicted to save and to cost, in nats before healing, to cut one group alone to this width; 0 is its whole block."""

    width: int
    saved_ms: float
    cost_nats: float


class GroupCurve(Record):
    """All widths of one group that pay, ascending, the full one last."""

    group: str
    channels: int
    choices: tuple[WidthChoice, ...]


class ParetoPoint(Record):
    """A structure that nothing found is predicted to beat in both latency and cost."""

    predicted_ms: float
    cost_nats: float
    widths: dict[str, int]


class PlanFile(Record):
    """``plan.json``: the widths of a search, to be read, edited, and given to ``deploy --plan``.

    There ``target`` is compared and ``widths`` are taken; the rest is for whoever reads the file. ``predicted_ms`` is that of the plan.
    Width 0 removes the residual block that the group lies in, and all groups of a block have it or none; it is among a group's
    ``admissible_widths`` where that can be done.
    """

    schema_version: Literal[1] = 1
    target: str
    budget: str
    precision: Precision
    dense_ms: float
    predicted_ms: float
    measured_ms: float
    widths: dict[str, int]
    admissible_widths: dict[str, tuple[int, ...]]


def check_widths(
    widths: Mapping[str, int],
    grids: Mapping[str, Sequence[int]],
    together: Sequence[Sequence[str]] = (),
) -> None:
    """Raise unless every group exists and may have its width; groups in one set of ``together`` have width 0 all or none.

    Raises:
        SpecError: otherwise; names what there is.
    """
    for name, width in widths.items():
        if name not in grids:
            raise UnknownName("group", name, grids, where="the plan")
        if width not in grids[name]:
            near = sorted(grids[name], key=lambda w: (abs(w - width), w))[:4]
            raise SpecError(
                f"the width of {name} must be one of {', '.join(map(str, sorted(near)))} ..., but the plan has {width}",
                hint="other widths are not faster than the next larger one; admissible_widths of plan.json has them all",
            )
    for names in together:
        if len({bool(widths[name]) for name in names}) > 1:
            raise SpecError(
                "groups of one residual block must have width 0 all or none, but the plan has "
                + ", ".join(f"{name}: {widths[name]}" for name in names),
                hint="0 for all of them removes the block",
            )


class SearchResult(Record):
    """What a search found, without any training: the chosen structure, what else was possible, and how far predictions can be trusted.

    ``limit_ms`` is the budget; times of ``curves`` and ``points`` are predicted, those of ``checks`` carry ``stamp``.
    """

    schema_version: Literal[1] = 1
    edgeprune_version: str
    created: str
    command: str
    model: str
    target: str
    device: str
    stamp: Stamp
    budget: str
    limit_ms: float
    plan: PruningPlan
    checks: tuple[PlanCheck, ...]
    latency_model: LatencyModelQuality
    pareto: tuple[tuple[float, float], ...]
    points: tuple[ParetoPoint, ...]
    curves: tuple[GroupCurve, ...]

    def chosen(self) -> PlanCheck:
        """The measurement of the plan that counts: the last one of its widths."""
        return [c for c in self.checks if c.widths == self.plan.widths()][-1]


class PlanResult(Record):
    """The chosen plan, how it was checked, and what else was possible."""

    plan: PruningPlan
    checks: tuple[PlanCheck, ...]
    quality: LatencyModelQuality
    pareto: tuple[tuple[float, float], ...]
    points: tuple[ParetoPoint, ...] = ()
    curves: tuple[GroupCurve, ...] = ()

    def chosen(self) -> PlanCheck:
        """The measurement of the plan that counts: the last one of its widths."""
        return [c for c in self.checks if c.widths == self.plan.widths()][-1]
