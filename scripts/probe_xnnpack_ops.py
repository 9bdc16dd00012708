"""Which operators XNNPACK leaves to LiteRT's built-in kernels, and which an INT8 file computes in float.

``python scripts/probe_xnnpack_ops.py`` converts one small net for each operator word of ``edgeprune/records/operators.py`` and loads it, in
both precisions. A line says how many of the file's operators XNNPACK took, which ones it left, and which ones take or give float inside an
INT8 file. The facts in ``avoid_ops`` of the profiles with LiteRT come from a run on x86-64. See also ``scripts/probe_conversions.py``.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn
from torch.nn import functional

from edgeprune.errors import EdgepruneError
from edgeprune.formats.tflite.format import FORMAT

CHANNELS, SIDE, SAMPLES = 16, 8, 16


class Between(nn.Module):
    """An operation between two convolutions, so that its neighbours are 8-bit in an INT8 file."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, CHANNELS, 1), nn.LazyConv2d(8, 1)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[1, 3, 8, 8]`` to what the last convolution gives."""
        return self.after(self.operation(self.before(x)))


def _attention(x: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return (rows @ rows.transpose(1, 2) @ rows).transpose(1, 2).reshape(x.shape)


def _fftn(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3)), s=x.shape[2:], dim=(2, 3))


def _grid_sample(x: torch.Tensor) -> torch.Tensor:
    steps = torch.linspace(-0.9, 0.9, SIDE)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)[None]
    return functional.grid_sample(x, grid, align_corners=False)


def _max_unpool(x: torch.Tensor) -> torch.Tensor:
    return functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), 2)


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "adaptive_avg_pool": lambda x: functional.adaptive_avg_pool2d(x, 4),
    "adaptive_max_pool": lambda x: functional.adaptive_max_pool2d(x, 4),
    "adaptive_max_pool, global": lambda x: functional.adaptive_max_pool2d(x, 1),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "avg_pool": lambda x: functional.avg_pool2d(x, 2),
    "bicubic": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "concat": lambda x: torch.cat([x, x * 2.0], 1),
    "elu": functional.elu,
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x), n=x.shape[3]),
    "fft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:]),
    "fftn": _fftn,
    "fold": lambda x: functional.fold(functional.unfold(x, 2, stride=2), SIDE, 2, stride=2),
    "gelu": functional.gelu,
    "grid_sample": _grid_sample,
    "group_norm": nn.GroupNorm(4, CHANNELS),
    "hard_sigmoid": lambda x: functional.hardsigmoid(x) * x,
    "hard_swish": functional.hardswish,
    "instance_norm": nn.InstanceNorm2d(CHANNELS),
    "interpolate": lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "interpolate, bilinear": lambda x: functional.interpolate(
        x, scale_factor=2.0, mode="bilinear", align_corners=False
    ),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[1:]),
    "leaky_relu": functional.leaky_relu,
    "log_softmax": lambda x: torch.log_softmax(x, 1),
    "matmul": _attention,
    "max_pool": lambda x: functional.max_pool2d(x, 2),
    "max_unpool": _max_unpool,
    "mish": functional.mish,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "pixel_shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "prelu": nn.PReLU(CHANNELS),
    "sigmoid": lambda x: torch.sigmoid(x) * x,
    "silu": functional.silu,
    "softmax": lambda x: torch.softmax(x, 1),
    "tanh": torch.tanh,
    "transposed_conv": nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2),
    "unfold": lambda x: functional.unfold(x, 2, stride=2).reshape(1, -1, SIDE // 2, SIDE // 2),
}


def probe(word: str, folder: Path) -> str:
    """What becomes of one operation, in one line."""
    torch.manual_seed(0)
    model = Between(OPERATIONS[word])
    x = torch.randn(SAMPLES, 3, SIDE, SIDE)
    model(x[:1])
    fp32, int8 = folder / "fp32.tflite", folder / "int8.tflite"
    FORMAT.export(model.eval(), x[:1].numpy(), fp32)
    FORMAT.quantize(fp32, x.numpy(), int8)
    found = [f"{name}: {_left(path)}" for name, path in (("fp32", fp32), ("int8", int8))]
    return f"{word:22} {'; '.join(found)}{_in_float(int8)}"


def _operators(path: Path) -> tuple[list[dict[str, Any]], Interpreter]:
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    return list(interpreter._get_ops_details()), interpreter


def _left(path: Path) -> str:
    """Operators that stand between the inputs and outputs of no delegate's node."""
    ops, _ = _operators(path)
    own = [op for op in ops if op["op_name"] != "DELEGATE"]
    maker = {int(t): op for op in own for t in op["outputs"]}
    taken: set[int] = set()
    for node in ops:
        if node["op_name"] != "DELEGATE":
            continue
        given, wanted = {int(t) for t in node["inputs"]}, [int(t) for t in node["outputs"]]
        while wanted:
            op = maker.get(wanted.pop())
            if op is not None and op["index"] not in taken:
                taken.add(op["index"])
                wanted += [int(t) for t in op["inputs"] if int(t) not in given]
    left = [op["op_name"] for op in own if op["index"] not in taken]
    return f"{len(taken)} of {len(own)}" + (f", left {' '.join(left)}" if left else "")


def _in_float(path: Path) -> str:
    """Operators of an INT8 file that compute in float, besides those that convert."""
    ops, interpreter = _operators(path)
    kinds = {d["index"]: d["dtype"] for d in interpreter.get_tensor_details()}
    names = [
        str(op["op_name"])
        for op in ops
        if op["op_name"] not in ("DELEGATE", "QUANTIZE", "DEQUANTIZE")
        and any(kinds.get(int(t)) is np.float32 for t in op["outputs"])
    ]
    return f"; float inside: {' '.join(names)}" if names else ""


def main() -> None:
    """Print a line for every operation."""
    print(f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}")
    for word in OPERATIONS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(probe(word, Path(folder)), flush=True)
            except (EdgepruneError, RuntimeError) as error:
                print(f"{word:22} {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
