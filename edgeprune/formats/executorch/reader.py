"""What is in an ExecuTorch program, read without the runtime that would run it.

Source: ``program.fbs`` of ExecuTorch 1.5.1 (ExtraTensorInfo).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from edgeprune.errors import IntegrityError
from edgeprune.formats.executorch.program import read_program
from edgeprune.formats.inside.anatomy import check_counts
from edgeprune.formats.shared.flatbuffer import root
from edgeprune.records.artifact import Artifact

_TENSOR = 5


def weights(content: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Storage type and shape of every constant; see :func:`edgeprune.formats.inside.weights.weight_elements`."""
    yield from read_program(content).weights


def outside(content: bytes) -> Iterator[str]:
    """Names of values that lie in another file; see :func:`edgeprune.formats.inside.outside.check_self_contained`."""
    for plan in root(content).tables(1):
        for value in plan.tables(2):
            tensor = value.table(1) if value.scalar(0, "<B") == _TENSOR else None
            more = None if tensor is None else tensor.table(9)
            if more is not None and more.scalar(2, "<b"):
                yield more.text(1)


def operators_line(model: Artifact, content: bytes) -> str:
    """What a program has, in words; the conversion fixed who computes what, so that it is in the file.

    Raises:
        IntegrityError: it has not all that its record counts, or the file is no such program.
    """
    try:
        program = read_program(content)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound executorch file: {error}") from error
    check_counts(model.op_counts, program.op_counts())
    if program.operators != model.operators:
        needed, named = (", ".join(ops) or "none" for ops in (program.operators, model.operators))
        raise IntegrityError(
            f"the model needs the runtime's operators {needed}, but the manifest names {named}"
        )
    nodes, every = len(program.nodes), len(program.nodes) + len(program.calls)
    macs = max(1, program.macs)
    return (
        f"XNNPACK has {nodes} of {every} operations and {program.delegated_macs / macs:.0%} of the multiply-accumulates,"
        f" {program.int8_macs / macs:.0%} are in 8 bits"
    )
