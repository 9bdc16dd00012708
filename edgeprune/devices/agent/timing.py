"""Interleaved timing over worker processes: all models in every round, only one running at a time, disturbed blocks marked."""

from __future__ import annotations

import random
import time
from typing import Any, Callable, Dict, Iterator, List, Protocol, Tuple

from .wire import Refused
from .workers import WorkerProcess

WINDOW_NS = 250_000_000  # what is judged at once: processor time is counted in ticks of 10 ms
EXTRA_RATIO = 0.5  # rounds that may be added for rejected ones, against those asked for
Blocks = Dict[str, List[Dict[str, Any]]]


class LapReport(Protocol):
    """What a look at the board found; ``reasons`` is empty when nothing disturbed the blocks since the last look."""

    @property
    def reasons(self) -> List[str]:
        """What disturbed the blocks."""

    @property
    def notes(self) -> List[str]:
        """What is worth knowing and does not void them."""


class TimedBlocks:
    """One timing request.

    Args:
        models: the worker of every model, by key.
        plan: how long to look: ``rounds``, ``block_ns``, ``min_runs``, ``max_runs``, ``warmup_runs``, ``warmup_ns``, ``settle``,
            ``reload``, ``seed``.
        start: begins to look at the board.
        look: what happened there since the last call.
    """

    def __init__(
        self,
        models: Dict[str, WorkerProcess],
        plan: Dict[str, Any],
        start: Callable[[], Any],
        look: Callable[[], LapReport],
    ) -> None:
        self._models, self._plan, self._start, self._look = models, plan, start, look
        self.blocks: Blocks = {key: [] for key in models}
        self.notes: List[str] = []
        self._block_ns: Dict[str, int] = {}
        self._pending: List[Dict[str, Any]] = []
        self._window_ns = 0
        self._load = 0  # how often the models were loaded again
        self._loading_ns = self._timing_ns = 0

    def run(self) -> str:
        """Time everything; gives why it stopped: ``rounds``, or ``rejected`` when too many rounds were disturbed.

        Raises:
            Refused: a model died, hung, or gave other outputs for the same input.
        """
        self._warm()
        self._start()  # now, because an idle processor's clock is no clock to compare with
        self._window_ns = time.monotonic_ns()
        rng = random.Random(self._plan["seed"])
        order = list(self._models)
        wanted, number = self._plan["rounds"], 0
        limit = wanted + int(EXTRA_RATIO * wanted)
        while number < limit and (number < wanted or self._accepted() < wanted):
            if number % 2 == 0:
                rng.shuffle(order)
            else:
                order.reverse()
            if number and self._plan["reload"] and self._loading_ns <= self._timing_ns:
                self._reload(order)
            self._round(order, number)
            number += 1
            if number >= wanted:
                self._judge()
        return "rounds" if self._accepted() >= wanted else "rejected"

    def _warm(self) -> None:
        for worker, keys in _runs(self._models, list(self._models)):
            expected_s = len(keys) * (self._plan["warmup_ns"] / 1e9 + 1.0)
            reply, _ = worker.ask(
                {"op": "warm", "keys": keys, "plan": self._plan}, expected_s=expected_s
            )
            self._block_ns.update(reply["block_ns"])
            self.notes.extend(reply["notes"])

    def _reload(self, order: List[str]) -> None:
        """Load all models anew. Called while loading took no longer than timing did, so that it costs at most half of the time."""
        start = time.monotonic_ns()
        for worker, keys in _runs(self._models, order):
            worker.ask({"op": "reload", "keys": keys}, expected_s=10 + len(keys))
        self._load += 1
        self._loading_ns += time.monotonic_ns() - start

    def _round(self, order: List[str], number: int) -> None:
        start = time.monotonic_ns()
        for worker, keys in _runs(self._models, order):
            expected_s = sum(self._block_ns[key] for key in keys) / 1e9
            request = {
                "op": "blocks",
                "keys": keys,
                "round": number,
                "check": number in (0, self._plan["rounds"] - 1),
            }
            reply, _ = worker.ask(request, expected_s=expected_s)
            for key in keys:
                block = dict(reply["blocks"][key], load=self._load)
                self.blocks[key].append(block)
                self._pending.append(block)
            if time.monotonic_ns() - self._window_ns >= WINDOW_NS:
                self._judge()
        self._timing_ns += time.monotonic_ns() - start

    def _judge(self) -> None:
        """Mark what was timed since the last look, when something disturbed it."""
        lap = self._look()
        self.notes.extend(note for note in lap.notes if note not in self.notes)
        for block in self._pending:
            if lap.reasons:
                block["rejected"] = "; ".join(lap.reasons)[:300]
        self._pending = []
        self._window_ns = time.monotonic_ns()

    def _accepted(self) -> int:
        """Rounds in which no block was rejected."""
        rejected = {b["round"] for found in self.blocks.values() for b in found if "rejected" in b}
        rounds = {b["round"] for found in self.blocks.values() for b in found}
        return len(rounds - rejected)


def _runs(
    models: Dict[str, WorkerProcess], order: List[str]
) -> Iterator[Tuple[WorkerProcess, List[str]]]:
    """Neighbours in the order that share a worker, asked for at once."""
    keys: List[str] = []
    for key in order:
        if keys and models[key] is not models[keys[0]]:
            yield models[keys[0]], keys
            keys = []
        keys.append(key)
    if keys:
        yield models[keys[0]], keys


def check_plan(plan: Dict[str, Any]) -> Dict[str, Any]:
    """The plan of a request, with what it must have.

    Raises:
        Refused: a number is missing or out of its range.
    """
    ranges = {
        "rounds": (1, 100_000), "block_ns": (1, 10**11), "min_runs": (1, 100_000), "max_runs": (1, 100_000),
        "warmup_runs": (0, 10_000), "warmup_ns": (0, 10**12), "seed": (0, 2**63),
    }  # fmt: skip
    found: Dict[str, Any] = {name: bool(plan.get(name)) for name in ("settle", "reload")}
    for name, (low, high) in ranges.items():
        value = plan.get(name)
        if not isinstance(value, int) or not low <= value <= high:
            raise Refused("request", "%s must be a whole number in [%d, %d]" % (name, low, high))
        found[name] = value
    return found
