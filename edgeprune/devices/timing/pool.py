"""Several boards of one class time small files together; what is judged is measured on one board alone.

The primary is the board of the run. Companions are boards of the same class that are free just now. Every board times the same reference
kernels first, and what a companion measures is scaled by the ratio of its reference times to the primary's; it times them again when its
work is done, and its results count when nothing has moved. A companion that leaves gives its work back; the primary finishes alone if need
be.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.inventory import quarantine
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.link.session import BACKOFF_S
from edgeprune.devices.plans import KERNEL, TimingPlan
from edgeprune.devices.timing.companions import (
    LIMITS,
    REFERENCE_FILES,
    Limits,
    check_drift,
    differences,
    reference_names,
    scale_of,
)
from edgeprune.devices.timing.measure import (
    CHUNK_FILES,
    TimedChunk,
    chunks,
    time_chunk,
    time_kernels,
)
from edgeprune.errors import (
    AuthFailed,
    Busy,
    DeviceError,
    EdgepruneError,
    HostKeyMismatch,
    LinkLost,
    Unreachable,
)
from edgeprune.progress import Bar, Progress
from edgeprune.records.device import Device
from edgeprune.records.measurement import Fingerprint

TURNS = 3  # chunks that a board gets on average, so that a slow one holds up the end by little
MIN_CHUNK = 8
STOP_S = 10.0  # for companions to finish what they are at, when the primary failed
# The way to the board, or what it has room for; these say nothing about its times.
PASSING = (LinkLost, Unreachable, Busy, HostKeyMismatch, AuthFailed, Refusal)


class Pool:
    """A primary board and its companions. Start with :func:`open_pool`.

    Attributes:
        boards: kernels that each board has timed, of those that count.
        scales: what the times of each companion were multiplied by, at its last calibration.

    Args:
        primary: the board of the run.
        companions: open boards of the same class; each is used by one thread at a time, and closed when it leaves.
        runtime: what runs the files.
        threads: threads of the runtime.
        say: told in one line about everything that happens to a companion.
        limits: how far a companion may be from the primary.
    """

    def __init__(
        self,
        primary: Board,
        companions: Sequence[Board] = (),
        *,
        runtime: str,
        threads: int,
        say: Callable[[str], None] = lambda _: None,
        limits: Limits = LIMITS,
    ) -> None:
        self.boards: Counter[str] = Counter()
        self.scales: dict[str, float] = {}
        self._primary, self._companions = primary, list(companions)
        self._runtime, self._threads = runtime, threads
        self._say, self._limits = say, limits

    @property
    def companions(self) -> tuple[str, ...]:
        """Names of the companions that are still with the primary."""
        return tuple(board.name for board in self._companions)

    def time_kernels(
        self,
        files: Mapping[str, bytes],
        *,
        progress: Progress,
        plan: TimingPlan = KERNEL,
        purpose: str = "",
    ) -> dict[str, float]:
        """Nanoseconds of every file that runs on the primary, as the primary would measure them; see :func:`.measure.time_kernels`.

        Args:
            files: file content by name.
            progress: counts files; a file that the primary cannot load is named there and left out of the answer.
            plan: how long to look at each.
            purpose: see :meth:`Board.time`; used where the primary works alone. Who times which file of a pool is chance, so those times
                are not kept for a run that is interrupted.

        Raises:
            DeviceError: no file loads, or the primary failed.
        """
        if not self._companions or len(files) < 2 * REFERENCE_FILES:
            found = time_kernels(
                self._primary,
                files,
                runtime=self._runtime,
                threads=self._threads,
                progress=progress,
                plan=plan,
                purpose=purpose,
            )
            self.boards[self._primary.name] += len(found)
            return found
        reference = {name: files[name] for name in reference_names(files)}
        rest = {name: content for name, content in files.items() if name not in reference}
        share = math.ceil(len(rest) / (TURNS * (1 + len(self._companions))))
        most = min(CHUNK_FILES, max(MIN_CHUNK, share))
        with progress.bar("timing kernels", len(files)) as bar:
            call = _PoolCall(plan, reference, deque(chunks(rest, most)), bar, len(self._companions))
            self._together(call, progress)
        for name, times in call.found.items():
            self.boards[name] += len(times)
        everything = {file: ns for times in call.found.values() for file, ns in times.items()}
        if not everything:
            raise DeviceError(f"no kernel could be timed: {call.problem}")
        return {name: everything[name] for name in files if name in everything}

    def _together(self, call: _PoolCall, progress: Progress) -> None:
        """One thread for each companion; the primary works in this one, so that its errors and Ctrl-C end the call."""
        workers = [
            threading.Thread(target=self._accompany, args=(board, call), daemon=True)
            for board in self._companions
        ]
        for worker in workers:
            worker.start()
        try:
            self._lead(call, progress)
        except BaseException:
            call.stop()
            raise
        finally:
            for worker in workers:
                worker.join(STOP_S if call.stopped else None)
        if call.faults:
            raise call.faults[0]

    def _lead(self, call: _PoolCall, progress: Progress) -> None:
        name = self._primary.name
        times: dict[str, float] = {}
        chunk: dict[str, bytes] | None = call.reference
        while chunk is not None:
            timed = self._time(self._primary, chunk, call)
            times.update(timed.ns)
            for call.problem in timed.problems.values():
                progress.say(call.problem)
            if chunk is call.reference:
                call.publish(timed.ns)
            call.advance(len(chunk), name)
            chunk = call.take_last()
        call.found[name] = times

    def _accompany(self, board: Board, call: _PoolCall) -> None:
        """What a companion's thread does. Never raises; a fault of this program is kept for the thread of the caller."""
        mine = _Share()
        failure: DeviceError | None = None
        try:
            self._work(board, call, mine)
        except DeviceError as error:
            failure = error
        except BaseException as error:
            call.faults.append(error)
        is_passing = isinstance(failure, PASSING)
        if call.faults or (failure and not is_passing):
            mine.take_back(call)
        if mine.chunk is not None:
            call.give_back(mine.chunk)
        if mine.times:
            self.scales[board.name] = mine.scale
        call.leave(board.name, mine.times)
        if failure is not None:
            self._companions.remove(board)
            self._say_why(board.name, failure.message, is_passing=is_passing)
        if failure is not None or call.stopped:
            board.close()

    def _say_why(self, name: str, why: str, *, is_passing: bool) -> None:
        if is_passing:
            self._say(f"{name} leaves, its work moves: {why}")
            return
        self._say(f"{name} is quarantined, its work moves: {why}")
        try:
            quarantine.put(name, why)
        except EdgepruneError as error:
            self._say(f"the quarantine of {name} is not remembered: {error.message}")

    def _work(self, board: Board, call: _PoolCall, mine: _Share) -> None:
        """Calibrate, time chunks until none waits, and look whether the calibration still holds.

        Raises:
            DeviceError: the board failed, or its times are not to be trusted.
        """
        before = self._time(board, call.reference, call).ns
        expected = call.wait_for_reference()
        if expected is None:
            return
        mine.scale = scale_of(expected, before, self._limits)
        while (chunk := call.take()) is not None:
            mine.chunk = chunk
            timed = self._time(board, chunk, call)
            mine.add(chunk, {name: ns * mine.scale for name, ns in timed.ns.items()})
            call.advance(len(timed.ns), board.name)
            if timed.problems:  # the primary's word counts on what runs
                call.give_back({name: chunk[name] for name in timed.problems}, to_primary=True)
        if mine.times and not call.stopped:
            check_drift(before, self._time(board, call.reference, call).ns, self._limits)

    def _time(self, board: Board, files: Mapping[str, bytes], call: _PoolCall) -> TimedChunk:
        return time_chunk(
            board, files, runtime=self._runtime, threads=self._threads, plan=call.plan
        )


@dataclass
class _Share:
    """What one companion has timed in one call, and the chunk that it is at."""

    times: dict[str, float] = field(default_factory=dict)
    done: dict[str, bytes] = field(default_factory=dict)
    chunk: dict[str, bytes] | None = None
    scale: float = 1.0

    def add(self, chunk: Mapping[str, bytes], times: Mapping[str, float]) -> None:
        """The chunk is timed, except what ``times`` lacks."""
        self.times.update(times)
        self.done.update({name: chunk[name] for name in times})
        self.chunk = None

    def take_back(self, call: _PoolCall) -> None:
        """Nothing of it counts."""
        if self.done:
            call.advance(-len(self.done), "")
            for chunk in chunks(self.done):
                call.give_back(chunk)
        self.times, self.done = {}, {}


class _PoolCall:
    """The work of one call: chunks that wait and times that were found. All its methods may be called from any thread.

    Args:
        plan: how long to look at each file.
        reference: the files that every board times.
        waiting: the other files, in chunks.
        bar: counts files.
        at_work: companions that may still take work, or give it back.
    """

    def __init__(
        self,
        plan: TimingPlan,
        reference: dict[str, bytes],
        waiting: deque[dict[str, bytes]],
        bar: Bar,
        at_work: int,
    ) -> None:
        self.plan, self.reference = plan, reference
        self.found: dict[str, dict[str, float]] = {}
        self.faults: list[BaseException] = []
        self.problem = ""
        self.stopped = False
        self._turn = threading.Condition()
        self._waiting, self._for_primary = waiting, deque[dict[str, bytes]]()
        self._bar, self._at_work = bar, at_work
        self._reference_ns: dict[str, float] | None = None

    def publish(self, reference_ns: dict[str, float]) -> None:
        """The primary's times of the reference."""
        with self._turn:
            self._reference_ns = reference_ns
            self._turn.notify_all()

    def wait_for_reference(self) -> dict[str, float] | None:
        """The primary's times of the reference, once they are known; ``None`` when the call was stopped."""
        with self._turn:
            self._turn.wait_for(lambda: self.stopped or self._reference_ns is not None)
            return None if self.stopped else self._reference_ns

    def take(self) -> dict[str, bytes] | None:
        """A chunk for a companion; ``None`` when none waits now."""
        with self._turn:
            return self._waiting.popleft() if self._waiting and not self.stopped else None

    def take_last(self) -> dict[str, bytes] | None:
        """A chunk for the primary, which waits while a companion may still give work back; ``None`` when everything is done."""
        with self._turn:
            self._turn.wait_for(lambda: self._for_primary or self._waiting or not self._at_work)
            for queue in (self._for_primary, self._waiting):
                if queue:
                    return queue.popleft()
            return None

    def give_back(self, chunk: dict[str, bytes], *, to_primary: bool = False) -> None:
        """Files that have to be timed by somebody else."""
        with self._turn:
            (self._for_primary if to_primary else self._waiting).append(chunk)
            self._turn.notify_all()

    def advance(self, files: int, note: str) -> None:
        """Count files as timed; fewer than none when results were discarded."""
        with self._turn:
            self._bar.advance(files, note)

    def leave(self, name: str, times: dict[str, float]) -> None:
        """A companion is done; these times of it count."""
        with self._turn:
            if times:
                self.found[name] = times
            self._at_work -= 1
            self._turn.notify_all()

    def stop(self) -> None:
        """Let the companions end after what they are at."""
        with self._turn:
            self.stopped = True
            self._turn.notify_all()


@contextlib.contextmanager
def open_pool(
    primary: Board,
    candidates: Sequence[tuple[str, Device]],
    *,
    runtime: str,
    threads: int,
    job: str,
    say: Callable[[str], None],
    backoff_s: Sequence[float] = BACKOFF_S,
    limits: Limits = LIMITS,
) -> Iterator[Pool]:
    """A board with every candidate that is trusted, reachable, free and of its class; the others are left out, with the reason said.

    The companions are held until the block ends, or until they leave.

    Args:
        primary: the board of the run; open, and left open.
        candidates: devices that may help, by name.
        runtime: what runs the files.
        threads: threads of the runtime.
        job: what it is for; other clients of the companions are shown it.
        say: where to say who takes part.
        backoff_s: how long to wait before each try to come back to a companion after a broken link.
        limits: how far a companion may be from the primary.

    Raises:
        DeviceError: the primary failed.
    """
    wanted = primary.fingerprint(runtime, threads)
    with contextlib.ExitStack() as stack:

        def opened(candidate: tuple[str, Device]) -> Board | None:
            try:
                board = _companion(*candidate, wanted, job=job, say=say, backoff_s=backoff_s)
            except EdgepruneError as error:
                say(f"{candidate[0]} does not take part: {error.message}")
                return None
            stack.callback(board.close)
            return board

        with ThreadPoolExecutor(max_workers=max(1, len(candidates))) as executor:
            companions = [board for board in executor.map(opened, candidates) if board is not None]
        if companions:
            say(
                f"{', '.join(b.name for b in companions)} time kernels together with {wanted.device}"
            )
        yield Pool(primary, companions, runtime=runtime, threads=threads, say=say, limits=limits)


def _companion(
    name: str,
    device: Device,
    wanted: Fingerprint,
    *,
    job: str,
    say: Callable[[str], None],
    backoff_s: Sequence[float],
) -> Board:
    """An open board of the wanted class.

    Raises:
        DeviceError: it is in quarantine, of another class, held by somebody, or cannot be reached.
    """
    why = quarantine.reason(name)
    if why is not None:
        raise DeviceError(f"it is in quarantine: {why}")
    board = open_board(name, device, job=job, say=say, backoff_s=backoff_s)
    try:
        found = differences(wanted, board.fingerprint(wanted.runtime, wanted.threads))
        if found:
            raise DeviceError(f"it is not of the class of {wanted.device}: {'; '.join(found)}")
    except BaseException:
        board.close()
        raise
    return board
