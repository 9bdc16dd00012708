"""Width grids: which widths are measured, and which of them pay."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.plan.latency.grid import admissible, candidate_widths, thin


def padded(width: int, tile: int) -> int:
    return -(-width // tile) * tile


@given(st.integers(1, 2048), st.sampled_from([1, 4, 8, 16]), st.integers(2, 40))
def test_candidates_ascend_to_the_full_width_in_equal_steps(n: int, step: int, most: int) -> None:
    widths = candidate_widths(n, step=step, most=most)
    assert list(widths) == sorted(set(widths))
    assert widths[-1] == n
    assert len(widths) <= most
    assert all(width % step == 0 and width >= n / 8 for width in widths[:-1])
    assert len({b - a for a, b in itertools.pairwise(widths[:-1])}) <= 1


def test_coarse_candidates_still_meet_the_edges_of_tiles() -> None:
    assert candidate_widths(64)[:3] == (8, 12, 16)
    assert all(width % 32 == 0 for width in candidate_widths(960, most=32))


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        candidate_widths(0)
    with pytest.raises(ValueError, match="at least 2"):
        thin((4, 8), 1)


def test_only_the_far_edge_of_each_tile_is_admissible() -> None:
    widths = range(4, 65, 4)
    cost = {w: 1000.0 + 90 * padded(w, 16) for w in widths}
    assert admissible(widths, cost) == (16, 32, 48, 64)


@pytest.mark.parametrize("seed", range(20))
def test_timing_noise_neither_splits_nor_removes_a_tile(seed: int) -> None:
    draw = random.Random(seed)
    widths = range(4, 65, 4)
    cost = {w: (1000 + 90 * padded(w, 16)) * (1 + 0.009 * draw.random()) for w in widths}
    kept = admissible(widths, cost)
    # Within the tolerance any width of a tile may stand for it, but each tile once.
    assert [padded(w, 16) for w in kept] == [16, 32, 48, 64]


def test_cliffs_off_the_vector_width_are_never_chosen() -> None:
    # fp32 depthwise as measured on an AVX-512 host: 60, 62 and 64 channels take 14.9, 52.3 and 14.6 us.
    cost = {56: 13.6, 58: 52.0, 60: 14.9, 62: 52.3, 64: 14.6}
    assert admissible(cost, cost) == (56, 64)


def test_a_spoilt_timing_costs_only_its_own_width() -> None:
    widths = range(8, 65, 8)
    cost = {w: 10.0 * w for w in widths}
    cost[32] *= 3
    assert admissible(widths, cost) == (8, 16, 24, 40, 48, 56, 64)


def test_a_smooth_device_with_small_steps_keeps_a_coarser_grid() -> None:
    widths = range(4, 129, 4)
    cost = {w: 5000.0 + 8 * w for w in widths}  # 0.5 % a step, 16 % in all
    kept = admissible(widths, cost)
    assert kept[-1] == 128
    assert len(kept) > 8
    assert cost[kept[0]] <= 1.01 * cost[4]


def test_a_group_that_costs_no_time_keeps_its_full_width_only() -> None:
    assert admissible((8, 16, 24), dict.fromkeys((8, 16, 24), 5.0)) == (24,)


@given(
    st.dictionaries(st.integers(1, 64), st.floats(1, 100), min_size=1),
    st.sampled_from([0.0, 0.01, 0.1]),
)
def test_admissible_widths_get_strictly_faster(cost: dict[int, float], tolerance: float) -> None:
    kept = admissible(cost, cost, tolerance=tolerance)
    assert kept[-1] == max(cost)
    assert all(cost[a] < cost[b] for a, b in itertools.pairwise(kept))
    # What is left out is no faster than what stays, but for the tolerance, which may count twice.
    for width in set(cost) - set(kept):
        stays = min(cost[w] for w in kept if w >= width or w == kept[0])
        assert stays <= cost[width] * (1 + tolerance) ** 2


def test_thinning_keeps_both_ends_and_an_even_spread() -> None:
    assert thin(tuple(range(4, 129, 4)), 5) == (4, 36, 68, 96, 128)
    assert thin((4, 8), 5) == (4, 8)
