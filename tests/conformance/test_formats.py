"""Every format that has a module: its facts, and one tiny net through export, INT8, description, a board, and other widths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune import formats
from edgeprune.devices.board import Board, open_board
from edgeprune.errors import EdgepruneError, FormatError, UnknownName
from edgeprune.formats import Format
from edgeprune.formats.shared.model_bytes import files_of, model_bytes
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes
from edgeprune.records.formats import stand_in
from edgeprune.workload.dataset import to_layout

SHAPE = (3, 12, 12)
FULL, CHANGED, OTHER = {"a": 16, "b": 24}, {"a": 11, "b": 18}, {"a": 5, "b": 9}


class Net(nn.Module):
    """A strided convolution, a depthwise one, a joined branch, and a linear classifier."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, a, 3, 2, 1)
        self.depthwise = nn.Conv2d(a, a, 3, 1, 1, groups=a)
        self.second = nn.Conv2d(a, b, 1)
        self.classifier = nn.Linear(a + b, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y = torch.relu(self.second(torch.relu(self.depthwise(x))))
        return self.classifier(torch.cat([x, y], 1).mean((2, 3)))


class NoFormat(nn.Module):
    """What no format can express: a result that depends on the values through Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


@dataclass(frozen=True)
class Made:
    """One format's files of the net at full and changed widths."""

    form: Format
    model: nn.Module
    paths: dict[tuple[str, str], Path]


def make(widths: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    return Net(**widths).eval()


def samples(n: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((n, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module", params=formats.names())
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    form = formats.load(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    paths = {}
    for name, widths in (("full", FULL), ("changed", CHANGED)):
        for precision in ("fp32", "int8"):
            paths[name, precision] = folder / f"{name}-{precision}{form.info.suffix}"
        form.export(make(widths), samples(1), paths[name, "fp32"])
        int8 = paths[name, "int8"]
        form.quantize(paths[name, "fp32"], samples(16), int8, model=make(widths))
    return Made(form, make(FULL), paths)


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as opened:
        yield opened


def needs_a_runtime_here(made: Made) -> None:
    if made.form.info.system and sys.platform != "darwin":
        pytest.skip(f"{made.form.info.name} runs on a {made.form.info.system} only")


def answers(made: Made, board: Board, content: bytes, x: np.ndarray) -> np.ndarray:
    runtime = here(made.form)
    board.load("net", content, runtime=runtime, threads=1)
    try:
        return board.infer("net", to_layout(x, made.form.info.layout))
    finally:
        board.unload(["net"])


@pytest.mark.parametrize("name", formats.names())
def test_a_format_says_what_it_is(name: str) -> None:
    info = formats.load(name).info
    assert info.name == name
    assert info.suffix.startswith(".")
    assert info.runtimes
    assert info.extra
    assert info.layout in ("NHWC", "NCHW")


@pytest.mark.parametrize("name", formats.names())
def test_a_twin_is_a_format_whose_own_files_are_cut(name: str) -> None:
    twin = formats.load(name).info.twin
    assert twin != name
    if twin:
        assert not formats.load(twin).info.twin


def here(form: formats.Format) -> str:
    """The runtime that runs a format's files on this machine."""
    name = next(iter(form.info.runtimes))
    return stand_in(name) or name


def test_suffixes_tell_the_formats_apart() -> None:
    suffixes = {name: formats.load(name).info.suffix for name in formats.names()}
    # It ships ONNX, and the board builds its engine.
    assert suffixes.pop("tensorrt") == suffixes["onnx"]
    assert len(set(suffixes.values())) == len(suffixes)


def test_a_format_without_a_module_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName, match="did you mean 'tflite'"):
        formats.load("tflit")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_record_of_a_file_is_complete(made: Made, precision: str) -> None:
    path = made.paths["full", precision]
    record = made.form.describe(path)
    stored = "fp16" if (made.form.info.name, precision) == ("coreml", "fp32") else precision
    assert (record.format, record.precision) == (made.form.info.name, stored)
    assert record.path == path.name
    assert record.sha256 == sha256_bytes(model_bytes(path))
    files = files_of(path) if path.is_dir() else {path.name: path.read_bytes()}
    assert record.size_bytes == sum(map(len, files.values()))
    assert record.inputs[0].layout == made.form.info.layout
    assert np.prod(record.inputs[0].shape) == np.prod(SHAPE)
    assert record.outputs[0].shape == (1, 5)
    assert (record.op_counts.get("weights:int8", 0) > 0) == (precision == "int8")


def test_float_files_answer_as_torch_does(made: Made, board: Board) -> None:
    needs_a_runtime_here(made)
    x = samples(6)
    with torch.no_grad():
        expected = made.model(torch.from_numpy(x)).numpy()
    got = answers(made, board, made.paths["full", "fp32"].read_bytes(), x)
    assert np.abs(got - expected).max() < 1e-4


def test_int8_files_answer_within_8_percent(made: Made, board: Board) -> None:
    needs_a_runtime_here(made)
    x = samples(6)
    expected = answers(made, board, made.paths["full", "fp32"].read_bytes(), x)
    got = answers(made, board, made.paths["full", "int8"].read_bytes(), x)
    assert 0 < np.abs(got - expected).max() < 0.08 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_files_take_other_widths_whole_and_kernel_by_kernel(
    made: Made, board: Board, precision: str
) -> None:
    paths = made.paths["full", precision], made.paths["changed", precision]
    if made.form.info.twin:
        with pytest.raises(FormatError, match=f"its twin, {made.form.info.twin}"):
            made.form.resizable(*paths, FULL, CHANGED, made.model)
        return
    resizable = made.form.resizable(*paths, FULL, CHANGED, made.model)
    assert answers(made, board, resizable.resized(OTHER), samples(1)).shape == (1, 5)
    layers = {k.layer: set(k.variables) for k in resizable.kernels}
    expected = {"first": {"a"}, "depthwise": {"a"}, "second": {"a", "b"}, "classifier": {"a", "b"}}
    assert expected.items() <= layers.items()
    contents = {str(k.index): resizable.kernel(k.index, OTHER) for k in resizable.kernels}
    loaded = board.load_many(contents, runtime=here(made.form), threads=1)
    board.unload(contents)
    assert {key: reply for key, reply in loaded.items() if isinstance(reply, str)} == {}


@pytest.mark.parametrize("name", formats.names())
def test_a_failed_export_leaves_the_old_file_and_no_part_of_a_new_one(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / f"net{formats.load(name).info.suffix}"
    path.write_bytes(b"old")
    with pytest.raises(EdgepruneError):
        formats.load(name).export(NoFormat().eval(), samples(1), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_a_failed_quantisation_leaves_the_old_file_and_no_part_of_a_new_one(
    made: Made, tmp_path: Path
) -> None:
    path = tmp_path / f"net{made.form.info.suffix}"
    path.write_bytes(b"old")
    with pytest.raises(EdgepruneError):
        made.form.quantize(made.paths["full", "fp32"], samples(2) * np.nan, path, model=made.model)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"
