"""``edgeprune init``: look at a project folder, propose, ask, and write a commented ``edgeprune.yaml``.

The folder is searched without running its code; only a data factory that was chosen is called, to look at the data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeprune.errors import ModelError, SpecError
from edgeprune.records.base import read_yaml
from edgeprune.records.files import atomic_path
from edgeprune.records.paths import located
from edgeprune.records.workload import Workload
from edgeprune.workload import data as imagedata
from edgeprune.workload import discover, image_files, image_folder
from edgeprune.workload.class_numbers import ONLY
from edgeprune.workload.factories import call_factory, is_factory

FILE_NAME = "edgeprune.yaml"
MAX_LOOKED_AT = 2000
TASK = "classify"
MAX_SIDE = 256  # pixels; larger image files are shrunk before their mean and std are taken

Ask = Callable[[str, str], str]


@dataclass(frozen=True)
class DataLook:
    """What the data looks like: how it is given to the model, and the class names where folders name them.

    ``size`` is (height, width), of image files the most frequent one. ``mean`` and ``std`` are of raw values scaled to [0, 1], one
    value for each channel; empty for float data.
    """

    kind: Literal["image", "none"]
    color: Literal["rgb", "grey"]
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    n_sizes: int = 1  # how many sizes the image files have
    is_labelled: bool = False


def initialise(
    folder: Path,
    *,
    model: str | None,
    weights: str | None,
    data: str | None,
    target: str,
    ask: Ask | None,
) -> Path:
    """The path of the ``edgeprune.yaml`` that was written.

    Args:
        folder: the project.
        model: ``file.py:factory``, or ``None`` to propose what the folder holds.
        weights: a weights file, or ``None`` to propose one.
        data: a folder, ``.npz`` or factory, or ``None`` to propose one.
        target: the name of the target to write.
        ask: called with a question and a default, gives the answer; ``None`` takes every default.

    Raises:
        SpecError: there is such a file already, a question has no answer, or an answer is not valid.
        ModelError: the data cannot be read.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise SpecError(f"there is no folder {folder}")
    if path.exists():
        raise SpecError(f"{path} exists and is not overwritten", hint="edit it, or move it away")
    found = discover.look(folder)
    model = model or _choose("model factory (file.py:name)", found.models, ask, needed="MODEL")
    weights = weights or _choose("weights file (empty: the factory sets them)", found.weights, ask)
    data = data or _choose("data (folder, .npz or file.py:name)", found.data, ask, needed="--data")
    seen = look_at(data, folder)
    seen = _confirmed_size(seen, ask)
    constants = _confirmed_constants(seen, found.normalise, ask)
    _confirm_task(seen, ask)
    text = _document(model, weights, data, target, seen, constants)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            read_yaml(Workload, temporary)
        except SpecError as error:
            plain = str(error).replace(str(temporary), str(path))
            raise SpecError(f"these answers make no valid workload: {plain}") from error
    return path


def _choose(
    question: str, candidates: Sequence[str], ask: Ask | None, *, needed: str | None = None
) -> str:
    default = candidates[0] if candidates else ""
    others = f"; also found: {', '.join(candidates[1:4])}" if len(candidates) > 1 else ""
    answer = default if ask is None else ask(f"{question}{others}", default).strip()
    if not answer and needed is not None:
        raise SpecError(
            f"nothing in this folder looks like the {question}", hint=f"say which: {needed}"
        )
    return answer


def look_at(data: str, folder: Path) -> DataLook:
    """What the data looks like, from at most 2000 training samples spread evenly over it.

    Raises:
        SpecError: ``data`` names nothing that is there.
        ModelError: it cannot be read, or has no training samples.
    """
    path = located(data, folder, what="data")
    if path.is_dir():
        return _look_at_images(path)
    if path.is_file() and path.suffix == ".npz":
        return _look_at_value(imagedata.read_npz(path), data)
    if is_factory(data):
        return _look_at_value(call_factory(data, folder, key="data").value, data)
    raise SpecError(
        f"data must be a folder of images, an .npz file or file.py:factory, but got {data!r}"
    )


def _look_at_value(value: Any, where: str) -> DataLook:
    parts = value.values() if isinstance(value, dict) else [value]
    is_labelled = any(
        isinstance(p, (tuple, list)) and len(p) == 2 and p[1] is not None for p in parts
    )
    return replace(_look_at_array(_training_array(value, where)), is_labelled=is_labelled)


def _training_array(value: Any, where: str) -> np.ndarray:
    train = value.get("train") if isinstance(value, dict) else value
    x = train[0] if isinstance(train, (tuple, list)) and len(train) == 2 else train
    array = np.asarray(x) if hasattr(x, "__array__") else np.empty(0)
    if array.ndim < 2 or array.size == 0:
        raise ModelError(
            f"{where} must give training samples [N, ...], as x, (x, y) or a dict with 'train'"
        )
    return array


def _spread(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, MAX_LOOKED_AT)).astype(int))


def _look_at_array(x: np.ndarray) -> DataLook:
    if x.dtype != np.uint8:
        return DataLook("none", "rgb", None, (), (), ())
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3)):
        raise ModelError(
            f"uint8 samples must be images [N, H, W] or [N, H, W, C] with C of 1 or 3, but are {list(x.shape)}",
            hint="channels come last: x.transpose(0, 2, 3, 1)",
        )
    grey = x.ndim == 3 or x.shape[-1] == 1
    mean, std = _moments((x[i] for i in _spread(len(x))), 1 if grey else 3)
    size = (int(x.shape[1]), int(x.shape[2]))
    return DataLook("image", "grey" if grey else "rgb", size, mean, std, ())


def _look_at_images(folder: Path) -> DataLook:
    found = image_folder.find(folder)
    image_folder.check(found)
    by_class = found.files["train"]
    files = [path for paths in by_class.values() for path in paths]
    if not files:
        raise ModelError(f"{folder} has no training images")
    chosen = [files[i] for i in _spread(len(files))]
    sizes = Counter(image_files.image_size(path) for path in chosen)
    size = sizes.most_common(1)[0][0]
    color: Literal["rgb", "grey"] = "grey" if all(map(_is_grey, chosen[:50])) else "rgb"
    small = (min(size[0], MAX_SIDE), min(size[1], MAX_SIDE))
    pixels = (image_files.read_image(path, small, color) for path in chosen)
    mean, std = _moments(pixels, 1 if color == "grey" else 3)
    labels = tuple(sorted(name for name in by_class if name is not None))
    return DataLook("image", color, size, mean, std, labels, len(sizes), bool(labels))


def _is_grey(path: Path) -> bool:
    from PIL import Image  # not needed where data comes as arrays

    with Image.open(path) as image:
        return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def _moments(
    images: Iterable[np.ndarray], n_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``uint8`` images, scaled to [0, 1]; std is at least 0.001."""
    counts = np.zeros((n_channels, 256), np.int64)
    for image in images:
        for channel, values in enumerate(image.reshape(-1, n_channels).T):
            counts[channel] += np.bincount(values, minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    variance = np.maximum(share @ levels**2 - mean**2, 0)
    std = np.maximum(np.sqrt(variance), 0.001)
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


def _confirmed_size(seen: DataLook, ask: Ask | None) -> DataLook:
    """The look with the size that the model takes, where files of several sizes leave it open."""
    if ask is None or seen.size is None or seen.n_sizes == 1:
        return seen
    question = f"input size of the model, height x width (the images have {seen.n_sizes} sizes)"
    answer = ask(question, f"{seen.size[0]}x{seen.size[1]}")
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x,]\s*(\d{1,5})\s*", answer)
    if match is None or min(int(match[1]), int(match[2])) == 0:
        raise SpecError(f"the input size must look like 224x224, but got {answer!r}")
    return replace(seen, size=(int(match[1]), int(match[2])), n_sizes=1)


def _confirm_task(seen: DataLook, ask: Ask | None) -> None:
    """Raise unless the data has labels, or the user says that the model is a classifier."""
    if ask is None or seen.is_labelled:
        return
    answer = ask("task of the model (the data has no labels that show it)", TASK).strip()
    if answer != TASK:
        raise SpecError(f"the task must be {TASK}, but got {answer!r}", hint=ONLY)


@dataclass(frozen=True)
class _Constants:
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str


def _confirmed_constants(
    seen: DataLook,
    stated: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ask: Ask | None,
) -> _Constants | None:
    """The normalisation to write: that in the project's code where it fits, else computed; the user has the last word."""
    if seen.kind == "none":
        return None
    mean, std = seen.mean, seen.std
    origin = f"computed from the training images (at most {MAX_LOOKED_AT}); CHECK"
    if stated is not None and _fits(stated, len(mean)):
        mean, std = stated
        origin = "found in the project's code"
    if ask is None:
        return _Constants(mean, std, origin)
    answers = [
        _numbers(ask(f"{key} the model was trained with ({origin})", _list(value)), key)
        for key, value in (("mean", mean), ("std", std))
    ]
    if answers != [mean, std]:
        origin = "as answered"
    return _Constants(answers[0], answers[1], origin)


def _fits(stated: tuple[tuple[float, ...], tuple[float, ...]], n_channels: int) -> bool:
    """Whether stated constants can be of values scaled to [0, 1]; those of 0-255, such as 123.675, are not."""
    mean, std = stated
    in_range = all(abs(m) <= 1 for m in mean) and all(0 < s <= 1 for s in std)
    return in_range and all(len(v) in (1, n_channels) for v in stated)


def _numbers(text: str, key: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError as error:
        raise SpecError(
            f"{key} must be numbers such as [0.485, 0.456, 0.406], but got {text!r}"
        ) from error


def _list(values: Sequence[float]) -> str:
    # No exponents: YAML 1.1 reads 1e-05 as text.
    plain = [f"{value:.6f}".rstrip("0").rstrip(".") for value in values]
    return f"[{', '.join(plain)}]"


def _document(
    model: str,
    weights: str,
    data: str,
    target: str,
    seen: DataLook,
    constants: _Constants | None,
) -> str:
    lines = [
        "# What edgeprune needs to know about this project. Paths are relative to this file.",
        "# A flag of the same name wins over a line here; a line here wins over the target's file.",
        "schema_version: 1",
        "",
        f"model: {_quoted(model)}  # called without arguments, returns the torch.nn.Module",
        f"weights: {_quoted(weights)}  # safetensors, or torch.save(model.state_dict(), ...)"
        if weights
        else "# weights: net.safetensors  # without this line the factory sets the weights",
        f"data: {_quoted(data)}  # image folder, .npz, or file.py:factory",
        "",
        *_preprocess_lines(seen, constants),
        "",
        *_label_lines(seen.labels),
        *_task_lines(seen),
        "",
        f"target: {_quoted(target)}  # see: edgeprune targets list",
        "# latency: 60%  # of the dense latency on the device; 15ms and 2x are read too",
        "# max_drop: 1%  # percentage points of accuracy that may be lost",
        "# device: this-machine  # see: edgeprune devices list",
        "",
        "recovery:  # the training that heals the pruned model",
        "  epochs: 5",
        "  batch_size: 128",
        "  learning_rate: 0.02",
        "  augment:  # only what does not change an image's class",
        f"    shift_pixels: {2 if seen.kind == 'image' else 0}",
        "    mirror: false",
    ]
    return "\n".join(lines) + "\n"


def _preprocess_lines(seen: DataLook, constants: _Constants | None) -> list[str]:
    if constants is None or seen.size is None:
        return ["preprocess:", "  kind: none  # float samples go to the model as they are"]
    size_note = "" if seen.n_sizes == 1 else f"; the images have {seen.n_sizes} sizes: CHECK"
    return [
        "preprocess:  # must be what the model was trained with: (raw / 255 - mean) / std",
        "  kind: image",
        f"  size: [{seen.size[0]}, {seen.size[1]}]  # height, width{size_note}",
        f"  color: {seen.color}",
        f"  # {constants.origin}: these must be the constants of the training",
        f"  mean: {_list(constants.mean)}",
        f"  std: {_list(constants.std)}",
    ]


def _label_lines(labels: Sequence[str]) -> list[str]:
    if not labels:
        return ["# labels: [cat, dog]  # class names, in the order of the model's outputs"]
    return [
        "labels:  # in the order of the model's outputs",
        *(f"  - {_quoted(n)}" for n in labels),
    ]


def _task_lines(seen: DataLook) -> list[str]:
    if seen.is_labelled:
        return []
    return [f"task: {TASK}  # no labels show it: CHECK that each output is the score of one class"]


def _quoted(text: str) -> str:
    """Text as a YAML scalar; JSON strings are YAML strings."""
    return json.dumps(text, ensure_ascii=False)
