"""How far the latency model is off on structures that it has never seen: ``python benchmarks/predictor.py``, with nothing else running.

For every network, target and precision the kernel table and its correction are made as a deployment makes them; then fresh random
structures are timed whole, in the same rounds as the dense net, and compared with what was predicted. The results file is written after
every one of them; run the command again to go on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
import torch
from blocks import RESULTS
from commands import time_every_kernel
from predictor_blocks import HeldOut, Predictor, PredictorResults

import edgeprune
from edgeprune.cli.progress import Terminal
from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import compare
from edgeprune.errors import EdgepruneError, SpecError
from edgeprune.formats import Resizable
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import export
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.stages import kernels
from edgeprune.pipeline.stages.finish import versions
from edgeprune.plan import bench
from edgeprune.plan.latency.model import sample_nets
from edgeprune.plan.net_model import fit, kernel_model, measure_nets
from edgeprune.plan.table import MOST_KERNELS, measure_table, removed_together
from edgeprune.records import catalog
from edgeprune.records.base import read_json, read_yaml
from edgeprune.records.files import write_json
from edgeprune.records.names import Precision
from edgeprune.records.statistics import nearest_rank
from edgeprune.records.workload import Workload
from edgeprune.workload.factories import call_factory
from edgeprune.workload.load import LoadedWorkload, from_objects, load_workload

EXAMPLE = "fashion-mnist"
HELD_OUT_SEED = 20261125  # the whole nets of the correction come from the run's own seed
CHUNK = 8  # structures in one request, with the dense net among them
LOADS = 48  # of each held-out structure: with the 12 of a search, one timing is as uncertain as a good prediction
SAMPLES = 512  # of noise, for a network that comes without data: time does not depend on it


def load(model: str, shape: Sequence[int]) -> LoadedWorkload:
    """The example, or a factory with random weights and noise of ``shape`` ``[C, H, W]`` as data."""
    folder = catalog.example_dir(EXAMPLE)
    workload = read_yaml(Workload, folder / "edgeprune.yaml")
    if model == "example":
        return load_workload(workload, folder)
    torch.manual_seed(0)
    made = call_factory(model, Path.cwd(), key="model").value
    x = np.random.default_rng(0).standard_normal((SAMPLES, *shape)).astype(np.float32)
    return from_objects(made, x, task="classify")


def resizable(context: Context, precision: Precision, folder: Path) -> Resizable:
    """The dense file of one precision as one that takes any widths."""
    dense = export.dense_files(context, folder)
    variant = export.variant_file(context, precision, folder)
    artifact = dense.int8 if precision == "int8" else dense.fp32
    return export.resizable(
        context, folder / artifact.path, folder / variant.artifact.path, variant.widths
    )


def measure_held_out(
    stand: bench.Stand, file: Resizable, grids: dict[str, tuple[int, ...]], count: int
) -> list[tuple[dict[str, int], float, float]]:
    """Structures, each with its measured share of the dense latency and half of that share's 99 % interval."""
    dense, found = file.resized({}), []
    nets = sample_nets(grids, count, HELD_OUT_SEED, removed_together(file, grids))
    for start in range(0, count, CHUNK):
        part = nets[start : start + CHUNK]
        files = {"dense": dense, **{str(i): file.resized(w) for i, w in enumerate(part)}}
        measured = stand.measure(files, f"held-out-{start}", replace(SEARCH, rounds=LOADS))
        for i, widths in enumerate(part):
            one = compare(measured[str(i)], measured["dense"])
            found.append((widths, one.ratio, (one.high - one.low) / 2))
    return found


def evaluate(
    context: Context, model: str, precision: Precision, count: int, folder: Path
) -> Predictor:
    """Make table and correction as a deployment does, then compare them with structures that are new."""
    runtime = context.runtime_on(context.board)
    fingerprint = context.board.fingerprint(runtime.name, runtime.threads)
    file = resizable(context, precision, folder)
    stand = bench.Stand(context.board, runtime, precision)
    started = time.monotonic()
    table = measure_table(
        stand,
        file,
        context.groups[0],
        fingerprint_key=fingerprint.key(),
        format_name=context.job.target.format,
        progress=context.progress,
        prior=kernels.profile_steps(context, fingerprint, precision, file),
    )
    timed = time.monotonic()
    nets = measure_nets(stand, file, table.grids, seed=context.job.seed)
    done = time.monotonic()
    fitted, quality = fit(kernel_model(file, table, context.full), nets, table.kernels_measured)
    held_out = tuple(
        HeldOut(
            predicted_ratio=fitted.predict(widths) / nets.dense_ms,
            measured_ratio=ratio,
            noise_ratio=noise,
        )
        for widths, ratio, noise in measure_held_out(stand, file, table.grids, count)
    )
    errors = [abs(h.predicted_ratio / h.measured_ratio - 1) for h in held_out]
    return Predictor(
        model=model,
        target=context.job.target.name,
        device=context.job.device_name,
        fingerprint=fingerprint,
        precision=precision,
        dense_ms=nets.dense_ms,
        groups=len(table.grids),
        kernels=table.kernels_measured,
        fit=quality,
        nets=len(nets.ms),
        table_seconds=timed - started,
        nets_seconds=done - timed,
        mean_error_ratio=sum(errors) / len(errors),
        p95_error_ratio=nearest_rank(errors, 0.95),
        worst_error_ratio=max(errors),
        rank_correlation=rank_correlation(held_out),
        held_out=held_out,
    )


def rank_correlation(held_out: Sequence[HeldOut]) -> float:
    """Kendall's tau-a of predicted and measured shares: 1 when every pair is in the right order."""
    pairs = list(itertools.combinations(held_out, 2))
    signs = [
        math.copysign(1, a.predicted_ratio - b.predicted_ratio)
        * math.copysign(1, a.measured_ratio - b.measured_ratio)
        for a, b in pairs
    ]
    return sum(signs) / max(len(signs), 1)


@click.command()
@click.option(
    "--model", "models", multiple=True, default=("example",), show_default=True,
    help="example, or FILE.py:FACTORY; may be given several times.",
)  # fmt: skip
@click.option("--shape", default="1,28,28", show_default=True, help="C,H,W of a factory's input.")
@click.option("--target", "targets", multiple=True, default=("rpi4", "this-machine"))
@click.option("--precision", "precisions", multiple=True, default=("fp32", "int8"))
@click.option("--device", help="Name in devices.yaml.")
@click.option("--held-out", type=click.IntRange(2), default=24, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "predictor.json")
def main(
    models: tuple[str, ...],
    shape: str,
    targets: tuple[str, ...],
    precisions: tuple[Precision, ...],
    device: str | None,
    held_out: int,
    out: Path,
) -> None:
    """Compare predicted with measured latency on structures that the model was not fitted on."""
    time_every_kernel()
    command = shlex.join(["python", "benchmarks/predictor.py", *sys.argv[1:]])
    rows = list(read_json(PredictorResults, out).rows) if out.is_file() else []
    try:
        size = _shape(shape)
        for model, target in itertools.product(models, targets):
            options = Options(target=target, device=device, command=command)
            finished = {r.precision for r in rows if (r.model, r.target) == (model, target)}
            for precision in [p for p in precisions if p not in finished]:
                row = run(model, size, options, precision, held_out)
                rows.append(row)
                write(rows, command, out)
                click.echo(line(row))
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(f"{out} has {len(rows)} rows")


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(f"--shape must be C,H,W such as 3,224,224, but is {text!r}") from error


def run(
    model: str, shape: Sequence[int], options: Options, precision: Precision, held_out: int
) -> Predictor:
    """One row of the results."""
    job = api.resolve(load(model, shape), replace(options, latency=options.latency or "60%"))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        context = stack.enter_context(pipeline.opened(job, Terminal()))
        return evaluate(context, model, precision, held_out, folder)


def write(rows: Sequence[Predictor], command: str, out: Path) -> None:
    """The results file with the rows so far."""
    results = PredictorResults(
        edgeprune_version=edgeprune.__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        most_kernels=MOST_KERNELS,
        held_out_seed=HELD_OUT_SEED,
        versions=versions(),
        rows=tuple(rows),
    )
    write_json(results, out)


def line(row: Predictor) -> str:
    """A row in words."""
    noise = float(np.median([h.noise_ratio / h.measured_ratio for h in row.held_out]))
    return (
        f"{row.model} {row.target} {row.precision} ({row.fingerprint.stamp}): {row.mean_error_ratio:.1%} mean,"
        f" {row.p95_error_ratio:.1%} at 95 %, {row.worst_error_ratio:.1%} worst on {len(row.held_out)} nets (each known to"
        f" +-{noise:.1%}); {row.kernels} kernels in {row.table_seconds:.0f} s, {row.nets} nets in {row.nets_seconds:.0f} s;"
        f" rank correlation {row.rank_correlation:.2f}"
    )


if __name__ == "__main__":
    main()
