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
from targets_blocks import LEDGER_FROM, TargetResults, TargetRow, merged
from targets_board import Int8File, by_its_kernels, error_steps, rows_on_the_board

from edgeprune import api, pipeline, records
from edgeprune.closing import versions
from edgeprune.compress.evaluate import logits
from edgeprune.context import NOT_RUN, Context
from edgeprune.errors import EdgepruneError
from edgeprune.folders import model_bytes
from edgeprune.formats import QuantizeOptions
from edgeprune.int8 import Search, layer_gains
from edgeprune.int8_results import LayerFallback
from edgeprune.options import Options
from edgeprune.progress import Terminal
from edgeprune.runfolder import RunFolder
from edgeprune.specs import Recovery

OUT = Path(__file__).parent / "results" / "targets.json"
TARGETS = ("rpi4", "rpi3-32bit", "this-machine", "jetson-orin-nano", "android-arm64", "iphone")
IMAGES = 1000
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


def rows_of(
    context: Context, net: str, folder: Path, for_board: list[Int8File] | None
) -> list[TargetRow]:
    """Both precisions of one target; the INT8 file with its answers here is added to those for the board, where there is one."""
    job, form = context.job, context.ship
    development = job.loaded.dataset.development.head(IMAGES)
    x, y = context.development[:IMAGES].numpy(), development.y
    expected = logits(context.model, torch.from_numpy(x)).argmax(1)
    created = now()
    base = {"net": net, "target": job.target.name, "format": form.info.name, "created": created}
    float_path = folder / f"{net}.fp32{form.info.suffix}"
    int8_path = folder / f"{net}.int8{form.info.suffix}"
    found: list[TargetRow] = []
    exact: torch.Tensor | None = None
    accuracy: list[float] = []  # of the FP32 file, then of the INT8 file
    for precision, path in (("fp32", float_path), ("int8", int8_path)):
        started = time.monotonic()
        try:
            if precision == "fp32":
                artifact = form.export(context.model, context.example, path)
            else:
                artifact = form.quantize(float_path, context.calibration, path, model=context.model)
        except EdgepruneError as error:
            row = TargetRow(
                **base,
                precision=precision,
                where="",
                seconds=0.0,
                size_bytes=0,
                message=error.message,
            )
            found.append(row)
            break  # without the FP32 file there is none in INT8
        seconds = time.monotonic() - started
        changes: dict[str, object] = {"where": NOT_RUN}
        if context.runs_ship:
            answers = context.run_file(context.host, path, x)
            changes = {
                "where": f"{context.runtime_on(context.host).name}, host",
                "agreement": float((answers.argmax(1) == expected).double().mean()),
            }
            if y is not None:
                hits = answers.argmax(1).numpy() == np.asarray(y)
                accuracy.append(float(hits.mean()))
                changes["accuracy"] = accuracy[-1]
            if exact is None:
                exact = answers
            else:
                lost = accuracy[-2] - accuracy[-1] if y is not None else 0.0
                if lost > LEDGER_FROM:
                    changes["costs"] = layer_costs(context, float_path, exact)
                changes["error_steps"] = error_steps(answers, exact)
                if for_board is not None:
                    file = Int8File(
                        net,
                        job.target.name,
                        form.info.name,
                        form.info.layout,
                        job.shipped_runtime,
                        path,
                        x,
                        y,
                        expected,
                        exact,
                        answers,
                    )
                    for_board.append(by_its_kernels(context, file))
        counts = artifact.op_counts
        found.append(
            TargetRow.model_validate(
                {
                    **base,
                    "precision": artifact.precision,
                    "seconds": seconds,
                    "size_bytes": len(model_bytes(path)),
                    "int8_ops": sum(n for op, n in counts.items() if op.startswith("int8:")),
                    **changes,
                }
            )
        )
    return found


def write(out: Path, rows: tuple[TargetRow, ...], accuracy: dict[str, float]) -> None:
    """The results file."""
    records.write_json(
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
        before = records.read_json(TargetResults, out)
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
