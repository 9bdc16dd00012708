"""What a search leaves behind besides its plan: what else was possible, and the file that a user may edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from edgeprune.errors import SpecError, UnknownName
from edgeprune.records.base import Record
from edgeprune.records.names import Precision, Stamp
from edgeprune.records.plan import LatencyModelQuality, PlanCheck, PruningPlan

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
)  # budgets that are looked at besides, of the dense latency


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
    """Nothing, when every group exists and may have its width; groups in one set of ``together`` have width 0 all or none.

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
