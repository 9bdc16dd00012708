"""Train a network of :mod:`families` or :mod:`small` on Fashion-MNIST: ``python benchmarks/nets/train_nets.py resnet20-wide``.

Most steps see the images at half their size, which costs a quarter; the last ones see them whole. The selection split decides nothing
here (the last average is kept); the development split is read once; the test split is not read. Writes ``NAME.safetensors`` in half
precision and ``NAME.json`` with seed, settings and figures. Batch norm statistics of the kept weights are worked out afresh on whole
images, since the average mixes those of both sizes: ``--recalibrate`` does only that, to saved weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "fashion_mnist")]

import data  # noqa: E402
import families  # noqa: E402
import small  # noqa: E402
import train as example  # noqa: E402

from edgeprune.compress.heal.recover import low_precision  # noqa: E402

RECALIBRATION = 5120  # images of the training split
FACTORIES = families.FACTORIES | small.FACTORIES
BATCH, PEAK, WEIGHT_DECAY, SMOOTHING, AVERAGE = 128, 0.1, 5e-4, 0.05, 0.995


def load(name: str) -> nn.Module:
    """The trained network, in eval mode."""
    model = FACTORIES[name]()
    weights = load_file(HERE / f"{name}.safetensors")
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    return model.eval()


def recalibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Batch norm statistics of ``model`` from the first images of the training split at full size, in place."""
    batches = x[:RECALIBRATION].split(BATCH)
    torch.optim.swa_utils.update_bn(batches, model)
    model.eval()


def save(model: nn.Module, name: str) -> nn.Module:
    """Write the weights in half precision; the model as read back."""
    state = {
        k: (v.half() if v.is_floating_point() else v).contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(state, HERE / f"{name}.safetensors")
    return load(name)


def figures(
    kept: nn.Module, splits: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, object]:
    """Accuracies of a saved net, and the images behind its statistics."""
    cpu = torch.device("cpu")
    return {
        "recalibrated_on": RECALIBRATION,
        "selection_accuracy": example.accuracy(kept, *splits["selection"], cpu),
        "development_accuracy": example.accuracy(kept, *splits["development"], cpu),
    }


def main() -> None:
    """Train, average, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("net", choices=sorted(FACTORIES))
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument(
        "--small-share", type=float, default=0.8, help="of the epochs, at half size"
    )
    parser.add_argument("--recalibrate", action="store_true", help="train nothing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    splits = {
        n: (example.to_tensor(x), torch.from_numpy(y))
        for n, (x, y) in data.load().items()
        if n != "test"
    }
    x, y = splits["train"]
    if args.recalibrate:
        again = load(args.net)
        recalibrate(again, x)
        path = HERE / f"{args.net}.json"
        record = json.loads(path.read_bytes()) | figures(save(again, args.net), splits)
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record))
        return
    model = FACTORIES[args.net]().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE), use_buffers=True
    )
    steps = int(args.epochs * len(x) / BATCH)
    at_half = int(args.small_share * steps)
    optimiser = torch.optim.SGD(
        model.parameters(), PEAK, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, steps, pct_start=0.15)
    started, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    lowered = low_precision(torch.device("cpu")) is not None
    model.train()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(x), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        images = example.augment(x[chosen], generator)
        if step < at_half:
            images = functional.avg_pool2d(images, 2)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), y[chosen], label_smoothing=SMOOTHING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        if step % 100 == 99:
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    recalibrate(average.module, x)
    kept = save(average.module, args.net)
    record = {
        "net": args.net,
        "seed": args.seed,
        "epochs": args.epochs,
        "share_at_half_size": args.small_share,
        "multiplied_in": "bfloat16" if lowered else "float32",
        **figures(kept, splits),
        "images": {n: len(pair[1]) for n, pair in splits.items()},
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    (HERE / f"{args.net}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
