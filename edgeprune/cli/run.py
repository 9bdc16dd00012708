"""The commands that work on a model: ``deploy``, ``search`` and ``profile``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.options import (
    AS_FLAGS,
    GivenPath,
    budget_options,
    formats_option,
    importance_options,
    int8_options,
    int8_settings,
    model_options,
    schedule_options,
    schedule_settings,
)
from edgeprune.errors import BudgetError, SpecError
from edgeprune.records.paths import located

if TYPE_CHECKING:
    from edgeprune.pipeline.options import Options
    from edgeprune.progress import Progress
    from edgeprune.workload.load import LoadedWorkload


@click.command()
@model_options
@budget_options
@importance_options
@formats_option
@schedule_options
@int8_options
@click.option(
    "--dry-run", is_flag=True, help="Stop after the measured plan: feasibility without training."
)
@click.option(
    "--plan",
    type=GivenPath(dir_okay=False),
    help="Take the widths of this plan.json of `edgeprune search` instead of searching.",
)
def deploy(dry_run: bool, as_json: bool, quiet: bool, **flags: Any) -> None:
    """From a trained model to a verified, faster bundle.

    MODEL is path/file.py:factory or package.module:factory. With an edgeprune.yaml in the folder (see `edgeprune init`), --target is all
    that is needed.
    """
    options = _options(flags)
    progress = _progress(quiet)
    loaded = _load(flags, options)
    from edgeprune.pipeline import api
    from edgeprune.records.files import to_json

    if dry_run:
        from edgeprune.report.search_page import render_plan

        plan, path = api.plan_loaded(loaded, options, progress)
        click.echo(to_json(plan).decode() if as_json else render_plan(plan), nl=False)
        click.echo(f"deploy without --dry-run goes on from {path}", err=True)
        if not plan.chosen().within_budget:
            raise BudgetError(
                f"the given plan was measured at {plan.chosen().measured_ms:.4g} ms, and the budget is {plan.plan.limit_ms:.4g} ms",
                hint="narrow it, or give a larger budget",
            )
        return
    outcome = api.deploy_loaded(loaded, options, progress)
    from edgeprune.report import render_terminal

    if as_json:
        click.echo(to_json(outcome.report).decode(), nl=False)
    else:
        click.echo(render_terminal(outcome.report, color=sys.stdout.isatty()), nl=False)
        click.echo(f"bundle  {outcome.folder / 'bundle'} and {outcome.folder / 'bundle.zip'}")
        click.echo(f"torch   {outcome.folder / 'pruned.safetensors'}, for edgeprune.load_pruned")
        click.echo(f"report  {outcome.folder / 'report.html'}")
    if any(gate.missed for gate in outcome.report.gates):
        raise _missed(outcome.report)


def _missed(report: Any) -> BudgetError:
    """What to say when a best-effort bundle was written."""
    from edgeprune.pipeline.stages.gates import judged_text

    lines, advice = [], []
    for gate in report.gates:
        if not gate.missed:
            continue
        if gate.name == "latency":
            lines.append(f"latency is {judged_text(gate)}, the budget {gate.limit:.4g}")
            fastest = min(c.measured_ms for c in report.checks)
            advice.append(f"the fastest structure measured took {fastest:.4g} ms")
        elif gate.name == "numerics":
            lines.append(
                f"device and host agree on {gate.value:.2%} of samples, {gate.limit:.0%} are needed"
            )
        else:
            lines.append(
                f"{gate.name} dropped {gate.value * 100:.2f} points, {gate.limit * 100:.2f} are allowed"
            )
            best = next(
                r
                for r in report.variants
                if r.variant == "pruned" and r.precision == report.shipped
            )
            advice.append(
                f"the best {gate.name} reached at this latency is {best.quality:.2%};"
                " give a larger budget or more recovery epochs"
            )
    return BudgetError(
        f"gate missed: {'; '.join(lines)}",
        hint="; ".join([*advice, "the bundle is marked as best effort"]),
    )


@click.command(short_help="What a budget would cost, before any training.")
@model_options
@budget_options
@importance_options
@formats_option
def search(as_json: bool, quiet: bool, **flags: Any) -> None:
    """What a budget would cost, and what others would: everything before training, explained.

    MODEL as for `edgeprune deploy`. The run folder gets search.html, search.json, and plan.json, whose widths may be edited and given to
    `deploy --plan`.
    """
    options = _options(flags)
    progress = _progress(quiet)
    loaded = _load(flags, options)
    from edgeprune.pipeline import api
    from edgeprune.records.files import to_json
    from edgeprune.report.search_page import render_search

    found, path = api.search_loaded(loaded, options, progress)
    click.echo(to_json(found).decode() if as_json else render_search(found), nl=False)
    if not as_json:
        click.echo(f"page    {path / 'search.html'}")
        click.echo(f"plan    {path / 'plan.json'}, for deploy --plan")


@click.command(short_help="Where the milliseconds go, kernel by kernel.")
@model_options
def profile(as_json: bool, quiet: bool, **flags: Any) -> None:
    """Where the milliseconds go: dense latency in fp32 and INT8, and every kernel. MODEL as for `edgeprune deploy`."""
    options = _options(flags)
    progress = _progress(quiet)
    loaded = _load(flags, options)
    from edgeprune.pipeline import api
    from edgeprune.records.files import to_json
    from edgeprune.report.profile_text import render_profile

    found = api.profile_loaded(loaded, options, progress)
    click.echo(to_json(found).decode() if as_json else render_profile(found), nl=False)


def _progress(quiet: bool) -> Progress:
    from edgeprune.cli.progress import Terminal
    from edgeprune.progress import Silent

    return Silent() if quiet else Terminal()


def _options(flags: dict[str, Any]) -> Options:
    from edgeprune.pipeline.options import Options

    return Options(
        target=flags.get("target"),
        latency=flags.get("latency"),
        max_drop=flags.get("max_drop"),
        device=flags.get("device"),
        importance=flags.get("importance") or "fisher",
        scope=flags.get("scope") or "global",
        seed=flags.get("seed"),
        run=flags.get("run"),
        resume=flags.get("resume"),
        sustained=flags.get("sustained"),
        record=flags.get("record"),
        plan=flags.get("plan"),
        tables=flags.get("tables"),
        formats=flags.get("formats"),
        wait=flags.get("wait"),
        command=shlex.join(["edgeprune", *sys.argv[1:]]),
    )


def _load(flags: dict[str, Any], options: Options) -> LoadedWorkload:
    """The workload that the flags and ``edgeprune.yaml`` name; wrong names fail before torch is imported."""
    from edgeprune.pipeline.options import check_names

    workload, base = _workload(flags)
    check_names(options, workload)
    from edgeprune.workload.load import load_workload

    return load_workload(workload, base)


def _workload(flags: dict[str, Any]) -> tuple[Any, Path]:
    from edgeprune.records import catalog
    from edgeprune.records.base import parse, read_yaml
    from edgeprune.records.workload import Workload

    base = catalog.example_dir(flags["example"]) if flags["example"] else Path.cwd()
    file = base / "edgeprune.yaml"
    given = {k: flags[k] for k in ("model", "weights", "data") if flags[k] is not None}
    if given.get("model") in ("%", "x", "ms"):
        raise SpecError(
            f"the model is named {flags['model']!r}", hint="write a budget without spaces: 50%"
        )
    if flags["example"] and given:
        raise SpecError(f"--example brings its own {', '.join(given)}", hint="leave them out")
    record: dict[str, Any] = {}
    if file.is_file() and "model" not in given:
        record = read_yaml(Workload, file).model_dump(mode="json")
    elif "model" not in given:
        raise SpecError("no model was named", hint="give MODEL, or run: edgeprune init")
    elif "data" not in given:
        if (located(given["model"], what="MODEL") / "stages").is_dir():
            raise SpecError(
                f"MODEL is the folder of a run: {given['model']}",
                hint="add --run before it and repeat the run's own MODEL or --example, --target and --latency; finished stages are kept",
            )
        raise SpecError(
            "a model needs data", hint="add --data: an image folder, .npz or file.py:factory"
        )
    preprocess = {k: list(flags[k]) for k in ("mean", "std", "size") if flags[k]}
    if flags["color"]:
        preprocess["color"] = flags["color"]
    if preprocess:
        record["preprocess"] = {**record.get("preprocess", {}), **preprocess}
    if schedule := schedule_settings(flags):
        record["recovery"] = {**record.get("recovery", {}), **schedule}
    if int8 := int8_settings(flags):
        record["int8"] = {**record.get("int8", {}), **int8}
    if flags["task"] is not None:
        record["task"] = flags["task"]
    # The file was checked when it was read.
    whole = {**record, **given}
    return parse(Workload, whole, where="the command line", said=AS_FLAGS), base
