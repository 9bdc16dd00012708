"""The correction of a latency model: how the sum of kernels timed alone becomes the time of a whole net, fitted to nets timed whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np

from edgeprune.plan.latency import call_overhead, weight_traffic
from edgeprune.plan.latency.model import LatencyModel, bent, straightened
from edgeprune.plan.latency.nnls import nonnegative_least_squares

NOISE_RATIO = 0.02  # one whole-net timing, relative: sets how soon data outweigh the priors
CLASS_ERROR_RATIO = 0.015  # above this mean error one scale for all kernels is not enough; nets repeat to about as much
LEAST_SCALE = 0.05
FEW = 6  # nets, below which there is no telling which of them is off
OUTLIER = 2.5  # robust standard deviations from which on a timing counts less, in proportion (Huber's weights)
REWEIGHTINGS = 4
# Times the slowest net: tried where a straight line does not do.
BENDS = (0.1, 0.25)
MOST_ERROR_RATIO = 0.15  # what one net counts at most when fits are compared
PRIOR_SPREAD = 0.5  # standard deviation of a scale, relative to what it is expected to be
# Standard deviations of what a unit of these costs: a byte, in ns, and a call, in times of the quickest kernel. Both are expected to cost
# nothing.
UNIT_SPREAD = {weight_traffic.OP: 0.5, call_overhead.OP: 0.5}


class TimedNet(NamedTuple):
    """A structure that was timed whole. ``weight`` counts it as that many timings."""

    widths: Mapping[str, int]
    ms: float
    weight: float = 1.0


def evaluate(
    model: LatencyModel,
    held_out: Sequence[
        tuple[Mapping[str, int], float] | tuple[Mapping[str, int], float, float] | TimedNet
    ],
) -> tuple[float, float]:
    """Mean and worst relative error on nets that were timed whole; give it nets that the model was not fitted on."""
    if not held_out:
        raise ValueError("an error needs at least one held-out net")
    errors = [abs(model.predict(net[0]) / net[1] - 1) for net in held_out]
    return sum(errors) / len(errors), max(errors)


class _Rows(NamedTuple):
    """Timed nets as arrays: uncorrected sums by class ``[nets, classes]``, milliseconds and weights ``[nets]``; and the bend to assume."""

    sums: np.ndarray
    ms: np.ndarray
    weight: np.ndarray
    bend_per_ms: float = 0.0

    def at(self, places: np.ndarray) -> _Rows:
        """Some of the nets, by a mask."""
        return _Rows(self.sums[places], self.ms[places], self.weight[places], self.bend_per_ms)


class _Correction(NamedTuple):
    """``L = scale * sums @ relative + offset_ms``."""

    scale: float
    relative: np.ndarray
    offset_ms: float

    def missed(self, rows: _Rows) -> np.ndarray:
        """Relative errors, without sign."""
        linear = self.scale * (rows.sums @ self.relative) + self.offset_ms
        found: np.ndarray = np.abs(bent(linear, rows.bend_per_ms) / rows.ms - 1)
        return found


_Fit: TypeAlias = Callable[[_Rows, "_Classes"], _Correction]


class _Classes(NamedTuple):
    """The columns of ``sums``: which of them are times, and the prior spread of those that are not (0 of times)."""

    ops: tuple[str, ...]
    is_time: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, ops: Sequence[str]) -> _Classes:
        """By their names."""
        spread = np.array([UNIT_SPREAD.get(op, 0.0) for op in ops])
        return cls(tuple(ops), spread == 0, spread)

    def only(self, *names: str) -> np.ndarray:
        """The places of these, where they are there."""
        return np.array([i for i, op in enumerate(self.ops) if op in names], dtype=int)


def correct(
    model: LatencyModel, nets: Sequence[tuple[Mapping[str, int], float, float] | TimedNet]
) -> LatencyModel:
    """The model refitted to whole nets: ``T = a S + c``, errors relative, with a weak prior at ``a = 1``, ``c = 0``.

    Where blocks can be removed, ``c`` grows with the kernels that are gone: their calls save nothing
    (:mod:`edgeprune.plan.latency.call_overhead`). Whatever correction the model had is replaced. If nets left out of the fit are still
    missed by more than 1.5 % on average, richer forms are tried, and the one that misses least is kept: a cost of each byte of weights
    besides (:mod:`edgeprune.plan.latency.weight_traffic`), with it a scale of its own for every kernel class, with a prior at the common
    one, and each of these and the plain one with a bend. Times stay above zero.

    A net that something else on the board slowed down does not bend the fit: one that the fit misses by far more than the median net counts
    less. Nets of weight over 1 were timed more than once and keep theirs.

    Args:
        model: from :func:`build_model`, or corrected before.
        nets: timed structures; about 8 random ones, the dense and the smallest. Without any, ``a = 1`` and ``c = 0``.
    """
    timed = [TimedNet(*net) for net in nets]
    if any(not net.ms > 0 or not net.weight > 0 for net in timed):
        raise ValueError("times and weights of timed nets must be above 0")
    raw = replace(model, scale=1.0, offset_ms=0.0, class_scales={}, bend_per_ms=0.0)
    ops = ["", *sorted({f.op for f in model.factors} - {""})]
    rows, classes = _rows(raw, timed, ops), _Classes.of(ops)
    fit, rows = _choose(rows, classes)
    found = _robust(fit, rows, classes)
    scales = dict(zip(ops, found.relative.tolist(), strict=True))
    return _above_zero(
        replace(
            raw,
            scale=found.scale,
            offset_ms=found.offset_ms,
            class_scales={op: scale for op, scale in scales.items() if scale != 1.0},
            bend_per_ms=rows.bend_per_ms,
        )
    )


def _rows(raw: LatencyModel, nets: Sequence[TimedNet], ops: Sequence[str]) -> _Rows:
    parts = [raw.by_class(net.widths) for net in nets]
    return _Rows(
        np.array([[part.get(op, 0.0) for op in ops] for part in parts]).reshape(-1, len(ops)),
        np.array([net.ms for net in nets]),
        np.array([net.weight for net in nets]),
    )


def _choose(rows: _Rows, classes: _Classes) -> tuple[_Fit, _Rows]:
    """The simplest form of correction that does, or else the one that misses nets least that it was not shown; its bend is in the rows."""
    if len(rows.ms) < FEW:
        return _fit_common, rows
    best: tuple[_Fit, _Rows] = _fit_common, rows
    error = _left_out_error(rows, classes, _fit_common)
    if error <= CLASS_ERROR_RATIO:
        return best
    has_traffic = len(classes.only(weight_traffic.OP)) > 0
    forms: tuple[_Fit, ...] = (
        _fit_common, *([_fit_traffic] if has_traffic else []), _fit_classes,
    )  # fmt: skip
    bent_rows = [rows._replace(bend_per_ms=b / float(rows.ms.max())) for b in (0.0, *BENDS)]
    for form, tried in itertools.product(forms, bent_rows):
        found = _left_out_error(tried, classes, form)
        if found < error:
            best, error = (form, tried), found
    return best


def _robust(fit: _Fit, rows: _Rows, classes: _Classes) -> _Correction:
    """A fit in which nets that it misses by far count less: iteratively reweighted least squares with Huber's weights."""
    found = fit(rows, classes)
    if len(rows.ms) < FEW:
        return found
    for _ in range(REWEIGHTINGS):
        missed = np.maximum(found.missed(rows), 1e-9)
        # 1.4826 makes the median of absolute values the standard deviation of normal errors.
        limit = OUTLIER * max(1.4826 * float(np.median(missed)), NOISE_RATIO)
        less = rows.weight * np.minimum(1.0, limit / missed)
        found = fit(rows._replace(weight=np.where(rows.weight > 1, rows.weight, less)), classes)
    return found


def _left_out_error(rows: _Rows, classes: _Classes, fit: _Fit) -> float:
    """Mean relative error at each net, predicted from all the others; no disturbed net decides it alone."""
    places = np.arange(len(rows.ms))
    errors = [
        float(_robust(fit, rows.at(places != i), classes).missed(rows.at(places == i))[0])
        for i in places
    ]
    return sum(min(error, MOST_ERROR_RATIO) for error in errors) / len(errors)


def _fit_common(rows: _Rows, classes: _Classes) -> _Correction:
    return _fit_with(rows, classes, classes.only(call_overhead.OP))


def _fit_traffic(rows: _Rows, classes: _Classes) -> _Correction:
    return _fit_with(rows, classes, classes.only(call_overhead.OP, weight_traffic.OP))


def _fit_with(rows: _Rows, classes: _Classes, extra: np.ndarray) -> _Correction:
    """One scale for all times, and one for each of the ``extra`` classes, which are none."""
    sums = np.hstack([(rows.sums @ classes.is_time)[:, None], rows.sums[:, extra]])
    prior = np.array([1.0, *np.zeros(len(extra))])
    spread = np.array([PRIOR_SPREAD, *classes.spread[extra]])
    scales, offset_ms = _map_fit(sums, rows, prior=prior, spread=spread)
    relative = classes.is_time.astype(float)
    relative[extra] = scales[1:] / scales[0]
    return _Correction(float(scales[0]), relative, offset_ms)


def _fit_classes(rows: _Rows, classes: _Classes) -> _Correction:
    common = _fit_traffic(rows, classes).scale
    prior = np.where(classes.is_time, common, 0.0)
    spread = np.where(classes.is_time, PRIOR_SPREAD * common, classes.spread)
    scales, offset_ms = _map_fit(rows.sums, rows, prior=prior, spread=spread)
    return _Correction(common, scales / common, offset_ms)


def _map_fit(
    sums: np.ndarray, rows: _Rows, *, prior: np.ndarray, spread: np.ndarray
) -> tuple[np.ndarray, float]:
    """Scales of the columns of ``sums [nets, columns]`` and an offset, by maximum a posteriori with normal priors.

    The offset may have either sign, so it enters as the difference of two non-negative unknowns; its prior is 0 +- 30 % of the mean time.
    """
    ms = straightened(rows.ms, rows.bend_per_ms)
    trust = np.sqrt(rows.weight) / (ms * NOISE_RATIO)
    typical = float(ms.mean()) if len(ms) else 1.0
    ones = np.ones((len(ms), 1))
    data = np.hstack([sums, ones, -ones]) * trust[:, None]
    scale_rows = np.hstack([np.diag(1 / spread), np.zeros((len(prior), 2))])
    offset_row = np.hstack([np.zeros(len(prior)), [1.0, -1.0]]) / (0.3 * typical)
    system = np.vstack([data, scale_rows, offset_row])
    wanted = np.hstack([ms * trust, prior / spread, 0.0])
    solution = nonnegative_least_squares(system, wanted)
    scales = np.maximum(solution[:-2], LEAST_SCALE * prior)
    return scales, float(solution[-2] - solution[-1])


def _above_zero(model: LatencyModel) -> LatencyModel:
    """The model with its offset raised, where needed, so that no structure takes less than a tenth of its kernels."""
    constant, factors = replace(model, offset_ms=0.0).merged()
    least = constant + sum(float(f.cost_ms.min()) for f in factors)
    return replace(model, offset_ms=max(model.offset_ms, -0.9 * least))
