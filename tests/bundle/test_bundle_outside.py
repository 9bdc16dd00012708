"""No weight comes from outside a bundle, whatever its model names: an absolute path, one that climbs, or a file in the working folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import coreml_fixture
import flatbuffers
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from bundle_checks import failed_level, reseal
from bundle_fixture import make_bundle, tflite_bundle, tflite_file, weights
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from edgeprune.bundle.integrity import sums_text
from edgeprune.bundle.load import load
from edgeprune.bundle.manifest import MANIFEST, SUMS
from edgeprune.bundle.verify import verify
from edgeprune.errors import IntegrityError
from edgeprune.formats import load as load_format
from edgeprune.formats import names, reader
from edgeprune.formats.inside.outside import NamesOutside, check_self_contained
from edgeprune.formats.shared.model_bytes import packed
from edgeprune.formats.shared.protobuf import field_bytes
from edgeprune.records.artifact import Artifact
from edgeprune.records.formats import format_facts, format_names

ONNX = "models/model.fp32.onnx"


def artifact(form: str) -> Artifact:
    suffix = format_facts(form).suffix
    return Artifact(
        path=f"m{suffix}", format=form, precision="fp32", sha256="0" * 64, size_bytes=0,
        inputs=(), outputs=(),
    )  # fmt: skip


def refusal(form: str, content: bytes) -> str:
    with pytest.raises(IntegrityError) as error:
        check_self_contained(artifact(form), content)
    assert "\n" not in error.value.message
    return error.value.message


def _move_out(model: onnx.ModelProto, location: str, *, listed: bool = True) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == "weight")
    tensor.data_location = TensorProto.EXTERNAL
    if listed:
        external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")


@pytest.mark.parametrize("place", ["w.bin", "../w.bin", "absolute"])
def test_weights_in_another_file_are_refused_and_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder, here = make_bundle(tmp_path / "bundle"), tmp_path / "here"
    here.mkdir()
    location = str(tmp_path / "w.bin") if place == "absolute" else place
    (here / location).write_bytes(weights().tobytes())
    model = onnx.load(folder / ONNX)
    _move_out(model, location)
    (folder / ONNX).write_bytes(model.SerializeToString())
    reseal(folder)
    monkeypatch.chdir(here)
    failed = failed_level(folder)
    assert failed.level == 3
    assert f"{ONNX} takes 'weight' from another file" in failed.detail
    with pytest.raises(IntegrityError, match="must hold all its values"):
        load(folder)


def test_weights_beside_the_model_that_the_manifest_does_list_are_refused_too(
    tmp_path: Path,
) -> None:
    folder = make_bundle(tmp_path / "bundle")
    model = onnx.load(folder / ONNX)
    _move_out(model, "model.data")
    (folder / "models/model.data").write_bytes(weights().tobytes())
    (folder / ONNX).write_bytes(model.SerializeToString())
    value = json.loads((folder / MANIFEST).read_bytes())
    part = {"path": "models/model.data", "size_bytes": 0, "sha256": "0" * 64, "role": "model"}
    reseal(folder, files=[*value["files"], part])
    assert "from another file" in failed_level(folder).detail


def _constant(name: str = "far") -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.ones(4, np.float32), name)
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def _in_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=_constant()))


def _in_list(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Custom", [], ["c"], values=[_constant()]))


def _in_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [_constant()])
    outer = helper.make_graph(
        [helper.make_node("If", ["b"], ["d"], then_branch=inner)], "o", [], []
    )
    model.graph.node.append(helper.make_node("Loop", [], ["c"], body=outer))


def _in_sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=_constant(), indices=numpy_helper.from_array(np.arange(4)))
    )


def _in_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=_constant())
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "f", [], ["c"], [node], opset))


@pytest.mark.parametrize(
    "hide",
    [_in_attribute, _in_list, _in_branch, _in_sparse, _in_function],
    ids=lambda f: f.__name__,
)
def test_a_constant_is_found_wherever_it_is(
    tmp_path: Path, hide: Callable[[onnx.ModelProto], None]
) -> None:
    folder = make_bundle(tmp_path / "bundle")
    model = onnx.load(folder / ONNX)
    check_self_contained(artifact("tensorrt"), model.SerializeToString())
    hide(model)
    assert "takes 'far' from another file" in refusal("onnx", model.SerializeToString())


def test_a_location_without_a_file_name_and_a_graph_without_end_are_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    model = onnx.load(folder / ONNX)
    _move_out(model, "", listed=False)
    assert "takes 'weight'" in refusal("onnx", model.SerializeToString())
    deep = b""
    for _ in range(40):
        for number in (6, 5, 1):  # graph of an attribute of a node
            deep = field_bytes(number, deep)
    assert "nests more than 100 levels" in refusal("onnx", field_bytes(7, deep))
    assert "onnxruntime's own format" in refusal("onnx", b"\0\0\0\0ORTM" + bytes(40))


def _tflite(path: Path, change: Callable[[schema.ModelT], None]) -> bytes:
    tflite_file(path)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_buffers_of_a_tflite_file_lie_inside_it(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"

    def groups(model: schema.ModelT) -> None:
        group = schema.ExternalBufferGroupT()
        group.name = b"w.bin"
        model.externalBufferGroups = [group]

    def tensor(model: schema.ModelT) -> None:
        model.subgraphs[0].tensors[1].externalBuffer = 1

    def behind(model: schema.ModelT) -> None:
        model.buffers[2].data, model.buffers[2].offset, model.buffers[2].size = None, 64, 1 << 20

    check_self_contained(artifact("tflite"), _tflite(path, lambda model: None))
    assert "takes 'buffers' from" in refusal("tflite", _tflite(path, groups))
    assert "takes 'weight' from" in refusal("tflite", _tflite(path, tensor))
    assert "a buffer runs past its end" in refusal("tflite", _tflite(path, behind))


def test_a_package_takes_values_from_its_own_files_alone() -> None:
    files = coreml_fixture.files("int8")
    check_self_contained(artifact("coreml"), packed(files))
    model = "Data/com.apple.CoreML/model.mlmodel"
    for other in (b"@model_path/weights/weight.bio", b"/model_path/weights/weight.bin"):
        changed = files[model].replace(b"@model_path/weights/weight.bin", other)
        assert changed != files[model]
        assert f"takes '{other.decode()}'" in refusal("coreml", packed({**files, model: changed}))
    linked = files[model] + b"\xe2\x22\x00"  # field 556, linkedModel
    assert "is no ML program" in refusal("coreml", packed({**files, model: linked}))


@pytest.mark.parametrize("form", ["onnx", "tflite", "executorch", "coreml"])
def test_garbage_is_one_line(form: str) -> None:
    for content in (b"\xff" * 64, b"garbage" * 20):
        refusal(form, content)


# What a file is called decides which checks it meets


def test_the_formats_of_a_manifest_are_those_that_there_are() -> None:
    assert sorted(format_names()) == names()
    assert all(isinstance(reader(format_facts(name).kind), NamesOutside) for name in names())
    for name in names():
        assert load_format(name).info == format_facts(name)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "onnxx"}, "model.format Input should be 'tflite'"),
        ({"format": "executorch"}, "a model of the format executorch must be a .pte"),
        ({"format": "coreml"}, "a model of the format coreml must be a .mlpackage"),
        ({"precision": "fp16"}, "a model in fp16 must be of the format coreml"),
        ({"size_bytes": -1}, "model.size_bytes Input should be greater than or equal to 0"),
    ],
)
def test_a_model_under_another_name_is_refused(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    folder = make_bundle(tmp_path / "bundle")
    value = json.loads((folder / MANIFEST).read_bytes())
    reseal(folder, model={**value["model"], **changes})
    value = json.loads((folder / MANIFEST).read_bytes())
    value["model"].update(changes)
    (folder / MANIFEST).write_bytes(json.dumps(value).encode())
    failed = failed_level(folder)
    assert failed.level == 0
    assert why in failed.detail


def test_a_float_file_that_is_called_int8_of_an_unknown_kind_does_not_pass(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    value = json.loads((folder / MANIFEST).read_bytes())
    runtime = {**value["runtime"], "name": "coreml"}
    reseal(folder, runtime=runtime)
    assert "must run in onnxruntime, not coreml" in failed_level(folder).detail


def test_a_size_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    for folder in (make_bundle(tmp_path / "bundle"), tflite_bundle(tmp_path)):
        value = json.loads((folder / MANIFEST).read_bytes())
        model = {**value["model"]}
        value["model"]["size_bytes"] = 5
        (folder / MANIFEST).write_bytes(json.dumps(value).encode())
        (folder / SUMS).write_bytes(sums_text(folder))
        size = (folder / model["path"]).stat().st_size
        assert f"must have the 5 bytes of size_bytes, but has {size}" in failed_level(folder).detail


def test_a_whole_bundle_still_passes(tmp_path: Path) -> None:
    assert verify(make_bundle(tmp_path / "bundle", eight_bit=True)).ok
