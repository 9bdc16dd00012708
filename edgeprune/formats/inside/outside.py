"""Whether a model file is all there is: a runtime may take weights from a file beside it, or in the folder that it happens to run in.

A bundle's digests say nothing about such a file, so no model may name one. Every way to a constant is followed, without any runtime.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from edgeprune.errors import IntegrityError
from edgeprune.formats import reader
from edgeprune.formats.inside.eight_bits import file_kind
from edgeprune.records.artifact import Artifact


@runtime_checkable
class NamesOutside(Protocol):
    """The reader of a format: every reader can tell this, and a file without a reader is refused."""

    def outside(self, content: bytes) -> Iterator[str]:
        """Names of values that lie in another file. Raises what parsing raises on bytes that are no such file."""
        ...


def check_self_contained(model: Artifact, content: bytes) -> None:
    """Raise when a value of a model file lies outside it.

    Raises:
        IntegrityError: one does, or the file is not of its format.
    """
    kind = file_kind(model)
    form = reader(kind)
    if not isinstance(form, NamesOutside):
        raise IntegrityError(f"{kind} files are not read here")
    try:
        found = next(form.outside(content), None)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound {kind} file: {error}") from error
    if found is not None:
        raise IntegrityError(
            f"a model must hold all its values, but {model.path} takes {found!r:.80} from another file",
            hint="write the model as one file",
        )
