"""What a deployment gives the app that ships its file: labels, preprocessing, the lines that Xcode and a README show, an FP32 twin."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeprune.bundle.manifest import Judged, Latency, Quality
from edgeprune.bundle.write import FloatTwin
from edgeprune.compress.evaluate import quality
from edgeprune.errors import FormatError
from edgeprune.formats import AppFacts, Evaluated, ForApps, Format
from edgeprune.pipeline.context import Context, Job
from edgeprune.pipeline.files.records import PrunedFiles
from edgeprune.pipeline.run_folder import Stage
from edgeprune.records.report import Report, VariantRow
from edgeprune.report import facts
from edgeprune.report.figures import printable

WORKED_OUT_SAMPLES = 256
MAX_REASON = 1000  # characters of a line in a manifest


def labels_of(job: Job) -> tuple[str, ...]:
    """One label for each output, each on one line; ``class 0``, ``class 1`` ... where the user named none."""
    named = tuple(
        "".join(c if c.isprintable() else " " for c in label) for label in job.loaded.labels or ()
    )
    return named or tuple(f"class {i}" for i in range(job.loaded.n_classes))


def app_facts(job: Job) -> AppFacts:
    """What the files of a job say to an app."""
    workload = job.loaded.workload
    what = f"{workload.model}, made for {job.target.name} by edgeprune; classifies into {job.loaded.n_classes} classes"
    return AppFacts(
        preprocess=job.loaded.preprocess,
        labels=labels_of(job),
        description=what,
        author=workload.author or "",
        license=workload.license or "",
        version=workload.version or "",
        int8_scheme=next(iter(job.profile.int8_schemes), ""),
        outputs=job.loaded.outputs,
        compute_units=job.target.compute_units or "ALL",
        notes={
            "target": job.target.name,
            "profile": job.profile.name,
            "data": job.loaded.dataset.digest,
        },
    )


def bundle_name(job: Job) -> str:
    """The bundle's name: the model's file stem and the target, as plain lower-case ASCII."""
    stem = Path(job.loaded.workload.model.split(":")[0]).stem
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9]+", "-", ascii_stem).strip("-") or "model"
    return f"{plain[:30].rstrip('-')}-{job.target.name}"[:63]


def for_app(form: Format, job: Job) -> Format:
    """The format, with the facts of a job in its files where they have a place for them."""
    return form.for_app(app_facts(job)) if isinstance(form, ForApps) else form


@dataclass(frozen=True)
class WorkedOut:
    """Answers of a file that nothing here runs, worked out from what is in it: evidence of the file, never a run.

    ``answers`` are ``float32 [n, K]`` of the first development samples; ``note`` says how good they are.
    """

    answers: np.ndarray
    note: str


def worked_out(context: Context, file: Path) -> WorkedOut | None:
    """The answers of the shipped file, where it cannot be run here and its format can be worked out; else ``None``."""
    form = context.ship
    if context.runs_ship or not isinstance(form, Evaluated):
        return None
    n = min(WORKED_OUT_SAMPLES, len(context.development))
    try:
        answers = form.evaluate(file, context.development[:n].numpy())
    except FormatError as error:
        context.progress.say(f"      note: {error.message}")
        return None
    y = context.job.loaded.dataset.development.y
    known = None if y is None else y[:n]
    metric, value = quality(torch.from_numpy(answers), known, context.reference[:n])
    _, dense = quality(context.reference[:n], known, context.reference[:n])
    return WorkedOut(
        answers,
        f"the {form.info.name} file that ships, worked out operation by operation on this host (not run):"
        f" {metric} {value:.2%} on {n} development samples, dense {dense:.2%}",
    )


def float_twin(
    context: Context, files: Stage[PrunedFiles], found: Report, x: np.ndarray
) -> FloatTwin | None:
    """The pruned net in FP32 beside an INT8 file, where the board builds FP16 from it; else ``None``.

    A target that allows no ``fp32`` gets none, nor one whose FP32 file loses more than the request allows: what the board keeps for its
    speed must be as good as what was promised.

    Args:
        context: of the deployment.
        files: the pruned net as files.
        found: the report.
        x: the golden samples as the torch model sees them, ``float32 [n, ...]``.
    """
    job = context.job
    wanted = context.ship.info.half_engines and "fp32" in job.target.precisions
    if not wanted or found.shipped != "int8" or not context.runs_ship:
        return None
    rows = {(row.variant, row.precision): row.quality for row in found.variants}
    dense, shipped = rows["dense", "fp32"], rows["pruned", "fp32"]
    if dense - shipped > job.max_drop + 1e-12:
        context.progress.say("      note: no FP32 file in the bundle: it loses too much itself")
        return None
    artifact = files.result.shipped("fp32")
    path = files.path(artifact.path)
    entry = found.ledger[-1]
    return FloatTwin(
        model=artifact,
        model_file=path,
        golden_outputs=context.run_file(context.host, path, x).numpy(),
        quality=Quality(
            metric=entry.metric, split="development", n=entry.n, dense=dense, shipped=shipped
        ),
    )


def latency_of(found: Report, row: VariantRow) -> Latency:
    """What a bundle says of the latency of the file that ships, whose row it is: with what was judged, and any doubt about times."""
    gate = facts.latency_gate(found)
    judged = None
    if gate is not None and gate.low is not None and gate.high is not None:
        judged = Judged(
            value=gate.value, low=gate.low, high=gate.high, limit=gate.limit, unit=gate.unit
        )
    return Latency(
        device=found.device,
        fingerprint_key=found.fingerprint.key(),
        stamp=found.stamp,
        median_ms=row.median_ms,
        p90_ms=row.p90_ms,
        limit_ms=found.limit_ms,
        budget=found.budget,
        judged=judged,
        unreliable=tuple(printable(why)[:MAX_REASON] for why in facts.unreliable(found)),
    )
