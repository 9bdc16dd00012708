"""Core ML packages: what is in them, that it is the net, what Xcode shows, and what is refused. Importing coremltools takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import coreml_fixture
import numpy as np
import pytest
import torch
from coreml_fixture import FACTS, LABELS, labels_of, raw, read_program, seen
from torch import nn
from torch.nn import functional

from edgeprune.errors import FormatError, MissingTool, ModelError
from edgeprune.formats import AppFacts
from edgeprune.formats.coreml import convert
from edgeprune.formats.coreml import format as coreml
from edgeprune.formats.coreml.check import check_file, folded_weights, raw_input
from edgeprune.formats.coreml.evaluate import evaluate
from edgeprune.formats.coreml.package import (
    MANIFEST,
    WEIGHTS,
    main_block,
    notes,
    read_files,
    read_package,
)
from edgeprune.formats.coreml.program import program_of
from edgeprune.formats.shared.model_bytes import files_of, model_bytes
from edgeprune.records.files import sha256_bytes
from edgeprune.records.workload import Preprocess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The packages of the fixture net: half precision, INT8, and INT8 weights alone."""
    folder = tmp_path_factory.mktemp("coreml")
    model, x = coreml_fixture.build(), seen(raw(32))
    form = coreml.CoremlFormat(FACTS)
    lean = coreml.CoremlFormat(AppFacts(FACTS.preprocess, LABELS, int8_scheme=coreml.WEIGHT_ONLY))
    paths = {name: folder / f"{name}.mlpackage" for name in ("fp16", "int8", "lean")}
    form.export(model, x[:1], paths["fp16"])
    form.quantize(paths["fp16"], x, paths["int8"], model=model)
    lean.quantize(paths["fp16"], x, paths["lean"], model=model)
    return paths


def torch_answers(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def changed(path: Path, spec: object, weights: bytes, model: nn.Module, **kind: bool) -> None:
    """Check a package whose weights or operations were tampered with."""
    x = seen(raw(2))
    check_file(program_of(spec, weights), model, model, x, coreml.entry_of(spec), **kind)


def test_the_record_says_what_is_stored_and_how_it_is_computed(made) -> None:
    wide, narrow, lean = (coreml.FORMAT.describe(made[name]) for name in ("fp16", "int8", "lean"))
    assert (wide.precision, narrow.precision, lean.precision) == ("fp16", "int8", "int8")
    assert wide.op_counts["weights:float16"] == 3
    assert wide.op_counts["conv"] == 2
    assert "quantize" not in wide.op_counts
    for artifact in (narrow, lean):
        assert artifact.op_counts["weights:int8"] == 3
        assert "weights:float16" not in artifact.op_counts
        assert (
            artifact.size_bytes == sum(map(len, files_of(made["int8"]).values()))
            or artifact is lean
        )
    assert narrow.op_counts["int8:conv"] == 2
    assert narrow.op_counts["quantize"] > 2
    assert "quantize" not in lean.op_counts
    assert [t.name for t in wide.inputs] == ["image"]
    assert (wide.inputs[0].shape, wide.inputs[0].layout) == ((1, 1, 8, 8), "NCHW")
    assert [(t.name, t.shape) for t in wide.outputs] == [("output", (1, 3))]
    assert wide.sha256 == sha256_bytes(model_bytes(made["fp16"]))


def test_every_weight_is_the_models_within_its_rounding(made) -> None:
    expected = folded_weights(coreml_fixture.build())
    assert expected is not None
    assert [name for name, _ in expected] == ["stem", "depthwise", "classifier"]
    for name in ("fp16", "int8", "lean"):
        found = list(read_program(made[name]).weights())
        assert len(found) == 3
        for (_, wanted), (_, value, step) in zip(expected, found, strict=True):
            if step is None:
                assert np.array_equal(value, wanted.astype(np.float16).astype(np.float32))
                continue
            steps = step.reshape(-1, *[1] * (value.ndim - 1))
            assert (np.abs(value - wanted) <= 0.51 * steps + 1e-3 * np.abs(wanted)).all()
            whole = value / steps
            assert np.abs(whole - np.rint(whole)).max() < 1e-3
            assert np.abs(whole).max() <= 128


@pytest.mark.parametrize(("name", "limit"), [("fp16", 0.005), ("int8", 0.1), ("lean", 0.03)])
def test_the_answers_worked_out_from_the_file_are_torchs(made, name: str, limit: float) -> None:
    x = seen(raw(24, seed=9))
    wanted = torch_answers(coreml_fixture.build(), x)
    found = coreml.CoremlFormat().evaluate(made[name], x)
    assert found.shape == (24, 3)
    assert 0 < np.abs(found - wanted).max() <= limit * np.abs(wanted).max()


def test_several_samples_at_once_answer_as_one_by_one(made) -> None:
    program, x = read_program(made["fp16"]), raw(5).astype(np.float32)[:, None]
    together = evaluate(program, x, "output")
    alone = np.concatenate([evaluate(program, x[i : i + 1], "output") for i in range(5)])
    assert np.allclose(together, alone, atol=1e-2 * np.abs(alone).max())


def test_xcode_is_told_what_it_shows(made) -> None:
    spec, _ = read_package(made["int8"])
    metadata = spec.description.metadata
    assert (metadata.author, metadata.license, metadata.versionString) == (
        "the tests",
        "Apache-2.0",
        "1.2",
    )
    assert metadata.shortDescription == "three kinds of noise"
    assert spec.specificationVersion == 8  # iOS 17
    known = notes(spec)
    assert known["precision"] == "int8"
    assert known["int8_scheme"] == "static-int8-per-channel"
    assert known["compute_units"] == "ALL"
    assert known["target"] == "iphone"
    assert known["executed"].startswith("not run")
    assert "within" in known["checked"]
    assert labels_of(made["int8"]) == LABELS
    assert [o.name for o in spec.description.output] == ["classLabel", "classLabel_probs", "output"]
    assert spec.description.predictedFeatureName == "classLabel"
    assert spec.description.input[0].type.WhichOneof("Type") == "imageType"
    assert not any("date" in key for key in metadata.userDefined)


def test_equal_nets_give_equal_bytes(made, tmp_path: Path) -> None:
    model, x = coreml_fixture.build(), seen(raw(32))
    form, wide, narrow = (
        coreml.CoremlFormat(FACTS),
        tmp_path / "fp16.mlpackage",
        tmp_path / "int8.mlpackage",
    )
    form.export(model, x[:1], wide)
    form.quantize(wide, x, narrow, model=model)
    assert files_of(wide) == files_of(made["fp16"])
    assert files_of(narrow) == files_of(made["int8"])


def test_an_equal_net_gives_the_package_in_the_repository_but_for_the_last_bits(made) -> None:
    x = seen(raw(24, seed=9))
    for precision, limit in (("fp16", 0.005), ("int8", 0.1)):
        here, there = files_of(made[precision]), coreml_fixture.files(precision)
        assert here.keys() == there.keys()
        assert here[MANIFEST] == there[MANIFEST]
        # Batch norms are folded and ranges are summed in floats, whose last bits are the processor's own.
        ours, theirs = (
            coreml.FORMAT.describe(p) for p in (made[precision], coreml_fixture.package(precision))
        )
        assert ours.op_counts == theirs.op_counts
        assert ours.size_bytes == theirs.size_bytes
        answers = [
            coreml.CoremlFormat().evaluate(p, x)
            for p in (made[precision], coreml_fixture.package(precision))
        ]
        assert np.abs(answers[0] - answers[1]).max() <= limit * np.abs(answers[1]).max()
    manifest = json.loads(files_of(made["fp16"])[MANIFEST])
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]


def test_the_class_is_told_as_coremltools_tells_it(made) -> None:
    import coremltools

    traced = torch.jit.trace(
        nn.Sequential(coreml_fixture.build(), nn.Softmax(1)), torch.zeros(1, 1, 8, 8)
    )
    theirs = coremltools.convert(
        traced,
        inputs=[coremltools.TensorType(name="input", shape=(1, 1, 8, 8))],
        classifier_config=coremltools.ClassifierConfig(list(LABELS)),
        minimum_deployment_target=coremltools.target.iOS17,
        skip_model_load=True,
    ).get_spec()
    mine, _ = read_package(made["fp16"])

    def classify(spec):
        (found,) = [o for o in main_block(spec).operations if o.type == "classify"]
        return found

    a, b = classify(mine), classify(theirs)
    assert a.inputs["classes"] == b.inputs["classes"]
    assert list(a.outputs) == list(b.outputs)
    described = [
        [o for o in s.description.output if o.name.startswith("class")] for s in (mine, theirs)
    ]
    assert [o.type for o in described[0]] == [o.type for o in described[1]]


@pytest.mark.parametrize("std", [(0.25,), (0.229, 0.224, 0.225)])
def test_a_colour_image_enters_by_one_scale_or_is_normalised_inside(tmp_path, std) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    mean = (0.485, 0.456, 0.406)
    form = coreml.CoremlFormat(AppFacts(Preprocess(mean=mean, std=std), ("a", "b")))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6)).astype(np.float32)
    wide = np.reshape(std * (3 // len(std)), (1, 3, 1, 1))
    x = ((pixels / 255 - np.reshape(mean, (1, 3, 1, 1))) / wide).astype(np.float32)
    form.export(model, x[:1], tmp_path / "net.mlpackage")
    spec, _ = read_package(tmp_path / "net.mlpackage")
    entry = coreml.entry_of(spec)
    assert bool(entry.std) == (len(std) == 3)
    assert np.allclose(raw_input(x, entry), pixels, atol=1e-2)
    found = evaluate(read_program(tmp_path / "net.mlpackage"), pixels, "output")
    wanted = torch_answers(model, x)
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()


def test_data_that_are_no_images_enter_as_they_are(tmp_path) -> None:
    model = coreml_fixture.build()
    form = coreml.CoremlFormat(AppFacts(Preprocess(kind="none"), LABELS))
    record = form.export(model, seen(raw(1)), tmp_path / "net.mlpackage")
    assert [t.name for t in record.inputs] == ["input"]
    odd = coreml.CoremlFormat(AppFacts(Preprocess(mean=(0.5,), std=(0.5,)), LABELS))
    odd.export(model, seen(raw(1)), tmp_path / "odd.mlpackage")  # colour data, a grey model
    assert "tensor input" in notes(read_package(tmp_path / "odd.mlpackage")[0])["input_note"]


def test_a_file_with_another_weight_is_refused(made) -> None:
    spec, files = read_package(made["fp16"])
    weights = bytearray(files[WEIGHTS])
    weights[129] ^= 0x40  # the exponent of the first weight
    with pytest.raises(FormatError, match="the weight of stem"):
        changed(made["fp16"], spec, bytes(weights), coreml_fixture.build(), int8=False)


def test_a_file_that_answers_otherwise_is_refused(made) -> None:
    spec, files = read_files(files_of(made["fp16"]), "net")
    for operation in main_block(spec).operations:
        if operation.type == "relu":
            operation.type = "tanh"
    with pytest.raises(FormatError, match="differs from torch"):
        changed(made["fp16"], spec, files[WEIGHTS], coreml_fixture.build(), int8=False)


def test_a_file_with_float_weights_is_no_int8_file(made) -> None:
    spec, files = read_package(made["fp16"])
    with pytest.raises(FormatError, match="must have INT8 weights throughout, but 3 of 3"):
        changed(made["fp16"], spec, files[WEIGHTS], coreml_fixture.build(), int8=True)


def test_the_pass_that_loses_a_scale_is_left_out_and_would_be_caught(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(convert, "BROKEN_PASS", "common::canonicalize_quantized_lut_pattern")
    model, form = coreml_fixture.build(), coreml.CoremlFormat(FACTS)
    x = seen(raw(32))
    with torch.no_grad():
        model.classifier.weight *= 10  # so that a wrong scale before it shows
    form.export(model, x[:1], tmp_path / "net.mlpackage")
    asked = convert.calibrated_model(model, x)
    found = convert.quantized_model(asked, (1, 1, 8, 8), convert.entry_for(FACTS, x.shape), True)
    merged = program_of(found.get_spec(), convert.weight_bytes(found))
    by_name = {o.outputs[0]: o for o in merged.operations}
    reshape = next(o for o in merged.operations if o.type == "reshape")
    # Integers are reshaped: two scales meet.
    assert by_name[reshape.inputs["x"][0]].type == "quantize"


# Wrong inputs


class Fourier(nn.Module):
    """Has an operation that coremltools lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Pooled(nn.Module):
    """Poolings that leave their stride to the window."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.avg_pool2d(functional.max_pool2d(self.conv(x), 2), 2)
        return self.head(x.mean((2, 3)))


def test_a_pooling_without_a_stride_is_converted(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Pooled().eval(), seen(raw(16))
    paths = [tmp_path / f"{name}.mlpackage" for name in ("fp32", "int8")]
    form = coreml.CoremlFormat()
    form.export(model, x[:1], paths[0])
    form.quantize(paths[0], x, paths[1], model=model)
    assert all(form.describe(path).op_counts for path in paths)


def test_an_operation_that_core_ml_lacks_is_named_with_its_layer(tmp_path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), Fourier()).eval()
    with pytest.raises(FormatError, match=r"bessel_j0.*layer 2"):
        coreml.CoremlFormat().export(model, seen(raw(1)), tmp_path / "net.mlpackage")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(("a", "b"), "there are 2 labels"), (("a", "b", "a"), "'a' stands twice")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, problem: str) -> None:
    form = coreml.CoremlFormat(AppFacts(FACTS.preprocess, labels))
    with pytest.raises(ModelError, match=problem):
        form.export(coreml_fixture.build(), seen(raw(1)), tmp_path / "net.mlpackage")


def test_a_scheme_that_core_ml_lacks_is_refused(tmp_path, made) -> None:
    form = coreml.CoremlFormat(AppFacts(FACTS.preprocess, LABELS, int8_scheme="dynamic-int8"))
    with pytest.raises(FormatError, match="scheme dynamic-int8"):
        form.quantize(
            made["fp16"], seen(raw(8)), tmp_path / "q.mlpackage", model=coreml_fixture.build()
        )


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingTool, match="coremltools is not installed") as error:
        coreml.CoremlFormat().export(coreml_fixture.build(), seen(raw(1)), tmp_path / "n.mlpackage")
    assert "edgeprune[coreml]" in (error.value.hint or "")
