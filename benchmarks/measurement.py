"""How far a measured difference can be trusted: ``python benchmarks/measurement.py``, with nothing else running.

The models are chains of 100, 102 and 105 equal layers, so that one takes 2 % and 5 % more than another by construction. Every trial
compares two of them, or one with itself (A/A), by the paired rule of this project and by sequential rules that other tools use. Trials
of all rules take turns while all have some left, so that they meet the same hours. The results file is written every ten trials; run
the command again to go on.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
from blocks import RESULTS, MeasurementResults, Trial, measurement_block

import edgeprune
from edgeprune.cli.progress import Terminal
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.timing.decide import decide
from edgeprune.devices.timing.measure import ModelFile
from edgeprune.errors import EdgepruneError
from edgeprune.pipeline.stages.finish import versions
from edgeprune.records.base import read_json
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes, write_json
from edgeprune.records.measurement import Block

LAYERS = (100, 102, 105)
WIDTH, ROWS = 192, 4  # a layer of about 5 microseconds on one x86 core
RUNTIME = "onnxruntime"
BLOCK_MS = 5.0  # about 10 runs; 20 ms, the default of decide(), would make the whole take hours
SAVE_EVERY = 10
PARTS = ("a-a", "shift", "rules")

# The sequential rules, as plans of one block. The samples are calls, since a call takes over 0.2 ms.
FIFTY = TimingPlan(rounds=1, block_ms=0.001, min_runs=50, max_runs=50, warmup_ms=0)
# TFLite benchmark_model: warm-up of at least 1 run and 0.5 s, then at least 50 runs and 1 s; the headline is the mean.
BENCHMARK_MODEL = TimingPlan(rounds=1, block_ms=1000, min_runs=50, max_runs=20_000, warmup_ms=500)
# onnxruntime_perf_test: 1000 runs here, where its default is 600 s or a count that is given; the headline is the mean.
PERF_TEST = TimingPlan(rounds=1, block_ms=0.001, min_runs=1000, max_runs=1000, warmup_ms=0)


def chain(layers: int) -> ModelFile:
    """A model of equal matrix products, one after the other, all with one orthogonal matrix, so that values keep their size."""
    from onnx import TensorProto, helper, numpy_helper

    matrix, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))
    nodes = [
        helper.make_node("MatMul", [f"x{i}", "matrix"], [f"x{i + 1}"], name=f"layer{i}")
        for i in range(layers)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, WIDTH])
        for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(matrix.astype(np.float32), "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content: bytes = model.SerializeToString(deterministic=True)
    return ModelFile(f"{layers} layers", content, "fp32", sha256_bytes(content))


def paired(board: Board, number: int, candidate: int, plan: TimingPlan) -> list[Trial]:
    """One decision between a chain of ``candidate`` layers and the shortest one."""
    found = decide(board, chain(candidate), chain(LAYERS[0]), runtime=RUNTIME, threads=1, plan=plan)
    return [
        Trial(
            number=number,
            rule="paired",
            true_ratio=candidate / LAYERS[0],
            ratio=found.ratio,
            verdict=found.verdict,
            pairs=found.pairs,
            seconds=found.seconds,
        )
    ]


def alone(board: Board, name: str, plan: TimingPlan) -> Block:
    """The shortest chain, loaded and timed alone, as a tool does that is started for one file."""
    model = chain(LAYERS[0])
    board.load(name, model.content, runtime=RUNTIME, threads=1)
    try:
        (block,) = board.time([name], plan).blocks[name]
    finally:
        board.unload([name])
    return block


def sequential(board: Board, number: int) -> Iterator[Trial]:
    """The same file twice, one after the other, by each sequential rule."""
    mean, median = statistics.fmean, statistics.median
    rules: list[tuple[TimingPlan, dict[str, Callable[..., float]]]] = [
        (FIFTY, {"50 then 50, medians": median, "50 then 50, means": mean}),
        (BENCHMARK_MODEL, {"benchmark_model": mean}),
        (PERF_TEST, {"onnxruntime_perf_test": mean}),
    ]
    for plan, figures in rules:
        start = time.monotonic()
        a, b = alone(board, "a", plan), alone(board, "b", plan)
        seconds = time.monotonic() - start
        for rule, figure in figures.items():
            yield Trial.model_validate(
                {
                    "number": number,
                    "rule": rule,
                    "true_ratio": 1.0,
                    "ratio": figure(b.samples_ns) / figure(a.samples_ns),
                    "seconds": seconds,
                }
            )


def trial(board: Board, number: int, parts: tuple[str, ...], plan: TimingPlan) -> list[Trial]:
    """Everything that one trial compares."""
    found: list[Trial] = []
    if "a-a" in parts:
        found += paired(board, number, LAYERS[0], plan)
    if "shift" in parts:
        found += paired(board, number, LAYERS[1], plan) + paired(board, number, LAYERS[2], plan)
    if "rules" in parts:
        found += sequential(board, number)
    return found


def base_ms(board: Board) -> dict[str, float]:
    """Median time of each chain, interleaved."""
    names = [str(n) for n in LAYERS]
    for n in LAYERS:
        board.load(str(n), chain(n).content, runtime=RUNTIME, threads=1)
    plan = TimingPlan(rounds=10, block_ms=BLOCK_MS, min_runs=5, max_runs=500, warmup_ms=100)
    blocks = board.time(names, plan).blocks
    board.unload(names)
    return {n: statistics.median(statistics.median(b.samples_ns) for b in blocks[n]) / 1e6 for n in names}  # fmt: skip


def begun(board: Board, out: Path, block_ms: float) -> MeasurementResults:
    """Earlier results of this very set-up, or an empty record."""
    fingerprint = board.fingerprint(RUNTIME, 1)
    empty = MeasurementResults(
        edgeprune_version=edgeprune.__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["python", "benchmarks/measurement.py", *sys.argv[1:]]),
        fingerprint=fingerprint,
        layer=f"MatMul [{ROWS}, {WIDTH}] x [{WIDTH}, {WIDTH}]",
        block_ms=block_ms,
        chain_ms=base_ms(board),
        versions=versions(),
        trials=(),
    )
    if not out.is_file():
        return empty
    earlier = read_json(MeasurementResults, out)
    same = (earlier.fingerprint.key(), earlier.layer, earlier.block_ms)
    if same != (fingerprint.key(), empty.layer, empty.block_ms):
        raise EdgepruneError(
            f"{out} holds trials of another machine or set-up", hint="give another --out"
        )
    return earlier


def counts(results: MeasurementResults) -> dict[str, int]:
    """Trials done so far, by part."""
    done = dict.fromkeys(PARTS, 0)
    for t in results.trials:
        part = "rules" if t.rule != "paired" else "a-a" if t.true_ratio == 1 else "shift"
        done[part] = max(done[part], t.number + 1)
    return done


@click.command()
@click.option("--trials", type=click.IntRange(1), default=200, show_default=True)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Default: all three.")
@click.option("--block-ms", type=click.FloatRange(1, 1000), default=BLOCK_MS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "measurement.json")
def main(trials: int, only: tuple[str, ...], block_ms: float, out: Path) -> None:
    """Compare rules of measurement on models whose true difference is known."""
    progress = Terminal()
    plan = TimingPlan(
        rounds=8, block_ms=block_ms, min_runs=5, max_runs=500, warmup_ms=20, reload=True
    )
    device = Device(transport="local", targets=(), stand_in=True)
    try:
        with open_board("this-machine", device) as board:
            results = begun(board, out, block_ms)
            done = counts(results)
            parts = [p for p in (only or PARTS) if done[p] < trials]
            first = min((done[p] for p in parts), default=trials)
            with progress.bar("trials", trials - first) as bar:
                for number in range(first, trials):
                    wanted = tuple(p for p in parts if done[p] <= number)
                    found = trial(board, number, wanted, plan)
                    results = results.model_copy(update={"trials": (*results.trials, *found)})
                    bar.advance(1, f"trial {number + 1}: {found[0].rule} {found[0].ratio - 1:+.2%}")
                    if (number + 1) % SAVE_EVERY == 0 or number + 1 == trials:
                        write_json(results, out)
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(measurement_block(results))
    click.echo(f"\nwrote {out}; next: python benchmarks/readme.py", err=True)


if __name__ == "__main__":
    main()
