"""Which files of an image folder are read, as which split and class, and what is passed over: nothing is, without a word. No torch here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.errors import ModelError
from edgeprune.workload import splits

# Those that torchvision's ImageFolder reads.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MOST_KINDS = 6

ByClass = dict[str | None, list[Path]]


@dataclass
class ImagesBelow:
    """The image files below a folder, and what was passed over.

    ``files`` has the files by split and class folder, each list sorted; class ``None`` where they lie flat, without labels. ``others``
    counts files of other types by split and class, ``beside`` images that have no class, by split, and ``outside`` images in folders that
    are no split (the name is empty where they lie beside them). ``empty`` are class folders of ``train`` without an image, ``nested``
    counts images in folders below a class folder. ``train`` is the folder of that split.
    """

    folder: Path
    train: Path
    files: dict[str, ByClass] = field(default_factory=dict)
    others: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    beside: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    nested: Counter[str] = field(default_factory=Counter)
    empty: tuple[str, ...] = ()

    def passed_over(self, split: str | None = None, name: str | None = None) -> str:
        """Files of other types in words, such as ``10 .heic, 2 .txt``; of one class folder where it is named."""
        wanted = (
            counts for key, counts in self.others.items() if split is None or key == (split, name)
        )
        total = sum(wanted, Counter())
        kinds = [f"{count} {kind}" for kind, count in total.most_common(MOST_KINDS)]
        more = sum(total.values()) - sum(count for _, count in total.most_common(MOST_KINDS))
        return ", ".join(kinds + ([f"{more} others"] if more else []))

    def notes(self) -> list[str]:
        """What the user must know of the files that were passed over, or taken in another way than they may think, one line each.

        They go into reports and bundles, so they have no path of this machine.
        """
        others = self.passed_over()
        lines = [f"files that were not read: {others}"] if others else []
        for name, count in sorted(self.outside.items()):
            where = f"in {name}, which is no split," if name else "beside the splits"
            lines.append(f"images {where} were not read: {count}")
        for split, count in sorted(self.beside.items()):
            lines.append(
                f"images beside the class folders of {split} have no class and were not read: {count}"
            )
        return [*lines, *self._taken_otherwise()]

    def _taken_otherwise(self) -> Iterator[str]:
        if self.empty:
            yield f"class folders without an image that is read: {len(self.empty)}, such as {self.empty[0]}"
        for name, count in self.nested.most_common(1):
            total = sum(self.nested.values())
            such = f", such as {count} in {name}" if total > count else f" in {name}"
            yield f"images in folders below a class folder count as that class: {total}{such}"
        for folder in self.files["train"] if self.train == self.folder else ():
            if folder is not None and splits.canonical(folder) is not None:
                yield f"{folder} is taken for a class, because there is no folder train beside it"
        labelled = any(None not in by_class for by_class in self.files.values())
        for split, by_class in self.files.items():
            if labelled and (flat := by_class.get(None)):
                yield f"{split} has no class folders, so its images have no labels: {len(flat)}"
            if not any(by_class.values()):
                yield f"{split} has no image that is read, and is left out"


def find(folder: Path, *, nested: bool = True) -> ImagesBelow:
    """The image files of a folder.

    It is read as splits when it has a ``train`` folder (``Train`` and ``training`` mean the same); else as class folders when any of its
    folders holds an image; else as flat files. Hidden files and folders are passed over; links are followed.

    Args:
        folder: what to look through.
        nested: whether images in folders below a class folder count as that class.

    Raises:
        ModelError: two folders are the same split, or a folder cannot be read.
    """
    places = _split_folders(folder)
    found = ImagesBelow(folder, places["train"])
    for split, place in places.items():
        _sort_into(found, split, place, nested)
    if places == {"train": folder}:
        return found
    for path in _files(folder, levels=None if nested else 1, leave_out=places.values()):
        parts = path.relative_to(folder).parts
        if _kind(path) is not None:
            _count(found, "", "", path)
        else:
            found.outside[parts[0] if len(parts) > 1 else ""] += 1
    return found


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split; the whole is ``train`` where there is no such folder."""
    named: dict[str, Path] = {}
    for name, path in _subfolders(folder).items():
        split = splits.canonical(name)
        if split is not None and split in named:
            raise ModelError(
                f"folders of one split must be one, but {folder} has {named[split].name} and {name}"
            )
        if split is not None:
            named[split] = path
    return named if "train" in named else {"train": folder}


def _sort_into(found: ImagesBelow, split: str, place: Path, nested: bool) -> None:
    """Add the files of one split."""
    flat: list[Path] = []
    by_class: dict[str, list[Path]] = {name: [] for name in _subfolders(place)}
    for path in _files(place, levels=None if nested else 2):
        first, *rest = path.relative_to(place).parts
        if _kind(path) is not None:
            _count(found, split, first if rest else "", path)
        elif not rest:
            flat.append(path)
        else:
            by_class[first].append(path)
            found.nested[first] += len(rest) > 1
    found.nested += Counter()  # drops those of zero
    labelled: ByClass = {name: sorted(paths) for name, paths in by_class.items() if paths}
    found.files[split] = labelled or {None: sorted(flat)}
    if labelled and flat:
        found.beside[split] += len(flat)
    if labelled and split == "train":
        found.empty = tuple(name for name in by_class if name not in labelled)


def _count(found: ImagesBelow, split: str, name: str, path: Path) -> None:
    found.others.setdefault((split, name), Counter())[_kind(path) or ""] += 1


def _kind(path: Path) -> str | None:
    """``None`` for an image that is read; else what the file is, in words."""
    if path.name.startswith("."):
        return "hidden"
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None if path.is_file() else "broken link or device"
    return suffix or "without a suffix"


def _subfolders(folder: Path) -> dict[str, Path]:
    inside = sorted(p for p in _entries(folder) if p.is_dir() and not p.name.startswith("."))
    return {p.name: p for p in inside}


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from error


def _files(
    folder: Path,
    *,
    levels: int | None,
    leave_out: Collection[Path] = (),
    above: frozenset[str] = frozenset(),
) -> Iterator[Path]:
    """All that is no folder in a folder and the folders below it, down to some levels; a link back to a folder above is not followed.

    Hidden folders are given as they are; folders of the folder itself that are to be left out are not looked into.
    """
    above |= {os.path.realpath(folder)}
    for path in _entries(folder):
        if path in leave_out:
            continue
        if not path.is_dir() or path.name.startswith("."):
            yield path
        elif levels == 1:
            continue
        elif os.path.realpath(path) not in above:
            yield from _files(path, levels=None if levels is None else levels - 1, above=above)


def check(found: ImagesBelow, *, are_named: bool = False) -> None:
    """Raise unless the folders are what they seem to be: classes with images, and no splits among them.

    Args:
        found: what was found.
        are_named: whether the user names the classes, so that a folder without images moves no number.

    Raises:
        ModelError: otherwise; says which folder.
    """
    train = found.files["train"]
    classes = [name for name in train if name is not None]
    if found.outside and not classes and len(found.files) == 1:
        others = ", ".join(sorted(filter(None, found.outside))[:3]) or "images"
        raise ModelError(
            f"a folder with train in it must have splits or classes, but {found.folder} has {others} beside a train without classes",
            hint="for classes, put all their folders into a folder train; else move the others away",
        )
    hidden = _hidden_train(found, classes)
    if hidden is not None:
        raise ModelError(
            f"data must be the folder that has train in it, but {found.folder} has {hidden} as its only class",
            hint=f"name {hidden.parent}",
        )
    if classes and all(splits.canonical(name) is not None for name in classes):
        raise ModelError(
            f"a folder with splits must have train, but {found.folder} has only {', '.join(classes)}",
            hint=f"splits: {', '.join(splits.ACCEPTED)}",
        )
    if found.empty and not are_named:
        name = found.empty[0]
        others = found.passed_over("train", name) or "nothing"
        raise ModelError(
            f"every class folder must have images, but {found.train / name} has none of the types that are read (it holds {others})",
            hint=f"remove the folder, name the classes with labels, or save as one of {' '.join(IMAGE_SUFFIXES)}",
        )


def _hidden_train(found: ImagesBelow, classes: list[str]) -> Path | None:
    """The folder of the split ``train`` that the only class is, or holds; a class of trains has other classes beside it."""
    if len(classes) != 1:
        return None
    only = found.train / classes[0]
    if splits.canonical(only.name) == "train":
        return only
    below = [only / name for name in _subfolders(only)]
    return next((path for path in below if splits.canonical(path.name) == "train"), None)
