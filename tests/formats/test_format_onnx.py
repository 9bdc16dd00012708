"""ONNX: export equals torch, INT8 runs, and a resized file is what a genuine export at those widths would be."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_fixture import CHANGED, FULL, OTHER, SHAPE, make, run, samples, structure
from repo import REPO
from torch import nn

from edgeprune import formats
from edgeprune.errors import FormatError, MissingTool, ModelError
from edgeprune.formats.onnx.links import GraphView
from edgeprune.formats.onnx.resize import find_units

FORMAT = formats.load("onnx")


def operators_run(content):
    """Operators of the graph that onnxruntime really runs."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(target).graph.node]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of the fp32 and int8 files at the three width settings."""
    folder = tmp_path_factory.mktemp("onnx")
    paths = {}
    for name, widths in (("full", FULL), ("changed", CHANGED), ("other", OTHER)):
        fp32, int8 = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        FORMAT.export(make(widths), samples(1), fp32)
        FORMAT.quantize(fp32, samples(16), int8)
        paths[name, "fp32"], paths[name, "int8"] = fp32, int8
    return paths


@pytest.fixture(scope="module", params=["fp32", "int8"])
def pair(request, files):
    """The precision, and the resizable pair in it."""
    dense, variant = files["full", request.param], files["changed", request.param]
    return request.param, FORMAT.resizable(dense, variant, FULL, CHANGED, make(FULL))


def test_the_exported_file_computes_what_torch_computes(files):
    x = samples(4)
    with torch.no_grad():
        expected = make(FULL)(torch.from_numpy(x)).numpy()
    content = files["full", "fp32"].read_bytes()
    got = np.concatenate([run(content, {"input": x[i : i + 1]})[0] for i in range(len(x))])
    assert np.abs(got - expected).max() < 1e-4


def test_the_exported_file_is_checked_bare_and_has_no_batch_norm_left(files):
    path = files["full", "fp32"]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    ops = {node.op_type for node in model.graph.node}
    assert not ops & {"BatchNormalization", "ReduceMean"}
    assert "GlobalAveragePool" in ops
    assert [v.name for v in model.graph.input] == ["input"]
    assert [v.name for v in model.graph.output] == ["output"]
    assert model.opset_import[0].version >= 17
    assert b"forward" not in path.read_bytes()  # no source lines, no local paths
    assert str(REPO / "tests").encode() not in path.read_bytes()
    assert not list(path.parent.glob("*.data"))


def test_the_same_model_gives_the_same_bytes(files, tmp_path):
    fp32, int8 = tmp_path / "a.onnx", tmp_path / "b.onnx"
    model = make(FULL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FORMAT.export(model, samples(1), fp32)
    FORMAT.quantize(fp32, samples(16), int8)
    assert fp32.read_bytes() == files["full", "fp32"].read_bytes()
    assert int8.read_bytes() == files["full", "int8"].read_bytes()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_toolchain_prints_nothing_and_leaves_no_file(tmp_path):
    script = (
        "import sys, pathlib, numpy as np, torch; from torch import nn\n"
        "from edgeprune.formats.onnx.format import FORMAT\n"
        "m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(); p = pathlib.Path(sys.argv[1])\n"
        "x = np.ones((8, 3, 8, 8), np.float32)\n"
        "FORMAT.export(m, x[:1], p / 'a.onnx'); FORMAT.quantize(p / 'a.onnx', x, p / 'b.onnx')\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {"TMPDIR": str(scratch), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(formats.__file__).parents[2],
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "scratch"]
    assert [p for p in scratch.rglob("*") if p.is_file()] == []


def test_the_int8_file_agrees_with_float_to_a_few_percent(files):
    # Unfused, in floats: the fused kernels of x86 without VNNI add in 16 bits, which saturate; that is the host's doing, not the file's.
    x, level = samples(8), onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    both = [
        np.concatenate(
            [
                run(files["full", p].read_bytes(), {"input": x[i : i + 1]}, level)[0]
                for i in range(8)
            ]
        )
        for p in ("fp32", "int8")
    ]
    assert np.abs(both[0] - both[1]).max() < 0.1 * np.abs(both[0]).max()
    assert not np.array_equal(*both)


def test_onnxruntime_runs_the_int8_file_without_float_kernels(files):
    ran = operators_run(files["full", "int8"].read_bytes())
    assert ran.count("QuantizeLinear") == ran.count("DequantizeLinear") == 1
    float_kernels = {"Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "Concat", "GlobalAveragePool"}
    assert not set(ran) & (float_kernels | {"Relu", "Clip"})
    assert ran.count("QLinearConv") == 10


def test_the_record_of_a_file_counts_operators_and_weight_types(files):
    fp32, int8 = (FORMAT.describe(files["full", p]) for p in ("fp32", "int8"))
    assert (fp32.precision, int8.precision) == ("fp32", "int8")
    assert fp32.path == "full.onnx"
    assert fp32.op_counts["Conv"] == int8.op_counts["Conv"] == int8.op_counts["int8:Conv"] == 10
    assert (fp32.op_counts["weights:float32"], int8.op_counts["weights:int8"]) == (12, 12)
    assert "weights:float32" not in int8.op_counts
    assert (int8.inputs[0].shape, int8.inputs[0].dtype) == ((1, *SHAPE), "float32")
    assert (int8.inputs[0].layout, int8.outputs[0].shape) == ("NCHW", (1, 10))


@pytest.mark.parametrize("name", ["full", "changed", "other"])
def test_a_resized_file_has_the_structure_of_a_genuine_export(pair, files, name):
    precision, resizable = pair
    widths = {"full": FULL, "changed": CHANGED, "other": OTHER}[name]
    genuine = files[name, precision].read_bytes()
    assert structure(resizable.resized(widths)) == structure(genuine)


def test_a_resized_file_is_valid_and_runs(pair):
    _, resizable = pair
    content = resizable.resized(OTHER)
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.value_info) == 0
    assert run(content)[0].shape == (1, 10)


def test_full_widths_give_the_dense_outputs_back(pair, files):
    precision, resizable = pair
    feeds = {"input": samples(1)}
    dense = run(files["full", precision].read_bytes(), feeds)[0]
    assert np.array_equal(run(resizable.resized({}), feeds)[0], dense)


def test_resized_weights_are_the_leading_channels(pair, files):
    precision, resizable = pair
    name = "block.conv2.weight" if precision == "fp32" else "block.conv2.weight_quantized"

    def weight(content):
        constants = onnx.load_model_from_string(content).graph.initializer
        return onnx.numpy_helper.to_array(next(i for i in constants if i.name == name))

    dense = weight(files["full", precision].read_bytes())
    assert np.array_equal(weight(resizable.resized({"spine": 8, "inner": 16})), dense[:8, :16])


@pytest.mark.parametrize("widths", [FULL, OTHER])
def test_every_kernel_loads_and_runs_alone(pair, widths):
    precision, resizable = pair
    for kernel in resizable.kernels:
        content = resizable.kernel(kernel.index, widths)
        onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
        outputs = run(content)
        if widths is FULL:
            assert outputs[0].shape == kernel.output_shape
        if precision == "int8":
            borders = ("QuantizeLinear", "DequantizeLinear")
            assert kernel.op in borders or outputs[0].dtype == np.uint8


def test_an_int8_kernel_alone_is_one_fused_operator(files):
    resizable = FORMAT.resizable(
        files["full", "int8"], files["changed", "int8"], FULL, CHANGED, make(FULL)
    )
    expected = {"Conv": "QLinearConv", "Gemm": "QGemm", "Add": "QLinearAdd"}
    expected |= {"Concat": "QLinearConcat", "GlobalAveragePool": "QLinearGlobalAveragePool"}
    seen = set()
    for kernel in resizable.kernels:
        ran = operators_run(resizable.kernel(kernel.index, FULL))
        if kernel.op in expected:
            seen.add(kernel.op)
            assert [op for op in ran if op != "Transpose"] == [expected[kernel.op]], kernel.name
    assert seen == set(expected)


def test_kernels_chained_in_order_give_the_whole_file(pair, files):
    precision, resizable = pair
    x = samples(1)
    known = {"input": x}
    plain = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    views = _views(files["full", precision].read_bytes())
    for kernel in resizable.kernels:
        model = onnx.load_model_from_string(resizable.kernel(kernel.index, {}))
        feeds = {}
        for value in model.graph.input:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = known[views.get(value.name, value.name)].reshape(shape)
        results = run(model.SerializeToString(), feeds, plain)
        known.update(zip((v.name for v in model.graph.output), results, strict=True))
    whole = run(files["full", precision].read_bytes(), {"input": x}, plain)[0]
    assert np.allclose(known["output"], whole, atol=1e-5)


def _views(content):
    """Tensor behind a view -> the tensor in front of it, through the nodes that quantise it anew."""
    graph = onnx.load_model_from_string(content).graph
    producer = {o: node for node in graph.node for o in node.output}
    found = {}
    for node in graph.node:
        if node.op_type in ("Reshape", "Squeeze"):
            before = producer[node.input[0]]
            quantized = before.op_type == "DequantizeLinear"
            front = before.input[0] if quantized else node.input[0]
            behind = [node.output[0]]
            behind += [n.output[0] for n in graph.node if quantized and node.output[0] in n.input]
            found.update(dict.fromkeys(behind, front))
    return found


def test_kernels_know_their_layer_groups_and_shapes(pair):
    _, resizable = pair
    kernels = {k.layer: k for k in resizable.kernels if k.layer}
    assert kernels["block.conv1"].variables == ("stem", "inner")
    assert kernels["block.conv1"].input_shape == (1, 16, 12, 12)
    assert kernels["block.conv1"].output_shape == (1, 24, 6, 6)
    assert kernels["depthwise"].variables == ("expand",)
    assert kernels["head"].variables == ("spine", "branch", "head")
    assert kernels["fc"].variables == ("head", "fc")
    assert kernels["classifier"].variables == ("fc", "head")
    assert kernels["pool"].op == "MaxPool"
    assert kernels["norm"].op == "Conv"
    convolutions = [k for k in resizable.kernels if k.op in ("Conv", "Gemm")]
    assert len(convolutions) == 12
    assert all(k.layer == k.name for k in convolutions)
    additions = [k.name for k in resizable.kernels if k.op == "Add"]
    assert additions == ["block/add", "add"]
    assert [k.index for k in resizable.kernels] == [*range(len(resizable.kernels))]


def test_equal_computations_share_a_signature_and_others_do_not(tmp_path):
    class Twins(nn.Module):
        def __init__(self, a, b, c):
            super().__init__()
            self.first = nn.Conv2d(3, a, 1)
            self.second = nn.Conv2d(a, b, 3, padding=1)
            self.third = nn.Conv2d(b, c, 3, padding=1)
            self.strided = nn.Conv2d(c, 5, 3, 2, 1)

        def forward(self, x):
            return self.strided(self.third(torch.relu(self.second(torch.relu(self.first(x))))))

    paths = []
    for name, widths in (("a", (16, 32, 24)), ("b", (8, 24, 15))):
        paths.append(tmp_path / f"{name}.onnx")
        FORMAT.export(Twins(*widths).eval(), samples(1), paths[-1])
    full, changed = {"a": 16, "b": 32, "c": 24}, {"a": 8, "b": 24, "c": 15}
    resizable = FORMAT.resizable(*paths, full, changed, Twins(16, 32, 24))
    by_layer = {k.layer: k.signature for k in resizable.kernels}
    assert len(by_layer) == 4
    assert len(set(by_layer.values())) == 4  # second has a ReLU that third lacks
    assert by_layer["second"].replace("|Relu", "") != by_layer["second"]


def test_two_convolutions_of_one_kind_have_one_signature(tmp_path):
    def build(a, b, c):
        return nn.Sequential(
            nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, c, 3, padding=1)
        ).eval()

    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    FORMAT.export(build(16, 32, 24), samples(1), paths[0])
    FORMAT.export(build(8, 24, 15), samples(1), paths[1])
    resizable = FORMAT.resizable(
        *paths, {"a": 16, "b": 32, "c": 24}, {"a": 8, "b": 24, "c": 15}, build(16, 32, 24)
    )
    one, two, three = resizable.kernels
    assert two.signature == three.signature != one.signature
    assert (two.variables, three.variables) == (("a", "b"), ("b", "c"))


def test_groups_with_the_same_two_widths_are_refused(files):
    full = {**FULL, "other": 24}
    changed = {**CHANGED, "other": CHANGED["inner"]}
    with pytest.raises(FormatError, match="inner and other have the same widths 24 -> 16"):
        FORMAT.resizable(files["full", "fp32"], files["changed", "fp32"], full, changed, make(FULL))


def test_a_dimension_that_fits_no_group_is_refused(files):
    full = {k: v for k, v in FULL.items() if k != "fc"}
    changed = {k: CHANGED[k] for k in full}
    with pytest.raises(FormatError, match="fits no channel group"):
        FORMAT.resizable(files["full", "fp32"], files["changed", "fp32"], full, changed, make(FULL))


class Join(nn.Module):
    """Two convolutions side by side, joined, and one behind them."""

    def __init__(self, a, b, c):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, a, 1), nn.Conv2d(3, b, 1), nn.Conv2d(a + b, c, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((1, 2, 3))


def pair_of(tmp_path, kind, full, changed):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, widths in zip(paths, (full, changed), strict=True):
        FORMAT.export(kind(*widths).eval(), samples(1), path)
    return paths


def test_a_sum_that_another_group_explains_as_well_is_told_apart_by_its_readers(tmp_path):
    paths = pair_of(tmp_path, Join, (16, 32, 48), (8, 28, 36))
    full, changed = {"a": 16, "b": 32, "c": 48}, {"a": 8, "b": 28, "c": 36}  # a + b, as c
    resizable = FORMAT.resizable(*paths, full, changed, Join(16, 32, 48))
    genuine = tmp_path / "c.onnx"
    FORMAT.export(Join(5, 11, 7).eval(), samples(1), genuine)
    content = resizable.resized({"a": 5, "b": 11, "c": 7})
    assert structure(content) == structure(genuine.read_bytes())


def test_a_sum_that_only_absent_concatenations_confuse_is_decoded(tmp_path):
    paths = pair_of(tmp_path, Join, (16, 32, 20), (8, 20, 12))
    full = {"a": 16, "b": 32, "c": 20, "d": 28}  # a + b and c + d: 48 -> 28, but only a + b occurs
    changed = {"a": 8, "b": 20, "c": 12, "d": 16}
    resizable = FORMAT.resizable(*paths, full, changed, Join(16, 32, 20))
    by_name = {k.name: k for k in resizable.kernels}
    assert by_name["c"].variables == ("a", "b", "c")
    assert by_name["concat"].variables == ("a", "b")
    shapes = structure(resizable.resized({"a": 4, "b": 8, "c": 16}))[1]
    assert (1, (16, 12, 1, 1)) in shapes


def test_pruned_and_frozen_channels_can_be_joined(tmp_path):
    paths = pair_of(tmp_path, Join, (16, 32, 20), (8, 32, 12))
    resizable = FORMAT.resizable(*paths, {"a": 16, "c": 20}, {"a": 8, "c": 12}, Join(16, 32, 20))
    genuine = tmp_path / "c.onnx"
    FORMAT.export(Join(12, 32, 8).eval(), samples(1), genuine)
    content = resizable.resized({"a": 12, "c": 8})
    assert structure(content) == structure(genuine.read_bytes())
    assert run(content)[0].shape == (1,)


class Slices(nn.Module):
    """Channels that are padded, split, and sliced behind a frozen number of them."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, a, 1), nn.Conv2d(3, b, 1)
        self.c = nn.Conv2d(2 * a + b + 5 - 3, 4, 1)

    def forward(self, x):
        x, y = self.a(x), self.b(x)
        padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 5))
        one, two = torch.cat([x, y], 1).split([x.shape[1], y.shape[1]], 1)
        return self.c(torch.cat([padded, one[:, 3:], two], 1))


def test_padded_split_and_sliced_channels_follow_their_groups(tmp_path):
    paths = pair_of(tmp_path, Slices, (16, 24), (11, 14))
    full, changed = {"a": 16, "b": 24}, {"a": 11, "b": 14}
    resizable = FORMAT.resizable(*paths, full, changed, Slices(16, 24))
    genuine = tmp_path / "c.onnx"
    FORMAT.export(Slices(9, 13).eval(), samples(1), genuine)
    content = resizable.resized({"a": 9, "b": 13})
    assert structure(content) == structure(genuine.read_bytes())
    assert run(content)[0].shape == (1, 4, 12, 12)


def test_calibration_that_is_not_finite_is_refused(files, tmp_path):
    broken = samples(4)
    broken[2, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="1 of 4 are not, the first is number 2"):
        FORMAT.quantize(files["full", "fp32"], broken, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_of_two_precisions_are_no_pair(files):
    with pytest.raises(FormatError, match="same graph"):
        FORMAT.resizable(files["full", "fp32"], files["changed", "int8"], FULL, CHANGED, make(FULL))


def test_an_attribute_that_is_no_dimension_must_be_equal(tmp_path):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, width, slope in zip(paths, (16, 8), (0.1, 0.2), strict=True):
        model = nn.Sequential(nn.Conv2d(3, width, 1), nn.LeakyReLU(slope)).eval()
        FORMAT.export(model, samples(1), path)
    with pytest.raises(FormatError, match="attribute alpha differs"):
        FORMAT.resizable(*paths, {"a": 16}, {"a": 8}, nn.Identity())


def test_a_width_over_the_dense_one_is_refused(pair):
    with pytest.raises(FormatError, match="cannot grow"):
        pair[1].resized({"stem": 24})


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    for content in (b"", b"not a model at all"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not an ONNX model"):
            FORMAT.describe(path)


def test_an_operation_without_onnx_form_is_refused_by_name(tmp_path):
    class Eigen(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x[0, 0]).real

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Eigen()

        def forward(self, x):
            return self.inner(x * 2)

    with pytest.raises(FormatError, match=r"aten\.linalg_eig.*layer inner"):
        FORMAT.export(Outer().eval(), samples(1), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_branch_on_values_is_refused_with_the_line(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(FormatError, match=r"at: return x \* 2 if x\.sum\(\) > 0"):
        FORMAT.export(Branch().eval(), samples(1), tmp_path / "a.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingTool, match=rf"{package} is not installed.*edgeprune\[onnx\]"):
        FORMAT.export(nn.Identity(), samples(1), tmp_path / "a.onnx")


def test_quantising_without_onnxruntime_names_the_extra(monkeypatch, files, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(MissingTool, match="onnxruntime is not installed"):
        FORMAT.quantize(files["full", "fp32"], samples(8), tmp_path / "a.onnx")


def test_views_are_no_kernels_and_every_other_operator_is_in_one(files):
    for precision in ("fp32", "int8"):
        graph = GraphView.read(files["full", precision].read_bytes())
        units = find_units(graph)
        inside = {i for unit in units for i in unit.nodes}
        outside = {graph.nodes[i].op_type for i in range(len(graph.nodes)) if i not in inside}
        assert outside <= {"Reshape", "Squeeze", "QuantizeLinear", "DequantizeLinear"}
        assert len({unit.main for unit in units}) == len(units)
