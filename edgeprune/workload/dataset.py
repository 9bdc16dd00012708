"""Data as numpy arrays: splits, preprocessing and layouts. No torch here.

Notation: ``N`` samples, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.records.workload import Preprocess
from edgeprune.workload.draws import drawn

CHUNK = 64  # images


@dataclass(frozen=True)
class Split:
    """Raw samples and, where known, their classes.

    ``x`` is ``uint8 [N, H, W]`` or ``[N, H, W, C]`` (images), or ``float32 [N, ...]`` already as the model wants it;
    ``y`` is ``int64 [N]`` or ``None``.
    """

    x: np.ndarray
    y: np.ndarray | None

    def __len__(self) -> int:
        return len(self.x)

    def head(self, n: int) -> Split:
        """The first ``n`` samples."""
        return Split(self.x[:n], None if self.y is None else self.y[:n])

    def drawn(self, n: int) -> Split:
        """``n`` samples of a split in a fair order, in a fair order: each class in proportion, and at least once if ``n`` allows it."""
        rows = drawn(self.y, n, np.arange(len(self)))
        return Split(self.x[rows], None if self.y is None else self.y[rows])


@dataclass(frozen=True)
class Dataset:
    """The four splits and what they are for.

    ``train`` heals and calibrates, ``selection`` picks epochs and scales importance, ``development`` fills the ledger and judges the gates,
    ``test`` is read once, on the final artefact. Each lies in a fair order (:mod:`edgeprune.workload.draws`), so its first samples are a
    draw by chance, and so is every part of it. ``digest`` identifies the content.
    """

    train: Split
    selection: Split
    development: Split
    test: Split | None
    digest: str


def model_input(x: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Raw samples as the torch model sees them.

    Args:
        x: as :attr:`Split.x`.
        preprocess: the recorded constants.

    Returns:
        ``float32 [N, C, H, W]`` for images: ``(raw / 255 - mean) / std``; float arrays unchanged.
    """
    if preprocess.kind == "none" or x.dtype != np.uint8:
        return np.ascontiguousarray(x, dtype=np.float32)
    images = x[..., None] if x.ndim == 3 else x
    mean = np.asarray(preprocess.mean, np.float32)
    std = np.asarray(preprocess.std, np.float32)
    n, height, width, own = images.shape
    (channels,) = np.broadcast_shapes((own,), mean.shape, std.shape)
    found = np.empty((n, channels, height, width), np.float32)
    for start in range(0, n, CHUNK):  # all at once, each step would be a copy of all images
        part = images[start : start + CHUNK].astype(np.float32)
        scaled = (part / np.float32(255) - mean) / std
        found[start : start + CHUNK] = scaled.transpose(0, 3, 1, 2)
    return found


def to_layout(x: np.ndarray, layout: str) -> np.ndarray:
    """``[N, C, H, W]`` in the layout that a model file wants: ``NHWC`` moves the channels last, anything else changes nothing."""
    if layout == "NHWC" and x.ndim == 4:
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    return x
