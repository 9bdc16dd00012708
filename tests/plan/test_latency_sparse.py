"""A whole table from few timings, on devices whose cost function is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from edgeprune.plan.latency import sampling
from edgeprune.plan.latency.fill import Point
from edgeprune.plan.latency.grid import admissible
from edgeprune.plan.latency.model import sample_nets
from edgeprune.plan.latency.sampling import KernelClass, SparseTable
from edgeprune.plan.latency.tiles import padded

Cost = Callable[[KernelClass, Point], float]
FULL = {
    "stem": 32, "a": 64, "b": 128, "c": 96, "d": 256,
    **{f"inner{i}": 64 + 32 * i for i in range(4)},
}  # fmt: skip


def residual_net() -> list[KernelClass]:
    """Convolutions between groups of many widths, depthwise ones, additions and a head."""
    found: list[KernelClass] = []

    def add(kind: str, roles: Sequence[str], *groups: str) -> None:
        full = tuple(FULL[g] for g in groups)
        found.append(
            KernelClass(
                f"{kind} of {groups}",
                kind.split()[0],
                kind,
                tuple(roles),
                full,
                (groups,),
                len(found),
            )
        )

    add("Conv 3x3", ["out"], "stem")
    chain = ["stem", "a", "b", "c", "d"]
    for source, target, inner in zip(
        chain, chain[1:], (f"inner{i}" for i in range(4)), strict=False
    ):
        add("Conv 3x3", ["in", "out"], source, inner)
        add("Conv 3x3", ["in", "out"], inner, target)
        add("Conv 1x1", ["in", "out"], source, target)
        add("Add", ["both"], target)
    add("Conv 3x3", ["square"], "b")
    add("Depthwise 3x3", ["both"], "b")
    add("Gemm", ["in"], "d")
    return found


def device(tiles: Mapping[str, tuple[int, int]], *, bend: float = 0.0) -> Cost:
    """Padded bilinear costs; with a bend, large kernels are slower by that share, as where a cache overflows."""

    def ns(one: KernelClass, point: Point) -> float:
        t_in, t_out = tiles[one.op]
        sides = {"in": 3, "out": 3}
        for role, width in zip(one.roles, point, strict=True):
            if role in ("in", "both", "square"):
                sides["in"] = padded(width, t_in)
            if role in ("out", "square"):
                sides["out"] = padded(width, t_out)
        if one.op == "Depthwise":
            return 800 + 250.0 * sides["in"]
        if one.op == "Add":
            return 800 + 25.0 * sides["in"]
        plain = 2000 + 20 * sides["in"] + 30 * sides["out"] + 7 * sides["in"] * sides["out"]
        return plain * (1 + bend * min(1, sides["in"] * sides["out"] / 8000))

    return ns


TILES = {"Conv": (4, 16), "Add": (4, 4), "Depthwise": (16, 16), "Gemm": (8, 8)}


@dataclass
class Clock:
    """A timer with noise that answers at most ``most`` requests, besides those at full width."""

    cost: Cost
    noise: float = 0.0
    most: int = 250
    times: dict[tuple[str, Point], float] = field(default_factory=dict)
    purposes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(0)

    def take(self, wanted: Sequence[tuple[KernelClass, Point]], purpose: str) -> None:
        self.purposes.append(purpose)
        for one, point in wanted:
            is_allowed = len(self.times) < self.most or point == one.full
            if is_allowed and (one.name, point) not in self.times:
                ns = self.cost(one, point) * (1 + abs(self._draw.gauss(0, self.noise)))
                self.times[one.name, point] = ns

    def known(self, one: KernelClass) -> dict[Point, float]:
        return {p: ns for (name, p), ns in self.times.items() if name == one.name}

    def silent(self, one: KernelClass) -> set[Point]:
        return set()

    @property
    def is_spent(self) -> bool:
        return len(self.times) >= self.most


def probed(clock: Clock, *, prior: int = 1) -> SparseTable:
    return sampling.probe(
        residual_net(), FULL, dict.fromkeys(FULL, 1), clock, prior=dict.fromkeys(FULL, prior)
    )


def net_errors(found: SparseTable, cost: Cost, count: int = 40) -> list[float]:
    """How far the sum over all kernels is off, on random structures."""
    tables = {t.signature: t for t in found.kernels}
    errors = []
    for net in sample_nets(found.candidates, count, seed=7):
        true = guess = 0.0
        for one in residual_net():
            point = tuple(net[g] for g in one.members[0])
            true += cost(one, point)
            arrays = tables[one.name].arrays([(w,) for w in point])
            guess += sum(float(ns.sum()) for _, ns in arrays)
        errors.append(abs(guess / true - 1))
    return errors


def test_tiles_are_found_for_in_and_out_alone_and_for_each_kind():
    found = probed(Clock(device(TILES))).tiles
    steps = {slot: tile.step for slot, tile in found.items()}
    assert steps["Conv 3x3", "in"] == steps["Conv 1x1", "in"] == 4
    assert steps["Conv 3x3", "out"] == steps["Conv 1x1", "out"] == 16
    assert steps["Depthwise 3x3", "both"] == 16


def test_widths_are_multiples_of_what_a_kernel_gains_by_but_never_between_cliffs():
    def with_cliffs(one: KernelClass, point: Point) -> float:
        off_tile = one.op == "Depthwise" and point[0] % 16
        return plain(one, point) * (3 if off_tile else 1)

    plain = device(TILES)
    first, second = probed(Clock(plain)), probed(Clock(with_cliffs))
    assert first.tiles["Depthwise 3x3", "both"].has_cliffs is False
    assert second.tiles["Depthwise 3x3", "both"].has_cliffs is True
    assert any(w % 16 for w in first.candidates["b"])
    assert not any(w % 16 for w in second.candidates["b"])
    assert second.candidates["a"] == first.candidates["a"]


def test_where_a_prior_gives_the_step_no_other_widths_are_timed_and_coarser_tiles_are_still_found():
    clock, free = Clock(device(TILES, bend=0.4)), Clock(device(TILES, bend=0.4))
    found = probed(clock, prior=8)
    probed(free)
    assert {w % 8 for (_, point) in clock.times for w in point} == {0}
    assert len(clock.times) < len(free.times)
    steps = {slot: tile.step for slot, tile in found.tiles.items()}
    assert steps["Conv 3x3", "out"] == steps["Depthwise 3x3", "both"] == 16
    assert steps["Conv 3x3", "in"] == 8


def test_padded_bilinear_costs_are_recovered_where_they_hold():
    clock = Clock(device(TILES))
    assert max(net_errors(probed(clock), clock.cost)) < 0.01
    assert len(clock.times) <= 150


def test_one_percent_noise_stays_below_three_percent_in_whole_nets():
    clock = Clock(device(TILES), noise=0.01)
    errors = net_errors(probed(clock), clock.cost)
    assert sum(errors) / len(errors) < 0.02
    assert sorted(errors)[math.ceil(0.95 * len(errors)) - 1] < 0.03
    assert len(clock.times) <= 250


def test_a_kernel_that_bends_is_looked_at_where_it_bends():
    straight, bent = Clock(device(TILES)), Clock(device(TILES, bend=0.4))
    probed(straight)
    errors = net_errors(probed(bent), bent.cost)
    assert len(bent.times) > len(straight.times)
    assert sum(errors) / len(errors) < 0.02


@pytest.mark.parametrize("most", [0, 30, 60, 120])
def test_the_limit_is_kept_and_the_table_is_whole(most):
    clock = Clock(device(TILES, bend=0.4), noise=0.01, most=most)
    found = probed(clock)
    assert len(clock.times) <= max(most, len(residual_net()))
    assert len(found.kernels) == len(residual_net())
    assert all(ns > 0 for table in found.kernels for term in table.terms for ns in term.ns) or most


def test_more_timings_make_a_better_table():
    mean = {}
    for most in (40, 250):
        clock = Clock(device(TILES, bend=0.3), most=most)
        errors = net_errors(probed(clock), clock.cost)
        mean[most] = sum(errors) / len(errors)
    assert mean[250] < mean[40]


def test_of_the_predicted_widths_no_chosen_one_is_slower_than_a_larger_one():
    clock = Clock(device(TILES), noise=0.01)
    found, classes = probed(clock), residual_net()
    by_name = {t.signature: t for t in found.kernels}
    tables = [(c, by_name[c.name]) for c in classes]
    for group, widths in found.candidates.items():
        costs = {w: sampling.touched_ns(tables, FULL, group, w) for w in widths}
        chosen = admissible(widths, costs, tolerance=0.02)
        assert len(chosen) > 1
        true = [
            sum(
                clock.cost(c, tuple(w if g == group else FULL[g] for g in c.members[0]))
                for c in classes
                if group in c.members[0]
            )
            for w in chosen
        ]
        assert true == sorted(true)
        assert len(set(true)) == len(true)


def test_the_same_times_lead_to_the_same_requests():
    first, again = Clock(device(TILES), noise=0.01), Clock(device(TILES), noise=0.01)
    assert probed(first) == probed(again)
    assert first.times == again.times
    assert len(set(first.purposes)) == len(first.purposes)
