"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr; the exit code says who must act."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli import last_net
from edgeprune.cli.bundle import bundle, verify
from edgeprune.cli.console import plain, print_list
from edgeprune.cli.devices import devices
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
from edgeprune.cli.usage import say_wrong_usage
from edgeprune.errors import BudgetError, EdgepruneError, SpecError
from edgeprune.records.paths import located
from edgeprune.records.version import VERSION

if TYPE_CHECKING:
    from edgeprune.pipeline.options import Options
    from edgeprune.progress import Progress
    from edgeprune.workload.load import LoadedWorkload

INTERRUPTED, TERMINATED = 130, 143
_INTERRUPTED_TEXT = "interrupted; run the same command again to go on"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; intended errors become one line on stderr and the exit code of their family, all others one line and 70."""
    last_net.ready_streams()
    try:
        earlier = signal.signal(signal.SIGTERM, _terminated)
    except ValueError:  # only a main thread handles signals
        return last_net.caught(lambda: _main(argv))
    try:
        last_net.caught(lambda: _main(argv))
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _main(argv: Sequence[str] | None) -> None:
    try:
        cli.main(
            args=None if argv is None else list(argv), prog_name="edgeprune", standalone_mode=False
        )
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort as stop:
        if isinstance(stop.__cause__, KeyboardInterrupt):
            click.echo(_INTERRUPTED_TEXT, err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        say_wrong_usage(error, sys.argv[1:] if argv is None else argv)
        sys.exit(error.exit_code)
    except EdgepruneError as error:
        click.echo(f"error: {plain(error.message)}", err=True)
        if error.hint:
            click.echo(f"hint: {plain(error.hint)}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo(_INTERRUPTED_TEXT, err=True)
        sys.exit(INTERRUPTED)


def _terminated(number: int, frame: object) -> None:
    """Leave as after Ctrl-C: files whole, boards free and as they were."""
    click.echo("ended by a signal; run the same command again to go on", err=True)
    sys.exit(TERMINATED)


@click.group(
    cls=last_net.Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="edgeprune")
def cli() -> None:
    """Prune, heal, quantise and prove a PyTorch model on the board it has to run on.

    Start in your project's folder with `edgeprune init`, then `edgeprune deploy`; without one: `edgeprune deploy --example fashion-mnist
    --target rpi4`.
    """


@cli.command()
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


@cli.command(short_help="What a budget would cost, before any training.")
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


@cli.command(short_help="Where the milliseconds go, kernel by kernel.")
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


@cli.command()
@click.option("--model", help="What makes the model: file.py:factory.")
@click.option("--weights", help="Weights for it: safetensors, or a state dict.")
@click.option("--data", help="Image folder, .npz, or file.py:factory.")
@click.option("--target", "-t", default="rpi4", show_default=True, help="What to ship for.")
@click.option("--yes", "-y", is_flag=True, help="Take every proposal without asking.")
def init(model: str | None, weights: str | None, data: str | None, target: str, yes: bool) -> None:
    """Look at this folder, ask, and write edgeprune.yaml."""
    from edgeprune.records import catalog
    from edgeprune.workload.init import initialise

    catalog.target(target)

    def ask(question: str, default: str) -> str:
        return str(click.prompt(question, default=default or None, err=True))

    path = initialise(
        Path.cwd(), model=model, weights=weights, data=data, target=target, ask=None if yes else ask
    )
    click.echo(f"wrote {path}; next: edgeprune deploy --target {target}")


@cli.command()
@click.argument("run", type=GivenPath())
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(run: Path, as_json: bool) -> None:
    """Show the report of a finished run again."""
    from edgeprune.records.files import to_json
    from edgeprune.report import render_terminal

    found = _read_report(run)
    click.echo(to_json(found).decode() if as_json else render_terminal(found), nl=False)


@cli.command()
@click.argument("runs", type=GivenPath(), nargs=-1, required=True)
def compare(runs: Sequence[Path]) -> None:
    """Show finished runs side by side."""
    from edgeprune.report import compare_text

    click.echo(compare_text([_read_report(run) for run in runs]), nl=False)


def _read_report(run: Path) -> Any:
    from edgeprune.records.base import read_json
    from edgeprune.records.report import Report

    path = run / "report.json" if run.is_dir() else run
    if not path.exists():
        folder = run if run.is_dir() else path.parent
        why = "give a run folder, such as runs/rpi4-0123, or its report.json"
        if (folder / "search.html").exists():
            why = f"this was a search: see {folder / 'search.html'}"
        elif run.is_dir() and (folder / "run.json").exists():
            why = "the run has not finished yet"
        raise SpecError(f"there is no report at {path}", hint=why)
    return read_json(Report, path)


@cli.group()
def targets() -> None:
    """What edgeprune can ship for."""


@cli.group()
def profiles() -> None:
    """What is known of each processor: facts with sources."""


cli.add_command(devices)
cli.add_command(verify)
cli.add_command(bundle)


@targets.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def targets_list(as_json: bool) -> None:
    """All targets."""
    from edgeprune.records import catalog

    found = {name: catalog.target(path) for name, path in catalog.targets().items()}
    print_list(
        as_json,
        {
            n: {"format": t.format, "profile": t.profile, "summary": t.summary}
            for n, t in found.items()
        },
    )


@profiles.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def profiles_list(as_json: bool) -> None:
    """All profiles."""
    from edgeprune.records import catalog

    found = {name: catalog.profile(path) for name, path in catalog.profiles().items()}
    print_list(as_json, {n: {"isa": p.isa, "summary": p.summary} for n, p in found.items()})


@targets.command("show")
@click.argument("name")
def targets_show(name: str) -> None:
    """One target as YAML, with a line on what its INT8 scheme means."""
    from edgeprune.records import catalog

    _print_yaml(catalog.target(name))


@profiles.command("show")
@click.argument("name")
def profiles_show(name: str) -> None:
    """One profile as YAML, every fact with its source."""
    from edgeprune.records import catalog

    _print_yaml(catalog.profile(name))


def _print_yaml(record: Any) -> None:
    import yaml

    from edgeprune.records.int8 import SCHEME_WORDS

    click.echo(f"# {SCHEME_WORDS}")
    plain = record.model_dump(mode="json", exclude_none=True)  # what is not set is not said
    click.echo(yaml.safe_dump(plain, sort_keys=False), nl=False)


@cli.command()
def doctor() -> None:
    """What this machine has: packages, formats, devices."""
    from importlib import metadata

    from edgeprune.records import catalog

    click.echo(f"edgeprune {VERSION}, Python {sys.version.split()[0]}")
    wanted = {
        "core": ("torch", "torch-pruning", "paramiko", "numpy"),
        "tflite": ("litert-torch", "ai-edge-quantizer", "ai-edge-litert"),
        "onnx": ("onnx", "onnxruntime", "onnxscript"),
        "executorch": ("executorch", "torchao"),
        "coreml": ("coremltools",),
    }
    for extra, packages in wanted.items():
        found = []
        for package in packages:
            try:
                found.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                found.append(f"{package} MISSING (pip install 'edgeprune[{extra}]')")
        click.echo(f"{extra:10} {', '.join(found)}")
    click.echo(f"devices    {', '.join(catalog.devices())}")


def _progress(quiet: bool) -> Progress:
    from edgeprune.progress import Silent, Terminal

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
