"""What a user may say about a run, and the checks of it that need neither the model nor torch: a wrong name fails at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edgeprune import formats
from edgeprune.devices.inventory import quarantine
from edgeprune.devices.link.recording import check_recordable, origin_of
from edgeprune.devices.link.wait import wait_seconds
from edgeprune.errors import FormatError, SpecError, UnknownName
from edgeprune.plan.latency.kernel_times import read_times
from edgeprune.records import catalog
from edgeprune.records.base import read_yaml
from edgeprune.records.budget import (
    Budget,
    budget_text,
    drop_text,
    parse_budget,
    parse_drop,
    parse_duration,
)
from edgeprune.records.device import Device
from edgeprune.records.formats import format_facts
from edgeprune.records.paths import located
from edgeprune.records.plan import PlanFile, Scope, check_widths
from edgeprune.records.target import Target
from edgeprune.records.workload import Workload

AUTO_FORMATS = "auto"


@dataclass(frozen=True)
class Options:
    """What a user may say about a run. ``None`` means: take ``edgeprune.yaml``, then the target file, then the default."""

    target: str | None = None
    latency: str | float | None = None
    max_drop: str | float | None = None
    device: str | None = None
    importance: str = "fisher"
    scope: str = "global"
    seed: int | None = None
    run: Path | None = None
    resume: Path | None = None
    record: Path | None = None
    command: str = "edgeprune (from Python)"
    sustained: str | None = None
    plan: Path | None = None
    tables: Path | None = None
    formats: str | None = None
    wait: float | None = None  # minutes for a board that another client holds; None: the default


def chosen_target(options: Options, workload: Workload) -> Target:
    """The target of a request.

    Raises:
        SpecError: none was named.
        UnknownName: none has the name, or its profile does not exist.
    """
    name = options.target or workload.target
    if name is None:
        raise SpecError("no target was named", hint="add --target, such as --target rpi4")
    return catalog.target(name)


def chosen_formats(options: Options, workload: Workload, target: Target) -> tuple[Target, ...]:
    """The target in every format that a request leaves open, its own first: one, unless the request says ``auto``.

    Raises:
        UnknownName: the target does not list the format; names those that it lists.
    """
    wanted = options.formats or workload.formats
    own = target.model_copy(update={"formats": ()})
    known = {target.format: own} | {
        other.format: own.model_copy(
            update={
                "format": other.format,
                "runtime": other.runtime,
                "operators": None,  # those are of the runner of the target's own format
                "compute_units": target.compute_units
                if format_facts(other.format).compute_units
                else None,
            }
        )
        for other in target.formats
    }
    if wanted == AUTO_FORMATS:
        return tuple(known.values())
    if wanted is not None and wanted not in known:
        raise UnknownName(
            "format",
            wanted,
            (AUTO_FORMATS, *known),
            where=f"--formats for the target {target.name}",
        )
    return (own if wanted is None else known[wanted],)


def is_auto(options: Options, workload: Workload) -> bool:
    """Whether the formats of a target are to be measured."""
    return (options.formats or workload.formats) == AUTO_FORMATS


def chosen_gates(options: Options, workload: Workload, target: Target) -> tuple[Budget, float]:
    """The latency budget and the allowed drop (a ratio) of a request: flag, then ``edgeprune.yaml``, then the target file.

    Raises:
        SpecError: one of them is malformed.
    """
    try:
        budget = parse_budget(
            budget_text(_first(options.latency, workload.latency, target.latency))
        )
    except ValueError as error:
        hint = "60% is 60 % of the dense model's latency, 1.5x a speed-up, 15ms a time on the board"
        raise SpecError(str(error), hint=hint) from error
    try:
        drop = drop_text(_first(options.max_drop, workload.max_drop, target.max_drop))
        return budget, parse_drop(drop)
    except ValueError as error:
        hint = "1% is one point of accuracy less than the dense model"
        raise SpecError(str(error), hint=hint) from error


def _first(given: str | float | None, recorded: str | None, default: str) -> str | float:
    """The first that was said; 0 was."""
    if given is None or (isinstance(given, str) and not given):
        return recorded or default
    return given


def chosen_sustained(options: Options) -> float | None:
    """Seconds of the sustained run that a request asks for.

    Raises:
        SpecError: the duration is malformed.
    """
    if options.sustained is None:
        return None
    try:
        return parse_duration(options.sustained)
    except ValueError as error:
        raise SpecError(str(error), hint="give --sustained 10min, for example") from error


def chosen_device(
    options: Options, workload: Workload, target: Target
) -> tuple[str, Device, tuple[str, ...]]:
    """The device of a request with its name, and what the user must know about the choice, one line each.

    Raises:
        SpecError: the wanted device does not list the target.
        UnknownName: no device has the wanted name.
        IntegrityError: the list of devices in quarantine cannot be read.
    """
    wanted = options.device or workload.device
    out = quarantine.entries()
    name, device = catalog.device_for(target.name, wanted, quarantined=out)
    notes: tuple[str, ...] = ()
    skipped = name if wanted else catalog.device_for(target.name)[0]
    if name in out:
        notes = (f"{name} is in quarantine, its figures may be wrong: {out[name].reason}",)
    elif skipped != name:
        notes = (f"{skipped} is in quarantine, {name} takes its place: {out[skipped].reason}",)
    return name, device, notes


def check_sparsity(workload: Workload, target: Target) -> None:
    """Raise unless the target's accelerator has kernels for the sparsity that a request asks for, or it asks for none.

    Raises:
        SpecError: the target's profile names no such kernels.
    """
    wanted = workload.recovery.sparsity
    if wanted == "none" or catalog.has_kernels_for(catalog.profile(target.profile), wanted):
        return
    able = [
        name
        for name, path in catalog.targets().items()
        if catalog.has_kernels_for(catalog.profile(catalog.target(path).profile), wanted)
    ]
    raise SpecError(
        f"sparsity {wanted} needs an accelerator with kernels for it, and the profile {target.profile} of {target.name} has none",
        hint=f"leave sparsity out; targets that have them: {', '.join(able) or 'none'}",
    )


def check_format(target: Target) -> None:
    """Raise unless this version can write the target's format.

    Raises:
        FormatError: it cannot yet.
    """
    if target.format not in formats.names():
        raise FormatError(
            f"target {target.name} needs the format {target.format}, which this version cannot write yet",
            hint=f"formats of this version: {', '.join(formats.names())}",
        )


def chosen_scope(options: Options) -> Scope:
    """Whether channels are compared between groups, or only within each.

    Raises:
        UnknownName: there is no such scope.
        SpecError: a plan is given, whose widths are no longer to be chosen.
    """
    if options.scope not in get_args(Scope):
        raise UnknownName("scope", options.scope, get_args(Scope))
    scope: Scope = "local" if options.scope == "local" else "global"
    if scope == "local" and options.plan is not None:
        raise SpecError(
            "--scope local and --plan cannot be combined: the plan says what each group keeps",
            hint="leave one of them out",
        )
    return scope


def given_widths(options: Options, target: str) -> dict[str, int] | None:
    """The widths of the plan that was given instead of a search, if one was.

    Raises:
        SpecError: there is no such file, it is no plan, or it has widths that it does not list itself.
    """
    if options.plan is None:
        return None
    if not options.plan.is_file():
        raise SpecError(f"there is no plan {options.plan}", hint="run: edgeprune search")
    try:
        plan = read_yaml(PlanFile, options.plan)  # JSON is YAML, and a person may have edited it
    except (SpecError, UnknownName) as error:
        error.hint = error.hint or "give the plan.json of a run of: edgeprune search"
        raise
    if plan.target != target:
        raise SpecError(
            f"the plan {options.plan} was made for the target {plan.target}, and this is {target}",
            hint=f"run: edgeprune search --target {target}",
        )
    if plan.admissible_widths:  # what the board allows in the end is found out there
        check_widths(plan.widths, plan.admissible_widths)
    return plan.widths


def check_paths(options: Options) -> None:
    """Raise unless every path of a request can be used, whether or not there is a file.

    Raises:
        SpecError: as :func:`edgeprune.records.paths.located`.
    """
    for name in ("run", "resume", "record", "plan", "tables"):
        path: Path | None = getattr(options, name)
        if path is not None:
            located(path, what=f"--{name}")


def check_tables(options: Options) -> None:
    """Raise unless the file of kernel times can be used, does not exist yet, or none was named.

    Raises:
        SpecError: a recording was asked for, too.
        IntegrityError: the file holds something else.
    """
    if options.tables is None:
        return
    if options.record is not None:
        raise SpecError("--tables and --record cannot be combined: a recording must hold all times")
    read_times(options.tables)


def check_names(options: Options, workload: Workload) -> None:
    """Fail on a wrong target, device, format or gate before any model or data is loaded.

    Raises:
        SpecError, UnknownName: as :func:`check_paths`, :func:`chosen_target`, :func:`chosen_formats`, :func:`check_sparsity`,
            :func:`chosen_gates`, :func:`chosen_sustained` and :func:`chosen_scope`; no device has the name.
        FormatError: as :func:`check_format`.
        IntegrityError: the recording to replay, or to go on with, or the file of kernel times is damaged.
    """
    check_paths(options)
    target = chosen_target(options, workload)
    _, device, _ = chosen_device(options, workload, target)
    check_format(chosen_formats(options, workload, target)[0])
    check_sparsity(workload, target)
    chosen_gates(options, workload, target)
    chosen_sustained(options)
    chosen_scope(options)
    wait_seconds(options.wait)
    given_widths(options, target.name)
    check_tables(options)
    origin_of(device)  # opens the recording of a replay device
    if options.record is not None:
        check_recordable(options.record)
