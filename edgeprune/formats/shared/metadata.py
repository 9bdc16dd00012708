"""What a model file says about itself once it has left its bundle: a few texts at its end, which every runtime passes over.

The reader of a format may offer a :class:`Carrier` as ``CARRIER``; files of one without ship as they are, and the manifest says so. Each
carrier only appends, so that the file that was measured is a prefix of the file that ships and can be cut out again. Reading is safe on
hostile files: no parser of a runtime takes part, nothing is unpacked, and sizes are capped before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from edgeprune.formats import reader
from edgeprune.records.formats import all_facts

PREFIX = "edgeprune."
MAX_TEXT_BYTES = 256 * 1024
MAX_LABELS_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class Found:
    """What a file carries: its texts by key, its labels file where it has one, and the model without them."""

    texts: Mapping[str, str]
    labels: bytes | None
    model: bytes


class Carrier(Protocol):
    """How files of one kind carry texts."""

    def attach(self, content: bytes, texts: Mapping[str, str], labels: bytes) -> bytes:
        """The file with the texts; keys are full ones such as ``edgeprune.name``. Equal arguments give equal bytes."""
        ...

    def read(self, content: bytes) -> Found | None:
        """What the file carries; ``None`` when it carries nothing.

        Raises:
            IntegrityError: what it carries is damaged, too large or of another form.
        """
        ...


def carrier(suffix: str) -> Carrier | None:
    """How files with this suffix carry texts; ``None`` when they do not."""
    kinds = (facts.kind for facts in all_facts() if facts.suffix == suffix)
    found: Carrier | None = getattr(reader(next(kinds, "")), "CARRIER", None)
    return found
