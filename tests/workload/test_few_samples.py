"""Few samples: used where that is sensible, else refused with the counts before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinynet
from int8_fixture import Said

from edgeprune.bundle.manifest import MIN_GOLDEN
from edgeprune.compress.repair.compensate import MIN_SAMPLES
from edgeprune.errors import DeviceError, ModelError
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.api import plan_loaded, resolve
from edgeprune.pipeline.options import Options
from edgeprune.progress import Silent
from edgeprune.records.workload import Preprocess
from edgeprune.workload.dataset import Split
from edgeprune.workload.load import from_objects
from edgeprune.workload.sample_counts import FEWEST, coarse_note, require_enough, share_to_draw
from edgeprune.workload.splits import complete


def dataset(**counts: int):
    return complete({n: Split(np.zeros((c, 4)), None) for n, c in counts.items()}, where="data")[0]


def test_the_fewest_samples_are_those_that_the_stages_ask_for():
    assert FEWEST["train"] >= MIN_SAMPLES
    assert FEWEST["development"] >= MIN_GOLDEN
    assert FEWEST["selection"] >= 4  # two halves, each with statistics of a batch norm


@pytest.mark.parametrize("count", [26, 27, 40, 79])
def test_as_few_as_26_samples_are_drawn_into_splits_that_are_enough(count):
    require_enough(dataset(train=count))
    assert (share_to_draw(count, 2), share_to_draw(800, 2)) == (8, 80)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train": 19}, "17 for train, 1 for selection and 1 for development"),
        ({"train": 25}, "21 for train, 2 for selection and 2 for development"),
        ({"train": 90, "val": 15}, "90 for train, 8 for selection and 7 for development"),
        ({"train": 90, "selection": 1, "development": 90}, "1 for selection"),
        ({"train": 9, "selection": 90, "development": 90}, "9 for train"),
    ],
)
def test_too_few_samples_are_refused_with_all_counts(counts, words):
    with pytest.raises(ModelError, match="at least 10 for train, 8 for selection and 8") as caught:
        require_enough(dataset(**counts))
    assert words in caught.value.message


def test_too_few_samples_are_refused_before_anything_is_opened(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = tinynet.images(19, seed=0)
    loaded = from_objects(tinynet.build(), (x, y), preprocess=Preprocess(color="grey"))
    with pytest.raises(ModelError, match="but are 17 for train"):
        plan_loaded(loaded, Options(target="this-machine"), Silent())
    with pytest.raises(ModelError, match="but are 17 for train"):
        tinynet_deploy(x, y)
    assert list(tmp_path.iterdir()) == []


def tinynet_deploy(x: np.ndarray, y: np.ndarray) -> None:
    import edgeprune

    grey = Preprocess(color="grey")
    edgeprune.deploy(tinynet.build(), (x, y), target="this-machine", preprocess=grey)


def test_a_gate_that_one_sample_decides_is_pointed_out():
    assert "one of 26 development samples is 3.85 points, more than the 1.00%" in coarse_note(
        26, 0.01
    )
    assert "100 and more" in coarse_note(26, 0.01)
    assert coarse_note(100, 0.01) == ""
    assert coarse_note(8, 0.0) == ""  # any change is one too many


@pytest.mark.slow
def test_26_samples_go_all_the_way_to_a_bundle(tmp_path: Path):
    home = tinynet.project(tmp_path, max_drop="5%", recovery={"epochs": 1, "batch_size": 64})
    x, y = tinynet.arrays()["train"]
    np.savez(home / "data.npz", x=x[:26], y=y[:26])
    done = tinynet.edgeprune(
        home, "deploy", "--target", "this-machine", "--latency", "80%", "--run", "run"
    )
    assert done.returncode in (0, 6), done.stderr
    assert (home / "run" / "bundle" / "manifest.json").is_file()
    assert "note: one of 8 development samples is 12.5 points" in done.stderr


def test_what_is_known_of_the_data_is_said_before_a_board_is_asked_for(monkeypatch, tmp_path):
    said = Said()
    loaded = from_objects(
        tinynet.build(), tinynet.images(64, 0), preprocess=Preprocess(color="grey")
    )
    job = resolve(loaded, Options(target="rpi4", latency="90%"))

    def asked(*_, **__):
        raise DeviceError("no board")

    monkeypatch.setattr(pipeline, "_boards", asked)
    with pytest.raises(DeviceError), pipeline.opened(job, said):
        pass
    assert loaded.notes
    assert [f"note: {note}" for note in loaded.notes] == said.lines[: len(loaded.notes)]
