"""The story: from a resolved job to a verified bundle and a report. Every step's result lies in the run folder.

::

    dense files -> dense latency -> variant -> kernel table -> whole nets -> importance -> plan (measured)
        -> prune + compensate -> recover -> export + quantise -> measure all four -> judge -> bundle + report
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import edgeprune
from edgeprune import formats, planning, records, report, stages, verdict
from edgeprune.bundle.manifest import Facts, Latency, Provenance, Quality, RuntimeNeed
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.compress.structure import layer_widths, work
from edgeprune.devices.board import Board, open_board
from edgeprune.errors import FormatError
from edgeprune.planning import MeasuredNets, MeasuredTable, PlanResult, Stand
from edgeprune.progress import Progress
from edgeprune.results import Artifact, PruningPlan, Report, StageCost
from edgeprune.runfolder import RunFolder, Stage
from edgeprune.specs import Device, Target
from edgeprune.stages import Context, Job

GOLDEN_SAMPLES = 16
PACKAGES = (
    "torch", "torch-pruning", "numpy", "litert-torch", "ai-edge-quantizer", "ai-edge-litert",
    "onnx", "onnxruntime", "onnxscript", "paramiko", "pydantic", "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What is known before any training: dense figures, the plan, and how it was found."""

    dense: Stage[stages.DenseFiles]
    latency: Stage[stages.DenseLatency]
    table: Stage[MeasuredTable]
    plan: Stage[PlanResult]


@dataclass(frozen=True)
class Outcome:
    """The end of a deployment."""

    report: Report
    folder: Path


def run_digest(job: Job) -> str:
    """What tells one run from another: the model, the data, every setting, and the device."""
    workload = job.loaded.workload
    return records.digest_of(
        {
            "version": edgeprune.__version__,
            "model": job.loaded.model_digest,
            "data": job.loaded.dataset.digest,
            "preprocess": job.loaded.preprocess,
            "target": job.target,
            "device": [job.device_name, job.device.model_dump(mode="json")],
            "budget": job.budget,
            "max_drop": job.max_drop,
            "importance": job.importance,
            "recovery": workload.recovery,
            "seed": job.seed,
        }
    )


@contextlib.contextmanager
def opened(job: Job, progress: Progress) -> Iterator[Context]:
    """The context of a job, with its boards open: the device, and this machine as host.

    Raises:
        FormatError: no module for the target's format exists yet.
        DeviceError: the device cannot be reached, or lacks the runtime.
    """
    check_format(job.target)
    form = formats.load(job.target.format)
    torch.manual_seed(job.seed)
    with contextlib.ExitStack() as stack:
        board: Board = stack.enter_context(open_board(job.device_name, job.device))
        host = board
        if job.device.transport != "local":
            local = Device(transport="local", targets=(job.target.name,), stand_in=True)
            host = stack.enter_context(open_board("this-machine", local))
        board.fingerprint(job.target.runtime.name, job.target.runtime.threads)
        yield Context(job=job, form=form, board=board, host=host, progress=progress)


def check_format(target: Target) -> None:
    """Nothing, when this version can write the target's format.

    Raises:
        FormatError: it cannot yet.
    """
    if target.format not in formats.names():
        raise FormatError(
            f"target {target.name} needs the format {target.format}, which this version cannot write yet",
            hint=f"formats of this version: {', '.join(formats.names())}",
        )


def deploy(job: Job, run_path: Path, progress: Progress) -> Outcome:
    """Run every stage that has not run yet, and write the bundle and the report.

    Args:
        job: the resolved request.
        run_path: the run folder; stages found in it with the same inputs are kept.
        progress: where to report.

    Returns:
        The report; ``report.passed`` says whether every gate was met.

    Raises:
        BudgetError: the budget is below what any structure reaches; found before training.
        ModelError, FormatError, DeviceError, SpecError: see the stages.
    """
    with RunFolder(run_path, progress) as run:
        records.write_json(request(job), run_path / "run.json")
        with run.timed("opening the device", "other"):
            stack = contextlib.ExitStack()
            context = stack.enter_context(opened(job, progress))
        with stack:
            planned = plan_stages(context, run)
            return _finish(context, run, planned)


class Request(records.Record):
    """``run.json``: the request, for people and for ``--resume``."""

    schema_version: int = 1
    command: str
    model: str
    target: str
    device: str
    budget: str
    max_drop: float
    seed: int
    digest: str


def request(job: Job) -> Request:
    """The record of a request."""
    return Request(
        command=job.command,
        model=job.loaded.workload.model,
        target=job.target.name,
        device=job.device_name,
        budget=job.budget.text,
        max_drop=job.max_drop,
        seed=job.seed,
        digest=run_digest(job),
    )


def plan_stages(context: Context, run: RunFolder) -> Planned:
    """Everything before training. See :func:`deploy`."""
    job, say = context.job, context.progress.say
    base = {
        "model": job.loaded.model_digest,
        "data": job.loaded.dataset.digest,
        "preprocess": job.loaded.preprocess,
        "format": job.target.format,
        "quantization": job.target.quantization,
        "versions": versions(),
        "seed": job.seed,
    }
    say(f"[1/8] pre-flight: export the dense model and compare it with torch ({job.target.format})")
    dense = run.stage(
        "dense", "conversion", base, stages.DenseFiles, lambda f: stages.dense_files(context, f)
    )
    device = {"device": [job.device_name, job.device], "runtime": job.target.runtime}
    device["device"] = [job.device_name, job.device.model_dump(mode="json")]
    say(f"[2/8] dense latency on {job.device_name}")
    latency = run.stage(
        "dense-latency",
        "measuring",
        {"dense": dense.digest, **device, "precisions": list(job.target.precisions)},
        stages.DenseLatency,
        lambda _: stages.dense_latency(context, dense.result, dense.folder),
    )
    precision = latency.result.precision
    for m in latency.result.measurements.values():
        say(f"      dense {m.precision}: {m.median_ms:.4g} ms")
    variant = run.stage(
        "variant",
        "conversion",
        {"dense": dense.digest, "precision": precision},
        stages.VariantFile,
        lambda f: stages.variant_file(context, precision, f),
    )
    artifact = dense.result.int8 if precision == "int8" else dense.result.fp32
    file = stages.resizable(
        context,
        dense.path(artifact.path),
        variant.path(variant.result.artifact.path),
        variant.result.widths,
    )
    stand = Stand(context.board, job.target.runtime, precision)
    groups, frozen = context.groups
    say(f"[3/8] kernel times of {len(groups)} channel groups, {precision}")
    for entry in frozen:
        say(f"      kept whole: {', '.join(entry.layers[:2])}: {entry.reason}")
    table = run.stage(
        "kernels",
        "measuring",
        {"latency": latency.digest, "variant": variant.digest},
        MeasuredTable,
        lambda _: planning.measure_table(
            stand,
            file,
            groups,
            fingerprint_key=latency.result.fingerprint.key(),
            format_name=context.job.target.format,
            progress=context.progress,
        ),
    )
    nets = run.stage(
        "nets",
        "measuring",
        {"kernels": table.digest},
        MeasuredNets,
        lambda _: planning.measure_nets(stand, file, table.result.grids, seed=job.seed),
    )
    planning.check_budget(job.budget, nets.result)
    say(f"[4/8] importance of every channel ({job.importance})")
    scores = run.stage(
        "importance",
        "other",
        {"kernels": table.digest, "importance": job.importance, "data": job.loaded.dataset.digest},
        stages.ScoresResult,
        lambda f: stages.score(context, table.result.grids, f),
    )
    say(f"[5/8] search: {job.budget.text}, checked on the device")
    plan = run.stage(
        "plan",
        "measuring",
        {"nets": nets.digest, "importance": scores.digest, "budget": job.budget},
        PlanResult,
        lambda _: stages.plan_structure(
            context, stand, file, table.result, nets.result, scores.result
        ),
    )
    chosen = min(
        (c for c in plan.result.checks if c.widths == plan.result.plan.widths()),
        key=lambda c: c.ratio_high,
    )
    say(
        f"      {chosen.ratio_to_dense:.1%} of dense measured, {chosen.predicted_ms:.4g} ms predicted,"
        f" {chosen.measured_ms:.4g} ms measured"
    )
    return Planned(dense, latency, table, plan)


def _finish(context: Context, run: RunFolder, planned: Planned) -> Outcome:
    job, say = context.job, context.progress.say
    plan = planned.plan.result.plan
    say("[6/8] prune, compensate, heal by distillation")
    pruned = run.stage(
        "prune",
        "other",
        {"plan": planned.plan.digest},
        stages.PrunedResult,
        lambda f: stages.prune(context, plan, f),
    )
    _say_ledger(context, pruned.result.entries)
    recovered = run.stage(
        "recover",
        "training",
        {
            "prune": pruned.digest,
            "recovery": job.loaded.workload.recovery,
            "seed": job.seed,
            "threads": torch.get_num_threads(),
        },
        stages.RecoveredResult,
        lambda f: stages.heal(context, plan, pruned.path("compensated.safetensors"), f),
    )
    _say_ledger(context, (recovered.result.entry,))
    say("[7/8] export, quantise, measure on the device")
    model = stages.with_weights(
        stages.pruned_model(context, plan), recovered.path("recovered.safetensors")
    )
    files = run.stage(
        "export",
        "conversion",
        {"recover": recovered.digest},
        stages.PrunedFiles,
        lambda f: stages.pruned_files(context, model, f),
    )
    four: dict[str, tuple[Path, Artifact]] = {
        "dense-fp32": (
            planned.dense.path(planned.dense.result.fp32.path),
            planned.dense.result.fp32,
        ),
        "dense-int8": (
            planned.dense.path(planned.dense.result.int8.path),
            planned.dense.result.int8,
        ),
        "pruned-fp32": (files.path(files.result.fp32.path), files.result.fp32),
        "pruned-int8": (files.path(files.result.int8.path), files.result.int8),
    }
    final = run.stage(
        "final-latency",
        "measuring",
        {"export": files.digest, "latency": planned.latency.digest},
        stages.FinalLatency,
        lambda _: stages.final_latency(context, four),
    )
    finish = _Finish(context, run, planned, pruned, recovered, files, four, final, model)
    return finish.judge_and_write()


def _say_ledger(context: Context, entries: tuple[Any, ...]) -> None:
    for entry in entries:
        context.progress.say(f"      {entry.stage}: {entry.metric} {entry.value:.2%}")


@dataclass(frozen=True)
class _Finish:
    """The last step: quality, gates, bundle, report."""

    context: Context
    run: RunFolder
    planned: Planned
    pruned: Stage[stages.PrunedResult]
    recovered: Stage[stages.RecoveredResult]
    files: Stage[stages.PrunedFiles]
    four: Mapping[str, tuple[Path, Artifact]]
    final: Stage[stages.FinalLatency]
    model: nn.Module

    def judge_and_write(self) -> Outcome:
        """Decide what ships, write the report and the bundle."""
        context, job = self.context, self.context.job
        context.progress.say("[8/8] verify, judge, bundle")
        quality = self.run.stage(
            "quality",
            "measuring",
            {"export": self.files.digest, "final": self.final.digest},
            stages.FinalQuality,
            lambda _: stages.final_quality(context, self.four, where=job.device_name),
        )
        measured = verdict.Measured(
            measurements=self.final.result.measurements,
            comparisons=self.final.result.comparisons,
            quality=quality.result.by_variant,
            metric=quality.result.metric,
            artifacts={name: artifact for name, (_, artifact) in self.four.items()},
        )
        choice = verdict.choose(measured, job.budget, job.max_drop, job.target.precisions)
        shipped = f"pruned-{choice.precision}"
        test = self.run.stage(
            "test",
            "measuring",
            {"artifact": self.four[shipped][1].sha256, "data": job.loaded.dataset.digest},
            stages.TestQuality,
            lambda _: stages.test_quality(context, self.four[shipped][0]),
        )
        gates = (
            verdict.latency_gate(measured, job.budget, choice.precision),
            verdict.quality_gate(measured, job.max_drop, choice.precision),
            verdict.numerics_gate(
                quality.result.device_agreement[choice.precision],
                self.files.result.built_in_agreement if choice.precision == "int8" else 1.0,
            ),
        )
        found = self._report(measured, choice, gates, quality.result, test.result)
        with self.run.timed("bundle and report", "other"):
            folder = self.run.path / "bundle"
            self._write(found, folder, self.four[shipped])
        found = found.model_copy(update={"stages": tuple(self.run.costs)})
        self._write_reports(found)
        return Outcome(found, self.run.path)

    def _report(
        self,
        measured: verdict.Measured,
        choice: verdict.Choice,
        gates: tuple[Any, ...],
        quality: stages.FinalQuality,
        test: stages.TestQuality,
    ) -> Report:
        job, planned = self.context.job, self.planned
        fingerprint = planned.latency.result.fingerprint
        plan: PruningPlan = planned.plan.result.plan
        example = torch.from_numpy(self.context.example)
        dense_entry = self.context.entry("dense", self.context.reference)
        ledger = (
            dense_entry,
            *self.pruned.result.entries,
            self.recovered.result.entry,
            *(e for e in quality.entries if e.precision == choice.precision),
        )
        sizes = {"dense": work(self.context.model, example), "pruned": work(self.model, example)}
        return Report(
            edgeprune_version=edgeprune.__version__,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=job.command,
            model=job.loaded.workload.model,
            target=job.target.name,
            profile=job.profile.name,
            device=job.device_name,
            stamp=fingerprint.stamp,
            fingerprint=fingerprint,
            budget=job.budget.text,
            limit_ms=job.budget.limit_ms(
                measured.measurements[f"dense-{choice.precision}"].median_ms
            ),
            shipped=choice.precision,
            shipped_reason=choice.reason,
            gates=gates,
            passed=all(g.met for g in gates),
            headline=verdict.headline(measured, choice.precision, gates),
            variants=verdict.rows(measured, sizes),
            comparisons=tuple(measured.comparisons),
            measurements=dict(measured.measurements),
            ledger=ledger,
            plan=plan,
            layer_widths=layer_widths(self.context.model, self.model),
            checks=planned.plan.result.checks,
            latency_model=planned.plan.result.quality,
            pareto=planned.plan.result.pareto,
            test_quality=test.values,
            test_n=test.n,
            stages=tuple(self.run.costs),
            peak_memory_bytes=peak_memory_bytes(),
            versions=versions(),
            settings=_settings(job, self.recovered.result),
            notes=(*job.loaded.notes, *self.run.notes, *self._notes()),
            bundle="bundle",
        )

    def _notes(self) -> Iterator[str]:
        if self.recovered.result.interrupted:
            yield "the recovery was interrupted; the best epoch so far was kept"
        if self.context.is_host:
            yield "host and device are the same machine; each file was run once"

    def _write(self, found: Report, folder: Path, shipped: tuple[Path, Artifact]) -> None:
        context, job = self.context, self.context.job
        path, artifact = shipped
        raw = job.loaded.dataset.development.head(GOLDEN_SAMPLES)
        x = context.development[: len(raw)].numpy()
        answers = context.run_file(context.host, path, x).numpy()
        row = next(
            r for r in found.variants if (r.variant, r.precision) == ("pruned", found.shipped)
        )
        dense = next(r for r in found.variants if (r.variant, r.precision) == ("dense", "fp32"))
        labels = job.loaded.labels or tuple(f"class {i}" for i in range(job.loaded.n_classes))
        write_bundle(
            folder,
            Facts(
                name=bundle_name(job),
                edgeprune_version=edgeprune.__version__,
                target=job.target.name,
                profile=job.profile.name,
                failed_gates=tuple(g.name for g in found.gates if not g.met),
                runtime=RuntimeNeed(
                    name=job.target.runtime.name,
                    min_version=found.fingerprint.runtime_version,
                    threads=job.target.runtime.threads,
                ),
                preprocess=job.loaded.preprocess,
                labels=labels,
                quality=Quality(
                    metric=found.ledger[-1].metric,
                    split="development",
                    n=found.ledger[-1].n,
                    dense=dense.quality,
                    shipped=row.quality,
                ),
                latency=Latency(
                    device=job.device_name,
                    fingerprint_key=found.fingerprint.key(),
                    stamp=found.stamp,
                    median_ms=row.median_ms,
                    p90_ms=row.p90_ms,
                    limit_ms=found.limit_ms,
                    budget=found.budget,
                ),
                provenance=Provenance(
                    seed=job.seed,
                    data_digest=job.loaded.dataset.digest,
                    model_digest=job.loaded.model_digest,
                    plan_digest=records.digest_of(found.plan),
                    command=job.command,
                ),
            ),
            Payload(
                model=artifact,
                model_file=path,
                golden_inputs=np.ascontiguousarray(raw.x),
                golden_outputs=answers,
                report_html=report.render_html(found),
                report_json=records.to_json(found),
            ),
        )

    def _write_reports(self, found: Report) -> None:
        records.write_json(found, self.run.path / "report.json")
        records.write_bytes(self.run.path / "report.html", report.render_html(found))


def bundle_name(job: Job) -> str:
    """The bundle's name: the model's file stem and the target, in lower case."""
    stem = Path(job.loaded.workload.model.split(":")[0]).stem.lower()
    plain = "".join(c if c.isalnum() else "-" for c in stem).strip("-") or "model"
    return f"{plain}-{job.target.name}"


def _settings(
    job: Job, recovered: stages.RecoveredResult
) -> dict[str, str | int | float | bool | None]:
    recovery = job.loaded.workload.recovery
    return {
        "seed": job.seed,
        "importance": job.importance,
        "max_drop": job.max_drop,
        "threads on the device": job.target.runtime.threads,
        "calibration samples": job.target.quantization.calibration_samples,
        "recovery epochs": recovery.epochs,
        "recovery epochs run": recovered.epochs_run,
        "recovery epoch kept": recovered.best_epoch,
        "recovery learning rate": recovery.learning_rate,
        "recovery batch size": recovery.batch_size,
        "training threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of every package that shapes the result; absent ones are left out."""
    found = {"python": platform.python_version(), "edgeprune": edgeprune.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory_bytes() -> int:
    """Largest resident memory of this process and of its largest child, added: an upper bound of what was held at once."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return int(own + children) * 1024


def stage_shares(costs: tuple[StageCost, ...]) -> dict[str, float]:
    """Seconds by kind of work."""
    shares: dict[str, float] = {}
    for cost in costs:
        shares[cost.kind] = shares.get(cost.kind, 0.0) + cost.seconds
    return shares
