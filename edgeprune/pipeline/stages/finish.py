"""The last step of a deployment: quality, gates, the report and the bundle."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from edgeprune import report
from edgeprune.bundle.manifest import Facts, Provenance, Quality, RuntimeNeed, created_text
from edgeprune.bundle.repro import Repro, git_state, repro_files, scrub
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.compress.plain_source import model_source
from edgeprune.compress.pruned_file import save_pruned
from edgeprune.compress.size import layer_widths, work
from edgeprune.errors import ModelError
from edgeprune.formats import Resizable, golden_file
from edgeprune.pipeline.app import (
    WorkedOut,
    bundle_name,
    float_twin,
    labels_of,
    latency_of,
    worked_out,
)
from edgeprune.pipeline.context import Context, Job
from edgeprune.pipeline.files.records import (
    DenseFiles,
    DenseLatency,
    FinalLatency,
    FinalQuality,
    PrunedFiles,
    PrunedResult,
    RecoveredResult,
    TestQuality,
)
from edgeprune.pipeline.run_folder import RunFolder, Stage
from edgeprune.pipeline.stages import gates as verdict
from edgeprune.pipeline.stages import measure
from edgeprune.pipeline.stages import precision as shipping
from edgeprune.plan.bench import Stand
from edgeprune.plan.measured import MeasuredNets, MeasuredTable, ScoresResult
from edgeprune.records.artifact import Artifact
from edgeprune.records.files import digest_of, to_json, write_bytes, write_json
from edgeprune.records.formats import all_facts, runtime_facts
from edgeprune.records.measurement import SustainedRun
from edgeprune.records.names import Precision
from edgeprune.records.plan import PlanResult, PruningPlan
from edgeprune.records.report import Gate, Report
from edgeprune.records.sparsity import SparseWeights
from edgeprune.records.version import VERSION
from edgeprune.workload.sample_counts import coarse_note

GOLDEN_SAMPLES = 16
PRUNED_FILE, SOURCE_FILE = "pruned.safetensors", "pruned.py"
PACKAGES = ("torch", "torch-pruning", "numpy", "paramiko", "pydantic", "safetensors")


@dataclass(frozen=True)
class Prepared:
    """What every budget shares: the dense files and their latency, the kernel table, whole nets.

    ``file`` is the dense file in the precision of the search, as one that takes any widths, on ``stand``.
    """

    dense: Stage[DenseFiles]
    latency: Stage[DenseLatency]
    stand: Stand
    file: Resizable
    table: Stage[MeasuredTable]
    nets: Stage[MeasuredNets]


@dataclass(frozen=True)
class Planned(Prepared):
    """What is known before any training: how every channel was scored, and the plan that was found."""

    scores: Stage[ScoresResult]
    plan: Stage[PlanResult]


@dataclass(frozen=True)
class Outcome:
    """The end of a deployment."""

    report: Report
    folder: Path


@dataclass(frozen=True)
class Closing:
    """The last step: quality, gates, bundle, report."""

    context: Context
    run: RunFolder
    planned: Planned
    pruned: Stage[PrunedResult]
    recovered: Stage[RecoveredResult]
    files: Stage[PrunedFiles]
    four: Mapping[str, tuple[Path, Artifact]]
    final: Stage[FinalLatency]
    model: nn.Module
    earlier_epochs: float = 0.0  # of the steps before the last

    def judge_and_write(self) -> Outcome:
        """Decide what ships, write the report and the bundle."""
        context, job = self.context, self.context.job
        context.progress.say("[8/8] verify, judge, bundle")
        quality = self.run.stage(
            "quality",
            "measuring",
            {
                "export": self.files.digest,
                "final": self.final.digest,
                "proof": [context.proof.name, context.proof.device.model_dump(mode="json")],
            },
            FinalQuality,
            lambda _: measure.final_quality(context, self.four, where=context.proof.name),
        )
        measured = verdict.Measured(
            measurements=self.final.result.measurements,
            comparisons=self.final.result.comparisons,
            quality=quality.result.by_variant,
            metric=quality.result.metric,
            artifacts={name: artifact for name, (_, artifact) in self.four.items()},
        )
        choice = shipping.choose(context, self.files, measured, quality.result)
        if choice.refused:
            context.progress.say(f"      note: {choice.refused}")
        shipped = f"pruned-{choice.precision}"
        measured = replace(measured, sustained=self._sustained(shipped))
        test = self.run.stage(
            "test",
            "measuring",
            {"artifact": self.four[shipped][1].sha256, "data": job.loaded.dataset.digest},
            TestQuality,
            lambda _: measure.test_quality(context, self.four[shipped][0]),
        )
        gates: tuple[Gate, ...] = (
            verdict.latency_gate(measured, job.budget, choice.precision),
            verdict.quality_gate(measured, job.max_drop, choice.precision),
            shipping.numerics(context, self.files.result, quality.result, choice.precision),
        )
        if not context.runs_ship:
            gates = tuple(verdict.of_twin(g, context.form.info.name) for g in gates)
        artifact = self.files.result.shipped(choice.precision)
        evidence = worked_out(context, self.files.path(artifact.path))
        found = self._report(measured, choice, gates, quality.result, test.result)
        if evidence is not None:
            found = found.model_copy(update={"notes": (*found.notes, evidence.note)})
        with self.run.timed("bundle and report", "other"):
            folder = self.run.path / "bundle"
            self._write(found, folder, self.four[shipped][0], evidence)
            save_pruned(self.model, self.run.path / PRUNED_FILE, self.context.job.loaded.model)
            self._write_source()
        found = found.model_copy(update={"stages": tuple(self.run.costs)})
        self._write_reports(found)
        return Outcome(found, self.run.path)

    def _write_source(self) -> None:
        """The pruned net as plain PyTorch, where its forward pass can be traced."""
        job, path = self.context.job, self.run.path / SOURCE_FILE
        title = f"{job.loaded.workload.model}, pruned for {job.target.name}."
        try:
            text = model_source(self.model, title)
        except ModelError as error:
            path.unlink(missing_ok=True)  # of an earlier plan
            self.context.progress.say(f"      note: no {SOURCE_FILE}: {error.message}")
            return
        write_bytes(path, text.encode())

    def _sustained(self, name: str) -> SustainedRun | None:
        """The sustained run of the file that ships, where one was asked for."""
        seconds, (path, artifact) = self.context.job.sustained, self.four[name]
        if seconds is None:
            return None
        self.context.progress.say(f"      {name} without a pause for {seconds:g} s")
        return self.run.stage(
            "sustained",
            "measuring",
            {"artifact": artifact.sha256, "final": self.final.digest, "seconds": seconds},
            SustainedRun,
            lambda _: measure.sustained_latency(self.context, name, path, artifact),
        ).result

    def _report(
        self,
        measured: verdict.Measured,
        choice: verdict.Choice,
        gates: tuple[Any, ...],
        quality: FinalQuality,
        test: TestQuality,
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
        sparsity = self._sparsity(choice.precision)
        return Report(
            edgeprune_version=VERSION,
            created=created_text(),
            command=job.command,
            model=job.loaded.workload.model,
            target=job.target.name,
            profile=job.profile.name,
            device=self.context.board.name,
            stamp=fingerprint.stamp,
            fingerprint=fingerprint,
            budget=job.budget.text,
            limit_ms=job.budget.limit_ms(
                measured.measurements[f"dense-{choice.precision}"].median_ms
            ),
            shipped=choice.precision,
            shipped_reason=choice.reason,
            why_fp32=choice.refused or None,
            gates=gates,
            passed=all(g.met for g in gates),
            headline=verdict.headline(measured, choice.precision, gates),
            variants=verdict.rows(measured, sizes),
            comparisons=tuple(measured.comparisons),
            measurements=dict(measured.measurements),
            sustained=measured.sustained,
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
            settings=_settings(job, self.recovered.result, self.earlier_epochs),
            notes=(
                *(*job.loaded.notes, *job.notes, *self.run.notes, *self._notes()),
                *([sparsity.line()] if sparsity else []),
            ),
            bundle="bundle",
            int8=self.files.result.quantised,
            formats=self.context.formats,
            sparsity=sparsity,
        )

    def _sparsity(self, precision: Precision) -> SparseWeights | None:
        """What the file that ships has of the pattern that was asked for."""
        pattern, context = self.context.job.loaded.workload.recovery.sparsity, self.context
        counts = self.files.result.sparse.get(precision)
        if pattern == "none" or counts is None:
            return None
        runtime = context.runtime_on(context.board)
        is_measured = context.fingerprint(runtime).stamp == "measured"
        uses_it = is_measured and runtime_facts(runtime.name).sparse_kernels
        return SparseWeights(
            pattern=pattern,
            layers=counts[0],
            of_layers=counts[1],
            speed="measured" if uses_it else "not run",
        )

    def _notes(self) -> Iterator[str]:
        yield from self.context.notes
        yield from self.context.prepared[1]
        yield from self.planned.dense.result.notes
        yield from self.files.result.notes
        yield from boards_note(self.planned.table.result)
        yield from data_notes(self.context)
        if self.recovered.result.interrupted:
            yield "the recovery was interrupted; the best epoch so far was kept"
        yield from self.context.board.notes
        if self.context.is_host:
            yield "host and device are the same machine; each file was run once"

    def _write(self, found: Report, folder: Path, asked: Path, evidence: WorkedOut | None) -> None:
        """The bundle; the golden answers are those of the file that ships: run here, else worked out, else those of its twin ``asked``."""
        context, job = self.context, self.context.job
        artifact = self.files.result.shipped(found.shipped)
        shown = for_bundle(found)
        raw = job.loaded.dataset.development.head(GOLDEN_SAMPLES)
        x = context.development[: len(raw)].numpy()
        answers = (
            context.run_file(context.host, asked, x).numpy()
            if evidence is None
            else evidence.answers[: len(raw)]
        )
        source: Literal["run", "worked-out", "twin"]
        source = "worked-out" if evidence else "run" if context.runs_ship else "twin"
        shipped_file = self.files.path(artifact.path)
        golden = golden_file(context.ship, shipped_file, x, answers)
        write_bundle(
            folder,
            self._facts(found, source),
            Payload(
                model=artifact,
                model_file=shipped_file,
                golden_inputs=np.ascontiguousarray(raw.x),
                golden_outputs=answers,
                report_html=report.render_html(shown),
                report_json=to_json(shown),
                repro=_repro(job, found),
                golden_model=golden,
                compute_units=job.target.compute_units or "ALL",
                float_twin=float_twin(context, self.files, found, x),
            ),
        )

    def _facts(self, found: Report, source: Literal["run", "worked-out", "twin"]) -> Facts:
        """What the bundle states; ``source`` is where its golden answers come from."""
        context, job = self.context, self.context.job
        row = next(
            r for r in found.variants if (r.variant, r.precision) == ("pruned", found.shipped)
        )
        dense = next(r for r in found.variants if (r.variant, r.precision) == ("dense", "fp32"))
        return Facts(
            name=bundle_name(job),
            edgeprune_version=VERSION,
            target=job.target.name,
            profile=job.profile.name,
            outputs=job.loaded.outputs,
            version=job.loaded.workload.version,
            kind=job.target.bundle,
            license=job.loaded.workload.license,
            sparsity=found.sparsity,
            float_layers=self.files.result.float_layers(found.shipped),
            why_fp32=found.why_fp32,
            failed_gates=tuple(g.name for g in found.gates if g.missed),
            not_run=tuple(g.name for g in found.gates if g.not_run),
            golden_source=source,
            runtime=RuntimeNeed(
                name=job.target.runtime.name,
                min_version=context.shipping_version(),
                threads=job.target.runtime.threads,
            ),
            preprocess=job.loaded.preprocess,
            labels=labels_of(job),
            quality=Quality(
                metric=found.ledger[-1].metric,
                split="development",
                n=found.ledger[-1].n,
                dense=dense.quality,
                shipped=row.quality,
            ),
            test=_test_quality(found),
            latency=latency_of(found, row),
            provenance=Provenance(
                seed=job.seed,
                data_digest=job.loaded.dataset.digest,
                model_digest=job.loaded.model_digest,
                plan_digest=digest_of(found.plan),
                command=scrub(job.command),
            ),
        )

    def _write_reports(self, found: Report) -> None:
        write_json(found, self.run.path / "report.json")
        write_bytes(self.run.path / "report.html", report.render_html(found))
        found.lies_in(self.run.path)


def for_bundle(found: Report) -> Report:
    """The report as it goes into a bundle: without what another run of the same command would change, and without local paths."""
    costs = tuple(s.model_copy(update={"cached": False}) for s in found.stages if s.kind != "other")
    changes = {"stages": costs, "peak_memory_bytes": 0, "command": scrub(found.command)}
    return found.model_copy(update=changes)


def _test_quality(found: Report) -> Quality | None:
    """Quality on the test split, where there was one."""
    values = found.test_quality
    if not found.test_n:
        return None
    return Quality(
        metric=found.ledger[-1].metric,
        split="test",
        n=found.test_n,
        dense=values["dense"],
        shipped=values["shipped"],
    )


def _repro(job: Job, found: Report) -> dict[str, bytes]:
    commit, changed = git_state(job.loaded.base)
    record = Repro(
        command=job.command,
        seed=job.seed,
        data_digest=job.loaded.dataset.digest,
        model_digest=job.loaded.model_digest,
        plan_digest=digest_of(found.plan),
        versions=found.versions,
        target=job.target.model_dump(mode="json"),
        git_commit=commit,
        git_changed=changed,
    )
    return repro_files(job.loaded.workload, record)


def data_notes(context: Context) -> tuple[str, ...]:
    """Warnings about what the development split can tell."""
    job = context.job
    coarse = coarse_note(len(job.loaded.dataset.development), job.max_drop)
    return tuple(filter(None, (chance_note(context), coarse)))


def chance_note(context: Context) -> str:
    """A warning when the dense model is hardly better than guessing; empty when it is fine or there are no labels."""
    entry = context.entry("dense", context.reference)
    guess = 1 / context.job.loaded.n_classes
    if entry.metric != "accuracy" or entry.value > 2 * guess:
        return ""
    return (
        f"the dense model is right on {entry.value:.1%} of the development split; guessing would give {guess:.1%}:"
        " check preprocess (mean, std, color), the order of the labels and the weights"
    )


def boards_note(table: MeasuredTable) -> tuple[str, ...]:
    """Lines about where kernel times come from, when not all were taken now, on one board."""
    taken = (table.taken(),) if table.kernels_taken else ()
    if len(table.boards) < 2:
        return taken
    parts = [
        f"{count} on {name}"
        + (f" (times {table.scales[name]:.4f})" if name in table.scales else "")
        for name, count in table.boards.items()
    ]
    return (
        *taken,
        f"kernels were timed on {len(parts)} boards: {', '.join(parts)};"
        " everything else was measured on the first alone",
    )


def _settings(
    job: Job, recovered: RecoveredResult, earlier_epochs: float
) -> dict[str, str | int | float | bool | None]:
    recovery = job.loaded.workload.recovery
    return {
        "seed": job.seed,
        "importance": job.importance,
        "importance scope": job.scope,
        "max_drop": job.max_drop,
        "threads on the device": job.target.runtime.threads,
        "calibration samples": job.target.quantization.calibration_samples,
        "recovery epochs": recovery.epochs,
        "recovery epochs run": earlier_epochs + recovered.epochs_run,
        "recovery epoch kept": recovered.best_epoch,
        "recovery learning rate": recovery.learning_rate,
        "recovery batch size": recovery.batch_size,
        "pruning steps": recovery.steps,
        "training starts from": recovery.start,
        **({} if recovery.sparsity == "none" else {"sparsity": recovery.sparsity}),
        "training threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of every package that shapes the result; absent ones are left out."""
    found = {"python": platform.python_version(), "edgeprune": VERSION}
    for name in (*PACKAGES, *(tool for facts in all_facts() for tool in facts.tools)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory_bytes() -> int:
    """Largest resident memory of this process and of its largest child, added: an upper bound of what was held at once."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return int(own + children) * 1024
