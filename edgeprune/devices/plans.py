"""How long to look at models on a board, and what comes back: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprune.records.artifact import TensorSpec
from edgeprune.records.measurement import Block, Telemetry


@dataclass(frozen=True)
class TimingPlan:
    """How long to look. Every model is visited once in each round, for one block.

    ``block_ms`` is the aim for one block; it gets at least ``min_runs`` and at most ``max_runs`` samples, where a sample is one call, or
    the mean of as many calls as take 0.2 ms. ``seed`` fixes the order of the models. ``tolerant`` takes disturbed blocks as they come: a
    sustained run wants to see the board get hot. ``reload`` loads every model anew before each round, as long as that takes no more than
    half of the time: where a model lies in memory moves its speed, and no number of blocks shows it.
    """

    rounds: int
    block_ms: float
    min_runs: int
    max_runs: int
    warmup_ms: float
    seed: int = 0
    tolerant: bool = False
    reload: bool = False


KERNEL = TimingPlan(rounds=8, block_ms=1, min_runs=3, max_runs=20, warmup_ms=2)
SEARCH = TimingPlan(rounds=12, block_ms=20, min_runs=3, max_runs=100, warmup_ms=100, reload=True)
DECIDE = TimingPlan(rounds=8, block_ms=20, min_runs=5, max_runs=500, warmup_ms=200, reload=True)
REPORT = TimingPlan(rounds=8, block_ms=200, min_runs=5, max_runs=500, warmup_ms=1000, reload=True)


@dataclass(frozen=True)
class Loaded:
    """A model that is loaded and has run once. ``first_ns`` holds allocation and the first inference.

    ``delegated`` counts the operators that a delegate took, and all operators, where the runtime tells.
    ``compile_ns`` is there where the runtime compiles a file before it can be loaded (Core ML); an app does that once, not at each start.
    """

    key: str
    load_ns: int
    first_ns: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    delegated: tuple[int, int] | None = None
    compile_ns: int | None = None


@dataclass(frozen=True)
class Timing:
    """Blocks of every model, by key, and the state of the board around them.

    ``peak_memory_bytes`` is of the process that ran each model, where the board tells it; ``notes`` is what the board did or found
    meanwhile.
    """

    blocks: dict[str, tuple[Block, ...]]
    before: Telemetry
    after: Telemetry
    peak_memory_bytes: dict[str, int | None] = field(default_factory=dict)
    # Spent in the runtime, warm-up included.
    inside_ns: dict[str, int] = field(default_factory=dict)
    stop_reason: str = "rounds"
    notes: tuple[str, ...] = ()
    unreliable: str | None = None


@dataclass(frozen=True)
class NodeTime:
    """One node as the runtime's own profiler saw it; resolution is 1 microsecond."""

    name: str
    op: str
    provider: str
    ns: int  # median over the runs
