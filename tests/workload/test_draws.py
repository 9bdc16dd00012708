"""What is drawn does not depend on the order that the data came in, and every part of it has the classes in proportion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.records.workload import Preprocess
from edgeprune.workload.data import from_folder, from_value
from edgeprune.workload.dataset import Dataset, Split
from edgeprune.workload.draws import fair_order, shares
from edgeprune.workload.splits import NAMES

GREY = Preprocess(color="grey")


def in_class_order(counts: list[int]) -> Split:
    """Images whose brightness tells the class, class by class."""
    y = np.repeat(np.arange(len(counts)), counts)
    noise = np.random.default_rng(0).integers(0, 4, (len(y), 6, 5))
    return Split((noise + 4 * y[:, None, None]).astype(np.uint8), y)


def dataset(split: Split, *, labelled: bool = True) -> Dataset:
    value = {"train": (split.x, split.y if labelled else None)}
    return from_value(value, preprocess=GREY, labels=None, where="data").dataset


def shuffled(split: Split) -> Split:
    assert split.y is not None
    order = np.random.default_rng(1).permutation(len(split))
    return Split(split.x[order], split.y[order])


def fair(split: Split) -> Split:
    order = fair_order(split.x, split.y)
    return Split(split.x[order], None if split.y is None else split.y[order])


@pytest.mark.parametrize("labelled", [True, False])
def test_data_in_class_order_gives_the_same_splits_as_the_same_data_shuffled(labelled):
    raw = in_class_order([50, 30, 20])
    first, second = (dataset(s, labelled=labelled) for s in (raw, shuffled(raw)))
    assert first.digest == second.digest
    for name in ("train", "selection", "development"):
        a, b = getattr(first, name), getattr(second, name)
        assert np.array_equal(a.x, b.x)
        assert not labelled or np.array_equal(a.y, b.y)


def test_files_in_class_order_give_the_same_splits_as_the_same_files_under_other_names(
    tmp_path: Path,
):
    raw = in_class_order([20, 20])
    for folder, split in (("sorted", raw), ("mixed", shuffled(raw))):
        (tmp_path / folder).mkdir()
        for i, pixels in enumerate(split.x):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:03}.png")
    found = [
        from_folder(tmp_path / folder, preprocess=GREY, labels=None).dataset
        for folder in ("sorted", "mixed")
    ]
    assert all(np.array_equal(getattr(found[0], n).x, getattr(found[1], n).x) for n in NAMES[:3])
    # Without labels, too, what is held out is of both classes.
    dark = found[0].train.x[-len(found[0].train) // 5 :].mean(axis=(1, 2)) < 4
    assert 0 < dark.sum() < len(dark)


def test_every_run_of_a_split_has_the_classes_in_proportion():
    counts = np.array([500, 250, 37, 10, 3])
    split = fair(in_class_order(counts.tolist()))
    for start in range(0, len(split) - 80, 23):
        for n in (1, 16, 80):
            seen = np.bincount(split.y[start : start + n], minlength=len(counts))
            assert (abs(seen - counts * n / len(split)) < 2).all()


def test_a_draw_has_every_class_in_proportion_and_those_that_are_rare_once():
    split = fair(in_class_order([600, 300, 90, 9, 1]))
    few = split.drawn(50)
    assert np.bincount(few.y).tolist() == [29, 15, 4, 1, 1]
    assert len(split.drawn(5000)) == 1000
    assert sorted(split.drawn(5).y) == [0, 1, 2, 3, 4]
    assert len(split.drawn(3)) == 3
    # The rare ones do not gather at the end, which is held out.
    many = fair(in_class_order([900] + [2] * 50)).drawn(150)
    assert 10 <= (many.y[-30:] > 0).sum() <= 30
    assert (many.y[:120] > 0).sum() >= 20


@pytest.mark.parametrize("n", [5, 6, 17, 100, 999, 1000])
def test_shares_are_whole_add_up_and_never_ask_for_more_than_there_is(n):
    counts = np.array([600, 300, 90, 9, 1])
    found = shares(counts, n)
    assert found.sum() == n
    assert (found >= 1).all()
    assert (found <= counts).all()


def test_what_is_drawn_from_train_has_every_class_and_leaves_every_class_in_it():
    data = dataset(in_class_order([150, 140, 3]))
    for split in (data.train, data.selection, data.development):
        assert set(split.y) == {0, 1, 2}
    single = dataset(in_class_order([99, 1]))
    assert 1 in single.train.y
    one_each = dataset(in_class_order([1] * 30))
    assert (len(one_each.train), len(one_each.selection), len(one_each.development)) == (14, 8, 8)


def test_the_halves_of_a_val_split_have_the_same_classes():
    raw = in_class_order([20, 10, 2])
    given = {"train": (raw.x, raw.y), "val": (raw.x, raw.y)}
    data = from_value(given, preprocess=GREY, labels=None, where="data").dataset
    halves = [np.bincount(s.y, minlength=3) for s in (data.selection, data.development)]
    assert [h.tolist() for h in halves] == [[10, 5, 1], [10, 5, 1]]
