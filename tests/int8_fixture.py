"""Two small nets whose INT8 files lose much, and the context in which better ones are searched: real files, on this machine's runtime."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from edgeprune import formats
from edgeprune.devices.board import Board
from edgeprune.formats import Format
from edgeprune.pipeline.context import Context
from edgeprune.progress import Silent
from edgeprune.records.device import Device
from edgeprune.records.target import Runtime, Target
from edgeprune.records.workload import Int8, Preprocess, Recovery
from edgeprune.workload.dataset import Dataset, Split

CLASSES = 5
LAYERS = ("0", "3", "7")  # of the nets below


class Said(Silent):
    """Keeps the lines that a user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.lines.append(text)


def samples(n: int, seed: int = 0) -> np.ndarray:
    """``float32 [n, 3, 12, 12]``."""
    return np.random.default_rng(seed).standard_normal((n, 3, 12, 12)).astype(np.float32)


def uneven() -> nn.Module:
    """A net whose channels differ in scale by up to 2^12 between its convolutions, which equalisation undoes."""
    model = _plain()
    factor = 2.0 ** torch.linspace(-6, 6, 12)
    with torch.no_grad():
        model[1].weight.mul_(factor)
        model[1].bias.mul_(factor)
        model[3].weight.div_(factor.reshape(1, -1, 1, 1))
    return model


def spoiled() -> nn.Module:
    """A net whose last layer has huge weights for a channel that is always 0, which no 8 bits can hold beside the others."""
    model = _plain()
    with torch.no_grad():
        model[3].weight[0] *= 1e-3
        model[3].bias[0] = -1.0
        model[7].weight[:, 0] = 1e5
    return model


def _plain() -> nn.Sequential:
    """Logits of mean 0 and deviation 1, so that classes are balanced and rounding can change them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].bias.add_(0.1)
        features = model[:7](torch.from_numpy(samples(256)))
        features[:, 0] = 0
        model[7].weight[:, 0] = 0
        logits = features @ model[7].weight.T
        model[7].weight.div_(logits.std(0)[:, None])
        model[7].bias.copy_(-logits.mean(0) / logits.std(0))
    return model


def local(folder: Path) -> Device:
    """This machine, with a lock of its own."""
    return Device(
        transport="local",
        targets=("this-machine",),
        stand_in=True,
        workdir=str(folder / "work"),
        lease_file=str(folder / "lease"),
    )


def context_of(
    board: Board, model: nn.Module, *, effort: str = "auto", ship: Format | None = None
) -> Context:
    """A context whose labels are the net's own answers; a format that ships has ONNX files judged in place of its own."""
    form = formats.load("onnx")
    sizes = {"train": 128, "selection": 200, "development": 64}
    splits = {}
    for seed, (name, n) in enumerate(sizes.items()):
        x = samples(n, seed)
        with torch.no_grad():
            splits[name] = Split(x, model(torch.from_numpy(x)).argmax(1).numpy())
    loaded = SimpleNamespace(
        model=model,
        dataset=Dataset(**splits, test=None, digest="d"),
        preprocess=Preprocess(kind="none"),
        n_classes=CLASSES,
        workload=SimpleNamespace(recovery=Recovery(epochs=2, batch_size=32)),
        dead_channels={},
    )
    target = Target(
        name="t", summary="", profile="p", format="onnx", runtime=Runtime(name="onnxruntime")
    )
    job = SimpleNamespace(
        loaded=loaded,
        target=target,
        int8=Int8.model_validate({"effort": effort}),
        seed=0,
        shipped_runtime="onnxruntime",
    )
    return Context(  # type: ignore[arg-type]
        job, form, ship or form, board, board, board, Said(), runs_ship=ship is None
    )
