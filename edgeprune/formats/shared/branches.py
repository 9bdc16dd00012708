"""Residual branches of an exported graph: which operators go when a block is removed, found without knowing the operators.

A branch is what lies between a tensor and an addition that adds the tensor itself; removed, the sum is the tensor. Tensors are any
hashable names; constants and inputs that are left out are no tensors here.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from edgeprune.errors import FormatError

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Step(Generic[Name]):
    """One operator: the activations that it reads and writes."""

    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]


@dataclass(frozen=True)
class Branch(Generic[Name]):
    """A branch: its operators, the addition behind it, the tensor that is added as it is, and the sum."""

    steps: frozenset[int]
    add: int
    skip: Name
    total: Name


@dataclass
class Bypass(Generic[Name]):
    """How a file without a branch is written.

    Operators ``gone``; for a tensor that is not written any more the one to read ``instead``; and what is ``changed``: an addition that
    becomes the named operator on the skip alone.
    """

    gone: set[int] = field(default_factory=set)
    instead: dict[Name, Name] = field(default_factory=dict)
    changed: dict[int, tuple[str, Name]] = field(default_factory=dict)

    @classmethod
    def of(cls, bypasses: Mapping[str, Bypass[Name]], widths: Mapping[str, int]) -> Bypass[Name]:
        """All branches out whose groups have width 0; groups of one branch share one bypass.

        Raises:
            FormatError: a group of width 0 lies in no block that can be left out, or another group of its block is still there.
        """
        joined: Bypass[Name] = cls()
        for group, width in widths.items():
            if width:
                continue
            if group not in bypasses:
                raise FormatError(f"group {group} is no block that could be left out of the file")
            left = [g for g, b in bypasses.items() if b is bypasses[group] and widths.get(g, 1)]
            if left:
                raise FormatError(
                    f"the block of group {group} can only be left out of the file if {', '.join(left)} of the same block have width 0 too"
                )
            joined.gone |= bypasses[group].gone
            joined.instead.update(bypasses[group].instead)
            joined.changed.update(bypasses[group].changed)
        return joined

    def read(self, name: Name) -> Name:
        """The tensor to read where ``name`` was read: behind several removed blocks in a row, that before the first."""
        while name in self.instead:
            name = self.instead[name]
        return name


class Graph(Generic[Name]):
    """Operators in file order, with who makes and who reads each tensor; the file's own outputs count as read by -1."""

    def __init__(self, steps: Sequence[Step[Name]], outputs: Collection[Name]) -> None:
        self.steps = steps
        self.maker = {name: i for i, step in enumerate(steps) for name in step.outputs}
        self.readers: dict[Name, list[int]] = {name: [-1] for name in outputs}
        for i, step in enumerate(steps):
            for name in step.inputs:
                self.readers.setdefault(name, []).append(i)

    def branches(
        self, adds: Collection[int], same: Mapping[Name, Name] | None = None
    ) -> list[Branch[Name]]:
        """All branches, the smallest first.

        Args:
            adds: operators that add two tensors.
            same: tensors that hold the values of another (a dequantised one those of the quantised one).
        """
        found = []
        for add in sorted(adds):
            if len(self.steps[add].inputs) != 2 or -1 in self.readers.get(
                self.steps[add].outputs[0], [-1]
            ):
                continue
            for skip, operand in itertools.permutations(self.steps[add].inputs):
                inside = self._between({skip, (same or {}).get(skip, skip)}, operand, add)
                if inside:
                    total = self.steps[add].outputs[0]
                    found.append(Branch(frozenset(inside), add, skip, total))
        return sorted(found, key=lambda b: (len(b.steps), b.add))

    def sole_reader(self, name: Name) -> int | None:
        """The only operator that reads a tensor."""
        users = self.readers.get(name, [])
        return users[0] if len(users) == 1 and users[0] >= 0 else None

    def _between(self, starts: set[Name], operand: Name, add: int) -> set[int]:
        """Operators on the ways from ``starts`` to ``operand``; none where another value comes in or leaves."""
        inside: set[int] = set()
        pending = [operand]
        while pending:
            name = pending.pop()
            if name in starts:
                continue
            maker = self.maker.get(name)
            if maker is None or not self.steps[maker].inputs:
                return set()
            if maker not in inside:
                inside.add(maker)
                pending.extend(self.steps[maker].inputs)
        made = {name for i in inside for name in self.steps[i].outputs}
        leaving = {r for name in made for r in self.readers.get(name, [])} - inside - {add}
        return set() if leaving else inside


def branch_of(branches: Sequence[Branch[Name]], touched: Collection[int]) -> Branch[Name] | None:
    """The smallest branch that holds all the operators that a channel group touches."""
    return next((b for b in branches if touched and b.steps.issuperset(touched)), None)
