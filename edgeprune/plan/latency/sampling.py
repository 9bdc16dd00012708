"""Which kernels to time so that few are enough: full widths, tiles, corners and middles, and closer only where a middle is missed.

Notation: a *class* is all kernels of a file that are the same computation at the same full widths; they share a table. Its *weight* is
the share of the classes' total time at full widths that its kernels take.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeprune.plan.latency.fill import Point, predict_point
from edgeprune.plan.latency.grid import candidate_widths
from edgeprune.plan.latency.table import KernelTable, tabulate
from edgeprune.plan.latency.tiles import (
    FINEST_STEP,
    STEPS,
    Tile,
    common_step,
    padded,
    read_tile,
    window,
)

# Lighter ones are neither sniffed nor checked: all their error is less than this.
LEAST_WEIGHT = 0.01
MISS_RATIO = 0.05  # a middle that is further off than this is looked at more closely
LEAST_GAIN = 0.001  # ... if it is worth this much of the time of the whole net
# Of the time of all that a group touches: lighter kernels do not make its grid finer.
LEAST_VOICE = 0.1
MOST_DEPTH = 4  # halvings of a grid of 16 widths until no width lies between

Slot = tuple[str, str]  # kind of kernel, and role of the slot
Cell = tuple[tuple[int, int], ...]  # first and last position in the grid of every slot


@dataclass(frozen=True)
class KernelClass:
    """One class: ``members`` are the groups in the slots of each of its kernels; ``key`` is what the timer knows it by."""

    name: str
    op: str
    kind: str
    roles: tuple[str, ...]
    full: Point
    members: tuple[tuple[str, ...], ...]
    key: int


class KernelTimer(Protocol):
    """Times kernels, and remembers."""

    def take(self, wanted: Sequence[tuple[KernelClass, Point]], purpose: str) -> None:
        """Time these, the first ones where they are more than may still be timed; those that are known cost nothing."""
        ...

    def known(self, one: KernelClass) -> Mapping[Point, float]:
        """All times of a class so far, by widths; ns."""
        ...

    def silent(self, one: KernelClass) -> set[Point]:
        """Widths at which the class did not run alone; :meth:`known` has a guess for them."""
        ...

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be timed."""
        ...


@dataclass(frozen=True)
class SparseTable:
    """What was found: a table for every class, the widths that each group may take, and the tile of every slot that shows one."""

    kernels: tuple[KernelTable, ...]
    candidates: dict[str, tuple[int, ...]]
    tiles: dict[Slot, Tile]


def probe(
    classes: Sequence[KernelClass],
    channels: Mapping[str, int],
    steps: Mapping[str, int],
    timer: KernelTimer,
    *,
    prior: Mapping[str, int] | None = None,
) -> SparseTable:
    """Time what is needed of these classes.

    Args:
        classes: of one file.
        channels: full width of every group.
        steps: the step that the network asks of every group.
        timer: its first request is every class at full width.
        prior: a step of a group that its widths must be multiples of, whatever the tiles are; no others are timed.
    """
    timer.take([(c, c.full) for c in classes], "kernels-full")
    weights = _weights(classes, timer)
    classes = sorted(classes, key=lambda c: -weights[c.name])
    given = {group: (prior or {}).get(group, 1) for group in channels}
    tiles = _sniff(classes, weights, steps, given, timer)
    candidates = {}
    for group, n in channels.items():
        found = _tiles_of(classes, weights, group, tiles)
        step = math.lcm(common_step(n, steps[group], found), given[group])
        candidates[group] = candidate_widths(n, step=step)
    grids = [Grid.of(c, candidates, tiles) for c in classes]
    timer.take([(g.kernels, p) for g in grids for p in g.corners()], "kernels-corners")
    _refine([g for g in grids if weights[g.kernels.name] >= LEAST_WEIGHT], weights, timer)
    by_name = {g.kernels.name: g.table(timer) for g in grids}
    return SparseTable(tuple(by_name[c.name] for c in classes), candidates, tiles)


def _weights(classes: Sequence[KernelClass], timer: KernelTimer) -> dict[str, float]:
    ns = {c.name: len(c.members) * timer.known(c)[c.full] for c in classes}
    total = sum(ns.values())
    return {name: value / total for name, value in ns.items()}


def _slots(one: KernelClass) -> list[Slot]:
    return [(one.kind, role) for role in one.roles]


def _sniff(
    classes: Sequence[KernelClass],
    weights: Mapping[str, float],
    steps: Mapping[str, int],
    given: Mapping[str, int],
    timer: KernelTimer,
) -> dict[Slot, Tile]:
    """The tile of every kind of kernel and role that weighs anything, each on one shape: the widest up to 64, then the heaviest.

    ``given`` is the step of each group by a prior: of its slots only the multiples of it are timed, which tell the coarser tiles.
    """
    share: dict[Slot, float] = {}
    chosen: dict[Slot, tuple[tuple[int, float], KernelClass, int]] = {}
    for one in classes:
        for slot, key in enumerate(_slots(one)):
            share[key] = share.get(key, 0.0) + weights[one.name]
            rank = (min(one.full[slot], 64), weights[one.name])
            if key not in chosen or rank > chosen[key][0]:
                chosen[key] = (rank, one, slot)
    asked: dict[Slot, _Sniff] = {}
    for key, (_, one, slot) in chosen.items():
        own = {steps[groups[slot]] for groups in one.members}
        finest = math.gcd(*(math.lcm(FINEST_STEP, given[groups[slot]]) for groups in one.members))
        first, rest = (
            window(one.full[slot], finest)
            if finest in STEPS and all(finest % s == 0 for s in own)
            else ((), ())
        )
        both_known = {(key[0], "in"), (key[0], "out")} <= chosen.keys()
        if first and share[key] >= LEAST_WEIGHT and not (key[1] == "square" and both_known):
            asked[key] = _Sniff(one, slot, finest, first, rest)
    order = sorted(asked, key=lambda k: -share[k])
    timer.take([p for k in order for p in asked[k].points(asked[k].first)], "kernels-tiles")
    found = {k: asked[k].read(_power(k[1]), timer) for k in order}
    open_ = [k for k, tile in found.items() if tile is not None and not tile.is_clear]
    timer.take([p for k in open_ for p in asked[k].points(asked[k].rest)], "kernels-tiles-all")
    found |= {k: asked[k].read(_power(k[1]), timer) for k in open_}
    return {k: tile for k, tile in found.items() if tile is not None}


@dataclass(frozen=True)
class _Sniff:
    """One slot of one shape to tell the tile from: the finest step that counts, the widths to time first, and the others."""

    one: KernelClass
    slot: int
    finest: int
    first: tuple[int, ...]
    rest: tuple[int, ...]

    def points(self, widths: Iterable[int]) -> list[tuple[KernelClass, Point]]:
        return [(self.one, _at(self.one.full, self.slot, w)) for w in widths]

    def read(self, power: int, timer: KernelTimer) -> Tile | None:
        times, silent = timer.known(self.one), timer.silent(self.one)
        at = {w: _at(self.one.full, self.slot, w) for w in (*self.first, *self.rest)}
        return read_tile(
            {w: times[p] for w, p in at.items() if p in times and p not in silent},
            power=power,
            steps=[s for s in STEPS if s >= self.finest],
        )


def _at(full: Point, slot: int, width: int) -> Point:
    return (*full[:slot], width, *full[slot + 1 :])


def _power(role: str) -> int:
    return 2 if role == "square" else 1


def _tiles_of(
    classes: Sequence[KernelClass],
    weights: Mapping[str, float],
    group: str,
    tiles: Mapping[Slot, Tile],
) -> list[Tile]:
    """Tiles of the slots that a group fills, without those of light kernels that have no cliffs."""
    touched = [c for c in classes if any(group in groups for groups in c.members)]
    least = LEAST_VOICE * sum(weights[c.name] for c in touched)
    found = []
    for one in touched:
        slots = sorted({s for groups in one.members for s, g in enumerate(groups) if g == group})
        for tile in (t for s in slots for t in _of_slot(_slots(one)[s], tiles)):
            if tile.has_cliffs or weights[one.name] >= least:
                found.append(tile)
    return found


def _of_slot(slot: Slot, tiles: Mapping[Slot, Tile]) -> list[Tile]:
    kind, role = slot
    if role == "square" and slot not in tiles:
        return [tiles[kind, r] for r in ("in", "out") if (kind, r) in tiles]
    return [tiles[slot]] if slot in tiles else []


@dataclass(frozen=True)
class Grid:
    """The widths of a class: one ascending grid a slot, and what the time grows with at each."""

    kernels: KernelClass
    widths: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[float, ...], ...]

    @classmethod
    def of(
        cls,
        one: KernelClass,
        candidates: Mapping[str, tuple[int, ...]],
        tiles: Mapping[Slot, Tile],
    ) -> Grid:
        """The grid of a class where its groups may take these widths."""
        widths, sizes = [], []
        for slot, key in enumerate(_slots(one)):
            grid = sorted({w for groups in one.members for w in candidates[groups[slot]]})
            found = [t.step for t in _of_slot(key, tiles)] or [1]
            sides = (found * 2)[:2] if key[1] == "square" else found
            widths.append(tuple(grid))
            sizes.append(tuple(float(math.prod(padded(w, s) for s in sides)) for w in grid))
        return cls(one, tuple(widths), tuple(sizes))

    def corners(self) -> list[Point]:
        """Full widths, each slot at its smallest alone, all of them, and with up to 4 slots each pair."""
        last = self.whole
        picks: list[tuple[int, ...]] = [
            (),
            *((s,) for s in range(len(last))),
            tuple(range(len(last))),
        ]
        if len(last) <= 4:
            picks += itertools.combinations(range(len(last)), 2)
        points = [
            tuple(g[0] if s in pick else g[-1] for s, g in enumerate(self.widths)) for pick in picks
        ]
        return list(dict.fromkeys(points))

    @property
    def whole(self) -> Cell:
        """The cell that holds everything."""
        return tuple((0, len(g) - 1) for g in self.widths)

    def middle(self, cell: Cell) -> tuple[int, ...] | None:
        """Positions nearest to the middle of a cell; ``None`` where nothing lies inside."""
        found = []
        for (low, high), size in zip(cell, self.sizes, strict=True):
            aim = (size[low] + size[high]) / 2
            inner = range(low + 1, high) or range(high, high + 1)
            found.append(min(inner, key=lambda i: abs(size[i] - aim)))
        is_inside = any(low < i < high for i, (low, high) in zip(found, cell, strict=True))
        return tuple(found) if is_inside else None

    def parts(self, cell: Cell, middle: tuple[int, ...]) -> list[Cell]:
        """The cell cut at its middle in every slot; with more than two slots only the narrow end and the wide end."""
        halves = [
            ((low, i), (i, high)) if low < i < high else ((low, high),)
            for (low, high), i in zip(cell, middle, strict=True)
        ]
        if len(halves) > 2:
            return [tuple(h[0] for h in halves), tuple(h[-1] for h in halves)]
        return list(itertools.product(*halves))

    def point(self, places: tuple[int, ...]) -> Point:
        """Widths of positions."""
        return tuple(g[i] for g, i in zip(self.widths, places, strict=True))

    def curves(self, middle: tuple[int, ...]) -> list[Point]:
        """Every slot alone at its middle, the others full."""
        return [_at(self.kernels.full, s, self.widths[s][i]) for s, i in enumerate(middle)]

    def times(self, timer: KernelTimer) -> dict[Point, float]:
        """What is known on the grid."""
        return {
            p: ns
            for p, ns in timer.known(self.kernels).items()
            if all(w in g for w, g in zip(p, self.widths, strict=True))
        }

    def table(self, timer: KernelTimer) -> KernelTable:
        """The table from what is known by now."""
        one = self.kernels
        return tabulate(one.name, one.op, self.widths, self.times(timer), self.sizes)


def _refine(grids: Sequence[Grid], weights: Mapping[str, float], timer: KernelTimer) -> None:
    """Time the middle of every cell; where the table misses it, cut the cell there and go on, what costs most first."""
    cells: list[tuple[float, Grid, Cell]] = [(weights[g.kernels.name], g, g.whole) for g in grids]
    for depth in range(MOST_DEPTH):
        cells.sort(key=lambda entry: -entry[0])
        checks = [
            (rank, g, cell, m) for rank, g, cell in cells if (m := g.middle(cell)) is not None
        ]
        if not checks or timer.is_spent:
            return
        new = {(g.kernels.name, g.point(m)) for _, g, _, m in checks}
        timer.take([(g.kernels, g.point(m)) for _, g, _, m in checks], f"kernels-middles-{depth}")
        missed = []
        for _, grid, cell, middle in checks:
            point, times = grid.point(middle), grid.times(timer)
            if point not in times:
                continue
            name = grid.kernels.name
            before = {p: ns for p, ns in times.items() if (name, p) not in new}
            guess = predict_point(before, grid.widths, point, grid.sizes)
            miss = abs(guess / times[point] - 1)
            if miss > MISS_RATIO and weights[name] * miss > LEAST_GAIN:
                missed.append((weights[name] * miss, grid, cell, middle))
        missed.sort(key=lambda entry: -entry[0])
        timer.take(
            [(g.kernels, p) for _, g, _, m in missed for p in g.curves(m)],
            f"kernels-curves-{depth}",
        )
        cells = [(rank, g, part) for rank, g, cell, m in missed for part in g.parts(cell, m)]


def touched_ns(
    tables: Iterable[tuple[KernelClass, KernelTable]],
    channels: Mapping[str, int],
    group: str,
    width: int,
) -> float:
    """Time of every kernel that a group touches, at one width of it, the others full."""
    total = 0.0
    for one, table in tables:
        for groups in one.members:
            if group in groups:
                at = [(width if g == group else channels[g],) for g in groups]
                total += sum(float(ns.sum()) for _, ns in table.arrays(at))
    return total
