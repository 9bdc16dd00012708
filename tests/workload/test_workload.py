"""Intake as a whole: factories, live objects, and the model checked against its data."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from repo import REPO
from safetensors.torch import save_file
from torch import nn

from edgeprune.errors import ModelError, SpecError, UnknownName
from edgeprune.records.base import read_yaml
from edgeprune.records.workload import Preprocess, Workload
from edgeprune.workload.factories import call_factory, is_factory
from edgeprune.workload.load import check_accepts, from_objects, load_workload

NET = """
import torch
from torch import nn
from blocks import block

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(3, 6), block(6, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))

def build():
    print("building")
    return Net()

def number():
    return 7

def broken():
    raise RuntimeError("no such width\\nsecond line")

def stops():
    raise SystemExit(3)
"""
BLOCKS = """
from torch import nn

def block(n_in, n_out):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3), nn.BatchNorm2d(n_out), nn.ReLU())
"""
DATA = """
import numpy as np

def load():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 10, 12, 3), dtype=np.uint8)
    return {"train": (x, rng.integers(0, 4, 40)), "test": (x[:8], rng.integers(0, 4, 8))}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    (tmp_path / "data.py").write_text(DATA)
    return tmp_path


def workload(**changes: object) -> Workload:
    return Workload(**{"model": "net.py:build", "data": "data.py:load", **changes})


def small_net(n_classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, n_classes),
    )


def images(n: int = 20, *, n_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return x, np.arange(n) % n_classes


def test_a_project_folder_becomes_a_model_with_its_data(project: Path) -> None:
    loaded = load_workload(workload(), project)
    assert loaded.input_shape == (3, 10, 12)
    assert loaded.input_shapes == ((3, 10, 12),)
    assert loaded.n_classes == 4
    assert loaded.labels is None
    assert loaded.preprocess.size == (10, 12)
    assert not loaded.model.training
    assert [len(loaded.dataset.train), len(loaded.dataset.selection)] == [24, 8]
    assert any("no weights file" in note for note in loaded.notes)


def test_loading_twice_gives_the_same_digests(project: Path) -> None:
    first, second = (load_workload(workload(), project) for _ in range(2))
    assert first.model_digest == second.model_digest
    assert first.dataset.digest == second.dataset.digest


def test_the_model_digest_follows_the_code_and_the_weights(project: Path) -> None:
    first = load_workload(workload(), project)
    assert load_workload(workload(seed=1), project).model_digest != first.model_digest
    (project / "net.py").write_text(NET + "\n# changed\n")
    assert load_workload(workload(), project).model_digest != first.model_digest


def test_what_a_factory_prints_stays_off_stdout(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_workload(workload(), project)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "building" in captured.err


def test_user_code_leaves_the_import_path_and_the_random_state_alone(project: Path) -> None:
    path, state = list(sys.path), torch.get_rng_state()
    load_workload(workload(), project)
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)


def test_two_projects_with_modules_of_one_name_do_not_mix(project: Path, tmp_path: Path) -> None:
    load_workload(workload(), project)
    other = tmp_path / "other"
    other.mkdir()
    (other / "net.py").write_text(NET)
    (other / "blocks.py").write_text(BLOCKS.replace("nn.ReLU()", "nn.Hardswish()"))
    (other / "data.py").write_text(DATA)
    names = {type(m).__name__ for m in load_workload(workload(), other).model.modules()}
    assert "Hardswish" in names
    assert "ReLU" not in names


def test_a_dotted_module_is_found_beside_the_yaml(project: Path) -> None:
    (project / "zoo_of_test").mkdir()
    (project / "zoo_of_test" / "__init__.py").write_text("")
    (project / "zoo_of_test" / "small.py").write_text(NET)
    loaded = load_workload(workload(model="zoo_of_test.small:build"), project)
    assert loaded.n_classes == 4


def test_a_class_is_a_factory_too(project: Path) -> None:
    assert type(load_workload(workload(model="net.py:Net"), project).model).__name__ == "Net"


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("nett.py:build", SpecError, ["model", "nett.py", "no such file"]),
        ("net.py:bild", UnknownName, ["'bild'", "did you mean 'build'"]),
        ("no_such_module_here:build", SpecError, ["no_such_module_here", "path/file.py:factory"]),
        ("net.py:number", ModelError, ["net.py:number", "torch.nn.Module", "int"]),
        ("net.py:broken", ModelError, ["net.py line 23", "RuntimeError: no such width"]),
        ("net.py:stops", ModelError, ["SystemExit: 3"]),
        ("net txt:build", SpecError, ["must look like path/file.py:factory"]),
    ],
)
def test_a_wrong_model_factory_is_one_line_that_says_what(
    project: Path, model: str, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        load_workload(workload(model=model), project)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_syntax_error_and_a_missing_import_name_the_line(project: Path) -> None:
    (project / "bad.py").write_text("import torch\nx = (\n")
    with pytest.raises(ModelError, match=r"bad\.py line 2: SyntaxError"):
        load_workload(workload(model="bad.py:build"), project)
    (project / "bad.py").write_text("import torch\n\nimport not_installed_anywhere\n")
    with pytest.raises(ModelError, match=r"bad\.py line 3: ModuleNotFoundError"):
        load_workload(workload(model="bad.py:build"), project)


def test_a_broken_import_inside_a_dotted_module_is_not_taken_for_a_missing_module(
    project: Path,
) -> None:
    (project / "half_of_test.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModelError, match="not_installed_anywhere"):
        load_workload(workload(model="half_of_test:build"), project)


def test_a_file_that_failed_can_be_mended_and_loaded(project: Path) -> None:
    (project / "net.py").write_text("raise ValueError('first try')")
    with pytest.raises(ModelError, match="first try"):
        load_workload(workload(), project)
    (project / "net.py").write_text(NET)
    assert load_workload(workload(), project).n_classes == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b.py:f", True),
        ("pkg.mod:f", True),
        ("data", False),
        ("a/b.npz", False),
        ("a b:f", False),
    ],
)
def test_factories_are_told_from_paths(text: str, expected: bool) -> None:
    assert is_factory(text) is expected


def test_a_factory_gives_its_source_file(project: Path) -> None:
    made = call_factory("net.py:number", project, key="model")
    assert made.value == 7
    assert made.source == project / "net.py"


def test_weights_are_loaded_from_the_file(project: Path) -> None:
    state = load_workload(workload(seed=5), project).model.state_dict()
    save_file(state, project / "net.safetensors")
    loaded = load_workload(workload(weights="net.safetensors"), project)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    with pytest.raises(SpecError, match=r"weights names gone\.pt"):
        load_workload(workload(weights="gone.pt"), project)


def test_live_objects_make_the_same_workload_and_are_not_changed() -> None:
    model = small_net().train().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = from_objects(model, images(), labels=["a", "b", "c", "d"])
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert loaded.labels == ("a", "b", "c", "d")
    assert {t.dtype for t in loaded.model.parameters()} == {torch.float32}
    assert any("float64" in note for note in loaded.notes)
    assert loaded.workload.model == "python:Sequential"


def test_settings_from_python_keep_their_target_and_budget() -> None:
    settings = workload(target="rpi4", latency="40%", seed=9, labels=("x", "y", "z", "w"))
    loaded = from_objects(small_net(), images(), settings=settings)
    assert (loaded.workload.target, loaded.workload.latency, loaded.workload.seed) == (
        "rpi4",
        "40%",
        9,
    )
    assert loaded.labels == ("x", "y", "z", "w")


def test_live_data_may_be_a_path(tmp_path: Path) -> None:
    x, y = images()
    np.savez(tmp_path / "set.npz", x=x, y=y)
    loaded = from_objects(small_net(), tmp_path / "set.npz")
    assert loaded.workload.data == str(tmp_path / "set.npz")
    assert len(loaded.dataset.train) == 16


def test_wrappers_of_training_are_taken_off() -> None:
    loaded = from_objects(nn.DataParallel(small_net()), images())
    assert isinstance(loaded.model, nn.Sequential)


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(small_net(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match="TorchScript"):
        from_objects(scripted, images())


def test_lazy_layers_without_values_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ModelError, match=r"'1\.weight' has no values yet"):
        from_objects(model, images())


def test_the_layer_that_refuses_the_data_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Flatten())
    with pytest.raises(ModelError) as caught:
        from_objects(model, images())
    assert "layer '0.0' (Conv2d) failed on input [2, 3, 8, 8]" in str(caught.value)
    assert "[N, 3, 8, 8]" in str(caught.value)


def test_a_failure_between_layers_names_the_module_around_it() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + torch.zeros(5, 5)

    with pytest.raises(ModelError, match=r"Between\.forward failed on input \[2, 3, 8, 8\]"):
        from_objects(nn.Sequential(Between()).__getitem__(0), images())


class Answer(nn.Module):
    """Gives whatever a function makes of its input."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> object:
        return self.answer(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: (x.flatten(1), x), "returned tuple"),
        (lambda x: x, r"returned \[2, 3, 4, 4\]"),
        (lambda x: x.flatten(1)[:1], r"returned \[1, 48\]"),
        (lambda x: x.flatten(1)[:, :1], r"K >= 2.*\[2, 1\]"),
        (lambda x: x.flatten(1).argsort(1), "floating-point logits.*int64"),
        (lambda x: x.flatten(1) / 0, "NaN or Inf"),
    ],
)
def test_outputs_that_are_not_finite_logits_are_refused(answer: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        check_accepts(Answer(answer), np.zeros((2, 3, 4, 4), np.float32))


def test_checking_leaves_no_hooks_behind() -> None:
    model = small_net().eval()
    assert check_accepts(model, np.zeros((2, 3, 8, 8), np.float32)) == 4
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_outputs_must_match_the_labels() -> None:
    with pytest.raises(ModelError, match="5 outputs for 4 labels"):
        from_objects(small_net(5), images(), labels=["a", "b", "c", "d"])
    with pytest.raises(ModelError, match="below the model's 3 outputs, but train has 3"):
        from_objects(small_net(3), images())


def test_one_sample_is_enough_to_try_the_model() -> None:
    x, y = images(3)
    assert len(from_objects(small_net(), (x, y)).dataset.train) == 1


def test_the_shipped_example_is_a_valid_workload() -> None:
    folder = REPO / "examples" / "fashion_mnist"
    record = read_yaml(Workload, folder / "edgeprune.yaml")
    net = call_factory("net.py:build", folder, key="model").value
    constants = sys.modules[type(net).__module__]
    assert record.labels == constants.CLASSES
    assert record.preprocess == Preprocess(
        size=(28, 28), color="grey", mean=(constants.MEAN,), std=(constants.STD,)
    )
    assert (record.target, record.latency, record.max_drop) == ("rpi4", "50%", "1%")
    assert record.recovery.epochs == 3
    assert (folder / str(record.weights)).is_file()
