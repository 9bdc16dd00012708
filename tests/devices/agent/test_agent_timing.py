"""When a timing request loads its models anew: on workers and a clock that are told how long everything takes."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprune.devices.agent import timing
from edgeprune.devices.agent.timing import TimedBlocks, check_plan

PLAN = {
    "rounds": 30, "block_ns": 1, "min_runs": 1, "max_runs": 1, "warmup_runs": 0, "warmup_ns": 0, "seed": 0, "reload": True,
}  # fmt: skip


class Clock:
    """Stands still, but for what the workers do."""

    def __init__(self) -> None:
        self.ns = 0

    def monotonic_ns(self) -> int:
        return self.ns


class Worker:
    """Takes ``block_ns`` for a block and ``load_ns`` to load; writes down what it was asked."""

    def __init__(self, clock: Clock, block_ns: int, load_ns: int) -> None:
        self.clock, self.block_ns, self.load_ns = clock, block_ns, load_ns
        self.asked: list[str] = []

    def ask(self, header: dict[str, Any], **_: Any) -> tuple[dict[str, Any], bytes]:
        self.asked.append(header["op"])
        keys = header["keys"]
        if header["op"] == "warm":
            return {"block_ns": dict.fromkeys(keys, 1), "notes": []}, b""
        if header["op"] == "reload":
            self.clock.ns += self.load_ns
            return {}, b""
        self.clock.ns += self.block_ns
        block = {"round": header["round"], "calls_per_sample": 1, "samples_ns": [1]}
        return {"blocks": {key: dict(block) for key in keys}}, b""


class Quiet:
    """A look at a board that nothing disturbed."""

    reasons: list[str] = []
    notes: list[str] = []


def timed(
    monkeypatch: pytest.MonkeyPatch, block_ns: int, load_ns: int, **changes: Any
) -> TimedBlocks:
    """A request for two models that ran to its end."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    workers = {key: Worker(clock, block_ns, load_ns) for key in "ab"}
    plan = check_plan({**PLAN, **changes})
    session = TimedBlocks(workers, plan, lambda: None, Quiet)  # type: ignore[arg-type]
    session.run()
    return session


def loads(session: TimedBlocks) -> list[int]:
    """The number of the load in each round, which is the same for both models."""
    both = [[block["load"] for block in session.blocks[key]] for key in "ab"]
    assert both[0] == both[1]
    return both[0]


def test_where_loading_is_short_every_round_has_its_own_load(monkeypatch):
    assert loads(timed(monkeypatch, block_ns=100, load_ns=10)) == list(range(30))
    assert loads(timed(monkeypatch, block_ns=100, load_ns=100)) == list(range(30))


@pytest.mark.parametrize("load_ns", [300, 1000, 5000])
def test_loading_anew_takes_at_most_half_of_the_time(monkeypatch, load_ns):
    found = loads(timed(monkeypatch, block_ns=100, load_ns=load_ns))
    # The last load may have begun just before it was too much.
    assert (found[-1] - 1) * load_ns <= 30 * 100
    assert found[-1] >= 30 * 100 // load_ns
    assert found == sorted(found)
    assert found[0] == 0


def test_nothing_is_loaded_anew_unless_the_plan_says_so(monkeypatch):
    assert loads(timed(monkeypatch, block_ns=100, load_ns=1, reload=False)) == [0] * 30
