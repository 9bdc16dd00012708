"""Whether what was just timed counts: the rules by which a block is void, and the gate before the first one.

A board slows down, shares its cores and swaps without telling the program that it times. So the state of the board is read between blocks,
and what would bend a figure by more than the 2 % that a measurement has to tell apart voids the blocks since the last look. Times are
seconds of a monotonic clock, temperatures degrees Celsius, loads ratios of all cores that are online.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from . import telemetry
from .machine import read_text

LIMITS: Dict[str, float] = {
    "soft_limit_c": 80.0,
    "start_below_c": 60.0,
    "wait_s": 300.0,
    "foreign_cpu_ratio": 0.05,
    "load_per_core": 0.3,
    "clock_ratio": 0.97,
}
MARGIN_C = 5.0  # this near to the limit, the next block would be slowed down
COOL_BELOW_LIMIT_C = 20.0
# The kernel counts processor time in ticks of 10 ms, so a shorter window says nothing. One tick too many or too few on each side is chance.
MIN_WINDOW_S = 0.2
MIN_FOREIGN_TICKS = 3
MAX_WALL_JUMP_S = 1.0
LOOK_S = 1.0  # how long the gate watches the load
POLL_S = 2.0
MEMORY_FACTOR = 2
SET_WALL_S = 1_577_836_800  # 2020-01-01: a wall clock before it was never set
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Lap(NamedTuple):
    """What happened since the last look.

    ``reasons`` says why the blocks since then are void, one short line each with value and limit; none: they are valid. ``notes`` are facts
    that void nothing. ``foreign_cpu_ratio`` is the share of all cores that others used, ``None`` where the window was too short to tell;
    ``telemetry`` has it too, beside the fields of :func:`telemetry.snapshot`.
    """

    reasons: List[str]
    foreign_cpu_ratio: Optional[float]
    telemetry: Dict[str, Any]
    notes: List[str]


class Own(NamedTuple):
    """Counters of one of our processes."""

    ticks: int
    major_faults: int


class Counters(NamedTuple):
    """Counters of the board at one moment; a process is known by its id and its start, for ids are used again."""

    at_s: float
    busy_ticks: Optional[int]
    own: Dict[Tuple[int, str], Own]
    pages_swapped_in: Optional[int]


class Window(NamedTuple):
    """What happened between two :class:`Counters`. ``foreign_ticks`` is ``None`` where a process of ours ended in between."""

    seconds: float
    foreign_ticks: Optional[int]
    major_faults: int
    pages_swapped_in: int


def counters(root: str, own_pids: Iterable[int], clock: Callable[[], float]) -> Counters:
    """The counters now."""
    own = {}
    for pid in own_pids:
        # The name of a program may hold blanks and brackets; what follows its last bracket has 44 or more fields: proc(5).
        text = read_text(telemetry.below(root, "proc/%d/stat" % pid)) or ""
        fields = text.rpartition(")")[2].split()
        if len(fields) > 19 and all(fields[i].isdigit() for i in (9, 11, 12, 19)):
            own[pid, fields[19]] = Own(int(fields[11]) + int(fields[12]), int(fields[9]))
    swapped = None
    for line in (read_text(telemetry.below(root, "proc/vmstat")) or "").splitlines():
        if line.startswith("pswpin "):
            swapped = telemetry.integer(line[len("pswpin ") :], 0, 1 << 59)
    return Counters(clock(), _busy_ticks(root), own, swapped)


def _busy_ticks(root: str) -> Optional[int]:
    """Ticks that all cores spent on anything but idling; time that a hypervisor took away is among them, for nobody here could use it."""
    first = (read_text(telemetry.below(root, "proc/stat")) or "").partition("\n")[0]
    fields = first.split()
    if len(fields) < 9 or fields[0] != "cpu" or not all(field.isdigit() for field in fields[1:9]):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[1:9])
    return user + nice + system + irq + softirq + steal


def between(start: Counters, end: Counters) -> Window:
    """What happened from ``start`` to ``end``."""
    foreign = None
    if (
        start.busy_ticks is not None
        and end.busy_ticks is not None
        and set(start.own) <= set(end.own)
    ):
        ours = sum(own.ticks - start.own.get(key, Own(0, 0)).ticks for key, own in end.own.items())
        foreign = max(0, end.busy_ticks - start.busy_ticks - ours)
    both = set(start.own) & set(end.own)
    faults = sum(end.own[key].major_faults - start.own[key].major_faults for key in both)
    swapped = 0
    if start.pages_swapped_in is not None and end.pages_swapped_in is not None:
        swapped = end.pages_swapped_in - start.pages_swapped_in
    return Window(end.at_s - start.at_s, foreign, faults, swapped)


def foreign_reason(ticks: int, ratio: float, limit: float) -> List[str]:
    """A line if others used more than their share, and more than chance."""
    if ratio <= limit or ticks < MIN_FOREIGN_TICKS:
        return []
    return [
        "other programs used %.1f %% of the processors, over %g %%" % (100 * ratio, 100 * limit)
    ]


def foreign_ratio(window: Window, cores: int) -> Optional[float]:
    """Share of all cores that others used, in [0, 1]; ``None`` for a window that is too short to tell."""
    if window.foreign_ticks is None or window.seconds < MIN_WINDOW_S:
        return None
    return min(1.0, window.foreign_ticks / (window.seconds * TICKS_PER_S * max(1, cores)))


def throttle_reasons(now: Dict[str, Any], before: Optional[Dict[str, Any]] = None) -> List[str]:
    """A line for what slows the board down now, or did since ``before``."""
    reasons = []
    if now["throttle"]:
        reasons.append("%s now; limit: none" % ", ".join(now["throttle"]))
    if before is None:
        return reasons
    since = set(now["throttle_seen"]) - set(before["throttle_seen"]) - set(now["throttle"])
    if since:
        reasons.append("%s since the last look; limit: none" % ", ".join(sorted(since)))
    events = (before["throttle_events"], now["throttle_events"])
    if None not in events and events[1] > events[0]:
        reasons.append("over-current events %d > 0" % (events[1] - events[0]))
    return reasons


def temperature_limit(state: Dict[str, Any], limits: Dict[str, float]) -> float:
    """Where this board slows down: what it says itself, or the registry, whichever is lower."""
    return min(limits["soft_limit_c"], state["temperature_limit_c"] or math.inf)


def clock_reasons(start: telemetry.Clock, now: telemetry.Clock, ratio: float) -> List[str]:
    """A line if the board ran slower than it should.

    A governor that follows the load lowers the clock of an idle core as a matter of course, and the board is idle at the moment of a look.
    So a clock is held to that of the start only while the governor is ``performance``. Where the firmware tells the real clock it is held,
    under any governor, to the one that the kernel asked for at that moment: only throttling parts the two.
    """
    hz, start_hz = now.real_hz or now.asked_hz, start.real_hz or start.asked_hz
    if start.is_fixed and now.is_fixed and hz and start_hz and hz < ratio * start_hz:
        values = (hz / 1e6, 100 * ratio, start_hz / 1e6)
        return ["clock %.0f MHz < %g %% of %.0f MHz at the start" % values]
    if now.real_hz and now.asked_hz and now.real_hz < ratio * now.asked_hz:
        values = (now.real_hz / 1e6, 100 * ratio, now.asked_hz / 1e6)
        return ["clock %.0f MHz < %g %% of %.0f MHz asked for" % values]
    return []


class Watch:
    """Looks at the board between blocks.

    Args:
        root: where the board's file system starts.
        own_pids: gives the ids of our processes now, this one and its workers; their load is not foreign.
        limits: any of :data:`LIMITS`.
        clock: monotonic seconds.
        wall: seconds since 1970, which may jump.
    """

    def __init__(
        self,
        root: str,
        own_pids: Callable[[], Iterable[int]],
        limits: Dict[str, float],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._own_pids, self._limits = root, own_pids, dict(LIMITS, **limits)
        self._clock, self._wall = clock, wall

    def start(self) -> Dict[str, Any]:
        """Begin the first window, right before the first block.

        Returns:
            The state that everything after is compared with.
        """
        self._pending = Window(0.0, 0, 0, 0)
        self._first_clock = telemetry.clock(self._root)
        self._first = self._last = telemetry.snapshot(self._root, self._first_clock)
        self._offset_s = self._wall() - self._clock()
        self._counters = self._count()
        return dict(self._first)

    def lap(self) -> Lap:
        """End a window, right after a block, and begin the next one. What the look itself costs counts for neither."""
        window = between(self._counters, self._count())
        clock_now = telemetry.clock(self._root)
        now = telemetry.snapshot(self._root, clock_now)
        reasons = throttle_reasons(now, self._last)
        reasons += clock_reasons(self._first_clock, clock_now, self._limits["clock_ratio"])
        allowed_c = temperature_limit(now, self._limits) - MARGIN_C
        if now["temperature_c"] is not None and now["temperature_c"] >= allowed_c:
            reasons.append("temperature %.1f C >= %.1f C" % (now["temperature_c"], allowed_c))
        ratio, foreign = self._judge_load(window)
        reasons += foreign
        if window.major_faults > 0:
            reasons.append("major page faults %d > 0" % window.major_faults)
        if window.pages_swapped_in > 0:
            reasons.append("pages swapped in %d > 0" % window.pages_swapped_in)
        reasons += self._changes(now)
        notes = self._notes(now, window)
        self._last = now
        self._counters = self._count()
        return Lap(reasons, ratio, dict(now, foreign_cpu_ratio=ratio), notes)

    def _count(self) -> Counters:
        return counters(self._root, self._own_pids(), self._clock)

    def _judge_load(self, window: Window) -> Tuple[Optional[float], List[str]]:
        """Share of others and whether it is too much; windows that are too short are judged together with the next."""
        if window.foreign_ticks is None:
            self._pending = Window(0.0, 0, 0, 0)
            return None, []
        seconds = self._pending.seconds + window.seconds
        ticks = (self._pending.foreign_ticks or 0) + window.foreign_ticks
        self._pending = Window(seconds, ticks, 0, 0)
        ratio = foreign_ratio(self._pending, self._first["cpus_online"] or os.cpu_count() or 1)
        if ratio is None:
            return None, []
        self._pending = Window(0.0, 0, 0, 0)
        return ratio, foreign_reason(ticks, ratio, self._limits["foreign_cpu_ratio"])

    def _changes(self, now: Dict[str, Any]) -> List[str]:
        """Settings that are no longer those of the start: what was timed before cannot be compared with what comes."""
        reasons, first = [], self._first
        online = (now["cpus_online"], first["cpus_online"])
        if None not in online and online[0] < online[1]:
            reasons.append("cpus online %d < %d at the start" % online)
        for name in ("governor", "power_mode"):
            if None not in (now[name], first[name]) and now[name] != first[name]:
                words = (name.replace("_", " "), now[name], first[name])
                reasons.append("%s %s != %s at the start" % words)
        return reasons

    def _notes(self, now: Dict[str, Any], window: Window) -> List[str]:
        """What a reader of the figures should know although it voids none."""
        notes = []
        offset_s = self._wall() - self._clock()
        jump_s, self._offset_s = offset_s - self._offset_s, offset_s
        if abs(jump_s) > MAX_WALL_JUMP_S:
            notes.append("wall clock jumped by %+.1f s; times are of the monotonic clock" % jump_s)
        if self._wall() < SET_WALL_S:
            notes.append("wall clock was never set; times are of the monotonic clock")
        lost = [
            name for name, value in self._first.items() if value is not None and now[name] is None
        ]
        if lost:
            notes.append("no longer readable: %s" % ", ".join(sorted(lost)))
        if window.foreign_ticks is None and self._counters.busy_ticks is not None:
            notes.append("a process of ours ended; what other programs used was not judged")
        return notes


def _nothing() -> None:
    pass


def wait_until_ready(
    root: str,
    limits: Dict[str, float],
    expected_bytes: int,
    own_pids: Callable[[], Iterable[int]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    alive: Callable[[], None] = _nothing,
) -> List[str]:
    """Wait until the board is quiet, cool and has memory, for at most ``limits["wait_s"]`` seconds; 0 looks once.

    The load of the last minute counts our own work too. After it, a caller that waits again sets ``load_per_core`` to infinity, or it waits
    up to two minutes for itself on a board of one or two cores.

    Args:
        root: where the board's file system starts.
        limits: any of :data:`LIMITS`.
        expected_bytes: peak memory of what is about to be loaded; twice of that has to be available.
        own_pids: gives the ids of our processes now.
        clock: monotonic seconds.
        sleep: waits so many seconds.
        alive: called before every look, about every 3 s, so that the caller can tell its host that it still lives.

    Returns:
        What still speaks against measuring, one short line each with value and limit; none: ready.
    """
    limits = dict(LIMITS, **limits)
    deadline_s = clock() + limits["wait_s"]
    while True:
        alive()
        start = counters(root, own_pids(), clock)
        sleep(LOOK_S)
        window = between(start, counters(root, own_pids(), clock))
        reasons = _not_ready(telemetry.snapshot(root), window, limits, expected_bytes)
        left_s = deadline_s - clock()
        if not reasons or left_s <= 0:
            return reasons
        sleep(min(POLL_S, left_s))


def _not_ready(
    now: Dict[str, Any], window: Window, limits: Dict[str, float], expected_bytes: int
) -> List[str]:
    cores = now["cpus_online"] or os.cpu_count() or 1
    reasons = throttle_reasons(now)
    # Twenty degrees of room to warm up in; never so warm that the first block would be void.
    limit_c = temperature_limit(now, limits)
    allowed_c = max(limits["soft_limit_c"] - COOL_BELOW_LIMIT_C, limits["start_below_c"])
    allowed_c = min(allowed_c, limit_c - MARGIN_C)
    if now["temperature_c"] is not None and now["temperature_c"] > allowed_c:
        reasons.append("temperature %.1f C > %.1f C" % (now["temperature_c"], allowed_c))
    load = now["load_1min"]
    if load is not None and load / cores >= limits["load_per_core"]:
        values = (load / cores, limits["load_per_core"])
        reasons.append("load of the last minute %.2f per core >= %g" % values)
    ratio = foreign_ratio(window, cores)
    if ratio is not None:
        reasons += foreign_reason(window.foreign_ticks or 0, ratio, limits["foreign_cpu_ratio"])
    if window.pages_swapped_in > 0:
        reasons.append("pages swapped in %d > 0" % window.pages_swapped_in)
    needed, free = MEMORY_FACTOR * expected_bytes, now["available_memory_bytes"]
    if free is not None and free < needed:
        values = (free / (1 << 20), needed / (1 << 20))
        reasons.append("memory available %.0f MiB < %.0f MiB" % values)
    return reasons
