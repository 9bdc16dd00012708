"""What identifies this machine: read once, when a client says hello."""

from __future__ import annotations

import getpass
import glob
import hashlib
import os
import platform
import struct
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional

MAX_FILE_BYTES = 1 << 20


def read_text(path: str) -> Optional[str]:
    """A small file of /proc or /sys without surrounding blanks, or ``None`` where it cannot be read. Never waits for a writer."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        parts: List[bytes] = []
        size = 0
        while size < MAX_FILE_BYTES:
            part = os.read(file, 1 << 16)
            if not part:
                break
            parts.append(part)
            size += len(part)
        return b"".join(parts).decode("utf-8", "replace").strip("\0\r\n\t ")
    except OSError:
        return None
    finally:
        os.close(file)


def fields_of(path: str) -> Dict[str, str]:
    """The first value of every ``name: value`` line of a file in /proc, by lower-case name."""
    fields: Dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    return fields


def machine_facts() -> Dict[str, Any]:
    """What identifies this machine, without naming it."""
    fields, machine = fields_of("/proc/cpuinfo"), platform.machine()
    board = read_text("/proc/device-tree/model") or fields.get("model name") or fields.get("model")
    board = board or sysctl("machdep.cpu.brand_string")
    # An ARM program under qemu sees the x86 computer below it, and not itself as the program of its own thread.
    program, thread = (os.path.realpath("/proc/%s/exe" % name) for name in ("self", "thread-self"))
    is_qemu = "vendor_id" in fields or (os.path.exists("/proc/thread-self") and program != thread)
    return {
        "machine": machine,
        "cpu_model": board or platform.processor() or machine,
        "cpu_flags": sorted(set((fields.get("flags") or fields.get("features") or "").split())),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "hostname_digest": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        "emulated": machine.startswith(("aarch64", "arm")) and is_qemu,
        "bits": struct.calcsize("P") * 8,
        "glibc": glibc_version(),
        "boot_id": boot_id(),
        "wall_clock_ns": time.time_ns(),
        "user": user_name(),
        "affinity": fastest_cpus(),
    }


def glibc_version() -> Optional[str]:
    """Version of the GNU C library, such as ``2.36``; ``None`` with another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    return version if name == "glibc" else None


def boot_id() -> str:
    """Changes with every start of the kernel; empty where the kernel does not tell."""
    found = read_text("/proc/sys/kernel/random/boot_id") or sysctl("kern.bootsessionuuid") or ""
    return found.lower()


def sysctl(name: str) -> Optional[str]:
    """A fact that macOS tells; ``None`` elsewhere, or where it does not."""
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip()[:200] or None


def user_name() -> str:
    """Who this process runs as; the number where the system knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def usable_cpus() -> List[int]:
    """The processors that this process may use; empty on macOS, which places threads itself."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def fastest_cpus(root: str = "/") -> Optional[List[int]]:
    """The processors of the fastest cluster, or ``None`` where all are alike.

    A board with big and little cores would otherwise be timed on whichever the scheduler picked.
    """
    ranks: Dict[int, int] = {}
    for folder in glob.glob(os.path.join(root, "sys/devices/system/cpu/cpu[0-9]*")):
        found = read_text(folder + "/cpu_capacity") or read_text(
            folder + "/cpufreq/cpuinfo_max_freq"
        )
        if found and found.isdigit():
            ranks[int(os.path.basename(folder)[3:])] = int(found)
    if len(set(ranks.values())) < 2:
        return None
    top = max(ranks.values())
    return sorted(cpu for cpu, rank in ranks.items() if rank == top)
