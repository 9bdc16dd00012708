"""Bytes of weights that a whole net reads, as a part of the latency model.

A kernel that is timed alone finds its weights in the cache; in a whole net that is larger than the cache it has to fetch them. What that
costs grows with the bytes, so the sum over kernels fits the same factors as their times. Seen with ONNX Runtime in FP32 on x86-64 by
``benchmarks/predictor.py``, whose results file has the error that is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

OP = "weight bytes"  # the class of these factors; a scale of 1 stands for 1 ns a byte, or 1 ms a megabyte
MOST_NODES = 64
LEAST_BYTES = 1024  # that must depend on the widths: a kernel without weights is left out


def weight_bytes(
    size: Callable[[Mapping[str, int]], int],
    grids: Mapping[str, Sequence[int]],
    square: Sequence[str] = (),
) -> np.ndarray | None:
    """Bytes of one kernel's file at every point of its grids, one axis per variable; ``None`` where it has no weights to speak of.

    Args:
        size: bytes of the file at given widths.
        grids: ascending widths of every variable, all above 0.
        square: variables that are both input and output of their weights, so that the bytes grow with the square of the width.

    Returns:
        ``float64``, exact up to padding: bytes are a polynomial of degree 1 in each variable (2 in ``square`` ones), which few points fix.
        Also ``None`` where more than 64 points would be needed.
    """
    nodes = {v: _nodes(grid, 3 if v in square else 2) for v, grid in grids.items()}
    shape = [len(n) for n in nodes.values()]
    if not shape or np.prod(shape) > MOST_NODES:
        return None
    table = np.array(
        [
            size(dict(zip(nodes, point, strict=True)))
            for point in itertools.product(*nodes.values())
        ],
        dtype=float,
    ).reshape(shape)
    if table.max() - table.min() < LEAST_BYTES:
        return None
    for axis, (variable, grid) in enumerate(grids.items()):
        basis = _lagrange(nodes[variable], grid)
        table = np.moveaxis(np.tensordot(basis, table, axes=(1, axis)), 0, axis)
    found: np.ndarray = np.maximum(table, 0.0)
    return found


def _nodes(grid: Sequence[int], count: int) -> tuple[int, ...]:
    places = np.linspace(0, len(grid) - 1, min(count, len(grid))).round().astype(int)
    return tuple(grid[i] for i in dict.fromkeys(places.tolist()))


def _lagrange(nodes: Sequence[int], at: Sequence[int]) -> np.ndarray:
    """``[len(at), len(nodes)]``: what each node's value counts at each place."""
    basis = np.ones((len(at), len(nodes)))
    for j, node in enumerate(nodes):
        for other in nodes:
            if other != node:
                basis[:, j] *= (np.array(at) - other) / (node - other)
    return basis
