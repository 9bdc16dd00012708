"""The check-up of a board: what it is, what it can run, and what would disturb a measurement there, each with the next step."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

from edgeprune.devices.agent.runtimes import RUNTIMES as AGENT_RUNTIMES
from edgeprune.devices.board import Board
from edgeprune.devices.link import replies
from edgeprune.devices.link.frames import Refusal
from edgeprune.records.base import Record
from edgeprune.records.device import Device

RUNTIMES = ("litert", "tflite-runtime", "onnxruntime")
# Room for an interpreter, a runtime and a small model; where less is free the board swaps or ends the process.
LOW_MEMORY_BYTES = 256 * 1024**2
# The page size of Raspberry Pi OS on a Pi 5, on which libraries that were built for 4 KiB may fail (raspberrypi/bookworm-feedback#107).
LARGE_PAGE_BYTES = 16 * 1024
CLOCK_OFFSET_S = 60.0
_WORK_S = 60.0
_RUNTIME_S = 120.0  # it is imported in a process of its own
# Flags of /proc/cpuinfo by the name of the extension: Linux, Documentation/arch/arm64/elf_hwcaps.rst.
ARM_FLAGS = {
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "fp16": "asimdhp",
    "LSE": "atomics",
    "SVE": "sve",
}
X86_FLAGS = {
    "AVX2": "avx2",
    "AVX-VNNI": "avx_vnni",
    "AVX512-VNNI": "avx512_vnni",
    "AMX-INT8": "amx_int8",
}

R = TypeVar("R", bound=Record)
Level = Literal["ok", "warn", "fail"]


class Finding(Record):
    """One line of a check-up. ``next_step`` says what to do about a ``warn`` or ``fail``."""

    level: Level
    name: str
    text: str
    next_step: str | None = None


class RuntimeFound(Record):
    """A runtime on the board: its version, or why it cannot be used."""

    name: str
    version: str | None = None
    problem: str | None = None


class Checkup(Record):
    """All that was found, and the answers of the board that it was found in."""

    device: str
    ok: bool
    findings: tuple[Finding, ...]
    hello: replies.Hello
    status: replies.Status
    runtimes: tuple[RuntimeFound, ...]
    clock_offset_s: float  # the board's wall clock, less this machine's


def asked(
    board: Board, cls: type[R], op: str, fields: dict[str, Any], *, work_s: float = _WORK_S
) -> R:
    """The checked reply of a board to one operation. Raises as :func:`check_up`."""
    reply, _ = board.request(op, fields, work_s=work_s)
    return replies.checked(cls, reply, board.name)


def check_up(board: Board, needed: Sequence[str] = ()) -> Checkup:
    """Look a board over; nothing on it is changed, and no lease is needed.

    Args:
        board: an open board.
        needed: runtimes of the targets that the device lists: where one is missing the board fails the check-up.

    Raises:
        DeviceError: the board does not answer, or sends something implausible.
    """
    before_ns = time.time_ns()
    hello = asked(board, replies.Hello, "hello", {})
    offset_s = (hello.wall_clock_ns - (before_ns + time.time_ns()) / 2) / 1e9
    status = asked(board, replies.Status, "status", {})
    names = dict.fromkeys([*RUNTIMES, *(name for name in needed if name in AGENT_RUNTIMES)])
    runtimes = tuple(_runtime(board, name) for name in names)
    name, device = board.name, board.device
    findings = (
        *_machine(hello, device),
        *_memory(hello, status.telemetry),
        *_system(hello, offset_s),
        *_speed(status.telemetry, device),
        *(_runtime_line(r, name, r.name in needed) for r in runtimes),
        *_folder(status, device, name),
        _lease(status, name),
    )
    ok = all(finding.level != "fail" for finding in findings)
    return Checkup(
        device=name,
        ok=ok,
        findings=findings,
        hello=hello,
        status=status,
        runtimes=runtimes,
        clock_offset_s=offset_s,
    )


def _runtime(board: Board, name: str) -> RuntimeFound:
    try:
        found = asked(board, replies.RuntimeVersion, "runtime", {"name": name}, work_s=_RUNTIME_S)
    except Refusal as error:
        return RuntimeFound(name=name, problem=error.message.partition(" answered: ")[2])
    return RuntimeFound(name=name, version=found.version)


def extensions(hello: replies.Hello) -> dict[str, bool]:
    """The instructions that matter for INT8 and fp16 on this kind of processor, and whether it has them."""
    wanted = ARM_FLAGS if hello.machine.startswith(("aarch64", "arm")) else X86_FLAGS
    return {name: flag in hello.cpu_flags for name, flag in wanted.items()}


def _machine(hello: replies.Hello, device: Device) -> Iterable[Finding]:
    cores = f"{hello.cores} core" + ("s" if hello.cores > 1 else "")
    text = f"{hello.cpu_model}, {hello.machine}, {cores}, {hello.bits}-bit"
    if re.match(r"armv[1-6]", hello.machine):
        advice = "take a board with ARMv7 or newer"
        yield Finding(
            level="fail", name="cpu", text=f"{text}; no runtime is made for it", next_step=advice
        )
    elif hello.bits == 32:
        advice = "use the target's tflite-runtime, or install a 64-bit system"
        yield Finding(
            level="warn",
            name="cpu",
            text=f"{text}; of the runtimes only tflite-runtime is made for 32 bits",
            next_step=advice,
        )
    else:
        yield Finding(level="ok", name="cpu", text=text)
    flags = extensions(hello)
    listed = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in flags.items())
    if flags.get("dotprod") is False:
        listed += "; without dotprod INT8 may be no faster than fp32, so look at both"
    yield Finding(level="ok", name="isa", text=listed)
    if hello.emulated:
        yield Finding(
            level="warn",
            name="stamp",
            text="emulated: models run, but their times mean nothing",
            next_step="measure on a real board",
        )
    else:
        stamp = "stand-in" if device.stand_in else "measured"
        yield Finding(level="ok", name="stamp", text=f"times are stamped {stamp}")


def _memory(hello: replies.Hello, moment: replies.Moment) -> Iterable[Finding]:
    available = moment.available_memory_bytes
    text = f"{size_text(hello.memory_bytes)} in total"
    if available is not None:
        text += f", {size_text(available)} available"
    low = available is not None and available < LOW_MEMORY_BYTES
    yield Finding(
        level="warn" if low else "ok",
        name="memory",
        text=text,
        next_step="end other programs on the board" if low else None,
    )
    large = hello.page_size_bytes >= LARGE_PAGE_BYTES
    yield Finding(
        level="warn" if large else "ok",
        name="page size",
        text=size_text(hello.page_size_bytes)
        + ("; libraries that were built for 4 KiB pages may crash" if large else ""),
        next_step="if a runtime does not start, boot a kernel with 4 KiB pages"
        " (Raspberry Pi 5: kernel=kernel8.img in config.txt)"
        if large
        else None,
    )


def _system(hello: replies.Hello, offset_s: float) -> Iterable[Finding]:
    text = f"Linux {hello.kernel}, glibc {hello.glibc or 'none'}, Python {hello.python}, user {hello.user}"
    yield Finding(
        level="ok" if hello.glibc else "warn",
        name="system",
        text=text,
        next_step=None if hello.glibc else "the runtimes' wheels need glibc: use a system that has it",
    )  # fmt: skip
    off = abs(offset_s) > CLOCK_OFFSET_S
    yield Finding(
        level="warn" if off else "ok",
        name="wall clock",
        text=f"{offset_s:+.1f} s against this machine"
        + ("; times are measured with another clock and stay right" if off else ""),
        next_step="on the board: sudo timedatectl set-ntp true" if off else None,
    )


def _speed(moment: replies.Moment, device: Device) -> Iterable[Finding]:
    governor = moment.governor
    steady = governor in (None, "performance")
    yield Finding(
        level="ok" if steady else "warn",
        name="governor",
        text=governor or "not shown by this board",
        next_step=None
        if steady
        else "the clock moves while it measures: set tuning: {allow: true} for the device, or performance by hand",
    )
    clock = "not shown by this board"
    if moment.clock_hz is not None:
        clock = f"{moment.clock_hz / 1e6:.0f} MHz"
        if moment.clock_limit_hz:
            clock += f" of {moment.clock_limit_hz / 1e6:.0f} MHz"
    if moment.power_mode:
        clock += f", power mode {moment.power_mode}"
    yield Finding(level="ok", name="clock", text=clock)
    yield _temperature(moment, device)
    yield _throttle(moment)


def _temperature(moment: replies.Moment, device: Device) -> Finding:
    now, thermal = moment.temperature_c, device.thermal
    if now is None:
        return Finding(level="ok", name="temperature", text="not shown by this board")
    text = f"{now:.1f} C, measured below {thermal.start_below_c:g} C"
    if moment.temperature_limit_c is not None:
        text += f", the board's limit is {moment.temperature_limit_c:g} C"
    level: Level = "ok"
    if now >= thermal.start_below_c:
        level = "fail" if now >= thermal.soft_limit_c else "warn"
    advice = "let it cool down, or give it a fan" if level != "ok" else None
    return Finding(level=level, name="temperature", text=text, next_step=advice)


def _throttle(moment: replies.Moment) -> Finding:
    def advice(names: Sequence[str]) -> str:
        is_supply = any(name in ("under-voltage", "over-current") for name in names)
        return "use a stronger power supply and cable" if is_supply else "cool the board"

    if moment.throttle or moment.throttled:
        names = moment.throttle or ("throttled",)
        return Finding(
            level="fail",
            name="throttle",
            text=f"now: {', '.join(names)}",
            next_step=advice(names),
        )
    if moment.throttle_seen or moment.throttle_events:
        events = f"{moment.throttle_events} events" if moment.throttle_events else ""
        seen = ", ".join((*moment.throttle_seen, *([events] if events else [])))
        return Finding(
            level="warn",
            name="throttle",
            text=f"not now, but since the start: {seen}",
            next_step=advice(moment.throttle_seen),
        )
    shown = "none" if moment.throttled is not None else "not shown by this board"
    return Finding(level="ok", name="throttle", text=shown)


def _runtime_line(found: RuntimeFound, board: str, needed: bool) -> Finding:
    name = f"runtime {found.name}"
    if found.version is not None:
        return Finding(level="ok", name=name, text=found.version)
    if not needed:
        text = f"cannot be used, and no target of this device needs it: {found.problem}"
        return Finding(level="ok", name=name, text=text)
    return Finding(
        level="fail",
        name=name,
        text=str(found.problem),
        next_step=f"edgeprune devices setup {board} --runtime {found.name}",
    )


def _folder(status: replies.Status, device: Device, board: str) -> Iterable[Finding]:
    listed = [f"{e.name} ({e.version}, {size_text(e.bytes)})" for e in status.environments]
    yield Finding(level="ok", name="environments", text=", ".join(listed) or "none")
    problem = status.workdir_problem
    yield Finding(
        level="ok" if problem is None else "fail",
        name="workdir",
        text=f"{status.workdir} " + ("is writable and executable" if problem is None else problem),
        next_step=None
        if problem is None
        else "set workdir to a folder of this user on a disk without noexec",
    )
    full = status.disk_free_bytes < device.min_free_bytes
    yield Finding(
        level="fail" if full else "ok",
        name="disk",
        text=f"{size_text(status.disk_free_bytes)} free, {size_text(device.min_free_bytes)} have to stay free;"
        f" the cache takes {size_text(status.cache_bytes)}",
        next_step=f"edgeprune devices clean {board} --all" if full else None,
    )


def _lease(status: replies.Status, board: str) -> Finding:
    if status.owner is not None and not status.mine:
        return Finding(
            level="warn",
            name="lease",
            text=f"held by {status.owner.text()}",
            next_step=f"edgeprune devices wait {board}",
        )
    if status.tuned and not status.mine:
        return Finding(
            level="warn",
            name="lease",
            text="free, but settings that were changed for a measurement were not put back",
            next_step=f"edgeprune devices restore {board}",
        )
    return Finding(level="ok", name="lease", text=f"free ({status.lease_file})")


def size_text(size_bytes: int) -> str:
    """A size for people, such as ``3.7 GiB``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
