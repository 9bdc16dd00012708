"""Bundles of Core ML packages: a folder in the bundle, every file of it listed, checked without Core ML, and the Swift sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import bundle_fixture
import coreml_fixture
import numpy as np
import pytest
import torch

from edgeprune.bundle import verify as verify_module
from edgeprune.bundle.golden import GoldenResult, default_tolerance
from edgeprune.bundle.integrity import check_hashes, check_structure, read_model
from edgeprune.bundle.on_board import load_model
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.devices.agent.coreml import UNITS
from edgeprune.devices.plans import Loaded
from edgeprune.errors import IntegrityError
from edgeprune.formats.inside import weights
from edgeprune.formats.shared.model_bytes import model_bytes, packed
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes
from edgeprune.records.names import ComputeUnits

MAC = Device(transport="local", targets=("iphone",))
MODEL = "models/Classifier.mlpackage"
WEIGHTS = f"{MODEL}/Data/com.apple.CoreML/weights/weight.bin"


def artifact(precision: str) -> Artifact:
    package = coreml_fixture.package(precision)
    return Artifact.model_validate(
        {
            "path": package.name,
            "format": "coreml",
            "precision": precision,
            "sha256": sha256_bytes(model_bytes(package)),
            "size_bytes": sum(map(len, coreml_fixture.files(precision).values())),
            "inputs": (
                TensorSpec(name="image", shape=(1, 1, 8, 8), dtype="float32", layout="NCHW"),
            ),
            "outputs": (TensorSpec(name="output", shape=(1, 3), dtype="float32"),),
        }
    )


def golden(images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return coreml_fixture.build()(torch.from_numpy(coreml_fixture.seen(images))).numpy()


def make(folder: Path, precision: str = "int8", **changes: Any) -> Path:
    images = coreml_fixture.raw(8)
    facts = bundle_fixture.facts(
        runtime="coreml",
        target="iphone",
        profile="apple-neural-engine",
        labels=coreml_fixture.LABELS,
        preprocess=coreml_fixture.PREPROCESS,
        not_run=("numerics",),
        golden_source="worked-out",
    )
    payload = Payload(
        artifact(precision), coreml_fixture.package(precision), images, golden(images), **changes
    )
    return write_bundle(folder, facts, payload)


def test_a_package_is_a_folder_in_the_bundle_and_every_file_is_listed(tmp_path) -> None:
    bundle = make(tmp_path / "net")
    sums = (bundle / "SHA256SUMS").read_text()
    for name in coreml_fixture.files("int8"):
        assert f"  {MODEL}/{name}\n" in sums
    manifest = check_structure(bundle)
    assert manifest.model.path == MODEL
    assert len(manifest.model_parts()) == 3
    assert check_hashes(bundle, manifest) == len(sums.splitlines())
    assert read_model(bundle, manifest) == packed(coreml_fixture.files("int8"))
    assert not (bundle / "samples" / "python").exists()


def test_the_readme_says_that_it_was_not_run_and_what_to_do_in_xcode(tmp_path) -> None:
    text = (make(tmp_path / "net") / "README.md").read_text()
    assert text.splitlines()[0].endswith("NOT RUN by its maker: numerics")
    assert f"Drag `{MODEL}` into your Xcode project" in text
    assert "the golden answers were worked out" in text
    assert "predict.py" not in text
    assert "carries no texts" not in text
    assert "The package itself carries its description, labels, author, license" in text


def test_the_texts_that_the_readme_and_verify_speak_of_are_in_the_package(tmp_path) -> None:
    bundle = make(tmp_path / "net")
    inside = (bundle / MODEL / "Data/com.apple.CoreML/model.mlmodel").read_bytes()
    facts = coreml_fixture.FACTS
    stated = (facts.description, facts.author, facts.license, facts.version, *facts.labels)
    assert all(text.encode() in inside for text in (*stated, "edgeprune.input_shape"))
    assert check_structure(bundle).embedded == ()
    (check,) = (c for c in verify(bundle).levels[3].checks if c.name == "metadata")
    assert check.status == "not-run"
    assert "texts of its own (description, author, license, keys)" in check.detail
    assert "not compared" in check.detail


def test_no_sample_that_cannot_run_a_package_is_in_its_bundle(tmp_path) -> None:
    assert {p.name for p in (make(tmp_path / "net") / "samples").iterdir()} == {"ios"}


def test_verify_reads_the_package_and_says_what_was_not_run(tmp_path) -> None:
    for source in (make(tmp_path / "net"), tmp_path / "net.zip"):
        report = verify(source)
        by_level = {level.level: level for level in report.levels}
        assert [by_level[i].status for i in range(5)] == ["passed", "passed", *["not-run"] * 3]
        assert "not run by its maker: numerics" in by_level[0].detail
        assert "168 int8" in by_level[3].detail
        assert "Core ML runs on a Mac only" in by_level[3].detail
        assert report.ok


def test_a_changed_weight_is_found(tmp_path) -> None:
    bundle = make(tmp_path / "net")
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[100] ^= 1
    (bundle / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=r"weight.bin is not what its digest says"):
        read_model(bundle, check_structure(bundle))
    assert not verify(bundle).ok


def test_files_that_are_not_the_model_of_the_manifest_are_refused(tmp_path) -> None:
    bundle, other = make(tmp_path / "net"), make(tmp_path / "other", "fp16")
    manifest = json.loads((bundle / "manifest.json").read_text())
    theirs = json.loads((other / "manifest.json").read_text())
    keep = [f for f in manifest["files"] if not f["path"].startswith(MODEL)]
    manifest["files"] = keep + [f for f in theirs["files"] if f["path"].startswith(MODEL)]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(bundle / MODEL)
    shutil.copytree(other / MODEL, bundle / MODEL)
    with pytest.raises(IntegrityError, match="not the model that the manifest names"):
        read_model(bundle, check_structure(bundle))


def test_stored_weights_are_counted_without_coremltools() -> None:
    counted = {
        p: weights.weight_elements("coreml", packed(coreml_fixture.files(p)))
        for p in ("fp16", "int8")
    }
    assert counted["fp16"] == {"float16": 8 * 9 + 8 * 9 + 3 * 8}
    assert counted["int8"] == {"int8": 8 * 9 + 8 * 9 + 3 * 8}
    assert weights.eight_bit_ratio(counted["int8"]) == 1
    for damaged in (
        packed({"Manifest.json": b"{}"}),
        b"none",
        packed({"Data/com.apple.CoreML/model.mlmodel": b"\x9a\x1f\xff"}),
    ):
        with pytest.raises(IntegrityError):
            weights.weight_elements("coreml", damaged)


def test_an_int8_bundle_of_float_weights_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        f"{__name__}.artifact",
        lambda p, real=artifact: real("fp16").model_copy(update={"precision": "int8"}),
    )
    report = verify(make(tmp_path / "net", "fp16"))
    assert report.levels[3].status == "failed"
    assert "must store at least 90%" in report.levels[3].detail


class Mac:
    """A board that has Core ML: gives the golden answers, ``off`` from them on one choice of processors."""

    def __init__(self, off: str = "") -> None:
        self.off, self.loaded, self.name = off, [], "mac"

    def __enter__(self) -> Mac:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def load(
        self, key: str, content: bytes, *, runtime: str, threads: int, delegate: bool = True
    ) -> Loaded:
        self.loaded.append(runtime)
        model = artifact("int8")
        return Loaded(key, 10**6, 10**6, model.inputs, model.outputs, compile_ns=7 * 10**6)

    def unload(self, keys: list[str]) -> None:
        return None

    def infer(self, key: str, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            answers = coreml_fixture.build()(torch.from_numpy(x)).numpy()
        return answers + 5 if key == self.off else answers


@pytest.mark.parametrize("off", ["", "CPU_AND_NE"])
def test_a_mac_answers_with_every_choice_of_processors(tmp_path, monkeypatch, off: str) -> None:
    mac = Mac(off)
    bundle = make(tmp_path / "net")
    monkeypatch.setattr(verify_module, "open_board", lambda *a, **k: mac)
    monkeypatch.setattr(
        verify_module, "measure", lambda board, files, **k: [type("Timed", (), {"median_ms": 0.5})]
    )
    subject = verify_module._Subject(bundle, None, None)  # type: ignore[arg-type]
    subject._manifest = check_structure(bundle)
    if off:
        with pytest.raises(IntegrityError, match="the answers differ"):
            subject.golden_on("mac", MAC)
        return
    detail, _ = subject.golden_on("mac", MAC)
    assert mac.loaded == list(UNITS)
    assert all(f"{units}: 8 samples" in detail for units in UNITS.values())
    assert detail.count("median 0.5 ms, compiled in 7 ms") == 4
    assert detail.endswith("times are of this Mac and not of a phone")


def test_half_precision_has_room_for_its_rounding_and_no_more() -> None:
    outputs = np.array([[4.0, -2, 1]] * 8, np.float32)
    tolerance = default_tolerance(artifact("fp16"), outputs)
    limit = tolerance.limit(artifact("fp16").outputs[0])
    assert limit == pytest.approx(0.2)
    assert not GoldenResult(8, 0.3, limit, 1.0, tolerance.min_argmax_agreement).ok


def test_the_swift_sample_is_short_and_says_what_was_never_done_with_it() -> None:
    text = (Path(verify_module.__file__).parent / "samples/ios/GoldenCheck.swift").read_text()
    lines = text.splitlines()
    assert len(lines) <= 100
    assert "Never built by Xcode, nor run with Core ML" in lines[1]
    for needed in ("computeUnits", "preprocess", "labels", "tolerance", "inputs", "outputs"):
        assert needed in text
    assert text.count("{") == text.count("}")
    assert text.count("(") == text.count(")")


@pytest.mark.parametrize(
    ("units", "swift"),
    [
        ("ALL", ".all"),
        ("CPU_AND_NE", ".cpuAndNeuralEngine"),
        ("CPU_AND_GPU", ".cpuAndGPU"),
        ("CPU_ONLY", ".cpuOnly"),
    ],
)
def test_the_swift_sample_asks_for_the_units_of_the_target(tmp_path, units, swift) -> None:
    bundle = make(tmp_path / "net", compute_units=units)
    text = (bundle / "samples/ios/GoldenCheck.swift").read_text()
    assert f"units: MLComputeUnits = {swift}) throws" in text
    check_hashes(bundle, check_structure(bundle))
    assert "`edgeprune.compute_units`" in (bundle / "README.md").read_text()


def test_a_mac_is_asked_for_every_choice_that_a_target_may_name() -> None:
    assert set(get_args(ComputeUnits)) == set(UNITS.values())


def test_a_runtime_name_reaches_the_board() -> None:
    mac = Mac()
    manifest = type(
        "M",
        (),
        {
            "runtime": type("R", (), {"name": "coreml", "threads": 1, "min_version": "1"}),
            "model": artifact("int8"),
        },
    )
    load_model(mac, manifest, b"x", runtime_name="coreml-ne")  # type: ignore[arg-type]
    assert mac.loaded == ["coreml-ne"]
