"""Fashion-MNIST as edgeprune reads it: raw images, labels, and four fixed splits.

The files are the four idx archives of the original release (MIT licence, https://github.com/zalandoresearch/fashion-mnist).
They are looked for in ``$FASHION_MNIST_DIR``, in Debian's ``dataset-fashion-mnist`` package, and in edgeprune's cache, in that order;
``python examples/fashion_mnist/get_data.py`` puts them in one of these places.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
SPLIT_SEED = 20261123
SELECTION_IMAGES = 3000
DEVELOPMENT_IMAGES = 3000


def cache_dir() -> Path:
    """The folder for files fetched by ``get_data.py``: ``$XDG_CACHE_HOME/edgeprune/fashion-mnist``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edgeprune" / "fashion-mnist"


def search_path() -> list[Path]:
    """Every folder that may hold the four archives, in order of preference."""
    named = os.environ.get("FASHION_MNIST_DIR")
    return ([Path(named)] if named else []) + [DEBIAN_DIR, cache_dir()]


def find() -> Path | None:
    """The first folder that holds all four archives, or ``None``."""
    for folder in search_path():
        if all((folder / name).is_file() for name in FILES.values()):
            return folder
    return None


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes.

    Returns:
        ``uint8`` array with the shape that the file's header states.

    Raises:
        ValueError: the header is not that of an idx file of unsigned bytes, or the data is shorter than it says.
    """
    with gzip.open(path, "rb") as stream:
        raw = stream.read()
    zero, kind, n_dims = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 0x08:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * n_dims
    shape = struct.unpack(f">{n_dims}I", raw[4:start])
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images ``uint8 [N, 28, 28]`` and labels ``int64 [N]`` for each split.

    Returns:
        ``train`` (54,000), ``selection`` (3,000) and ``development`` (3,000) are drawn once, by a fixed seed, from the official
        training images; ``test`` is the official 10,000.

    Raises:
        FileNotFoundError: the archives are in none of the folders of :func:`search_path`.
    """
    folder = find()
    if folder is None:
        looked = ", ".join(map(str, search_path()))
        raise FileNotFoundError(
            f"Fashion-MNIST was not found in {looked}; run: python examples/fashion_mnist/get_data.py"
        )
    arrays = {key: read_idx(folder / name) for key, name in FILES.items()}
    order = np.random.default_rng(SPLIT_SEED).permutation(len(arrays["train_images"]))
    cuts = {
        "selection": order[:SELECTION_IMAGES],
        "development": order[SELECTION_IMAGES : SELECTION_IMAGES + DEVELOPMENT_IMAGES],
        "train": order[SELECTION_IMAGES + DEVELOPMENT_IMAGES :],
    }
    splits = {
        name: (arrays["train_images"][chosen], arrays["train_labels"][chosen].astype(np.int64))
        for name, chosen in cuts.items()
    }
    splits["test"] = (arrays["test_images"], arrays["test_labels"].astype(np.int64))
    return splits
