"""Pruners side by side at equal measured latency: ``python benchmarks/compare.py --net example``.

One net, one device, one fine-tuning budget, one distillation, one INT8 recipe. The knob of each baseline is searched on the device until
its measured latency is the budget's; ours comes from the search that ``deploy`` runs. The results file is written after every training, so
a run that is cut off keeps what it has, and a second run with the same ``--run`` goes on. Then: ``python benchmarks/readme.py``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import click
from commands import time_every_kernel
from compare_records import OURS, CompareResults
from compare_runner import Runner, structures
from methods.comparison import Comparison

from edgeprune.cli.progress import Terminal
from edgeprune.errors import SpecError
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.stages.finish import versions
from edgeprune.pipeline.stages.kernels import prepare
from edgeprune.records import catalog
from edgeprune.records.base import read_yaml
from edgeprune.records.budget import parse_budget
from edgeprune.records.version import VERSION
from edgeprune.records.workload import Int8, Recovery, Workload
from edgeprune.workload.load import LoadedWorkload, from_objects, load_workload

HERE = Path(__file__).parent
RESULTS = HERE / "results"
EXAMPLE = "fashion-mnist"


def load_net(name: str, recovery: Recovery) -> LoadedWorkload:
    """A trained net with Fashion-MNIST: ``example``, or one of ``benchmarks/nets``."""
    folder = catalog.example_dir(EXAMPLE)
    workload = read_yaml(Workload, folder / "edgeprune.yaml")
    workload = workload.model_copy(update={"recovery": recovery})
    if name == "example":
        return load_workload(workload, folder)
    sys.path.insert(0, str(HERE / "nets"))
    import train_nets

    return from_objects(
        train_nets.load(name), train_nets.data.load(), settings=workload, base=folder
    )


def _results(comparison: Comparison, net: str, seeds: int) -> CompareResults:
    context, ready, rig = comparison.context, comparison.ready, comparison.rig
    data = context.job.loaded.dataset
    assert data.test is not None
    files = {
        "fp32": ready.dense.path(ready.dense.result.fp32.path),
        "int8": ready.dense.path(ready.dense.result.int8.path),
    }
    accuracy = {
        s: {p: float(rig.correct(f, s).mean()) for p, f in files.items()}
        for s in ("development", "test")
    }
    found = ready.latency.result
    return CompareResults(
        edgeprune_version=VERSION,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        net=net,
        target=context.job.target.name,
        device=context.job.device_name,
        precision=found.precision,
        fingerprint=found.fingerprint,
        epochs=rig.recovery.epochs,
        learning_rate=rig.recovery.learning_rate,
        batch_size=rig.recovery.batch_size,
        train_images=len(data.train),
        development_n=len(data.development),
        test_n=len(data.test),
        seeds=seeds,
        dense_development=accuracy["development"],
        dense_test=accuracy["test"],
        dense_ms={p: m.median_ms for p, m in found.measurements.items()},
        latency_model=comparison.quality,
        versions=versions(),
        rows=(),
        seconds=0.0,
    )


def chooser(patterns: str) -> Callable[[str], bool]:
    """Whether a method is wanted: by its name, or by a start of it that ends in a star, separated by commas; empty means all."""
    asked = [p for p in patterns.split(",") if p]
    return lambda name: (
        not asked or name == OURS or any(fnmatch.fnmatchcase(name, p) for p in asked)
    )


@click.command()
@click.option(
    "--net", default="example", show_default=True, help="example, or a net of benchmarks/nets."
)
@click.option("--budgets", default="2x,3x,4x", show_default=True)
@click.option(
    "--methods",
    default="",
    help="Names or patterns such as tp-*, separated by commas; default: all.",
)
@click.option(
    "--ablate", default="", help="Budgets at which parts are taken away from ours; default: all."
)
@click.option("--seeds", type=click.IntRange(1, 10), default=1, show_default=True)
@click.option("--seeded", default="", help="Methods that get more than one seed; default: all.")
@click.option("--epochs", type=click.FloatRange(0, 100), default=0.3, show_default=True)
@click.option("--rate", type=click.FloatRange(0, 1), default=0.02, show_default=True)
@click.option("--target", default="rpi4", show_default=True)
@click.option("--device", help="Name in devices.yaml.")
@click.option("--run", type=click.Path(path_type=Path), help="Default: runs/compare-NET.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/compare-NET.json."
)
@click.option(
    "--max-hours", type=click.FloatRange(0, min_open=True), default=12.0, show_default=True
)
def main(
    net: str,
    budgets: str,
    methods: str,
    ablate: str,
    seeds: int,
    seeded: str,
    epochs: float,
    rate: float,
    target: str,
    device: str | None,
    run: Path | None,
    out: Path | None,
    max_hours: float,
) -> None:
    """Compare pruners at equal measured latency."""
    time_every_kernel()
    until = time.monotonic() + 3600 * max_hours
    recovery = read_yaml(Workload, catalog.example_dir(EXAMPLE) / "edgeprune.yaml").recovery
    recovery = recovery.model_copy(update={"epochs": epochs, "learning_rate": rate})
    asked = {}
    for text in budgets.split(","):
        budget = parse_budget(text)
        if budget.kind != "ratio":
            raise SpecError(
                f"budgets must be shares or speed-ups such as 50% or 2x, but got {text!r}"
            )
        asked[text] = budget.value
    path = run or Path("runs") / f"compare-{net}"
    progress = Terminal()
    job = api.resolve(load_net(net, recovery), Options(target=target, device=device, run=path))
    # One precision for all, whichever is faster on this device: it is what ships.
    target_spec = job.target.model_copy(update={"precisions": ("int8",)})
    job = dataclasses.replace(job, target=target_spec, int8=Int8(effort="plain"))
    with RunFolder(path, progress) as folder, pipeline.opened(job, progress, folder) as context:
        ready = prepare(context, folder)
        # What is kept between runs belongs to these tables.
        kept = path / f"compare-{ready.nets.digest}"
        kept.mkdir(exist_ok=True)
        comparison = Comparison(context, ready, kept, recovery)
        ablated = ablate.split(",") if ablate else list(asked)
        entries = structures(comparison, asked, chooser(methods), ablated, progress.say)
        results = _results(comparison, net, seeds)
        runner = Runner(comparison, entries, results, out or RESULTS / f"compare-{net}.json")
        runner.train(seeds, chooser(seeded), until)
        runner.time()
    progress.say("next: python benchmarks/readme.py")


if __name__ == "__main__":
    main()
