"""The latency of a whole net as a sum of tables over few groups each, corrected by nets that were timed whole.

Notation: a *structure* is one width per channel group, each from that group's grid. ``S`` is the sum of the kernels timed alone; with
``L = a S + c``, the predicted time is ``T = L + b L^2``. The scale ``a``, the offset ``c`` and the bend ``b``, which is 0 or more, are
fitted to whole nets. The bend is what a large net loses because its parts push each other out of the caches. It keeps the order of
structures, so a solver works on ``L``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from edgeprune.errors import SpecError
from edgeprune.plan.latency import call_overhead as calls
from edgeprune.plan.latency import weight_traffic as traffic
from edgeprune.plan.latency.grid import admissible, thin
from edgeprune.plan.latency.nnls import nonnegative_least_squares
from edgeprune.plan.latency.table import KernelShape, KernelTable, LatencyTable

NOISE_RATIO = 0.02  # one whole-net timing, relative: sets how soon data outweigh the priors
CLASS_ERROR_RATIO = 0.015  # above this mean error one scale for all kernels is not enough; nets repeat to about as much
LEAST_SCALE = 0.05
FEW = 6  # nets, below which there is no telling which of them is off
OUTLIER = 2.5  # robust standard deviations from which on a timing counts less, in proportion (Huber's weights)
REWEIGHTINGS = 4
BENDS = (
    0.1,
    0.25,
)  # times the slowest net: tried where a straight line does not do
MOST_ERROR_RATIO = 0.15  # what one net counts at most when fits are compared
PRIOR_SPREAD = 0.5  # standard deviation of a scale, relative to what it is expected to be
# Standard deviations of what a unit of these costs: a byte, in ns, and a call, in times of the quickest kernel. Both are expected to cost
# nothing.
UNIT_SPREAD = {traffic.OP: 0.5, calls.OP: 0.5}


class TimedNet(NamedTuple):
    """A structure that was timed whole. ``weight`` counts it as that many timings."""

    widths: Mapping[str, int]
    ms: float
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Factor:
    """A time that depends on some groups: ``cost_ms`` has one axis per variable, over that group's grid. ``op`` is its kernel class."""

    variables: tuple[str, ...]
    cost_ms: np.ndarray
    op: str = ""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicted latency of any structure on the grids.

    ``L = scale * sum of class_scales[op] * factor + offset_ms``, where ``constant_ms`` is one more factor, of the class ``""``, and
    ``T = L + bend_per_ms * L^2``; a class without an entry has scale 1. The classes of :mod:`edgeprune.plan.latency.weight_traffic` and
    :mod:`edgeprune.plan.latency.call_overhead` hold no times, and have scale 0 until a correction gives them one.
    """

    grids: Mapping[str, tuple[int, ...]]
    factors: tuple[Factor, ...]
    constant_ms: float = 0.0
    scale: float = 1.0
    offset_ms: float = 0.0
    class_scales: Mapping[str, float] = field(default_factory=dict)
    bend_per_ms: float = 0.0

    def __post_init__(self) -> None:
        for factor in self.factors:
            if len(set(factor.variables)) != len(factor.variables):
                raise ValueError(f"a factor must name each group once, but got {factor.variables}")
            shape = tuple(len(self.grids[name]) for name in factor.variables)
            if factor.cost_ms.shape != shape:
                raise ValueError(
                    f"the factor of {factor.variables} must have shape {shape}, but has {factor.cost_ms.shape}"
                )

    def predict(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of a structure; groups that are not named keep their full width.

        Raises:
            SpecError: a width is not on its group's grid, or a group does not exist.
        """
        classes = self.by_class(widths)
        total = sum(self.class_scales.get(op, 1.0) * ms for op, ms in classes.items())
        return float(bent(self.scale * total + self.offset_ms, self.bend_per_ms))

    def bent(self, linear_ms: float) -> float:
        """The prediction of a structure whose factors of :meth:`merged` add up to this."""
        return float(bent(linear_ms, self.bend_per_ms))

    def straightened(self, ms: float) -> float:
        """What the factors of :meth:`merged` add up to where the prediction is this: the inverse of :meth:`bent`."""
        return float(straightened(ms, self.bend_per_ms))

    def by_class(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Uncorrected milliseconds of a structure by kernel class; the constant counts under ``""``."""
        place = {name: self._place(name, width) for name, width in widths.items()}
        found = {"": self.constant_ms}
        for factor in self.factors:
            at = tuple(place.get(name, -1) for name in factor.variables)
            found[factor.op] = found.get(factor.op, 0.0) + float(factor.cost_ms[at])
        return found

    def merged(self) -> tuple[float, tuple[Factor, ...]]:
        """``L`` with nothing left to scale: a constant in ms, and one factor per set of groups (variables sorted); see :meth:`bent`."""
        fixed = self.class_scales.get("", 1.0) * self.constant_ms
        constant = self.scale * fixed + self.offset_ms
        merged: dict[tuple[str, ...], np.ndarray] = {}
        for factor in self.factors:
            order = sorted(range(len(factor.variables)), key=lambda i: factor.variables[i])
            names = tuple(factor.variables[i] for i in order)
            weight = self.scale * self.class_scales.get(factor.op, 1.0)
            cost = weight * np.transpose(factor.cost_ms, order)
            merged[names] = merged[names] + cost if names in merged else cost
        constant += float(merged.pop((), np.zeros(())))
        return constant, tuple(Factor(names, cost) for names, cost in merged.items())

    def between(self, least: Mapping[str, int], most: Mapping[str, int]) -> LatencyModel:
        """The same prediction on narrower grids: widths from ``least`` to ``most`` (both in it), where a group is named there."""
        places = {
            name: [
                i for i, w in enumerate(grid) if least.get(name, 0) <= w <= most.get(name, grid[-1])
            ]
            for name, grid in self.grids.items()
        }
        return replace(
            self,
            grids={n: tuple(g[i] for i in places[n]) for n, g in self.grids.items()},
            factors=tuple(
                replace(f, cost_ms=np.asarray(f.cost_ms[np.ix_(*(places[v] for v in f.variables))]))
                for f in self.factors
            ),
        )

    def _place(self, name: str, width: int) -> int:
        try:
            return self.grids[name].index(width)
        except (KeyError, ValueError):
            grid = self.grids.get(name, "no such group")
            raise SpecError(f"width {width} of {name!r} is not on the grid: {grid}") from None


def bent(ms: Any, bend_per_ms: float) -> Any:
    """``T`` of ``L``, for numbers and arrays; see the module."""
    return ms + bend_per_ms * ms * ms


def straightened(ms: Any, bend_per_ms: float) -> Any:
    """``L`` of ``T``: the inverse of :func:`bent` for times from 0 on."""
    return 2 * ms / (1 + np.sqrt(1 + 4 * bend_per_ms * np.maximum(ms, 0.0)))


def build_model(
    table: LatencyTable,
    kernels: Iterable[KernelShape],
    grids: Mapping[str, tuple[int, ...]],
) -> LatencyModel:
    """The uncorrected model of a net: every kernel's table, tied to the groups in its slots.

    Raises:
        UnknownName: a kernel was never measured.
        SpecError: a group's grid has a width that was not measured for one of its kernels.
    """
    sums: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
    for kernel in kernels:
        for factor in kernel_factors(table.kernel(kernel.signature), kernel.variables, grids):
            key = (kernel.op, factor.variables)
            sums[key] = sums[key] + factor.cost_ms if key in sums else factor.cost_ms
    factors = tuple(Factor(names, cost, op) for (op, names), cost in sums.items())
    return LatencyModel(dict(grids), factors)


def kernel_factors(
    table: KernelTable, variables: Sequence[str], grids: Mapping[str, tuple[int, ...]]
) -> list[Factor]:
    """One kernel's time, tied to the groups in its slots; a group may fill two slots, and a kernel may have none.

    Raises:
        SpecError: a group's grid has a width that is not in the table.
    """
    factors = []
    for slots, ns in table.arrays([grids[name] for name in variables]):
        names, cost = _each_once(tuple(variables[slot] for slot in slots), ns)
        factors.append(Factor(names, cost / 1e6, table.op))
    return factors


def _each_once(variables: tuple[str, ...], cost: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted variables; where a group fills two slots (a convolution inside a residual stage) both take the same width."""
    names = tuple(sorted(set(variables)))
    letter = {name: i for i, name in enumerate(names)}
    axes = [letter[name] for name in variables]
    joined: np.ndarray = np.einsum(cost, axes, list(range(len(names))))
    return names, joined


def dense_net(grids: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Every group at full width."""
    return {name: grid[-1] for name, grid in grids.items()}


def smallest_net(grids: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Every group at its smallest width."""
    return {name: grid[0] for name, grid in grids.items()}


def sample_nets(
    grids: Mapping[str, tuple[int, ...]],
    count: int,
    seed: int,
    together: Sequence[Sequence[str]] = (),
) -> list[dict[str, int]]:
    """Random structures whose overall size spans the whole range; any first few of them span it too.

    The overall size follows the golden-ratio sequence, which fills an interval evenly at every length; around it every group draws its
    own width, so that kernel classes do not all grow together.

    Args:
        grids: of every group.
        count: number of structures.
        seed: of the widths.
        together: groups that have width 0 together or not at all; the first of each set decides.
    """
    draw = random.Random(seed)
    golden = (5**0.5 - 1) / 2
    nets = []
    for number in range(count):
        size = (0.5 + number * golden) % 1
        net = {}
        for name, grid in grids.items():
            share = min(1.0, max(0.0, size + draw.uniform(-0.3, 0.3)))
            net[name] = grid[round(share * (len(grid) - 1))]
        for first, *others in together:
            for name in others:
                net[name] = (net[name] or grids[name][1]) if net[first] else 0
        nets.append(net)
    return nets


def admissible_grids(
    model: LatencyModel, *, tolerance: float = 0.01, most: int = 16
) -> dict[str, tuple[int, ...]]:
    """For every group the widths worth choosing: undominated in the time of all it touches (others full), thinned to ``most``."""
    costs = {name: np.zeros(len(grid)) for name, grid in model.grids.items()}
    for factor in model.merged()[1]:
        for axis, name in enumerate(factor.variables):
            full = tuple(slice(None) if i == axis else -1 for i in range(len(factor.variables)))
            costs[name] = costs[name] + factor.cost_ms[full]
    found = {}
    for name, grid in model.grids.items():
        by_width = dict(zip(grid, costs[name].tolist(), strict=True))
        found[name] = thin(admissible(grid, by_width, tolerance=tolerance), most)
    return found


def restrict(model: LatencyModel, grids: Mapping[str, tuple[int, ...]]) -> LatencyModel:
    """The same model on part of its grids (every width must be on the old one)."""
    places = {n: [model.grids[n].index(width) for width in grid] for n, grid in grids.items()}
    factors = tuple(
        replace(f, cost_ms=f.cost_ms[np.ix_(*(places[n] for n in f.variables))])
        if f.variables
        else f
        for f in model.factors
    )
    return replace(model, grids=dict(grids), factors=factors)


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
    has_traffic = len(classes.only(traffic.OP)) > 0
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
    return _fit_with(rows, classes, classes.only(calls.OP))


def _fit_traffic(rows: _Rows, classes: _Classes) -> _Correction:
    return _fit_with(rows, classes, classes.only(calls.OP, traffic.OP))


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
