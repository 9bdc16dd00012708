"""Fitting a kernel's table from few probes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_points import probe_points

from edgeprune.plan.latency.fill import fit_kernel, fit_terms, leave_out_error
from edgeprune.plan.latency.grid import candidate_widths
from edgeprune.plan.latency.nnls import nonnegative_least_squares


def padded(width: int, tile: int) -> int:
    return -(-width // tile) * tile


def conv_ns(
    in_tile: int, out_tile: int, c: tuple[float, float, float, float]
) -> Callable[[int, int], float]:
    """The padded bilinear cost, written out."""

    def cost(n_in: int, n_out: int) -> float:
        i, o = padded(n_in, in_tile), padded(n_out, out_tile)
        return c[0] + c[1] * i + c[2] * o + c[3] * i * o

    return cost


def everywhere(cost: Callable[..., float], grids: Sequence[Sequence[int]]) -> np.ndarray:
    times = [cost(*point) for point in itertools.product(*grids)]
    return np.array(times).reshape([len(grid) for grid in grids])


GRIDS = (candidate_widths(64), candidate_widths(128))


@pytest.mark.parametrize("tiles", [(4, 16), (16, 16), (8, 4), (1, 1)])
@pytest.mark.parametrize(
    "c", [(2000.0, 30.0, 20.0, 3.0), (0.0, 0.0, 0.0, 3.0), (900.0, 5.0, 0.0, 0.0)]
)
def test_tile_padded_bilinear_costs_are_recovered_from_few_points(
    tiles: tuple[int, int], c: tuple[float, float, float, float]
) -> None:
    cost = conv_ns(*tiles, c)
    points = probe_points(GRIDS, seed=0)
    assert len(points) < 0.12 * len(GRIDS[0]) * len(GRIDS[1])
    table = fit_kernel({p: cost(*p) for p in points}, GRIDS)
    np.testing.assert_allclose(table, everywhere(cost, GRIDS), rtol=0.01)


def test_one_percent_noise_on_the_probes_stays_a_few_percent_in_the_table() -> None:
    cost = conv_ns(4, 16, (2000, 30, 20, 3))
    draw = random.Random(0)
    points = {p: cost(*p) * (1 + 0.01 * draw.random()) for p in probe_points(GRIDS, seed=0)}
    errors = np.abs(fit_kernel(points, GRIDS) / everywhere(cost, GRIDS) - 1)
    assert errors.mean() < 0.015
    assert errors.max() < 0.05


def test_measured_points_are_reproduced_exactly() -> None:
    draw = random.Random(1)
    points = {p: draw.uniform(10, 1000) for p in probe_points(GRIDS, seed=3)}
    table = fit_kernel(points, GRIDS)
    assert (table > 0).all()
    for (n_in, n_out), time in points.items():
        assert table[GRIDS[0].index(n_in), GRIDS[1].index(n_out)] == time


def test_a_kernel_that_is_not_bilinear_is_shown_by_its_leave_out_error() -> None:
    bilinear = conv_ns(4, 8, (2000, 30, 20, 3))

    def bounded_by_memory(n_in: int, n_out: int) -> float:
        return 2000 + max(100.0 * (n_in + n_out), bilinear(n_in, n_out))

    points = probe_points(GRIDS, seed=0)
    assert leave_out_error({p: bilinear(*p) for p in points}, GRIDS)[1] < 1e-6
    mean, worst = leave_out_error({p: bounded_by_memory(*p) for p in points}, GRIDS)
    assert 0.005 < mean <= worst


def test_measured_points_pull_their_surroundings_along_instead_of_standing_alone() -> None:
    plain = conv_ns(4, 16, (2000, 30, 20, 3))

    def slower_inside(n_in: int, n_out: int) -> float:
        return plain(n_in, n_out) * (1.25 if n_in < 40 and n_out < 80 else 1.0)

    points = {p: slower_inside(*p) for p in probe_points(GRIDS, interior=40, seed=0)}
    table = fit_kernel(points, GRIDS)
    truth = everywhere(slower_inside, GRIDS)
    inside = [p for p in points if 8 < p[0] < 36 and 16 < p[1] < 76]
    assert inside
    for n_in, n_out in inside:
        i, j = GRIDS[0].index(n_in), GRIDS[1].index(n_out)
        near = table[i - 1 : i + 2, j - 1 : j + 2] / truth[i - 1 : i + 2, j - 1 : j + 2]
        assert np.abs(near - 1).max() < 0.06


def test_small_products_are_measured_and_kept_in_full() -> None:
    grids = ((8, 16, 24), (4, 8))
    points = probe_points(grids, seed=0)
    assert points == list(itertools.product(*grids))
    draw = random.Random(0)
    times = {p: draw.uniform(1, 2) for p in points}
    assert fit_kernel(times, grids).tolist() == everywhere(lambda *p: times[p], grids).tolist()
    assert leave_out_error(times, grids) == (0.0, 0.0)


def test_a_kernel_without_variables_is_one_point() -> None:
    assert probe_points((), seed=0) == [()]
    assert fit_kernel({(): 7.0}, ()).item() == 7.0


def test_points_cover_curves_corners_and_some_of_the_inside() -> None:
    grids = (candidate_widths(64),) * 3
    points = probe_points(grids, interior=4, seed=0)
    assert len(set(points)) == len(points)
    assert {(w, 64, 64) for w in grids[0]} | {(64, w, 64) for w in grids[1]} <= set(points)
    assert {(8, 8, 64), (8, 64, 8), (64, 8, 8), (8, 8, 8)} <= set(points)
    assert sum(all(w < 64 for w in p) for p in points) >= 4
    assert points == probe_points(grids, interior=4, seed=0)
    assert points != probe_points(grids, interior=4, seed=1)


def test_three_slots_with_pairwise_costs_are_recovered() -> None:
    grids = (candidate_widths(32), candidate_widths(48), candidate_widths(64))

    def concat_then_conv(a: int, b: int, out: int) -> float:
        return 3000 + 10 * (a + b) + (2 * (a + b) + 20) * padded(out, 16)

    points = {p: concat_then_conv(*p) for p in probe_points(grids, seed=0)}
    np.testing.assert_allclose(
        fit_kernel(points, grids), everywhere(concat_then_conv, grids), rtol=0.01
    )


def test_a_concat_of_many_groups_stays_a_sum_of_small_tables() -> None:
    grids = (candidate_widths(64),) * 8

    def copied(*widths: int) -> float:
        return 100 + 3.0 * sum(widths)

    points = {p: copied(*p) for p in probe_points(grids, seed=0)}
    terms = fit_terms(points, grids)
    assert all(len(term.slots) <= 2 for term in terms)
    draw = random.Random(0)
    for _ in range(20):
        place = [draw.randrange(len(grid)) for grid in grids]
        predicted = sum(float(t.ns[tuple(place[s] for s in t.slots)]) for t in terms)
        widths = [grid[i] for grid, i in zip(grids, place, strict=True)]
        assert predicted == pytest.approx(copied(*widths), rel=1e-6)
    assert leave_out_error(points, grids)[1] < 1e-6
    with pytest.raises(ValueError, match="too large"):
        fit_kernel(points, grids)


def test_a_probe_that_failed_on_a_curve_is_interpolated() -> None:
    cost = conv_ns(1, 1, (2000, 30, 20, 3))
    points = {p: cost(*p) for p in probe_points(GRIDS, seed=0) if p != (32, 128)}
    np.testing.assert_allclose(fit_kernel(points, GRIDS), everywhere(cost, GRIDS), rtol=0.01)


def test_points_that_cannot_carry_a_fit_are_refused() -> None:
    good = dict.fromkeys(probe_points(GRIDS, seed=0), 1.0)
    with pytest.raises(ValueError, match="full point"):
        fit_kernel({p: t for p, t in good.items() if p != (64, 128)}, GRIDS)
    with pytest.raises(ValueError, match="not on the grids"):
        fit_kernel({**good, (63, 128): 1.0}, GRIDS)
    with pytest.raises(ValueError, match="above 0"):
        fit_kernel({**good, (64, 128): math.nan}, GRIDS)


@given(st.integers(0, 10_000))
def test_non_negative_least_squares_meets_its_optimality_conditions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, columns = int(draw.integers(1, 12)), int(draw.integers(1, 7))
    a = draw.normal(size=(rows, columns)) * 10.0 ** draw.integers(-3, 4, size=columns)
    b = draw.normal(size=rows)
    x = nonnegative_least_squares(a, b)
    gradient = a.T @ (b - a @ x) / np.linalg.norm(a, axis=0)
    assert (x >= 0).all()
    assert (gradient <= 1e-8).all()
    assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-8
