"""Which channel group a dimension belongs to, read off two exports of one model at different widths.

Both resizable formats use this. The rule is exact, not a guess: with distinct ratios ``full / changed`` for every group, a dimension that
scales by one group's ratio belongs to that group (possibly times a constant, as in a flattened ``C * H * W``), and a dimension that is
the sum of a few groups (a concatenation) has to match that sum in both exports. Whatever fits nothing, or two things, is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from edgeprune.errors import FormatError

MAX_CONCAT_TERMS = 4


@dataclass(frozen=True)
class WidthRule:
    """A dimension as a linear function of group widths: ``sum(factor * width)``; no terms means a constant."""

    constant: int
    terms: tuple[tuple[str, Fraction], ...] = ()

    def at(self, widths: Mapping[str, int], full: Mapping[str, int]) -> int:
        """The dimension at these widths; groups that are not named keep their full width.

        Raises:
            FormatError: the widths do not give a whole number (a width off the step of a grouped convolution).
        """
        if not self.terms:
            return self.constant
        value = sum((f * widths.get(g, full[g]) for g, f in self.terms), Fraction(0))
        if value.denominator != 1 or value < 1:
            raise FormatError(f"a dimension would be {value} at widths {dict(widths)}")
        return int(value)

    def groups(self) -> tuple[str, ...]:
        """Names of the groups that change this dimension."""
        return tuple(g for g, _ in self.terms)


class WidthDecoder:
    """Finds the :class:`WidthRule` of a pair of dimensions.

    Args:
        full: width of every group in the dense export.
        changed: width of every group in the variant; must differ, with distinct ratios.

    Raises:
        FormatError: two groups have the same ratio, so their dimensions could not be told apart.
    """

    def __init__(self, full: Mapping[str, int], changed: Mapping[str, int]) -> None:
        self.full, self.changed = dict(full), dict(changed)
        self._by_ratio: dict[Fraction, str] = {}
        for group, width in self.full.items():
            ratio = Fraction(self.changed[group], width)
            if ratio in self._by_ratio or ratio == 1:
                other = self._by_ratio.get(ratio, "the dense width")
                raise FormatError(f"groups {group} and {other} have the same width ratio {ratio}")
            self._by_ratio[ratio] = group
        self._sums: dict[tuple[int, int], list[tuple[str, ...]]] | None = None
        self._memory: dict[tuple[int, int], WidthRule] = {}

    def rule(self, dense: int, variant: int, *, where: str) -> WidthRule:
        """The rule that gives ``dense`` at full and ``variant`` at changed widths.

        Raises:
            FormatError: no group or sum of groups fits, or more than one does; names ``where``.
        """
        if dense == variant:
            return WidthRule(dense)
        key = (dense, variant)
        if key not in self._memory:
            self._memory[key] = self._decode(dense, variant, where)
        return self._memory[key]

    def _decode(self, dense: int, variant: int, where: str) -> WidthRule:
        single = self._by_ratio.get(Fraction(variant, dense)) if dense > 0 else None
        if single is not None:
            return WidthRule(dense, ((single, Fraction(dense, self.full[single])),))
        matches = self._concatenations().get((dense, variant), [])
        if len(matches) != 1:
            problem = (
                "fits no channel group" if not matches else f"fits {len(matches)} sums of groups"
            )
            raise FormatError(f"{where}: the dimension {dense} -> {variant} {problem}")
        return WidthRule(dense, tuple((group, Fraction(1)) for group in matches[0]))

    def _concatenations(self) -> dict[tuple[int, int], list[tuple[str, ...]]]:
        if self._sums is None:
            self._sums = {}
            names = list(self.full)
            most = MAX_CONCAT_TERMS if len(names) <= 24 else 2
            for count in range(2, most + 1):
                for chosen in itertools.combinations_with_replacement(names, count):
                    key = (sum(self.full[g] for g in chosen), sum(self.changed[g] for g in chosen))
                    self._sums.setdefault(key, []).append(chosen)
        return self._sums


def distinct_widths(full: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
    """Widths for the variant export: each group smaller, a multiple of its step, and all ratios distinct.

    Args:
        full: full width of every group.
        steps: widths of a group must be multiples of this (1 where there is no rule).

    Raises:
        FormatError: a group has too few possible widths left for a ratio of its own.
    """
    taken: set[Fraction] = set()
    chosen: dict[str, int] = {}
    for group in sorted(full, key=lambda g: full[g] // steps[g]):
        n, step = full[group], steps[group]
        middle = max(step, int(n * 0.75) // step * step)
        options = sorted(range(step, n, step), key=lambda w: abs(w - middle))
        found = next((w for w in options if Fraction(w, n) not in taken), None)
        if found is None:
            raise FormatError(f"group {group} ({n} channels) has no width ratio left of its own")
        taken.add(Fraction(found, n))
        chosen[group] = found
    return chosen
