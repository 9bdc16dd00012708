"""Which files of an image folder are read, as which class, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import ModelError
from edgeprune.records.workload import Preprocess
from edgeprune.workload.data import Data, from_value, load_data
from edgeprune.workload.init import look_at

GREY = Preprocess(color="grey")


def put(folder: Path, count: int, suffix: str = "png", value: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(folder / f"{i}.{suffix}")


def read(folder: Path, labels: tuple[str, ...] | None = None) -> Data:
    return load_data(".", folder, preprocess=GREY, labels=labels)


def sizes(data: Data) -> dict[str, int]:
    splits = {n: getattr(data.dataset, n) for n in ("train", "selection", "development", "test")}
    return {name: len(split) for name, split in splits.items() if split is not None}


def values_by_class(data: Data) -> dict[int, set[int]]:
    """Pixel values of each class over all splits."""
    found: dict[int, set[int]] = {}
    for name in sizes(data):
        split = getattr(data.dataset, name)
        for x, y in zip(split.x, split.y, strict=True):
            found.setdefault(int(y), set()).add(int(x[0, 0]))
    return found


def noted(data: Data, words: str) -> bool:
    return sum(words in note for note in data.notes) == 1


def test_files_and_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    """Its rule: every folder is a class, in text order; below it all files with these suffixes in any case, links followed."""
    types = ("png", "jpg", "jpeg", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "PNG")
    for number, name in enumerate(["Zebra", "ant", "bee"]):
        for suffix in types:
            put(tmp_path / name / suffix, 1, suffix, 20 * number)
        put(tmp_path / name / "deep" / "er", 3, "png", 20 * number)
    classes = sorted(path.name for path in tmp_path.iterdir())
    files = [file for *_, inside in os.walk(tmp_path, followlinks=True) for file in inside]
    ours = read(tmp_path)
    assert ours.labels == tuple(classes) == ("Zebra", "ant", "bee")
    assert sum(sizes(ours).values()) == len(files) == 3 * (len(types) + 3)
    assert values_by_class(ours) == {0: {0}, 1: {20}, 2: {40}}


def test_a_class_whose_images_all_lie_in_subfolders_keeps_its_number(tmp_path: Path) -> None:
    put(tmp_path / "cat", 6, value=10)
    put(tmp_path / "dog" / "husky", 4, "ppm", 20)
    put(tmp_path / "dog" / "pug" / "young", 2, "tif", 20)
    put(tmp_path / "eel", 6, value=30)
    data = read(tmp_path)
    assert data.labels == ("cat", "dog", "eel")
    assert values_by_class(data) == {0: {10}, 1: {20}, 2: {30}}
    assert noted(data, "below a class folder count as that class: 6 in dog")


def test_what_is_not_read_is_counted_in_one_line(tmp_path: Path) -> None:
    put(tmp_path / "cat", 12)
    for name in ("a.heic", "b.HEIC", "c.txt", ".DS_Store", "._0.png", "README"):
        (tmp_path / "cat" / name).write_bytes(b"?")
    (tmp_path / "classes.json").write_text("{}")
    data = read(tmp_path)
    assert sum(sizes(data).values()) == 12
    line = next(note for note in data.notes if "were not read" in note)
    for part in ("2 .heic", "1 .txt", "2 hidden", "1 without a suffix", "1 .json"):
        assert part in line


def test_images_beside_class_folders_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "cat", 6)
    put(tmp_path / "dog", 6)
    put(tmp_path, 3)
    data = read(tmp_path)
    assert sum(sizes(data).values()) == 12
    assert noted(data, "beside the class folders of train have no class and were not read: 3")


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Train", "Val", "Test"), ("TRAIN", "Validation", "testing"), ("training", "valid", "TEST")],
)
def test_splits_may_be_written_in_several_ways(
    tmp_path: Path, train: str, val: str, test: str
) -> None:
    for name, count in {train: 6, val: 4, test: 3}.items():
        put(tmp_path / name / "a", count)
        put(tmp_path / name / "b", count)
    data = read(tmp_path)
    assert data.labels == ("a", "b")
    assert sizes(data) == {"train": 12, "selection": 4, "development": 4, "test": 6}
    assert not any("not read" in note for note in data.notes)


def test_arrays_may_have_splits_in_capitals_too(tmp_path: Path) -> None:
    x = np.zeros((20, 4, 4), np.uint8)
    assert sizes(from_value({"Train": x, "TEST": x}, preprocess=GREY, labels=None, where="d")) == {
        "train": 16,
        "selection": 2,
        "development": 2,
        "test": 20,
    }
    np.savez(tmp_path / "d.npz", X_train=x, y_train=np.arange(20) % 2, X_test=x, Val_x=x)
    data = load_data("d.npz", tmp_path, preprocess=GREY, labels=None)
    assert sizes(data) == {"train": 20, "selection": 10, "development": 10, "test": 20}
    np.savez(tmp_path / "d.npz", x=x, train_x=x)
    with pytest.raises(ModelError, match="'train_x' is a second x of train"):
        load_data("d.npz", tmp_path, preprocess=GREY, labels=None)
    with pytest.raises(ModelError, match="two of train"):
        from_value({"train": x, "Training": x}, preprocess=GREY, labels=None, where="d")


def test_a_folder_beside_the_splits_is_said_to_be_left_out(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        put(tmp_path / name, 6)
    put(tmp_path / "extra" / "more", 5)
    put(tmp_path, 2)
    (tmp_path / "extra" / "list.csv").write_text("")
    data = read(tmp_path)
    assert sum(sizes(data).values()) == 24
    assert noted(data, "extra, which is no split, were not read: 5")
    assert noted(data, "beside the splits were not read: 2")
    assert noted(data, "1 .csv")


def test_a_split_without_a_readable_image_is_said_to_be_left_out(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a", 12)
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "0.heic").write_bytes(b"?")
    data = read(tmp_path)
    assert data.dataset.test is None
    assert noted(data, "test has no image that is read, and is left out")
    assert not any(str(tmp_path) in note for note in data.notes)  # bundles repeat them


def test_a_split_without_class_folders_is_said_to_have_no_labels(tmp_path: Path) -> None:
    for name in ("train/a", "train/b"):
        put(tmp_path / name, 12)
    put(tmp_path / "test", 5)
    data = read(tmp_path)
    assert data.dataset.test is not None
    assert data.dataset.test.y is None
    assert noted(data, "test has no class folders, so its images have no labels: 5")


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("train/a", "Train/a"), "folders of one split must be one, but .* has Train and train"),
        (("val/a", "Test/a"), "must have train, but .* has only Test, val"),
        (("set/train/a", "set/val/a"), r"folder that has train in it, but .*set.train as its only"),
        (("train/train/a", "val/a"), r"folder that has train in it, but .*train.train as its only"),
        (("train", "car", "plane"), "has car, plane beside a train without classes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_folders_that_are_not_what_they_seem_are_refused(
    tmp_path: Path, folders: tuple[str, ...], words: str
) -> None:
    for name in folders:
        put(tmp_path / name, 6)
    with pytest.raises(ModelError, match=words):
        read(tmp_path)


def test_train_may_be_a_class_beside_others_in_train(tmp_path: Path) -> None:
    for value, name in enumerate(["plane", "train"]):
        put(tmp_path / "train" / name, 12, value=value)
    data = read(tmp_path)
    assert data.labels == ("plane", "train")
    assert values_by_class(data) == {0: {0}, 1: {1}}


def test_a_class_named_like_a_split_is_pointed_out(tmp_path: Path) -> None:
    for name in ("cat", "val"):
        put(tmp_path / name, 12)
    assert noted(read(tmp_path), "val is taken for a class")


def test_a_class_folder_without_a_readable_image_is_refused_with_what_it_holds(
    tmp_path: Path,
) -> None:
    for name in ("cat", "eel"):
        put(tmp_path / name, 6)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ModelError, match=r"dog has none of the types .*\(it holds nothing\)"):
        read(tmp_path)
    for i in range(3):
        (tmp_path / "dog" / f"{i}.heic").write_bytes(b"?")
    with pytest.raises(ModelError, match=r"\(it holds 3 \.heic\)"):
        read(tmp_path)
    data = read(tmp_path, labels=("cat", "dog", "eel"))  # then no number moves
    assert set(values_by_class(data)) == {0, 2}
    assert noted(data, "without an image that is read: 1, such as dog")
    assert noted(data, "3 .heic")


def test_a_class_that_only_another_split_lacks_is_fine(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/b"):
        put(tmp_path / name, 12)
    (tmp_path / "test" / "a").mkdir()
    test = read(tmp_path).dataset.test
    assert test is not None
    assert test.y is not None
    assert set(test.y) == {1}


def test_a_folder_of_other_types_says_which(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.gif").write_bytes(b"?")
    with pytest.raises(ModelError, match=r"has none \(it holds 3 \.gif\)"):
        read(tmp_path)


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    put(tmp_path / "store", 12)
    photos = tmp_path / "photos"
    put(photos / "cat", 6)
    (photos / "dog").symlink_to(tmp_path / "store")
    (photos / "cat" / "again").symlink_to(photos)
    (photos / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    data = read(photos)
    assert data.labels == ("cat", "dog")
    assert sum(sizes(data).values()) == 18
    assert noted(data, "1 broken link or device")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    put(tmp_path / "cat", 6)
    plain = Path.iterdir

    def refuse(path: Path):
        if path.name == "cat":  # a test that runs as root cannot take its own rights away
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match="cat cannot be read: Permission denied"):
        read(tmp_path)


def test_init_refuses_the_same_folders(tmp_path: Path) -> None:
    put(tmp_path / "set" / "train" / "cat", 3)
    with pytest.raises(ModelError, match="as its only class"):
        look_at(".", tmp_path)
    put(tmp_path / "set" / "train" / "dog" / "husky", 3)
    assert look_at("set", tmp_path).labels == ("cat", "dog")
