"""The whole way for a Jetson that is not here: onnxruntime stands in, INT8 ships, and the bundle builds its engine on the board."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import onnx
import pytest
import tinynet
from fakejetson import make

import edgeprune
from edgeprune.bundle.manifest import JETSON_SAMPLE
from edgeprune.formats.tensorrt import placement_problems
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
