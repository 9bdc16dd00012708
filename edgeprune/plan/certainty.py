"""Whether a structure surely keeps to the budget, as the gate will judge it at the end: by the upper end of an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeprune.formats import Resizable
from edgeprune.plan.bench import CONFIRM_LOOKS, Stand
from edgeprune.progress import Progress
from edgeprune.records.budget import Budget
from edgeprune.records.intervals import median_ms
from edgeprune.records.measurement import Block, Comparison
from edgeprune.records.plan import PlanCheck

# A plan must fit into this much of the budget: the last measurement is another session. The gate judges the upper end of an interval that
# it draws anew, so an upper bound here must also leave room for half an interval.
PLAN_SHARE = 0.995
# What a plan was accepted by, for the key of its stage.
RULE = f"upper end in {PLAN_SHARE} with half an interval of room, {CONFIRM_LOOKS}"


@dataclass(frozen=True)
class Limit:
    """A budget beside the latency of the dense net."""

    budget: Budget
    dense_ms: float

    @property
    def ms(self) -> float:
        """The budget in milliseconds."""
        return self.budget.limit_ms(self.dense_ms)

    def holds(self, found: Comparison, blocks: Sequence[Block]) -> bool:
        """Whether the upper bound of a structure with these blocks fits."""
        reach_ms = found.high * self.dense_ms
        if self.budget.kind == "ms":  # which the gate judges on the file alone
            reach_ms = max(reach_ms, median_ms(blocks).high)
        return reach_ms <= PLAN_SHARE * self.ms


@dataclass
class Confirmation:
    """Compares the best structure with dense once more, alone: the best of many measured times was a lucky one more often than not."""

    stand: Stand
    file: Resizable
    limit: Limit
    progress: Progress
    asked: int = 0
    unsure: list[PlanCheck] = field(default_factory=list)  # neither surely within nor surely over

    def sure(self, best: PlanCheck | None, checks: list[PlanCheck]) -> PlanCheck | None:
        """The best structure if it surely fits, with room for half an interval; else it counts as over from now on, in ``checks``."""
        if best is None:
            return None
        files = self.file.resized(best.widths), self.file.resized({})
        ratio = self.limit.ms / self.limit.dense_ms
        room = best.ratio_high / best.ratio_to_dense
        found = self.stand.judge(*files, PLAN_SHARE * ratio / room, f"confirm-{self.asked}")
        self.asked += 1
        is_over = found.low > ratio
        is_within = found.budget == "within"
        accepted = [b for b in found.candidate_blocks if b.rejected is None]
        if self.limit.budget.kind == "ms" and accepted:
            alone = median_ms(accepted)
            is_over |= alone.low > self.limit.ms
            is_within &= alone.high <= PLAN_SHARE * self.limit.ms
        if is_within and not is_over:
            return best
        self.progress.say(
            f"    {best.ratio_to_dense:.1%} of dense became {found.ratio:.1%} (up to {found.high:.1%}) when it was measured again,"
            f" {'over the budget' if is_over else 'too near to the budget'}"
        )
        refused = best.model_copy(
            update={
                "measured_ms": found.ratio * self.limit.dense_ms,
                "ratio_to_dense": found.ratio,
                "ratio_high": found.high,
                "within_budget": False,
            }
        )
        checks[checks.index(best)] = refused
        if not is_over:
            self.unsure.append(refused)
        return None

    def nearest(self, checks: list[PlanCheck]) -> PlanCheck | None:
        """Where nothing is sure: what exceeds the budget least by its upper bound, of what is not surely over."""
        if not self.unsure:
            return None
        nearest = min(self.unsure, key=lambda c: c.ratio_high)
        chosen = nearest.model_copy(update={"within_budget": True})
        checks[checks.index(nearest)] = chosen
        self.progress.say(
            f"    note: times vary too much to be sure of the budget; the plan is at {chosen.ratio_to_dense:.1%}"
            f" of dense, up to {chosen.ratio_high:.1%}"
        )
        return chosen
