"""Memory of large tensors stays with the process, so that it is not mapped afresh each time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from edgeprune.pipeline import allocator

PAGES = """
import resource, sys
import numpy as np
from edgeprune.pipeline import allocator

if "keep" in sys.argv:
    assert allocator.keep_large_blocks()
def fill():
    np.empty(1 << 24, np.float32).fill(1)  # 64 MiB, written to and freed
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PAGES, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the option is glibc's")
def test_pages_of_large_blocks_are_not_asked_for_twice() -> None:
    assert _faults("keep") < 64 < _faults()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_large_blocks()
