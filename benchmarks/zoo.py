"""Channel groups on the architectures of model libraries: ``python benchmarks/zoo.py``, then ``python benchmarks/readme.py``.

One variant (a small one) of every architecture that torchvision, timm, pytorchcv and transformers build without weights. In each: the
groups are found, a random part of their channels is removed, and the result must equal the net with those channels zeroed. Each net has
a process of its own with bounded memory and time. Needs ``pip install torchvision timm pytorchcv transformers``; a library that is not
there is left out. A second run goes on where the first ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from zoo_blocks import ZooResults, ZooRow

from edgeprune.cli.progress import Terminal
from edgeprune.compress.groups.find import find_groups, mask_identity, remove_channels
from edgeprune.errors import EdgepruneError
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json

OUT = Path(__file__).parent / "results" / "zoo.json"
MEMORY_BYTES, CLASSES = 10 * 2**30, 10
SMALL = (
    "atto", "femto", "pico", "xxs", "nano", "xs", "tiny", "wd4", "w1d4", "050", "035", "x0_5", "mini", "_s", "b0", "light", "vit_b",
)  # fmt: skip
LIBRARIES = ("torchvision", "timm", "pytorchcv", "transformers")


def smallest(names: list[str]) -> str:
    """The variant that is most likely small: by the words for it, then by the first number in its name."""

    def size(name: str) -> tuple[int, int, int]:
        word = next((i for i, w in enumerate(SMALL) if w in name), len(SMALL))
        number = re.search(r"\d+", name)
        return word, int(number[0]) if number else 0, len(name)

    return min(names, key=size)


def by_module(pairs: Iterator[tuple[str, Any]]) -> dict[str, str]:
    """Architecture (module of the builder) -> its small variant."""
    found: dict[str, list[str]] = {}
    for name, builder in pairs:
        found.setdefault(builder.__module__.rpartition(".")[2], []).append(name)
    return {module: smallest(names) for module, names in sorted(found.items())}


def declare_operators() -> None:
    """Names for torchvision's compiled operators, so that a wheel for another build of torch imports. No classifier runs one."""
    global _declared
    if importlib.util.find_spec("torchvision") is None:
        return
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision  # noqa: F401

        return
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared: torch.library.Library | None = None  # what it declares is gone with it


def architectures(library: str) -> dict[str, str]:
    """Architecture -> variant of a library; empty where it is not installed."""
    try:
        if library == "torchvision":
            from torchvision import models

            names = models.list_models(module=models)
            return by_module((n, models.get_model_builder(n)) for n in names)
        if library == "timm":
            import timm

            return by_module((n, timm.model_entrypoint(n)) for n in timm.list_models())
        if library == "pytorchcv":
            from pytorchcv import model_provider

            return by_module(iter(model_provider._models.items()))
        import transformers
    except ImportError:
        return {}
    ending = "ForImageClassification"
    names = [n.removesuffix(ending) for n in dir(transformers) if n.endswith(ending)]
    return {name: f"{name}{ending}" for name in names if hasattr(transformers, f"{name}Config")}


class Logits(nn.Module):
    """A model of transformers that answers with its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, K]``."""
        return self.model(pixel_values=x).logits  # type: ignore[no-any-return]


def build(library: str, variant: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A net without trained weights, and the shape of one input."""
    if library == "torchvision":
        from torchvision import models

        extra = {"init_weights": True} if variant in ("googlenet", "inception_v3") else {}
        size = 299 if variant == "inception_v3" else 224
        return models.get_model(variant, num_classes=CLASSES, **extra), (1, 3, size, size)
    if library == "timm":
        import timm

        model = timm.create_model(variant, pretrained=False, num_classes=CLASSES)
        return model, (1, *model.default_cfg["input_size"])
    if library == "pytorchcv":
        from pytorchcv.model_provider import get_model

        model = get_model(variant, pretrained=False)
        size = getattr(model, "in_size", (224, 224))
        return model, (1, getattr(model, "in_channels", 3), *size)
    import transformers

    config = getattr(transformers, variant.replace("ForImageClassification", "Config"))()
    config.num_labels = CLASSES
    staged = hasattr(config, "depths")  # a layer for each stage
    for name in ("num_hidden_layers", "encoder_layers"):  # depth repeats what one layer shows
        if isinstance(getattr(config, name, None), int) and not staged:
            setattr(config, name, min(getattr(config, name), 2))
    size = getattr(config, "image_size", None) or 224
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return Logits(getattr(transformers, variant)(config)), (1, 3, *shape)


def look_at(library: str, architecture: str, variant: str) -> ZooRow:
    """Build, find groups, cut, compare."""
    base = {"library": library, "architecture": architecture, "variant": variant}
    torch.manual_seed(0)
    started = time.monotonic()
    try:
        model, shape = build(library, variant)
        model, x = model.eval(), torch.randn(shape)
        with torch.no_grad():
            answer = model(x)
    except Exception as error:
        return ZooRow(**base, status="not built", message=_line(error))
    if not isinstance(answer, torch.Tensor) or answer.dim() != 2:
        return ZooRow(**base, status="no classifier")
    known = {**base, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        groups, frozen = find_groups(model, x)
        status, message, half = "all frozen", "", None
        if groups:
            draw = np.random.default_rng(0)
            removed = {
                g.name: draw.permutation(g.channels)[: draw.integers(0, g.channels)].tolist()
                for g in groups
            }
            message = mask_identity(model, groups, removed, x) or ""
            status = "identity fails" if message else "identity holds"
            halves = {g.name: range(g.channels // 2) for g in groups}
            smaller = remove_channels(model, {g.name: g for g in groups}, halves, x)
            half = sum(p.numel() for p in smaller.parameters()) / known["parameters"]
    except EdgepruneError as error:
        return ZooRow(**known, status=status_of(_line(error), "refused"), message=_line(error))
    except Exception as error:
        return ZooRow(**known, status=status_of(_line(error), "failed"), message=_line(error))
    reasons = Counter(re.sub(r"'[^']*'|\d+", "…", f.reason)[:80] for f in frozen)
    seconds = round(time.monotonic() - started, 1)
    return ZooRow(
        **known, status=status, message=message, groups=len(groups), half_ratio=half,
        frozen=dict(reasons.most_common(6)), seconds=seconds,
    )  # fmt: skip


def status_of(message: str, otherwise: str) -> str:
    """``too large`` where the memory of :data:`MEMORY_BYTES` did not do."""
    is_memory = any(word in message for word in ("allocate memory", "alloc_cpu", "MemoryError"))
    return "too large" if is_memory else otherwise


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def in_child(library: str, architecture: str, variant: str, limit_s: float) -> ZooRow:
    """:func:`look_at` in a process of its own."""
    base = {"library": library, "architecture": architecture, "variant": variant}
    command = [sys.executable, __file__, "--one", library, architecture, variant]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return ZooRow(**base, status="too slow", message=f"over {limit_s:g} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]
        return ZooRow(**base, status=status_of(said, "failed"), message=said)
    return ZooRow.model_validate(json.loads(lines[-1]))


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    import importlib.metadata

    found = {}
    for name in ("torch", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@click.command()
@click.option("--one", nargs=3, default=None, hidden=True)
@click.option("--library", multiple=True, type=click.Choice(LIBRARIES), help="Default: all.")
@click.option("--seconds", default=240.0, show_default=True, help="Limit for one architecture.")
@click.option("--again", default="", help="Statuses to look at again, separated by commas.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
def main(
    one: tuple[str, str, str] | None,
    library: tuple[str, ...],
    seconds: float,
    again: str,
    out: Path,
) -> None:
    """Look at every architecture that was not looked at yet."""
    if one:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        torch.set_num_threads(1)
        declare_operators()
        click.echo(look_at(*one).model_dump_json())
        return
    rows: dict[tuple[str, str], ZooRow] = {}
    declare_operators()
    known = versions()
    if out.exists():
        earlier = read_json(ZooResults, out)
        rows = {
            (r.library, r.architecture): r for r in earlier.rows if r.status not in again.split(",")
        }
        known = {**earlier.versions, **known}  # of libraries that are not there now
    wanted = [(lib, a, v) for lib in library or LIBRARIES for a, v in architectures(lib).items()]
    progress = Terminal()
    save: Callable[[], None] = lambda: write_json(  # noqa: E731
        ZooResults(
            command="python benchmarks/zoo.py",
            versions=known,
            rows=tuple(row for _, row in sorted(rows.items())),
        ),
        out,
    )
    for lib, architecture, variant in wanted:
        if (lib, architecture) in rows:
            continue
        row = in_child(lib, architecture, variant, seconds)
        rows[lib, architecture] = row
        progress.say(f"{lib:12} {variant:28} {row.status:15} {row.groups:3} groups  {row.message}")
        save()


if __name__ == "__main__":
    main()
