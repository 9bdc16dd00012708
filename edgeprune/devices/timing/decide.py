"""Is a file faster than another, or fast enough? Looks again only while the answer is open.

Pairs of blocks are timed in ABBA order, each after a fresh load of both files; after 12, 24, 48 and 96 of them the centre of their
ratios is judged by a signed-rank interval of 99 %. Four looks at 1 % each err in at most 4 % of comparisons of equal files (Bonferroni),
and the extra condition that a difference must be over 1 % makes that fewer. What the looks cannot settle is ``undecided``, which a search
treats as a tie, never as a win.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edgeprune.devices.board import MAX_REJECTED_RATIO, Board
from edgeprune.devices.plans import DECIDE, TimingPlan
from edgeprune.devices.timing.measure import ModelFile, forget, paired_log_ratios
from edgeprune.errors import Unreliable
from edgeprune.records.base import Record
from edgeprune.records.measurement import Block
from edgeprune.records.statistics import CONFIDENCE, centre

LOOKS = (12, 24, 48, 96)  # accepted pairs, after each of which both files get fresh processes
MIN_DIFFERENCE = 0.01  # a smaller one is of no use to a search
TIE_WIDTH = 0.02
MAX_S = 120.0
_SPARE = 1.5  # pairs that may be timed for each that must count

Verdict = Literal["faster", "slower", "tie", "undecided"]
BudgetVerdict = Literal["within", "over", "undecided"]


@dataclass(frozen=True)
class Interval:
    """The centre of the ratios of some pairs, and the interval that holds the true one with ``coverage``."""

    ratio: float
    low: float
    high: float
    coverage: float


class Decision(Record):
    """A candidate against a reference, judged on pairs of blocks.

    ``ratio`` is candidate / reference, bounded by ``low`` and ``high``; ``pairs`` of ``timed_pairs`` counted, the others have a rejected
    block. ``budget`` is the verdict on ``budget_ratio``. All blocks are kept.
    """

    candidate: str
    reference: str
    verdict: Verdict
    budget: BudgetVerdict | None
    budget_ratio: float | None
    ratio: float
    low: float
    high: float
    pairs: int
    timed_pairs: int
    candidate_blocks: tuple[Block, ...]
    reference_blocks: tuple[Block, ...]
    seconds: float
    stop_reason: Literal["decided", "pairs", "time"]
    unreliable: str | None = None


def interval(log_ratios: Sequence[float]) -> Interval:
    """The centre of log-ratios as a ratio, with its interval of at least 99 %, or the full range under 8 pairs.

    Raises:
        ValueError: there is no pair.
    """
    if not log_ratios:
        raise ValueError("an interval must have at least one pair")
    found = centre(log_ratios)
    low, ratio, high = (math.exp(x) for x in (found.low, found.estimate, found.high))
    return Interval(ratio, low, high, found.coverage)


def judge(found: Interval) -> Verdict:
    """What an interval says: another speed when it excludes 1 and the centre is over 1 % away, a tie when it is at most 2 % wide."""
    if found.coverage < CONFIDENCE:
        return "undecided"
    difference = math.log(found.ratio)
    if abs(difference) > MIN_DIFFERENCE and (found.high < 1 or found.low > 1):
        return "faster" if difference < 0 else "slower"
    return "tie" if math.log(found.high / found.low) <= TIE_WIDTH else "undecided"


def judge_budget(found: Interval, budget_ratio: float) -> BudgetVerdict:
    """Whether the whole interval lies on one side of a budget; a ratio that equals it is within."""
    if found.coverage < CONFIDENCE:
        return "undecided"
    if found.high <= budget_ratio:
        return "within"
    return "over" if found.low > budget_ratio else "undecided"


def rejected_share(blocks: Sequence[Block]) -> float:
    """Share of blocks that do not count."""
    return sum(b.rejected is not None for b in blocks) / len(blocks) if blocks else 0.0


def decide(
    board: Board,
    candidate: ModelFile,
    reference: ModelFile,
    *,
    runtime: str,
    threads: int,
    budget_ratio: float | None = None,
    plan: TimingPlan = DECIDE,
    looks: Sequence[int] = LOOKS,
    purpose: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Decision:
    """Compare two files, or judge one against a share of the other's latency, with as few pairs as it takes.

    Args:
        board: where to time; both files are loaded there meanwhile.
        candidate: the file in question.
        reference: what it is compared with.
        runtime: what runs them.
        threads: threads of the runtime.
        budget_ratio: the allowed share of the reference's latency; then this is what ends the looks, and ``verdict`` says what the last
            look shows.
        plan: block length; its ``rounds`` are not used.
        looks: rising numbers of accepted pairs after which to judge. More looks than four err more often.
        purpose: see :meth:`Board.time`; a number is added to it for each request.
        clock: seconds on this machine; no new look starts after 120 of them.

    Returns:
        The decision; ``undecided`` after the last look or 120 s.

    Raises:
        Unreliable: over 30 % of the blocks were rejected. On a stand-in and locally, ``unreliable`` says so.
        DeviceError: a file did not load, or the board failed.
    """
    start = clock()
    names = [f"candidate {candidate.name}", f"reference {reference.name}"]
    raises = _refuses_doubt(board, runtime, threads)
    try:
        load = functools.partial(_load, board, names, (candidate, reference), runtime, threads)
        load()
        pairs = _Pairs(board, names, plan, load, purpose)
        reason = _look(pairs, looks, budget_ratio, lambda: clock() - start)
    except BaseException:
        forget(board, names)
        raise
    board.unload(names)
    if pairs.unreliable is not None and raises:
        raise Unreliable(
            f"{pairs.unreliable} while {candidate.name} was compared with {reference.name}",
            hint="end other programs on the board, cool it, and try again",
        )
    found = pairs.found()
    return Decision(
        candidate=candidate.name,
        reference=reference.name,
        verdict=judge(found),
        budget=None if budget_ratio is None else judge_budget(found, budget_ratio),
        budget_ratio=budget_ratio,
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        pairs=len(pairs.ratios),
        timed_pairs=pairs.rounds,
        candidate_blocks=tuple(pairs.blocks[names[0]]),
        reference_blocks=tuple(pairs.blocks[names[1]]),
        seconds=clock() - start,
        stop_reason=reason,
        unreliable=pairs.unreliable,
    )


def _refuses_doubt(board: Board, runtime: str, threads: int) -> bool:
    """Whether doubtful times of a board are an error: not those of a stand-in, nor of the computer that runs edgeprune."""
    is_measured = board.fingerprint(runtime, threads).stamp == "measured"
    return is_measured and board.device.transport != "local"


def _load(
    board: Board, names: Sequence[str], models: Sequence[ModelFile], runtime: str, threads: int
) -> None:
    """Both files in fresh processes."""
    for name, model in zip(names, models, strict=True):
        board.load(name, model.content, runtime=runtime, threads=threads)


@dataclass
class _Pairs:
    """The blocks so far. The board runs each second round's order backwards, so an even number of rounds is ABBA."""

    board: Board
    names: Sequence[str]
    plan: TimingPlan
    load: Callable[[], None]  # in fresh processes
    purpose: str = ""
    requests: int = 0
    rounds: int = 0
    loads: int = 0
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    doubt: str | None = None  # what the board says of a timing as a whole

    @property
    def ratios(self) -> list[float]:
        """Log-ratios of the pairs that count."""
        return paired_log_ratios(*(self.blocks.get(name, []) for name in self.names))

    @property
    def unreliable(self) -> str | None:
        """Why these blocks should not be believed."""
        if self.doubt is not None:
            return self.doubt
        share = rejected_share([b for name in self.names for b in self.blocks.get(name, [])])
        if not self.ratios:
            return "every pair of blocks was rejected"
        return f"{share:.0%} of the blocks were rejected" if share > MAX_REJECTED_RATIO else None

    def found(self) -> Interval:
        """The interval over the pairs that count; where none does, that of all pairs, which covers nothing."""
        if self.ratios:
            return interval(self.ratios)
        disturbed = (
            [b.model_copy(update={"rejected": None}) for b in self.blocks[n]] for n in self.names
        )
        return replace(interval(paired_log_ratios(*disturbed)), coverage=0.0)

    def more(self, wanted: int) -> None:
        """Time at least this many pairs more."""
        rounds = wanted + wanted % 2
        timing = self.board.time(
            self.names,
            replace(self.plan, rounds=rounds, seed=self.plan.seed + self.rounds),
            purpose=f"{self.purpose}-{self.requests}" if self.purpose else "",
        )
        self.requests += 1
        self.doubt = self.doubt or timing.unreliable
        for name in self.names:
            self.blocks.setdefault(name, []).extend(
                block.model_copy(
                    update={"round": self.rounds + block.round, "load": self.loads + block.load}
                )
                for block in timing.blocks[name]
            )
        # A board adds rounds for those that were disturbed.
        self.rounds += len(timing.blocks[self.names[0]])
        self.loads += timing.blocks[self.names[0]][-1].load + 1


def _look(
    pairs: _Pairs, looks: Sequence[int], budget_ratio: float | None, elapsed_s: Callable[[], float]
) -> Literal["decided", "pairs", "time"]:
    """Time pairs until a look settles the question; says what ended it."""
    most = math.ceil(looks[-1] * _SPARE)
    for number, wanted in enumerate(looks):
        if number:
            pairs.load()
        while len(pairs.ratios) < wanted:
            is_hopeless = pairs.doubt is None and pairs.unreliable is not None
            if pairs.rounds >= most or (pairs.rounds >= looks[0] and is_hopeless):
                return "pairs"
            if pairs.rounds and elapsed_s() > MAX_S:
                return "time"
            pairs.more(wanted - len(pairs.ratios))
        found = pairs.found()
        answer = judge(found) if budget_ratio is None else judge_budget(found, budget_ratio)
        if answer != "undecided":
            return "decided"
    return "pairs"
