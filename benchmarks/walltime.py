"""How long everything before the training takes: ``python benchmarks/walltime.py``.

MobileNetV2 at 224 pixels with random weights, and noise as data: neither conversion, timing, scores nor the search takes longer or shorter
for what the weights and images are. The stages are those of ``edgeprune search``, in a new run folder and without the kernel times of
earlier searches.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
import torch
from blocks import RESULTS
from commands import public_command, time_every_kernel
from torch import nn
from walltime_blocks import SolverTime, WallTime

from edgeprune.cli.progress import Terminal
from edgeprune.errors import EdgepruneError
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.stages import measure as stages
from edgeprune.pipeline.stages.finish import Planned, versions
from edgeprune.pipeline.stages.kernels import plan_stages
from edgeprune.plan.solver import solve as search
from edgeprune.records.files import write_json
from edgeprune.records.version import VERSION
from edgeprune.records.workload import Preprocess
from edgeprune.workload.load import LoadedWorkload, from_objects

NET = "MobileNetV2, 224x224"
REPEATS = 5  # of the solver alone
# In each split: calibration, scores and the recipe for INT8 take no more than that many.
IMAGES = 256


def load() -> LoadedWorkload:
    """The net and noise of its input's shape, seeded; batch norm has seen the noise, so that no layer dies of its random weights."""
    sys.path.insert(0, str(Path(__file__).parent / "nets"))
    from families import mobilenet_v2_imagenet

    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    splits = {
        name: (
            draw.standard_normal((IMAGES, 3, 224, 224), dtype=np.float32),
            draw.integers(0, 1000, IMAGES),
        )
        for name in ("train", "validation")
    }
    net = mobilenet_v2_imagenet()
    net.train()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        net(torch.from_numpy(splits["train"][0][:64]))
    return from_objects(net.eval(), splits, preprocess=Preprocess(color="rgb"))


def measure(options: Options, folder: Path) -> WallTime:
    """One search in a new run folder."""
    loaded = load()
    began = time.monotonic()
    job = api.resolve(loaded, options)
    with RunFolder(folder, Terminal()) as run, pipeline.opened(job, Terminal(), run) as context:
        planned = plan_stages(context, run)
        seconds = time.monotonic() - began
        plan = planned.plan.result
        runtime = context.runtime_on(context.board)
        return WallTime(
            edgeprune_version=VERSION,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=public_command(options.command),
            net=NET,
            target=job.target.name,
            budget=job.budget.text,
            precision=plan.plan.precision,
            fingerprint=context.board.fingerprint(runtime.name, runtime.threads),
            seconds=seconds,
            stages=tuple(run.costs),
            groups=len(plan.plan.groups),
            kernels=plan.quality.kernels_measured,
            checked=len(plan.checks),
            ratio=plan.chosen().ratio_to_dense,
            solver=solver_time(context, planned),
            versions=versions(),
        )


def solver_time(context: Context, planned: Planned) -> SolverTime:
    """The solver for the budget of a search that is done, and its front."""
    problem = stages.plan_basis(
        context,
        planned.file,
        planned.table.result,
        planned.nets.result,
        planned.scores.result,
    ).problem()
    open_groups = [grid for grid in problem.grids.values() if len(grid) > 1]
    # What the model that this problem has says of the plan, so that there is a structure within it, whatever summing rounds to.
    limit_ms = problem.model.predict(planned.plan.result.plan.widths()) * (1 + 1e-9)
    return SolverTime(
        groups=len(open_groups),
        choices=sum(map(len, open_groups)),
        solve_seconds=_median_seconds(lambda: search.solve(problem, limit_ms)),
        pareto_seconds=_median_seconds(lambda: search.pareto(problem)),
        points=len(search.pareto(problem)),
        repeats=REPEATS,
    )


def _median_seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


@click.command()
@click.option("--target", default="rpi4", show_default=True)
@click.option("--device", help="Name in devices.yaml.")
@click.option("--latency", default="50%", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "walltime.json")
def main(target: str, device: str | None, latency: str, out: Path) -> None:
    """Time every stage of a search on MobileNetV2 at 224 pixels."""
    time_every_kernel()
    command = shlex.join(["python", "benchmarks/walltime.py", *sys.argv[1:]])
    options = Options(target=target, device=device, latency=latency, command=command)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder) / "run")
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    write_json(found, out)
    click.echo(f"{found.seconds:.0f} s before training; next: python benchmarks/readme.py")


if __name__ == "__main__":
    main()
