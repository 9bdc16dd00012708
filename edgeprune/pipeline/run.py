"""The story: from a resolved job to a verified bundle and a report. Every step's result lies in the run folder.

::

    dense files -> dense latency -> variant -> kernel table -> whole nets -> importance -> plan (measured)
        -> prune + compensate -> recover -> export + quantise -> measure all four -> judge -> bundle + report
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune import formats
from edgeprune.compress.heal.recover import STATE_VERSION
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.store import MeasurementStore
from edgeprune.errors import Busy, DeviceError, LinkLost, SpecError, Unreachable
from edgeprune.pipeline import allocator, format_choice
from edgeprune.pipeline.app import for_app
from edgeprune.pipeline.context import Context, Job
from edgeprune.pipeline.files import export
from edgeprune.pipeline.files.records import (
    FinalLatency,
    PrunedFiles,
    PrunedResult,
    RecoveredResult,
)
from edgeprune.pipeline.options import check_format
from edgeprune.pipeline.run_folder import RunFolder, Stage
from edgeprune.pipeline.stages import measure, static_checks, steps
from edgeprune.pipeline.stages.finish import Closing, Outcome, Planned
from edgeprune.pipeline.stages.kernels import plan_stages
from edgeprune.progress import Progress
from edgeprune.records.artifact import Artifact
from edgeprune.records.base import Record
from edgeprune.records.device import Device
from edgeprune.records.files import digest_of, sha256_file, write_json
from edgeprune.records.formats import FormatFacts
from edgeprune.records.version import VERSION
from edgeprune.workload.sample_counts import require_enough

STORE = "measurements.sqlite"


def run_digest(job: Job) -> str:
    """What tells one run from another: the model, the data, every setting, and the device."""
    workload = job.loaded.workload
    return digest_of(
        {
            "version": VERSION,
            "model": job.loaded.model_digest,
            "data": job.loaded.dataset.digest,
            "preprocess": job.loaded.preprocess,
            "target": job.target,
            "device": job.device_key(),
            "budget": job.budget,
            "max_drop": job.max_drop,
            "importance": job.importance,
            "recovery": workload.recovery,
            "seed": job.seed,
            "sustained": job.sustained,
            "int8": job.int8,
            "scope": job.scope,
            "widths": job.widths,
            "formats": [c.target for c in job.candidates],
            "earlier": job.loaded.earlier_digest,
        }
    )


@contextlib.contextmanager
def opened(
    job: Job, progress: Progress, run: RunFolder | None = None, *, for_planning: bool = True
) -> Iterator[Context]:
    """The context of a job, with its boards open: the device, and this machine as host.

    Where measuring decides about the format, that is done here, and the context is one in the format that ships.

    In a run folder every timing is stored before it is used, so that a killed run repeats only the one that it was in. A run that is
    recorded measures all afresh: a recording must hold what the replay will be asked. Memory of large tensors stays with the process from
    here on (:mod:`edgeprune.pipeline.allocator`).

    Args:
        job: the resolved request.
        progress: where to report.
        run: the folder of the run, when there is one.
        for_planning: times must mean something, so those of an emulated device are not taken: this machine is timed in its place.

    Raises:
        SpecError: the run was measured before, and a recording that begins now would miss those times.
        FormatError, ModelError: as :func:`edgeprune.pipeline.stages.static_checks.check`, before any board is asked for.
        DeviceError: the device cannot be reached, or lacks the runtime; another client holds it for longer than ``job.wait_s``.
    """
    check_format(job.target)
    if job.record is not None and not job.record.exists() and run is not None and run.has_stages:
        raise SpecError(
            f"{run.path} was measured without a recording, and {job.record} would miss those times",
            hint="record a new run: name its folder with --run",
        )
    allocator.keep_large_blocks()
    for note in (*job.loaded.notes, *job.notes):
        progress.say(f"note: {note}")
    early = None
    # Else they were made once, and are where a stage is made anew.
    if run is None or not run.has_stages:
        early = static_checks.check(job, for_planning=for_planning)
    with contextlib.ExitStack() as stack:
        with run.timed("opening the device", "other") if run else contextlib.nullcontext():
            boards = _boards(stack, job, progress, run, for_planning=for_planning)
            is_open = run is not None and bool(job.candidates)
            context = None if is_open else _context(job, boards, progress, early)
        if context is None and run is not None:
            context = format_choice.chosen(job, run, lambda j: _context(j, boards, progress, early))
        assert context is not None
        yield context


@dataclass(frozen=True)
class _Boards:
    """The device of a job, the board whose times count, and this machine."""

    device: Board
    board: Board
    host: Board


def _boards(
    stack: contextlib.ExitStack,
    job: Job,
    progress: Progress,
    run: RunFolder | None,
    *,
    for_planning: bool,
) -> _Boards:
    """Open what a job needs; the stack closes it."""
    store = None
    if run is not None and job.record is None:
        store = stack.enter_context(MeasurementStore(run.path / STORE))
        run.notes.extend(store.notes)
    purpose = f"deploy for {job.target.name}"
    device: Board = stack.enter_context(
        open_board(
            job.device_name,
            job.device,
            wait_s=job.wait_s,
            job=purpose,
            say=progress.say,
            record=job.record,
            store=store,
        )
    )
    if device.origin is not None:
        progress.say(f"note: {device.notes[0]}")
    board = host = device
    is_replaced = for_planning and device.hello()["emulated"]
    if job.device.transport != "local":
        local = Device(transport="local", targets=(job.target.name,), stand_in=True)
        host = stack.enter_context(
            open_board(
                "this-machine",
                local,
                exclusive=is_replaced,
                wait_s=job.wait_s,
                job=purpose,
                say=progress.say,
                store=store,
            )
        )
    return _Boards(device, host if is_replaced else board, host)


def _context(
    job: Job,
    opened_boards: _Boards,
    progress: Progress,
    early: static_checks.HostSide | None = None,
) -> Context:
    """The context of a job whose format is decided, on boards that are open; ``early`` is what was worked out before them.

    Raises:
        FormatError: no module for the format exists yet.
        DeviceError: a board lacks the runtime.
    """
    check_format(job.target)
    ship = for_app(formats.load(job.target.format), job)
    form = formats.load(ship.info.twin) if ship.info.twin else ship
    torch.manual_seed(job.seed)
    device, board, host = opened_boards.device, opened_boards.board, opened_boards.host
    if ship.info.system and not job.device.stand_in and not device.hello()["emulated"]:
        _require(device, job, ship.info)
    boards = {id(b): b for b in (device, board)}.values()
    context = Context(
        job=job,
        form=form,
        ship=ship,
        board=board,
        proof=device,
        host=host,
        progress=progress,
        runs_ship=form is ship or _all_have(job.target.runtime.name, (*boards, host)),
    )
    if early is not None:
        context.share(early)
    for opened_board in boards:
        runtime = context.runtime_on(opened_board)
        opened_board.fingerprint(runtime.name, runtime.threads)
    for note in context.notes:
        progress.say(f"note: {note}")
    return context


def _require(device: Board, job: Job, info: FormatFacts) -> None:
    """Raise unless a board that was named for a target runs its files; a board that cannot must not be taken for a stand-in in silence.

    Raises:
        DeviceError: it does not; says what it is instead.
    """
    try:
        device.runtime_version(job.target.runtime.name)
    except (LinkLost, Unreachable, Busy):
        raise
    except DeviceError as error:
        raise DeviceError(
            f"device {device.name!r} cannot time the target {job.target.name}: {error.message}",
            hint=f"name a {info.system} with {info.name} tools, or a stand-in such as this-machine",
        ) from error


def _all_have(runtime: str, boards: Iterable[Board]) -> bool:
    """Whether every board can run the files of a runtime."""
    try:
        for board in boards:
            board.runtime_version(runtime)
    except (LinkLost, Unreachable, Busy):
        raise
    except DeviceError:
        return False
    return True


def deploy(job: Job, run_path: Path, progress: Progress) -> Outcome:
    """Run every stage that has not run yet, and write the bundle and the report.

    Args:
        job: the resolved request.
        run_path: the run folder; stages found in it with the same inputs are kept.
        progress: where to report.

    Returns:
        The report; ``report.passed`` says whether every gate was judged and met.

    Raises:
        BudgetError: the budget is below what any structure reaches; found before training.
        ModelError: a split has too few samples; found before anything is opened.
        ModelError, FormatError, DeviceError, SpecError: see the stages.
    """
    require_enough(job.loaded.dataset)
    with RunFolder(run_path, progress) as run:
        write_json(request(job), run_path / "run.json")
        with opened(job, progress, run) as context:
            planned = plan_stages(context, run)
            return _finish(context, run, planned)


class RunRequest(Record):
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


def request(job: Job) -> RunRequest:
    """The record of a request."""
    return RunRequest(
        command=job.command,
        model=job.loaded.workload.model,
        target=job.target.name,
        device=job.device_name,
        budget=job.budget.text,
        max_drop=job.max_drop,
        seed=job.seed,
        digest=run_digest(job),
    )


def _finish(context: Context, run: RunFolder, planned: Planned) -> Outcome:
    job, say = context.job, context.progress.say
    say("[6/8] prune, compensate, heal by distillation")
    last = steps.earlier_steps(context, run, planned)
    planned = last.planned
    pruned = run.stage(
        "prune",
        "other",
        steps.prune_inputs(context, last),
        PrunedResult,
        lambda f: steps.prune(context, last, f),
    )
    _say_ledger(context, pruned.result.entries)
    recovered = _recover(context, run, last, pruned)
    _say_ledger(context, (recovered.result.entry,))
    run.notes.extend(filter(None, [steps.note(last, job.loaded.workload.recovery)]))
    say("[7/8] export, quantise, measure on the device")
    model = measure.with_weights(
        measure.pruned_model(context, last.kept), recovered.path("recovered.safetensors")
    )
    limit_ms = job.budget.limit_ms(planned.latency.result.measurements["int8"].median_ms)
    files = run.stage(
        "export",
        "conversion",
        {
            "weights": sha256_file(recovered.path("recovered.safetensors")),
            "recover": recovered.digest,
            "int8": job.int8,
            "limit_ms": limit_ms,
        },
        PrunedFiles,
        lambda f: export.pruned_files(context, model, f, limit_ms=limit_ms),
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
    }
    if files.result.int8 is not None:
        four["pruned-int8"] = (files.path(files.result.int8.path), files.result.int8)
    final = run.stage(
        "final-latency",
        "measuring",
        {"export": files.digest, "latency": planned.latency.digest},
        FinalLatency,
        lambda _: measure.final_latency(context, four),
    )
    closing = Closing(
        context,
        run,
        planned,
        pruned,
        recovered,
        files,
        four,
        final,
        model,
        earlier_epochs=last.earlier_epochs,
    )
    return closing.judge_and_write()


def _recover(
    context: Context, run: RunFolder, last: steps.LastStep, pruned: Stage[PrunedResult]
) -> Stage[RecoveredResult]:
    job = context.job

    def work(folder: Path) -> RecoveredResult:
        start = pruned.path("compensated.safetensors")
        student = measure.with_weights(measure.pruned_model(context, last.kept), start)
        return steps.heal(context, student, folder, recovery=last.recovery, seed=job.seed)

    return run.stage(
        "recover",
        "training",
        {
            "prune": pruned.digest,
            "recovery": job.loaded.workload.recovery,
            "version": STATE_VERSION,
            "seed": job.seed,
            "threads": torch.get_num_threads(),
        },
        RecoveredResult,
        work,
        final=lambda result: not result.interrupted,
    )


def _say_ledger(context: Context, entries: tuple[Any, ...]) -> None:
    for entry in entries:
        context.progress.say(f"      {entry.stage}: {entry.metric} {entry.value:.2%}")
