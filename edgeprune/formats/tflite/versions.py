"""Which operators, in which versions, the oldest runtime of each name can load.

The tables are the files of ``ops``, one for each runtime, written by ``scripts/probe_tflite_ops.py``; what was asked, and when,
stands in them. Nobody edits them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgeprune.errors import FormatError
from edgeprune.records.base import Record, read_json

SCHEMA_VERSION = 3
_FOLDER = Path(__file__).with_name("ops")


class OperatorTable(Record):
    """Operator -> highest version that a runtime loads; versions below it load, too. What is not named is not known at all."""

    runtime: Literal["litert", "tflite-runtime"]
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    source: Annotated[str, Field(min_length=8)]
    asked_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    most: dict[str, Annotated[int, Field(ge=1)]]

    @property
    def name(self) -> str:
        """The runtime and its version, as in ``litert 2.1.0``."""
        return f"{self.runtime} {self.version}"

    def check(self, schema_version: int, operators: Iterable[tuple[str, int]]) -> None:
        """Raise unless the runtime loads a file with this schema and these operators, each with its version.

        Raises:
            FormatError: it does not; names what is too new, and what the runtime reads.
        """
        if schema_version != SCHEMA_VERSION:
            raise FormatError(
                f"the file has schema version {schema_version}; {self.name} reads version {SCHEMA_VERSION}"
            )
        for operator, version in operators:
            most = self.most.get(operator, 0)
            if version > most:
                has = f"knows it up to version {most}" if most else "does not know it"
                raise FormatError(
                    f"{operator} version {version} is in the file, but {self.name} {has}",
                    hint="replace that operation, or use a target with another runtime",
                )


@functools.cache
def oldest(runtime: str) -> OperatorTable | None:
    """What the oldest version of a runtime that edgeprune puts on boards can load; ``None`` for one that runs no ``.tflite`` files."""
    path = _FOLDER / f"{runtime}.json"
    return read_json(OperatorTable, path) if path.is_file() else None
