"""The stages of a deployment, one function each: the context and earlier records in, a new record and files out.

The order stands in :mod:`edgeprune.pipeline.run`. Nothing here prints; nothing here decides whether the result is good enough
(:mod:`edgeprune.pipeline.stages.gates` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from edgeprune.compress.evaluate import quality
from edgeprune.compress.groups.find import ChannelGroup, remove_channels
from edgeprune.compress.heal.recover import recover
from edgeprune.compress.scores import importance
from edgeprune.compress.size import work
from edgeprune.compress.structure_loss import AfterHealing, AfterRepair, trial_settings
from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import compare, measure
from edgeprune.devices.timing.report_tier import measure_report, report_options
from edgeprune.devices.timing.sustained import sustained
from edgeprune.formats import Resizable
from edgeprune.pipeline.context import NOT_RUN, Context
from edgeprune.pipeline.files.records import (
    DenseFiles,
    DenseLatency,
    FinalLatency,
    FinalQuality,
    RecoveredResult,
    TestQuality,
)
from edgeprune.plan import bench, guarantee
from edgeprune.plan.basis import Basis
from edgeprune.plan.measured import MeasuredNets, MeasuredTable, ScoresResult
from edgeprune.plan.net_model import fit, kernel_model
from edgeprune.records.artifact import Artifact
from edgeprune.records.files import write_bytes
from edgeprune.records.measurement import SustainedRun
from edgeprune.records.names import Precision
from edgeprune.records.plan import PlanResult
from edgeprune.records.report import LedgerEntry
from edgeprune.records.workload import Recovery
from edgeprune.workload.answers import logits
from edgeprune.workload.dataset import model_input
from edgeprune.workload.memory import quick_input
from edgeprune.workload.modes import in_eval

SCORE_SAMPLES = 1024
CURVE_SAMPLES, FEWEST_CURVE_SAMPLES = 1024, 96
# Multiply-accumulates that all evaluations of all curves may take together, as long as the fewest samples allow it. A group has about two
# of them, and each runs about three times through the net.
CURVE_MACS = 4e12
EMULATED_SAMPLES = 64  # under qemu one float32 inference of a small net takes about a second


def dense_latency(context: Context, files: DenseFiles, folder: Path) -> DenseLatency:
    """Time dense FP32 and dense INT8 in the same rounds; the faster one is the precision to search in."""
    runtime = context.runtime_on(context.board)
    pair = {"fp32": files.fp32, "int8": files.int8}
    models = [context.model_file(p, folder / a.path, a) for p, a in pair.items()]
    found = context.stamped(
        measure(
            context.board,
            models,
            runtime=runtime.name,
            threads=runtime.threads,
            plan=SEARCH,
            purpose="dense",
        )
    )
    allowed: list[Precision] = [p for p in ("int8", "fp32") if p in context.job.target.precisions]
    if files.int8_refused:
        # A refusal is only kept where FP32 may ship: the plan is made for what will.
        allowed = ["fp32"]
    faster = min(context.precisions(allowed), key=lambda p: found[p].median_ms)
    fingerprint = context.fingerprint(runtime)
    return DenseLatency.model_validate(
        {"fingerprint": fingerprint, "measurements": found, "precision": faster}
    )


def score(
    context: Context,
    grids: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    groups: Sequence[ChannelGroup],
) -> ScoresResult:
    """Score every channel of a model on training data and calibrate the cost of every width on the selection split."""
    data = context.job.loaded.dataset
    function = importance.BY_NAME[context.job.importance]
    x = quick_input(model, torch.from_numpy(context.inputs(data.train, SCORE_SAMPLES)))
    with context.progress.bar("scoring channels", 1) as bar:
        scores = function(model, groups, x, context.job.seed)
        bar.advance(1)
    held = context.inputs(data.selection, curve_samples(model, groups, x[:1]))
    samples = quick_input(model, torch.from_numpy(held))
    curves = importance.cost_curves(
        model, groups, scores, grids, samples, progress=context.progress
    )
    return ScoresResult(
        scores={g: tuple(float(v) for v in s) for g, s in scores.items()},
        curves={g: tuple(float(v) for v in c) for g, c in curves.items()},
    )


def curve_samples(model: nn.Module, groups: Sequence[ChannelGroup], example: torch.Tensor) -> int:
    """How many samples the cost curves are calibrated on: fewer for a net that is large or has many groups."""
    _, macs = work(model, example)
    fitting = CURVE_MACS / max(1, 2 * len(groups) * 3 * macs)
    return int(min(CURVE_SAMPLES, max(FEWEST_CURVE_SAMPLES, fitting)))


def plan_basis(
    context: Context,
    file: Resizable,
    measured: MeasuredTable,
    nets: MeasuredNets,
    scores: ScoresResult,
) -> Basis:
    """What a plan of the dense model is made from."""
    groups, frozen = context.groups
    model = kernel_model(file, measured, context.full)
    model, fit_quality = fit(model, nets, measured.kernels_measured, measured.kernels_taken)
    arrays = {g: np.asarray(s) for g, s in scores.scores.items()}
    loss = structure_loss(context, context.model, groups)
    return Basis(
        groups=groups,
        frozen=frozen,
        model=model,
        nets=nets,
        quality=fit_quality,
        curves={g: np.asarray(c) for g, c in scores.curves.items()},
        orders=importance.removal_order(arrays),
        importance=context.job.importance,
        scope=context.job.scope,
        loss=loss,
        trial=structure_trial(context, loss),
    )


def structure_loss(
    context: Context, model: nn.Module, groups: Sequence[ChannelGroup]
) -> AfterRepair:
    """What a structure of a model really costs before training, on the selection split."""
    example = torch.from_numpy(context.example)
    n = curve_samples(model, groups, example)
    held = context.inputs(context.job.loaded.dataset.selection, n)
    return AfterRepair(model, groups, quick_input(model, torch.from_numpy(held)))


def structure_trial(context: Context, loss: AfterRepair) -> AfterHealing | None:
    """What a structure costs after a short healing, where one is affordable."""
    loaded = context.job.loaded
    train, recovery = loaded.dataset.train, loaded.workload.recovery
    _, macs = work(context.model, torch.from_numpy(context.example))
    settings = trial_settings(recovery, len(train), macs)
    if settings is None:
        return None
    return AfterHealing(
        loss,
        context.model,
        train,
        loaded.dataset.selection,
        settings,
        loaded.preprocess,
        context.job.seed,
    )


def plan_structure(
    context: Context, stand: bench.Stand, file: Resizable, basis: Basis
) -> PlanResult:
    """Solve for the budget and check the solution on the device until it fits; a plan that is given is only checked."""
    budget, widths, progress = context.job.budget, context.job.widths, context.progress
    if widths is not None:
        return guarantee.given_plan(stand, file, basis, widths, budget=budget, progress=progress)
    return guarantee.make_plan(stand, file, basis, budget=budget, progress=progress)


def pruned_model(
    context: Context, kept: Mapping[str, Sequence[int]], source: nn.Module | None = None
) -> nn.Module:
    """The model with these channels of each group, and their weights in ``source``, a model as large as the dense one (or that one)."""
    groups, _ = context.groups
    removed = {g.name: sorted(set(range(g.channels)) - set(kept[g.name])) for g in groups}
    return remove_channels(
        context.model if source is None else source,
        {g.name: g for g in groups},
        removed,
        torch.from_numpy(context.example),
    )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a state dict as safetensors, atomically."""
    # As bytes: the library's own writer has an error of its own for a full disk. As copies: it refuses tied weights.
    write_bytes(
        path, save({k: v.cpu().contiguous().clone() for k, v in model.state_dict().items()})
    )


def with_weights(model: nn.Module, path: Path) -> nn.Module:
    """The model with the weights of a stage."""
    model.load_state_dict(load_file(path))
    return in_eval(model)


def heal(
    context: Context,
    student: nn.Module,
    folder: Path,
    *,
    recovery: Recovery,
    seed: int,
) -> RecoveredResult:
    """Distil the dense model into a pruned one."""
    data = context.job.loaded.dataset
    result = recover(
        student,
        context.model,
        data.train,
        data.selection,
        recovery,
        preprocess=context.job.loaded.preprocess,
        seed=seed,
        checkpoint=folder / ".checkpoint",
        progress=context.progress,
    )
    save_weights(result.model, folder / "recovered.safetensors")
    found = logits(result.model, context.development)
    return RecoveredResult(
        entry=context.entry("recovered", found, note=f"epoch {result.best_epoch:g}"),
        epochs_run=float(result.epochs_run),
        best_epoch=float(result.best_epoch),
        interrupted=result.interrupted,
    )


def final_latency(context: Context, files: Mapping[str, tuple[Path, Artifact]]) -> FinalLatency:
    """All four files interleaved in the same rounds of several sessions, dense beside pruned in the same precision.

    The files are ``dense-fp32``, ``dense-int8``, ``pruned-fp32`` and, unless it was refused, ``pruned-int8``.
    """
    runtime = context.runtime_on(context.board)
    models = [context.model_file(name, path, artifact) for name, (path, artifact) in files.items()]
    found = context.stamped(
        measure_report(
            context.board,
            models,
            runtime=runtime.name,
            threads=runtime.threads,
            purpose="final",
            **report_options(context.board.device.report),
        )
    )
    pairs = [
        ("pruned-fp32", "dense-fp32"),
        ("pruned-int8", "dense-int8"),
        ("dense-int8", "dense-fp32"),
        ("pruned-int8", "dense-fp32"),
    ]
    return FinalLatency(
        measurements=found,
        comparisons=tuple(compare(found[a], found[b]) for a, b in pairs if a in found),
    )


def sustained_latency(context: Context, name: str, path: Path, artifact: Artifact) -> SustainedRun:
    """One file run without a pause for as long as the request says."""
    runtime, seconds = context.runtime_on(context.board), context.job.sustained
    if seconds is None:
        raise ValueError("a sustained run must have a duration")
    return sustained(
        context.board,
        context.model_file(name, path, artifact),
        runtime=runtime.name,
        threads=runtime.threads,
        seconds=seconds,
        progress=context.progress,
    )


def final_quality(
    context: Context, files: Mapping[str, tuple[Path, Artifact]], *, where: str
) -> FinalQuality:
    """Quality of the four files on the host, and the ledger's last lines for both pruned files.

    An emulated device answers the first samples only: enough to see whether its kernels compute what the host's do. The host's quality
    is judged then.
    """
    x = context.development.numpy()
    asked = x[:EMULATED_SAMPLES] if context.proof.hello()["emulated"] else x
    found = {name: context.run_file(context.host, path, x) for name, (path, _) in files.items()}
    entries: list[LedgerEntry] = []
    agreement: dict[str, float] = {}
    for precision in context.job.target.precisions:
        if f"pruned-{precision}" not in files:
            continue  # its INT8 file was refused
        path, _ = files[f"pruned-{precision}"]
        host = found[f"pruned-{precision}"]
        if precision == "int8" and context.whole.info.built_in_kernels:
            plain = context.run_file(context.host, path, x, delegate=False)
            place = "host, built-in kernels"
            entries.append(context.entry("quantised", plain, precision=precision, where=place))
        elif precision == "int8":
            entries.append(context.entry("quantised", host, precision=precision, where="host"))
        entries.append(context.entry("exported", host, precision=precision, where="host"))
        on_device = host if context.is_host else context.run_file(context.proof, path, asked)
        same = on_device.argmax(1) == host[: len(on_device)].argmax(1)
        agreement[precision] = float(same.double().mean())
        note = "this machine is the device" if context.is_host else ""
        if not context.runs_ship:
            note = f"{NOT_RUN}: answers are of the {context.form.info.name} file of the same net"
        entries.append(
            context.entry("on-device", on_device, precision=precision, where=where, note=note)
        )
    qualities = {name: context.entry("exported", logits_) for name, logits_ in found.items()}
    # What is judged is what the device answered.
    by_variant = {name: entry.value for name, entry in qualities.items()}
    for entry in entries:
        if entry.stage == "on-device" and entry.n == len(x):
            by_variant[f"pruned-{entry.precision}"] = entry.value
    return FinalQuality(
        by_variant=by_variant,
        metric=entries[-1].metric,
        entries=tuple(entries),
        device_agreement=agreement,
    )


def test_quality(context: Context, shipped: Path) -> TestQuality:
    """Read the test split once: for the dense model, and for the shipped file on the host."""
    split = context.job.loaded.dataset.test
    if split is None:
        return TestQuality(values={}, n=0)
    x = model_input(split.x, context.job.loaded.preprocess)
    dense = logits(context.model, torch.from_numpy(x))
    found = context.run_file(context.host, shipped, x)
    values = {
        "dense": quality(dense, split.y, dense)[1],
        "shipped": quality(found, split.y, dense)[1],
    }
    return TestQuality(values=values, n=len(split))
