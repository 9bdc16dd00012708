"""Which channel groups a dimension follows, read off two exports of one model at different widths.

Both resizable formats use this. Nothing is guessed: a dimension that is ``dense`` in one file and ``variant`` in the other follows one
group, or a join (concatenation, split, channel padding, slice) that stands in the graph, times or divided by a whole number (a flattened
``C * H * W``, a grouped convolution). Where the two sizes fit several rules, the operators decide (:class:`Links`); what they leave open
is refused. :func:`distinct_widths` picks the variant's widths so that this stays rare.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from edgeprune.errors import FormatError

Pair = tuple[int, int]  # a dimension in the dense file and in the variant
MAX_OPTIONS = 64  # widths of one group that are compared for the variant


@dataclass(frozen=True)
class WidthRule:
    """A dimension as a linear function of group widths: ``constant + sum(factor * width)``."""

    constant: int | Fraction
    terms: tuple[tuple[str, Fraction], ...] = ()

    def at(self, widths: Mapping[str, int], full: Mapping[str, int]) -> int:
        """The dimension at these widths; groups that are not named keep their full width.

        Raises:
            FormatError: the widths do not give a whole number (a width off the step of a grouped convolution).
        """
        value = sum((f * widths.get(g, full[g]) for g, f in self.terms), Fraction(self.constant))
        if self.terms and (value.denominator != 1 or value < 1):
            raise FormatError(f"a dimension would be {value} at widths {dict(widths)}")
        return int(value)

    def groups(self) -> tuple[str, ...]:
        """Names of the groups that change this dimension."""
        return tuple(g for g, _ in self.terms)

    def plus(self, other: WidthRule) -> WidthRule:
        """The sum of two dimensions."""
        factors = dict(self.terms)
        for group, factor in other.terms:
            factors[group] = factors.get(group, Fraction(0)) + factor
        kept = tuple((g, f) for g, f in factors.items() if f)
        return WidthRule(self.constant + other.constant, kept)

    def times(self, factor: Fraction) -> WidthRule:
        """A multiple of the dimension."""
        return WidthRule(self.constant * factor, tuple((g, f * factor) for g, f in self.terms))

    def meaning(self) -> Hashable:
        """Equal for rules that are the same function: ``a + b`` and ``b + a``."""
        return Fraction(self.constant), frozenset(self.terms)

    def __str__(self) -> str:
        parts = [g if f == 1 else f"{f} * {g}" for g, f in self.terms]
        return " + ".join(parts + ([str(self.constant)] if self.constant or not parts else []))


Rules = tuple[WidthRule, ...]


@dataclass(frozen=True)
class Place:
    """Where a list of dimensions stands: ``tensor``, ``values`` or an option of an operator; the number tells equal names apart."""

    kind: str
    number: int
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


Dim = tuple[Place, int]  # a list of dimensions, and the position in it


def slots(rules: Rules, variables: list[str]) -> str:
    """Dimensions as text with groups replaced by their position in ``variables``, which grows: part of a kernel's signature."""
    shown = []
    for rule in rules:
        variables.extend(g for g in rule.groups() if g not in variables)
        parts = [f"{f}*v{variables.index(g)}" for g, f in rule.terms]
        if rule.constant or not parts:
            parts.append(str(rule.constant))
        shown.append("+".join(parts))
    return ",".join(shown)


def touched_by(rules: Iterable[tuple[int, WidthRule]]) -> dict[str, set[int]]:
    """For each group the numbers of the operators with a dimension that follows it, from pairs of an operator's number and a rule."""
    touched: dict[str, set[int]] = {}
    for index, rule in rules:
        for group in rule.groups():
            touched.setdefault(group, set()).add(index)
    return touched


def kind_and_roles(
    op: str,
    variables: Sequence[str],
    inputs: Iterable[Rules],
    outputs: Iterable[Rules],
    weights: Rules,
    window: Rules,
) -> tuple[str, tuple[str, ...]]:
    """What a kernel runs whatever its shape, and where each variable's channels are; see :class:`edgeprune.formats.Kernel`.

    Args:
        op: name of the operator.
        variables: groups that change the kernel's shape.
        inputs: dimensions of the activations that it reads.
        outputs: dimensions of what it writes.
        weights: dimensions of its weights; empty without any.
        window: those of them that are the window of a convolution.
    """
    read = {g for rules in inputs for rule in rules for g in rule.groups()}
    written = {g for rules in outputs for rule in rules for g in rule.groups()}
    sides = [g for rule in weights for g in rule.groups()]
    roles = tuple(
        ("square" if sides.count(g) > 1 else "both")
        if g in read and g in written
        else "in" if g in read else "out"
        for g in variables
    )  # fmt: skip
    size = "x".join(str(rule.constant) for rule in window)
    return f"{op} {size}".strip(), roles


class WidthDecoder:
    """Finds the :class:`WidthRule` of a pair of dimensions.

    Args:
        full: width of every group in the dense export.
        changed: width of every group in the variant.

    Raises:
        FormatError: a group has its full width in the variant, or two groups have the same two widths.
    """

    def __init__(self, full: Mapping[str, int], changed: Mapping[str, int]) -> None:
        self.full, self.changed = dict(full), dict(changed)
        self._known: dict[Pair, list[WidthRule]] = {}
        self._memory: dict[Pair, list[WidthRule]] = {}
        for group, width in self.full.items():
            pair = width, self.changed[group]
            if pair[0] == pair[1]:
                raise FormatError(f"group {group} must have another width than {width} in both")
            if pair in self._known:
                raise FormatError(
                    f"groups {self._known[pair][0]} and {group} have the same widths "
                    f"{pair[0]} -> {pair[1]}, so their dimensions cannot be told apart"
                )
            self._known[pair] = [WidthRule(0, ((group, Fraction(1)),))]

    def learn(self, pair: Pair, rule: WidthRule) -> None:
        """Remember that dimensions of these sizes may follow ``rule``."""
        if rule.terms:
            self._known.setdefault(pair, []).append(rule)
            self._memory.clear()

    def rule(self, dense: int, variant: int, *, where: str) -> WidthRule:
        """The only rule that gives ``dense`` at full and ``variant`` at changed widths.

        Raises:
            FormatError: none fits, or several do; names ``where``.
        """
        if dense == variant:
            return WidthRule(dense)
        found = self.fitting((dense, variant))
        if len(found) != 1:
            fits = " or ".join(str(rule) for rule in found)
            problem = f"could follow {fits}" if found else "fits no channel group"
            raise FormatError(f"{where}: the dimension {dense} -> {variant} {problem}")
        return found[0]

    def fitting(self, pair: Pair) -> list[WidthRule]:
        """All rules that give these two sizes."""
        if pair not in self._memory:
            near = [(known, rules) for known, rules in self._known.items() if _alike(pair, known)]
            scaled = [r.times(Fraction(pair[0], known[0])) for known, rules in near for r in rules]
            self._memory[pair] = _distinct(scaled)
        return self._memory[pair]


class Links:
    """Which dimensions of two paired graphs are one and the same, which are sums of others, and so what rule each follows.

    Sizes alone decide nearly always. Where they fit several rules (20 -> 16 may be a group, or 14 -> 10 joined with 6 frozen channels),
    a dimension takes the rule of the join it comes from; else, if a layer with weights writes it, that of the only fitting group.

    Args:
        decoder: knows the groups; learns the joins.
        sizes: both sizes of every dimension of every tensor, and of every list of numbers that holds dimensions, by any key.
    """

    def __init__(self, decoder: WidthDecoder, sizes: Mapping[Place, Sequence[Pair]]) -> None:
        self._decoder, self._sizes = decoder, sizes
        self._parent: dict[Dim, Dim] = {}
        self._joins: list[tuple[Dim, tuple[Dim, ...], int, str]] = []
        self._views: list[tuple[Dim, tuple[Dim, ...]]] = []
        self._written: set[Dim] = set()
        self._cut: set[Dim] = set()

    def same(self, one: Dim, other: Dim) -> None:
        """Note that two dimensions are the same one, unless their sizes differ (broadcasting)."""
        (a, b) = pair = self._pair(one)
        if a != b and pair == self._pair(other):
            self._parent[self._root(one)] = self._root(other)

    def equal(self, one: Dim, other: Dim) -> bool:
        """Whether two dimensions have the same sizes in both files."""
        return self._pair(one) == self._pair(other)

    def fixed(self, dim: Dim) -> bool:
        """Whether a dimension has one size in both files."""
        dense, variant = self._pair(dim)
        return dense == variant

    def align(self, *keys: Place) -> None:
        """Note that tensors are the same ones in their last dimensions, as far as they have them, save for broadcasting."""
        for key in keys[1:]:
            for i in range(1, 1 + min(len(self._sizes[keys[0]]), len(self._sizes[key]))):
                self.same((keys[0], -i), (key, -i))

    def written(self, dim: Dim) -> None:
        """Note that a layer with weights makes this dimension."""
        self._written.add(self._dim(dim))

    def join(self, whole: Dim, parts: Sequence[Dim], *, plus: int = 0, where: str) -> None:
        """Note that a dimension is the sum of others and ``plus``.

        Raises:
            FormatError: it is not, in one of the two files.
        """
        pairs = [self._pair(part) for part in parts]
        total = sum(a for a, _ in pairs) + plus, sum(b for _, b in pairs) + plus
        if total != self._pair(whole):
            raise FormatError(f"{where}: {pairs} do not add up to {self._pair(whole)}")
        self._joins.append((self._dim(whole), tuple(self._dim(p) for p in parts), plus, where))

    def shift(self, before: Place, after: Place, *, where: str) -> None:
        """Note that an operator pads or cuts the dimensions of a tensor."""
        pairs = [*self._sizes[before]], [*self._sizes[after]]
        if len(pairs[0]) != len(pairs[1]):
            return
        for axis, (was, now) in enumerate(zip(*pairs, strict=True)):
            by = now[0] - was[0]
            if was == now:
                self.same((before, axis), (after, axis))
            elif now[1] - was[1] == by and was[0] != was[1]:
                self.join((after, axis), [(before, axis)], plus=by, where=where)
            if by < 0:
                self._cut.add((before, axis))

    def view(self, before: Place, after: Place) -> None:
        """Note that the dimensions of one tensor are those of another, multiplied or divided."""
        inputs = tuple((before, i) for i, (a, b) in enumerate(self._sizes[before]) if a != b)
        self._views += [((after, i), inputs) for i in range(len(self._sizes[after]))]

    def solve(self) -> dict[Place, Rules]:
        """The rules of every tensor.

        Raises:
            FormatError: a dimension fits no rule, or several; names the tensor.
        """
        # What the first round learned may make sizes of the first joins ambiguous.
        for _ in range(2):
            solver = _Solver(self)
            for whole, parts, plus, where in self._joins:
                self._decoder.learn(self._pair(whole), solver.total(parts, plus, where))
        solver = _Solver(self)
        return {
            key: tuple(solver.rule((key, i), str(key)) for i in range(len(pairs)))
            for key, pairs in self._sizes.items()
        }

    def _dim(self, dim: Dim) -> Dim:
        key, axis = dim
        return key, axis % len(self._sizes[key])

    def _pair(self, dim: Dim) -> Pair:
        return self._sizes[dim[0]][dim[1]]

    def _root(self, dim: Dim) -> Dim:
        dim = self._dim(dim)
        while self._parent.get(dim, dim) != dim:
            above = self._parent[dim]
            dim = self._parent[dim] = self._parent.get(above, above)  # keeps later ways short
        return dim


class _Solver:
    """Rules of dimensions, from the links and what the decoder knows by now."""

    def __init__(self, links: Links) -> None:
        self._links = links
        root = links._root
        self._joins: dict[Dim, list[tuple[tuple[Dim, ...], int]]] = {}
        for whole, parts, plus, _ in links._joins:
            self._joins.setdefault(root(whole), []).append((parts, plus))
        self._views: dict[Dim, tuple[Dim, ...]] = {}
        for after, inputs in links._views:
            self._views.setdefault(root(after), inputs)
        self._written = {root(d) for d in links._written}
        self._cut = {root(d) for d in links._cut}
        self._found: dict[Dim, WidthRule | None] = {}

    def rule(self, dim: Dim, where: str) -> WidthRule:
        pair = self._links._pair(dim)
        if pair[0] == pair[1]:
            return WidthRule(pair[0])
        root = self._links._root(dim)
        if root not in self._found:
            self._found[root] = None  # a dimension that needs itself stays open
            self._found[root] = self._decided(root, self._links._decoder.fitting(pair), where)
        return self._found[root] or self._links._decoder.rule(*pair, where=where)

    def total(self, parts: Sequence[Dim], plus: int, where: str) -> WidthRule:
        total = WidthRule(plus)
        for part in parts:
            total = total.plus(self.rule(part, where))
        return total

    def _decided(self, root: Dim, fits: list[WidthRule], where: str) -> WidthRule | None:
        if root in self._joins:
            fits = _distinct(self.total(*join, where) for join in self._joins[root])
            return fits[0] if len(fits) == 1 else None
        if len(fits) > 1 and root in self._views:
            sources = [self.rule(d, where) for d in self._views[root]]
            fits = [f for f in fits if any(_proportional(f, source) for source in sources)]
        elif len(fits) > 1 and root in self._written - self._cut:
            fits = [f for f in fits if len(f.terms) == 1 and not f.constant]
        return fits[0] if len(fits) == 1 else None


def _proportional(one: WidthRule, other: WidthRule) -> bool:
    factor = one.terms[0][1] / other.terms[0][1] if other.terms else Fraction(0)
    return other.times(factor).meaning() == one.meaning()


def _distinct(rules: Iterable[WidthRule]) -> list[WidthRule]:
    found: dict[Hashable, WidthRule] = {}
    for rule in rules:
        found.setdefault(rule.meaning(), rule)
    return list(found.values())


def _alike(one: Pair, other: Pair) -> bool:
    """Whether one pair is the other one times or divided by a whole number."""
    (a, b), (c, d) = one, other
    if a < 1 or b < 1 or c < 1 or d < 1 or a * d != b * c:
        return False
    return a % c == b % d == 0 or c % a == d % b == 0


class _Confusions:
    """Counts what a further pair of widths could be mistaken for: other groups, and sums of two."""

    def __init__(self) -> None:
        self.groups: list[Pair] = []
        self._by_ratio: dict[Pair, list[Pair]] = {}
        self._sums_by_ratio: dict[Pair, list[Pair]] = {}

    def add(self, pair: Pair) -> None:
        for other in [*self.groups, pair]:
            total = pair[0] + other[0], pair[1] + other[1]
            self._sums_by_ratio.setdefault(_ratio(total), []).append(total)
        self.groups.append(pair)
        self._by_ratio.setdefault(_ratio(pair), []).append(pair)

    def weight(self, pair: Pair) -> int:
        """0 where nothing can be mistaken; grows with how likely a mistake is to be met (and then refused)."""
        same = self._by_ratio.get(_ratio(pair), [])
        cost = 10_000 * sum(_alike(pair, other) for other in same) + 1000 * len(same)
        cost += 10 * sum(_alike(pair, s) for s in self._sums_by_ratio.get(_ratio(pair), []))
        for other in self.groups:
            total = pair[0] + other[0], pair[1] + other[1]
            ratio = _ratio(total)
            singles = [*self._by_ratio.get(ratio, []), *([pair] if ratio == _ratio(pair) else [])]
            cost += 10 * sum(_alike(total, s) for s in singles)
            cost += sum(_alike(total, s) for s in self._sums_by_ratio.get(ratio, []))
        return cost


def _ratio(pair: Pair) -> Pair:
    divisor = math.gcd(*pair)
    return pair[0] // divisor, pair[1] // divisor


def distinct_widths(full: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
    """Widths for the variant export, at which the dimensions of different groups can be told apart.

    Each group is smaller, a multiple of its step, and near three quarters of its full width. Equal ratios, and sums of two groups that
    look like a third group or like another sum, are avoided where the steps leave a choice.

    Args:
        full: full width of every group.
        steps: widths of a group must be multiples of this (1 where there is no rule).

    Raises:
        FormatError: a group has too few possible widths left for one of its own.
    """
    confusions = _Confusions()
    chosen: dict[str, int] = {}
    for group in sorted(full, key=lambda g: (full[g] // steps[g], g)):
        n, step = full[group], steps[group]
        middle = max(step, int(n * 0.75) // step * step)
        free = (w for w in range(step, n, step) if (n, w) not in confusions.groups)
        options = sorted(free, key=lambda w: abs(w - middle))
        best, least = 0, -1
        for width in itertools.islice(options, MAX_OPTIONS):
            weight = confusions.weight((n, width))
            if least < 0 or weight < least:
                best, least = width, weight
            if weight == 0:
                break
        if least < 0:
            raise FormatError(f"group {group} ({n} channels) has no width left of its own")
        confusions.add((n, best))
        chosen[group] = best
    return chosen
