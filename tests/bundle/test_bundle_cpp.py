"""The C++ sample of a bundle, built with CMake and g++ against real runtimes and run on the golden samples."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import cpp_runtimes
import numpy as np
import pytest
from bundle_fixture import LABELS, expected, facts, images, make_bundle, tflite_bundle

from edgeprune.bundle import write
from edgeprune.bundle.golden import npy_bytes
from edgeprune.bundle.write import sample_files
from edgeprune.workload.dataset import model_input

pytestmark = pytest.mark.timeout(300)


def _build(folder: Path, runtime: str, into: Path) -> Path:
    for program in ("cmake", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    place = cpp_runtimes.runtime(runtime)
    if place is None or platform.machine() != "x86_64":
        pytest.skip(f"no C++ runtime {runtime} here: run python tests/toolchains/cpp_runtimes.py")
    flags = [
        f"-DRUNTIME_DIR={place}",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra",
    ]
    for command in (
        ["cmake", "-S", str(folder / "samples/cpp"), "-B", str(into), *flags],
        ["cmake", "--build", str(into)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return into / "check"


def _run(program: Path, folder: Path) -> tuple[int, list[str]]:
    done = subprocess.run([program, folder], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def onnx_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cpp-onnx")
    return _build(make_bundle(home / "bundle"), "onnxruntime", home / "build")


@pytest.fixture(scope="module")
def tflite_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cpp-tflite")
    return _build(tflite_bundle(home), "tflite", home / "build")


@pytest.mark.slow  # onnxruntime's headers alone take 15 s
def test_the_onnx_sample_passes_fp32_and_int8_bundles(onnx_program, tmp_path):
    first = LABELS[int(expected(images())[0].argmax())]
    for eight_bit in (False, True):
        code, shown = _run(
            onnx_program, make_bundle(tmp_path / f"b{eight_bit}", eight_bit=eight_bit)
        )
        assert (code, shown[0]) == (0, f"first sample: {first}")
        assert shown[1].startswith("PASS, 8 samples, largest error ")


def test_the_tflite_sample_passes_an_int8_bundle_and_counts_steps(tflite_program, tmp_path):
    code, shown = _run(tflite_program, tflite_bundle(tmp_path))
    assert code == 0, shown
    assert "in steps: " in shown[1]


@pytest.mark.slow
def test_float_samples_take_the_layout_of_the_file(onnx_program, tflite_program, tmp_path):
    for program, folder in (
        (onnx_program, make_bundle(tmp_path / "onnx")),
        (tflite_program, tflite_bundle(tmp_path)),
    ):
        raw = model_input(images(), facts().preprocess)
        (folder / "golden/inputs.npy").write_bytes(npy_bytes(raw))
        assert _run(program, folder)[0] == 0


def test_other_answers_and_damaged_files_fail(tflite_program, tmp_path):
    folder = tflite_bundle(tmp_path)
    golden = folder / "golden/outputs.npy"
    whole = golden.read_bytes()
    golden.write_bytes(npy_bytes(expected(images())[::-1].copy()))
    code, shown = _run(tflite_program, folder)
    assert (code, shown[1][:5]) == (1, "FAIL,")
    golden.write_bytes(npy_bytes(np.full((8, 3), np.nan, np.float32)))
    assert _run(tflite_program, folder)[0] == 1
    for cut in (whole[:-1], whole[:20], b"", b"\x93NUMPY\x02\0\xff\xff\xff\xff12"):
        golden.write_bytes(cut)
        code, shown = _run(tflite_program, folder)
        assert (code, shown[-1][:6]) == (1, "FAIL: ")
    golden.write_bytes(whole)
    for recipe in ("", "[" * 1000, '{"model": "models/none.tflite"}', '{"model": "labels.txt"}'):
        (folder / "preprocess.json").write_text(recipe)
        code, shown = _run(tflite_program, folder)
        assert (code, shown[-1][:6]) == (1, "FAIL: ")


def test_samples_are_short_and_say_what_they_were_compiled_against():
    files = sample_files("python")
    main = files["samples/cpp/main.cpp"].decode()
    assert len(main.splitlines()) <= 100
    assert "Tried on Linux x86-64" in main
    assert "Not compiled by edgeprune for ARM" in main


def test_a_platform_adds_its_own_folder_of_samples(tmp_path, monkeypatch):
    common = sample_files("no-such-platform")
    assert {path.split("/")[1] for path in common} == set(write.ALWAYS)
    root = tmp_path / "package"
    shutil.copytree(Path(write.__file__).parent / "samples", root / "samples")
    kotlin = root / "samples/phone/app/src/Main.kt"
    kotlin.parent.mkdir(parents=True)
    kotlin.write_text("fun main() {}\n")
    (kotlin.parent / "__pycache__").mkdir()
    (kotlin.parent / "__pycache__/x.pyc").write_bytes(b"x")
    monkeypatch.setattr(write.importlib.resources, "files", lambda name: root)
    folder = make_bundle(tmp_path / "bundle", kind="phone")
    assert (folder / "samples/phone/app/src/Main.kt").read_text() == "fun main() {}\n"
    assert set(sample_files("phone")) == {*common, "samples/phone/app/src/Main.kt"}
    assert not set(sample_files("python")) - set(common)
