"""Image folders, npz files, factories, splits and the rules that raw arrays must keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from edgeprune.errors import ModelError, SpecError
from edgeprune.records.workload import Preprocess
from edgeprune.workload import image_files, splits
from edgeprune.workload.data import from_value, load_data
from edgeprune.workload.dataset import Split

GREY = Preprocess(color="grey")
RGB = Preprocess()
FLOAT = Preprocess(kind="none")


def grey_images(n: int, value: int | None = None) -> np.ndarray:
    if value is not None:
        return np.full((n, 6, 5), value, np.uint8)
    return np.random.default_rng(n).integers(0, 256, (n, 6, 5), dtype=np.uint8)


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def value(data: object, preprocess: Preprocess = GREY, labels: tuple[str, ...] | None = None):
    return from_value(data, preprocess=preprocess, labels=labels, where="data")


def test_class_folders_give_labels_and_images(tmp_path: Path) -> None:
    for number, name in enumerate(["cat", "dog", "eel"]):
        for i in range(4):
            save_image(tmp_path / name / f"{i}.png", np.full((6, 5, 3), 40 * number + i, np.uint8))
    data = load_data(".", tmp_path, preprocess=RGB, labels=None)
    assert data.labels == ("cat", "dog", "eel")
    assert data.preprocess.size == (6, 5)
    parts = [data.dataset.train, data.dataset.selection, data.dataset.development]
    assert [len(p) for p in parts] == [10, 1, 1]
    for part in parts:
        assert part.x.shape[1:] == (6, 5, 3)
        assert (part.x[:, 0, 0, 0] // 40 == part.y).all()


def test_split_folders_are_used_as_they_are(tmp_path: Path) -> None:
    counts = {"train": 5, "selection": 2, "development": 3, "test": 4}
    for split, n in counts.items():
        for name in ("a", "b"):
            for i in range(n):
                save_image(tmp_path / split / name / f"{i}.png", grey_images(1)[0])
    data = load_data(".", tmp_path, preprocess=GREY, labels=None).dataset
    assert data.test is not None
    assert {n: len(getattr(data, n)) for n in counts} == {n: 2 * c for n, c in counts.items()}


def test_a_val_folder_is_halved_into_selection_and_development(tmp_path: Path) -> None:
    for split, n in {"train": 6, "val": 5}.items():
        for i in range(n):
            save_image(tmp_path / split / "only" / f"{i}.png", np.full((4, 4), i, np.uint8))
    data = load_data(".", tmp_path, preprocess=GREY, labels=None).dataset
    assert len(data.train) == 6
    seen = np.concatenate([data.selection.x, data.development.x])[:, 0, 0]
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_flat_files_have_no_labels(tmp_path: Path) -> None:
    for i in range(5):
        save_image(tmp_path / f"{i}.png", grey_images(5)[i])
    data = load_data(".", tmp_path, preprocess=GREY, labels=None)
    assert data.labels is None
    assert data.dataset.train.y is None
    assert len(data.dataset.train) == 3


def test_images_are_resized_and_converted_to_the_recorded_form(tmp_path: Path) -> None:
    for i, (height, width) in enumerate([(6, 5), (12, 9), (3, 30), (7, 7)]):
        save_image(tmp_path / f"{i}.png", np.full((height, width, 3), (10, 200, 90), np.uint8))
    save_image(tmp_path / "4.jpg", np.full((8, 8), 128, np.uint8))
    data = load_data(".", tmp_path, preprocess=Preprocess(size=(6, 8)), labels=None)
    assert data.dataset.train.x.shape[1:] == (6, 8, 3)
    grey = load_data(".", tmp_path, preprocess=Preprocess(size=(6, 8), color="grey"), labels=None)
    assert grey.dataset.train.x.shape[1:] == (6, 8)
    # ITU-R BT.601 luma of (10, 200, 90), the weights that PIL documents for mode L
    luma = round(0.299 * 10 + 0.587 * 200 + 0.114 * 90)
    assert set(np.unique(grey.dataset.train.x)) <= {luma, 128}


def test_a_resize_is_bilinear(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", np.array([[0, 100]], np.uint8))
    pixels = image_files.read_image(tmp_path / "a.png", (1, 4), "grey")
    assert pixels.tolist() == [[0, 25, 75, 100]]


def test_images_of_several_sizes_need_a_recorded_size(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", np.zeros((6, 5), np.uint8))
    save_image(tmp_path / "b.png", np.zeros((7, 5), np.uint8))
    with pytest.raises(ModelError, match=r"6x5 and 7x5.*preprocess\.size"):
        load_data(".", tmp_path, preprocess=GREY, labels=None)


def test_recorded_labels_number_the_class_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(3):
            save_image(tmp_path / name / f"{i}.png", np.full((4, 4), ord(name[0]), np.uint8))
    named = load_data(".", tmp_path, preprocess=GREY, labels=("dog", "cow", "cat"))
    train = named.dataset.train
    assert {(int(x[0, 0]), int(y)) for x, y in zip(train.x, train.y)} == {
        (ord("d"), 0),
        (ord("c"), 2),
    }
    by_order = load_data(".", tmp_path, preprocess=GREY, labels=("Katze", "Hund"))
    assert by_order.labels == ("Katze", "Hund")
    assert any("cat = Katze" in note for note in by_order.notes)
    with pytest.raises(ModelError, match="3 labels for 2 folders"):
        load_data(".", tmp_path, preprocess=GREY, labels=("x", "y", "z"))


def test_number_folders_in_text_order_are_pointed_out(tmp_path: Path) -> None:
    for name in map(str, range(11)):
        save_image(tmp_path / name / "0.png", np.zeros((4, 4), np.uint8))
    data = load_data(".", tmp_path, preprocess=GREY, labels=None)
    assert data.labels is not None
    assert data.labels[:3] == ("0", "1", "10")
    assert any("text order" in note for note in data.notes)


def test_a_class_that_is_not_in_train_is_refused(tmp_path: Path) -> None:
    for path in ("train/a", "train/b", "test/a", "test/c"):
        save_image(tmp_path / path / "0.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ModelError, match="'c' is only in another split"):
        load_data(".", tmp_path, preprocess=GREY, labels=None)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", grey_images(1)[0])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"1\.png cannot be read as an image"):
        load_data(".", tmp_path, preprocess=GREY, labels=None)
    (tmp_path / "1.png").write_text("not an image")
    with pytest.raises(ModelError, match=r"1\.png cannot be read as an image"):
        load_data(".", tmp_path, preprocess=GREY, labels=None)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ModelError, match="has none"):
        load_data(".", tmp_path, preprocess=GREY, labels=None)


def test_more_than_four_gibibytes_are_refused_before_reading(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", np.zeros((4, 4), np.uint8))
    huge = Preprocess(size=(30_000, 30_000), color="rgb")
    with pytest.raises(ModelError, match=r"at most 4 GiB.*has 7\.5 GiB"):
        load_data(".", tmp_path, preprocess=huge, labels=None)


@pytest.mark.parametrize(
    "keys", [("x", "y"), ("train_x", "train_y"), ("x_train", "y_train")], ids="-".join
)
def test_npz_files_are_read_by_their_keys(tmp_path: Path, keys: tuple[str, str]) -> None:
    x, y = grey_images(20), np.arange(20) % 3
    np.savez(tmp_path / "d.npz", **{keys[0]: x, keys[1]: y})
    data = load_data("d.npz", tmp_path, preprocess=GREY, labels=None).dataset
    assert len(data.train) == 16
    assert data.train.y is not None


def test_npz_splits_are_kept(tmp_path: Path) -> None:
    arrays = {f"{n}_x": grey_images(4, i) for i, n in enumerate(splits.NAMES)}
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    data = load_data("d.npz", tmp_path, preprocess=GREY, labels=None)
    for i, name in enumerate(splits.NAMES):
        assert (getattr(data.dataset, name).x == i).all()
    assert data.notes == ()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((3, 2, 2), np.uint8), "tset_x": np.zeros(1)}, "'tset_x'"),
        ({"images": np.zeros(3)}, "'images'"),
        ({"y": np.zeros(3, np.int64)}, "labels for train but no samples"),
        ({"test_x": np.zeros((3, 2, 2), np.uint8)}, "no 'train'"),
    ],
)
def test_npz_keys_of_another_form_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ModelError, match=words):
        load_data("d.npz", tmp_path, preprocess=GREY, labels=None)


def test_pickled_objects_in_npz_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(ModelError, match="pickled objects, which are not read"):
        load_data("d.npz", tmp_path, preprocess=GREY, labels=None)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_npz_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=grey_images(50))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"not a whole \.npz"):
        load_data("d.npz", tmp_path, preprocess=GREY, labels=None)


def test_a_damaged_member_of_an_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=grey_images(50))
    raw = bytearray(path.read_bytes())
    raw[200:260] = bytes(60)
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=r"d\.npz"):
        load_data("d.npz", tmp_path, preprocess=GREY, labels=None)


def test_data_that_is_not_there_is_a_spec_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such folder or file"):
        load_data("photos", tmp_path, preprocess=GREY, labels=None)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(SpecError, match=r"must be an image folder, an \.npz file"):
        load_data("d.csv", tmp_path, preprocess=GREY, labels=None)


def test_a_data_factory_may_return_each_agreed_form(tmp_path: Path) -> None:
    source = (
        "import numpy as np, torch\n"
        "x = np.zeros((10, 4, 4), np.uint8)\n"
        "def pair(): return x, np.arange(10) % 2\n"
        "def alone(): return x\n"
        "def lists(): return x, [0, 1] * 5\n"
        "def tensors(): return torch.zeros(10, 4, 4, dtype=torch.uint8), torch.arange(10) % 2\n"
        "def splits(): return {'train': x, 'val': (x, np.arange(10) % 2)}\n"
        "def text(): return 'no data'\n"
        "def graph(): return torch.zeros(3, 4, requires_grad=True)\n"
    )
    (tmp_path / "d.py").write_text(source)
    labelled = {"pair": True, "alone": False, "lists": True, "tensors": True, "splits": False}
    for name, has_labels in labelled.items():
        data = load_data(f"d.py:{name}", tmp_path, preprocess=GREY, labels=None).dataset
        assert (data.train.y is not None) is has_labels, name
    with pytest.raises(ModelError, match=r"train of d\.py:text must be an array.*is str"):
        load_data("d.py:text", tmp_path, preprocess=GREY, labels=None)
    with pytest.raises(ModelError, match="cannot become numpy arrays"):
        load_data("d.py:graph", tmp_path, preprocess=GREY, labels=None)


def test_a_loader_is_refused_with_the_line_that_makes_arrays_of_it():
    pairs = TensorDataset(torch.zeros(10, 3, 4, 4), torch.arange(10) % 2)
    loader = DataLoader(pairs, batch_size=4)
    with pytest.raises(ModelError, match=r"array.*is DataLoader") as error:
        value(loader)
    assert "x, y = map(torch.cat, zip(*loader))" in (error.value.hint or "")
    x, y = map(torch.cat, zip(*loader, strict=True))
    assert (x.shape, y.tolist()) == ((10, 3, 4, 4), [0, 1] * 5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 400))
def test_drawn_splits_are_disjoint_complete_and_repeatable(n: int) -> None:
    x = np.arange(n, dtype=np.float32).reshape(n, 1)
    first, second = (value((x, np.arange(n)), FLOAT).dataset for _ in range(2))
    parts = [first.train, first.selection, first.development]
    assert sorted(np.concatenate([p.x for p in parts]).ravel()) == list(range(n))
    assert all((p.x.ravel() == p.y).all() for p in parts)
    fewest = 8 if n >= 26 else 1  # 26 leaves the 10 that a plan needs for training
    assert len(first.selection) == len(first.development) == max(fewest, n // 10)
    assert first.digest == second.digest
    assert (first.selection.x == second.selection.x).all()


def test_drawn_splits_have_at_most_3000_samples() -> None:
    data = value(np.zeros((50_000, 2), np.float32), FLOAT).dataset
    assert (len(data.selection), len(data.development), len(data.train)) == (3000, 3000, 44_000)


def test_only_the_missing_split_is_drawn() -> None:
    given = {"train": grey_images(20), "development": grey_images(7)}
    data = value(given).dataset
    assert (len(data.train), len(data.selection), len(data.development)) == (12, 8, 7)
    assert data.test is None


def test_the_digest_follows_every_part_of_the_data() -> None:
    x, y = grey_images(20), np.arange(20) % 2
    first = value((x, y)).dataset.digest
    other = y.copy()
    other[3] = 0
    assert value((x, other)).dataset.digest != first
    assert value(x).dataset.digest != first
    assert value({"train": (x, y), "test": x}).dataset.digest != first
    assert value((x.astype(np.float32), y)).dataset.digest != first


def test_the_digest_of_large_data_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "DIGEST_BYTES", 100)
    x = grey_images(20)  # 30 bytes a sample: every sixth one is read
    first = splits.digest({"train": Split(x, None)})
    changed = x.copy()
    changed[6] += 1
    assert splits.digest({"train": Split(changed, None)}) != first
    unread = x.copy()
    unread[7] += 1
    assert splits.digest({"train": Split(unread, None)}) == first


@pytest.mark.parametrize(
    ("x", "preprocess", "words"),
    [
        (np.zeros((0, 4, 4), np.uint8), GREY, "at least one sample"),
        (np.zeros((5, 0, 4), np.uint8), GREY, "without empty dimensions"),
        (np.zeros(5, np.uint8), GREY, r"must be \[N, ...\]"),
        (np.zeros((5, 4, 4), np.int64), GREY, "int64"),
        (np.zeros((5, 4, 4), bool), GREY, "bool"),
        (np.zeros((5, 4, 4), np.uint8), RGB, "set preprocess.color: grey"),
        (np.zeros((5, 4, 4, 3), np.uint8), GREY, "set preprocess.color: rgb"),
        (np.zeros((5, 3, 8, 8), np.uint8), RGB, "channels come last"),
        (np.zeros((5, 4, 4, 4), np.uint8), RGB, r"\[5, 4, 4, 4\]"),
        (np.zeros((5, 4, 6), np.uint8), Preprocess(color="grey", size=(4, 4)), r"\[4, 6\]"),
        (np.full((5, 2), np.nan, np.float32), FLOAT, "5 samples of train of data have NaN"),
        (np.full((5, 2), 1e300), FLOAT, "NaN or Inf"),
        (np.zeros((2, 4, 4), np.uint8), GREY, "at least 3 samples"),
    ],
)
def test_samples_that_break_a_rule_are_refused_with_the_values(
    x: np.ndarray, preprocess: Preprocess, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        value(x, preprocess)


@pytest.mark.parametrize(
    ("y", "labels", "words"),
    [
        (np.zeros(4, np.int64), None, "has 5 and 4"),
        (np.eye(3, dtype=np.int64)[[0, 1, 2, 0, 1]], None, "argmax"),
        (np.zeros((5, 3), np.int64), None, "several labels"),
        (np.zeros((5, 1), np.int64), None, r"\[5, 1\]"),
        (np.zeros(5), None, "float64"),
        (np.array([0, 1, 2, 3, -1]), None, "at least 0.*-1 to 3"),
        (np.array([0, 1, 2, 3, 1]), ("a", "b", "c"), "0 to 2 for 3 labels.*0 to 3"),
    ],
)
def test_labels_that_break_a_rule_are_refused_with_the_values(
    y: np.ndarray, labels: tuple[str, ...] | None, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        value((grey_images(5), y), GREY, labels)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train": grey_images(9), "dev": grey_images(9)}, "it has 'dev'"),
        ({"train": grey_images(9), "val": grey_images(1)}, "at least 2 samples"),
        ({"train": grey_images(9), "val": grey_images(4), "valid": grey_images(4)}, "one of val"),
        (
            {"train": grey_images(9), "test": np.zeros((3, 7, 5), np.uint8)},
            r"train is uint8 \[6, 5\] and test is uint8 \[7, 5\]",
        ),
    ],
)
def test_splits_that_do_not_fit_together_are_refused(
    given: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        value(given)


def test_float_data_is_passed_on_and_the_user_is_told() -> None:
    x = np.random.default_rng(0).normal(size=(10, 1, 4, 4))
    data = value(x, GREY)
    assert data.dataset.train.x.dtype == np.float32
    assert data.preprocess == GREY
    assert any("mean and std do not apply" in note for note in data.notes)


def test_a_dataset_goes_through_unchanged() -> None:
    first = value({"train": grey_images(20), "test": grey_images(4)})
    again = value(first.dataset)
    assert again.dataset.digest == first.dataset.digest
