"""A plan is accepted only where the gate, which draws an interval of its own, will normally be met."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.devices.timing.decide import Decision, interval, judge_budget
from edgeprune.plan.bench import CONFIRM_LOOKS
from edgeprune.plan.certainty import PLAN_SHARE, Confirmation, Limit
from edgeprune.progress import Silent
from edgeprune.records.budget import parse_budget
from edgeprune.records.measurement import Block
from edgeprune.records.plan import PlanCheck
from edgeprune.records.statistics import centre

DENSE_MS = 10.0


def check(ratio: float, high: float) -> PlanCheck:
    return PlanCheck(
        widths={"a": 8}, predicted_ms=ratio * DENSE_MS, measured_ms=ratio * DENSE_MS,
        ratio_to_dense=ratio, ratio_high=high, within_budget=True, cost_nats=1.0,
    )  # fmt: skip


class Stand:
    """Compares as a board does: log-ratios of loads that scatter about the truth, and looks again while the answer is open."""

    def __init__(
        self, truth: float, noise: float, seed: int = 0, ms: tuple[float, ...] = ()
    ) -> None:
        self.truth, self.noise, self.ms = truth, noise, ms
        self.draw = np.random.default_rng(seed)

    def ratios(self, n: int) -> list[float]:
        return list(math.log(self.truth) + self.draw.normal(0, self.noise, n))

    def judge(self, candidate: bytes, dense: bytes, budget_ratio: float, purpose: str) -> Decision:
        logs: list[float] = []
        for look in CONFIRM_LOOKS:
            logs += self.ratios(look - len(logs))
            found = interval(logs)
            budget = judge_budget(found, budget_ratio)
            if budget != "undecided":
                break
        blocks = tuple(
            Block(round=i, calls_per_sample=1, samples_ns=(round(ms * 1e6),))
            for i, ms in enumerate(self.ms)
        )
        return Decision(
            candidate="chosen", reference="dense", verdict="faster", budget=budget,
            budget_ratio=budget_ratio, ratio=found.ratio, low=found.low, high=found.high,
            pairs=len(logs), timed_pairs=len(logs), candidate_blocks=blocks, reference_blocks=(),
            seconds=0.0, stop_reason="decided",
        )  # fmt: skip


def confirmation(stand: Any, budget: str = "60%") -> Confirmation:
    file: Any = SimpleNamespace(resized=lambda widths: b"")
    return Confirmation(stand, file, Limit(parse_budget(budget), DENSE_MS), Silent())


@pytest.mark.parametrize("noise", [0.005, 0.015, 0.03])
def test_a_plan_that_was_accepted_meets_the_gate_nearly_always(noise: float) -> None:
    met = accepted = 0
    for seed in range(150):
        # Near the budget, where chance decides most; the check before it had 12 loads.
        stand = Stand(0.6 * (PLAN_SHARE - 1.2 * noise), noise, seed)
        first = centre(stand.ratios(12), 0.9)
        lead = check(math.exp(first.estimate), math.exp(first.high))
        if confirmation(stand).sure(lead, [lead]) is None:
            continue
        accepted += 1
        met += math.exp(centre(stand.ratios(24)).high) <= 0.6
    assert accepted >= 30
    assert met >= 0.93 * accepted


def test_a_plan_whose_interval_reaches_too_near_to_the_budget_is_not_accepted() -> None:
    lead = check(0.592, 0.597)
    checks = [lead]
    near = confirmation(Stand(0.594, 0.01))
    assert near.sure(lead, checks) is None
    assert not checks[0].within_budget
    assert checks[0].ratio_high * 0.597 / 0.592 > PLAN_SHARE * 0.6  # with half an interval of room
    assert near.sure(None, checks) is None
    chosen = near.nearest(checks)  # nothing else is left, and this one is not surely over
    assert chosen is not None
    assert chosen.within_budget
    assert checks == [chosen]


def test_a_plan_that_is_surely_over_is_never_the_nearest() -> None:
    lead = check(0.59, 0.595)
    checks = [lead]
    over = confirmation(Stand(0.63, 0.005))
    assert over.sure(lead, checks) is None
    assert over.nearest(checks) is None


def test_a_budget_in_milliseconds_is_held_against_the_file_alone() -> None:
    lead = check(0.55, 0.552)
    quick = Stand(0.55, 0.002, ms=(5.5, 5.52, 5.48, 5.51, 5.49, 5.5, 5.5, 5.51, 5.49))
    assert confirmation(quick, "6ms").sure(lead, [lead]) is lead
    drifted = Stand(0.55, 0.002, ms=(5.9, 6.1, 5.95, 6.05, 6.0, 5.99, 6.01, 5.97, 6.03))
    assert confirmation(drifted, "6ms").sure(lead, [lead]) is None
    assert confirmation(drifted, "60%").sure(lead, [lead]) is lead
