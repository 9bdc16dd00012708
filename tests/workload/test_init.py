"""What ``edgeprune init`` finds in a folder, asks and writes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import ModelError, SpecError
from edgeprune.records.base import read_yaml
from edgeprune.records.workload import Workload
from edgeprune.workload import discover
from edgeprune.workload.init import initialise, look_at

NET = """
import sys
sys.setting_by_test = "code was run"
from torch import nn

class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Block()

class Sized(nn.Module):
    def __init__(self, width):
        super().__init__()

class Plain:
    pass

class _Hidden(nn.Module):
    pass

def helper(x):
    return x

def with_width(width) -> nn.Module:
    return Net()

def build() -> nn.Module:
    return Net()

def other(width=3):
    return nn.Sequential()
"""


def npz(path: Path, x: np.ndarray) -> None:
    np.savez(path, x=x, y=np.arange(len(x)) % 2)


def grey(n: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (n, 8, 6), dtype=np.uint8)


def start(folder: Path, **changes: object) -> Path:
    options = {"model": None, "weights": None, "data": None, "target": "rpi4", "ask": None}
    return initialise(folder, **{**options, **changes})


def save_images(folder: Path, pixels: np.ndarray, n: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "old.pt").write_bytes(b"")
    (tmp_path / "best.safetensors").write_bytes(b"")
    npz(tmp_path / "samples.npz", grey())
    return tmp_path


def test_a_project_is_described_without_running_its_model_code(project: Path) -> None:
    path = start(project)
    record = read_yaml(Workload, path)
    assert path == project / "edgeprune.yaml"
    assert record.model == "net.py:build"
    assert record.weights == "best.safetensors"
    assert record.data == "samples.npz"
    assert record.target == "rpi4"
    assert (record.preprocess.kind, record.preprocess.color) == ("image", "grey")
    assert record.preprocess.size == (8, 6)
    assert not hasattr(sys, "setting_by_test")


def test_mean_and_std_are_those_of_the_training_images(project: Path) -> None:
    record = read_yaml(Workload, start(project))
    scaled = grey() / 255
    assert record.preprocess.mean == pytest.approx((scaled.mean(),), abs=5e-5)
    assert record.preprocess.std == pytest.approx((scaled.std(),), abs=5e-5)
    assert "CHECK" in (project / "edgeprune.yaml").read_text()


def test_only_what_can_be_called_without_arguments_is_proposed(project: Path) -> None:
    found = discover.look(project)
    assert found.models == ("net.py:build", "net.py:other", "net.py:Net")


def test_an_existing_file_is_not_overwritten(project: Path) -> None:
    (project / "edgeprune.yaml").write_text("mine")
    with pytest.raises(SpecError, match="not overwritten"):
        start(project)
    assert (project / "edgeprune.yaml").read_text() == "mine"


def test_answers_and_flags_win_over_proposals(project: Path) -> None:
    npz(project / "more.npz", np.zeros((5, 4, 4, 3), np.uint8))
    asked: list[tuple[str, str]] = []
    answers = {"model": "net.py:Net", "weights": "", "mean": "0.5, 0.5, 0.5", "std": "[0.25]"}

    def ask(question: str, default: str) -> str:
        asked.append((question, default))
        return answers[question.split()[0]]

    record = read_yaml(Workload, start(project, data="more.npz", ask=ask))
    assert [question.split()[0] for question, _ in asked] == ["model", "weights", "mean", "std"]
    assert asked[0][1] == "net.py:build"
    assert "net.py:other" in asked[0][0]
    assert record.model == "net.py:Net"
    assert record.weights is None
    assert record.data == "more.npz"
    assert record.preprocess.mean == (0.5, 0.5, 0.5)
    assert record.preprocess.std == (0.25,)


def test_taking_every_proposal_by_hand_is_the_same_as_not_being_asked(project: Path) -> None:
    silent = start(project).read_text()
    (project / "edgeprune.yaml").unlink()
    assert start(project, ask=lambda question, default: default).read_text() == silent


def test_a_folder_without_a_model_or_data_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"model factory.*MODEL"):
        start(tmp_path)
    with pytest.raises(SpecError, match=r"looks like the data.*--data"):
        start(tmp_path, model="net.py:build")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SpecError, match="there is no folder"):
        start(tmp_path / "gone")


def test_invalid_answers_leave_no_file(project: Path) -> None:
    with pytest.raises(SpecError, match=r"model in .*edgeprune\.yaml") as caught:
        start(project, model="net.py")
    assert ".part" not in str(caught.value)
    with pytest.raises(SpecError, match="mean must be numbers"):
        start(project, ask=lambda question, default: "grey" if "mean" in question else default)
    assert not [p for p in project.iterdir() if "edgeprune.yaml" in p.name]


def test_class_folders_give_labels_and_colour(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    pixels = np.zeros((10, 8, 3), np.uint8)
    pixels[..., 1] = 255
    for name in ("yes", "no", "1e3"):
        save_images(tmp_path / "photos" / "train" / name, pixels)
    record = read_yaml(Workload, start(tmp_path))
    assert record.data == "photos"
    assert record.labels == ("1e3", "no", "yes")
    assert record.preprocess.color == "rgb"
    assert record.preprocess.mean == (0.0, 1.0, 0.0)
    assert record.preprocess.std == (0.001, 0.001, 0.001)


def test_grey_image_files_are_recognised(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_images(tmp_path / "set" / name, grey(1)[0])
    assert look_at("set", tmp_path).color == "grey"
    assert discover.look(tmp_path).data == ("set",)


def test_images_of_several_sizes_raise_the_question_of_the_input_size(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    save_images(tmp_path / "set" / "a", grey(1)[0], n=4)
    save_images(tmp_path / "set" / "b", np.zeros((400, 300), np.uint8), n=2)
    text = start(tmp_path).read_text()
    assert "size: [8, 6]  # height, width; the images have 2 sizes: CHECK" in text
    (tmp_path / "edgeprune.yaml").unlink()

    def ask(question: str, default: str) -> str:
        return "64x48" if "input size" in question else default

    record = read_yaml(Workload, start(tmp_path, ask=ask))
    assert record.preprocess.size == (64, 48)
    (tmp_path / "edgeprune.yaml").unlink()
    with pytest.raises(SpecError, match="224x224"):
        start(tmp_path, ask=lambda q, d: "big" if "input size" in q else d)


def test_a_single_folder_of_pictures_is_not_taken_for_data(tmp_path: Path) -> None:
    save_images(tmp_path / "docs" / "figures", grey(1)[0])
    assert discover.look(tmp_path).data == ()


def test_a_data_factory_is_found_and_looked_at(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\n"
        "def read(path): ...\n"
        "def load(): return {'train': np.ones((6, 3), np.float32)}\n"
    )
    record = read_yaml(Workload, start(tmp_path))
    assert record.data == "my_data.py:load"
    assert record.preprocess.kind == "none"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("T.Normalize((0.5,), (0.25,))", ((0.5,), (0.25,))),
        ("f(Normalize(mean=[0.1, 0.2, 0.3], std=[1, 1, 1]))", ((0.1, 0.2, 0.3), (1, 1, 1))),
        ("MEAN, STD = 0.2860, 0.3530", ((0.286,), (0.353,))),
        ("mean = [0.1]\nstd = [0.2]", ((0.1,), (0.2,))),
        ("Normalize(mean, std)", None),
        ("mean = compute()\nstd = 2", None),
    ],
)
def test_normalisation_is_read_from_code_when_it_is_literal(
    tmp_path: Path, source: str, expected: object
) -> None:
    (tmp_path / "train.py").write_text(source)
    assert discover.look(tmp_path).normalise == expected


def test_stated_normalisation_is_written_unless_it_cannot_be_of_scaled_values(
    project: Path,
) -> None:
    (project / "train.py").write_text("MEAN, STD = 0.28604, 0.00002")
    record = read_yaml(Workload, start(project))
    assert record.preprocess.mean == (0.28604,)
    assert record.preprocess.std == (0.00002,)
    (project / "edgeprune.yaml").unlink()
    (project / "train.py").write_text("MEAN, STD = 123.7, 58.4")
    record = read_yaml(Workload, start(project))
    assert record.preprocess.mean == pytest.approx((grey().mean() / 255,), abs=5e-5)


def test_files_that_are_not_python_are_passed_over(project: Path) -> None:
    (project / "broken.py").write_text("def (:\n")
    (project / "binary.py").write_bytes(b"\x00\xff\xfe")
    (project / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    hidden = project / ".venv"
    hidden.mkdir()
    (hidden / "net.py").write_text(NET)
    assert all(text.startswith("net.py:") for text in discover.look(project).models)


def test_names_with_special_characters_survive_the_file(project: Path) -> None:
    (project / "best.safetensors").rename(project / 'a "b": #c é.safetensors')
    assert read_yaml(Workload, start(project)).weights == 'a "b": #c é.safetensors'


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((5, 3, 8, 8), np.uint8), "channels come last"),
        (np.zeros((0, 8, 8), np.uint8), "training samples"),
        (np.zeros(5), "training samples"),
    ],
)
def test_data_without_usable_samples_is_refused(tmp_path: Path, x: np.ndarray, words: str) -> None:
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(ModelError, match=words):
        look_at("d.npz", tmp_path)
    with pytest.raises(SpecError, match="must be a folder of images"):
        look_at("gone.npz", tmp_path)


def test_at_most_2000_samples_are_looked_at(tmp_path: Path) -> None:
    x = np.zeros((4001, 2, 2), np.uint8)
    x[1::2] = 255  # every second one is looked at, and these are not
    np.savez(tmp_path / "d.npz", x=x)
    assert look_at("d.npz", tmp_path).mean[0] < 0.5
    np.savez(tmp_path / "d.npz", x=x[:2000])
    assert look_at("d.npz", tmp_path).mean == (0.5,)


def test_data_without_labels_gets_a_task_that_a_person_is_asked_about(project) -> None:
    np.savez(project / "samples.npz", x=grey())
    asked: list[str] = []

    def ask(question: str, default: str) -> str:
        asked.append(question)
        return default

    path = start(project, data="samples.npz", ask=ask)
    assert read_yaml(Workload, path).task == "classify"
    assert sum("task" in question for question in asked) == 1
    path.unlink()
    with pytest.raises(SpecError, match="the task must be classify, but got 'detect'"):
        start(project, data="samples.npz", ask=lambda q, d: "detect" if "task" in q else d)
    assert not path.exists()
    assert "CHECK" in start(project, data="samples.npz").read_text().split("task: classify")[1]


def test_data_with_labels_needs_no_task(project) -> None:
    path = start(project, data="samples.npz", ask=lambda question, default: default)
    assert read_yaml(Workload, path).task is None
