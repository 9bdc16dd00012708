"""INT8 bundles for a Jetson carry the same net in FP32: the board builds FP16 from it, and the fastest that holds is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from bundle_checks import failed_level, level_checks, reseal
from bundle_fixture import expected, facts, images, onnx_file
from fakejetson import build_engine, calls, make
from pydantic import ValidationError

from edgeprune.bundle.golden import npy_bytes
from edgeprune.bundle.manifest import FLOAT_OUTPUTS, Manifest, Quality
from edgeprune.bundle.schemas import schema_files
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import FloatTwin, Payload, write_bundle, zip_path
from edgeprune.errors import IntegrityError, ModelError, SpecError
from edgeprune.formats.shared.metadata import carrier
from edgeprune.records.base import read_json
from edgeprune.records.files import sha256_bytes

FLOAT, INT8 = "models/model.fp32.onnx", "models/model.int8.onnx"
QUALITY = Quality(metric="accuracy", split="development", n=200, dense=0.9, shipped=0.895)
ALL_MS = '{"fp16": 1.0, "mixed": 1.5, "int8": 2.5}'
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def payload(folder: Path) -> Payload:
    """The classifier in INT8 for TensorRT, and the same in FP32."""
    artifacts = []
    for name, eight_bit in (("int8", True), ("fp32", False)):
        made = onnx_file(folder / f"{name}.onnx", eight_bit=eight_bit)
        artifacts.append(made.model_copy(update={"format": "tensorrt"}))
    int8, fp32 = artifacts
    answers = expected(images())
    twin = FloatTwin(fp32, folder / "fp32.onnx", answers, QUALITY)
    return Payload(int8, folder / "int8.onnx", images(), answers, float_twin=twin)


def make_twin(folder: Path, **changes: object) -> Path:
    """A bundle with both files; ``changes`` are those of the float twin."""
    made = payload(folder)
    assert made.float_twin is not None
    content = replace(made, float_twin=replace(made.float_twin, **changes))
    return write_bundle(folder / "bundle", facts(target="jetson-orin-nano"), content)


def make_older(folder: Path) -> Path:
    """A bundle as it was written before there was a float model: its manifest does not know the key."""
    content = replace(payload(folder), float_twin=None)
    bundle = write_bundle(folder / "bundle", facts(target="jetson-orin-nano"), content)
    path = bundle / "manifest.json"
    value = json.loads(path.read_bytes())
    assert value.pop("float_model") is None
    path.write_text(json.dumps(value))
    reseal(bundle)
    assert "float_model" not in path.read_text()
    return bundle


@pytest.fixture
def jetpack(tmp_path):
    return make(tmp_path / "jetpack")


def test_the_manifest_names_the_float_model_with_digest_size_answers_and_quality(tmp_path):
    bundle = make_twin(tmp_path)
    found = read_json(Manifest, bundle / "manifest.json")
    assert found.float_model is not None
    content = (bundle / FLOAT).read_bytes()
    assert found.float_model.model.path == FLOAT
    assert found.float_model.model.sha256 == sha256_bytes(content)
    assert found.float_model.model.size_bytes == len(content)
    assert found.float_model.source_sha256 == sha256_bytes((tmp_path / "fp32.onnx").read_bytes())
    assert [f.path for f in found.files if f.role == "float_model"] == [FLOAT]
    assert [f.path for f in found.files if f.role == "model"] == [INT8] == [found.model.path]
    golden = found.float_model.golden
    assert (golden.outputs, golden.n) == (FLOAT_OUTPUTS, len(images()))
    # A half-precision engine is allowed 1 % of the largest answer.
    assert golden.tolerance.atol == pytest.approx(0.01 * np.abs(expected(images())).max())
    assert found.float_model.quality == QUALITY
    schema = json.loads(schema_files()["bundle-manifest.schema.json"])
    jsonschema.validate(json.loads((bundle / "manifest.json").read_bytes()), schema)
    assert "float_model" in schema["$defs"]["BundleFile"]["properties"]["role"]["enum"]


def test_the_float_model_carries_the_bundle_s_texts_and_people_and_programs_read_of_it(tmp_path):
    bundle = make_twin(tmp_path)
    found = read_json(Manifest, bundle / "manifest.json")
    inside = carrier(".onnx").read((bundle / FLOAT).read_bytes())
    assert inside.texts["edgeprune.manifest_id"] == found.manifest_id
    assert inside.model == (tmp_path / "fp32.onnx").read_bytes()
    readme = (bundle / "README.md").read_text()
    assert f"| the same net in FP32, to build FP16 from | `{FLOAT}` (fp32, " in readme
    assert "accuracy 89.50%, not timed" in readme
    assert (
        f"It builds FP16 from `{FLOAT}`, and INT8 and mixed (INT8 with FP16) from `{INT8}`"
        in readme
    )
    card = (bundle / "MODEL_CARD.md").read_text()
    assert f"`{FLOAT}` is the same net in FP32, from which the board builds FP16" in card
    bom = json.loads((bundle / "sbom/bom.cdx.json").read_bytes())
    (twin,) = (part for part in bom["components"] if part["bom-ref"] == "float-model")
    assert twin["hashes"][0]["content"] == found.float_model.model.sha256


def test_a_bundle_with_a_float_model_has_the_same_bytes_when_it_is_made_again(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1735689600")
    zips = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        zips.append(zip_path(make_twin(tmp_path / name)).read_bytes())
    assert zips[0] == zips[1]


def test_verify_looks_at_the_float_model_and_asks_it_the_golden_samples(tmp_path):
    report = verify(make_twin(tmp_path))
    assert report.ok
    inside, asked = (
        level_checks(report, 3)["float model"],
        level_checks(report, 4)["golden of the float model"],
    )
    assert (inside.status, asked.status) == ("passed", "passed")
    assert inside.detail.startswith("FP32, of the same layers; ")
    assert asked.detail.startswith("8 samples, largest error ")


def test_an_older_bundle_without_a_float_model_still_passes(tmp_path):
    report = verify(make_older(tmp_path))
    assert report.ok
    assert "float model" not in level_checks(report, 3)


def test_a_changed_float_model_fails_by_its_digest(tmp_path):
    bundle = make_twin(tmp_path)
    (bundle / FLOAT).write_bytes((bundle / FLOAT).read_bytes() + b"\0")
    failed = failed_level(bundle)
    assert failed.level == 1
    assert failed.detail.startswith(f"{FLOAT} is not what its digest says")


def with_float(bundle: Path, source: bytes) -> str:
    """What verify says when the float model is another file with all the right texts and digests."""
    held = carrier(".onnx")
    inside = held.read((bundle / FLOAT).read_bytes())
    labels = (bundle / "labels.txt").read_bytes()
    texts = {**inside.texts, "edgeprune.source_sha256": sha256_bytes(source)}
    (bundle / FLOAT).write_bytes(held.attach(source, texts, labels))
    value = json.loads((bundle / "manifest.json").read_bytes())["float_model"]
    reseal(bundle, float_model={**value, "source_sha256": sha256_bytes(source)})
    failed = failed_level(bundle)
    assert failed.level == 3
    return failed.detail


def test_a_float_model_that_is_not_one_is_told_though_every_digest_is_right(tmp_path):
    bundle = make_twin(tmp_path)
    said = with_float(bundle, (tmp_path / "int8.onnx").read_bytes())
    assert said == f"a float model must be in FP32 throughout, but {FLOAT} stores weights in int8"


def test_a_float_model_of_another_net_is_told(tmp_path):
    from onnx import load, numpy_helper

    bundle = make_twin(tmp_path)
    other = load(tmp_path / "fp32.onnx")
    (weight,) = other.graph.initializer
    wider = np.concatenate([numpy_helper.to_array(weight)] * 2)
    weight.CopyFrom(numpy_helper.from_array(wider, weight.name))
    said = with_float(bundle, other.SerializeToString())
    assert "must have the layers of the INT8 file" in said
    assert said.endswith("has 1 with 288 weights and the other 1 with 144")


def test_a_float_model_with_other_answers_or_texts_fails(tmp_path):
    bundle = make_twin(tmp_path)
    answers = expected(images())
    (bundle / FLOAT_OUTPUTS).write_bytes(npy_bytes(answers - np.float32(1)))
    reseal(bundle)
    failed = failed_level(bundle)
    assert failed.level == 4
    assert failed.detail.startswith("golden of the float model: 8 samples, largest error 1")
    (bundle / FLOAT_OUTPUTS).write_bytes(npy_bytes(answers))
    reseal(bundle)
    assert verify(bundle).ok
    (bundle / FLOAT).write_bytes(carrier(".onnx").read((bundle / FLOAT).read_bytes()).model)
    reseal(bundle)
    assert "must carry the texts" in failed_level(bundle).detail


def test_a_manifest_cannot_say_what_is_not_so_of_its_float_model(tmp_path):
    value = json.loads((make_twin(tmp_path) / "manifest.json").read_bytes())
    found = value["float_model"]

    def told(**changes: object) -> str:
        with pytest.raises(ValidationError) as caught:
            Manifest.model_validate_json(json.dumps({**value, **changes}))
        return str(caught.value)

    def twin(part: str, **changes: object) -> dict[str, object]:
        return {"float_model": {**found, part: {**found[part], **changes}}}

    assert f"float_model must describe {FLOAT}" in told(float_model=None)
    assert "must be a file in FP32" in told(**twin("model", precision="int8"))
    assert "inputs and outputs of the model" in told(
        **twin("model", inputs=value["model"]["outputs"])
    )
    assert f"files must list {FLOAT} as float_model" in told(**twin("model", sha256="0" * 64))
    assert "golden samples of the model" in told(**twin("golden", n=9))
    steps = {"max_abs_error_steps": 3, "min_argmax_agreement": 0.8}
    assert "and atol" in told(**twin("golden", tolerance=steps))
    fp32 = {**value["model"], "precision": "fp32"}
    assert "needs a model in INT8 for tensorrt" in told(model=fp32)


def test_a_float_twin_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match="as many outputs, but got 8 and 7"):
        make_twin(tmp_path, golden_outputs=expected(images())[:7])
    (tmp_path / "other.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"other.onnx is not the file that was verified"):
        make_twin(tmp_path, model_file=tmp_path / "other.onnx")
    made = payload(tmp_path)
    swapped = replace(made, model=made.float_twin.model, model_file=made.float_twin.model_file)
    with pytest.raises(SpecError, match="float_model needs a model in INT8"):
        write_bundle(tmp_path / "bundle", facts(), swapped)
    assert not (tmp_path / "bundle").exists()


@needs_compiler
def test_all_three_precisions_are_built_from_their_file_and_the_fastest_is_kept(tmp_path, jetpack):
    bundle = make_twin(tmp_path)
    done = build_engine(bundle, jetpack, MS=ALL_MS)
    assert done.returncode == 0, done.stdout + done.stderr
    *tried, last = done.stdout.splitlines()
    assert [line.split()[0] for line in tried] == ["fp16", "mixed", "int8"]
    assert all(line.endswith(": ok") for line in tried)
    assert last.startswith(f"PASS: fp16, 1 ms of GPU time without copies, from {FLOAT}: ")
    built = [set(call) for call in calls(tmp_path) if any(a.startswith("--onnx") for a in call)]
    sources = {name: f"--onnx={bundle / path}" for name, path in (("f", FLOAT), ("q", INT8))}
    assert [sources["f"] in call for call in built] == [True, False, False]
    assert [sources["q"] in call for call in built] == [False, True, True]
    assert [{"--fp16", "--int8"} & call for call in built] == [
        {"--fp16"}, {"--fp16", "--int8"}, {"--int8"},
    ]  # fmt: skip
    note = json.loads((tmp_path / "bundle-engine" / "engine.json").read_text())
    assert (note["precision"], note["onnx"], note["ms"]) == ("fp16", FLOAT, 1.0)
    assert (bundle / FLOAT).read_bytes() in (
        tmp_path / "bundle-engine" / "model.engine"
    ).read_bytes()
    assert verify(bundle).ok  # nothing was written into it


@needs_compiler
@pytest.mark.parametrize(
    ("variables", "kept", "said"),
    [
        ({"MEMORY": "fp16"}, "mixed", "fp16  trtexec failed: Error[2]: Error Code 2: OutOfMemory"),
        ({"MEMORY": "mixed,fp16"}, "int8", "mixed trtexec failed: "),
        ({"UNSUPPORTED": "fp16"}, "mixed", '[Odd -> "odd"]: [6] Invalid Node - /odd'),
        ({"OFF": "fp16"}, "mixed", "NOT OK"),
        ({"OFF": "mixed,int8"}, "fp16", "NOT OK"),
        ({"MEMORY": "mixed,int8"}, "fp16", "int8  trtexec failed: "),
    ],
)
def test_one_that_cannot_be_built_or_answers_wrong_does_not_stop_the_others(
    tmp_path, jetpack, variables, kept, said
):
    done = build_engine(make_twin(tmp_path), jetpack, MS=ALL_MS, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    *tried, last = done.stdout.splitlines()
    assert [line.split()[0] for line in tried] == ["fp16", "mixed", "int8"]
    assert said in done.stdout
    assert last.startswith(f"PASS: {kept}, ")


@needs_compiler
def test_fp16_is_held_to_the_answers_of_the_fp32_file_within_half_precision(tmp_path, jetpack):
    answers = expected(images())
    allowed = 0.01 * float(np.abs(answers).max())
    (tmp_path / "near").mkdir()
    near = make_twin(tmp_path / "near", golden_outputs=answers + np.float32(0.9 * allowed))
    done = build_engine(near, jetpack, MS=ALL_MS)
    assert done.stdout.splitlines()[-1].startswith("PASS: fp16, ")
    (tmp_path / "far").mkdir()
    far = make_twin(tmp_path / "far", golden_outputs=answers + np.float32(1.2 * allowed))
    done = build_engine(far, jetpack, MS=ALL_MS)
    assert done.stdout.splitlines()[0].endswith("NOT OK")
    assert done.stdout.splitlines()[-1].startswith("PASS: mixed, ")


@needs_compiler
def test_an_older_bundle_compares_mixed_and_int8_and_says_so(tmp_path, jetpack):
    done = build_engine(make_older(tmp_path), jetpack, MS=ALL_MS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "fp16", "mixed", "int8", "PASS:",
    ]  # fmt: skip
    assert done.stdout.startswith(
        "fp16  not built: the bundle has no float model to build it from\n"
    )
    assert done.stdout.splitlines()[-1].startswith("PASS: mixed, 1.5 ms")


@needs_compiler
def test_an_engine_is_built_again_when_either_file_is_another(tmp_path, jetpack):
    bundle = make_twin(tmp_path)
    assert build_engine(bundle, jetpack).returncode == 0
    assert "built earlier" in build_engine(bundle, jetpack).stdout
    note = tmp_path / "bundle-engine" / "engine.json"
    known = json.loads(note.read_text())
    assert known["of"]["onnx"] == {
        "fp16": [FLOAT, sha256_bytes((bundle / FLOAT).read_bytes())],
        "mixed": [INT8, sha256_bytes((bundle / INT8).read_bytes())],
        "int8": [INT8, sha256_bytes((bundle / INT8).read_bytes())],
    }
    for name, source in (
        ("fp16", [FLOAT, "0" * 64]),
        ("fp16", [INT8, known["of"]["onnx"]["int8"][1]]),
    ):
        other = {**known["of"], "onnx": {**known["of"]["onnx"], name: source}}
        note.write_text(json.dumps({**known, "of": other}))
        assert "built earlier" not in build_engine(bundle, jetpack).stdout


@needs_compiler
def test_a_changed_float_model_is_not_built_from(tmp_path, jetpack):
    bundle = make_twin(tmp_path)
    (bundle / FLOAT).write_bytes((bundle / FLOAT).read_bytes() + b"\0")
    done = build_engine(bundle, jetpack)
    assert done.returncode == 1
    assert f"{FLOAT} is not what SHA256SUMS says" in done.stderr
    assert calls(tmp_path) == []
