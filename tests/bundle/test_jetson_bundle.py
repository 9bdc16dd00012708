"""The bundle for a Jetson: what its build_engine.py does with a pretended JetPack."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bundle_fixture import expected, facts, images, make_bundle, onnx_file
from fakejetson import build_engine, calls, make

from edgeprune.bundle.golden import default_tolerance
from edgeprune.bundle.manifest import JETSON_SAMPLE
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.records.sparsity import SparseWeights

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
MAX_LINES = 165


@pytest.fixture
def jetson(tmp_path):
    """A bundle for a Jetson, and a function that runs its program."""
    file = tmp_path / "net.onnx"
    artifact = onnx_file(file).model_copy(update={"format": "tensorrt"})
    payload = Payload(artifact, file, images(), expected(images()))
    bundle = write_bundle(tmp_path / "bundle", facts(target="jetson-orin-nano"), payload)
    jetpack = make(tmp_path / "jetpack")

    return bundle, partial(build_engine, bundle, jetpack)


def test_the_program_is_short_and_only_in_bundles_for_tensorrt(tmp_path, jetson):
    bundle, _ = jetson
    assert len((bundle / JETSON_SAMPLE).read_text().splitlines()) <= MAX_LINES
    assert "python3 samples/jetson/build_engine.py" in (bundle / "README.md").read_text()
    assert not (make_bundle(tmp_path / "other") / JETSON_SAMPLE).exists()


def test_it_builds_checks_and_keeps_the_fastest_and_the_bundle_stays_sound(tmp_path, jetson):
    bundle, run = jetson
    done = run(MS='{"fp16": 1.5, "fp32": 2.5}')
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["fp16", "fp32", "PASS:"]
    assert "fp16, 1.5 ms of GPU time without copies" in lines[-1]
    place = tmp_path / "bundle-engine"
    assert json.loads((place / "engine.json").read_text())["precision"] == "fp16"
    assert b'"precision": "fp16"' in (place / "model.engine").read_bytes()
    assert verify(bundle).ok  # nothing was written into it
    build = next(call for call in calls(tmp_path) if any("--onnx" in a for a in call))
    assert {"--useSpinWait", "--useCudaGraph", "--noDataTransfers", "--duration=3"} <= set(build)


def test_it_does_not_build_twice_until_something_changes(tmp_path, jetson):
    _, run = jetson
    run()
    before = len(calls(tmp_path))
    assert "built earlier" in run().stdout
    assert len(calls(tmp_path)) == before
    note = tmp_path / "bundle-engine" / "engine.json"
    known = json.loads(note.read_text())
    known["of"]["libnvinfer"] = ["libnvinfer.so.8.5.2"]  # an older JetPack
    note.write_text(json.dumps(known))
    assert "built earlier" not in run().stdout
    assert "--sparsity=enable" not in str(calls(tmp_path))
    run("--sparsity")
    assert "--sparsity=enable" in str(calls(tmp_path))


def test_a_bundle_with_sparse_weights_lets_the_builder_use_them_without_being_told(tmp_path):
    file = tmp_path / "net.onnx"
    artifact = onnx_file(file).model_copy(update={"format": "tensorrt"})
    sparsity = SparseWeights(pattern="2:4", layers=3, of_layers=4, speed="not run")
    stated = facts(target="jetson-orin-nano").model_copy(update={"sparsity": sparsity})
    bundle = write_bundle(
        tmp_path / "bundle", stated, Payload(artifact, file, images(), expected(images()))
    )
    done = build_engine(bundle, make(tmp_path / "jetpack"))
    assert done.returncode == 0, done.stdout + done.stderr
    builds = [call for call in calls(tmp_path) if any("--onnx" in a for a in call)]
    assert builds
    assert all("--sparsity=enable" in call for call in builds)
    for document in ("MODEL_CARD.md", "README.md"):
        text = (bundle / document).read_text()
        assert "2:4 sparse in 3 of 4 layers" in text
        assert "not measured (not run)" in text
    assert verify(bundle).ok


def test_with_tensorrt_11_it_builds_what_the_file_says_and_asks_for_the_outputs(
    tmp_path, jetson, monkeypatch, capsys
):
    bundle, _ = jetson
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "predict", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "jetpack" / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_TRT_VERSION", "11.0.0")
    monkeypatch.setenv("FAKE_TRT_LOG", str(tmp_path / "jetpack" / "calls.log"))
    module = loaded(bundle)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libnvinfer.so.11.0.0").touch()
    monkeypatch.setattr(module, "LIBRARIES", f"../..{tmp_path}/lib/libnvinfer.so.*")
    module.main([])
    sys.modules.pop("predict", None)
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS: typed")
    build, *checks = calls(tmp_path)
    assert not {"--fp16", "--int8", "--useCudaGraph"} & set(build)
    assert checks
    assert all("--includeDataTransfers" in call for call in checks)


def test_a_faster_precision_that_fails_the_golden_check_is_not_kept(tmp_path, jetson):
    _, run = jetson
    done = run(MS='{"fp16": 1.5, "fp32": 2.5}', OFF="fp16", CV="4.2")
    assert done.returncode == 0
    assert "NOT OK" in done.stdout.splitlines()[0]
    assert "unstable, it varies by 4.2 %" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASS: fp32")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OFF": "fp16,fp32"}, "FAIL: no precision passed"),
        ({"MEMORY": "fp16,fp32"}, "FAIL: no precision passed"),
    ],
)
def test_a_board_on_which_nothing_passes_fails(tmp_path, jetson, variables, words):
    done = jetson[1](**variables)
    assert done.returncode == 1
    assert words in done.stderr
    assert ("OutOfMemory" in done.stdout) == ("MEMORY" in variables)
    assert not (tmp_path / "bundle-engine" / "model.engine").exists()


def loaded(bundle):
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("build_engine", bundle / JETSON_SAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_refuses_to_begin_with_too_little_memory_or_a_changed_model(
    tmp_path, jetson, monkeypatch
):
    bundle, run = jetson
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "predict", raising=False)
    module = loaded(bundle)
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 500000 kB\n")
    monkeypatch.setattr(module, "MEMINFO", str(tmp_path / "meminfo"))
    with pytest.raises(SystemExit, match=r"\d+ MiB of memory are missing; end other programs"):
        module.main([])
    assert calls(tmp_path) == []
    sys.modules.pop("predict", None)
    model = next((bundle / "models").iterdir())
    model.write_bytes(model.read_bytes() + b"x")
    done = run()
    assert done.returncode == 1
    assert "not what SHA256SUMS says" in done.stderr


def test_a_machine_without_trtexec_is_told_what_to_install(jetson):
    bundle, _ = jetson
    done = subprocess.run(
        [sys.executable, str(bundle / JETSON_SAMPLE)],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there is no trtexec; install it with: sudo apt install nvidia-jetpack" in done.stderr


def test_a_half_precision_engine_is_allowed_to_round(tmp_path: Path):
    artifact = onnx_file(tmp_path / "net.onnx")
    outputs = np.array([[10.0, -3.0, 1.0]] * 8, np.float32)
    full = default_tolerance(artifact, outputs)
    half = default_tolerance(artifact.model_copy(update={"format": "tensorrt"}), outputs)
    assert (full.atol, half.atol) == (pytest.approx(1e-3), pytest.approx(0.1))
