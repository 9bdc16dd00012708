"""A project folder with a net so small that its every file can be timed and run under emulation, where one megaflop takes 20 ms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tinynet
import torch
from safetensors.torch import save_file
from torch import nn

SOURCE = '''
from torch import nn


def build():
    """Three small convolutions."""
    def block(c_in, c_out, stride):
        return [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(
        *block(1, 8, 2), *block(8, 32, 2), *block(32, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )
'''  # fmt: skip
COUNTS = {"train": 256, "selection": 96, "development": 96}


def small_project(folder: Path) -> Path:
    """Fill the folder with model, weights, data and ``edgeprune.yaml``. The labels are the net's own answers, so it is always right."""
    names: dict[str, object] = {}
    exec(SOURCE, names)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: nn.Module = names["build"]()  # type: ignore[operator]
        images = {s: tinynet.images(n, seed)[0] for seed, (s, n) in enumerate(COUNTS.items())}
        pixels = {s: torch.from_numpy(x)[:, None].float() / 255 for s, x in images.items()}
        model.train()(pixels["train"])  # sets the running statistics
        model.eval()
        found = model(pixels["train"])
        model[-1].weight /= found.std(0)[:, None]
        model[-1].bias.copy_((model[-1].bias - found.mean(0)) / found.std(0))
        answers = {s: model(x).argmax(1).numpy() for s, x in pixels.items()}
    arrays = {f"{s}_x": x for s, x in images.items()} | {f"{s}_y": y for s, y in answers.items()}
    (folder / "net.py").write_text(SOURCE)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors"
    )
    np.savez(folder / "data.npz", **arrays)
    recovery = {"epochs": 0.5, "batch_size": 64, "augment": {"shift_pixels": 0}}
    tinynet.write_settings(folder, max_drop="100%", recovery=recovery)
    return folder
