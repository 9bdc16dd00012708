"""Which widths of one kernel to time, and the times at all the others.

A kernel has *slots*: the positions of its variable widths (a convolution: in, out; a depthwise convolution: one). A *point* is one width
per slot. Every slot has an ascending grid whose last entry is its full width. Times are nanoseconds; the unit carries through.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.plan.latency.nnls import nonnegative_least_squares

DENSE_ENTRIES = 65_536  # a larger table is kept as a sum of tables over at most two slots

Point = tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """A part of a kernel's time that depends on some slots: ``ns`` has one axis per entry of ``slots``, over that slot's whole grid."""

    slots: tuple[int, ...]
    ns: np.ndarray


def fit_kernel(
    points: Mapping[Point, float],
    grids: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """The time at every point of the grid, as one dense table that reproduces the measured points.

    Measured in full: the table itself. Otherwise a bilinear form in each slot's own measured curve, fitted with non-negative least
    squares and relative weights, then multiplied by a smooth factor that meets every measured point, so that a single measurement
    never stands alone as a dent that a solver would run into.

    Args:
        points: measured times in ns, above 0; the full point must be among them.
        grids: one ascending grid per slot.
        sizes: what the time of each slot grows with, at every width of its grid: the width rounded up to the tile. Gaps between
            measured widths are filled in along it; without it, evenly along the grid.

    Returns:
        ns, one axis per slot, ``[len(grid) for grid in grids]``.

    Source: kernels pad channels to tiles, so a convolution costs ``c0 + c1 P(in) + c2 P(out) + c3 P(in) P(out)`` with a staircase P that
    differs by device. Each slot's measured curve is an affine image of its P, and spans the same form without knowing the tiles.
    """
    shape = tuple(len(grid) for grid in grids)
    if math.prod(shape) > 16 * DENSE_ENTRIES:
        raise ValueError(f"a dense table of shape {shape} is too large: use fit_terms")
    places = _places(points, grids)
    if len(places) == math.prod(shape):
        table = np.empty(shape)
        for place, time in places.items():
            table[place] = time
        return table
    cells = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1)
    return _predict(places, shape, cells, sizes).reshape(shape)


def fit_terms(
    points: Mapping[Point, float],
    grids: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[float]] = (),
) -> tuple[Term, ...]:
    """As :func:`fit_kernel`, but a table beyond ``DENSE_ENTRIES`` stays a sum over single slots and pairs (a concat of many groups)."""
    shape = tuple(len(grid) for grid in grids)
    if math.prod(shape) <= DENSE_ENTRIES:
        return (Term(tuple(range(len(shape))), fit_kernel(points, grids, sizes)),)
    return tuple(_bilinear(_places(points, grids), shape, sizes))


def predict_point(
    points: Mapping[Point, float],
    grids: Sequence[Sequence[int]],
    at: Point,
    sizes: Sequence[Sequence[float]] = (),
) -> float:
    """The time at one point of the grid, as :func:`fit_terms` gives it."""
    shape = tuple(len(grid) for grid in grids)
    places = _places(points, grids)
    cell = np.array([[list(g).index(w) for g, w in zip(grids, at, strict=True)]], dtype=int)
    if math.prod(shape) <= DENSE_ENTRIES:
        return float(_predict(places, shape, cell, sizes)[0])
    return float(_evaluate(_bilinear(places, shape, sizes), cell)[0])


def leave_out_error(
    points: Mapping[Point, float],
    grids: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[float]] = (),
) -> tuple[float, float]:
    """Mean and worst relative error at the measured points inside the grid, each predicted by a fit that has not seen it.

    The points that carry the fit are never left out: those on one slot's curve, and the corners. (0, 0) for a table measured in full.
    """
    inside = [p for p in points if _is_inside(p, grids)]
    if not inside or len(points) == math.prod(len(grid) for grid in grids):
        return 0.0, 0.0
    errors = []
    for left_out in inside:
        rest = {p: time for p, time in points.items() if p != left_out}
        errors.append(abs(predict_point(rest, grids, left_out, sizes) / points[left_out] - 1))
    return sum(errors) / len(errors), max(errors)


def _is_inside(point: Point, grids: Sequence[Sequence[int]]) -> bool:
    """Whether at least two slots are below full width, and not all of these at their smallest."""
    narrow = [(w, grid[0]) for w, grid in zip(point, grids, strict=True) if w != grid[-1]]
    return len(narrow) > 1 and any(width != smallest for width, smallest in narrow)


def _places(
    points: Mapping[Point, float], grids: Sequence[Sequence[int]]
) -> dict[tuple[int, ...], float]:
    """Measured times by position in the grid instead of by width."""
    position = [{width: i for i, width in enumerate(grid)} for grid in grids]
    places = {}
    for point, time in points.items():
        if len(point) != len(grids) or any(
            w not in p for w, p in zip(point, position, strict=True)
        ):
            raise ValueError(f"the point {point} is not on the grids {[tuple(g) for g in grids]}")
        if not time > 0:
            raise ValueError(f"a time must be above 0 ns, but got {time} at {point}")
        places[tuple(p[w] for w, p in zip(point, position, strict=True))] = float(time)
    if tuple(len(grid) - 1 for grid in grids) not in places:
        raise ValueError(f"the full point {tuple(g[-1] for g in grids)} was not measured")
    return places


def _curve(
    places: Mapping[tuple[int, ...], float], shape: tuple[int, ...], slot: int, size: np.ndarray
) -> np.ndarray:
    """Times over one slot's grid, the others full, shifted and scaled to [0, 1]; zeros where nothing changes.

    Gaps are filled in along ``size``, which never falls over the grid.

    The shift to zero matters: in this basis every coefficient of the tile-padded form is a difference of times that grow with width,
    so that "non-negative" holds for it; in the unshifted curves it does not.
    """
    full = tuple(n - 1 for n in shape)
    known = {
        p[slot]: time
        for p, time in places.items()
        if p[:slot] + p[slot + 1 :] == full[:slot] + full[slot + 1 :]
    }
    at = sorted(known)
    curve = np.interp(size, size[at], [known[i] for i in at])
    curve[at] = [known[i] for i in at]
    spread = float(np.ptp(curve))
    if spread <= 1e-9 * float(curve.max()):
        return np.zeros(shape[slot])
    scaled: np.ndarray = (curve - curve.min()) / spread
    return scaled


def _bilinear(
    places: Mapping[tuple[int, ...], float],
    shape: tuple[int, ...],
    sizes: Sequence[Sequence[float]] = (),
) -> list[Term]:
    """``c0 + sum c_i b_i + sum c_ij b_i b_j`` with b the slots' curves and all c >= 0; errors count relative to the time."""
    along = [np.asarray(s, dtype=float) for s in sizes] or [np.arange(float(n)) for n in shape]
    curves = [_curve(places, shape, slot, along[slot]) for slot in range(len(shape))]
    scopes: list[tuple[int, ...]] = [()]
    scopes += [(slot,) for slot in range(len(shape))]
    scopes += list(itertools.combinations(range(len(shape)), 2))
    at = np.array(list(places), dtype=int).reshape(len(places), len(shape))
    times = np.array(list(places.values()))
    columns = [
        np.prod([curves[s][at[:, s]] for s in scope], axis=0) * np.ones(len(at)) for scope in scopes
    ]
    rows = np.stack(columns, axis=1) / times[:, None]
    weights = nonnegative_least_squares(rows, np.ones(len(times)))
    terms = []
    for scope, weight in zip(scopes, weights, strict=True):
        ns = np.array(weight)
        for slot in scope:
            ns = ns[..., None] * curves[slot]
        if weight > 0:
            terms.append(Term(scope, ns))
    return terms


def _evaluate(terms: Sequence[Term], cells: np.ndarray) -> np.ndarray:
    """The sum of the terms at ``cells``, ``[cells, slots]`` positions in the grids."""
    total = np.zeros(len(cells))
    for term in terms:
        total += term.ns[tuple(cells[:, slot] for slot in term.slots)]
    return total


def _predict(
    places: Mapping[tuple[int, ...], float],
    shape: tuple[int, ...],
    cells: np.ndarray,
    sizes: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """The bilinear fit at ``cells``, times a factor that is exact at the measured points and blends by inverse distance between them.

    Source: D. Shepard, A two-dimensional interpolation function for irregularly-spaced data, 1968; here on log ratios.
    """
    terms = _bilinear(places, shape, sizes)
    known = np.array(list(places), dtype=int)
    times = np.array(list(places.values()))
    least = 0.05 * float(times.min())  # a fit may reach 0 where nothing was measured
    logs = np.log(times / np.maximum(_evaluate(terms, known), least))
    extent = np.maximum(np.array(shape) - 1, 1)
    predicted: np.ndarray = np.maximum(_evaluate(terms, cells), least)
    for start in range(0, len(cells), 4096):  # bounds the distance matrix
        some = slice(start, start + 4096)
        offsets = (cells[some, None, :] - known[None]) / extent
        weights = 1 / np.maximum((offsets**2).sum(axis=2), 1e-12) ** 2
        predicted[some] *= np.exp((weights @ logs) / weights.sum(axis=1))
    exact = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    for place, time in places.items():
        if place in exact:
            predicted[exact[place]] = time
    return predicted
