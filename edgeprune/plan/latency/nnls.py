"""Non-negative least squares for a handful of unknowns: times are sums of costs, and no cost is negative."""

from __future__ import annotations

import numpy as np


def nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The ``x >= 0`` that minimises ``|a x - b|``.

    The active-set method: unknowns enter one by one where the gradient asks for it, and leave when the unconstrained solution over
    the entered ones turns negative.

    Args:
        a: ``[equations, unknowns]``.
        b: ``[equations]``.

    Returns:
        ``[unknowns]``, every entry at least 0.

    Source: C. L. Lawson and R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23 (algorithm NNLS).
    """
    lengths = np.linalg.norm(a, axis=0)
    lengths = np.where(lengths > 0, lengths, 1.0)
    scaled = a / lengths  # so that one threshold serves every unknown
    x = np.zeros(a.shape[1])
    inside = np.zeros(a.shape[1], dtype=bool)
    threshold = 1e-12 * max(1.0, float(np.linalg.norm(b)))
    for _ in range(3 * a.shape[1] + 10):
        gradient = np.where(inside, -np.inf, scaled.T @ (b - scaled @ x))
        entering = int(np.argmax(gradient))
        if gradient[entering] <= threshold:
            break
        inside[entering] = True
        x, inside = _step_inside(scaled, b, x, inside)
    result: np.ndarray = x / lengths
    return result


def _step_inside(
    a: np.ndarray, b: np.ndarray, x: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move from ``x`` to the least-squares solution over ``inside``, dropping unknowns that would pass zero on the way."""
    inside = inside.copy()
    while inside.any():
        goal = np.zeros_like(x)
        goal[inside] = np.linalg.lstsq(a[:, inside], b, rcond=None)[0]
        negative = inside & (goal <= 0)
        if not negative.any():
            return goal, inside
        travel = np.full_like(x, np.inf)
        travel[negative] = x[negative] / np.maximum(x[negative] - goal[negative], 1e-300)
        share = float(travel.min())
        x = x + share * (goal - x)
        inside &= ~(negative & (travel <= share))
        x = np.where(inside, x, 0.0)
    return np.zeros_like(x), inside
