"""The whole way for a Jetson that is not here: onnxruntime stands in, INT8 ships, and the bundle builds its engine on the board."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import onnx
import pytest
import tinynet
import torch
from fakejetson import make
from safetensors.torch import load_file
from test_engines import calls
from test_sparsity import groups_of_four, stored_weights

import edgeprune
from edgeprune.bundle.manifest import JETSON_SAMPLE
from edgeprune.compress.sparsity import without_pattern
from edgeprune.formats.tensorrt import placement_problems
from edgeprune.patterns import SparseWeights
from edgeprune.results import Report

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
    (model,) = (bundle / "models").iterdir()
    assert placement_problems(onnx.load(model)) == ()
    checked = edgeprune.verify(bundle)
    assert checked.ok
    assert {level.level: level.status for level in checked.levels}[4] == "passed"
    jetpack = make(tmp_path / "jetpack")
    built = subprocess.run(
        [sys.executable, str(bundle / JETSON_SAMPLE)],
        env={
            **os.environ,
            **jetpack,
            "PATH": os.pathsep.join([jetpack["PATH"], os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stdout.splitlines()[-1].startswith("PASS: ")


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
    (model,) = (bundle / "models").iterdir()
    stored = stored_weights(model)
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
    jetpack = make(tmp_path / "jetpack")
    path = os.pathsep.join([jetpack["PATH"], os.environ["PATH"]])
    built = subprocess.run(
        [sys.executable, str(bundle / JETSON_SAMPLE)],
        env={**os.environ, **jetpack, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert any("--sparsity=enable" in call for call in calls(tmp_path))
