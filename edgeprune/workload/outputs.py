"""What a classifier's outputs are, and the logits behind them.

A net that ends in softmax answers with probabilities; whatever takes logits gets their logarithm, which softmax leaves as they are.
What a net was seen to answer with is kept on the module itself, so that every copy that is cut from it knows; files keep the outputs.

Notation: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Outputs = Literal["logits", "probabilities"]

SUM_ERROR = 1e-3  # of a row of probabilities; float16 keeps 11 bits
# The step of a softmax in INT8, which TensorFlow Lite fixes: https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec
INT8_STEP = 1 / 256
_KEPT_AS = "edgeprune_outputs"


def seen(said: Tensor) -> Outputs:
    """What answers ``[N, K]`` to real samples are: probabilities where no value is below 0 and every row sums to 1."""
    sums = said.double().sum(dim=1)
    is_chance = bool((said >= 0).all()) and bool(((sums - 1).abs() <= SUM_ERROR).all())
    return "probabilities" if is_chance else "logits"


def mark(model: nn.Module, outputs: Outputs) -> None:
    """Keep with a module, and with all copies made of it from now on, what it answers with."""
    setattr(model, _KEPT_AS, outputs)


def outputs_of(model: nn.Module) -> Outputs:
    """What :func:`mark` kept; logits where nothing was kept."""
    kept: Any = getattr(model, _KEPT_AS, "logits")
    return "probabilities" if kept == "probabilities" else "logits"


def as_logits(said: Tensor, model: nn.Module) -> Tensor:
    """Answers ``[N, K]`` of a model, or of one cut from it, as logits in ``float32`` or wider; gradients go through."""
    wide = said if said.dtype == torch.float64 else said.float()
    if outputs_of(model) == "logits":
        return wide
    # What float32 underflows to 0 is taken for the smallest number that it holds.
    return wide.clamp_min(torch.finfo(torch.float32).tiny).log()


def file_logits(said: Tensor, model: nn.Module) -> Tensor:
    """As :func:`as_logits` for what a file of the model answered, where INT8 rounds a small probability to 0.

    The zeros of a row may stand for half a step of INT8 in all, so that many of them do not weigh more than what was answered.
    """
    if outputs_of(model) == "probabilities":
        said = said.clamp_min(INT8_STEP / 2 / said.shape[1])
    return as_logits(said, model)
