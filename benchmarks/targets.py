"""Every target's files side by side: ``python benchmarks/targets.py``, then ``python benchmarks/readme.py``.

Each net is converted to each target's format in both precisions; what can be run here answers real images. Nothing is pruned or trained.
Rows of the results file that a run does not make again stay, with their date: ``--net NAME --target NAME`` renews some.
``--emulated-board`` (as root on x86-64 Debian) also runs the INT8 files on the emulated arm64 board of the tests.
"""

from __future__ import annotations

import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
import torch
from commands import public_command
from compare import load_net
from targets_blocks import LEDGER_FROM, WORKED_OUT, TargetResults, TargetRow, merged
from targets_board import Int8File, by_its_kernels, error_steps, rows_on_the_board

from edgeprune.cli.progress import Terminal
from edgeprune.errors import EdgepruneError, FormatError
from edgeprune.formats import Evaluated, QuantizeOptions
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import NOT_RUN, Context
from edgeprune.pipeline.files.int8 import Search, layer_gains
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.stages.finish import versions
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json
from edgeprune.records.int8 import LayerFallback
from edgeprune.records.workload import Recovery
from edgeprune.workload.answers import logits

OUT = Path(__file__).parent / "results" / "targets.json"
TARGETS = ("rpi4", "rpi3-32bit", "this-machine", "jetson-orin-nano", "android-arm64", "iphone")
IMAGES = 1000
WORKED_OUT_IMAGES = 256  # a minute a file
CHUNK = 50  # images that are worked out at once: every value in between is kept
NETS = ("example", *sorted(p.stem for p in (Path(__file__).parent / "nets").glob("*.safetensors")))


def now() -> str:
    """The date and time, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def layer_costs(context: Context, fp32: Path, exact: torch.Tensor) -> tuple[LayerFallback, ...]:
    """What each layer costs an INT8 file with the format's own ranges; nothing for a format that cannot be looked into."""
    if context.has_twin:
        return ()  # the scan would be of the twin's file, not of this one
    x, y = context.development[:IMAGES].numpy(), context.job.loaded.dataset.development.y
    reference = logits(context.model, torch.from_numpy(x))
    folder = fp32.parent / "int8"
    folder.mkdir(exist_ok=True)
    search = Search(context, folder, x, None if y is None else y[:IMAGES], reference, exact)
    search.add("own ranges", fp32, context.model, QuantizeOptions())
    return tuple(
        LayerFallback(layer=layer, gain_nats=gain)
        for layer, (gain, _) in layer_gains(search, search.best).items()
    )


def answers_of(context: Context, path: Path, x: np.ndarray) -> tuple[str, torch.Tensor | None]:
    """Who answers a file here, and what: its runtime, or torch by the operations in the file where the format can be worked out.

    Answers that are worked out are of the first :data:`WORKED_OUT_IMAGES`.
    """
    if context.runs_ship:
        where = f"{context.runtime_on(context.host).name}, host"
        return where, context.run_file(context.host, path, x)
    form = context.ship
    if not isinstance(form, Evaluated):
        return NOT_RUN, None
    try:
        few = x[:WORKED_OUT_IMAGES]
        parts = [form.evaluate(path, few[i : i + CHUNK]) for i in range(0, len(few), CHUNK)]
    except FormatError as error:
        context.progress.say(f"{path.name}: {error.message}")
        return NOT_RUN, None
    return WORKED_OUT, torch.from_numpy(np.concatenate(parts))


def converted(context: Context, net: str, folder: Path) -> tuple[list[TargetRow], list[Path]]:
    """Both files of one target with a row for each; without the FP32 file there is none in INT8, and a row says why."""
    form = context.ship
    base = {"net": net, "target": context.job.target.name, "format": form.info.name}
    paths = [folder / f"{net}.{precision}{form.info.suffix}" for precision in ("fp32", "int8")]
    rows: list[TargetRow] = []
    for precision, path in zip(("fp32", "int8"), paths, strict=True):
        started = time.monotonic()
        changes: dict[str, object] = {"seconds": 0.0, "size_bytes": 0, "where": ""}
        try:
            if precision == "fp32":
                artifact = form.export(context.model, context.example, path)
            else:
                artifact = form.quantize(paths[0], context.calibration, path, model=context.model)
            changes |= {
                "precision": artifact.precision,
                "seconds": time.monotonic() - started,
                "size_bytes": len(model_bytes(path)),
                "int8_ops": sum(
                    n for op, n in artifact.op_counts.items() if op.startswith("int8:")
                ),
            }
        except EdgepruneError as error:
            changes |= {"precision": precision, "message": error.message}
        rows.append(TargetRow.model_validate({**base, "created": now(), **changes}))
        if rows[-1].message:
            break
    return rows, [path for path, row in zip(paths, rows, strict=False) if not row.message]


def rows_of(
    context: Context, net: str, folder: Path, for_board: list[Int8File] | None
) -> list[TargetRow]:
    """Both precisions of one target; the INT8 file with its answers here is added to those for the board, where there is one."""
    job, form = context.job, context.ship
    x = context.development[:IMAGES].numpy()
    y = job.loaded.dataset.development.head(IMAGES).y
    expected = logits(context.model, torch.from_numpy(x)).argmax(1)
    rows, paths = converted(context, net, folder)
    exact: torch.Tensor | None = None
    accuracy: list[float] = []  # of the FP32 file, then of the INT8 file
    for i, path in enumerate(paths):
        where, answers = answers_of(context, path, x)
        changes: dict[str, object] = {"where": where}
        if answers is not None:
            classes, n = answers.argmax(1), len(answers)
            changes["n"] = n if n < len(x) else None
            changes["agreement"] = float((classes == expected[:n]).double().mean())
            if y is not None:
                accuracy.append(float((classes.numpy() == np.asarray(y)[:n]).mean()))
                changes["accuracy"] = accuracy[-1]
        if answers is not None and exact is not None:
            lost = accuracy[-2] - accuracy[-1] if y is not None else 0.0
            if lost > LEDGER_FROM:
                changes["costs"] = layer_costs(context, paths[0], exact)
            changes["error_steps"] = error_steps(answers, exact)
            if for_board is not None:
                names = (net, job.target.name, form.info.name, form.info.layout)
                file = Int8File(*names, job.shipped_runtime, path, x, y, expected, exact, answers)
                for_board.append(by_its_kernels(context, file))
        exact = answers if exact is None else exact
        rows[i] = rows[i].model_copy(update=changes)
    return rows


def write(out: Path, rows: tuple[TargetRow, ...], accuracy: dict[str, float]) -> None:
    """The results file."""
    write_json(
        TargetResults(
            command=public_command(shlex.join(["python", "benchmarks/targets.py", *sys.argv[1:]])),
            created=now(),
            split="development",
            n=IMAGES,
            torch_accuracy=accuracy,
            versions=versions(),
            rows=rows,
        ),
        out,
    )


@click.command()
@click.option("--net", "nets", multiple=True, default=NETS)
@click.option("--target", "targets", multiple=True, default=TARGETS)
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/targets"))
@click.option("--emulated-board", is_flag=True)
def main(
    nets: tuple[str, ...], targets: tuple[str, ...], out: Path, run: Path, emulated_board: bool
) -> None:
    """Convert, run, compare."""
    progress = Terminal()
    for_board: list[Int8File] | None = [] if emulated_board else None
    rows: tuple[TargetRow, ...] = ()
    accuracy: dict[str, float] = {}
    if out.is_file():
        before = read_json(TargetResults, out)
        rows = tuple(
            row.model_copy(update={"created": row.created or before.created}) for row in before.rows
        )
        accuracy = dict(before.torch_accuracy)
    run.mkdir(parents=True, exist_ok=True)
    for net in nets:
        loaded = load_net(net, Recovery(epochs=0))
        for target in targets:
            job = api.resolve(loaded, Options(target=target, run=run))
            with (
                RunFolder(run / f"{net}-{target}", progress) as folder,
                pipeline.opened(job, progress, folder) as context,
            ):
                if target == targets[0] or net not in accuracy:
                    y = torch.from_numpy(np.asarray(job.loaded.dataset.development.y[:IMAGES]))
                    answers = logits(context.model, context.development[:IMAGES]).argmax(1)
                    accuracy[net] = float((answers == y).double().mean())
                new = rows_of(context, net, folder.path, for_board)
            rows = merged(rows, tuple(new))
            for row in new:
                progress.say(
                    f"{row.net:14} {row.target:18} {row.precision:5} {row.where or row.message}"
                    f"  {row.agreement}  {row.seconds:.1f} s"
                )
            write(out, rows, accuracy)
    if for_board is not None:
        for row in rows_on_the_board(for_board, progress, now()):
            rows = merged(rows, (row,))
            write(out, rows, accuracy)


if __name__ == "__main__":
    main()
