"""Whether a net is evidently a classifier, and what it answers with.

Labels that are class numbers, named classes or the user's word are evidence; the shape ``[N, K]`` is none, since regressors, embeddings
and autoencoders have it too.

Notation: ``N`` samples, ``K`` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from edgeprune.errors import ModelError, SpecError
from edgeprune.workload.answers import answers
from edgeprune.workload.class_numbers import ONLY
from edgeprune.workload.data import Data
from edgeprune.workload.dataset import model_input
from edgeprune.workload.outputs import seen

ASKED = 32  # samples
LENGTH_ERROR = 1e-3  # of a row that has length 1
HOW_TO_SAY = '--task classify, task: classify in edgeprune.yaml, or task="classify" in Python'
SEEN_NOTE = "the model answers with probabilities: what compares and heals takes their logarithm, the files answer as the model does"

SIGMOID_NOTE = (
    "the outputs lie in [0, 1] and do not sum to 1: they are taken as logits, which a net that ends in sigmoid heals badly on;"
    " return what goes into the sigmoid"
)


def ask(model: nn.Module, data: Data) -> torch.Tensor:
    """What a model answers to samples spread over the selection split, ``float32 [n, K]``."""
    raw = data.dataset.selection.x
    chosen = np.unique(np.linspace(0, len(raw) - 1, min(len(raw), ASKED)).astype(int))
    return answers(model, torch.from_numpy(model_input(raw[chosen], data.preprocess)))


def check_is_classifier(said: torch.Tensor, data: Data, task: str | None, size: int) -> None:
    """Raise unless something says that the outputs are one score a class.

    Args:
        said: answers to real samples, ``[n, K]``.
        data: its labels and class names are evidence.
        task: what the user says it is.
        size: numbers in one input of the model.

    Raises:
        ModelError: nothing says so, and the outputs look like those of another kind of net.
        SpecError: nothing says so.
    """
    splits = data.dataset
    named = (splits.train, splits.selection, splits.development, splits.test)
    is_labelled = any(split is not None and split.y is not None for split in named)
    if task is not None or data.labels is not None or is_labelled:
        return
    count = said.shape[1]
    if look := _looks_like(said, size):
        raise ModelError(
            f"without labels the {count} outputs must be known to be one score a class, but {look}",
            hint=f"{ONLY}; if it is one, say so: {HOW_TO_SAY}",
        )
    raise SpecError(
        f"without labels nothing says that the {count} outputs are one score a class",
        hint=f"{ONLY}; if it is one, say so: {HOW_TO_SAY}",
    )


def _looks_like(said: torch.Tensor, size: int) -> str:
    """What other kind of net the answers are typical of; empty where they are not."""
    if said.shape[1] == size:
        return "they are as many as the inputs, as an autoencoder has"
    if bool(((said.norm(dim=1) - 1).abs() <= LENGTH_ERROR).all()):
        return "every row has length 1, as an embedding has"
    if _is_sigmoid(said):
        return "they lie in [0, 1] and do not sum to 1, as those for several labels a sample do"
    return ""


def _is_sigmoid(said: torch.Tensor) -> bool:
    return bool(((said >= 0) & (said <= 1)).all()) and seen(said) == "logits"


def shape_hint(given: Sequence[int], returned: Sequence[int]) -> str:
    """Which kind of net returns this shape for an input of the other, in the hint of the error that refuses it."""
    if list(given) == list(returned):
        return f"an output as large as the input is that of an autoencoder; {ONLY}"
    if len(returned) == 1 or (len(returned) == 2 and returned[1] == 1):
        return f"one output is a measured value, or one of two classes: give it two; {ONLY}"
    if len(returned) > 2:
        return f"an output for each position is a map; {ONLY}"
    return ONLY


def output_notes(said: torch.Tensor) -> tuple[str, ...]:
    """What a user must know about answers ``[n, K]`` of a classifier that are no logits."""
    if seen(said) == "probabilities":
        return (SEEN_NOTE,)
    return (SIGMOID_NOTE,) if _is_sigmoid(said) else ()
