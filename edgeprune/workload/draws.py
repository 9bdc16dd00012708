"""Which samples are drawn, and the order that they lie in: by chance, with every class in proportion. No torch here.

Data comes in class order as often as not, and much takes the first samples of a split, or parts it by position. So the samples of a split
are put into a fair order once: whatever run of it is taken, it is a draw by chance with the classes in proportion.
"""

from __future__ import annotations

import hashlib

import numpy as np

CLASS_SEED = 20261123  # of where in its first interval each class begins


def fair_order(x: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    """The positions of samples ``[N, ...]`` in a fair order, ``int64 [N]``.

    Where a sample comes is decided by a hash of its content, and by its label: not by where it was.
    """
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in x]
    order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    return order if y is None else spread(y, order)


def spread(y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of labels ``[N]`` rearranged so that every run has each class in proportion, within one; each class keeps its order."""
    rank, kind, counts = _ranks(y[rows])
    place = (rank + _starts(len(counts))[kind]) / counts[kind]
    found: np.ndarray = rows[np.argsort(place, kind="stable")]
    return found


def drawn(y: np.ndarray | None, n: int, rows: np.ndarray) -> np.ndarray:
    """``n`` of the rows, which lie in a fair order, in a fair order too: the classes in proportion, and every class if ``n`` allows it."""
    if y is None or n >= len(rows):
        return rows[:n]
    rank, kind, counts = _ranks(y[rows])
    if n < len(counts):
        return rows[:n]
    return spread(y, rows[rank < shares(counts, n)[kind]])


def spare(y: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """The rows without the last one of every class."""
    if y is None:
        return rows
    rank, kind, counts = _ranks(y[rows])
    found: np.ndarray = rows[rank < counts[kind] - 1]
    return found


def shares(counts: np.ndarray, n: int) -> np.ndarray:
    """How many of each class ``n`` samples have, ``int64 [K]``: at least one each, and the others in proportion.

    Args:
        counts: samples of each class, at least 1.
        n: at least the number of classes, and at most the sum of the counts.
    """
    single = np.zeros(len(counts), bool)
    while True:
        left = int(counts[~single].sum())
        exact = np.where(single, 1.0, counts * (n - single.sum()) / max(left, 1))
        rare = (exact < 1) & ~single
        if not rare.any():
            break
        single |= rare
    found = np.floor(exact).astype(np.int64)
    # By chance among equals: the first classes are not to have more than the last ones.
    most_missed = np.lexsort((_starts(len(counts)), found - exact))
    found[most_missed[: n - found.sum()]] += 1
    return found


def _ranks(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For labels ``[N]``: the how-manieth of its class each is, which class of those there are, and the size of each class ``[K]``."""
    _, kind, counts = np.unique(y, return_inverse=True, return_counts=True)
    by_class = np.argsort(kind, kind="stable")
    rank = np.empty(len(y), np.int64)
    rank[by_class] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, kind, counts


def _starts(n_classes: int) -> np.ndarray:
    return np.random.default_rng(CLASS_SEED).random(n_classes)
