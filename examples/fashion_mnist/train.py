"""Train the example network from scratch: ``python examples/fashion_mnist/train.py``.

Writes ``fashion_net.safetensors`` beside this file and ``training.json`` with the figures, seed and settings that made it.
About 20 minutes on two CPU cores with bfloat16 instructions; a CUDA device is used when there is one. The selection split decides which
epoch is kept; the development split is read once at the end; the test split is not read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import data
import net
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """``uint8 [N, 28, 28]`` to normalised ``float32 [N, 1, 28, 28]``, with the constants of ``edgeprune.yaml``."""
    return ((torch.from_numpy(images.copy()).float() / 255 - net.MEAN) / net.STD).unsqueeze(1)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image of ``[N, 1, H, W]`` by up to two pixels, mirror half of them, and erase a random square in half of them."""
    n, _, height, width = x.shape
    padded = functional.pad(x, (2, 2, 2, 2), value=float(x.min()))
    dy = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(height)
    dx = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(width)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    dx = torch.where(flip, dx.flip(1), dx)
    batch = torch.arange(n)[:, None, None]
    shifted = padded[batch, 0, dy[:, :, None], dx[:, None, :]].unsqueeze(1)
    size = 8
    top = torch.randint(0, height - size + 1, (n, 1), generator=generator)
    left = torch.randint(0, width - size + 1, (n, 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    chosen = torch.rand(n, 1, 1, generator=generator) < 0.5
    erase = (in_rows[:, :, None] & in_columns[:, None, :] & chosen).unsqueeze(1)
    return shifted.masked_fill(erase, 0.0)


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> float:
    """Share of images in ``[N, 1, 28, 28]`` whose top class is the label."""
    model.eval()
    hits = [
        (model(a.to(device)).argmax(1).cpu() == b).sum()
        for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(sum(hits)) / len(y)


def main() -> None:
    """Train, keep the best epoch by the selection split, and write the weights with their record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "fashion_net.safetensors")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = {
        name: (to_tensor(x), torch.from_numpy(y))
        for name, (x, y) in data.load().items()
        if name != "test"
    }
    x, y = splits["train"]
    model = net.build().to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    batch, peak = 128, 0.1
    steps = args.epochs * (len(x) // batch)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps, pct_start=0.1)
    best, started = (0.0, 0), time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        for chosen in torch.randperm(len(x), generator=generator).split(batch)[: len(x) // batch]:
            images = augment(x[chosen], generator).to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = functional.cross_entropy(
                    model(images), y[chosen].to(device), label_smoothing=0.05
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            average.update_parameters(model)
        score = accuracy(average.module, *splits["selection"], device)
        if score > best[0]:
            best = (score, epoch)
            state = {k: v.contiguous().cpu() for k, v in average.module.state_dict().items()}
            save_file(state, args.out)
        print(
            f"epoch {epoch + 1}/{args.epochs}  loss {loss.item():.3f}  selection {score:.4f}"
            f"  {time.monotonic() - started:.0f} s",
            flush=True,
        )
    net_kept = net.build()
    from safetensors.torch import load_file

    net_kept.load_state_dict(load_file(args.out))
    record = {
        "seed": args.seed,
        "epochs": args.epochs,
        "epoch_kept": best[1] + 1,
        "selection_accuracy": best[0],
        "development_accuracy": accuracy(net_kept, *splits["development"], torch.device("cpu")),
        "images": {name: len(pair[1]) for name, pair in splits.items()},
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "device": device.type,
    }
    (args.out.parent / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
