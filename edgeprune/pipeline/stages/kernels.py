"""Everything before training: the dense model as files, its latency, and a plan that was measured within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from edgeprune.devices.timing.pool import open_pool
from edgeprune.errors import DeviceError
from edgeprune.formats import Resizable
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import export, int8_types
from edgeprune.pipeline.files.records import DenseFiles, DenseLatency, VariantFile
from edgeprune.pipeline.run_folder import RunFolder, Stage
from edgeprune.pipeline.stages import measure
from edgeprune.pipeline.stages.finish import Planned, Prepared, data_notes, versions
from edgeprune.plan import certainty, guarantee
from edgeprune.plan.bench import Stand
from edgeprune.plan.latency.kernel_times import KernelTimes, read_times, write_times
from edgeprune.plan.latency.times_cache import SWITCH, TimesCache, now_text, open_cache
from edgeprune.plan.measured import MeasuredNets, MeasuredTable, ScoresResult
from edgeprune.plan.net_model import check_budget, measure_nets
from edgeprune.plan.table import measure_table, prior_steps
from edgeprune.records.formats import FormatName
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.plan import PlanResult


def prepare(context: Context, run: RunFolder) -> Prepared:
    """Export and measure; each stage is taken from the run folder if it is there.

    Raises:
        DeviceError: the device is emulated in software, so that its times mean nothing.
        SpecError: a plan was given that the model cannot have.
        ModelError, FormatError, DeviceError: see :mod:`edgeprune.pipeline.stages.measure`.
    """
    _check_times(context)
    if context.job.widths is not None:
        guarantee.check_given(context.job.widths, context.groups[0])
    dense = dense_stage(context, run)
    latency = _latency(context, run, dense)
    file, variant = _resizable(context, run, dense, latency)
    board = context.board
    kernel_runtime = context.kernel_runtime_on(board) if context.has_twin else None
    stand = Stand(
        board,
        context.runtime_on(board),
        latency.result.precision,
        kernel_runtime=kernel_runtime,
    )
    table = _table(context, run, latency, variant, stand, file)
    nets = run.stage(
        "nets",
        "measuring",
        # A table that was measured again, of a damaged run, may have other grids.
        {"kernels": table.digest, "grids": table.result.grids},
        MeasuredNets,
        lambda _: measure_nets(stand, file, table.result.grids, seed=context.job.seed),
    )
    return Prepared(dense, latency, stand, file, table, nets)


def plan_stages(context: Context, run: RunFolder) -> Planned:
    """Export, measure, search and check; each stage is taken from the run folder if it is there.

    Raises:
        BudgetError: the budget is below the fastest admissible latency, as measured.
        DeviceError, ModelError, FormatError: as :func:`prepare`.
    """
    ready = prepare(context, run)
    check_budget(context.job.budget, ready.nets.result)
    scores = _scores(context, run, ready.table)
    plan = _plan(context, run, ready, scores)
    return Planned(**vars(ready), scores=scores, plan=plan)


def _check_times(context: Context) -> None:
    runtime = context.runtime_on(context.board)
    if context.board.fingerprint(runtime.name, runtime.threads).stamp == "emulated":
        raise DeviceError(
            f"a plan needs times that mean something, but device {context.board.name!r} is emulated in software",
            hint="plan on a real board or on this machine; `edgeprune verify BUNDLE --device` works here",
        )


def dense_stage(context: Context, run: RunFolder, *, title: str = "") -> Stage[DenseFiles]:
    """The dense model as files, checked against torch; ``title`` as for :meth:`RunFolder.stage`.

    Raises:
        ModelError, FormatError, DeviceError: see :func:`edgeprune.pipeline.files.export.dense_files`.
    """
    job, say = context.job, context.progress.say
    say(f"[1/8] pre-flight: export the dense model and compare it with torch ({job.target.format})")
    inputs = {
        "model": job.loaded.model_digest,
        "data": job.loaded.dataset.digest,
        "preprocess": job.loaded.preprocess,
        "format": job.target.format,
        "quantization": job.target.quantization,
        "versions": versions(),
        "seed": job.seed,
        "whole": context.whole.info.name,
        "outputs": job.loaded.outputs,
        "io": job.int8.io,
        "avoid": job.profile.avoid_ops,
        "forbidden": job.profile.forbidden_ops,
    }
    if int8_types.is_open(context):  # then the board decides about the files
        inputs["device"] = context.board_key()
    dense = run.stage(
        "dense",
        "conversion",
        inputs,
        DenseFiles,
        lambda f: export.dense_files(context, f),
        title=title,
    )
    int8_types.restore(context, dense.result.int8_types)
    entry = context.entry("dense", context.reference)
    say(f"      dense: {entry.metric} {entry.value:.2%} of {entry.n} development samples")
    for line in (*context.prepared[1], *dense.result.notes, *data_notes(context)):
        say(f"      note: {line}")
    _, frozen = context.groups
    for kept in frozen:
        say(f"      kept whole: {', '.join(kept.layers[:2])}: {kept.reason}")
    return dense


def _latency(context: Context, run: RunFolder, dense: Stage[DenseFiles]) -> Stage[DenseLatency]:
    job, say = context.job, context.progress.say
    say(f"[2/8] dense latency on {context.board.name}")
    inputs: dict[str, Any] = {
        "dense": dense.digest,
        "device": context.board_key(),
        "runtime": context.runtime_on(context.board),
        "precisions": list(job.target.precisions),
    }
    latency = run.stage(
        "dense-latency",
        "measuring",
        inputs,
        DenseLatency,
        lambda _: measure.dense_latency(context, dense.result, dense.folder),
    )
    stamp = latency.result.fingerprint.stamp
    mark = "" if stamp == "measured" else f" ({stamp})"
    for m in latency.result.measurements.values():
        say(f"      dense {m.precision}: {m.median_ms:.4g} ms{mark}")
    if stamp == "stand-in":
        say(
            f"      note: {context.board.name} stands in for {job.target.name}; its times are not that board's"
        )
    return latency


def _resizable(
    context: Context, run: RunFolder, dense: Stage[DenseFiles], latency: Stage[DenseLatency]
) -> tuple[Resizable, Stage[VariantFile]]:
    """The dense file in the precision of the search, as one that takes any widths."""
    precision = latency.result.precision
    variant = run.stage(
        "variant",
        "conversion",
        # The groups, too: what proves them may have become stricter since.
        {"dense": dense.digest, "precision": precision, "groups": context.full},
        VariantFile,
        lambda f: export.variant_file(context, precision, f),
    )
    file = export.resizable(
        context,
        dense.path(dense.result.cut_from(precision).path),
        variant.path(variant.result.artifact.path),
        variant.result.widths,
        precision,
    )
    return file, variant


def _table(
    context: Context,
    run: RunFolder,
    latency: Stage[DenseLatency],
    variant: Stage[VariantFile],
    stand: Stand,
    file: Resizable,
) -> Stage[MeasuredTable]:
    groups, _ = context.groups
    context.progress.say(
        f"[3/8] kernel times of {len(groups)} channel groups, {latency.result.precision}"
    )
    made_on = latency.result.fingerprint
    if stand.kernel_runtime is not None:
        made_on = context.fingerprint(stand.kernel_runtime)
    prior = _prior(context, latency.result, file)
    table = run.stage(
        "kernels",
        "measuring",
        {"latency": latency.digest, "variant": variant.digest, "prior": prior},
        MeasuredTable,
        lambda _: _measured_table(context, run, made_on, stand, file, prior),
    )
    _share_times(context, made_on, latency.result.precision, table.result)
    return table


def profile_steps(
    context: Context, made_on: Fingerprint, precision: Precision, file: Resizable
) -> dict[str, int] | None:
    """A step for the width of each group, by the profile of the target; ``None`` where the board itself says, or all steps are 1."""
    profile = context.job.profile
    if made_on.stamp != "stand-in" or precision not in profile.channel_steps:
        return None
    found = prior_steps(file, profile.channel_steps[precision])
    return found if any(step > 1 for step in found.values()) else None


def _prior(context: Context, latency: DenseLatency, file: Resizable) -> dict[str, int] | None:
    """Steps of the widths by the target's profile, where another machine stands in for its boards."""
    found = profile_steps(context, latency.fingerprint, latency.precision, file)
    if found is None:
        return None
    steps = sorted({s for s in found.values() if s > 1})
    context.progress.say(
        f"      widths are multiples of {', '.join(map(str, steps))}, the channel steps of {context.job.profile.name};"
        " on a board of that kind they are measured"
    )
    return found


def _measured_table(
    context: Context,
    run: RunFolder,
    made_on: Fingerprint,
    stand: Stand,
    file: Resizable,
    prior: Mapping[str, int] | None,
) -> MeasuredTable:
    """The kernel table, timed by every board of the class that is free; they are held for this stage alone."""
    job, runtime = context.job, stand.kernel_runtime or stand.runtime
    form, precision = _table_format(context), stand.precision
    cache = _times_cache(context, stand)
    earlier = _earlier_times(context, made_on, precision, cache)
    began, stored = now_text(), context.board.times_from_store
    with open_pool(
        context.board,
        job.companions,
        runtime=runtime.name,
        threads=runtime.threads,
        job=f"kernels of {job.target.name} for the run {run.path.name}",
        say=lambda text: context.progress.say(f"      {text}"),
    ) as pool:
        table = measure_table(
            dataclasses.replace(stand, pool=pool),
            file,
            context.groups[0],
            fingerprint_key=made_on.key(),
            format_name=form,
            progress=context.progress,
            known={} if earlier is None else earlier.known(),
            prior=prior,
        )
    oldest = earlier.created if earlier is not None and table.kernels_taken else began
    table = table.model_copy(
        update={
            "boards": dict(pool.boards),
            "scales": dict(pool.scales),
            "times_created": oldest,
        }
    )
    if table.kernels_taken:
        opt_out = "" if cache is None else f"; {SWITCH}=1 times all anew"
        context.progress.say(f"      {table.taken()}{opt_out}")
    # Never times of two boards, and none that a killed run left in its folder on a day that nobody knows.
    if cache is not None and len(pool.boards) == 1 and context.board.times_from_store == stored:
        cache.keep(table.times, oldest)
    return table


def _times_cache(context: Context, stand: Stand) -> TimesCache | None:
    """What this computer knows of the timed board; ``None`` where times are recorded, replayed, or go into a file of the user.

    A recording must hold all times, and those of a replay are of the day it was made. The fingerprint is that of now: the one in an older
    run folder may be of another kernel or governor.
    """
    job = context.job
    if (
        job.tables is not None
        or job.record is not None
        or "replay" in (job.device.transport, context.board.device.transport)
    ):
        return None
    runtime = stand.kernel_runtime or stand.runtime
    return open_cache(
        context.fingerprint(runtime),
        stand.precision,
        _table_format(context),
        lambda text: context.progress.say(f"      {text}"),
    )


def _earlier_times(
    context: Context, made_on: Fingerprint, precision: Precision, cache: TimesCache | None
) -> KernelTimes | None:
    """The times that need not be taken again: from the file that was named for them, or from the one of this computer.

    Raises:
        SpecError, IntegrityError: the named file is of another board or set-up, or damaged.
    """
    tables, say, form = context.job.tables, context.progress.say, _table_format(context)
    if cache is not None:
        return cache.read()
    earlier = None if tables is None else read_times(tables)
    if tables is not None and earlier is not None:
        earlier.check(made_on, precision, form, tables)
        say(f"      {len(earlier.times)} kernel times of {earlier.created} are taken from {tables}")
    return earlier


def _file_of(
    context: Context, made_on: Fingerprint, precision: Precision, table: MeasuredTable
) -> KernelTimes:
    """The times behind a table, as they are kept for others. A table of an earlier version does not say when they were taken."""
    return KernelTimes(
        created=table.times_created or now_text(),
        fingerprint=made_on,
        precision=precision,
        format=_table_format(context),
        times=table.times,
    )


def _table_format(context: Context) -> FormatName:
    """The format of the files that kernels are cut from."""
    found: FormatName = TypeAdapter(FormatName).validate_python(context.form.info.name)
    return found


def _share_times(
    context: Context, made_on: Fingerprint, precision: Precision, table: MeasuredTable
) -> None:
    """Add the kernel times of a run to the file that was named for them, whether they were taken now or earlier."""
    job, say = context.job, context.progress.say
    if job.tables is None:
        return
    if len(table.boards) > 1:
        say(
            f"      note: {job.tables} is left as it is: other boards timed kernels too, and times of two boards are never mixed"
        )
        return
    new = _file_of(context, made_on, precision, table)
    earlier = read_times(job.tables)
    if earlier is not None:
        earlier.check(made_on, precision, new.format, job.tables)
    write_times(job.tables, earlier, new)


def _score(context: Context, table: MeasuredTable) -> ScoresResult:
    """Work on this machine, while others may use the board."""
    with context.board.rested():
        return measure.score(context, table.grids, context.model, context.groups[0])


def _scores(context: Context, run: RunFolder, table: Stage[MeasuredTable]) -> Stage[ScoresResult]:
    job = context.job
    context.progress.say(f"[4/8] importance of every channel ({job.importance})")
    return run.stage(
        "importance",
        "other",
        {
            "kernels": table.digest,
            "grids": table.result.grids,
            "importance": job.importance,
            "data": job.loaded.dataset.digest,
        },
        ScoresResult,
        lambda _: _score(context, table.result),
    )


def _plan(
    context: Context, run: RunFolder, ready: Prepared, scores: Stage[ScoresResult]
) -> Stage[PlanResult]:
    job, say = context.job, context.progress.say
    how = "search" if job.widths is None else "the given plan"
    if job.scope == "local":
        how = "search, the same share of every group"
    say(f"[5/8] {how}: {job.budget.text}, checked on the device")
    plan = run.stage(
        "plan",
        "measuring",
        {
            "nets": ready.nets.digest,
            "importance": scores.digest,
            "budget": job.budget,
            "accepted": certainty.RULE,
            "widths": job.widths,
            "scope": job.scope,
        },
        PlanResult,
        lambda _: measure.plan_structure(
            context,
            ready.stand,
            ready.file,
            measure.plan_basis(
                context, ready.file, ready.table.result, ready.nets.result, scores.result
            ),
        ),
    )
    say_plan(context, plan.result)
    return plan


def say_plan(context: Context, plan: PlanResult) -> None:
    """One line about the measurement of a plan."""
    chosen = plan.chosen()
    context.progress.say(
        f"      {chosen.ratio_to_dense:.1%} of dense: {chosen.measured_ms:.4g} ms measured,"
        f" {chosen.predicted_ms:.4g} ms predicted before it was timed"
    )
