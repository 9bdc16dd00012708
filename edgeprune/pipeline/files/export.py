"""Models as files: exported, quantised, checked against torch, and paired so that they take any widths.

Nothing here decides whether a file is good enough to ship (:mod:`edgeprune.pipeline.stages.gates` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.compress.groups.find import remove_channels
from edgeprune.compress.heal.two_of_four import has_pattern, weighted
from edgeprune.compress.int8.faint_channels import rescue_silent
from edgeprune.devices.link.frames import Refusal
from edgeprune.errors import EdgepruneError, FormatError, IntegrityError, MissingTool
from edgeprune.formats import Format, QuantizeOptions, Resizable, ShowsSparsity, check_runtime
from edgeprune.formats.inside.eight_bits import require_eight_bits
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.formats.shared.widths import distinct_widths
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import int8_types, operators
from edgeprune.pipeline.files.int8 import best_int8
from edgeprune.pipeline.files.int8_warnings import warnings as int8_warnings
from edgeprune.pipeline.files.reconverted import Converted
from edgeprune.pipeline.files.records import DenseFiles, PrunedFiles, VariantFile
from edgeprune.records.artifact import Artifact
from edgeprune.records.names import Precision
from edgeprune.workload.answers import answers

PARITY_SAMPLES = 64
PARITY_TOLERANCE = 1e-3  # of the largest logit: float32 convolutions in another order
MAX_REASON = 500  # characters of why a file was refused: a line of the manifest holds twice as many
VARIANT_CALIBRATION = 8  # the variant's scales are never used, only its shapes


def dense_files(context: Context, folder: Path) -> DenseFiles:
    """Export and quantise the dense model; its FP32 file must agree with torch, its INT8 file must run on the built-in kernels.

    Raises:
        ModelError: the model cannot be traced, or has an operator that the profile forbids.
        FormatError: the export fails, or its numbers are not torch's.
    """
    program = context.program
    slow = operators.check(program, context.job.profile, context.job.target.format)
    for line in slow:
        context.progress.say(f"      warning: {line}")
    audible, notes = rescue_silent(context.model, torch.from_numpy(context.calibration))
    files = _net_files(context, audible, folder, "dense", cuttable=True)
    chosen: int8_types.Chosen | None = None
    if int8_types.is_open(context):
        fp32_path, int8_path = (folder / files[p].path for p in ("fp32", "int8"))
        chosen = int8_types.choose(context, fp32_path, int8_path)
        files["int8"], notes = chosen.artifact, (*notes, chosen.note())
    shown = files.get("cuttable", files)["fp32"].path
    refused = _not_int8(context, files.get("shipping", files)["int8"], folder)
    doubts = (
        *int8_warnings(context.form, folder / shown, context.calibration, program),
        *(f"{line}; the plan is made for FP32" for line in refused),
    )
    for line in doubts:
        context.progress.say(f"      warning: {line}")
    x = context.inputs(context.job.loaded.dataset.development, PARITY_SAMPLES)
    expected = answers(context.model, torch.from_numpy(x))
    found = context.run_file(context.host, folder / files["fp32"].path, x)
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error <= PARITY_TOLERANCE:
        raise FormatError(
            f"the exported FP32 file differs from torch by {error:.2g} of the largest logit;"
            f" at most {PARITY_TOLERANCE:g} is allowed",
            hint="the converter changed the model; try a target with another format",
        )
    return DenseFiles(
        **{**files, "notes": (*slow, *notes, *doubts, *files["notes"])},
        parity_error_ratio=error,
        built_in_agreement=_built_in_agreement(context, folder / files["int8"].path, x),
        int8_types="" if chosen is None else chosen.form.variant,
        types=() if chosen is None else chosen.rows,
        int8_refused="; ".join(refused),
    )


def _net_files(
    context: Context, model: nn.Module, folder: Path, name: str, *, cuttable: bool = False
) -> dict[str, Any]:
    """A net in both precisions: as it is timed and asked, to be cut (if that is wanted), and as it ships; see the record of it."""
    found: dict[str, Any] = _both(context, context.whole, model, folder, name)
    if cuttable and context.form is not context.whole:
        found["cuttable"] = _both(context, context.form, model, folder, name)
    if context.ship is not context.whole:
        found["shipping"] = _both(context, context.ship, model, folder, name)
    found["notes"] = _shipped_notes(context, found, name)
    return found


def _shipped_notes(context: Context, files: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """What the user of the shipped files must know; their operators are checked first.

    Raises:
        FormatError: as :func:`_check_operators`.
    """
    shipped: Mapping[str, Artifact] = files.get("shipping") or {
        p: files[p] for p in ("fp32", "int8")
    }
    return tuple(note for p, a in shipped.items() for note in _notes_of(context, a, f"{name} {p}"))


def _notes_of(context: Context, artifact: Artifact, name: str) -> tuple[str, ...]:
    """As :func:`_shipped_notes`, of one file."""
    _check_operators(context, artifact)
    return tuple(f"{name}: {note}" for note in artifact.notes)


def _check_operators(context: Context, artifact: Artifact) -> None:
    """Raise unless the runner that the target describes has every operator that the file needs beside its delegates.

    Raises:
        FormatError: it has not; names them.
    """
    available = context.job.target.operators
    missing = sorted(set(artifact.operators) - set(available or artifact.operators))
    if missing:
        raise FormatError(
            f"{artifact.path} needs operators that the runner of {context.job.target.name} lacks: {', '.join(missing)}",
            hint="replace those operations in the model, or link the operators and add them to the target's `operators`",
        )


def _both(
    context: Context, form: Format, model: nn.Module, folder: Path, name: str
) -> dict[str, Artifact]:
    """A net in one format and both precisions."""
    fp32 = form.export(model, context.example, folder / f"{name}.fp32{form.info.suffix}")
    found = {"fp32": fp32, "int8": _int8_file(context, form, model, folder, name)}
    if form is context.whole:
        for artifact in found.values():
            check_runtime(form, folder / artifact.path, context.job.shipped_runtime)
    return found


def _int8_file(
    context: Context,
    form: Format,
    model: nn.Module,
    folder: Path,
    name: str,
    quantised: nn.Module | None = None,
) -> Artifact:
    """The INT8 file beside the FP32 file of a net; of the module ``quantised`` where that is another."""
    suffix = form.info.suffix
    source, weights = folder / f"{name}.fp32{suffix}", model
    if quantised is not None and quantised is not model:
        source, weights = folder / f"{name}.int8-source{suffix}", quantised
        form.export(weights, context.example, source)
    path, io = folder / f"{name}.int8{suffix}", QuantizeOptions(io=context.job.int8.io)
    return form.quantize(source, context.calibration, path, model=weights, options=io)


def _built_in_agreement(context: Context, file: Path, x: np.ndarray) -> float | None:
    """Share of samples on which the runtime's built-in kernels and its fast kernels name the same class.

    The built-in kernels of ARM64 refuse files that XNNPACK runs (a channel whose scale is too small), so every INT8 file is tried on
    them before it may be shipped. ``None`` where a file is bound to its kernels.
    """
    if not context.whole.info.built_in_kernels:
        return None
    fast = context.run_file(context.host, file, x)
    plain = context.run_file(context.host, file, x, delegate=False)
    return float((fast.argmax(1) == plain.argmax(1)).double().mean())


def variant_file(context: Context, precision: Precision, folder: Path) -> VariantFile:
    """Export the model once more, every group at a width of its own, to learn which dimension follows which group."""
    groups, _ = context.groups
    widths = distinct_widths(context.full, {g.name: g.step for g in groups})
    removed = {g.name: range(widths[g.name], g.channels) for g in groups}
    narrower = remove_channels(
        context.model, {g.name: g for g in groups}, removed, torch.from_numpy(context.example)
    )
    suffix = context.form.info.suffix
    path = folder / f"variant.fp32{suffix}"
    artifact = context.form.export(narrower, context.example, path)
    if precision == "int8":
        few = context.calibration[:VARIANT_CALIBRATION]
        int8_path, io = folder / f"variant.int8{suffix}", QuantizeOptions(io=context.job.int8.io)
        artifact = context.form.quantize(path, few, int8_path, model=narrower, options=io)
    return VariantFile(widths=widths, artifact=artifact)


def resizable(
    context: Context,
    dense: Path,
    variant: Path,
    widths: Mapping[str, int],
    precision: Precision = "fp32",
) -> Resizable:
    """The dense file as one that can take any widths.

    Args:
        context: of the run.
        dense: the dense file that kernels are cut from.
        variant: the same at ``widths``.
        widths: of every group in ``variant``.
        precision: of both; asked where whole nets are of another format, and converted one by one.
    """
    file = context.form.resizable(dense, variant, context.full, widths, context.model)
    if context.form is context.whole:
        return file
    return Converted(
        file,
        form=context.whole,
        model=context.model,
        groups=context.groups[0],
        example=context.example,
        calibration=context.calibration[:VARIANT_CALIBRATION] if precision == "int8" else None,
        progress=context.progress,
    )


def pruned_files(
    context: Context, model: nn.Module, folder: Path, *, limit_ms: float
) -> PrunedFiles:
    """Export and quantise the healed model; ``limit_ms`` bounds what layers of the INT8 file may cost in float.

    Where the target allows FP32, an INT8 file that is refused is left out, and the record says why.

    Raises:
        FormatError: the FP32 file is refused, or the INT8 file of a target that allows nothing else.
    """
    audible, notes = rescue_silent(model, torch.from_numpy(context.calibration))
    fp32_path = folder / f"pruned.fp32{context.whole.info.suffix}"
    fp32 = context.whole.export(audible, context.example, fp32_path)
    told = check_runtime(context.whole, fp32_path, context.job.shipped_runtime)
    shipping: dict[Precision, Artifact] = {}
    if context.ship is not context.whole:
        path = folder / f"pruned.fp32{context.ship.info.suffix}"
        shipping["fp32"] = context.ship.export(audible, context.example, path)
    shipped = shipping.get("fp32", fp32)
    found = PrunedFiles(
        fp32=fp32,
        shipping=shipping,
        built_in_agreement=None,
        notes=(*notes, *told, *_notes_of(context, shipped, "pruned fp32")),
        sparse=_sparse_counts(context, model, "fp32", folder / shipped.path),
    )
    try:
        return _with_int8(context, model, audible, found, folder, limit_ms)
    except (FormatError, Refusal) as error:
        return found.model_copy(update={"int8_refused": refusal(context, error)})


def _with_int8(
    context: Context,
    model: nn.Module,
    audible: nn.Module,
    files: PrunedFiles,
    folder: Path,
    limit_ms: float,
) -> PrunedFiles:
    """The FP32 files of a net and the INT8 ones beside them."""
    path = folder / f"pruned.int8{context.whole.info.suffix}"
    quantised = best_int8(context, audible, folder / files.fp32.path, path, limit_ms=limit_ms)
    shipping = dict(files.shipping)
    if context.ship is not context.whole:
        # What was judged is the twin's file of that module, so no other weights may ship.
        shipping["int8"] = _int8_file(
            context, context.ship, audible, folder, "pruned", quantised.model
        )
    shipped = shipping.get("int8", quantised.artifact)
    told = check_runtime(context.whole, path, context.job.shipped_runtime)
    notes = (*told, *quantised.report.lines(), *_notes_of(context, shipped, "pruned int8"))
    x = context.inputs(context.job.loaded.dataset.development, PARITY_SAMPLES)
    return files.model_copy(
        update={
            "int8": quantised.artifact,
            "shipping": shipping,
            "built_in_agreement": _built_in_agreement(context, path, x),
            "notes": (*files.notes, *notes),
            "quantised": quantised.report,
            "sparse": {
                **files.sparse,
                **_sparse_counts(context, model, "int8", folder / shipped.path),
            },
        }
    )


def refusal(context: Context, error: EdgepruneError) -> str:
    """Why an INT8 file was refused, in one line, where the target allows FP32 in its place; said to the user too.

    Raises:
        EdgepruneError: the error itself, where the target allows nothing else or the file is not what is wrong.
    """
    is_of_file = isinstance(error, FormatError) and not isinstance(error, MissingTool)
    if isinstance(error, Refusal):
        is_of_file = error.kind == "load"
    if not is_of_file or "fp32" not in context.job.target.precisions:
        raise error
    why = "".join(c for c in " ".join(error.message.split()) if c.isprintable())[:MAX_REASON]
    context.progress.say(f"      warning: INT8 was refused: {why}")
    return why


def require_int8(artifact: Artifact, file: Path, float_layers: tuple[str, ...] = ()) -> None:
    """Raise unless a file that ships as INT8 passes what a reader of its bundle asks of one.

    Args:
        artifact: its record.
        file: where it lies.
        float_layers: names of the layers that were left in float on purpose.

    Raises:
        FormatError: too much of it is in float, or a layer that should be is not.
    """
    try:
        require_eight_bits(artifact, model_bytes(file), float_layers)
    except IntegrityError as error:
        raise FormatError(
            f"{file.name} cannot ship as INT8: {error.message}",
            hint="set precisions: [fp32] in the target, which ships the FP32 file",
        ) from error


def _not_int8(context: Context, artifact: Artifact, folder: Path) -> tuple[str, ...]:
    """Why the dense net cannot ship as INT8, known now, where the search would take hours.

    Raises:
        FormatError: it cannot, and the target allows nothing else.
    """
    allowed = context.job.target.precisions
    if "int8" not in allowed:
        return ()
    try:
        require_int8(artifact, folder / artifact.path)
    except FormatError as error:
        if "fp32" not in allowed:
            raise
        return (error.message,)
    return ()


def _sparse_counts(
    context: Context, model: nn.Module, precision: Precision, file: Path
) -> dict[Precision, tuple[int, int]]:
    """What :func:`_sparse` counts, by precision; empty where that was not asked for."""
    counts = _sparse(context, model, file)
    return {} if counts is None else {precision: counts}


def _sparse(context: Context, model: nn.Module, file: Path) -> tuple[int, int] | None:
    """How many layers of a file are 2:4 sparse, and how many have weights; ``None`` where that was not asked for.

    Raises:
        FormatError: a layer is sparse in the model and not in the file.
    """
    if context.job.loaded.workload.recovery.sparsity == "none":
        return None
    named = {n: has_pattern(layer.weight) for n, layer in weighted(model).items()}
    found = named
    if isinstance(context.ship, ShowsSparsity):
        found = context.ship.sparse_layers(file)
    lost = [name for name, is_sparse in named.items() if is_sparse and not found.get(name, True)]
    if lost or not any(found.values()):
        raise FormatError(
            f"{file.name} must have the 2:4 sparse weights of the model, but {(lost or ['every layer'])[0]} has not",
            hint="leave sparsity out, and report this model",
        )
    return sum(found.values()), len(found)
