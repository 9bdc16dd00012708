"""How the weights of a model file are stored, read without the runtime that would run it.

A runtime's parser may crash on a hostile file, so this reads only the few fields it needs, in Python, with every offset checked.
Weights are constants of rank 2 and more: biases, scales and shape vectors are not counted.

The reader of each format says where its constants lie: ``edgeprune/formats/<name>/reader.py``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from edgeprune.errors import IntegrityError
from edgeprune.formats import reader


@runtime_checkable
class ReadsWeights(Protocol):
    """The reader of a format whose constants are read here."""

    def weights(self, content: bytes) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Storage type and shape of every constant. Raises what parsing raises on bytes that are no such file."""
        ...


def weight_elements(format_name: str, content: bytes) -> dict[str, int] | None:
    """Number of weight elements by storage type (``int8``, ``float32`` ...), or ``None`` for a format that is not read here.

    Raises:
        IntegrityError: the file is not of its format.
    """
    found = reader(format_name)
    if not isinstance(found, ReadsWeights):
        return None
    counts: dict[str, int] = {}
    try:
        for kind, shape in found.weights(content):
            if len(shape) >= 2 and min(shape) > 0:
                counts[kind] = counts.get(kind, 0) + math.prod(shape)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound {format_name} file: {error}") from error
    return counts


def eight_bit_ratio(counts: dict[str, int]) -> float:
    """Share of the weight elements that are stored in 8 bits or fewer; 0 when there are none."""
    total = sum(counts.values())
    narrow = sum(counts.get(kind, 0) for kind in ("int8", "uint8", "int4"))
    return narrow / total if total else 0.0
