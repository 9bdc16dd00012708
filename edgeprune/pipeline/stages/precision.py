"""Which of the pruned files ships. A check that refuses the INT8 file does not end the run where FP32 may ship and keeps to the budget."""

from __future__ import annotations

from edgeprune.errors import FormatError
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import export
from edgeprune.pipeline.files.records import FinalQuality, PrunedFiles
from edgeprune.pipeline.run_folder import Stage
from edgeprune.pipeline.stages import gates
from edgeprune.records.names import Precision
from edgeprune.records.report import Gate


def choose(
    context: Context,
    files: Stage[PrunedFiles],
    measured: gates.Measured,
    quality: FinalQuality,
) -> gates.Choice:
    """What ships: what the gates say, unless that is an INT8 file which a check refuses.

    Raises:
        FormatError: the INT8 file is refused, and FP32 is not allowed or is over the budget; says both.
    """
    job = context.job
    if files.result.int8_refused and "int8" in job.target.precisions:
        return gates.in_place_of_int8(measured, job.budget, files.result.int8_refused)
    choice = _by_gates(context, measured)
    if choice.precision == "fp32":
        return choice
    try:
        _require_int8(files)
    except FormatError as error:
        why = export.refusal(context, error)
        return gates.in_place_of_int8(measured, job.budget, why)
    return _with_numerics(context, files, measured, quality, choice)


def numerics(
    context: Context, files: PrunedFiles, quality: FinalQuality, precision: Precision
) -> Gate:
    """Whether the device computes what the host does, in one precision."""
    return gates.numerics_gate(
        quality.device_agreement[precision],
        files.built_in_agreement if precision == "int8" else 1.0,
        not_run="" if context.runs_ship else context.notes[0],
    )


def _by_gates(context: Context, measured: gates.Measured) -> gates.Choice:
    """The faster file that meets the gates; where times rank nothing, INT8, unless it loses too much and FP32 meets every gate."""
    job = context.job
    comparable = context.precisions(job.target.precisions)
    if comparable == job.target.precisions:
        return gates.choose(measured, job.budget, job.max_drop, job.target.precisions)
    (planned,) = comparable
    lost = gates.quality_gate(measured, job.max_drop, planned)
    others = [p for p in job.target.precisions if p != planned and _meets(context, measured, p)]
    if not lost.met and others:
        return gates.choose(measured, job.budget, job.max_drop, (planned, *others))
    runtime = context.runtime_on(context.board).name
    reason = f"{runtime} on this machine stands in for the target, so its times do not rank the precisions"
    if not lost.met:
        reason += f"; {planned}, which the plan is for, misses {lost.name}, and nothing else meets every gate"
    return gates.Choice(planned, reason)


def _meets(context: Context, measured: gates.Measured, precision: Precision) -> bool:
    job = context.job
    return (
        gates.latency_gate(measured, job.budget, precision).met
        and gates.quality_gate(measured, job.max_drop, precision).met
    )


def _require_int8(files: Stage[PrunedFiles]) -> None:
    """Raise when the INT8 file is one that a reader of the bundle would refuse."""
    artifact, floats = files.result.shipped("int8"), files.result.float_layers("int8")
    export.require_int8(artifact, files.path(artifact.path), floats)


def _with_numerics(
    context: Context,
    files: Stage[PrunedFiles],
    measured: gates.Measured,
    quality: FinalQuality,
    choice: gates.Choice,
) -> gates.Choice:
    """INT8, unless its kernels disagree and FP32 keeps every promise."""
    job = context.job
    gate = numerics(context, files.result, quality, "int8")
    if not gate.missed or "fp32" not in job.target.precisions:
        return choice
    others = (
        gates.latency_gate(measured, job.budget, "fp32"),
        gates.quality_gate(measured, job.max_drop, "fp32"),
        numerics(context, files.result, quality, "fp32"),
    )
    if not all(other.met for other in others):
        return choice
    return gates.in_place_of_int8(measured, job.budget, f"its kernels disagree, {gate.note}")
