from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_fixture import (
    LABELS,
    expected,
    facts,
    images,
    make_bundle,
    onnx_file,
    tflite_file,
)

from edgeprune.bundle import write
from edgeprune.bundle.golden import BUILTIN_STEPS, INT8_STEPS
from edgeprune.bundle.integrity import check_hashes, check_small_files, check_structure
from edgeprune.bundle.write import Payload, write_bundle, zip_path
from edgeprune.errors import IntegrityError, ModelError, NoSpace, SpecError

CPP_SAMPLE = (
    *("CMakeLists.txt", "main.cpp", "bundle.hpp"),
    *("runtime_tflite.hpp", "runtime_onnx.hpp"),
)


def _predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(folder / "samples/python/predict.py")
    command = [sys.executable, "-B", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)


def _payload(tmp_path: Path, **changes: object) -> Payload:
    given: dict[str, object] = {
        "model": onnx_file(tmp_path / "m.onnx"),
        "model_file": tmp_path / "m.onnx",
        "golden_inputs": images(),
        "golden_outputs": expected(images()),
    }
    return Payload(**{**given, **changes})


def test_a_bundle_holds_everything_an_app_needs(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    manifest = check_structure(folder)
    check_small_files(folder, manifest)
    assert check_hashes(folder, manifest) == len(manifest.files) + 1
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present == {
        *("manifest.json", "SHA256SUMS", "README.md", "preprocess.json", "labels.txt"),
        *("models/model.fp32.onnx", "golden/inputs.npy", "golden/outputs.npy"),
        *("golden/tolerance.json", "samples/python/predict.py"),
        *("MODEL_CARD.md", "LICENSE", "NOTICE", "sbom/bom.cdx.json"),
        *(f"samples/cpp/{name}" for name in CPP_SAMPLE),
        *("report/report.html", "report/report.json"),
    }
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == list(LABELS)
    assert np.load(folder / "golden/inputs.npy").dtype == np.uint8
    assert zip_path(folder).is_file()


def test_sha256sum_agrees_with_the_sums(tmp_path: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("sha256sum is not installed")
    folder = make_bundle(tmp_path / "bundle")
    done = subprocess.run(
        [program, "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True
    )
    assert done.returncode == 0


def test_the_same_inputs_and_source_date_epoch_give_the_same_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    one, two = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "two")
    assert zip_path(one).read_bytes() == zip_path(two).read_bytes()
    assert json.loads((one / "manifest.json").read_text())["created"] == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000001")
    assert zip_path(make_bundle(tmp_path / "three")).read_bytes() != zip_path(one).read_bytes()


def test_missed_gates_are_the_first_thing_a_reader_sees(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", failed_gates=("latency", "accuracy"))
    first = (folder / "README.md").read_text().splitlines()[0]
    assert first == "# tiny-net - BEST EFFORT, gates missed: latency, accuracy"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "best-effort"
    passed = make_bundle(tmp_path / "passed")
    assert "BEST EFFORT" not in (passed / "README.md").read_text()


def test_a_stand_in_figure_is_never_shown_as_measured_on_the_board(tmp_path: Path) -> None:
    text = (make_bundle(tmp_path / "bundle") / "README.md").read_text()
    assert "median 1.5 ms" in text
    assert "stand-in: measured on another machine, not on the board" in text
    assert "90.50% shipped" in text


def test_a_bundle_replaces_a_bundle_but_nothing_else(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    make_bundle(folder, failed_gates=("latency",))
    assert check_structure(folder).status == "best-effort"
    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    with pytest.raises(SpecError, match="is not a bundle"):
        write_bundle(other, facts(), _payload(tmp_path))
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    with pytest.raises(SpecError, match="cannot write"):
        write_bundle(other / "mine.txt", facts(), _payload(tmp_path))


def test_a_failed_write_leaves_the_old_bundle_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room"
    folder = write_bundle(room / "bundle", facts(), _payload(tmp_path))
    before = sorted(path.name for path in room.iterdir())
    manifest = (folder / "manifest.json").read_bytes()

    def full(folder: Path) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "sums_text", full)
    with pytest.raises(NoSpace, match="no space left"):
        write_bundle(folder, facts(failed_gates=("latency",)), _payload(tmp_path))
    assert sorted(path.name for path in room.iterdir()) == before
    assert (folder / "manifest.json").read_bytes() == manifest


def test_files_of_a_bundle_can_be_read_by_everyone(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    for path in (folder, *folder.rglob("*")):
        wanted = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"golden_inputs": images(7), "golden_outputs": expected(images(7))}, "at least 8"),
        ({"golden_outputs": expected(images(9))}, "as many outputs"),
        ({"golden_outputs": expected(images())[:, :2]}, "one column a label"),
        ({"golden_outputs": expected(images()) * np.float32("nan")}, "finite"),
        ({"golden_inputs": images()[:, :3]}, r"must be \[N, 4, 4, 3\]"),
        ({"golden_inputs": images()[..., :2]}, "must have 3 channels"),
        ({"golden_inputs": images().astype(np.int64)}, "uint8 images"),
    ],
)
def test_golden_samples_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        write_bundle(tmp_path / "bundle", facts(), _payload(tmp_path, **changes))
    assert not (tmp_path / "bundle").exists()


def test_a_model_file_that_changed_since_it_was_verified_is_refused(tmp_path: Path) -> None:
    payload = _payload(tmp_path)
    payload.model_file.write_bytes(payload.model_file.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="is not the file that was verified"):
        write_bundle(tmp_path / "bundle", facts(), payload)


def test_the_sample_program_passes_its_check_and_names_the_best_class(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    done = _predict(folder, "--check")
    assert (done.returncode, done.stdout[:5]) == (0, "PASS,")
    raw = images(1, seed=5)
    np.save(tmp_path / "raw.npy", raw[0])
    shown = _predict(folder, str(tmp_path / "raw.npy")).stdout.splitlines()
    assert shown[0].startswith(LABELS[int(expected(raw)[0].argmax())])
    assert len(shown) == 3


def test_the_sample_program_reads_an_image_file_as_edgeprune_does(tmp_path: Path) -> None:
    from PIL import Image

    folder = make_bundle(tmp_path / "bundle")
    raw = images(1, seed=6)
    Image.fromarray(raw[0]).save(tmp_path / "raw.png")
    shown = _predict(folder, str(tmp_path / "raw.png")).stdout.splitlines()
    best = max(expected(raw)[0])
    assert float(shown[0].split()[-1]) == pytest.approx(best, abs=1e-3)


def test_the_sample_program_runs_an_int8_tflite_file(tmp_path: Path) -> None:
    artifact = tflite_file(tmp_path / "m.tflite")
    steps = np.rint(np.clip(expected(images()) / 0.25, -128, 127)).astype(np.float32)
    golden = steps * np.float32(0.25)
    payload = _payload(
        tmp_path, model=artifact, model_file=tmp_path / "m.tflite", golden_outputs=golden
    )
    folder = write_bundle(tmp_path / "bundle", facts("litert"), payload)
    done = _predict(folder, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("runtime", "steps"), [("litert", INT8_STEPS), ("tflite-runtime", BUILTIN_STEPS)]
)
def test_kernels_that_round_twice_may_be_further_off(
    tmp_path: Path, runtime: str, steps: int
) -> None:
    artifact = tflite_file(tmp_path / "m.tflite")
    payload = _payload(tmp_path, model=artifact, model_file=tmp_path / "m.tflite")
    folder = write_bundle(tmp_path / "bundle", facts(runtime), payload)
    rules = json.loads((folder / "golden" / "tolerance.json").read_text())
    assert rules["tolerance"]["max_abs_error_steps"] == steps
    assert rules["max_abs_error"] == pytest.approx(steps * 0.25)


@pytest.mark.parametrize(
    "name", ["models/model.fp32.onnx", "golden/outputs.npy", "preprocess.json"]
)
def test_the_sample_program_fails_after_tampering(tmp_path: Path, name: str) -> None:
    folder = make_bundle(tmp_path / "bundle")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    done = _predict(folder, "--check")
    assert done.returncode == 1
    assert f"FAIL: {name} is not what SHA256SUMS says" in done.stderr


def test_the_sample_program_prints_fail_when_the_answers_differ(tmp_path: Path) -> None:
    wrong = expected(images())[::-1]
    folder = write_bundle(
        tmp_path / "bundle", facts(), _payload(tmp_path, golden_outputs=wrong.copy())
    )
    done = _predict(folder, "--check")
    assert (done.returncode, done.stdout[:5]) == (1, "FAIL,")


def test_the_sample_program_says_in_one_line_that_a_file_is_not_there(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", facts(), _payload(tmp_path))
    done = _predict(folder, "nowhere.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["FAIL: there is no file nowhere.png"]


def test_the_sample_program_is_short_and_speaks_python_3_8() -> None:
    import ast

    source = (Path(write.__file__).parent / "samples/python/predict.py").read_text()
    assert len(source.splitlines()) <= 135
    ast.parse(source, feature_version=(3, 8))


def test_a_bundle_for_an_android_app_brings_its_sample_and_the_golden_model(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    payload = _payload(tmp_path, golden_model=(".bpte", b"it"))
    write_bundle(folder, facts(kind="android"), payload)
    manifest = check_structure(folder)
    check_hashes(folder, manifest)
    roles = {file.path: file.role for file in manifest.files}
    assert roles["samples/android/EdgepruneModel.kt"] == "sample"
    assert roles["samples/android/build.gradle.kts"] == "sample"
    assert roles["golden/model.fp32.bpte"] == "golden"
    assert (folder / "golden/model.fp32.bpte").read_bytes() == b"it"
    assert "## Run it in an Android app" in (folder / "README.md").read_text()
    write_bundle(folder, facts(), _payload(tmp_path))
    assert not (folder / "samples/android").exists()


def test_a_bundle_says_what_its_maker_could_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write_bundle(folder, facts(not_run=("numerics",)), _payload(tmp_path))
    title = (folder / "README.md").read_text().splitlines()[0]
    assert title.endswith("NOT RUN by its maker: numerics")
    assert check_structure(folder).not_run == ("numerics",)
