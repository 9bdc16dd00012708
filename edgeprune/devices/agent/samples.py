"""Inputs to time a model with, and how often to run it in one sample. Lives in a worker process."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict


def realistic(spec: Dict[str, Any], seed: int) -> Any:
    """Random input: zeros would let kernels skip work and hide denormals. Integers wider than 8 bits are 0 or 1: valid as an index."""
    import numpy as np

    shape, dtype = spec["shape"], spec["dtype"]
    rng = np.random.default_rng(seed)
    if dtype in ("int8", "uint8"):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, size=shape, dtype=dtype)
    if dtype.startswith(("int", "uint", "bool")):
        return rng.integers(0, 2, size=shape).astype(dtype)
    return rng.standard_normal(size=shape).astype(dtype)


def sample(run: Callable[[], Any], calls: int) -> int:
    """Mean time of ``calls`` calls in nanoseconds, at least 1."""
    clock = time.perf_counter_ns
    start = clock()
    for _ in range(calls):
        run()
    return max(1, (clock() - start) // calls)
