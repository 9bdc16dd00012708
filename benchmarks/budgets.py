"""Deploy the example to ten latency budgets in one run folder: ``python benchmarks/budgets.py``.

The dense export, the kernel table and the importance are made once and kept by their digests; each budget then has its own search,
healing, export and final measurement. The results file is written after every budget, and a budget that fails keeps its line.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import click
from blocks import RESULTS, Achieved, BudgetResults, BudgetRow, Check
from commands import time_every_kernel

import edgeprune
from edgeprune.cli.progress import Terminal
from edgeprune.devices.board import open_board
from edgeprune.errors import BudgetError, EdgepruneError, SpecError
from edgeprune.pipeline import api
from edgeprune.pipeline.context import Job
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.stages.finish import versions
from edgeprune.progress import Progress
from edgeprune.records import catalog
from edgeprune.records.base import read_yaml
from edgeprune.records.budget import parse_budget
from edgeprune.records.files import write_json
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.report import Report
from edgeprune.records.workload import Workload
from edgeprune.report import facts
from edgeprune.workload.load import LoadedWorkload, load_workload

EXAMPLE = "fashion-mnist"
BUDGETS = "90%,80%,70%,65%,60%,55%,50%,45%,40%,30%"


def asked(text: str) -> dict[str, float]:
    """Budgets separated by commas, each with the share of the dense latency that it allows.

    Raises:
        SpecError: a budget is malformed, absolute or given twice.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        try:
            budget = parse_budget(part)
        except ValueError as error:
            raise SpecError(f"--budgets: {error}") from error
        if budget.kind != "ratio" or budget.text in found:
            raise SpecError(
                f"budgets must be different shares or speed-ups such as 60% or 2x, but got {part!r}"
            )
        found[budget.text] = budget.value
    return found


# What is the same for every budget; each is run for the first and kept.
SHARED_STAGES = frozenset(
    ("opening the device", "dense", "dense-latency", "variant", "kernels", "nets", "importance")
)


def load_example(epochs: float) -> LoadedWorkload:
    """The example with this many epochs of healing."""
    folder = catalog.example_dir(EXAMPLE)
    workload = read_yaml(Workload, folder / "edgeprune.yaml")
    recovery = workload.recovery.model_copy(update={"epochs": epochs})
    return load_workload(workload.model_copy(update={"recovery": recovery}), folder)


def fingerprint_of(job: Job) -> Fingerprint:
    """What the times are made on; known even when every budget fails."""
    with open_board(job.device_name, job.device) as board:
        return board.fingerprint(job.target.runtime.name, job.target.runtime.threads)


def achieved(report: Report, asked_ratio: float, *, is_first: bool = True) -> Achieved:
    """What one report says about its budget; ``is_first`` counts the stages that all budgets share, whenever they were run."""
    shipped = report.shipped
    row = next(r for r in report.variants if (r.variant, r.precision) == ("pruned", shipped))
    dense = next(r for r in report.variants if (r.variant, r.precision) == ("dense", shipped))
    final = facts.interval(report, row)
    assert final is not None  # the pipeline always compares them
    chosen = min(
        (c for c in report.checks if c.widths == report.plan.widths()), key=lambda c: c.ratio_high
    )
    quality: dict[str, float] = {
        e.stage: e.value for e in report.ledger if e.precision == "fp32" and e.where == "torch"
    }
    for r in report.variants:
        if r.precision == "int8":
            quality["int8" if r.variant == "pruned" else "dense int8"] = r.quality
    seconds: dict[str, float] = defaultdict(float)
    for stage in report.stages:
        if is_first or stage.name not in SHARED_STAGES:
            seconds[stage.kind] += stage.seconds
    gates = {g.name: g.met for g in report.gates}
    dense_ms = report.plan.dense_ms
    return Achieved(
        searched=report.plan.precision,
        shipped=shipped,
        dense_ms=dense_ms,
        predicted_ms=chosen.predicted_ms,
        plan_ratio=chosen.ratio_to_dense,
        plan_high=chosen.ratio_high,
        ratio=final.ratio,
        low=final.low,
        high=final.high,
        confidence=final.confidence,
        rounds=final.rounds,
        latency_met=gates["latency"],
        missed_gates=tuple(name for name, met in gates.items() if not met),
        slack_ratio=1 - final.ratio / asked_ratio,
        metric=facts.metric(report),
        n=facts.ledger_n(report),
        quality=quality,
        test_quality=report.test_quality,
        test_n=report.test_n,
        macs_ratio=row.macs / dense.macs,
        parameters_ratio=row.parameters / dense.parameters,
        checks=tuple(
            Check(predicted_ratio=c.predicted_ms / dense_ms, measured_ratio=c.ratio_to_dense)
            for c in report.checks
        ),
        latency_model=report.latency_model,
        stage_seconds=dict(seconds),
        load_1min=report.measurements[row.measurement].before.load_1min,
    )


def run_budget(
    loaded: LoadedWorkload,
    options: Options,
    text: str,
    ratio: float,
    progress: Progress,
    *,
    is_first: bool = True,
) -> BudgetRow:
    """One budget, whatever becomes of it."""
    started = time.monotonic()
    found: Achieved | None = None
    message = ""
    try:
        report = api.deploy_loaded(loaded, options, progress).report
        found = achieved(report, ratio, is_first=is_first)
        status = "done"
    except BudgetError as error:
        status, message = "infeasible", str(error)
    except EdgepruneError as error:
        status, message = "failed", f"{type(error).__name__}: {error}"
    except Exception as error:  # a benchmark of ten must not lose nine to one bug; it is shown
        traceback.print_exc()
        status, message = "crashed", f"{type(error).__name__}: {error}"
    return BudgetRow.model_validate(
        {
            "budget": text,
            "asked_ratio": ratio,
            "status": status,
            "message": message,
            # Of a run that goes on, what the stages took when they were run.
            "seconds": sum(found.stage_seconds.values()) if found else time.monotonic() - started,
            "achieved": found,
        }
    )


@click.command()
@click.option("--budgets", default=BUDGETS, show_default=True, help="Shares or speed-ups.")
@click.option("--epochs", type=click.FloatRange(0, 1000), default=1.0, show_default=True)
@click.option("--target", default="rpi4", show_default=True)
@click.option("--device", help="Name in devices.yaml.")
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/budgets"))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "budgets.json")
@click.option(
    "--max-hours",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="Start no further budget after this time.",
)
def main(
    budgets: str,
    epochs: float,
    target: str,
    device: str | None,
    run: Path,
    out: Path,
    max_hours: float,
) -> None:
    """Deploy the Fashion-MNIST example to several budgets and write what was asked, predicted and measured."""
    time_every_kernel()
    try:
        results = run_all(
            asked(budgets),
            epochs=epochs,
            options=Options(target=target, device=device, run=run, command=_command()),
            out=out,
            max_hours=max_hours,
        )
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    for row in results.rows:
        found = f"{row.achieved.ratio:.1%} of dense" if row.achieved else row.message
        click.echo(f"{row.budget:>6} {row.status:10} {found}")
    click.echo(f"wrote {out}; next: python benchmarks/readme.py")


def _command() -> str:
    return shlex.join(["python", "benchmarks/budgets.py", *sys.argv[1:]])


def run_all(
    wanted: dict[str, float], *, epochs: float, options: Options, out: Path, max_hours: float
) -> BudgetResults:
    """Every budget in turn; ``out`` is written after each.

    Raises:
        EdgepruneError: the example, the target or the device cannot be used at all.
    """
    started = time.monotonic()
    loaded, progress = load_example(epochs), Terminal()
    job = api.resolve(loaded, options)
    fingerprint, rows = fingerprint_of(job), list[BudgetRow]()
    for number, (text, ratio) in enumerate(wanted.items(), start=1):
        progress.say(f"budget {number} of {len(wanted)}: {text}")
        if time.monotonic() - started > max_hours * 3600:
            late = f"{max_hours:g} h had passed"
            row = BudgetRow(
                budget=text, asked_ratio=ratio, status="not run", message=late, seconds=0.0
            )
        else:
            chosen = replace(options, latency=text)
            row = run_budget(loaded, chosen, text, ratio, progress, is_first=number == 1)
        rows.append(row)
        results = BudgetResults(
            edgeprune_version=edgeprune.__version__,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=options.command,
            model=loaded.workload.model,
            target=job.target.name,
            device=job.device_name,
            fingerprint=fingerprint,
            epochs=epochs,
            seed=job.seed,
            max_drop=job.max_drop,
            versions=versions(),
            rows=tuple(rows),
            seconds=time.monotonic() - started,
        )
        write_json(results, out)
    return results


if __name__ == "__main__":
    main()
