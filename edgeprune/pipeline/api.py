"""The functions behind the command line, for use from Python: requests resolved once, then run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from edgeprune.compress.heal import two_of_four
from edgeprune.compress.scores import importance as importances
from edgeprune.devices.link.recording import as_recorded
from edgeprune.devices.link.wait import WAIT_MINUTES, wait_seconds
from edgeprune.errors import SpecError, UnknownName
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import Context, FormatCandidate, Job, stand_in_runtime
from edgeprune.pipeline.options import (
    Options,
    check_paths,
    check_sparsity,
    check_tables,
    chosen_device,
    chosen_formats,
    chosen_gates,
    chosen_scope,
    chosen_sustained,
    chosen_target,
    given_widths,
    is_auto,
)
from edgeprune.pipeline.profile import profile as profile_context
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.search_result import plan_file, search_result
from edgeprune.pipeline.stages.finish import Outcome, Planned
from edgeprune.pipeline.stages.kernels import plan_stages
from edgeprune.progress import Progress, Silent
from edgeprune.records import catalog
from edgeprune.records.base import parse, read_json
from edgeprune.records.device import Device
from edgeprune.records.files import write_bytes, write_json
from edgeprune.records.plan import PlanResult, SearchResult
from edgeprune.records.report import ProfileReport, Report
from edgeprune.records.target import Target
from edgeprune.records.workload import Preprocess, Workload
from edgeprune.report.search_page import render_search_html
from edgeprune.workload.load import LoadedWorkload, from_objects, load_workload
from edgeprune.workload.sample_counts import require_enough


def resolve(loaded: LoadedWorkload, options: Options) -> Job:
    """A request with every choice made: flag, then ``edgeprune.yaml``, then the target file, then the default.

    Raises:
        SpecError: no target was named, a budget is malformed, or the target has no kernels for the sparsity.
        UnknownName: a target, profile, device, importance or scope that does not exist, or a format that the target does not list.
        ModelError: sparsity is asked for, and no layer of the model can have it.
        IntegrityError: the file of kernel times is damaged.
    """
    workload = loaded.workload
    check_paths(options)
    target = chosen_target(options, workload)
    profile = catalog.profile(target.profile)
    check_sparsity(workload, target)
    check_tables(options)
    if workload.recovery.sparsity != "none":
        two_of_four.require_eligible(loaded.model)  # known now, where the search would take minutes
    device_name, device, notes = chosen_device(options, workload, target)
    if device.transport == "local" and target.name == catalog.THIS_MACHINE:
        device = device.model_copy(update={"stand_in": False})  # it is the real thing
    device = as_recorded(device)
    # A recording holds what one board answered, so that board works alone.
    is_alone = options.record is not None or device.transport == "replay"
    companions = () if is_alone else catalog.companions_for(target.name, device_name, device)
    io = workload.int8.io or target.quantization.io
    candidates = [_candidate(t, device, notes) for t in chosen_formats(options, workload, target)]
    first = candidates[0]
    if options.importance not in importances.BY_NAME:
        raise UnknownName("importance", options.importance, importances.BY_NAME)
    budget, max_drop = chosen_gates(options, workload, target)
    return Job(
        loaded=loaded,
        target=first.target,
        profile=profile,
        device_name=device_name,
        device=device,
        budget=budget,
        max_drop=max_drop,
        importance=options.importance,
        scope=chosen_scope(options),
        seed=workload.seed if options.seed is None else options.seed,
        command=options.command,
        notes=first.notes,
        sustained=chosen_sustained(options),
        record=options.record,
        companions=companions,
        widths=given_widths(options, target.name),
        tables=options.tables,
        int8=workload.int8.model_copy(update={"io": io}),
        for_runtime=first.for_runtime,
        candidates=tuple(candidates) if is_auto(options, workload) else (),
        wait_s=wait_seconds(options.wait),
    )


def _candidate(target: Target, device: Device, notes: tuple[str, ...]) -> FormatCandidate:
    """A target as it is timed on a device; says which runtime stands in for its own, where one does."""
    runtime = stand_in_runtime(target.runtime, device)
    if runtime == target.runtime:
        return FormatCandidate(target, target.runtime.name, notes)
    instead = f"{runtime.name} stands in for {target.runtime.name}, which is for boards only"
    changed = target.model_copy(update={"runtime": runtime})
    return FormatCandidate(changed, target.runtime.name, (*notes, instead))


def run_path(job: Job, options: Options) -> Path:
    """The run folder: the one to resume, the one named, or ``runs/<target>-<digest>``.

    Raises:
        SpecError: the folder to resume is no run, or not one of this request.
    """
    digest = pipeline.run_digest(job)
    if options.resume is None:
        return options.run or Path("runs") / f"{job.target.name}-{digest}"
    if not (options.resume / "run.json").is_file():
        raise SpecError(
            f"{options.resume} is no run folder: it has no run.json",
            hint="leave --resume out to start a new run",
        )
    found = read_json(pipeline.RunRequest, options.resume / "run.json")
    if found.digest != digest:
        raise SpecError(
            f"{options.resume} is a run of other inputs: {found.command}",
            hint="give the same model, data and settings, or start a new run",
        )
    return options.resume


def deploy_loaded(loaded: LoadedWorkload, options: Options, progress: Progress) -> Outcome:
    """Deploy a workload that is loaded. Raises as :func:`deploy`."""
    job = resolve(loaded, options)
    return pipeline.deploy(job, run_path(job, options), progress)


def deploy(
    model: nn.Module | str,
    data: Any,
    *,
    target: str,
    latency: str | float | None = None,
    max_drop: str | float | None = None,
    device: str | None = None,
    weights: str | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    task: Literal["classify"] | None = None,
    settings: Workload | None = None,
    importance: str = "fisher",
    scope: str = "global",
    seed: int | None = None,
    run: Path | str | None = None,
    sustained: str | None = None,
    formats: str | None = None,
    tables: Path | str | None = None,
    plan: Path | str | None = None,
    wait: float = WAIT_MINUTES,
    progress: Progress | None = None,
) -> Report:
    """From a trained model to a verified bundle, to a measured latency budget.

    Args:
        model: a trained module, or ``file.py:factory``.
        data: a mapping of split to ``(x, y)`` or ``x``, one ``(x, y)``, one ``x``, an image folder, an ``.npz``, or ``file.py:factory``.
        target: name of a target, or path of a target file.
        latency: ``15ms``, ``60%`` or ``2.5x``, or a number below 1: 0.6 is ``60%``; the default stands in the target file.
        max_drop: allowed drop against the dense model, such as ``1%`` or the number 0.01.
        device: name in ``devices.yaml``; without one, the first that can time the target, else this machine as a stand-in.
        weights: safetensors or a plain state dict, for a factory.
        preprocess: how raw samples become the model's input.
        labels: class names.
        task: what the model is for; needed where the data has neither labels nor class names.
        settings: recovery, augmentation and the rest of ``edgeprune.yaml``.
        importance: ``fisher``, ``hessian``, ``taylor``, ``obs``, ``variance``, ``l2``, ``l1``, ``bn-scale``, ``fpgm`` or ``random``.
        scope: ``global`` compares channels between groups; ``local`` only within each, and every group keeps the same share of its own.
        seed: of everything random.
        run: the run folder; ``runs/<target>-<digest>`` when not given. Finished stages in it are kept.
        sustained: ``10min``, ``90s`` or ``1h``: run the shipped file that long without a pause, and judge the latency at its end.
        formats: ``auto`` measures those that the target lists and ships the fastest that holds; a name ships that one.
        tables: a file of kernel times of this board; what it holds is not timed again, what is timed is added.
        plan: a ``plan.json`` of ``edgeprune search``, whose widths are taken instead of searching.
        wait: minutes for a board that another client holds; 0 does not wait.
        progress: where to report; nowhere when not given.

    Returns:
        The report: ``passed`` says whether every gate was judged and met, ``folder`` is the run folder, ``bundle`` the bundle in it.

    Raises:
        SpecError, ModelError, DeviceError, FormatError, BudgetError: see :mod:`edgeprune.errors`.
    """
    options = Options(
        target=target, latency=latency, max_drop=max_drop, device=device, importance=importance,
        scope=scope, seed=seed, run=_path(run), sustained=sustained, formats=formats,
        tables=_path(tables), plan=_path(plan), wait=wait,
    )  # fmt: skip
    loaded = _loaded(model, data, settings, weights, _given(preprocess, labels, task))
    return deploy_loaded(loaded, options, progress or Silent()).report


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _loaded(
    model: nn.Module | str,
    data: Any,
    settings: Workload | None,
    weights: str | None,
    given: dict[str, Any],
) -> LoadedWorkload:
    """The workload of a module or of a factory that is named; what was given goes before the settings."""
    if not isinstance(model, str):
        return from_objects(model, data, settings=settings, **given)
    if not isinstance(data, (str, os.PathLike)):
        raise SpecError(
            f"data must be a path where the model is named, as {model} is, but is {type(data).__name__}",
            hint="give the module itself with arrays: deploy(build(), data, ...)",
        )
    named = {"model": model, "data": str(data)}
    record = settings or parse(Workload, named, where="deploy()")
    changes = {"model": model, "weights": weights, "data": str(data), **given}
    return load_workload(record.model_copy(update=changes), Path.cwd())


def _given(
    preprocess: Preprocess | None, labels: Sequence[str] | None, task: str | None
) -> dict[str, Any]:
    """The fields of a workload that were given, to be put over those of the settings."""
    fields = {
        "preprocess": preprocess,
        "labels": None if labels is None else tuple(labels),
        "task": task,
    }
    return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def _context(loaded: LoadedWorkload, options: Options, progress: Progress) -> Iterator[Context]:
    with pipeline.opened(resolve(loaded, options), progress, for_planning=False) as context:
        yield context


def profile_loaded(loaded: LoadedWorkload, options: Options, progress: Progress) -> ProfileReport:
    """Dense latency and the time of every kernel. Raises as :func:`deploy`."""
    with _context(loaded, options, progress) as context:
        return profile_context(context)


@contextlib.contextmanager
def _planned(
    loaded: LoadedWorkload, options: Options, progress: Progress
) -> Iterator[tuple[Context, Planned, Path]]:
    """All stages before training, in the run folder that ``deploy`` would go on with."""
    job = resolve(loaded, options)
    path = run_path(job, options)
    require_enough(loaded.dataset)
    with RunFolder(path, progress) as run, pipeline.opened(job, progress, run) as context:
        write_json(pipeline.request(job), path / "run.json")
        yield context, plan_stages(context, run), path


def plan_loaded(
    loaded: LoadedWorkload, options: Options, progress: Progress
) -> tuple[PlanResult, Path]:
    """The measured plan without any training, and the run folder that ``deploy`` would go on with. Raises as :func:`deploy`."""
    with _planned(loaded, options, progress) as (_, planned, path):
        return planned.plan.result, path


def search_loaded(
    loaded: LoadedWorkload, options: Options, progress: Progress
) -> tuple[SearchResult, Path]:
    """The measured plan and what else was possible, without any training; written into the run folder that ``deploy`` would go on with.

    The folder gets ``search.json`` (the result), ``search.html`` (the same as a page) and ``plan.json``, which ``deploy --plan`` reads.
    Raises as :func:`deploy`.
    """
    with _planned(loaded, options, progress) as (context, planned, path):
        found = search_result(context, planned)
        write_json(found, path / "search.json")
        write_json(plan_file(found), path / "plan.json")
        write_bytes(path / "search.html", render_search_html(found))
    return found, path
