"""Ranges, float layers and the type of inputs and outputs of INT8 files, and what can be seen inside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo

from edgeprune import formats
from edgeprune.devices.agent.runtimes import infer, open_model
from edgeprune.errors import FormatError
from edgeprune.formats import Inspectable, QuantizeOptions
from edgeprune.formats.shared.ranges import Spread, ends, saturation, spreads
from edgeprune.workload.dataset import to_layout

RUNTIME = {"tflite": "litert", "onnx": "onnxruntime"}


def answers(form, path: Path, x: np.ndarray) -> np.ndarray:
    model = open_model(path.read_bytes(), RUNTIME[form.info.name], 1, True)
    return infer(model, to_layout(x, form.info.layout))


def heavy_tailed(n: int) -> np.ndarray:
    """Most values are small; one in a thousand is forty times as large."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, 3, 12, 12)).astype(np.float32)
    x[rng.random(x.shape) < 1e-3] *= 40
    return x


@pytest.fixture(scope="module", params=["tflite", "onnx"])
def exported(request, tmp_path_factory):
    form = formats.load(request.param)
    model, _ = zoo.make(zoo.ZOO["squeeze-excite"])
    folder = tmp_path_factory.mktemp(request.param)
    x = np.random.default_rng(0).standard_normal((16, 3, 12, 12)).astype(np.float32)
    path = folder / f"fp32{form.info.suffix}"
    form.export(model, x[:1], path)
    return form, model, path, x


def test_the_full_range_covers_every_value_and_zero():
    spread = Spread(0.5, 2.0, np.array([1, 1]))
    assert ends(spread, QuantizeOptions()) == (0.0, 2.0)


def test_a_percentile_leaves_the_outliers_outside_and_little_else():
    values = np.concatenate([np.linspace(-1, 1, 20_000), [50.0]]).astype(np.float32)
    spread = spreads(lambda: [{"x": values}])["x"]
    low, high = ends(spread, QuantizeOptions(ranges="percentile", tail_ratio=1e-3))
    assert -1.05 < low < -0.95
    assert 0.95 < high < 1.1
    assert saturation(values, (low, high)) < 2e-3


def test_the_least_squared_error_beats_the_full_range_on_heavy_tails():
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    values[0] = 30.0
    spread = spreads(lambda: [{"x": values}])["x"]

    def error(options: QuantizeOptions) -> float:
        low, high = ends(spread, options)
        step = (high - low) / 255
        rounded = np.clip(np.rint(values / step), low / step, high / step) * step
        return float(((rounded - values) ** 2).mean())

    assert error(QuantizeOptions(ranges="mse")) < 0.5 * error(QuantizeOptions())


def test_saturation_counts_what_lies_outside():
    assert saturation(np.array([-2.0, 0.0, 0.5, 3.0]), (-1.0, 1.0)) == 0.5


def test_the_default_ranges_reach_to_the_extremes_of_the_samples(exported, tmp_path):
    form, _, path, _ = exported
    x = heavy_tailed(16)
    plain = tmp_path / f"a{form.info.suffix}"
    form.quantize(path, x, plain)
    low, high = form.ranges(plain)["input"]
    assert (low, high) == pytest.approx((x.min(), x.max()), abs=(high - low) / 255)


@pytest.mark.parametrize("ranges", ["percentile", "mse"])
def test_ranges_other_than_the_default_reach_the_file(exported, tmp_path, ranges):
    form, _, path, _ = exported
    x = heavy_tailed(16)
    plain, other = tmp_path / f"a{form.info.suffix}", tmp_path / f"b{form.info.suffix}"
    form.quantize(path, x, plain)
    form.quantize(path, x, other, options=QuantizeOptions(ranges=ranges, tail_ratio=5e-3))
    before, after = form.ranges(plain), form.ranges(other)
    assert before.keys() == after.keys()
    spread = spreads(lambda: form.activations(path, x))["input"]
    wanted = ends(spread, QuantizeOptions(ranges=ranges, tail_ratio=5e-3))
    step = (wanted[1] - wanted[0]) / 255
    assert after["input"] == pytest.approx(wanted, abs=step)
    assert after["input"] != pytest.approx(before["input"], rel=1e-3)


def test_a_layer_that_stays_in_float_keeps_its_float_weights_and_the_rest_does_not(
    exported, tmp_path
):
    form, model, path, x = exported
    whole, mixed = tmp_path / f"a{form.info.suffix}", tmp_path / f"b{form.info.suffix}"
    a = form.quantize(path, x, whole)
    b = form.quantize(path, x, mixed, options=QuantizeOptions(float_layers=("project", "head.2")))
    assert b.op_counts["weights:int8"] == a.op_counts["weights:int8"] - 2
    wanted = model(torch.from_numpy(x)).detach().numpy()
    error_whole = np.square(answers(form, whole, x) - wanted).mean()
    assert np.square(answers(form, mixed, x) - wanted).mean() < error_whole


def test_formats_show_every_tensor_that_an_operator_writes(exported):
    form, model, path, x = exported
    assert isinstance(form, Inspectable)
    found = list(form.activations(path, x[:3]))
    assert len(found) == 3
    assert found[0].keys() == found[2].keys() == {"input", *form.readers(path)}
    wanted = model(torch.from_numpy(x[:3])).detach().numpy()
    assert np.allclose(np.concatenate([f["output"] for f in found]), wanted, atol=1e-4)
    layers = {layer for _, layer, _ in form.readers(path).values()}
    assert {"expand", "depth", "squeeze", "excite", "project", "head.2"} <= layers


def test_tflite_inputs_and_outputs_are_float_or_int8_by_choice(tmp_path):
    form = formats.load("tflite")
    model, _ = zoo.make(zoo.ZOO["plain"])
    x = np.random.default_rng(0).standard_normal((8, 3, 12, 12)).astype(np.float32)
    path = tmp_path / "fp32.tflite"
    form.export(model, x[:1], path)
    files = {io: tmp_path / f"{io}.tflite" for io in ("float", "int8")}
    found = {
        io: form.quantize(path, x, p, options=QuantizeOptions(io=io)) for io, p in files.items()
    }
    assert {found["float"].inputs[0].dtype, found["float"].outputs[0].dtype} == {"float32"}
    assert found["float"].inputs[0].scale is None
    assert {found["int8"].inputs[0].dtype, found["int8"].outputs[0].dtype} == {"int8"}
    assert found["int8"].inputs[0].scale > 0
    assert np.allclose(answers(form, files["float"], x), answers(form, files["int8"], x), atol=1e-5)


def test_onnx_refuses_int8_inputs_in_one_line(tmp_path):
    with pytest.raises(FormatError, match="io int8 is for tflite"):
        formats.load("onnx").quantize(
            tmp_path / "absent",
            np.zeros((1, 3, 4, 4)),
            tmp_path / "x",
            options=QuantizeOptions(io="int8"),
        )


@pytest.mark.slow
def test_a_flattening_leaves_no_transpose_and_the_same_answers(tmp_path):
    form = formats.load("tflite")
    for name in ("inception", "flattened"):
        model, x = zoo.make(zoo.ZOO[name])
        path = tmp_path / f"{name}.tflite"
        found = form.export(model, x.numpy()[:1], path)
        assert "TRANSPOSE" not in found.op_counts
        assert np.allclose(answers(form, path, x.numpy()), model(x).detach().numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "inverted", "squeeze-excite", "u-net"])
def test_usual_nets_have_no_transpose_inside(tmp_path, name):
    model, x = zoo.make(zoo.ZOO[name])
    found = formats.load("tflite").export(model, x.numpy()[:1], tmp_path / "x.tflite")
    assert "TRANSPOSE" not in found.op_counts
