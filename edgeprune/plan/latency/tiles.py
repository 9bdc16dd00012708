"""In which steps a kernel's time grows with its channels, read off a handful of timings.

Kernel libraries round channels up to whole tiles, in and out separately, so that a kernel with ``w`` channels in one slot costs
``c0 + c1 P(w)``, where ``P`` rounds up to the tile. Some are even slower off the tile than above it: a cliff.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.plan.latency.nnls import nonnegative_least_squares

FINEST_STEP = 4  # no kernel library rounds channels to less than 4 (MLAS and NEON fp32 vectors)
STEPS = (4, 8, 16, 32)  # XNNPACK and MLAS tiles, see their kernel configurations
TOP = 64  # narrower, a step of 4 channels stands out of the noise: it is 6 % of 64 and 1 % of 512
CLIFF_RATIO = 0.05
FLAT_RATIO = 0.05  # a slot that moves the time by less than this over its window shows no step
CLEAR_RATIO, CLEAN_RATIO = 0.015, 0.03  # of the time; kernels repeat to 0.6-1.7 %


@dataclass(frozen=True)
class Tile:
    """What was found.

    ``is_clean``: the time is a staircase of this step. ``is_clear``: no other step comes near it. ``has_cliffs``: widths off the step are
    slower than the multiple above them.
    """

    step: int
    is_clean: bool
    is_clear: bool
    has_cliffs: bool


def padded(width: int, step: int) -> int:
    """The width, rounded up to a multiple of ``step``."""
    return -(-width // step) * step


def window(full: int, step: int = FINEST_STEP) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths that tell the steps apart: those to time first, and those that help where the first leave it open.

    Args:
        full: full width of the slot.
        step: finest step that the slot allows.

    Returns:
        Both descending, together every multiple of ``step`` over 32 channels below ``min(full, 64)``; empty where nothing is left to tell.
    """
    unit = next((s for s in reversed(STEPS) if full >= s), 0)
    if unit < 2 * step:
        return (), ()
    top = min(full, TOP) // unit * unit
    everywhere = [w for w in range(top, max(top - 33, 0), -step) if w > 0]
    first = {top - d for d in (0, 4, 8, 16, 32, 24 if top == 32 else 0)}
    chosen = [w for w in everywhere if w in first]
    return tuple(chosen), tuple(w for w in everywhere if w not in first)


def read_tile(
    times: Mapping[int, float], *, power: int = 1, steps: Iterable[int] = STEPS
) -> Tile | None:
    """The step that explains the times of one slot best.

    For every step a line through its multiples is fitted; a width between two multiples counts against the step only where it is faster
    than the multiple above it: slower ones are cliffs, which nobody would choose.

    Args:
        times: time by width, the other slots full; any unit.
        power: 2 where the width stands on both sides of the weights.
        steps: to choose from.

    Returns:
        ``None`` where the slot moves the time too little to tell.
    """
    widths = sorted(times)
    found = np.array([times[w] for w in widths])
    if len(widths) < 3 or found.max() < (1 + FLAT_RATIO) * found.min():
        return None
    errors, cliffs = {}, {}
    for step in steps:
        x = np.array([padded(w, step) for w in widths], dtype=float) ** power
        whole = np.array([w % step == 0 for w in widths])
        if whole.sum() < 2:
            continue
        rows = np.stack([np.ones_like(x), x], axis=1) / found[:, None]
        line = nonnegative_least_squares(rows[whole], np.ones(int(whole.sum())))
        off = 1 / np.maximum(rows @ line, 1e-12) - 1
        counted = np.where(whole, off, np.minimum(off, 0))
        cliffs[step] = bool((off[~whole] > CLIFF_RATIO).any())
        errors[step] = math.sqrt(float((counted**2).mean()))
    if not errors:
        return None
    least = min(errors.values())
    step = min(s for s, error in errors.items() if error <= 1.25 * least + 0.003)
    rest = [error for s, error in errors.items() if s != step]
    is_clear = errors[step] <= CLEAR_RATIO and all(e > 2 * least + CLEAR_RATIO for e in rest)
    return Tile(step, errors[step] <= CLEAN_RATIO, is_clear, cliffs[step])


def common_step(channels: int, own: int, tiles: Sequence[Tile]) -> int:
    """The step for the widths of a group, as long as 4 widths remain.

    It is the finest that any kernel gains by, since what one kernel pads away another one may still save; but a multiple of every tile
    with cliffs: there a table of padded widths is wrong about all others.

    Args:
        channels: full width of the group.
        own: step that the network asks for (a grouped convolution).
        tiles: those of the kernels that the group touches.
    """
    finest = math.lcm(FINEST_STEP, own)
    gained = min((t.step for t in tiles), default=FINEST_STEP)
    step = math.lcm(finest, gained, *(t.step for t in tiles if t.has_cliffs))
    while step > finest and channels < 4 * step and step % 2 == 0 and (step // 2) % finest == 0:
        step //= 2
    return step
