"""What an agent may answer, as records with ranges: device output is checked like any other input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from edgeprune.devices.link.frames import clean
from edgeprune.errors import DeviceError
from edgeprune.records.artifact import TensorSpec
from edgeprune.records.base import Record
from edgeprune.records.measurement import Block, Telemetry

HOUR_NS = 3600 * 10**9
Nanoseconds = Annotated[int, Field(gt=0, lt=HOUR_NS)]
Text = Annotated[str, Field(max_length=400), AfterValidator(clean)]
Size = Annotated[int, Field(ge=1, le=2**31)]
Celsius = Annotated[float, Field(gt=-100, lt=300)]
Bytes = Annotated[int, Field(ge=0, lt=2**60)]
Hertz = Annotated[int, Field(ge=0, lt=10**12)]


class Hello(Record):
    """Facts about the machine."""

    machine: Annotated[Text, Field(min_length=1)]
    cpu_model: Text
    cpu_flags: Annotated[tuple[Text, ...], Field(max_length=2000)]
    cores: Annotated[int, Field(ge=1, le=4096)]
    memory_bytes: Annotated[int, Field(gt=0, lt=2**50)]
    page_size_bytes: Annotated[int, Field(ge=512, le=2**30)]
    kernel: Text
    python: Text
    governor: Text | None
    hostname_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    emulated: bool
    bits: Literal[32, 64]
    glibc: Annotated[str, Field(pattern=r"^[0-9]{1,3}(\.[0-9]{1,4}){1,3}$")] | None
    boot_id: Annotated[str, Field(pattern=r"^[0-9a-f-]{0,40}$")]
    wall_clock_ns: Annotated[int, Field(ge=0, lt=2**63)]
    user: Annotated[Text, Field(max_length=64)]
    affinity: Annotated[tuple[int, ...], Field(max_length=4096)] | None


class CacheState(Record):
    """How much of a file the board has."""

    have: bool
    offset: Annotated[int, Field(ge=0, lt=2**50)]
    prefix_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class CacheWritten(Record):
    """Whether a file is complete."""

    done: bool


class RuntimeVersion(Record):
    """Version of a runtime on the board."""

    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,60}$")]


class TensorReply(Record):
    """One input or output."""

    name: Text
    shape: Annotated[tuple[Size, ...], Field(max_length=16)]
    dtype: Annotated[str, Field(pattern=r"^[a-z]{3,8}[0-9]{0,3}$")]
    scale: Annotated[float, Field(gt=0)] | None = None
    zero_point: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    def spec(self) -> TensorSpec:
        """The same as a result record."""
        return TensorSpec(**self.model_dump())


class Placement(Record):
    """How many operators there are and how many of them a delegate took."""

    operators: Annotated[int, Field(ge=0, lt=10**6)]
    delegated: Annotated[int, Field(ge=0, lt=10**6)]


class LoadedModel(Record):
    """A model that loaded and ran once. ``placement`` only where the runtime tells."""

    load_ns: Nanoseconds
    first_ns: Nanoseconds
    compile_ns: Nanoseconds | None = None
    inputs: Annotated[tuple[TensorReply, ...], Field(min_length=1, max_length=256)]
    outputs: Annotated[tuple[TensorReply, ...], Field(min_length=1, max_length=256)]
    placement: Placement | None = None


class LoadFailure(Record):
    """A model among many that did not load."""

    error: Annotated[str, Field(max_length=4000), AfterValidator(clean)]


class ManyLoaded(Record):
    """The answer to ``load_many``."""

    models: dict[str, LoadedModel | LoadFailure]


class TimedBlock(Record):
    """One block."""

    round: Annotated[int, Field(ge=0, lt=100_000)]
    calls_per_sample: Annotated[int, Field(ge=1, le=100_000)]
    samples_ns: Annotated[tuple[Nanoseconds, ...], Field(min_length=1, max_length=100_000)]
    rejected: Text | None = None
    load: Annotated[int, Field(ge=0, lt=100_000)] = 0

    def block(self) -> Block:
        """The same as a result record."""
        return Block(**self.model_dump())


class Moment(Record):
    """State of the board; implausible values are refused, missing ones are ``None``."""

    load_1min: Annotated[float, Field(ge=0, lt=1e6)] | None = None
    temperature_c: Celsius | None = None
    temperature_limit_c: Celsius | None = None
    clock_hz: Hertz | None = None
    clock_limit_hz: Hertz | None = None
    governor: Text | None = None
    power_mode: Text | None = None
    throttled: bool | None = None
    throttle: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    throttle_seen: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    throttle_events: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    available_memory_bytes: Annotated[int, Field(ge=0, lt=2**50)] | None = None
    cpus_online: Annotated[int, Field(ge=1, le=4096)] | None = None
    foreign_cpu_ratio: Annotated[float, Field(ge=0, le=1)] | None = None

    def telemetry(self) -> Telemetry:
        """The same as a result record."""
        return Telemetry(**self.model_dump())


class Owner(Record):
    """Who holds the lease of a board, as the client told its agent; for messages alone."""

    user: Text
    host: Text
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    job: Text
    since_s: Annotated[float, Field(ge=0, lt=1e9)]
    session: Text

    def text(self) -> str:
        """``anna@laptop (pid 4711), deploy, for 12 min``."""
        parts = [
            f"{self.user}@{self.host} (pid {self.pid})",
            self.job,
            f"for {span(self.since_s)}",
        ]
        return ", ".join(part for part in parts if part)


class Who(Record):
    """The answer to ``who``."""

    owner: Owner | None


class Broken(Record):
    """The answer to ``break``: who held the board, and whether that agent has ended."""

    owner: Owner | None
    ended: bool


class Cleaned(Record):
    """The answer to ``clean``."""

    freed_bytes: Bytes
    kept_bytes: Bytes


class Restored(Record):
    """The answer to ``restore``: the settings that were put back."""

    restored: Annotated[tuple[Text, ...], Field(max_length=256)]


class InstalledEnvironment(Record):
    """One environment with a runtime in the board's work folder."""

    name: Text
    runtime: Text
    version: Text
    bytes: Bytes


class Status(Record):
    """The answer to ``status``: the work folder, the lease, and the state of the board."""

    lease_file: Text
    owner: Owner | None
    mine: bool
    workdir: Text
    disk_free_bytes: Bytes
    cache_bytes: Bytes
    environments: Annotated[tuple[InstalledEnvironment, ...], Field(max_length=256)]
    telemetry: Moment
    workdir_problem: Text | None
    tuned: bool


class Timed(Record):
    """The answer to ``time``."""

    blocks: dict[str, tuple[TimedBlock, ...]]
    before: Moment
    after: Moment
    peak_memory_bytes: dict[str, Annotated[int, Field(gt=0, lt=2**50)]]
    inside_ns: dict[str, Annotated[int, Field(ge=0, lt=2**63)]] = {}
    stop_reason: Literal["rounds", "rejected"]
    notes: Annotated[tuple[Text, ...], Field(max_length=20)]

    def rejected_ratio(self) -> float:
        """Share of the blocks that were disturbed, in [0, 1]."""
        blocks = [block for found in self.blocks.values() for block in found]
        return sum(block.rejected is not None for block in blocks) / max(1, len(blocks))

    def problem(
        self, keys: Sequence[str], *, rounds: int, runs: tuple[int, int], elapsed_ns: float
    ) -> str:
        """What of this was not asked for or cannot be; empty when all is well.

        Args:
            keys: the models that were to be timed.
            rounds: how many were asked for; up to half as many may be added.
            runs: least and most samples of a block.
            elapsed_ns: how long the client waited for all of it.
        """
        if set(self.blocks) != set(keys):
            return "times of other models than asked for"
        if not set(self.peak_memory_bytes) | set(self.inside_ns) <= set(keys):
            return "memory or times of other models"
        total_ns = 0
        for blocks in self.blocks.values():
            numbers = [block.round for block in blocks]
            if numbers != list(range(len(numbers))):
                return "rounds that do not count up"
            if not rounds <= len(numbers) <= 1.5 * rounds:
                return f"{len(numbers)} rounds of {rounds}"
            for block in blocks:
                n = len(block.samples_ns)
                if not runs[0] <= n <= runs[1]:
                    return f"a block of {n} samples"
                total_ns += sum(block.samples_ns) * block.calls_per_sample
        return (
            "" if total_ns <= elapsed_ns * 1.05 else "times that are longer than the wait for them"
        )


class Ready(Record):
    """What makes the board unfit to be measured; empty when it is fit."""

    reasons: Annotated[tuple[Text, ...], Field(max_length=50)]
    telemetry: Moment


class Node(Record):
    """One node of a profiled model."""

    name: Text
    op: Text
    provider: Text
    ns: Annotated[int, Field(ge=0, lt=HOUR_NS)]


class Profiled(Record):
    """The answer to ``profile``."""

    nodes: Annotated[tuple[Node, ...], Field(max_length=100_000)]


def span(seconds: float) -> str:
    """A duration for people."""
    for size_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"


R = TypeVar("R", bound=Record)


def checked(cls: type[R], reply: dict[str, Any], board: str) -> R:
    """A reply as a record.

    Raises:
        DeviceError: a field is missing, unknown, of another type, not finite or out of its range.
    """
    try:
        return cls.model_validate_json(json.dumps(reply))
    except RecursionError as error:
        raise DeviceError(f"device {board!r} sent what nests too deep") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = clean(".".join(str(part) for part in first["loc"]), 100)
        raise DeviceError(
            f"device {board!r} sent a wrong {place}: {clean(first['msg'], 100)},"
            f" got {clean(repr(first['input'])[:60])}"
        ) from error
