"""Which integer types a file ships with: every variant of the dense net is timed on the board, and the fastest that holds is taken.

Unsigned or signed activations, one weight scale or one for each channel: onnxruntime has kernels for all of them, and which are fast
depends on the processor, so no rule of thumb decides.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import compare, measure
from edgeprune.errors import FormatError
from edgeprune.formats import HasVariants, Variant
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files.records import TypesRow
from edgeprune.records.artifact import Artifact
from edgeprune.workload.answers import logits

SAMPLES = 256
HOLDS = 0.01  # how far below the best agreement of all variants one may be


@dataclass(frozen=True)
class Chosen:
    """The format with the types that ship, the file in them, and how every variant did."""

    form: Variant
    artifact: Artifact
    rows: tuple[TypesRow, ...]

    def note(self) -> str:
        """One line for the report: what was taken, and what the others would have been."""
        parts = [
            f"{row.name} {row.median_ms:.4g} ms, {row.agreement:.1%}{'' if row.holds else ' (does not hold)'}"
            for row in self.rows
        ]
        return f"INT8 types by measurement: {self.form.variant}; time and agreement with torch: {'; '.join(parts)}"


def is_open(context: Context) -> bool:
    """Whether there is something to choose: the files may be INT8, and their format leaves a choice."""
    has_choice = bool(_variants(context)) and not context.has_twin
    return has_choice and "int8" in context.job.target.precisions


def _variants(context: Context) -> tuple[Variant, ...]:
    return context.form.variants() if isinstance(context.form, HasVariants) else ()


def restore(context: Context, name: str) -> None:
    """Let the context write files in the types that were chosen, which a finished stage names; nothing for an empty name."""
    if name:
        form = next(form for form in _variants(context) if form.variant == name)
        context.form = context.ship = form


def choose(context: Context, fp32: Path, target: Path) -> Chosen:
    """Quantise a dense file in the other variants, time all in the same rounds on the board, and keep one at ``target``.

    A variant takes the place of the default only when the whole interval of its ratio is below 1, so that noise changes nothing.

    Args:
        context: its board times the files, and its formats become those of the types that are chosen.
        fp32: the dense float file.
        target: its INT8 file in the first variant. A variant that cannot be written is left out.
    """
    variants = _variants(context)
    paths = {variants[0].variant: target}
    artifacts = {variants[0].variant: context.form.describe(target)}
    for number, form in enumerate(variants[1:], 1):
        path = target.with_name(f"types-{number}{target.suffix}")
        with contextlib.suppress(FormatError):
            artifacts[form.variant] = form.quantize(fp32, context.calibration, path)
            paths[form.variant] = path
    rows = _rows(context, paths, artifacts)
    default = rows[0]
    faster = [row for row in rows if row.holds and row.ratio_high < 1]
    best = min(faster, key=lambda row: row.ratio) if faster else default
    if not default.holds and not faster:
        best = max(rows, key=lambda row: row.agreement)
    form = next(form for form in variants if form.variant == best.name)
    paths[best.name].replace(target)
    for path in {*paths.values()} - {target, paths[best.name]}:
        path.unlink()
    context.form = context.ship = form
    return Chosen(form, context.ship.describe(target), rows)


def _rows(
    context: Context, paths: dict[str, Path], artifacts: dict[str, Artifact]
) -> tuple[TypesRow, ...]:
    runtime = context.runtime_on(context.board)
    x = context.inputs(context.job.loaded.dataset.selection, SAMPLES)
    expected = logits(context.model, torch.from_numpy(x)).argmax(1)
    agreement = {
        name: float(
            (context.run_file(context.board, path, x).argmax(1) == expected).double().mean()
        )
        for name, path in paths.items()
    }
    found = measure(
        context.board,
        [context.model_file(name, path, artifacts[name]) for name, path in paths.items()],
        runtime=runtime.name,
        threads=runtime.threads,
        plan=SEARCH,
        purpose="int8-types",
    )
    least = max(agreement.values()) - HOLDS
    rows = []
    for measured in found:
        ratio = None if measured is found[0] else compare(measured, found[0])
        rows.append(
            TypesRow(
                name=measured.name,
                median_ms=measured.median_ms,
                ratio=1.0 if ratio is None else ratio.ratio,
                ratio_high=1.0 if ratio is None else ratio.high,
                agreement=agreement[measured.name],
                holds=agreement[measured.name] >= least,
            )
        )
    return tuple(rows)
