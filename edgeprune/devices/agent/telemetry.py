"""The state of the board at one moment: clocks, temperature, throttling, memory and load, read from files and two vendor commands.

Every path is taken below ``root``, which is ``/`` on a board. What a board does not show, or shows as something that cannot be true, is
``None``; nothing here raises because of what a file holds. Nothing here changes a setting or answers a prompt.

Cost of one snapshot, stand-in (x86 with 2 shared cores, Python 3.11, medians of 60 to 200): 0.4 ms for the files of one cpufreq policy and
one thermal zone, 0.7 ms for two and five; each vendor command adds the start of a process, 2 to 3 ms there for the stub of the tests (a
Raspberry Pi starts two, a Jetson one). So it belongs between blocks, never inside one.

Source: Linux Documentation/admin-guide/pm/cpufreq.rst, driver-api/thermal/sysfs-api.rst and hwmon/raspberrypi-hwmon.rst; Raspberry Pi
documentation of ``vcgencmd``; NVIDIA Jetson Linux Developer Guide, "Platform Power and Performance". Read 2026-11; not tried on hardware.
"""

from __future__ import annotations

import glob
import os
import re
import signal
import subprocess
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from .machine import MAX_FILE_BYTES, read_text

# Both answer within milliseconds; one that hangs is killed with all it started.
COMMAND_TIMEOUT_S = 1.0
MAX_CPUS = 4096
CPU = "sys/devices/system/cpu"
# Bits 0 to 3 of `vcgencmd get_throttled`; 16 to 19 say the same of the time since boot (or since the kernel last cleared them).
THROTTLE_BITS = ("under-voltage", "frequency-capped", "throttled", "soft-limit")
# A Raspberry Pi starts to slow down at 80 degrees; its only trip point is the critical one. The soft limit of a 3B+ (60) shows as bit 3.
RASPBERRY_PI_LIMIT_C = 80.0
# Sensors on the processor's die. Others (PMIC, Wi-Fi, battery) have other limits; a Jetson Nano's PMIC reads 100 at all times.
DIE_ZONES = re.compile(r"cpu|soc|gpu|\btj|pkg|package|cluster|core|big|little", re.IGNORECASE)
# On x86 scaling_cur_freq is an average that counts idle time and turbo, so it is no clock to hold a board to.
X86_DRIVERS = ("intel_", "amd-pstate", "acpi-cpufreq")
GOVERNOR = re.compile(r"[a-z_]{1,32}")
POWER_MODE = re.compile(r"^NV Power Mode: *([A-Za-z0-9][A-Za-z0-9_ .+-]{0,39}?) *$", re.MULTILINE)


class Clock(NamedTuple):
    """The processor's clock now, in Hz, of the fastest cluster.

    ``real_hz`` is what the firmware measured; ``asked_hz`` what the kernel asked for, ``None`` when that changed while the firmware
    measured. ``is_fixed`` says that nothing but throttling lowers it: the governor is ``performance`` and the file means the clock.
    """

    real_hz: Optional[int]
    asked_hz: Optional[int]
    limit_hz: Optional[int]
    governor: Optional[str]
    is_fixed: bool


def below(root: str, *parts: str) -> str:
    """A path of the board, below ``root``."""
    return os.path.join(root, *(part.lstrip("/") for part in parts))


def found_paths(root: str, pattern: str) -> List[str]:
    """Paths of the board that fit a pattern."""
    return glob.glob(os.path.join(glob.escape(root), pattern))


def integer(text: Optional[str], low: int, high: int) -> Optional[int]:
    """The integer that a file holds, when it is within ``low`` and ``high``."""
    if text is None or not re.fullmatch(r"-?[0-9]{1,18}", text):
        return None
    value = int(text)
    return value if low <= value <= high else None


def run(root: str, program: str, *arguments: str) -> Optional[str]:
    """What a program of the board prints, or ``None`` where there is no such program or it takes over a second.

    It sees the end of its input at once, so a question it may ask is never answered. Its exit status is not looked at: ``nvpmodel -q``
    tells the mode and fails all the same where it may not read every limit.
    """
    path = below(root, program)
    if not os.access(path, os.X_OK) or not os.path.isfile(path):
        return None
    try:
        child = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError:
        return None
    try:
        content, _ = child.communicate(timeout=COMMAND_TIMEOUT_S)
        return content[:MAX_FILE_BYTES].decode("utf-8", "replace")
    except (subprocess.TimeoutExpired, OSError):
        return None
    finally:
        _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """No process of a command that hung stays; one that not even SIGKILL ends is left to the kernel."""
    if child.returncode is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(COMMAND_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            pass
    if child.stdout is not None:
        child.stdout.close()


def clock(root: str = "/") -> Clock:
    """The clock of the fastest cluster, real where the firmware tells it (``vcgencmd measure_clock arm`` on a Raspberry Pi)."""
    policies = sorted(found_paths(root, CPU + "/cpufreq/policy[0-9]*"))
    policies = policies or [below(root, CPU, "cpu0/cpufreq")]
    asked_hz = _highest_hz(policies, "scaling_cur_freq")
    real_hz = None
    answer = run(root, "/usr/bin/vcgencmd", "measure_clock", "arm")
    if answer is not None:
        found = re.fullmatch(r"frequency\([0-9]+\)=([0-9]+)", answer.strip())
        real_hz = integer(found.group(1), 10_000_000, 10_000_000_000) if found else None
        if asked_hz != _highest_hz(policies, "scaling_cur_freq"):
            asked_hz = None
    limits = [
        min(known)
        for known in (
            [hz for hz in (_hz(policy, "cpuinfo_max_freq"), _hz(policy, "scaling_max_freq")) if hz]
            for policy in policies
        )
        if known
    ]
    governors = sorted({text for text in map(_governor, policies) if text})
    drivers = [read_text(os.path.join(policy, "scaling_driver")) or "" for policy in policies]
    is_fixed = governors == ["performance"] and not any(d.startswith(X86_DRIVERS) for d in drivers)
    return Clock(
        real_hz,
        asked_hz,
        max(limits) if limits else None,
        "+".join(governors)[:100] or None,
        is_fixed,
    )


def _hz(policy: str, name: str) -> Optional[int]:
    khz = integer(read_text(os.path.join(policy, name)), 10_000, 10_000_000)
    return None if khz is None else khz * 1000


def _highest_hz(policies: List[str], name: str) -> Optional[int]:
    known = [hz for hz in (_hz(policy, name) for policy in policies) if hz is not None]
    return max(known) if known else None


def _governor(policy: str) -> Optional[str]:
    text = read_text(os.path.join(policy, "scaling_governor")) or ""
    return text if GOVERNOR.fullmatch(text) else None


def temperatures(root: str = "/") -> Tuple[Optional[float], Optional[float]]:
    """The hottest sensor on the die and the lowest temperature at which the board slows down, in degrees Celsius.

    The limit is the lowest passive trip point of those sensors, where the kernel starts to throttle, else the lowest hot or critical one.
    """
    zones = []
    for zone in found_paths(root, "sys/class/thermal/thermal_zone[0-9]*"):
        value = _degrees(os.path.join(zone, "temp"))
        if value is not None:
            zones.append((read_text(os.path.join(zone, "type")) or "", value, zone))
    chosen = [zone for zone in zones if DIE_ZONES.search(zone[0])]
    chosen = chosen or [zone for zone in zones if "pmic" not in zone[0].lower()]
    trips: Dict[str, List[float]] = {}
    for _, _, zone in chosen:
        for path in found_paths(zone, "trip_point_[0-9]*_type"):
            limit = _degrees(path[: -len("type")] + "temp")
            if limit is not None and limit > 40:
                trips.setdefault(read_text(path) or "", []).append(limit)
    limits = trips.get("passive") or trips.get("hot", []) + trips.get("critical", [])
    limit = min(limits) if limits else None
    if chosen and os.path.isfile(below(root, "/usr/bin/vcgencmd")):
        limit = min(limit or RASPBERRY_PI_LIMIT_C, RASPBERRY_PI_LIMIT_C)
    return (max(zone[1] for zone in chosen) if chosen else None), limit


def _degrees(path: str) -> Optional[float]:
    """Degrees Celsius; a sensor that is switched off tells 0 or an absurd value."""
    value = integer(read_text(path), -40_000, 150_000)
    return value / 1000 if value else None


def throttling(root: str = "/") -> Tuple[Optional[bool], List[str], List[str]]:
    """Whether something limits the board now (``None``: the board does not tell), what that is, and what has since the last reset."""
    now, seen, is_known = set(), set(), False
    answer = run(root, "/usr/bin/vcgencmd", "get_throttled") or ""
    found = re.fullmatch(r"throttled=0x([0-9a-fA-F]{1,8})", answer.strip())
    if found:
        bits, is_known = int(found.group(1), 16), True
        now |= {name for bit, name in enumerate(THROTTLE_BITS) if bits >> bit & 1}
        seen |= {name for bit, name in enumerate(THROTTLE_BITS) if bits >> bit + 16 & 1}
    # The kernel's driver looks every 2 s and clears the firmware's bit: this alarm means "within the last look".
    for path in found_paths(root, "sys/class/hwmon/hwmon*/in0_lcrit_alarm"):
        if read_text(os.path.join(os.path.dirname(path), "name")) == "rpi_volt":
            alarm = integer(read_text(path), 0, 1)
            is_known = is_known or alarm is not None
            now |= {"under-voltage"} if alarm else set()
    # Elsewhere the kernel itself caps the clock of a hot board ("cpufreq-cpu0", before Linux 5.12 "thermal-cpufreq-0").
    for path in found_paths(root, "sys/class/thermal/cooling_device[0-9]*/type"):
        if "cpufreq" in (read_text(path) or ""):
            state = integer(read_text(os.path.join(os.path.dirname(path), "cur_state")), 0, 1000)
            is_known = is_known or state is not None
            now |= {"frequency-capped"} if state else set()
    return bool(now) if is_known else None, sorted(now), sorted(seen)


def throttle_events(root: str = "/") -> Optional[int]:
    """Over-current and under-voltage events since boot that slowed a Jetson down, of all its counters."""
    counts = [
        integer(read_text(path), 0, 1 << 48)
        for path in found_paths(root, "sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt")
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def power_mode(root: str = "/") -> Optional[str]:
    """Name of the power mode of a Jetson."""
    found = POWER_MODE.search(run(root, "/usr/sbin/nvpmodel", "-q") or "")
    return found.group(1) if found else None


def cpus_online(root: str = "/") -> Optional[int]:
    """Number of processors that are switched on, from a list such as ``0-3,6``."""
    text = read_text(below(root, CPU, "online")) or ""
    online = set()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        if not found or int(found.group(2) or 0) >= MAX_CPUS:
            return None
        first = int(found.group(1))
        online |= set(range(first, int(found.group(2) or first) + 1))
    return len(online) or None


def available_memory_bytes(root: str = "/") -> Optional[int]:
    """Memory that a program can still get without swapping: ``MemAvailable``."""
    text = read_text(below(root, "proc/meminfo")) or ""
    found = re.search(r"^MemAvailable: +([0-9]{1,13}) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def load_1min(root: str = "/") -> Optional[float]:
    """Load average of the last minute."""
    found = re.match(r"([0-9]{1,6}\.[0-9]{2}) ", read_text(below(root, "proc/loadavg")) or "")
    return float(found.group(1)) if found else None


def snapshot(root: str = "/", clock_now: Optional[Clock] = None) -> Dict[str, Any]:
    """The state of the board now.

    Args:
        root: where the board's file system starts.
        clock_now: a clock that was just read, so that it is not read twice.

    Returns:
        The fields of the host's record ``Telemetry`` but ``foreign_cpu_ratio``, which takes two moments.
    """
    seen = clock_now or clock(root)
    temperature_c, limit_c = temperatures(root)
    throttled, now, since = throttling(root)
    return {
        "load_1min": load_1min(root),
        "temperature_c": temperature_c,
        "temperature_limit_c": limit_c,
        "clock_hz": seen.real_hz or seen.asked_hz,
        "clock_limit_hz": seen.limit_hz,
        "governor": seen.governor,
        "power_mode": power_mode(root),
        "throttled": throttled,
        "throttle": now,
        "throttle_seen": since,
        "throttle_events": throttle_events(root),
        "available_memory_bytes": available_memory_bytes(root),
        "cpus_online": cpus_online(root),
    }
