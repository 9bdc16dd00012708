"""TFLite: max pooling over padded edges is torch's to the last bit, stores no infinity, and costs INT8 no step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import nn
from torch.nn import functional

from edgeprune import formats
from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.devices.agent.runtimes import infer, open_model
from edgeprune.formats import QuantizeOptions
from edgeprune.formats.shared.widths import distinct_widths
from edgeprune.formats.tflite.graph import constant_value, is_constant, op_name, read_model

FORMAT = formats.load("tflite")
INF = float("inf")


class Padded(nn.Module):
    """Max pooling of 3 x 3 behind a padding that the model writes itself."""

    def __init__(self, *pads: int, value: float = -INF) -> None:
        super().__init__()
        self.pads, self.value = pads, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(functional.pad(x, self.pads, value=self.value), 3, 2)


POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    nn.MaxPool2d(5, 3, 2, ceil_mode=True),
    nn.MaxPool2d((3, 1), (2, 1), (1, 0)),
    nn.MaxPool2d((2, 5), (1, 2), (1, 2)),
    Padded(0, 1, 0, 1),
    Padded(2, 2, 1, 0, value=torch.finfo(torch.float32).min),
]


def values(n: int, size: int, channels: int = 3) -> np.ndarray:
    """Samples of which many are negative, whole windows at the edges too."""
    x = np.random.default_rng(size).normal(-1, 1, (n, channels, size, size + 2))
    return x.astype(np.float32)


def answers(file: Path, x: np.ndarray, *, delegate: bool = True) -> np.ndarray:
    """What a file answers, sample by sample: of an int8 file with int8 edges, in steps."""
    kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(str(file), num_threads=1, experimental_op_resolver_type=kind)
    runner.allocate_tensors()
    entry, end = runner.get_input_details()[0], runner.get_output_details()[0]
    found = []
    for sample in np.moveaxis(x, 1, -1):
        runner.set_tensor(entry["index"], np.ascontiguousarray(sample[None]))
        runner.invoke()
        found.append(runner.get_tensor(end["index"]))
    return np.concatenate(found)


def real_answers(file: Path, x: np.ndarray) -> np.ndarray:
    """What a file answers, in real numbers whatever its types are."""
    model = open_model(file.read_bytes(), "litert", 1, True)
    return np.asarray(infer(model, np.ascontiguousarray(np.moveaxis(x, 1, -1))))


def torch_answers(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(x)))


def operators(file: Path) -> list[str]:
    model = read_model(file.read_bytes())
    return [op_name(model, op) for op in model.subgraphs[0].operators]


def require_finite_numbers(file: Path) -> None:
    model = read_model(file.read_bytes())
    for tensor in model.subgraphs[0].tensors:
        if is_constant(model, tensor):
            value = constant_value(model, tensor)
            assert np.isfinite(value).all()
            assert np.abs(value.astype(np.float64)).max(initial=0) < 1e30
        if tensor.quantization is not None and tensor.quantization.scale is not None:
            assert np.isfinite(tensor.quantization.scale).all()


@pytest.mark.parametrize(
    ("pool", "size"), [(pool, 8) for pool in POOLS] + [(POOLS[2], 9), (POOLS[3], 9)], ids=str
)
@pytest.mark.parametrize("rectified", [True, False], ids=["rectified", "signed"])
def test_padded_pooling_is_torchs_to_the_last_bit_and_to_the_last_step(
    pool: nn.Module, size: int, rectified: bool, tmp_path: Path
):
    model = nn.Sequential(*([nn.ReLU()] if rectified else []), pool).eval()
    fp32, int8 = tmp_path / "a.tflite", tmp_path / "b.tflite"
    x = values(4, size)
    FORMAT.export(model, x[:1], fp32)
    assert np.array_equal(answers(fp32, x), torch_answers(model, x))
    require_finite_numbers(fp32)
    FORMAT.quantize(fp32, x, int8, options=QuantizeOptions(io="int8"))
    require_finite_numbers(int8)
    entry = FORMAT.describe(int8).inputs[0]
    assert entry.scale is not None
    assert entry.zero_point is not None
    steps = np.clip(np.round(x / entry.scale) + entry.zero_point, -128, 127)
    floor = entry.zero_point if rectified else -128
    expected = torch_answers(pool, np.maximum(steps, floor).astype(np.float32))
    for delegate in (True, False):
        found = answers(int8, steps.astype(np.int8), delegate=delegate)
        end = FORMAT.describe(int8).outputs[0]
        assert end.scale is not None
        assert end.zero_point is not None
        real = (found.astype(np.float32) - end.zero_point) * end.scale
        wanted = (expected - entry.zero_point) * entry.scale
        # A rectifier narrows the range, so its own steps are finer; without one every step is kept.
        assert np.abs(real - wanted).max() <= (end.scale if rectified else 1e-6)


def test_pooling_behind_a_rectifier_is_run_by_the_fast_kernels_whole(tmp_path: Path):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    bare = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.MaxPool2d(3, 2, 1)).eval()
    file = tmp_path / "a.tflite"
    for model, wanted in (
        (stem, ["CONV_2D", "PAD", "MAX_POOL_2D"]),
        (bare, ["CONV_2D", "SLICE", "CONCATENATION", "SLICE", "CONCATENATION", "MAX_POOL_2D"]),
    ):
        FORMAT.export(model, values(1, 8), file)
        assert [name for name in operators(file) if name != "TRANSPOSE"] == wanted
        runner = Interpreter(str(file), num_threads=1)
        runner.allocate_tensors()
        names = [op["op_name"] for op in runner._get_ops_details()]
        assert names.count("DELEGATE") == 1


def test_padding_that_same_pads_alike_is_left_to_it(tmp_path: Path):
    FORMAT.export(Padded(0, 1, 0, 1).eval(), values(1, 8), tmp_path / "a.tflite")
    assert "MAX_POOL_2D" in operators(tmp_path / "a.tflite")
    assert not {"PAD", "PADV2", "SLICE"} & {*operators(tmp_path / "a.tflite")}


def test_a_window_of_padding_alone_stays_as_torch_has_it(tmp_path: Path):
    model = Padded(3, 0, 0, 1).eval()
    FORMAT.export(model, values(1, 8), tmp_path / "a.tflite")
    x = values(2, 8)
    expected = torch_answers(model, x)
    assert np.isinf(expected).any()
    assert np.array_equal(answers(tmp_path / "a.tflite", x), expected)


class Stems(nn.Module):
    """Padded pooling behind a rectifier, and one of signed values, with a width of their own each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 1, 1)
        self.third, self.pool = nn.Conv2d(24, 20, 3, 1, 1), nn.MaxPool2d(3, 2, 1)
        self.classifier = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.first(x)))
        x = self.pool(self.second(x))
        return self.classifier(torch.relu(self.third(x)).mean((2, 3)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_with_padded_pooling_is_cut_to_any_width(precision: str, tmp_path: Path):
    torch.manual_seed(0)
    dense, x = Stems().eval(), values(6, 14)
    example = torch.from_numpy(x[:1])
    groups = {group.name: group for group in find_groups(dense, example)[0]}
    full = {name: group.channels for name, group in groups.items()}
    assert set(full) == {"first", "second", "third"}

    def written(widths: dict[str, int], name: str) -> tuple[nn.Module, Path]:
        removed = {g: range(widths[g], full[g]) for g in full}
        model = remove_channels(dense, groups, removed, example)
        fp32, int8 = tmp_path / f"{name}.tflite", tmp_path / f"{name}.int8.tflite"
        FORMAT.export(model, x[:1], fp32)
        if precision == "fp32":
            return model, fp32
        FORMAT.quantize(fp32, x, int8)
        return model, int8

    variant = distinct_widths(full, dict.fromkeys(full, 1))
    other = {"first": 9, "second": 13, "third": 7}
    pair = FORMAT.resizable(
        written(full, "dense")[1], written(variant, "variant")[1], full, variant, dense
    )
    model, genuine = written(other, "other")
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(pair.resized(other))
    assert operators(cut) == operators(genuine)
    found = real_answers(cut, x)
    if precision == "fp32":
        assert np.array_equal(found, real_answers(genuine, x))
        np.testing.assert_allclose(found, torch_answers(model, x), atol=1e-5)
    else:
        assert np.isfinite(found).all()
    for kernel in pair.kernels:
        runner = Interpreter(model_content=pair.kernel(kernel.index, other), num_threads=1)
        runner.allocate_tensors()
        runner.invoke()
