"""Is a Core ML file the net that it was made from? Weights, types, labels and answers, compared with torch before a file may ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from edgeprune.errors import FormatError
from edgeprune.formats.coreml.convert import LOGITS, Entry
from edgeprune.formats.coreml.evaluate import Unknown, evaluate
from edgeprune.formats.coreml.package import quiet
from edgeprune.formats.coreml.program import MilProgram
from edgeprune.workload.modes import eval_copy

# Rounding to half precision: half a unit in the last place of 11 bits, and half of the smallest subnormal number.
HALF_RATIO, HALF_FLOOR = 2.0**-11, 2.0**-25
WEIGHT_SLACK = 1.01  # batch norms are folded in another order of float32 operations than here
# Of the largest logit. Rounding each result of 25 layers in a row to 11 bits gives 0.001 to 0.01; a wrong scale or padding far more.
FLOAT_TOLERANCE = 0.03
# A value that rounds to another step moves an answer by a few steps of the output, each 1/127 of its range; a lost scale moves it by more.
INT8_TOLERANCE = 0.2


@dataclass(frozen=True)
class PackageCheck:
    """What was compared. ``answers`` is the largest difference of logits over the largest logit; ``None`` where nothing was worked out."""

    weights: int
    weights_compared: bool
    answers: float | None
    note: str = ""


def check_file(
    program: MilProgram,
    model: nn.Module,
    asked: nn.Module,
    x: np.ndarray,
    entry: Entry,
    *,
    int8: bool,
) -> PackageCheck:
    """What was compared, when nothing differed.

    Args:
        program: of the file.
        model: what it was made from, in eval mode.
        asked: what answers as the file must: ``model``, or its calibrated form with the same rounding.
        x: samples as the torch model sees them, ``float32 [N, ...]``.
        entry: how samples enter the program.
        int8: whether the file must have INT8 weights throughout.

    Raises:
        FormatError: the file is not the net; says which weight or by how much the answers differ.
    """
    found = list(program.weights())
    floats = [o.outputs[0] for o, _, step in found if step is None]
    if int8 and (floats or not found):
        raise FormatError(
            f"an INT8 Core ML file must have INT8 weights throughout, but {len(floats)} of {len(found)} are not"
            + (f", the first is {floats[0]}" if floats else "")
        )
    expected = folded_weights(model)
    if expected is not None:
        _check_weights(program, expected)
    with torch.no_grad():
        wanted = asked(torch.from_numpy(x)).numpy()
    try:
        answers = evaluate(program, raw_input(x, entry), LOGITS)
    except Unknown as error:
        return PackageCheck(len(found), expected is not None, None, error.message)
    error_ratio = float(np.abs(answers - wanted).max() / max(float(np.abs(wanted).max()), 1e-6))
    limit = INT8_TOLERANCE if int8 else FLOAT_TOLERANCE
    if not error_ratio <= limit:
        raise FormatError(
            f"the Core ML file differs from torch by {error_ratio:.2g} of the largest logit;"
            f" at most {limit:g} is allowed",
            hint="the converter changed the model; try a target with another format",
        )
    return PackageCheck(len(found), expected is not None, error_ratio)


def raw_input(x: np.ndarray, entry: Entry) -> np.ndarray:
    """Samples as they enter the program: raw values 0 to 255 where that takes images.

    The inverse of ``(raw / 255 - mean) / std``; whole numbers again up to rounding where ``x`` came from images.
    """
    if not entry.is_image:
        return np.asarray(x, np.float32)
    wide = np.asarray(x, np.float64)
    if entry.std:
        wide = wide * _channels(entry.std) + _channels(entry.mean)
    raw: np.ndarray = ((wide - _channels(entry.bias)) / entry.scale).astype(np.float32)
    return raw


def _channels(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, np.float64).reshape(1, -1, 1, 1)


def folded_weights(model: nn.Module) -> list[tuple[str, np.ndarray]] | None:
    """Weights of all convolutions and linear layers with the batch norms behind them folded in; ``None`` where torch cannot trace it.

    A transposed convolution has its output channels on the second axis, as in the file.
    """
    try:
        with quiet():
            fused = fuse(eval_copy(model))
    except Exception:  # a model that torch.fx cannot follow; the answers are compared all the same
        return None
    nodes: Any = fused.graph.nodes  # type: ignore[union-attr]
    used = {str(node.target) for node in nodes if node.op == "call_module"}
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    return [
        (name, module.weight.detach().numpy().astype(np.float32))
        for name, module in fused.named_modules()
        if isinstance(module, kinds) and name in used
    ]


def _check_weights(program: MilProgram, expected: list[tuple[str, np.ndarray]]) -> None:
    """Every weight of the model is in the file, within its rounding; the file's order is another where branches meet."""
    free = [(o.outputs[0], value, step) for o, value, step in program.weights()]
    for name, wanted in expected:
        fitting = [entry for entry in free if entry[1].shape == wanted.shape]
        excess = [_excess(value, step, wanted) for _, value, step in fitting]
        if not fitting or min(excess) > 0:
            by = (
                f", the nearest is off by {min(excess):.3g} more than its rounding"
                if fitting
                else ""
            )
            raise FormatError(
                f"the weight of {name or 'the model'} {list(wanted.shape)} is not in the Core ML file{by}"
            )
        taken = fitting[excess.index(min(excess))]
        free = [entry for entry in free if entry is not taken]


def _excess(found: np.ndarray, step: np.ndarray | None, wanted: np.ndarray) -> float:
    """How much more two weights differ than rounding explains; 0 or less when it explains all."""
    allowed = HALF_RATIO * np.abs(wanted) + HALF_FLOOR
    if step is not None:
        # Half a step, and 128 times the rounding of the scale itself to half precision.
        per_channel = np.abs(step).reshape(-1, *[1] * (wanted.ndim - 1))
        allowed = per_channel / 2 + 2 * allowed + 128 * HALF_FLOOR
    return float((np.abs(found - wanted) - WEIGHT_SLACK * allowed).max())
