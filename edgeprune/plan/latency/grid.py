"""Which widths of a channel group are worth measuring, and which of the measured ones are worth choosing.

A grid is an ascending tuple of widths whose last entry is the full width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


def candidate_widths(n: int, *, step: int = 4, most: int = 32) -> tuple[int, ...]:
    """Widths of a group of ``n`` channels to measure: multiples of a step, and ``n`` itself.

    The step is doubled until at most ``most`` widths remain, never set to an arbitrary multiple: kernel tiles are powers of two, so a
    doubled step still meets their edges.

    Args:
        n: full width, at least 1.
        step: finest distance between two widths, in channels.
        most: largest number of widths, at least 2.

    Returns:
        An ascending grid from about ``max(step, n / 8)`` to ``n``; only ``(n,)`` when nothing smaller is left.
    """
    if n < 1 or step < 1 or most < 2:
        raise ValueError(f"a grid needs n >= 1, step >= 1, most >= 2, but got {n}, {step}, {most}")
    floor = max(step, math.ceil(n / 8))
    while True:
        first = step * math.ceil(floor / step)
        widths = (*range(first, n, step), n)
        if len(widths) <= most:
            return widths
        step *= 2


def admissible(
    widths: Iterable[int], cost_ns: Mapping[int, float], *, tolerance: float = 0.01
) -> tuple[int, ...]:
    """The widths that pay: a narrower one stays only if it is faster than every wider one that stays, by more than ``tolerance``.

    From the full width downwards: look for the next width that is faster than the last one kept by more than ``tolerance``; of all
    that are as fast as it within ``tolerance``, keep the widest. This removes cliffs (62 channels slower than 64) and keeps the wide
    edge of each tile. Widths are compared with those that *stay*, not with their neighbours, so that a smooth device whose steps are
    each below the tolerance keeps every n-th width instead of losing them all.

    Noise: interference makes a timing too long, hardly ever too short. A timing that is too long costs only its own width; set
    ``tolerance`` to the repeatability of the timings so that a flat stretch is not split by it.

    Args:
        widths: the measured widths of one group.
        cost_ns: time of everything the group touches, at each width, the other groups being at full width; any unit.
        tolerance: relative difference that counts as none, at least 0.

    Returns:
        An ascending grid; the full (largest) width is always in it.
    """
    descending = sorted(set(widths), reverse=True)
    costs = [cost_ns[width] for width in descending]
    kept, last = [descending[0]], 0
    while True:
        faster = (c for c in costs[last + 1 :] if c * (1 + tolerance) < costs[last])
        reached = next(faster, None)
        if reached is None:
            break
        same = reached * (1 + tolerance)
        last = next(i for i in range(last + 1, len(costs)) if costs[i] <= same)
        kept.append(descending[last])
    return tuple(reversed(kept))


def thin(widths: Sequence[int], most: int = 16) -> tuple[int, ...]:
    """At most ``most`` of these ascending widths, evenly spread over their order; the smallest and the full width stay."""
    if most < 2:
        raise ValueError(f"a thinned grid keeps at least 2 widths, but most is {most}")
    if len(widths) <= most:
        return tuple(widths)
    span = len(widths) - 1
    return tuple(widths[round(i * span / (most - 1))] for i in range(most))
