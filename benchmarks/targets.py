"""Every target's files side by side: ``python benchmarks/targets.py``, then ``python benchmarks/readme.py``.

Each net is converted to each target's format in both precisions; what can be run here answers real images. Nothing is pruned or trained.
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
from compare import load_net
from targets_blocks import TargetResults, TargetRow

from edgeprune import api, pipeline, records
from edgeprune.closing import versions
from edgeprune.compress.evaluate import logits
from edgeprune.context import NOT_RUN, Context
from edgeprune.errors import EdgepruneError
from edgeprune.folders import model_bytes
from edgeprune.options import Options
from edgeprune.progress import Terminal
from edgeprune.runfolder import RunFolder
from edgeprune.specs import Recovery

OUT = Path(__file__).parent / "results" / "targets.json"
TARGETS = ("rpi4", "this-machine", "jetson-orin-nano", "android-arm64", "iphone")
IMAGES = 1000


def rows_of(context: Context, net: str, folder: Path) -> list[TargetRow]:
    """Both precisions of one target."""
    job, form = context.job, context.ship
    development = job.loaded.dataset.development.head(IMAGES)
    x, y = context.development[:IMAGES].numpy(), development.y
    expected = logits(context.model, torch.from_numpy(x)).argmax(1)
    base = {"net": net, "target": job.target.name, "format": form.info.name}
    float_path = folder / f"{net}.fp32{form.info.suffix}"
    int8_path = folder / f"{net}.int8{form.info.suffix}"
    found: list[TargetRow] = []
    exact: torch.Tensor | None = None
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
            continue
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
                changes["accuracy"] = float(hits.mean())
            if exact is None:
                exact = answers
            else:
                step = float(exact.max() - exact.min()) / 255
                changes["error_steps"] = float((answers - exact).abs().max()) / step
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


@click.command()
@click.option("--net", "nets", multiple=True, default=("example", "resnet20-wide"))
@click.option("--target", "targets", multiple=True, default=TARGETS)
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/targets"))
def main(nets: tuple[str, ...], targets: tuple[str, ...], out: Path, run: Path) -> None:
    """Convert, run, compare."""
    progress = Terminal()
    rows: list[TargetRow] = []
    accuracy: dict[str, float] = {}
    run.mkdir(parents=True, exist_ok=True)
    for net in nets:
        loaded = load_net(net, Recovery(epochs=0))
        for target in targets:
            job = api.resolve(loaded, Options(target=target, run=run))
            with (
                RunFolder(run / f"{net}-{target}", progress) as folder,
                pipeline.opened(job, progress, folder) as context,
            ):
                if net not in accuracy:
                    y = torch.from_numpy(np.asarray(job.loaded.dataset.development.y[:IMAGES]))
                    answers = logits(context.model, context.development[:IMAGES]).argmax(1)
                    accuracy[net] = float((answers == y).double().mean())
                new = rows_of(context, net, folder.path)
            rows += new
            for row in new:
                progress.say(
                    f"{row.net:14} {row.target:18} {row.precision:5} {row.where or row.message}"
                    f"  {row.agreement}  {row.seconds:.1f} s"
                )
            records.write_json(
                TargetResults(
                    command=shlex.join(["python", "benchmarks/targets.py", *sys.argv[1:]]),
                    created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    split="development",
                    n=IMAGES,
                    torch_accuracy=accuracy,
                    versions=versions(),
                    rows=tuple(rows),
                ),
                out,
            )


if __name__ == "__main__":
    main()
