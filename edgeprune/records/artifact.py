"""A model file that was written, and the tensors that it takes and gives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgeprune.records.base import Record
from edgeprune.records.formats import FilePrecision, FormatName
from edgeprune.records.names import Sha256


class TensorSpec(Record):
    """One input or output of a model file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Literal["NCHW", "NHWC", "other"] = "other"
    scale: float | None = None
    zero_point: int | None = None


class Artifact(Record):
    """One model file, by content. ``path`` is relative to the run folder or the bundle.

    ``operators`` are what the runtime must have beside its delegates; ``notes`` is what the user of the file should know of its conversion.
    """

    path: str
    format: FormatName
    precision: FilePrecision
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_counts: dict[str, int] = {}
    operators: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
