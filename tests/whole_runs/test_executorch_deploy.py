"""A whole deployment for ARM phones, with this machine's ExecuTorch in place of a phone's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinynet

import edgeprune
from edgeprune.bundle.manifest import Manifest
from edgeprune.records.report import Report

pytest.importorskip("executorch")
pytest.importorskip("ai_edge_litert")

TIMEOUT_S = 3000  # every structure is converted: minutes on a busy machine
MISSED = 6


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    home = tinynet.project(
        tmp_path_factory.mktemp("phone") / "project", recovery={"epochs": 1, "batch_size": 64}
    )
    tinynet.write_float_target(home, "android-arm64")
    args = ("deploy", "--target", "android-arm64", "--latency", "80%", "--run", "run", "--json")
    return tinynet.Run(home, home / "run", tinynet.edgeprune(home, *args, timeout_s=TIMEOUT_S))


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_a_deployment_for_phones_measures_whole_nets_in_executorch(deployed):
    found = Report.model_validate_json(deployed.done.stdout)
    assert deployed.done.returncode == (0 if found.passed else MISSED), deployed.done.stderr
    assert found.stamp == "stand-in"
    assert found.fingerprint.runtime == "executorch"
    manifest = json.loads((deployed.folder / "bundle" / "manifest.json").read_text())
    assert manifest["model"]["format"] == "executorch"
    assert any("single kernels are those of tflite" in note for note in found.notes)
    assert any("XNNPACK runs" in note for note in found.notes)
    assert found.latency_model.kernels_measured > 0
    assert found.gates[-1].name == "numerics"
    assert not found.gates[-1].not_run


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_the_bundle_for_phones_is_whole_and_verifies(deployed):
    bundle = deployed.folder / "bundle"
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_text())
    assert manifest.runtime.name == "executorch"
    assert not manifest.not_run
    precision = manifest.model.precision
    assert manifest.model.path == f"models/model.{precision}.pte"
    for path in (
        "samples/android/EdgepruneModel.kt",
        "samples/android/build.gradle.kts",
        f"golden/model.{precision}.bpte",
    ):
        assert (bundle / path).is_file()
    assert "Run it in an Android app" in (bundle / "README.md").read_text()
    report = edgeprune.verify(deployed.folder / "bundle.zip")
    assert report.ok
    golden = next(level for level in report.levels if level.level == 4)
    assert golden.status == "passed"
    assert {check.name: check.status for check in golden.checks}["delegate"] == "passed"
    assert not (bundle / "samples/cpp").exists()
    done = tinynet.edgeprune(bundle.parent, "verify", str(bundle), "--json", timeout_s=TIMEOUT_S)
    assert json.loads(done.stdout)["ok"]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_the_bundled_program_holds_the_shipped_one(deployed):
    bundle = Path(deployed.folder, "bundle")
    (model,) = (bundle / "models").iterdir()
    (golden,) = (bundle / "golden").glob("*.bpte")
    assert model.read_bytes() in golden.read_bytes()
