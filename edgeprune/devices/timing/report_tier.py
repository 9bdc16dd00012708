"""Measurements for a report: fresh processes, many runs, and a sentinel that says whether the board stayed the same meanwhile."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from edgeprune.devices.board import MAX_SAMPLES_PER_REQUEST, Board
from edgeprune.devices.plans import REPORT, Loaded, Timing, TimingPlan
from edgeprune.devices.timing import sentinel as sentinels
from edgeprune.devices.timing.measure import ModelFile, disturbed, forget, require_some
from edgeprune.devices.timing.sentinel import SENTINELS, Sentinel, judge_drift
from edgeprune.errors import Unreliable
from edgeprune.records.device import ReportTier
from edgeprune.records.measurement import Block, Fingerprint, Measurement

SESSIONS = 3
MIN_RUNS = 1024  # of each model; what MLPerf Mobile asks of a submission
MAX_S = 60.0  # of timing for each model
_MOVED = "the sentinel moved"
_RESUMED_WARMUP_MS = 200.0  # of a process that has just run


def measure_report(
    board: Board,
    models: Sequence[ModelFile],
    *,
    runtime: str,
    threads: int,
    sessions: int = SESSIONS,
    plan: TimingPlan = REPORT,
    sentinel_plan: TimingPlan | None = sentinels.PLAN,
    min_runs: int = MIN_RUNS,
    max_s: float = MAX_S,
    purpose: str = "",
) -> list[Measurement]:
    """Latency of every file over several fresh processes, for figures that people will rely on.

    Each session loads all files anew (memory layout and page placement differ from process to process and move a median by more than its
    samples show), times them in the same rounds, and unloads them. A file that lacks runs then gets more rounds, alone or with others
    that lack them, until it has its share of ``min_runs`` or has been timed for its share of ``max_s``.

    The sentinel is timed before and after each session. When it moved by over 3 %, the session's blocks are marked as rejected, and it is
    measured again once.

    The protocol that this follows asks for at least 60 s of timing for each model. Here 60 s are the most: 1024 runs of a model of 1 ms
    take one second, and four files of a report would spend the other three minutes without narrowing what differs between sessions.

    Args:
        board: where to time.
        models: the files, with different names.
        runtime: what runs them.
        threads: threads of the runtime.
        sessions: how many fresh processes.
        plan: rounds that every session has at least, and how long a block is.
        sentinel_plan: how the sentinel is timed; ``None`` leaves it out, and so does a runtime that has no sentinel.
        min_runs: accepted samples that each file should have, over all sessions.
        max_s: the most seconds that one file is timed.
        purpose: see :meth:`Board.time`; a number is added to it for each request.

    Returns:
        One measurement for each file, in the order given. ``stop_reason`` is ``runs``, or ``time`` when ``max_s`` ended it.

    Raises:
        Unreliable: the sentinel moved by over 8 % in a session and again when it was repeated, or over 30 % of a file's other blocks were
            rejected. On a stand-in, and on the computer that runs edgeprune, ``unreliable`` says so instead. Every block of a file was
            rejected, wherever.
        DeviceError: a file did not load, or the board failed.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models that are timed together must have different names, got {names}")
    fingerprint = board.fingerprint(runtime, threads)
    raises = fingerprint.stamp == "measured" and board.device.transport != "local"
    timed = _Timed(board, models, fingerprint, plan, sentinel_plan, purpose)
    for number in range(sessions):
        wanted = math.ceil(min_runs * (number + 1) / sessions)
        timed.session(number, wanted, max_s / sessions)
        if timed.moved and raises:
            raise _unreliable(timed.moved)
    at = datetime.now(timezone.utc).isoformat()
    found = [require_some(timed.measurement(model, min_runs, at)) for model in models]
    for measurement in found:
        if measurement.unreliable and raises:
            raise _unreliable(measurement.unreliable)
    return found


def report_options(tier: ReportTier) -> dict[str, Any]:
    """What :func:`measure_report` is told for a device that is looked at for as long as its entry says."""
    return {
        "sessions": tier.sessions,
        "plan": replace(
            REPORT, rounds=tier.rounds, block_ms=tier.block_ms, warmup_ms=tier.warmup_ms
        ),
        "min_runs": tier.min_runs,
        "max_s": tier.max_s,
        **({} if tier.sentinel else {"sentinel_plan": None}),
    }


def _unreliable(why: str) -> Unreliable:
    return Unreliable(why, hint="end other programs on the board, cool it, and run it again")


@dataclass
class _Timed:
    """What was timed so far, over all sessions."""

    board: Board
    models: Sequence[ModelFile]
    fingerprint: Fingerprint
    plan: TimingPlan
    sentinel_plan: TimingPlan | None
    purpose: str
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    facts: dict[str, list[Loaded]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    rounds: int = 0
    loads: int = 0
    drifts: list[float] = field(default_factory=list)
    moved: str = ""  # why the sentinel makes this unreliable
    notes: list[str] = field(default_factory=list)

    def session(self, number: int, wanted: int, max_s: float) -> None:
        """Time one session until every model has ``wanted`` runs in all; again once when the sentinel moved."""
        first = {m.name: len(self.blocks.get(m.name, [])) for m in self.models}
        drift = self._attempt(number, wanted, max_s)
        if drift is not None and judge_drift(drift) != "ok":
            self.notes.append(
                f"session {number + 1} was measured again: the sentinel moved by {drift:+.1%}"
            )
            for name, start in first.items():
                self.blocks[name][start:] = [
                    b.model_copy(update={"rejected": b.rejected or _MOVED})
                    for b in self.blocks[name][start:]
                ]
            drift = self._attempt(number, wanted, max_s)
        if drift is None:
            return
        self.drifts.append(drift)
        if judge_drift(drift) == "repeat":
            self.notes.append(f"the sentinel moved by {drift:+.1%} over session {number + 1} again")
        if judge_drift(drift) == "unreliable":
            self.moved = (
                f"the sentinel moved by {drift:+.1%} over session {number + 1}, twice in a row;"
                f" at most {sentinels.REPEAT_DRIFT:.0%} are allowed"
            )

    def _attempt(self, number: int, wanted: int, max_s: float) -> float | None:
        """One fresh process for each model; gives the sentinel's drift over it, ``None`` without a sentinel."""
        runtime, threads = self.fingerprint.runtime, self.fingerprint.threads
        sentinel = None
        if self.sentinel_plan is not None and runtime in SENTINELS:
            sentinel = Sentinel(self.board, runtime, threads, plan=self.sentinel_plan)
        with sentinel or nullcontext():
            if sentinel is not None:
                sentinel.start()
            with self._loaded():
                self._rounds(number, wanted, max_s)
            return None if sentinel is None else sentinel.end()

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        """All models in fresh processes."""
        names = [m.name for m in self.models]
        try:
            for model in self.models:
                loaded = self.board.load(
                    model.name,
                    model.content,
                    runtime=self.fingerprint.runtime,
                    threads=self.fingerprint.threads,
                )
                self.facts.setdefault(model.name, []).append(loaded)
            yield
        except BaseException:
            forget(self.board, names)
            raise
        self.board.unload(names)

    def _rounds(self, number: int, wanted: int, max_s: float) -> None:
        """The plan's rounds for all models, then more for those that lack runs."""
        names, plan = [m.name for m in self.models], self.plan
        spent_s = dict.fromkeys(names, 0.0)
        rounds = plan.rounds
        while names and rounds:
            request = replace(plan, rounds=rounds, seed=plan.seed + self.rounds)
            purpose = f"{self.purpose}-{len(self.timings)}" if self.purpose else ""
            timing = self.board.time(names, request, purpose=purpose)
            self.timings.append(timing)
            for name in names:
                new = timing.blocks[name]
                spent_s[name] += sum(sum(b.samples_ns) * b.calls_per_sample for b in new) / 1e9
                self.blocks.setdefault(name, []).extend(
                    b.model_copy(
                        update={
                            "round": self.rounds + b.round,
                            "session": number,
                            "load": self.loads + b.load,
                        }
                    )
                    for b in new
                )
            # A board adds rounds for those that were disturbed.
            self.rounds += len(timing.blocks[names[0]])
            self.loads += timing.blocks[names[0]][-1].load + 1
            plan = replace(plan, warmup_ms=min(plan.warmup_ms, _RESUMED_WARMUP_MS))
            more = {n: self._more(n, wanted, max_s - spent_s[n]) for n in names}
            names = [n for n in names if more[n]]
            room = MAX_SAMPLES_PER_REQUEST // (plan.max_runs * max(1, len(names)))
            rounds = min([room, *(more[n] for n in names)])

    def _more(self, name: str, wanted: int, left_s: float) -> int:
        """Rounds that a model needs to have ``wanted`` accepted runs, as far as the time that is left allows."""
        blocks = self.blocks[name]
        have = sum(len(b.samples_ns) for b in blocks if b.rejected is None)
        last = blocks[-1]
        block_s = sum(last.samples_ns) * last.calls_per_sample / 1e9
        needed = math.ceil((wanted - have) / len(last.samples_ns))
        return max(0, min(needed, int(left_s / block_s)))

    def measurement(self, model: ModelFile, min_runs: int, at: str) -> Measurement:
        """All sessions of one model."""
        facts, blocks = self.facts[model.name], self.blocks[model.name]
        peaks = [t.peak_memory_bytes.get(model.name) for t in self.timings]
        runs = sum(len(b.samples_ns) for b in blocks if b.rejected is None)
        notes = [*(note for t in self.timings for note in t.notes), *self.notes]
        return Measurement(
            name=model.name,
            artifact_sha256=model.sha256,
            precision=model.precision,
            threads=self.fingerprint.threads,
            load_ns=statistics.median_low(f.load_ns for f in facts),
            first_ns=statistics.median_low(f.first_ns for f in facts),
            blocks=tuple(blocks),
            before=self.timings[0].before,
            after=self.timings[-1].after,
            fingerprint_key=self.fingerprint.key(),
            stamp=self.fingerprint.stamp,
            at=at,
            peak_memory_bytes=max((p for p in peaks if p is not None), default=None),
            unreliable=self._doubt(model.name),
            stop_reason="runs" if runs >= min_runs else "time",
            sentinel_drift_ratio=max(self.drifts, key=abs, default=None),
            notes=tuple(dict.fromkeys(notes)),
        )

    def _doubt(self, name: str) -> str | None:
        """Why a model's figures should not be believed."""
        disturbed_as_a_whole = [t.unreliable for t in self.timings if t.unreliable is not None]
        if disturbed_as_a_whole:
            return disturbed_as_a_whole[0]
        judged = [b for b in self.blocks[name] if b.rejected != _MOVED]
        return disturbed(name, judged) or self.moved or None
