"""The words that several records share: names of formats, precisions, stamps and kinds, and how a name is written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
SPDX = r"^[A-Za-z0-9][A-Za-z0-9.+() -]{0,99}$"  # of a licence, such as Apache-2.0
Precision = Literal["fp32", "int8"]
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Stamp = Literal["measured", "stand-in", "emulated"]
BundleKind = Literal["python", "android", "ios"]
# The processors that Core ML may use, as coremltools names them.
ComputeUnits = Literal["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
