"""Tiles are read off few timings, and nothing is claimed where they show none."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.plan.latency.tiles import STEPS, Tile, common_step, padded, read_tile, window


def timed(widths, step: int, *, start=3000.0, slope=50.0, noise=0.0, seed=0, power=1):
    draw = random.Random(seed)
    return {
        w: (start + slope * padded(w, step) ** power) * (1 + noise * abs(draw.gauss(0, 1)))
        for w in widths
    }


@given(
    step=st.sampled_from(STEPS),
    full=st.sampled_from([64, 96, 128, 320]),
    start=st.floats(0, 3000),
    seed=st.integers(0, 1000),
    power=st.sampled_from([1, 2]),
)
def test_the_tile_of_a_staircase_is_found_under_noise(step, full, start, seed, power):
    first, rest = window(full)
    times = timed(
        (*first, *rest), step, start=start, slope=50 ** (2 - power), noise=0.007, seed=seed, power=power
    )  # fmt: skip
    found = read_tile(times, power=power)
    assert found is not None
    assert found.step == step
    assert found.is_clean
    assert not found.has_cliffs


@pytest.mark.parametrize("step", STEPS)
def test_without_noise_the_first_five_widths_show_the_tile(step):
    first, rest = window(128)
    assert len(first) == 5
    assert len(rest) == 4
    found = read_tile(timed(first, step))
    assert found is not None
    assert found.step == step
    # Steps of 4 and 8 are told apart by 1 %: noise could do that.
    assert found.is_clear == (step > 8)


def test_cliffs_between_the_tiles_do_not_hide_them():
    times = timed(range(32, 65, 4), 16)
    off_tile = {w: ns * (1 if w % 16 == 0 else 2.0) for w, ns in times.items()}
    found = read_tile(off_tile)
    assert found is not None
    assert (found.step, found.is_clean, found.has_cliffs) == (16, True, True)


def test_a_slot_that_does_not_matter_shows_no_tile():
    assert read_tile(timed(range(32, 65, 4), 8, start=100_000, slope=10)) is None
    assert read_tile({64: 10.0, 32: 5.0}) is None


def test_a_staircase_of_no_step_is_not_called_clean():
    steep = {w: 1000.0 * 1.05 ** (w // 4) * (1.3 if w % 12 == 0 else 1) for w in range(32, 65, 4)}
    found = read_tile(steep)
    assert found is not None
    assert not found.is_clean


@given(st.integers(1, 600))
def test_the_window_lies_below_the_full_width_and_on_multiples_of_four(full):
    first, rest = window(full)
    assert all(0 < w <= full and w % 4 == 0 for w in (*first, *rest))
    assert len({*first, *rest}) == len(first) + len(rest) <= 9
    assert bool(first) == (full >= 8)


@given(
    channels=st.integers(4, 512),
    own=st.sampled_from([1, 2, 3, 4, 6, 8]),
    tiles=st.lists(
        st.builds(Tile, st.sampled_from(STEPS), st.just(True), st.just(True), st.booleans()),
        max_size=4,
    ),
)
def test_a_common_step_keeps_to_the_networks_own_and_leaves_widths_to_choose(channels, own, tiles):
    step, free = common_step(channels, own, tiles), common_step(4096, own, tiles)
    assert step % own == step % 4 == free % own == 0
    assert step <= free
    assert all(free % t.step == 0 for t in tiles if t.has_cliffs)
    assert step * 4 <= channels or step < 2 * math.lcm(4, own) or step % 8


def test_without_cliffs_the_finest_tile_is_the_step_and_with_them_the_coarsest():
    def tile(step: int, has_cliffs: bool) -> Tile:
        return Tile(step, is_clean=True, is_clear=True, has_cliffs=has_cliffs)

    assert common_step(128, 1, [tile(4, False), tile(16, False)]) == 4
    assert common_step(128, 1, [tile(4, False), tile(16, True)]) == 16
    assert common_step(32, 1, [tile(4, False), tile(16, True)]) == 8
    assert common_step(128, 1, []) == 4
