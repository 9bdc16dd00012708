"""Kernel times of one board in a file, to be kept, shared and given to a later search of any model on the same board."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edgeprune.errors import IntegrityError, SpecError
from edgeprune.records.base import Record, read_json
from edgeprune.records.files import write_json
from edgeprune.records.formats import FormatName
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision

KernelKey = tuple[str, tuple[int, ...]]  # signature of the computation, and a width for each slot


class KernelTime(Record):
    """One kernel alone. ``signature`` says what it computes besides its ``widths``."""

    signature: str
    widths: tuple[int, ...]
    ns: float = Field(gt=0)


class KernelTimes(Record):
    """All kernels that were timed on one board with one runtime, in one precision and format. ``created`` is UTC, of the oldest times."""

    schema_version: Literal[1] = 1
    created: str
    fingerprint: Fingerprint
    precision: Precision
    format: FormatName
    times: tuple[KernelTime, ...]

    def known(self) -> dict[KernelKey, float]:
        """Nanoseconds by kernel."""
        return {(t.signature, t.widths): t.ns for t in self.times}

    def check(
        self, fingerprint: Fingerprint, precision: Precision, form: FormatName, path: Path
    ) -> None:
        """Raise unless these are times of that very board, runtime, precision and format.

        Raises:
            SpecError: they are not; names the first difference.
        """
        mine, theirs = self.fingerprint, fingerprint
        pairs = [
            ("precision", self.precision, precision),
            ("format", self.format, form),
            *(
                (name.replace("_", " "), getattr(mine, name), getattr(theirs, name))
                for name in type(mine).model_fields
                if name != "device"
            ),
        ]
        for name, here, there in pairs:
            if here != there:
                what = (
                    "are others"
                    if isinstance(here, tuple)
                    else f"is {here}, and here it is {there}"
                )
                raise SpecError(
                    f"the kernel times of {path} are of another board or set-up: their {name} {what}",
                    hint="times of two boards are never mixed; give another file",
                )


def read_times(path: Path) -> KernelTimes | None:
    """The file, or ``None`` where there is none yet.

    Raises:
        SpecError, IntegrityError: it cannot be read, or holds something else.
    """
    try:
        return read_json(KernelTimes, path) if path.exists() else None
    except IntegrityError as error:
        error.hint = "give a file that --tables wrote, or one that does not exist yet"
        raise


def write_times(path: Path, earlier: KernelTimes | None, new: KernelTimes) -> None:
    """Write a file with the earlier times and the new ones; where both know a kernel, the earlier time stands, as it was used."""
    merged = {**new.known(), **(earlier.known() if earlier is not None else {})}
    rows = tuple(
        KernelTime(signature=signature, widths=widths, ns=ns)
        for (signature, widths), ns in sorted(merged.items())
    )
    created = new.created if earlier is None else min(earlier.created, new.created)
    write_json(new.model_copy(update={"created": created, "times": rows}), path)
