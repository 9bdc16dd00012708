"""The whole way for a Jetson that is not here: onnxruntime stands in, INT8 ships, and the bundle builds its engine on the board."""

from __future__ import annotations

import shutil

import onnx
import pytest
import tinynet
import torch
from fakejetson import build_engine, calls, make
from pattern import without_pattern
from safetensors.torch import load_file
from sparsity_fixture import groups_of_four, stored_weights

import edgeprune
from edgeprune.bundle.manifest import MANIFEST, Manifest
from edgeprune.formats.tensorrt.format import placement_problems
from edgeprune.records.base import read_json
from edgeprune.records.report import Report
from edgeprune.records.sparsity import SparseWeights

MISSED = 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_deployment_for_a_jetson_ships_what_its_board_can_build(tmp_path):
    home = tinynet.project(tmp_path / "project", recovery={"epochs": 0.2, "batch_size": 64})
    flags = ("--target", "jetson-orin-nano", "--latency", "80%", "--run", "run", "--json")
    done = tinynet.edgeprune(home, "deploy", *flags, timeout_s=900)
    found = Report.model_validate_json(done.stdout)
    assert done.returncode == (0 if found.passed else MISSED), done.stderr
    assert (found.stamp, found.shipped) == ("stand-in", "int8")
    assert "do not rank the precisions" in found.shipped_reason
    assert any("onnxruntime stands in for tensorrt" in note for note in found.notes)
    bundle = home / "run" / "bundle"
    fp32, int8 = sorted((bundle / "models").iterdir())
    assert (fp32.name, int8.name) == ("model.fp32.onnx", "model.int8.onnx")
    assert placement_problems(onnx.load(int8)) == ()
    checked = edgeprune.verify(bundle)
    assert checked.ok
    assert {level.level: level.status for level in checked.levels}[4] == "passed"
    # The FP32 file beside it is the one that was measured, with its own quality and answers.
    manifest = read_json(Manifest, bundle / MANIFEST)
    row = next(r for r in found.variants if (r.variant, r.precision) == ("pruned", "fp32"))
    assert manifest.float_model is not None
    assert manifest.float_model.quality.shipped == row.quality
    assert manifest.float_model.source_sha256 == found.measurements[row.measurement].artifact_sha256
    built = build_engine(bundle, make(tmp_path / "jetpack"), MS='{"fp16": 0.5}')
    assert built.returncode == 0, built.stdout + built.stderr
    *tried, last = built.stdout.splitlines()
    assert [line.split()[0] for line in tried] == ["fp16", "mixed", "int8"]
    assert all(line.endswith(": ok") for line in tried)
    assert last.startswith("PASS: fp16, 0.5 ms")
    assert "models/model.fp32.onnx" in last


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_sparse_deployment_ships_int8_weights_with_the_pattern_and_says_so(tmp_path):
    home = tinynet.project(tmp_path / "project", recovery={"epochs": 1, "batch_size": 64})
    flags = ("--target", "jetson-orin-nano", "--latency", "80%", "--run", "run", "--json")
    done = tinynet.edgeprune(home, "deploy", *flags, "--sparsity", "2:4", timeout_s=900)
    found = Report.model_validate_json(done.stdout)
    assert done.returncode == (0 if found.passed else MISSED), done.stderr
    assert [e.stage for e in found.ledger][:5] == [
        "dense", "pruned", "compensated", "sparsified", "recovered",
    ]  # fmt: skip
    assert found.sparsity == SparseWeights(pattern="2:4", layers=3, of_layers=4, speed="not run")
    assert found.sparsity.line() in found.notes
    assert found.settings["sparsity"] == "2:4"
    bundle = home / "run" / "bundle"
    stored = stored_weights(bundle / "models" / "model.int8.onnx")
    assert len(stored) == 4
    for weight in stored.values():
        assert weight.dtype == "int8"
        if weight.shape[1] % 4 == 0:
            zeros = (groups_of_four(torch.from_numpy(weight)) == 0).sum(1)
            assert int(zeros.min()) >= 2
    torch_weights = load_file(home / "run" / "pruned.safetensors")
    assert without_pattern(torch_weights, ["3", "6", "11"]) == ()
    assert "2:4 sparse in 3 of 4 layers" in (bundle / "MODEL_CARD.md").read_text()
    assert edgeprune.verify(bundle).ok
    built = build_engine(bundle, make(tmp_path / "jetpack"))
    assert built.returncode == 0, built.stdout + built.stderr
    assert any("--sparsity=enable" in call for call in calls(tmp_path))
