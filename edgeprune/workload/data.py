"""The data side of intake: image folders, ``.npz`` files and factories become checked splits of numpy arrays. No torch here.

Notation: ``N`` samples, ``H`` and ``W`` height and width, ``C`` channels.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import ModelError, SpecError
from edgeprune.records.arrays import npz_arrays
from edgeprune.records.paths import located
from edgeprune.records.workload import Preprocess
from edgeprune.workload import image_files, image_folder, splits
from edgeprune.workload.dataset import Dataset, Split
from edgeprune.workload.factories import call_factory, is_factory, one_line

MAX_RAW_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Data:
    """The checked splits, the class names where known, the preprocessing with its size filled in, and what to tell the user."""

    dataset: Dataset
    labels: tuple[str, ...] | None
    preprocess: Preprocess
    notes: tuple[str, ...]


def load_data(
    text: str, base: Path, *, preprocess: Preprocess, labels: tuple[str, ...] | None
) -> Data:
    """The data that a workload names.

    Args:
        text: a folder of images, an ``.npz`` file, or a factory ``file.py:name``; relative to ``base``.
        base: the folder of ``edgeprune.yaml``.
        preprocess: decides size and colour of image files, and what arrays must look like.
        labels: class names, or ``None`` to take those of the class folders.

    Raises:
        SpecError: ``text`` names nothing that is there.
        ModelError: the data is empty, over 4 GiB raw, unreadable, or breaks a rule; says which.
    """
    path = located(text, base, what="data")
    if path.is_dir():
        return from_folder(path, preprocess=preprocess, labels=labels)
    if path.is_file() and path.suffix == ".npz":
        return from_value(read_npz(path), preprocess=preprocess, labels=labels, where=text)
    if is_factory(text):
        made = call_factory(text, base, key="data")
        return from_value(made.value, preprocess=preprocess, labels=labels, where=text)
    if path.exists():
        raise SpecError(
            f"data must be an image folder, an .npz file or file.py:factory, but got {text!r}"
        )
    raise SpecError(
        f"data names {text!r}, but there is no such folder or file in {base.resolve()}",
        hint="for a factory, write file.py:name",
    )


def from_value(
    value: Any, *, preprocess: Preprocess, labels: tuple[str, ...] | None, where: str
) -> Data:
    """Checked splits of arrays.

    Args:
        value: a mapping of split name to ``(x, y)`` or ``x``; or one ``(x, y)`` or ``x``, which is then ``train``.
        preprocess: as recorded.
        labels: class names.
        where: what errors call the data.

    Raises:
        ModelError: as :func:`load_data`.
    """
    if isinstance(value, Dataset):
        named = {name: getattr(value, name) for name in splits.NAMES}
        raw = {name: split for name, split in named.items() if split is not None}
    else:
        pairs = value if isinstance(value, Mapping) else {"train": value}
        raw = {}
        for written, pair in pairs.items():
            name = splits.canonical(str(written)) or str(written)
            if name in raw:
                raise ModelError(f"{where} must have each split once, but has two of {name}")
            raw[name] = _pair(pair, f"{name} of {where}")
    return _finish(raw, preprocess, labels, where, [])


def _pair(value: Any, where: str) -> Split:
    if isinstance(value, Split):
        return value
    x, y = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, None)
    if not hasattr(x, "__array__") or not (
        y is None or hasattr(y, "__array__") or isinstance(y, (list, tuple))
    ):
        raise ModelError(
            f"{where} must be an array x or a pair (x, y) of arrays, but is {type(value).__name__}",
            hint="of a DataLoader: x, y = map(torch.cat, zip(*loader)); images are uint8 [N, H, W, C], or floats as the model takes them",
        )
    try:
        return Split(np.asarray(x), None if y is None else np.asarray(y))
    except Exception as error:  # such as a tensor that requires grad or is on a GPU
        raise ModelError(f"{where} cannot become numpy arrays: {one_line(error)}") from error


def _finish(
    raw: dict[str, Split],
    preprocess: Preprocess,
    labels: tuple[str, ...] | None,
    where: str,
    notes: list[str],
) -> Data:
    checked = {
        name: splits.checked(split, preprocess, labels, where=f"{name} of {where}")
        for name, split in raw.items()
    }
    dataset, drawn = splits.complete(checked, where=where)
    x = dataset.train.x
    if x.dtype == np.uint8 and preprocess.kind == "image":
        preprocess = preprocess.model_copy(update={"size": (int(x.shape[1]), int(x.shape[2]))})
    elif preprocess.kind == "image":
        notes = [*notes, "float data is taken as already preprocessed: mean and std do not apply"]
    return Data(dataset, labels, preprocess, (*notes, *drawn))


def read_npz(path: Path) -> dict[str, Any]:
    """Splits in an ``.npz`` file, by its keys: ``x`` and ``y``, or ``train_x``, ``train_y``, ``test_x`` ... (or ``x_train`` ...).

    Raises:
        ModelError: the file is damaged, holds pickled objects, is over 4 GiB, or has a key of another form.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _require_room(sum(entry.file_size for entry in archive.infolist()), str(path))
        with path.open("rb") as stream:
            arrays = npz_arrays(stream, MAX_RAW_BYTES)
    except ModelError:
        raise
    except Exception as error:  # zipfile and zlib have errors of many types for damage
        pickled = "pickle" in str(error).lower()
        problem = "holds pickled objects, which are not read" if pickled else "is not a whole .npz"
        raise ModelError(
            f"{path} {problem}: {one_line(error)}", hint="save plain arrays with numpy.savez"
        ) from error
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        split, part = _split_and_part(key, path)
        if part in pairs.setdefault(split, {}):
            raise ModelError(
                f"keys of {path} must differ, but {key!r} is a second {part} of {split}"
            )
        pairs[split][part] = array
    for split, parts in pairs.items():
        if "x" not in parts:
            raise ModelError(f"{path} has labels for {split} but no samples: add {split}_x")
    return {split: (parts["x"], parts.get("y")) for split, parts in pairs.items()}


def _split_and_part(key: str, path: Path) -> tuple[str, str]:
    words = key.lower().split("_")
    part = next((word for word in words if word in ("x", "y")), "")
    rest = [word for word in words if word != part]
    split = splits.canonical(rest[0]) if rest else "train"
    if not part or len(words) > 2 or split is None:
        raise ModelError(
            f"keys of {path} must be x, y or <split>_x, <split>_y, but got {key!r}",
            hint=f"splits: {', '.join(splits.ACCEPTED)}",
        )
    return split, part


def _require_room(n_bytes: int, where: str) -> None:
    if n_bytes > MAX_RAW_BYTES:
        raise ModelError(
            f"data must be at most {MAX_RAW_BYTES / 1024**3:g} GiB of raw samples, but {where} has {n_bytes / 1024**3:.1f} GiB",
            hint="give a part of it, or a smaller preprocess.size",
        )


def from_folder(folder: Path, *, preprocess: Preprocess, labels: tuple[str, ...] | None) -> Data:
    """Checked splits of image files: ``<class>/<file>``, ``<split>/<class>/<file>``, or flat files without labels.

    Class folders are numbered in text order and read with the folders below them, as torchvision's ``ImageFolder`` does, unless
    ``labels`` names them; see :func:`edgeprune.workload.image_folder.find` and :func:`edgeprune.workload.image_files.read_image`.

    Raises:
        ModelError: as :func:`load_data`.
    """
    if preprocess.kind != "image":
        raise ModelError(f"preprocess.kind must be image for image files, but is {preprocess.kind}")
    looked = image_folder.find(folder)
    found = looked.files
    image_folder.check(looked, are_named=labels is not None)
    if not any(found["train"].values()):
        others = looked.passed_over()
        raise ModelError(
            f"data must have at least 3 training images, but {folder} has none{f' (it holds {others})' if others else ''}",
            hint=f"read are {' '.join(image_folder.IMAGE_SUFFIXES)}, flat or in one folder for each class",
        )
    order, names, notes = _numbering(found, labels, folder)
    size = preprocess.size or _only_size(found, folder)
    channels = 1 if preprocess.color == "grey" else 3
    count = sum(len(files) for by_class in found.values() for files in by_class.values())
    _require_room(count * size[0] * size[1] * channels, str(folder))
    losses = image_files.Losses()
    raw = {
        split: _read_split(by_class, order, size, preprocess.color, losses)
        for split, by_class in found.items()
        if any(by_class.values())
    }
    losses.require_used_bits(str(folder))
    sized = preprocess.model_copy(update={"size": size})
    return _finish(raw, sized, names, str(folder), [*notes, *looked.notes(), *losses.notes()])


def _numbering(
    found: Mapping[str, Mapping[str | None, list[Path]]],
    labels: tuple[str, ...] | None,
    folder: Path,
) -> tuple[dict[str, int], tuple[str, ...] | None, list[str]]:
    """The number of each class folder, the class names, and notes."""
    seen = sorted({name for by_class in found.values() for name in by_class if name is not None})
    if not seen:
        return {}, labels, []
    if labels is not None and set(seen) <= set(labels):
        return {name: labels.index(name) for name in seen}, labels, []
    trained = sorted(name for name in found["train"] if name is not None)
    strangers = [name for name in seen if name not in trained]
    if strangers:
        raise ModelError(
            f"every class folder must be in train, but {strangers[0]!r} is only in another split of {folder}"
        )
    order = {name: number for number, name in enumerate(trained)}
    if labels is not None:
        if len(labels) != len(trained):
            raise ModelError(
                f"labels must name the class folders, but there are {len(labels)} labels for {len(trained)} folders in {folder}"
            )
        pairs = ", ".join(f"{name} = {labels[order[name]]}" for name in trained[:3])
        return order, labels, [f"class folders are matched to labels in text order: {pairs} ..."]
    notes = []
    if all(name.isdigit() for name in trained) and trained != sorted(trained, key=int):
        notes = ["class folders are numbered in text order (0, 1, 10, 2), as ImageFolder does"]
    return order, tuple(trained), notes


def _only_size(
    found: Mapping[str, Mapping[str | None, list[Path]]], folder: Path
) -> tuple[int, int]:
    """The (height, width) that all image files share."""
    files = [p for by_class in found.values() for paths in by_class.values() for p in paths]
    sizes = Counter(image_files.image_size(path) for path in files)
    if len(sizes) > 1:
        (common, _), (other, _) = sizes.most_common(2)
        raise ModelError(
            f"images must have one size, but {folder} has {common[0]}x{common[1]} and {other[0]}x{other[1]} (height x width)",
            hint="set preprocess.size: [height, width] to what the model was trained with",
        )
    return next(iter(sizes))


def _read_split(
    by_class: Mapping[str | None, list[Path]],
    order: dict[str, int],
    size: tuple[int, int],
    color: str,
    losses: image_files.Losses,
) -> Split:
    files = [
        (path, None if name is None else order[name])
        for name, paths in by_class.items()
        for path in paths
    ]
    x = np.empty((len(files), *size, *(() if color == "grey" else (3,))), np.uint8)
    for row, (path, _) in enumerate(files):
        x[row] = image_files.read_image(path, size, color, losses)
    labelled = None not in by_class
    y = np.array([number for _, number in files], np.int64) if labelled else None
    return Split(x, y)
