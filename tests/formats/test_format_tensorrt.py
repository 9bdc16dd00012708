"""TensorRT: the shipped ONNX has Q and DQ where TensorRT takes and fuses them, and the checker names what breaks its rules."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zoo
from onnx import TensorProto, helper, numpy_helper
from onnx_fixture import CHANGED, FULL, OTHER, make, run, samples, structure
from torch import nn

from edgeprune import formats
from edgeprune.bundle.model_check import layer_sizes
from edgeprune.errors import FormatError
from edgeprune.formats.inside.anatomy import anatomy
from edgeprune.formats.tensorrt.format import OPSET, lower_opset, placement_problems

FORMAT = formats.load("tensorrt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of the fp32 and int8 files at three width settings."""
    folder = tmp_path_factory.mktemp("tensorrt")
    paths = {}
    for name, widths in (("full", FULL), ("changed", CHANGED), ("other", OTHER)):
        fp32, int8 = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        FORMAT.export(make(widths), samples(1), fp32)
        FORMAT.quantize(fp32, samples(16), int8)
        paths[name, "fp32"], paths[name, "int8"] = fp32, int8
    return paths


def graph_of(path):
    return onnx.load(path).graph


def node(graph, name):
    return next(n for n in graph.node if n.name == name)


def maker(graph, tensor):
    return next((n for n in graph.node if tensor in n.output), None)


def test_the_files_are_of_the_oldest_jetpacks_opset_and_compute_what_torch_computes(files):
    for path in files.values():
        assert {i.version for i in onnx.load(path).opset_import} == {OPSET}
    x = samples(4)
    with torch.no_grad():
        expected = make(FULL)(torch.from_numpy(x)).numpy()
    content = files["full", "fp32"].read_bytes()
    found = np.concatenate([run(content, {"input": x[i : i + 1]})[0] for i in range(4)])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    quantized = files["full", "int8"].read_bytes()
    near = np.concatenate([run(quantized, {"input": x[i : i + 1]})[0] for i in range(4)])
    assert np.abs(near - expected).max() < 0.15 * np.abs(expected).max()


def test_every_zero_point_is_int8_zero_and_no_bias_is_quantised(files):
    graph = graph_of(files["full", "int8"])
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for pair in pairs:
        assert constants[pair.input[2]].dtype == np.int8
        assert not constants[pair.input[2]].any()
    for conv in (n for n in graph.node if n.op_type in ("Conv", "Gemm")):
        assert constants[conv.input[2]].dtype == np.float32
        weight = maker(graph, conv.input[1])
        stored = constants[weight.input[0]]
        assert stored.dtype == np.int8
        assert constants[weight.input[1]].shape == (stored.shape[0],)  # one scale a channel


def test_convolutions_keep_their_activation_and_residual_additions_their_convolution(files):
    graph = graph_of(files["full", "int8"])
    assert maker(graph, node(graph, "block/relu").input[0]).op_type == "Conv"
    addition = node(graph, "block/add")
    kinds = sorted(maker(graph, name).op_type for name in addition.input)
    assert kinds == ["Conv", "DequantizeLinear"]
    # The longer branch is the one that fuses.
    straight = next(maker(graph, n) for n in addition.input if maker(graph, n).op_type == "Conv")
    assert straight.name == "block.conv2/conv"
    assert placement_problems(onnx.load(files["full", "int8"])) == ()


def test_a_resized_file_is_what_an_export_at_those_widths_would_be(files):
    for precision in ("fp32", "int8"):
        dense, variant = files["full", precision], files["changed", precision]
        resizable = FORMAT.resizable(dense, variant, FULL, CHANGED, make(FULL))
        made = resizable.resized(OTHER)
        assert structure(made) == structure(files["other", precision].read_bytes())
        assert np.isfinite(run(made)[0]).all()
        assert placement_problems(onnx.load_model_from_string(made)) == ()
        for index in range(len(resizable.kernels)):
            assert run(resizable.kernel(index, OTHER))


def test_the_record_of_a_file_names_the_format_and_its_precision(files):
    record = FORMAT.describe(files["full", "int8"])
    assert (record.format, record.precision) == ("tensorrt", "int8")
    assert record.op_counts["weights:int8"] == 12
    assert FORMAT.describe(files["full", "fp32"]).precision == "fp32"


# What breaks a rule, one change of a sound graph each, and the words that must name it.


def asymmetric(graph):
    zero = next(i for i in graph.initializer if i.name == "relu_zero_point")
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))


def unsigned(graph):
    zero = next(i for i in graph.initializer if i.name == "relu_zero_point")
    zero.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), zero.name))


def per_tensor_axis(graph):
    pair = maker(graph, node(graph, "expand/conv").input[1])
    next(a for a in pair.attribute if a.name == "axis").i = 1


def between(graph):
    relu = node(graph, "block/relu")
    _insert_pair(graph, relu, 0)


def bias(graph):
    conv = node(graph, "stem/conv")
    for name, value in (
        ("b_q", np.zeros(16, np.int32)),
        ("b_s", np.array(0.1, np.float32)),
        ("b_z", np.array(0, np.int32)),
    ):
        graph.initializer.append(numpy_helper.from_array(value, name))
    pair = helper.make_node("DequantizeLinear", ["b_q", "b_s", "b_z"], ["b_f"], name="bias_dq")
    graph.node.insert(0, pair)
    conv.input[2] = "b_f"


def half(graph):
    conv = node(graph, "expand/conv")
    conv.input[0] = "relu_2"


def skip_in_float(graph):
    addition = node(graph, "add")
    slot = next(i for i, n in enumerate(addition.input) if n.startswith("relu_2"))
    addition.input[slot] = "relu_2"


def both_read(graph):
    addition = node(graph, "block/add")  # its free side is read twice: nothing to fuse with
    slot = next(i for i, n in enumerate(addition.input) if maker(graph, n).op_type == "Conv")
    extra = helper.make_tensor_value_info(addition.input[slot], TensorProto.FLOAT, None)
    graph.output.append(extra)


def _insert_pair(graph, target, slot):
    source = target.input[slot]
    names = [f"{source}_q", f"{source}_d"]
    parameters = ["relu_scale", "relu_zero_point"]
    at = next(i for i, n in enumerate(graph.node) if n.name == target.name)
    graph.node.insert(
        at, helper.make_node("DequantizeLinear", [names[0], *parameters], names[1:], name="d")
    )
    graph.node.insert(
        at, helper.make_node("QuantizeLinear", [source, *parameters], names[:1], name="q")
    )
    node(graph, target.name).input[slot] = names[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (asymmetric, "relu_QuantizeLinear must be symmetric (zero point 0), but has zero point 3"),
        (unsigned, "relu_QuantizeLinear must have int8, but has uint8"),
        (per_tensor_axis, "Conv expand/conv must have weight scales along its output channels (axis 0), but"),
        (between, "Relu block/relu must follow Conv block.conv1/conv without Q/DQ between"),
        (bias, "bias_dq must have a bias in float, not a quantised one, but has int32"),
        (half, "Conv expand/conv must have both data and weights quantised, but only its weights are"),
        (skip_in_float, "Add add must have its skip input quantised, or Conv project/conv writes float"),
        (both_read, "Add block/add must have getitem_3 quantised too"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_the_checker_names_the_node_and_the_rule(files, change, words):
    model = onnx.load(files["full", "int8"])
    change(model.graph)
    assert any(words in problem for problem in placement_problems(model)), placement_problems(model)


def test_an_opset_that_the_oldest_parser_cannot_read_is_named(files):
    model = onnx.load(files["full", "fp32"])
    model.opset_import[0].version = 18
    assert placement_problems(model) == (
        "the graph must be of opset 17 or older, but is of opset 18",
    )


def test_operators_of_opset_18_are_written_in_their_older_form(tmp_path: Path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            y = nn.functional.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")
            a, b = y.chunk(2, dim=1)
            return (a * b).amax(dim=(2, 3))

    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    model = Odd().eval()
    FORMAT.export(model, x, tmp_path / "odd.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    content = (tmp_path / "odd.onnx").read_bytes()
    np.testing.assert_allclose(run(content, {"input": x})[0], expected, atol=1e-5)
    assert {i.version for i in onnx.load_model_from_string(content).opset_import} == {OPSET}


def test_an_operator_without_an_older_form_is_refused_by_name():
    value = helper.make_tensor_value_info
    mish = helper.make_node("Mish", ["x"], ["y"])
    graph = helper.make_graph(
        [mish],
        "g",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(FormatError, match=r"opset 17, the newest that TensorRT 8\.5 reads.*Mish"):
        lower_opset(model)


@pytest.mark.parametrize("name", ["attention", "spatial-gate", "layer-scale", "residual"])
def test_both_files_of_a_net_have_the_same_layers_and_the_float_one_is_fp32(tmp_path, name):
    # What verify asks of the float model of a bundle. The first two take the mean over given axes, which torch exports for opset 18.
    model, x = zoo.make(zoo.ZOO[name])
    fp32, int8 = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    one = FORMAT.export(model, x[:1].numpy(), fp32)
    other = FORMAT.quantize(fp32, x.numpy(), int8)
    assert (one.inputs, one.outputs) == (other.inputs, other.outputs)
    floats, eight_bit = (anatomy("onnx", path.read_bytes()) for path in (fp32, int8))
    assert layer_sizes(floats) == layer_sizes(eight_bit)
    assert {kind for layer in floats.layers for _, kind, _ in layer.weights} == {"float32"}
    with torch.no_grad():
        expected = model(x[:1]).numpy()
    found = run(fp32.read_bytes(), {"input": x[:1].numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
