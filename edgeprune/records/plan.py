"""What a search decides and what it knew: the plan, its checks, how well latency is predicted. Units as in :mod:`.artifact`."""

from __future__ import annotations

from typing import Literal, TypeAlias

from edgeprune.records.base import Record
from edgeprune.records.names import Precision

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
