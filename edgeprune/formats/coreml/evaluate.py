"""What a Core ML program answers by the definition of its operations, worked out with torch; Core ML itself runs on Apple devices only.

Every operation is computed in ``float32`` and its result rounded to the type that the program declares, so half precision shows. It is not
how an Apple processor computes: sums there may be taken in half precision and in another order. So this says whether the *file* holds the
net that was converted, and never counts as a run.

Source of the operations: the reference of the MIL operations in the coremltools 9.0 package (``converters/mil/mil/ops/defs``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from edgeprune.errors import FormatError
from edgeprune.formats.coreml.program import (
    DEQUANTIZED_WEIGHT,
    MilOperation,
    MilProgram,
    dequantized,
)

SAME = 0.05  # of the largest value: sums in another order may round to another step; a mixed-up batch is far away
Values = dict[str, Any]


class Unknown(FormatError):
    """The program has an operation that is not worked out here."""


def evaluate(program: MilProgram, x: np.ndarray, output: str) -> np.ndarray:
    """One output for every sample.

    Args:
        program: with one input.
        x: ``float32 [N, ...]`` in the units of the input: raw values 0 to 255 where the input is an image.
        output: name of a tensor output.

    Returns:
        ``float32 [N, ...]``.

    Raises:
        Unknown: an operation is not known here; names it.
        FormatError: the program needs a value that nothing makes.
    """
    fixed = {name: _tensor(value) for name, value in program.constants.items()}
    with torch.no_grad():
        first = _answer(program, fixed, x[:1], output)
        if len(x) == 1:
            return first
        # Files are made for one sample at a time. Most nets work out many at once too; the first one tells.
        try:
            together = _answer(program, fixed, x, output)
            if together.shape[0] == len(x) and np.allclose(
                together[:1], first, atol=SAME * float(np.abs(first).max())
            ):
                return together
        except (RuntimeError, IndexError):
            pass
        rows = [_answer(program, fixed, x[i : i + 1], output) for i in range(1, len(x))]
    return np.concatenate([first, *rows])


def _answer(program: MilProgram, fixed: Values, x: np.ndarray, output: str) -> np.ndarray:
    values: Values = dict(fixed)
    values[program.inputs[0]] = torch.from_numpy(np.array(x, np.float32))
    for operation in program.operations:
        _run(program, operation, values, fixed)
    found: np.ndarray = values[output].to(torch.float32).numpy()
    return found


def _tensor(value: Any) -> Any:
    """Arrays as tensors, half precision widened; texts stay."""
    if not isinstance(value, np.ndarray):
        return value
    wide = value.astype(np.float32) if value.dtype == np.float16 else value
    if wide.dtype == np.uint16:
        wide = wide.astype(np.int32)
    return torch.from_numpy(np.array(wide))


def _run(program: MilProgram, operation: MilOperation, values: Values, fixed: Values) -> None:
    if operation.type == "classify":
        return
    if operation.type == DEQUANTIZED_WEIGHT:
        name = operation.outputs[0]
        if name not in fixed:
            weight = torch.from_numpy(dequantized(operation)[0])
            fixed[name] = _rounded(weight, operation.dtypes[0])
        values[name] = fixed[name]
        return
    function = _OPERATIONS.get(operation.type)
    if function is None:
        raise Unknown(
            f"the operation {operation.type} of a Core ML program is not worked out here",
            hint="its answers can be checked on a Mac only",
        )
    try:
        found = function(_Arguments(program, operation, values))
    except KeyError as error:
        raise FormatError(f"{operation.type} {operation.outputs[0]} lacks {error}") from error
    results = found if isinstance(found, (list, tuple)) else [found]
    for name, dtype, result in zip(operation.outputs, operation.dtypes, results, strict=True):
        values[name] = _rounded(result, dtype)


def _rounded(value: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "float16" and value.is_floating_point():
        return value.half().float()
    return value


class _Arguments:
    """The arguments of one operation."""

    def __init__(self, program: MilProgram, operation: MilOperation, values: Values) -> None:
        self.operation, self._values = operation, values

    def get(self, name: str, default: Any = None) -> Any:
        """A value: a tensor, a text, or a list of tensors."""
        operation = self.operation
        if name in operation.inputs:
            found = [self._values[n] for n in operation.inputs[name]]
            return found[0] if len(found) == 1 and name != "values" else found
        if name in operation.constants:
            return _tensor(operation.constants[name])
        return default

    def __getitem__(self, name: str) -> Any:
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def numbers(self, name: str, default: Any = None) -> list[int]:
        """A constant list of integers."""
        found = self.get(name)
        if found is None:
            return list(default)
        return [int(v) for v in found.reshape(-1).tolist()]

    def number(self, name: str, default: float) -> float:
        """A constant number."""
        found = self.get(name)
        return default if found is None else float(found)

    def flag(self, name: str) -> bool:
        """A constant truth value; false where it is not given."""
        return bool(self.get(name))


def _padding(
    call: _Arguments, sizes: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """Padding before and after each spatial axis, as ``functional.pad`` wants it: last axis first."""
    kind, spatial = call.get("pad_type", "valid"), len(sizes)
    if kind == "valid":
        return [0] * 2 * spatial
    if kind == "custom":
        pad = call.numbers("pad", [0] * 2 * spatial)
    else:  # same, same_lower: the output has ceil(size / stride) steps
        pad = []
        for size, step, dilation, length in zip(
            sizes, strides, dilations, call["x"].shape[2:], strict=True
        ):
            needed = max(0, (-(-length // step) - 1) * step + dilation * (size - 1) + 1 - length)
            half = needed // 2
            pad += [half, needed - half] if kind == "same" else [needed - half, half]
    return [pad[2 * i + j] for i in reversed(range(spatial)) for j in (0, 1)]


def _conv(call: _Arguments) -> torch.Tensor:
    x, weight = call["x"], call["weight"].float()
    spatial = weight.ndim - 2
    strides = call.numbers("strides", [1] * spatial)
    dilations = call.numbers("dilations", [1] * spatial)
    x = functional.pad(x, _padding(call, list(weight.shape[2:]), strides, dilations))
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    groups = int(call.number("groups", 1))
    bias = call.get("bias")
    return function(x, weight, bias, strides, 0, dilations, groups)


def _pool(call: _Arguments, kind: str) -> torch.Tensor:
    x, sizes = call["x"], call.numbers("kernel_sizes")
    strides = call.numbers("strides", [1] * len(sizes))
    if call.flag("ceil_mode"):
        raise Unknown("pooling with ceil_mode of a Core ML program is not worked out here")
    pad = _padding(call, sizes, strides, [1] * len(sizes))
    if len(sizes) != 2:
        raise Unknown("pooling over other than two axes is not worked out here")
    if kind == "max":
        return functional.max_pool2d(functional.pad(x, pad, value=-torch.inf), sizes, strides)
    total = functional.avg_pool2d(functional.pad(x, pad), sizes, strides)
    if not call.flag("exclude_padding_from_average"):
        return total
    return total / functional.avg_pool2d(functional.pad(torch.ones_like(x), pad), sizes, strides)


def _repeat(call: _Arguments) -> Any:
    """Every pixel so many times, along height and width, which are the last two axes."""
    scales = [call.number(f"scale_factor_{side}", 1.0) for side in ("height", "width")]
    if any(scale != int(scale) or scale < 1 for scale in scales):
        raise Unknown(f"upsampling by {scales} is not worked out here")
    high = call["x"].repeat_interleave(int(scales[0]), dim=-2)
    return high.repeat_interleave(int(scales[1]), dim=-1)


def _reduce(call: _Arguments, function: Callable[..., Any]) -> Any:
    x = call["x"]
    axes = call.numbers("axes", range(x.ndim))
    return function(x, dim=axes, keepdim=call.flag("keep_dims"))


def _quantize(call: _Arguments) -> torch.Tensor:
    x = call["input"]
    scale, zero = _along(call, x, "scale"), _along(call, x, "zero_point")
    low, high = (0, 255) if call["output_dtype"] == "uint8" else (-128, 127)
    steps = torch.round(x / scale) + (0 if zero is None else zero)
    return torch.clamp(steps, low, high)


def _dequantize(call: _Arguments) -> torch.Tensor:
    x = call["input"].float()
    scale, zero = _along(call, x, "scale"), _along(call, x, "zero_point")
    return (x if zero is None else x - zero) * scale  # type: ignore[no-any-return]


def _along(call: _Arguments, x: torch.Tensor, name: str) -> Any:
    found = call.get(name)
    if found is None or found.ndim == 0:
        return None if found is None else found.float()
    axis = int(call.number("axis", 0)) % x.ndim
    return found.float().reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _batch_norm(call: _Arguments) -> torch.Tensor:
    found: torch.Tensor = functional.batch_norm(
        call["x"],
        call["mean"],
        call["variance"],
        call.get("gamma"),
        call.get("beta"),
        False,
        0.0,
        call.number("epsilon", 1e-5),
    )
    return found


def _reshape(call: _Arguments) -> torch.Tensor:
    shape = call.numbers("shape")
    x: torch.Tensor = call["x"]
    shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if shape[0] == 1 and -1 not in shape and np.prod(shape) * x.shape[0] == x.numel():
        shape[0] = x.shape[0]  # several samples at once
    return x.reshape(shape)


def _squeeze(call: _Arguments) -> torch.Tensor:
    x: torch.Tensor = call["x"]
    axes = call.get("axes")
    return x.squeeze() if axes is None else x.squeeze(dim=tuple(call.numbers("axes")))


def _expand(call: _Arguments) -> torch.Tensor:
    x: torch.Tensor = call["x"]
    for axis in call.numbers("axes"):
        x = x.unsqueeze(axis)
    return x


def _pad(call: _Arguments) -> torch.Tensor:
    pad, mode = call.numbers("pad"), call.get("mode", "constant")
    if mode != "constant":
        raise Unknown(f"padding by {mode} is not worked out here")
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    flat = [v for pair in reversed(pairs) for v in pair]
    found: torch.Tensor = functional.pad(call["x"], flat, value=call.number("constant_val", 0.0))
    return found


def _slice(call: _Arguments) -> torch.Tensor:
    x: torch.Tensor = call["x"]
    begin, end = call.numbers("begin"), call.numbers("end")
    steps = call.numbers("stride", [1] * x.ndim)
    masks = {
        key: [bool(v) for v in call.numbers(key, [0] * x.ndim)]
        for key in ("begin_mask", "end_mask", "squeeze_mask")
    }
    if min(steps) < 1:
        raise Unknown("a slice that goes backwards is not worked out here")
    index: list[Any] = []
    for i in range(x.ndim):
        if masks["squeeze_mask"][i]:
            index.append(begin[i])
            continue
        low = None if masks["begin_mask"][i] else begin[i]
        index.append(slice(low, None if masks["end_mask"][i] else end[i], steps[i]))
    return x[tuple(index)]


def _split(call: _Arguments) -> list[torch.Tensor]:
    x: torch.Tensor = call["x"]
    axis = int(call.number("axis", 0))
    sizes = call.get("split_sizes")
    if sizes is not None:
        return list(torch.split(x, call.numbers("split_sizes"), axis))
    return list(torch.chunk(x, int(call.number("num_splits", 1)), axis))


def _layer_norm(call: _Arguments) -> torch.Tensor:
    x: torch.Tensor = call["x"]
    axes = call.numbers("axes", range(x.ndim))
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + call.number("epsilon", 1e-5))
    gamma, beta = call.get("gamma"), call.get("beta")
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def _matmul(call: _Arguments) -> torch.Tensor:
    x, y = call["x"].float(), call["y"].float()
    x = x.transpose(-1, -2) if call.flag("transpose_x") else x
    y = y.transpose(-1, -2) if call.flag("transpose_y") else y
    found: torch.Tensor = x @ y
    return found


def _prelu(call: _Arguments) -> torch.Tensor:
    found: torch.Tensor = functional.prelu(call["x"], call["alpha"])
    return found


def _clip(x: torch.Tensor, call: _Arguments) -> torch.Tensor:
    return torch.clamp(x, call.number("alpha", -torch.inf), call.number("beta", torch.inf))


def _gelu(call: _Arguments) -> torch.Tensor:
    mode = call.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return call["x"] * torch.sigmoid(1.702 * call["x"])  # type: ignore[no-any-return]
    approximate = "tanh" if mode == "TANH_APPROXIMATION" else "none"
    return functional.gelu(call["x"], approximate=approximate)


def _one(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Arguments], torch.Tensor]:
    return lambda call: function(call["x"])


def _two(function: Callable[[Any, Any], Any]) -> Callable[[_Arguments], Any]:
    return lambda call: function(call["x"], call["y"])


_OPERATIONS: Mapping[str, Callable[[_Arguments], Any]] = {
    "conv": _conv,
    "linear": lambda c: functional.linear(c["x"], c["weight"].float(), c.get("bias")),
    "matmul": _matmul,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "cast": _one(lambda x: x.float()),
    "identity": _one(lambda x: x),
    "relu": _one(functional.relu),
    "relu6": _one(functional.relu6),
    "sigmoid": _one(torch.sigmoid),
    "silu": _one(functional.silu),
    "tanh": _one(torch.tanh),
    "exp": _one(torch.exp),
    "sqrt": _one(torch.sqrt),
    "rsqrt": lambda c: torch.rsqrt(c["x"] + c.number("epsilon", 1e-12)),
    "square": _one(torch.square),
    "abs": _one(torch.abs),
    "gelu": _gelu,
    "clip": lambda c: _clip(c["x"], c),
    "leaky_relu": lambda c: functional.leaky_relu(c["x"], c.number("alpha", 0.01)),
    "elu": lambda c: functional.elu(c["x"], c.number("alpha", 1.0)),
    "prelu": _prelu,
    "sigmoid_hard": lambda c: torch.clamp(
        c.number("alpha", 0.2) * c["x"] + c.number("beta", 0.5), 0, 1
    ),
    "thresholded_relu": lambda c: torch.where(c["x"] >= c.number("alpha", 1.0), c["x"], 0.0),
    "softmax": lambda c: torch.softmax(c["x"], int(c.number("axis", -1))),
    "add": _two(lambda x, y: x + y),
    "sub": _two(lambda x, y: x - y),
    "mul": _two(lambda x, y: x * y),
    "real_div": _two(lambda x, y: x / y),
    "maximum": _two(torch.maximum),
    "minimum": _two(torch.minimum),
    "reduce_mean": lambda c: _reduce(c, torch.mean),
    "reduce_sum": lambda c: _reduce(c, torch.sum),
    "reduce_max": lambda c: _reduce(c, torch.amax),
    "avg_pool": lambda c: _pool(c, "average"),
    "max_pool": lambda c: _pool(c, "max"),
    "upsample_nearest_neighbor": _repeat,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "transpose": lambda c: c["x"].permute(c.numbers("perm")),
    "concat": lambda c: torch.cat(c["values"], int(c.number("axis", 0))),
    "split": _split,
    "slice_by_index": _slice,
    "pad": _pad,
}
