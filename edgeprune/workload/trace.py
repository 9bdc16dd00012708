"""A model's forward pass as one graph."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn

from edgeprune.errors import ModelError


def traced(model: nn.Module, example: np.ndarray) -> torch.export.ExportedProgram:
    """The model's forward pass as one graph for every input.

    Raises:
        ModelError: it is not (a branch on the data, say); names what torch stumbled over.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (torch.from_numpy(example),), strict=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"the model cannot be traced: {(lines or [type(error).__name__])[0][:300]}",
            hint="its forward must not branch on values of the data; rewrite that part, with torch.where for example",
        ) from error
