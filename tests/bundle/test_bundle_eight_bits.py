"""What is named INT8 is INT8, but for the layers that the manifest names: asked by verify, and before a bundle is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import coreml_fixture
import numpy as np
import pytest
import torch
from bundle_checks import failed_level, level_checks, reseal, this_machine
from bundle_fixture import PREPROCESS, facts, images, make_bundle, onnx_file
from torch import nn

from edgeprune import formats
from edgeprune.bundle import verify
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.devices.agent.runtimes import infer, open_model
from edgeprune.errors import FormatError, IntegrityError
from edgeprune.formats import QuantizeOptions
from edgeprune.formats.inside.anatomy import anatomy
from edgeprune.formats.inside.eight_bits import layers_line, require_eight_bits
from edgeprune.formats.shared.model_bytes import packed
from edgeprune.pipeline.files.export import _not_int8, require_int8
from edgeprune.pipeline.files.records import PrunedFiles
from edgeprune.pipeline.run_folder import Stage
from edgeprune.pipeline.stages.precision import _require_int8
from edgeprune.records.artifact import Artifact
from edgeprune.records.int8 import Int8Report, Int8Try, LayerFallback
from edgeprune.workload.dataset import model_input, to_layout

RUNTIME = {"tflite": "litert", "onnx": "onnxruntime"}
FLOATS = ("0", "2", "4")


@dataclass(frozen=True)
class Made:
    """The files of a net of four layers: in float, in INT8, and in INT8 but for three layers."""

    form: str
    folder: Path
    fp32: Artifact
    int8: Artifact
    mixed: Artifact

    def file(self, artifact: Artifact) -> Path:
        return self.folder / artifact.path


@pytest.fixture(scope="module", params=["tflite", "onnx"])
def made(request, tmp_path_factory) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()  # fmt: skip
    form, folder = formats.load(request.param), tmp_path_factory.mktemp(request.param)
    x, suffix = model_input(images(32), PREPROCESS), form.info.suffix
    fp32 = form.export(model, x[:1], folder / f"fp32{suffix}")
    files = {}
    for name, layers in (("int8", ()), ("mixed", FLOATS)):
        options = QuantizeOptions(float_layers=layers)
        files[name] = form.quantize(
            folder / fp32.path, x, folder / f"{name}{suffix}", model=model, options=options
        )
    return Made(request.param, folder, fp32, **files)


def bundle(made: Made, artifact: Artifact, folder: Path, *float_layers: str) -> Path:
    content = made.file(artifact).read_bytes()
    loaded = open_model(content, RUNTIME[made.form], 1, True)
    layout = formats.load(made.form).info.layout
    answers = infer(loaded, to_layout(model_input(images(), PREPROCESS), layout))
    payload = Payload(artifact, made.file(artifact), images(), np.asarray(answers, np.float32))
    stated = facts(runtime=RUNTIME[made.form], float_layers=float_layers)
    return write_bundle(folder, stated, payload)


def test_layers_in_float_on_purpose_are_in_neither_share(made, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "LOCAL", this_machine(tmp_path))
    folder = bundle(made, made.mixed, tmp_path / "bundle", *FLOATS)
    report = verify.verify(folder)
    assert report.ok, report
    operators = level_checks(report, 3)["operators"]
    assert "1 of 4 with weights compute in 8 bits" in operators.detail
    assert operators.detail.endswith("left in float on purpose: 0, 2, 4")
    assert level_checks(report, 4)["delegate"].status == "passed"
    assert b"| left in float | 0, 2, 4 |" in (folder / "README.md").read_bytes()


def test_the_same_file_fails_where_the_manifest_does_not_say_so(made, tmp_path):
    failed = failed_level(bundle(made, made.mixed, tmp_path / "bundle"))
    assert failed.level == 3
    assert "at least 90% of its weights in 8 bits" in failed.detail
    fewer = failed_level(bundle(made, made.mixed, tmp_path / "fewer", *FLOATS[:2]))
    assert "beside the 2 that were left in float on purpose" in fewer.detail


def test_what_the_manifest_says_of_its_layers_must_be_true(made, tmp_path):
    absent = failed_level(bundle(made, made.mixed, tmp_path / "absent", *FLOATS, "9"))
    assert "float_layers name '9'" in absent.detail
    assert "does not have" in absent.detail
    eight = failed_level(bundle(made, made.int8, tmp_path / "eight", "0"))
    assert "float_layers name '0', which computes in 8 bits" in eight.detail


def test_float_layers_do_not_make_a_float_file_int8(made, tmp_path):
    artifact = made.fp32.model_copy(update={"precision": "int8"})
    failed = failed_level(bundle(made, artifact, tmp_path / "bundle", *FLOATS, "8"))
    assert "stores 0%" in failed.detail


def test_small_layers_in_float_are_counted_as_layers(made):
    """A float layer with few weights passes the share of weights, not that of layers."""
    content = made.file(made.mixed).read_bytes()
    with pytest.raises(IntegrityError, match="but 1 of 2 do beside the 2"):
        layers_line(made.mixed, anatomy(made.form, content), FLOATS[1:])


def test_layers_of_a_format_that_is_not_read_cannot_be_left_out(tmp_path):
    artifact = onnx_file(tmp_path / "m.onnx", eight_bit=True)
    package = artifact.model_copy(update={"path": "m.mlpackage", "format": "coreml"})
    content = packed(coreml_fixture.files("int8"))
    require_eight_bits(package, content)
    with pytest.raises(IntegrityError, match="layers of coreml files are not read here"):
        require_eight_bits(package, content, ("stem",))
    with pytest.raises(IntegrityError, match="stores 0%"):
        require_eight_bits(package, packed(coreml_fixture.files("fp16")))


def test_an_old_manifest_without_float_layers_is_read(tmp_path):
    folder = make_bundle(tmp_path / "bundle", eight_bit=True)
    value = json.loads((folder / "manifest.json").read_bytes())
    assert value.pop("float_layers") == []
    (folder / "manifest.json").write_text(json.dumps(value))
    reseal(folder)
    assert verify.verify(folder).ok


# Before a bundle is written


def files_of(made: Made, artifact: Artifact, *float_layers: str) -> PrunedFiles:
    own = Int8Try(name="own ranges", quality=1.0, loss_nats=0.0)
    layers = tuple(LayerFallback(layer=n, gain_nats=1.0, in_float=True) for n in float_layers)
    report = Int8Report(
        effort="auto",
        metric="accuracy",
        n=8,
        fp32=1.0,
        tries=(own,),
        chosen=own.name,
        layers=layers,
    )
    return PrunedFiles(fp32=made.fp32, int8=artifact, built_in_agreement=None, quantised=report)


def stage(made: Made, files: PrunedFiles) -> Stage[PrunedFiles]:
    return Stage(made.folder, "d", files)


def test_deploy_refuses_a_float_file_that_is_named_int8(made):
    with pytest.raises(FormatError, match="cannot ship as INT8") as error:
        _require_int8(stage(made, files_of(made, made.fp32)))
    assert "stores 0%" in error.value.message
    assert "\n" not in str(error.value)
    assert "precisions: [fp32]" in (error.value.hint or "")


def test_deploy_takes_the_layers_that_the_search_left_in_float_and_no_others(made):
    files = files_of(made, made.mixed, *reversed(FLOATS))
    assert files.float_layers("int8") == FLOATS
    assert files.float_layers("fp32") == ()
    _require_int8(stage(made, files))
    _require_int8(stage(made, files_of(made, made.int8)))
    with pytest.raises(FormatError, match="cannot ship as INT8"):
        _require_int8(stage(made, files_of(made, made.mixed)))


def test_files_that_are_converted_and_not_searched_have_no_layers_in_float(made):
    files = files_of(made, made.mixed, *FLOATS)
    other = files.model_copy(update={"shipping": {"int8": made.int8}})
    assert other.float_layers("int8") == ()


@pytest.mark.parametrize(
    ("precisions", "outcome"), [(("fp32",), 0), (("fp32", "int8"), 1), (("int8",), "refused")]
)
def test_a_dense_net_that_cannot_be_int8_is_known_before_the_search(made, precisions, outcome):
    context = SimpleNamespace(job=SimpleNamespace(target=SimpleNamespace(precisions=precisions)))
    assert _not_int8(context, made.int8, made.folder) == ()
    if outcome == "refused":
        with pytest.raises(FormatError, match="cannot ship as INT8"):
            _not_int8(context, made.fp32, made.folder)
        return
    assert len(_not_int8(context, made.fp32, made.folder)) == outcome


def test_a_sound_int8_file_of_another_kind_is_taken(tmp_path):
    path = tmp_path / "m.onnx"
    require_int8(onnx_file(path, eight_bit=True), path)
    with pytest.raises(FormatError, match="does not have"):
        require_int8(onnx_file(path, eight_bit=True), path, ("head",))
