"""From raw samples to what the model sees: preprocessing, augmentation, and batches that fit the memory.

Notation: ``N`` samples, ``B`` samples of one batch, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.records.workload import Augment, Preprocess

# Inputs of one batch hold at most this many numbers: large images run in smaller batches instead of filling the memory.
MAX_BATCH_NUMBERS = 1 << 24
# The same where a batch is a matter of memory alone. The layers of a net hold many times the numbers of its input.
MAX_PASS_NUMBERS = 1 << 21


def batches(n: int, batch_size: int, sample_numbers: int) -> Iterator[slice]:
    """Slices that cover ``n`` samples of ``sample_numbers`` numbers each, in order, within the memory bound."""
    return _slices(n, min(batch_size, MAX_BATCH_NUMBERS // max(1, sample_numbers)))


def passes(x: Tensor | np.ndarray, batch_size: int) -> Iterator[slice]:
    """As :func:`batches` of ``x [N, ...]``, in which no sample has to do with another: large ones go a few at a time."""
    numbers = math.prod(x.shape[1:])
    return _slices(len(x), min(batch_size, MAX_PASS_NUMBERS // max(1, numbers)))


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, max(1, size)):
        yield slice(start, min(n, start + max(1, size)))


def to_input(raw: Tensor, preprocess: Preprocess) -> Tensor:
    """Raw samples as the model sees them; the torch twin of :func:`edgeprune.workload.dataset.model_input`.

    Args:
        raw: ``uint8 [N, H, W]`` or ``[N, H, W, C]``, or floats as the model wants them, on any device.
        preprocess: the recorded constants.

    Returns:
        ``float32 [N, C, H, W]`` on the same device.
    """
    if preprocess.kind == "none" or raw.dtype != torch.uint8:
        return raw.float()
    images = raw.unsqueeze(-1) if raw.ndim == 3 else raw
    mean = torch.tensor(preprocess.mean, dtype=torch.float32, device=raw.device)
    std = torch.tensor(preprocess.std, dtype=torch.float32, device=raw.device)
    return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2).contiguous()


def augmented(raw: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Images, each shifted by its own random offset and, where allowed, mirrored at random.

    Args:
        raw: ``uint8 [B, H, W]`` or ``[B, H, W, C]``; not changed.
        augment: the largest shift in pixels, and whether to mirror left and right.
        generator: the source of the offsets.

    Returns:
        The same shape; what moves in from outside is 0.
    """
    n, height, width = raw.shape[:3]
    reach = augment.shift_pixels
    if not reach and not augment.mirror:
        return raw
    sides = (0, 0) * (raw.ndim - 3) + (reach,) * 4
    padded = functional.pad(raw, sides)
    rows = torch.randint(2 * reach + 1, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * reach + 1, (n, 1), generator=generator) + torch.arange(width)
    if augment.mirror:
        turned = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
