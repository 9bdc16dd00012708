"""Have the C library keep the memory of large tensors, where it would give it back after every layer.

Activations of large images are tens of megabytes. glibc maps each afresh and unmaps it when it is freed, so that every layer waits for
the kernel to hand out zeroed pages. ``benchmarks/walltime.py`` is a search where that matters.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform

# Numbers of the options in glibc's malloc.h; https://man7.org/linux/man-pages/man3/mallopt.3.html (read 2026-11-29).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 30  # bytes: blocks up to this size come from memory that stays with the process
# Bytes at the end of the heap that may stay unused; the option is a C int.
MOST_IDLE = 2_000_000_000


def keep_large_blocks() -> bool:
    """Set the thresholds of this process. Returns whether the C library took them: any but glibc is left as it is."""
    if platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, MOST_IDLE))
    return False
