"""INT8 recipes side by side on LiteRT: ``python benchmarks/int8.py``, then ``python benchmarks/readme.py``.

Every recipe of ``edgeprune.pipeline.files.int8`` that costs no training is made by itself, on dense nets, and answers the whole development
split; none is chosen here. Nets that a run does not make again keep their figures and their date.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import click
import torch
from commands import public_command
from compare import load_net
from int8_blocks import NetRecipes, RecipeResults, RecipeRow

from edgeprune.cli.progress import Terminal
from edgeprune.compress.evaluate import quality
from edgeprune.compress.int8.equalise import correct_biases, equalise
from edgeprune.errors import EdgepruneError
from edgeprune.formats import QuantizeOptions
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files.int8 import CLIPPING, LEAST_ERROR, Search
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.stages.finish import versions
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json
from edgeprune.records.workload import Recovery
from edgeprune.workload.answers import logits
from targets import NETS, now

OUT = Path(__file__).parent / "results" / "int8.json"
TARGET = "rpi4"


def add_recipes(search: Search, fp32: Path) -> None:
    """Own, percentile and least-error ranges; equalised layers and corrected biases, each alone and both, with own ranges."""
    context, own = search.context, QuantizeOptions()
    model, x = context.model, torch.from_numpy(context.calibration)
    search.add("min/max, as shipped", fp32, model, own)
    search.add("percentile", fp32, model, CLIPPING)
    search.add("least squared error", fp32, model, LEAST_ERROR)
    equalised, note = equalise(model, x[:1], x)
    search.add("equalised", search.export("equalised", equalised), equalised, own, note)
    for name, start in (("biases corrected", model), ("equalised, biases corrected", equalised)):
        try:
            corrected, note = correct_biases(start, x)
        except (RuntimeError, EdgepruneError) as error:
            context.progress.say(f"{name} left out: {str(error).splitlines()[0]}")
            continue
        stem = name.replace(", ", "-").replace(" ", "-")
        search.add(name, search.export(stem, corrected), corrected, own, note)


def recipes_of(context: Context, net: str, folder: Path) -> NetRecipes:
    """Every recipe of one net."""
    started = time.monotonic()
    split = context.job.loaded.dataset.development
    x = context.development.numpy()
    reference = logits(context.model, context.development)
    fp32 = folder / f"{net}.fp32{context.whole.info.suffix}"
    context.whole.export(context.model, context.example, fp32)
    search = Search(context, folder, x, split.y, reference, context.run_file(context.host, fp32, x))
    add_recipes(search, fp32)
    rows = []
    for made in search.found:
        answers = context.run_file(context.host, made.path, x)
        same = float((answers.argmax(1) == reference.argmax(1)).double().mean())
        rows.append(
            RecipeRow(
                recipe=made.tried.name,
                accuracy=made.tried.quality,
                agreement=same,
                loss_nats=made.tried.loss_nats,
                note=made.tried.note,
            )
        )
    return NetRecipes(
        net=net,
        created=now(),
        where=f"{context.runtime_on(context.host).name}, host",
        n=len(x),
        fp32=quality(search.exact, split.y, reference)[1],
        seconds=time.monotonic() - started,
        versions=versions(),
        rows=tuple(rows),
    )


@click.command()
@click.option("--net", "nets", multiple=True, default=NETS)
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/int8"))
def main(nets: tuple[str, ...], out: Path, run: Path) -> None:
    """Quantise every net by every recipe."""
    progress = Terminal()
    run.mkdir(parents=True, exist_ok=True)
    found: dict[str, NetRecipes] = {}
    if out.is_file():
        found = {net.net: net for net in read_json(RecipeResults, out).nets}
    for net in nets:
        job = api.resolve(load_net(net, Recovery(epochs=0)), Options(target=TARGET, run=run))
        with (
            RunFolder(run / net, progress) as folder,
            pipeline.opened(job, progress, folder) as context,
        ):
            found[net] = recipes_of(context, net, folder.path)
        for row in found[net].rows:
            progress.say(f"{net:18} {row.recipe:28} {row.accuracy:.2%} {row.agreement:.2%}")
        write_json(
            RecipeResults(
                command=public_command(shlex.join(["python", "benchmarks/int8.py", *sys.argv[1:]])),
                split="development",
                nets=tuple(found.values()),
            ),
            out,
        )


if __name__ == "__main__":
    main()
