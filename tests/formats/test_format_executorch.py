"""ExecuTorch programs: what runs in XNNPACK, what is INT8, what is refused, and that the answers are torch's."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("executorch")

from edgeprune import formats
from edgeprune.devices.board import Board, open_board
from edgeprune.errors import DeviceError, FormatError, IntegrityError, MissingTool, ModelError
from edgeprune.formats import golden_file
from edgeprune.formats.executorch.format import missing_operators
from edgeprune.formats.executorch.program import read_program
from edgeprune.formats.inside.weights import eight_bit_ratio, weight_elements
from edgeprune.pipeline.files import export
from edgeprune.records.device import Device

SHAPE = (3, 16, 16)
STEPS = 3  # of the output's range, as the tolerance of a bundle
FORM = formats.load("executorch")


class Net(nn.Module):
    """Convolution with batch norm, a residual sum, a mean without kept dimensions, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.inner = nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + torch.relu(self.inner(x))).mean((2, 3)))


class Outside(nn.Module):
    """A net whose middle XNNPACK has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.middle = nn.Sequential(nn.Softplus())
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.first(x)).mean((2, 3)))


class Dynamic(nn.Module):
    """The shape of the result depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten()
        return y[y > 0] * 2 if y.sum() > 0 else y


class Recurrent(nn.Module):
    """Nearly all of its work is a layer that the quantiser leaves in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1)
        self.deep = nn.Conv3d(1, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)[:, None].repeat(1, 1, 2, 1, 1)
        return self.deep(y).mean((2, 3, 4))


def net(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def samples(n: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((n, *SHAPE)).astype(np.float32)


@dataclass(frozen=True)
class Made:
    """Both files of the net, with the records that conversion gave."""

    folder: Path
    fp32: object
    int8: object

    def path(self, precision: str) -> Path:
        return self.folder / f"{precision}.pte"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("pte")
    fp32 = FORM.export(net(), samples(1), folder / "fp32.pte")
    int8 = FORM.quantize(folder / "fp32.pte", samples(16), folder / "int8.pte", model=net())
    return Made(folder, fp32, int8)


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with open_board("here", Device(transport="local", targets=(), stand_in=True)) as opened:
        yield opened


def answers(board: Board, path: Path, x: np.ndarray) -> np.ndarray:
    board.load("net", path.read_bytes(), runtime="executorch", threads=1)
    try:
        return board.infer("net", x)
    finally:
        board.unload(["net"])


def expected(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net()(torch.from_numpy(x)).numpy()


def test_all_of_an_ordinary_net_runs_in_xnnpack_and_the_record_says_so(made):
    for artifact in (made.fp32, made.int8):
        counts = artifact.op_counts
        assert counts["macs"] == counts["macs:xnnpack"] == 8 * 8 * 16 * 27 + 8 * 8 * 16 * 144 + 80
        assert artifact.operators == ()
        share, time = artifact.notes[0].split(" (")
        assert share.endswith("operations and 100% of the multiply-accumulates")
        assert time == (
            "counted; its share of the time needs ExecuTorch's profiler on the phone, and was not run)"
        )
        assert not any("checked against" in note for note in artifact.notes)
        assert not any("warning" in note for note in artifact.notes)


def test_an_int8_file_computes_in_8_bits(made):
    assert made.fp32.op_counts["macs:int8"] == 0
    assert made.int8.op_counts["macs:int8"] == made.int8.op_counts["macs"]
    assert made.int8.op_counts["int8:Conv2d"] == 2
    assert made.int8.op_counts["int8:FullyConnected"] == 1
    program = read_program(made.path("int8").read_bytes())
    assert {dtype for dtype, shape in program.weights if len(shape) >= 2} == {"int8"}
    ratios = {
        p: eight_bit_ratio(weight_elements("executorch", made.path(p).read_bytes()) or {})
        for p in ("fp32", "int8")
    }
    assert ratios == {"fp32": 0.0, "int8": 1.0}


def test_what_describes_a_file_is_what_the_runtime_loads(made, board):
    for precision in ("fp32", "int8"):
        record = FORM.describe(made.path(precision))
        content = made.path(precision).read_bytes()
        loaded = board.load("it", content, runtime="executorch", threads=1)
        board.unload(["it"])
        for mine, theirs in ((record.inputs, loaded.inputs), (record.outputs, loaded.outputs)):
            assert [(t.name, t.shape, t.dtype) for t in mine] == [
                (t.name, t.shape, t.dtype) for t in theirs
            ]


def test_fp32_answers_are_torchs_and_int8_answers_are_within_three_steps(made, board):
    x = samples(16)
    wanted = expected(x)
    assert np.abs(answers(board, made.path("fp32"), x) - wanted).max() < 1e-5
    error = np.abs(answers(board, made.path("int8"), x) - wanted).max()
    assert 0 < error <= STEPS * np.ptp(wanted) / 255


def test_the_same_model_gives_the_same_bytes(made, tmp_path):
    FORM.export(net(), samples(1), tmp_path / "fp32.pte")
    FORM.quantize(tmp_path / "fp32.pte", samples(16), tmp_path / "int8.pte", model=net())
    for name in ("fp32.pte", "int8.pte"):
        assert (tmp_path / name).read_bytes() == (made.folder / name).read_bytes()


def test_the_model_is_not_changed(tmp_path):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    FORM.export(model, samples(1), tmp_path / "fp32.pte")
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not model.training


def test_operators_outside_of_xnnpack_are_named_with_their_layer(tmp_path):
    artifact = FORM.export(net(Outside), samples(1), tmp_path / "it.pte")
    assert artifact.operators
    said = " ".join(artifact.notes)
    assert "outside of XNNPACK: " in said
    assert "of middle.0" in said
    version = importlib.metadata.version("executorch")
    assert f"checked against those of executorch {version} on this machine" in said
    assert artifact.operators == read_program((tmp_path / "it.pte").read_bytes()).operators


def test_a_runner_without_an_operator_is_told_by_name():
    needed = ("aten::mul.out", "aten::softplus.out")
    assert missing_operators(needed, {"aten::mul.out"}) == ("aten::softplus.out",)
    assert missing_operators(needed, needed) == ()


def test_a_target_whose_runner_lacks_an_operator_refuses_the_file(tmp_path):
    from types import SimpleNamespace

    artifact = FORM.export(net(Outside), samples(1), tmp_path / "it.pte")

    def context(operators: tuple[str, ...] | None) -> SimpleNamespace:
        target = SimpleNamespace(name="my-phone", operators=operators)
        return SimpleNamespace(job=SimpleNamespace(target=target))

    export._check_operators(context(None), artifact)
    export._check_operators(context(artifact.operators), artifact)
    with pytest.raises(FormatError, match="my-phone lacks: aten::") as caught:
        export._check_operators(context(("aten::other.out",)), artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Dynamic])
def test_a_model_that_cannot_be_traced_is_refused_with_the_line(kind, tmp_path):
    with pytest.raises(FormatError, match=r"could not export .* at: .*y\.sum") as caught:
        FORM.export(net(kind), samples(1), tmp_path / "it.pte")
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_stays_in_float_is_not_called_int8(tmp_path):
    FORM.export(net(Recurrent), samples(1), tmp_path / "fp32.pte")
    with pytest.raises(FormatError, match=r"became INT8; in float: deep"):
        FORM.quantize(tmp_path / "fp32.pte", samples(4), tmp_path / "q.pte", model=net(Recurrent))
    assert not (tmp_path / "q.pte").exists()


def test_a_program_cannot_be_quantised_without_its_model(made, tmp_path):
    with pytest.raises(FormatError, match="cannot be read back"):
        FORM.quantize(made.path("fp32"), samples(4), tmp_path / "it.pte")


def test_calibration_is_checked(made, tmp_path):
    for x, kind in (
        (samples(0), ModelError),
        (samples(2) * np.nan, ModelError),
        (samples(2)[:, :, 1:], FormatError),
    ):
        with pytest.raises(kind):
            FORM.quantize(made.path("fp32"), x, tmp_path / "it.pte", model=net())


def test_a_missing_toolchain_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(MissingTool, match="executorch is not installed") as caught:
        FORM.export(net(), samples(1), tmp_path / "it.pte")
    assert "pip install 'edgeprune[executorch]'" in str(caught.value.hint)


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "offset"])
def test_damaged_files_are_refused(made, tmp_path, damage):
    content = made.path("int8").read_bytes()
    broken = {
        "empty": b"",
        "cut": content[: len(content) // 8],
        "other": b"\x00" * 4 + b"TFL3" + content[8:],
        "offset": content[:24] + b"\xff" * 8 + content[32:],
    }[damage]
    path = tmp_path / "it.pte"
    path.write_bytes(broken)
    with pytest.raises(FormatError, match="not a sound ExecuTorch program"):
        FORM.describe(path)
    with pytest.raises(IntegrityError):
        weight_elements("executorch", broken)


def test_the_runtime_refuses_what_is_no_program(board):
    with pytest.raises(DeviceError):
        board.load("it", b"no program at all" * 10, runtime="executorch", threads=1)


def test_the_golden_samples_go_into_a_file_of_executorchs_own(made, board):
    x = samples(8)
    y = answers(board, made.path("int8"), x)
    found = golden_file(FORM, made.path("int8"), x, y)
    assert found is not None
    suffix, content = found
    assert suffix == ".bpte"
    assert made.path("int8").read_bytes() in content
    assert y[3].tobytes() in content
    from executorch.extension.pybindings import portable_lib

    bundle = portable_lib._load_bundled_program_from_buffer(content)
    module = portable_lib._load_for_executorch_from_bundled_program(bundle)
    for case in range(8):
        found_here = module.forward([torch.from_numpy(x[case : case + 1])])[0].numpy()
        assert np.array_equal(found_here, y[case : case + 1])
    assert golden_file(formats.load("onnx"), made.path("int8"), x, y) is None
