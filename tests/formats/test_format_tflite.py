"""TFLite: export equals torch, INT8 runs, and a resized file is what a genuine export at those widths would be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from repo import REPO
from torch import nn

from edgeprune import formats
from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.devices.board import Board, open_board
from edgeprune.errors import FormatError, MissingTool, ModelError
from edgeprune.formats.shared.quiet import quiet
from edgeprune.formats.shared.widths import distinct_widths
from edgeprune.formats.tflite.graph import constant_value, is_constant, op_name, read_model, text
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_file

FORMAT = formats.load("tflite")
SHAPE = (3, 16, 16)


class Residual(nn.Module):
    """Two convolutions and a strided projection that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(16, 24, 3, 2, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(24)
        self.conv_2 = nn.Conv2d(24, 20, 3, 1, 1, bias=False)
        self.bn_2 = nn.BatchNorm2d(20)
        self.shortcut = nn.Conv2d(16, 20, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn_2(self.conv_2(torch.relu(self.bn_1(self.conv_1(x)))))
        return torch.relu(y + self.shortcut(x))


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(40, 12, 1), nn.Conv2d(12, 40, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(self.pool(x)))))


class Net(nn.Module):
    """Residual, depthwise, squeeze-excite, pruned and frozen channels joined, means, and a flattened linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = Residual()
        self.mixers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(20, 40, 1), nn.ReLU6()),
                nn.Sequential(nn.Conv2d(40, 40, 3, 1, 1, groups=40), nn.ReLU6()),
                Squeeze(),
                nn.Conv2d(40, 20, 1),
            ]
        )
        self.branches = nn.ModuleList([nn.Conv2d(20, 14, 1), nn.Conv2d(20, 6, 1)])
        self.tail = nn.Conv2d(20, 32, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(32 * 16, 28)
        self.classifier = nn.Linear(28 + 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(x))
        y = x
        for mixer in self.mixers:
            y = mixer(y)
        x = x + y
        x = torch.cat([torch.relu(branch(x)) for branch in self.branches], 1)
        x = self.pool(self.tail(x))
        wide = torch.relu(self.fc(x.flatten(1)))
        return self.classifier(torch.cat([wide, x.mean((2, 3))], 1))


def make() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)  # equal constants, which the converter shares
    return model.eval()


def samples(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, *SHAPE)).astype(np.float32)


def groups_of(model: nn.Module):
    groups, _ = find_groups(model, torch.from_numpy(samples(1)))
    return {group.name: group for group in groups}


def pruned(model: nn.Module, widths: dict[str, int]) -> nn.Module:
    groups = groups_of(model)
    removed = {name: range(widths[name], group.channels) for name, group in groups.items()}
    return remove_channels(model, groups, removed, torch.from_numpy(samples(1)))


FULL = {"stem.0": 16, "block.conv_1": 24, "block.conv_2": 20, "mixers.0.0": 40, "mixers.2.down": 12}
FULL |= {"branches.0": 14, "tail": 32, "fc": 28}
CHANGED = distinct_widths(FULL, dict.fromkeys(FULL, 1))
OTHER = {name: max(2, width // 2 - 1) for name, width in FULL.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Paths of the fp32 and int8 files at the three width settings."""
    folder = tmp_path_factory.mktemp("tflite")
    paths = {}
    for name, widths in (("full", FULL), ("changed", CHANGED), ("other", OTHER)):
        fp32, int8 = folder / f"{name}.tflite", folder / f"{name}-int8.tflite"
        FORMAT.export(pruned(make(), widths), samples(1), fp32)
        FORMAT.quantize(fp32, samples(8), int8)
        paths[name, "fp32"], paths[name, "int8"] = fp32, int8
    return paths


@pytest.fixture(scope="module", params=["fp32", "int8"])
def pair(request: pytest.FixtureRequest, files):
    """The precision, and the resizable pair in it."""
    dense, variant = files["full", request.param], files["changed", request.param]
    return request.param, FORMAT.resizable(dense, variant, FULL, CHANGED, make())


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    with open_board(
        "here", Device(transport="local", targets=("this-machine",), stand_in=True)
    ) as opened:
        yield opened


def run(board: Board, content: bytes, x: np.ndarray) -> np.ndarray:
    board.load("model", content, runtime="litert", threads=1)
    try:
        return board.infer("model", x)
    finally:
        board.unload(["model"])


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def structure(content: bytes) -> list[tuple]:
    """Every operator with the dtypes and shapes around it and its integer options, and the shape constants it reads."""
    model = read_model(content)
    graph = model.subgraphs[0]
    found = []
    for op in graph.operators:
        tensors = [graph.tensors[i] for i in [*op.inputs, *op.outputs] if i >= 0]
        shapes = [
            (t.type, tuple(int(d) for d in t.shape) if t.shape is not None else ()) for t in tensors
        ]
        scales = [None if t.quantization is None else t.quantization.scale for t in tensors]
        counts = [0 if s is None else len(s) for s in scales]
        held = [
            constant_value(model, t).tolist()
            for t, n in zip(tensors, counts, strict=True)
            if is_constant(model, t) and t.type == 2 and n == 0
        ]
        options = {} if op.builtinOptions is None else vars(op.builtinOptions)
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in options.items()}
        found.append((op_name(model, op), shapes, counts, held, plain))
    return found


def tensor_names(content: bytes) -> list[str]:
    return [text(t.name) for t in read_model(content).subgraphs[0].tensors]


def test_the_net_under_test_has_the_structures_that_matter(files) -> None:
    counts = FORMAT.describe(files["full", "fp32"]).op_counts
    for op in ("PAD", "DEPTHWISE_CONV_2D", "CONCATENATION", "LOGISTIC", "RESHAPE", "ADD", "MEAN"):
        assert counts[op] >= 1, op
    found = {name: group.channels for name, group in groups_of(make()).items()}
    # branches.1 is too narrow: it stays whole, and is joined with pruned channels.
    assert found == FULL
    joined = FULL["branches.0"] + 6, CHANGED["branches.0"] + 6
    assert joined == (FULL["block.conv_2"], CHANGED["block.conv_2"])  # sizes alone cannot tell


def test_the_exported_file_computes_what_torch_computes(files, board: Board) -> None:
    x = samples(4)
    with torch.no_grad():
        expected = make()(torch.from_numpy(x)).numpy()
    got = run(board, files["full", "fp32"].read_bytes(), nhwc(x))
    assert np.abs(got - expected).max() < 1e-4


def test_the_int8_file_agrees_with_float_on_both_kinds_of_kernels(files, board: Board) -> None:
    x = nhwc(samples(8))
    expected = run(board, files["full", "fp32"].read_bytes(), x)
    content = files["full", "int8"].read_bytes()
    got = run(board, content, x)
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    board.load("plain", content, runtime="litert", threads=1, delegate=False)
    assert np.abs(board.infer("plain", x) - got).max() < 0.05 * np.abs(expected).max()


def test_the_export_does_not_change_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FORMAT.export(model, samples(1), tmp_path / "a.tflite")
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Conv2d, nn.ReLU]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(files, tmp_path: Path) -> None:
    fp32, int8 = tmp_path / "a.tflite", tmp_path / "b.tflite"
    FORMAT.export(pruned(make(), FULL), samples(1), fp32)
    FORMAT.quantize(fp32, samples(8), int8)
    assert fp32.read_bytes() == files["full", "fp32"].read_bytes()
    assert int8.read_bytes() == files["full", "int8"].read_bytes()


def test_bytes_do_not_depend_on_where_the_model_came_from(tmp_path: Path) -> None:
    def build(module: str) -> nn.Module:
        torch.manual_seed(3)
        kind = type("Private", (nn.Sequential,), {"__module__": module})
        return kind(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()

    contents = []
    for module in ("_edgeprune_net_0123abcd", "/home/someone/net"):
        FORMAT.export(build(module), samples(1), tmp_path / "a.tflite")
        contents.append((tmp_path / "a.tflite").read_bytes())
    assert contents[0] == contents[1]


def test_shipped_files_hold_no_path_and_no_name_of_a_class_or_module(files) -> None:
    for precision in ("fp32", "int8"):
        content = files["full", precision].read_bytes()
        secrets = (
            str(REPO / "tests"),
            "/tmp",
            "/home",
            "torch.nn",
            "Residual",
            "ChannelsLast",
        )
        for secret in (*secrets, "edgeprune_layer", "test_format"):
            assert secret.encode() not in content, secret
        names = tensor_names(content)
        assert len(set(names)) == len(names)
        assert {"input", "output", "block.conv_1/weight", "mixers.2.down/bias"} <= set(names)
        record = FORMAT.describe(files["full", precision])
        assert [t.name for t in (*record.inputs, *record.outputs)] == ["input", "output"]


def test_means_read_channels_last_tensors_without_a_transpose(files) -> None:
    graph = [entry[0] for entry in structure(files["full", "fp32"].read_bytes())]
    assert graph.count("TRANSPOSE") == 1  # the one in front of the flattening, whose order matters
    assert graph.count("MEAN") == 2


def test_the_record_of_a_file_counts_operators_and_weight_types(files) -> None:
    fp32, int8 = (FORMAT.describe(files["full", p]) for p in ("fp32", "int8"))
    assert (fp32.precision, int8.precision) == ("fp32", "int8")
    assert fp32.sha256 == sha256_file(files["full", "fp32"])
    assert int8.op_counts["weights:int8"] >= 12
    assert "weights:float32" not in int8.op_counts
    assert (fp32.inputs[0].shape, fp32.inputs[0].layout) == ((1, 16, 16, 3), "NHWC")
    assert int8.inputs[0].dtype == "int8"
    assert int8.inputs[0].scale is not None


@pytest.mark.parametrize("name", ["full", "changed", "other"])
def test_a_resized_file_has_the_structure_of_a_genuine_export(pair, files, name: str) -> None:
    precision, resizable = pair
    widths = {"full": FULL, "changed": CHANGED, "other": OTHER}[name]
    genuine = files[name, precision].read_bytes()
    assert structure(resizable.resized(widths)) == structure(genuine)


def test_a_resized_file_runs_and_holds_no_weights_that_nothing_reads(
    pair, files, board: Board
) -> None:
    precision, resizable = pair
    content = resizable.resized(OTHER)
    assert len(content) < len(files["full", precision].read_bytes())
    assert run(board, content, nhwc(samples(1))).shape == (1, 10)


def test_full_widths_give_the_dense_outputs_back(pair, files, board: Board) -> None:
    precision, resizable = pair
    x = nhwc(samples(2))
    dense = run(board, files["full", precision].read_bytes(), x)
    assert np.array_equal(run(board, resizable.resized({}), x), dense)


def test_resized_weights_are_the_leading_channels(pair, files) -> None:
    precision, resizable = pair

    def weight(content: bytes) -> np.ndarray:
        model = read_model(content)
        found = [t for t in model.subgraphs[0].tensors if text(t.name) == "block.conv_2/weight"]
        return constant_value(model, found[0])

    dense = weight(files["full", precision].read_bytes())
    cut = weight(resizable.resized({"block.conv_1": 16}))
    assert np.array_equal(cut, dense[..., :16])


@pytest.mark.parametrize("widths", [FULL, OTHER])
def test_every_kernel_loads_and_runs_alone(pair, board: Board, widths: dict[str, int]) -> None:
    _, resizable = pair
    contents = {str(k.index): resizable.kernel(k.index, widths) for k in resizable.kernels}
    loaded = board.load_many(contents, runtime="litert", threads=1)
    board.unload(contents)
    for kernel in resizable.kernels:
        found = loaded[str(kernel.index)]
        assert not isinstance(found, str), f"{kernel.name}: {found}"
        if widths is FULL:
            assert found.outputs[0].shape == kernel.output_shape
            assert kernel.input_shape in {tensor.shape for tensor in found.inputs}


def test_kernels_know_their_layer_and_their_groups(pair) -> None:
    _, resizable = pair
    kernels = {k.layer: k for k in resizable.kernels if k.layer}
    weighted = {p for p, m in make().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert weighted <= set(kernels)
    assert kernels["block.conv_1"].variables == ("stem.0", "block.conv_1")
    assert kernels["mixers.1.0"].op == "DEPTHWISE_CONV_2D"
    assert kernels["mixers.1.0"].variables == ("mixers.0.0",)
    assert kernels["tail"].variables == ("branches.0", "tail")
    assert kernels["fc"].variables == ("tail", "fc")
    assert kernels["classifier"].variables == ("fc", "tail")
    assert kernels["pool"].op == "MAX_POOL_2D"
    assert kernels["mixers.2.pool"].op == "MEAN"
    assert [k.index for k in resizable.kernels] == [*range(len(resizable.kernels))]
    names = [k.name for k in resizable.kernels]
    assert len(set(names)) == len(names)


def test_a_strided_convolution_and_its_padding_are_one_kernel(pair) -> None:
    _, resizable = pair
    kernel = next(k for k in resizable.kernels if k.layer == "block.conv_1")
    assert kernel.signature.startswith("PAD|CONV_2D|")
    assert (kernel.input_shape, kernel.output_shape) == ((1, 16, 16, 16), (1, 8, 8, 24))
    assert "PAD" not in {k.op for k in resizable.kernels}


class Shared(nn.Module):
    """A layer that runs twice, in a net whose lists make equal short names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down_path = nn.ModuleList([nn.Conv2d(3, width, 1)])
        self.up_path = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1)])
        self.again = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up_path[0](torch.relu(self.down_path[0](x))))
        return self.again(torch.relu(self.again(x))).mean((1, 2, 3))


def test_lists_and_shared_layers_keep_their_names(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tflite", tmp_path / "b.tflite"]
    for path, width in zip(paths, (16, 12), strict=True):
        torch.manual_seed(0)
        FORMAT.export(Shared(width).eval(), samples(1), path)
    resizable = FORMAT.resizable(*paths, {"w": 16}, {"w": 12}, Shared(16))
    layers = [k.layer for k in resizable.kernels if k.op == "CONV_2D"]
    assert layers == ["down_path.0", "up_path.0", "again", "again"]
    twice = [k for k in resizable.kernels if k.layer == "again" and k.op == "CONV_2D"]
    assert [k.name for k in twice] == ["again", "again/conv_2d_2"]
    signatures = [k.signature for k in twice]
    assert signatures[0] != signatures[1]  # one has its ReLU inside


class Join(nn.Module):
    """Two convolutions side by side, joined, and one behind them."""

    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, a, 1), nn.Conv2d(3, b, 1), nn.Conv2d(a + b, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((1, 2, 3))


def test_a_sum_that_another_group_explains_as_well_is_told_apart_by_its_readers(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"{i}.tflite" for i in range(3)]
    for path, widths in zip(paths, ((16, 32, 48), (8, 28, 36), (5, 11, 7)), strict=True):
        FORMAT.export(Join(*widths).eval(), samples(1), path)
    full, changed = {"a": 16, "b": 32, "c": 48}, {"a": 8, "b": 28, "c": 36}  # a + b, as c
    resizable = FORMAT.resizable(*paths[:2], full, changed, Join(16, 32, 48))
    content = resizable.resized({"a": 5, "b": 11, "c": 7})
    assert structure(content) == structure(paths[2].read_bytes())


def test_a_dimension_that_fits_no_group_is_refused_with_its_tensor(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tflite", tmp_path / "b.tflite"]
    for path, widths in zip(paths, ((16, 32, 24), (8, 28, 17)), strict=True):
        FORMAT.export(Join(*widths).eval(), samples(1), path)
    with pytest.raises(FormatError, match=r"tensor c/weight: .* 24 -> 17 fits no channel group"):
        FORMAT.resizable(*paths, {"a": 16, "b": 32}, {"a": 8, "b": 28}, Join(16, 32, 24))


class Slices(nn.Module):
    """Channels that are padded, split, and sliced behind a frozen number of them."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, a, 1), nn.Conv2d(3, b, 1)
        self.c = nn.Conv2d(2 * a + b + 5 - 3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.a(x), self.b(x)
        padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 5))
        one, two = torch.relu(torch.cat([x, y], 1)).split([x.shape[1], y.shape[1]], 1)
        return self.c(torch.cat([padded, one[:, 3:], two], 1))


def test_padded_split_and_sliced_channels_follow_their_groups(tmp_path: Path, board: Board) -> None:
    paths = [tmp_path / f"{i}.tflite" for i in range(3)]
    for path, widths in zip(paths, ((16, 24), (11, 14), (9, 13)), strict=True):
        FORMAT.export(Slices(*widths).eval(), samples(1), path)
    full, changed = {"a": 16, "b": 24}, {"a": 11, "b": 14}
    resizable = FORMAT.resizable(*paths[:2], full, changed, Slices(16, 24))
    content = resizable.resized({"a": 9, "b": 13})
    assert structure(content) == structure(paths[2].read_bytes())
    assert run(board, content, nhwc(samples(1))).shape == (1, 4, 16, 16)


def test_files_of_two_precisions_or_graphs_are_no_pair(files, tmp_path: Path) -> None:
    dense = files["full", "fp32"]
    with pytest.raises(FormatError, match="must have the same precision"):
        FORMAT.resizable(dense, files["changed", "int8"], FULL, CHANGED, make())
    FORMAT.export(nn.Conv2d(3, 8, 1).eval(), samples(1), tmp_path / "a.tflite")
    with pytest.raises(FormatError, match="not the same graph"):
        FORMAT.resizable(dense, tmp_path / "a.tflite", FULL, CHANGED, make())


def test_an_option_that_is_no_dimension_must_be_equal(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tflite", tmp_path / "b.tflite"]
    for path, width, slope in zip(paths, (16, 8), (0.1, 0.2), strict=True):
        model = nn.Sequential(nn.Conv2d(3, width, 1), nn.LeakyReLU(slope)).eval()
        FORMAT.export(model, samples(1), path)
    with pytest.raises(FormatError, match="option alpha differs"):
        FORMAT.resizable(*paths, {"a": 16}, {"a": 8}, nn.Identity())


def test_a_width_over_the_dense_one_is_refused(pair) -> None:
    with pytest.raises(FormatError, match="cannot grow"):
        pair[1].resized({"stem.0": 24})


def test_damaged_files_are_refused_wherever_they_are_cut_or_changed(files, tmp_path: Path) -> None:
    content = files["full", "int8"].read_bytes()
    path = tmp_path / "broken.tflite"
    for broken in (b"", b"not a model at all", content[:64], content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(FormatError, match="TFLite"):
            FORMAT.describe(path)
    generator = np.random.default_rng(0)
    for _ in range(40):
        changed = bytearray(content)
        for place in generator.integers(8, len(content), 4):
            changed[place] = int(generator.integers(256))
        path.write_bytes(changed)
        with contextlib.suppress(FormatError):  # any other error would end the test
            FORMAT.describe(path)


class Inner(nn.Module):
    """An operation that TFLite does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x[0, 0]).real


def test_an_operation_without_tflite_form_is_refused_by_name_and_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Inner())).eval()
    with pytest.raises(FormatError, match=r"linalg_eig.*layer 1\.0") as caught:
        FORMAT.export(model, samples(1), tmp_path / "a.tflite")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_a_branch_on_values_is_refused_with_the_line(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(FormatError, match=r"at: return x \* 2 if x\.sum\(\) > 0"):
        FORMAT.export(Branch().eval(), samples(1), tmp_path / "a.tflite")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (np.where(np.arange(4).reshape(4, 1, 1, 1) == 2, np.nan, samples(4)), "1 of 4 are not"),
        (samples(0), "at least 1 sample"),
    ],
)
def test_samples_that_cannot_calibrate_are_refused(files, tmp_path, calibration, message) -> None:
    with pytest.raises(ModelError, match=message):
        FORMAT.quantize(files["full", "fp32"], calibration, tmp_path / "a.tflite")
    assert list(tmp_path.iterdir()) == []


def test_samples_of_another_shape_are_refused(files, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"shape \[16, 16, 3\].*have \[8, 8, 3\]"):
        FORMAT.quantize(files["full", "fp32"], samples(2)[..., :8, :8], tmp_path / "a.tflite")


@pytest.mark.parametrize("package", ["litert_torch", "ai_edge_litert.schema_py_generated"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("ai_edge_litert.schema_py_generated", raising=False)
    with pytest.raises(MissingTool, match=r"is not installed.*edgeprune\[tflite\]"):
        FORMAT.export(nn.Identity(), samples(1), tmp_path / "a.tflite")


def test_quantising_without_the_quantizer_names_the_extra(monkeypatch, files, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(MissingTool, match="ai-edge-quantizer is not installed"):
        FORMAT.quantize(files["full", "fp32"], samples(8), tmp_path / "a.tflite")


def test_quiet_hides_what_is_printed_at_every_level_and_keeps_it(capfd) -> None:
    with quiet() as outer:
        os.write(1, b"outer\n")
        with quiet() as inner:
            os.write(2, b"loc(x): error: inner failed\n")
        os.write(2, b"outer again\n")
    os.write(1, b"visible\n")
    os.write(2, b"visible too\n")
    assert capfd.readouterr() == ("visible\n", "visible too\n")
    assert inner.last_error() == "loc(x): error: inner failed"
    assert outer.text == "outer\nouter again\n"
    assert outer.last_error() == ""


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_quiet_gives_the_streams_back_whatever_ends_it(kind, capfd) -> None:
    def interrupted() -> None:
        with quiet(), quiet():
            os.write(1, b"hidden\n")
            raise kind

    next_handle = os.dup(1)
    os.close(next_handle)
    with pytest.raises(kind):
        interrupted()
    os.write(1, b"visible\n")
    assert capfd.readouterr().out == "visible\n"
    again = os.dup(1)
    os.close(again)
    assert again == next_handle  # no handle was left open


def test_quiet_works_without_a_terminal_stream() -> None:
    script = (
        "import os, sys\n"
        "from edgeprune.formats.shared.quiet import quiet\n"
        "sys.stdout = None\n"
        "with quiet():\n    os.write(1, b'hidden')\n"
        "os.write(1, b'visible')\n"
    )
    root = Path(formats.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=root, check=True)
    assert (done.stdout, done.stderr) == (b"visible", b"")


class Viewed(nn.Module):
    """Flattens by ``view``, which wants the numbers in torch's own order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        return self.head(x.view(len(x), -1))


def test_a_net_that_flattens_by_view_is_converted_and_says_what_torch_says(
    board: Board, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Viewed().eval(), np.random.default_rng(0).random((2, *SHAPE), np.float32)
    FORMAT.export(model, x[:1], tmp_path / "net.tflite")
    content = (tmp_path / "net.tflite").read_bytes()
    assert "TRANSPOSE" not in {row[0] for row in structure(content)}
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(board, content, nhwc(x)), expected, atol=1e-5)
