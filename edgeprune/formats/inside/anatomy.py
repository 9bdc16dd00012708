"""What a model file computes and in which types, read without its runtime; see :mod:`edgeprune.formats.inside.weights`."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from edgeprune.errors import IntegrityError
from edgeprune.formats import reader
from edgeprune.records.artifact import Artifact

MAX_OPS = 100_000


@dataclass(frozen=True)
class Layer:
    """An operator with weights: its torch layer (``""`` where the file does not say), and whether it reads 8-bit values only.

    ``weights`` are what tells a constant from others, its storage type and its number of elements.
    """

    name: str
    eight_bit: bool
    weights: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Anatomy:
    """Operators by name, tensors by storage type, and the operators with weights.

    ``names`` is false where operators are known by number alone. ``schema_version`` and ``versions`` (each operator's own) are those of a
    ``.tflite`` file.
    """

    operators: Counter[str]
    tensors: Counter[str]
    layers: tuple[Layer, ...]
    names: bool = True
    schema_version: int = 0
    versions: tuple[tuple[str, int], ...] = ()

    @property
    def weighted(self) -> int:
        """How many operators have weights."""
        return len(self.layers)

    @property
    def eight_bit(self) -> int:
        """How many of those compute on 8-bit weights and activations."""
        return sum(layer.eight_bit for layer in self.layers)


class Versions(Protocol):
    """Which operators, in which versions, a runtime can load."""

    @property
    def name(self) -> str:
        """The runtime and its version."""
        ...

    def check(self, schema_version: int, operators: Iterable[tuple[str, int]]) -> None:
        """Raise ``FormatError`` unless the runtime loads a file with this schema and these operators, each with its version."""
        ...


@runtime_checkable
class ReadsLayers(Protocol):
    """The reader of a format whose operators are read here."""

    def anatomy(self, content: bytes) -> Anatomy:
        """What the file computes. Raises ``ValueError``, ``IndexError`` or ``struct.error`` on bytes that are no such file."""
        ...


@runtime_checkable
class KnowsVersions(Protocol):
    """The reader of a format whose operators have versions."""

    def oldest(self, runtime: str) -> Versions | None:
        """What the oldest version of a runtime that edgeprune knows can load; ``None`` where no table of it is kept."""
        ...


@runtime_checkable
class CountsOperators(Protocol):
    """The reader of a format whose records count all that is in a file."""

    def operators_line(self, model: Artifact, content: bytes) -> str:
        """What a file has, in words. Raises ``IntegrityError`` where that is not what its record counts."""
        ...


def anatomy(format_name: str, content: bytes) -> Anatomy | None:
    """What the file computes; ``None`` for a format that is not read here.

    Raises:
        IntegrityError: the file is not of its format.
    """
    found = reader(format_name)
    if not isinstance(found, ReadsLayers):
        return None
    try:
        return found.anatomy(content)
    except (struct.error, IndexError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound {format_name} file: {error}") from error


def elements(shape: tuple[int, ...]) -> int:
    """As many as :func:`~edgeprune.formats.inside.weights.weight_elements` counts."""
    return math.prod(shape) if min(shape, default=1) > 0 else 0


def check_counts(wanted: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raise unless a file has as many of everything as its manifest says.

    Raises:
        IntegrityError: it has not; names the first that differs.
    """
    differ = sorted(op for op in {*wanted, *found} if wanted.get(op, 0) != found.get(op, 0))
    if differ:
        raise IntegrityError(
            f"the model must have {wanted.get(differ[0], 0)} {differ[0]}, but has {found.get(differ[0], 0)}"
        )
