"""Rules for raw arrays, and the four splits made from what is given. No torch here.

Missing splits are drawn from ``train``. The content of the samples decides which, and in what order the samples of every split lie
(:mod:`edgeprune.workload.draws`), so every run of one workload sees the same samples in the same place, whatever order they came in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from edgeprune.errors import ModelError
from edgeprune.records.workload import Preprocess
from edgeprune.workload.class_numbers import check_class_numbers
from edgeprune.workload.dataset import Dataset, Split
from edgeprune.workload.draws import drawn, fair_order, spare, spread
from edgeprune.workload.sample_counts import share_to_draw

NAMES = ("train", "selection", "development", "test")
_VALIDATION = ("val", "valid", "validation")
ACCEPTED = (*NAMES, *_VALIDATION)
MAX_DRAWN = 3000
DIGEST_BYTES = 256 * 1024 * 1024
_ALIASES = {"training": "train", "testing": "test"}


def canonical(name: str) -> str | None:
    """The accepted name of a split that is written as ``Train``, ``training`` or ``VAL``; ``None`` for another name."""
    lower = name.lower()
    known = _ALIASES.get(lower, lower)
    return known if known in ACCEPTED else None


def checked(
    split: Split, preprocess: Preprocess, labels: tuple[str, ...] | None, *, where: str
) -> Split:
    """The split with contiguous ``uint8`` or ``float32`` samples and ``int64`` labels.

    Raises:
        ModelError: samples or labels break a rule; states the rule and the values.
    """
    x = _checked_samples(split.x, preprocess, where)
    if split.y is None:
        return Split(x, None)
    return Split(x, _checked_labels(split.y, len(x), labels, where))


def _checked_samples(x: np.ndarray, preprocess: Preprocess, where: str) -> np.ndarray:
    if x.ndim == 0 or len(x) == 0:
        raise ModelError(f"x must have at least one sample, but {where} has shape {list(x.shape)}")
    if 0 in x.shape or x.ndim < 2:
        raise ModelError(
            f"x must be [N, ...] without empty dimensions, but {where} has {list(x.shape)}"
        )
    if np.issubdtype(x.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, refused below
            x = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(x).all():
            n_bad = int((~np.isfinite(x)).reshape(len(x), -1).any(axis=1).sum())
            raise ModelError(f"x must be finite, but {n_bad} samples of {where} have NaN or Inf")
        return x
    if x.dtype != np.uint8:
        raise ModelError(
            f"x must be uint8 images or floating-point arrays, but {where} is {x.dtype}",
            hint=_pixel_hint(x),
        )
    if preprocess.kind == "image":
        _check_images(x, preprocess, where)
    return np.ascontiguousarray(x)


def _pixel_hint(x: np.ndarray) -> str | None:
    """How to make ``uint8`` of other whole numbers without clipping them."""
    if x.dtype == bool:
        return "use 255 * x.astype('uint8')"
    if not np.issubdtype(x.dtype, np.integer):
        return None
    low, high = int(x.min()), int(x.max())
    if low >= 0 and high <= 255:
        return "use x.astype('uint8') for pixels of 0-255"
    if low >= 0 and high <= 65535:
        return f"its highest value is {high}: use (x >> 8).astype('uint8') for pixels of 0-65535"
    return f"its values are {low} to {high}: scale them to 0-255, or give floats as the model wants them"


def _check_images(x: np.ndarray, preprocess: Preprocess, where: str) -> None:
    grey = preprocess.color == "grey"
    rule = "[N, H, W] or [N, H, W, 1]" if grey else "[N, H, W, 3]"
    fits = (grey and x.ndim == 3) or (x.ndim == 4 and x.shape[-1] == (1 if grey else 3))
    if not fits:
        raise ModelError(
            f"uint8 x must be {rule} for preprocess.color {preprocess.color}, but {where} has {list(x.shape)}",
            hint=_image_hint(x),
        )
    if preprocess.size is not None and x.shape[1:3] != preprocess.size:
        raise ModelError(
            f"x must have preprocess.size {list(preprocess.size)} (height, width), but {where} has {list(x.shape[1:3])}",
            hint="arrays are not resized: change one of the two",
        )


def _image_hint(x: np.ndarray) -> str | None:
    if x.ndim == 3 or (x.ndim == 4 and x.shape[-1] == 1):
        return "set preprocess.color: grey"
    if x.ndim == 4 and x.shape[-1] == 3:
        return "set preprocess.color: rgb"
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return "channels come last: x.transpose(0, 2, 3, 1)"
    return None


def _checked_labels(
    y: np.ndarray, n_samples: int, labels: tuple[str, ...] | None, where: str
) -> np.ndarray:
    check_class_numbers(y, where)
    if len(y) != n_samples:
        raise ModelError(f"x and y must be of one length, but {where} has {n_samples} and {len(y)}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or (labels is not None and high >= len(labels)):
        rule = (
            "at least 0" if labels is None else f"0 to {len(labels) - 1} for {len(labels)} labels"
        )
        raise ModelError(f"y must be {rule}, but {where} has {low} to {high}")
    return y.astype(np.int64)


def complete(given: Mapping[str, Split], *, where: str) -> tuple[Dataset, list[str]]:
    """The dataset, its samples in a fair order, and notes on what was drawn.

    ``selection`` and ``development``, where missing, are each drawn from ``train`` (a tenth of it and at most 3000 samples, but 8 where
    that leaves enough);
    when there is a ``val`` split they are its two halves instead. ``test`` is never drawn: without one it stays ``None``. Each class is
    drawn in proportion and at least once, as far as the numbers allow, and stays in ``train``.

    Args:
        given: checked splits by name; ``val``, ``valid`` and ``validation`` mean the same.
        where: what errors call the data.

    Raises:
        ModelError: no ``train``, an unknown name, samples of different shapes, or too few to draw from.
    """
    unknown = [name for name in given if name not in ACCEPTED]
    if unknown or "train" not in given:
        problem = f"has {unknown[0]!r}" if unknown else f"has no 'train', only {sorted(given)}"
        raise ModelError(f"splits of {where} must be among {', '.join(ACCEPTED)}, but it {problem}")
    _check_alike(given, where)
    wanted = [name for name in ("selection", "development") if name not in given]
    validation = [name for name in _VALIDATION if name in given]
    must_draw = bool(wanted) and not validation
    parts = {
        name: take(split, fair_order(split.x, split.y))
        for name, split in given.items()
        if name in NAMES and not (must_draw and name == "train")
    }
    notes: list[str] = []
    if validation:
        _use_validation(given, validation, parts, wanted, where)
        notes.append(f"{' and '.join(wanted)} taken from {validation[0]}")
    elif must_draw:
        _draw(given["train"], parts, wanted, where)
        counts = " and ".join(f"{len(parts[name])} for {name}" for name in wanted)
        notes.append(f"drawn from train: {counts}; {len(parts['train'])} left for training")
    if "test" not in parts:
        notes.append("no test split: nothing is held back from every choice that is made")
    return _dataset(parts), notes


def _check_alike(given: Mapping[str, Split], where: str) -> None:
    first = given["train"].x
    for name, split in given.items():
        if split.x.shape[1:] != first.shape[1:] or split.x.dtype != first.dtype:
            raise ModelError(
                f"splits of {where} must be alike, but train is {first.dtype} {list(first.shape[1:])}"
                f" and {name} is {split.x.dtype} {list(split.x.shape[1:])}"
            )


def _use_validation(
    given: Mapping[str, Split],
    validation: list[str],
    parts: dict[str, Split],
    wanted: list[str],
    where: str,
) -> None:
    if len(validation) > 1 or not wanted:
        raise ModelError(
            f"splits of {where} must have one of val, or selection and development, but it has {', '.join(sorted(given))}"
        )
    source = given[validation[0]]
    if len(source) < len(wanted):
        raise ModelError(f"{validation[0]} of {where} must have at least 2 samples to be halved")
    order = fair_order(source.x, source.y)
    for name, chosen in zip(wanted, np.array_split(order, len(wanted)), strict=True):
        parts[name] = take(source, chosen)


def _draw(train: Split, parts: dict[str, Split], wanted: list[str], where: str) -> None:
    if len(train) <= len(wanted):
        raise ModelError(
            f"train must have at least {len(wanted) + 1} samples to draw {' and '.join(wanted)} from,"
            f" but {where} has {len(train)}"
        )
    each = min(MAX_DRAWN, share_to_draw(len(train), len(wanted)))
    left = fair_order(train.x, train.y)
    for name in wanted:
        pool = spare(train.y, left)
        chosen = drawn(train.y, each, pool if len(pool) >= each else left)
        parts[name] = take(train, chosen)
        left = left[~np.isin(left, chosen)]
    parts["train"] = take(train, left if train.y is None else spread(train.y, left))


def take(split: Split, chosen: np.ndarray) -> Split:
    """The samples at these positions, ``int [n]``."""
    return Split(split.x[chosen], None if split.y is None else split.y[chosen])


def _dataset(parts: Mapping[str, Split]) -> Dataset:
    return Dataset(
        train=parts["train"],
        selection=parts["selection"],
        development=parts["development"],
        test=parts.get("test"),
        digest=digest(parts),
    )


def digest(parts: Mapping[str, Split]) -> str:
    """SHA-256 over names, shapes, types and content; of splits over 256 MiB, every k-th sample, so that at most 256 MiB are read."""
    total = hashlib.sha256()
    for name in sorted(parts):
        for part, array in (("x", parts[name].x), ("y", parts[name].y)):
            if array is None:
                continue
            total.update(f"{name} {part} {array.dtype.str} {list(array.shape)}\n".encode())
            step = -(-array.nbytes // DIGEST_BYTES) or 1
            total.update(np.ascontiguousarray(array[::step]).data)
    return total.hexdigest()
