"""The integer types of an ONNX file are those that were fastest on the board, of those whose answers hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from tinynet import images, trained

from edgeprune.errors import FormatError
from edgeprune.formats import load
from edgeprune.formats.onnx.format import VARIANTS, OnnxFormat
from edgeprune.pipeline.files import int8_types
from edgeprune.pipeline.files.records import TypesRow

NAMES = ["U8S8 per channel", "S8S8 per channel", "U8S8 per tensor", "S8S8 per tensor"]


def row(name, ratio, high, agreement=0.99):
    return TypesRow(
        name=name,
        median_ms=ratio,
        ratio=ratio,
        ratio_high=high,
        agreement=agreement,
        holds=agreement >= 0.98,
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The dense file of the tiny net, and real inputs."""
    x = images(32, 0)[0][:, None].astype(np.float32) / 255
    path = tmp_path_factory.mktemp("dense") / "dense.fp32.onnx"
    load("onnx").export(trained(), x[:1], path)
    return path, x


def context_of(dense):
    return SimpleNamespace(
        form=load("onnx"),
        has_twin=False,
        calibration=dense[1],
        job=SimpleNamespace(target=SimpleNamespace(precisions=("fp32", "int8"))),
    )


def choose(dense, folder, context=None):
    """The choice, of a folder with the dense file in the default types."""
    context, target = context or context_of(dense), folder / "dense.int8.onnx"
    context.form.quantize(dense[0], dense[1], target)
    return int8_types.choose(context, dense[0], target)


def types_of(path):
    """Dtype of the first activation's zero point, and whether a weight has several scales."""
    graph = onnx.load(path).graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    first = next(n for n in graph.node if n.op_type == "QuantizeLinear")
    weights = [
        constants[n.input[1]]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and constants.get(n.input[0], np.zeros(0)).ndim == 4
    ]
    return constants[first.input[2]].dtype.name, max(w.size for w in weights) > 1


def test_every_variant_is_what_its_name_says(dense, tmp_path):
    assert [types.name for types in VARIANTS] == NAMES
    found = []
    for types in VARIANTS:
        OnnxFormat(types).quantize(dense[0], dense[1], tmp_path / "x.onnx")
        found.append(types_of(tmp_path / "x.onnx"))
    assert found == [("uint8", True), ("int8", True), ("uint8", False), ("int8", False)]


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        ([row(NAMES[0], 1, 1), row(NAMES[1], 0.8, 0.9), row(NAMES[2], 0.7, 0.75)], NAMES[2]),
        ([row(NAMES[0], 1, 1), row(NAMES[1], 0.97, 1.02)], NAMES[0]),  # no proof, no change
        ([row(NAMES[0], 1, 1), row(NAMES[1], 0.8, 0.9, agreement=0.9)], NAMES[0]),
        ([row(NAMES[0], 1, 1, agreement=0.9), row(NAMES[1], 1.2, 1.3)], NAMES[1]),
    ],
)
def test_the_fastest_that_holds_is_kept(dense, tmp_path, monkeypatch, rows, taken):
    monkeypatch.setattr(int8_types, "_rows", lambda *_: tuple(rows))
    context = context_of(dense)
    chosen = choose(dense, tmp_path, context)
    assert chosen.form.variant == taken
    assert context.form is chosen.form  # what is written from now on
    assert types_of(tmp_path / "dense.int8.onnx") == types_of_name(taken)
    assert [path.name for path in tmp_path.iterdir()] == ["dense.int8.onnx"]
    assert chosen.note().startswith(f"INT8 types by measurement: {taken}; time and agreement")


def types_of_name(name):
    return ("uint8" if name.startswith("U8") else "int8", name.endswith("channel"))


def test_a_variant_that_cannot_be_written_is_left_out_but_not_the_default(
    dense, tmp_path, monkeypatch
):
    seen = []
    plain = OnnxFormat.quantize

    def quantize(self, *args, **options):
        if self.types.name == broken:
            raise FormatError("no")
        return plain(self, *args, **options)

    monkeypatch.setattr(OnnxFormat, "quantize", quantize)
    monkeypatch.setattr(
        int8_types, "_rows", lambda c, p, a: seen.extend(p) or (row(NAMES[0], 1, 1),)
    )
    broken = NAMES[3]
    choose(dense, tmp_path)
    assert seen == NAMES[:3]
    broken = NAMES[0]
    with pytest.raises(FormatError):
        choose(dense, tmp_path)


def test_a_finished_stage_sets_the_types_again_and_other_formats_have_no_choice(dense):
    context = context_of(dense)
    int8_types.restore(context, NAMES[3])
    assert context.form.types == VARIANTS[3]
    int8_types.restore(context, "")
    assert context.form.types == VARIANTS[3]
    assert int8_types.is_open(context)
    for name in ("tensorrt", "tflite"):
        context.form = load(name)
        assert not int8_types.is_open(context)
    only_float = context_of(dense)
    only_float.job.target.precisions = ("fp32",)
    assert not int8_types.is_open(only_float)


def test_the_board_times_all_variants_together(dense, tmp_path):
    from edgeprune.devices.board import open_board
    from edgeprune.pipeline.context import Context
    from edgeprune.records.device import Device
    from edgeprune.records.target import Runtime, Target

    device = Device(
        transport="local",
        targets=("this-machine",),
        stand_in=True,
        workdir=str(tmp_path / "w"),
        lease_file=str(tmp_path / "lock"),
    )
    target = Target(
        name="t", summary="", profile="p", format="onnx", runtime=Runtime(name="onnxruntime")
    )
    split = SimpleNamespace(selection=None)
    job = SimpleNamespace(target=target, loaded=SimpleNamespace(dataset=split))
    with open_board("desk", device) as board:
        context = Context(job, load("onnx"), load("onnx"), board, board, board, None)
        context.__dict__.update(calibration=dense[1], prepared=(trained(), ()))
        context.inputs = lambda *_: dense[1]
        chosen = choose(dense, tmp_path, context)
    assert [r.name for r in chosen.rows] == NAMES
    assert all(r.median_ms > 0 and r.agreement > 0.8 for r in chosen.rows)
    assert chosen.rows[0].ratio == 1
    assert chosen.artifact.precision == "int8"
