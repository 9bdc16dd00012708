"""What people write about a target: the profile of its silicon, its runtimes, and how it may be quantised."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from edgeprune.records.base import Record
from edgeprune.records.budget import BudgetText, DropText
from edgeprune.records.formats import FormatName, RuntimeName, all_facts, format_facts
from edgeprune.records.names import BundleKind, ComputeUnits, Name, Precision
from edgeprune.records.operators import WORDS


class Fact(Record):
    """One hardware fact: a value with the place it comes from."""

    value: int | float | str | bool | tuple[int | float | str, ...]
    source: Annotated[str, Field(min_length=8)]
    read_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    note: str = ""


class ChannelSteps(Record):
    """The output-channel tile of each kernel class, as a prior for the width grid until the device is measured."""

    conv: Annotated[int, Field(ge=1, le=256)]
    depthwise: Annotated[int, Field(ge=1, le=256)]
    linear: Annotated[int, Field(ge=1, le=256)]
    source: Annotated[str, Field(min_length=8)]
    read_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class AvoidedOp(Record):
    """An operator that runs badly on an accelerator, such as one that is slow or falls back: what it costs, and who says so."""

    op: str  # a word of edgeprune.records.operators
    cost: Annotated[str, Field(min_length=4, max_length=200)]
    source: Annotated[str, Field(min_length=8)]
    read_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]

    @field_validator("op")
    @classmethod
    def _check_op(cls, word: str) -> str:
        if word not in WORDS:
            raise ValueError(f"unknown operator {word!r}; known: {', '.join(sorted(WORDS))}")
        return word


class ForbiddenOp(AvoidedOp):
    """An operator that cannot run on an accelerator, unless one of these formats has it, or its converter replaces it."""

    decomposed_by: tuple[FormatName, ...] = ()


class Profile(Record):
    """What a piece of silicon and its kernel library like. Facts only, each with its source."""

    schema_version: Literal[1] = 1
    name: Name
    summary: str
    isa: str
    kernel_library: str
    facts: dict[str, Fact]
    channel_steps: dict[Precision, ChannelSteps]
    int8_schemes: tuple[str, ...]
    avoid_ops: tuple[AvoidedOp, ...] = ()  # a warning
    forbidden_ops: tuple[ForbiddenOp, ...] = ()  # an error

    @model_validator(mode="after")
    def _check_ops(self) -> Profile:
        words = [fact.op for fact in (*self.avoid_ops, *self.forbidden_ops)]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(
                f"an operator must stand once in avoid_ops and forbidden_ops together, but {', '.join(twice)} does not"
            )
        return self


class Runtime(Record):
    """How the shipped file is run and timed."""

    name: RuntimeName
    threads: Annotated[int, Field(ge=1, le=64)] = 1


class Alternative(Record):
    """Another format that the boards of a target run, and what runs it there."""

    format: FormatName
    runtime: Runtime

    @model_validator(mode="after")
    def _check_runtime(self) -> Alternative:
        known = format_facts(self.format).runtimes
        if self.runtime.name not in known:
            raise ValueError(
                f"files of {self.format} are run by {' or '.join(known)}, not by {self.runtime.name}"
            )
        return self


class Quantization(Record):
    """Post-training INT8 settings; ``io`` is the type of the file's inputs and outputs, the format's own where it is ``None``."""

    scheme: Literal["static-int8"] = "static-int8"
    per_channel: bool = True
    calibration_samples: Annotated[int, Field(ge=8, le=10_000)] = 256
    io: Literal["float", "int8"] | None = None


class Target(Record):
    """What we ship: one profile, a runtime, a format, precisions, and defaults for the gates.

    ``formats`` are alternatives to ``format``, each with its runtime; ``--formats auto`` measures all and ships the fastest that holds.
    ``compute_units`` are what an app should ask Core ML for, ``ALL`` where it is ``None``.
    """

    schema_version: Literal[1] = 1
    name: Name
    summary: str
    profile: Name
    format: FormatName
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    runtime: Runtime
    formats: tuple[Alternative, ...] = ()
    quantization: Quantization = Quantization()
    latency: BudgetText = "60%"
    max_drop: DropText = "1%"
    bundle: BundleKind = "python"
    # What the runner of the app registers, where that is less than the runtime on this machine has; for formats with delegates.
    operators: tuple[str, ...] | None = None
    compute_units: ComputeUnits | None = None

    @model_validator(mode="after")
    def _check_formats(self) -> Target:
        names = [self.format, *(other.format for other in self.formats)]
        if self.compute_units is not None and not any(format_facts(n).compute_units for n in names):
            wanted = " or ".join(facts.name for facts in all_facts() if facts.compute_units)
            raise ValueError(f"compute_units is for {wanted} files, not for {' or '.join(names)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"formats must hold each format once, and not the target's own, but {', '.join(twice)} is there twice"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data; ``formats`` and ``compute_units`` only where they are set, what is not set is not said."""
        plain: dict[str, Any] = handler(self)
        for key in ("formats", "compute_units"):
            if not plain.get(key, True):
                del plain[key]
        return plain
