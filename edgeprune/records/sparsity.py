"""Patterns of zeros in weights that an accelerator has kernels for: how they are named, and how far a file has one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from edgeprune.records.base import Record

PATTERN_FACT = "sparsity_patterns"  # of a profile: the patterns that its kernels make use of
# Of 2:4: of so many consecutive input channels at most so many weights are not zero.
GROUP, KEPT = 4, 2
_UNQUOTED = 2 * 60 + 4  # YAML 1.1 reads 2:4 without quotes as a number to the base 60


def _as_written(value: Any) -> Any:
    return "2:4" if value == _UNQUOTED and not isinstance(value, bool) else value


Pattern = Literal["2:4"]
Sparsity = Annotated[Literal["none", "2:4"], BeforeValidator(_as_written)]


class SparseWeights(Record):
    """What a file has of a pattern.

    ``layers`` of the ``of_layers`` convolutions and products in it have weights with the pattern. ``speed`` is ``not run`` unless the times
    of the report are those of a runtime that makes use of it on the board.
    """

    pattern: Pattern
    layers: Annotated[int, Field(ge=1)]
    of_layers: Annotated[int, Field(ge=1)]
    speed: Literal["measured", "not run"]

    def line(self) -> str:
        """One sentence for people."""
        what = f"weights are {self.pattern} sparse in {self.layers} of {self.of_layers} layers"
        if self.speed == "measured":
            return f"{what}; the times are of kernels that may make use of it"
        return f"{what}; what that does to speed was not measured (not run): nothing that was timed makes use of it"
