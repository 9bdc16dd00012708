"""What is taken for a classifier, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.errors import EdgepruneError, ModelError, SpecError
from edgeprune.records.workload import Preprocess, Workload
from edgeprune.workload.load import LoadedWorkload, from_objects
from edgeprune.workload.outputs import outputs_of

ROWS = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)
CLASSES = np.arange(48) % 4


class Unit(nn.Module):
    """Rows of length 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=1)


def body(outputs: int = 4, *last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs), *last).eval()


def loaded(model: nn.Module, data: object = ROWS, **given: object) -> LoadedWorkload:
    return from_objects(model, data, preprocess=Preprocess(kind="none"), **given)  # type: ignore[arg-type]


NO_CLASSIFIER = {
    "a regressor without labels": (body(3), ROWS, SpecError, "nothing says that the 3 outputs"),
    "an autoencoder": (body(6), ROWS, ModelError, "as many as the inputs, as an autoencoder"),
    "an autoencoder of images": (
        nn.Conv2d(3, 3, 1),
        np.zeros((20, 3, 4, 4), np.float32),
        ModelError,
        "as large as the input is that of an autoencoder",
    ),
    "an embedding": (body(4, Unit()), ROWS, ModelError, "length 1, as an embedding"),
    "several labels, unlabelled": (body(4, nn.Sigmoid()), ROWS, ModelError, "several labels"),
    "one output": (body(1), (ROWS, CLASSES), ModelError, "one output is a measured value"),
    "measured values": (body(3), (ROWS, ROWS[:, 0]), ModelError, "are for regression"),
    "rows of measured values": (body(3), (ROWS, ROWS[:, :3]), ModelError, "are for regression"),
    "a column of measured values": (body(3), (ROWS, ROWS[:, :1]), ModelError, "for regression"),
    "several labels": (
        body(3),
        (ROWS, (ROWS[:, :3] > 0).astype(int)),
        ModelError,
        "several labels a sample",
    ),
    "counts": (body(4), (ROWS, CLASSES * 100), ModelError, "may be measured values"),
    "a map": (body(3), (ROWS, np.zeros((48, 2, 2), int)), ModelError, "each position"),
}


@pytest.mark.parametrize("case", NO_CLASSIFIER.values(), ids=NO_CLASSIFIER)
def test_a_net_of_another_task_is_refused_by_what_it_looks_like(case) -> None:
    model, data, kind, words = case
    with pytest.raises(EdgepruneError, match=words) as refused:
        loaded(model, data)
    assert type(refused.value) is kind
    assert "edgeprune prunes classifiers" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("y", "hint"),
    [
        (np.eye(4)[CLASSES], "y.argmax"),
        (np.full((48, 4), 0.25), "y.argmax"),
        (CLASSES[:, None], "y[:, 0]"),
        (CLASSES.astype(float), "astype"),
        (CLASSES > 1, "astype"),
        (CLASSES.astype(str), "number the classes"),
        (CLASSES + 1, "count classes from 0"),
    ],
)
def test_class_numbers_in_another_form_get_the_way_to_the_right_one(y, hint) -> None:
    with pytest.raises(ModelError) as refused:
        loaded(body(), (ROWS, y))
    assert refused.value.hint is not None
    assert hint in refused.value.hint
    assert "regression" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "given"),
    [
        ((ROWS, CLASSES), {}),
        ({"train": ROWS, "val": (ROWS, CLASSES)}, {}),
        (ROWS, {"labels": ["a", "b", "c", "d"]}),
        (ROWS, {"task": "classify"}),
        (ROWS, {"settings": Workload(model="net.py:build", data="-", task="classify")}),
    ],
)
def test_class_numbers_class_names_or_the_users_word_make_a_classifier(data, given) -> None:
    given = dict(given)
    settings = given.pop("settings", None)
    found = from_objects(
        body(), data, preprocess=Preprocess(kind="none"), settings=settings, **given
    )
    assert (found.n_classes, found.outputs) == (4, "logits")
    assert not any("probabilities" in note for note in found.notes)


def test_the_users_word_goes_before_what_the_outputs_look_like() -> None:
    assert loaded(body(6), task="classify").n_classes == 6
    assert any("sigmoid" in n for n in loaded(body(4, nn.Sigmoid()), task="classify").notes)


def test_probabilities_are_told_by_real_samples_and_known_to_every_copy() -> None:
    found = loaded(body(4, nn.Softmax(1)), (ROWS, CLASSES))
    assert found.outputs == "probabilities"
    assert any("answers with probabilities" in note for note in found.notes)
    example = torch.from_numpy(ROWS[:1])
    groups, _ = find_groups(found.model, example)
    cut = remove_channels(found.model, {g.name: g for g in groups}, {groups[0].name: [0]}, example)
    assert outputs_of(cut) == "probabilities"
    assert loaded(body(4, nn.LogSoftmax(1)), (ROWS, CLASSES)).outputs == "logits"
