from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bundle_checks import failed_level, reseal
from bundle_fixture import expected, facts, images, make_bundle, onnx_file, tflite_file

from edgeprune.bundle import golden, manifest, verify
from edgeprune.bundle.integrity import check_structure, sums_text
from edgeprune.bundle.verify import VerifyReport, require_ok
from edgeprune.bundle.write import Payload, write_bundle, zip_path
from edgeprune.errors import DeviceError, IntegrityError
from edgeprune.records.base import read_json
from edgeprune.records.device import Device
from edgeprune.records.files import to_json, write_json

STAND_IN = Device(transport="local", targets=("rpi4",), stand_in=True)


def _statuses(report: VerifyReport) -> list[str]:
    return [level.status for level in report.levels]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_a_whole_bundle_passes_as_folder_and_as_zip(folder: Path) -> None:
    for path in (folder, zip_path(folder)):
        report = verify.verify(path)
        assert report.ok
        assert _statuses(report) == ["passed", "passed", "not-run", "passed", "passed"]
        require_ok(report)
    assert "unsigned" in report.levels[2].detail
    assert "8 samples" in report.levels[4].detail


def test_a_report_survives_its_file(folder: Path, tmp_path: Path) -> None:
    report = verify.verify(folder)
    write_json(report, tmp_path / "report.json")
    assert read_json(VerifyReport, tmp_path / "report.json") == report


def test_golden_samples_run_on_every_device_that_is_named(folder: Path) -> None:
    report = verify.verify(folder, devices=[("desk-a", STAND_IN), ("desk-b", STAND_IN)])
    assert [level.name for level in report.levels[5:]] == ["golden on desk-a", "golden on desk-b"]
    assert _statuses(report)[5:] == ["passed", "passed"]


def test_a_device_that_cannot_be_reached_is_not_a_pass(folder: Path) -> None:
    gone = Device.model_validate(
        {
            "transport": "ssh",
            "targets": ("rpi4",),
            "host": "127.0.0.1",
            "port": 1,
            "user": "edge",
            "auth": {"method": "password", "password_ref": "env:EDGEPRUNE_NO_SUCH_SECRET"},
            "host_key": {"sha256": "SHA256:" + "A" * 43},
        }
    )
    report = verify.verify(folder, devices=[("pi", gone)])
    assert not report.ok
    assert report.levels[5].status in ("not-run", "failed")
    with pytest.raises((DeviceError, IntegrityError), match="golden on pi"):
        require_ok(report)


@pytest.mark.parametrize(
    "name",
    ["models/model.fp32.onnx", "labels.txt", "golden/outputs.npy", "samples/python/predict.py"],
)
def test_a_cut_or_flipped_byte_fails_the_hashes_and_names_the_file(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (folder / name).write_bytes(damaged)
        failed = failed_level(folder)
        assert (failed.level, failed.name) == (1, "hashes")
        assert failed.detail.startswith(f"{name} is not what its digest says")


def test_no_model_is_parsed_when_a_digest_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*arguments: object) -> None:
        raise AssertionError("a parser ran before the digests were checked")

    monkeypatch.setattr(verify, "weights_line", parsed)
    monkeypatch.setattr(verify, "open_board", parsed)
    with (folder / "models/model.fp32.onnx").open("ab") as stream:
        stream.write(b"\0")
    assert failed_level(folder).level == 1


def test_a_run_in_place_of_its_bundle_says_which_folder_to_give(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    (folder.parent / "elsewhere").mkdir()
    folder.rename(run / "bundle")
    assert f"give {run / 'bundle'}" in failed_level(run).detail
    assert failed_level(folder.parent / "elsewhere").detail.endswith("elsewhere does not")


def test_an_extra_a_missing_and_a_swapped_file_are_named(folder: Path) -> None:
    extra = folder / "samples/python/extra.py"
    extra.write_text("print()")
    assert "samples/python/extra.py is not listed" in failed_level(folder).detail
    extra.unlink()
    labels, readme = folder / "labels.txt", folder / "README.md"
    first, second = labels.read_bytes(), readme.read_bytes()
    labels.write_bytes(second)
    readme.write_bytes(first)
    assert "README.md is not what" in failed_level(folder).detail
    labels.unlink()
    assert "labels.txt is missing" in failed_level(folder).detail


def test_an_edited_manifest_fails_the_hashes(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"median_ms": 1.5', '"median_ms": 0.5'))
    assert failed_level(folder).detail.startswith("manifest.json is not what its digest says")


def test_an_edited_manifest_with_new_sums_still_has_to_match_the_files(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"mean": [\n   0.4', '"mean": [\n   0.1'))
    (folder / "SHA256SUMS").write_bytes(sums_text(folder))
    failed = failed_level(folder)
    assert (failed.level, failed.detail) == (
        3,
        "preprocess.json does not say what manifest.json says",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a valid Manifest"),
        (b"[" * 100_000, "not a valid Manifest"),
        (b'{"schema_version": 2}', "not a valid Manifest"),
        (b'{"surprise": 1}', "not a valid Manifest"),
        (b" " * (9 * 1024**2), "at most"),
    ],
)
def test_a_manifest_that_breaks_the_schema_fails_the_structure(
    folder: Path, content: bytes, message: str
) -> None:
    (folder / "manifest.json").write_bytes(content)
    failed = failed_level(folder)
    assert failed.level == 0
    assert message in failed.detail


def test_broken_sums_fail_the_hashes(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    whole = sums.read_bytes()
    line = whole.splitlines(keepends=True)[0]
    for wrong in (b"\xff\xfe", b"hello\n", whole + line, b"0" * 64 + b"  ../../etc/passwd\n", b""):
        sums.write_bytes(wrong)
        assert failed_level(folder).level == 1


def test_a_link_in_the_folder_fails_the_structure(folder: Path, tmp_path: Path) -> None:
    model = folder / "models/model.fp32.onnx"
    model.rename(tmp_path / "elsewhere.onnx")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    failed = failed_level(folder)
    assert failed.level == 0
    assert failed.detail.startswith("models/model.fp32.onnx must be a regular file")


def test_a_hostile_zip_fails_the_structure(folder: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.zip"
    hostile.write_bytes(zip_path(folder).read_bytes())
    with zipfile.ZipFile(hostile, "a") as out:
        out.writestr("tiny-net/../../escape", "x")
    failed = failed_level(hostile)
    assert failed.level == 0
    assert "escape" in failed.detail
    assert "there is no bundle" in failed_level(tmp_path / "nowhere").detail


def test_a_model_that_is_not_a_model_fails_in_the_child_only(folder: Path) -> None:
    model = folder / "models/model.fp32.onnx"
    for content in (b"", b"\x3a\x02\x28\x00", b"\x3a\x00" + b"\x00" * 64, b"garbage" * 20):
        model.write_bytes(content)
        reseal(folder)
        assert failed_level(folder).level == 3


def test_a_model_with_other_tensors_than_the_manifest_fails(folder: Path) -> None:
    model = json.loads((folder / "manifest.json").read_bytes())["model"]
    model["outputs"][0]["shape"] = [1, 4]
    value = json.loads((folder / "preprocess.json").read_bytes())
    value["output"]["shape"] = [1, 4]
    (folder / "preprocess.json").write_text(json.dumps(value))
    reseal(folder, model=model)
    assert "must be float32 [1, 4], but the model has float32 [1, 3]" in failed_level(folder).detail


def test_an_int8_bundle_must_hold_int8_weights(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", eight_bit=True)
    report = verify.verify(folder)
    assert report.ok, report
    assert "144 int8" in report.levels[3].detail
    onnx_file(folder / "models/model.int8.onnx")
    reseal(folder)
    assert "stores 0% (144 float32)" in failed_level(folder).detail


def test_wrong_golden_outputs_fail_on_the_host_with_the_figures(folder: Path) -> None:
    (folder / "golden/outputs.npy").write_bytes(golden.npy_bytes(expected(images()) - 1))
    reseal(folder)
    failed = failed_level(folder)
    assert (failed.level, failed.name) == (4, "golden on this machine")
    assert "largest error 1 (allowed" in failed.detail


def test_golden_arrays_with_pickles_or_nan_or_other_shapes_fail(folder: Path) -> None:
    path = folder / "golden/outputs.npy"
    with path.open("wb") as stream:
        np.save(stream, np.array([{"a": 1}] * 8, dtype=object), allow_pickle=True)
    reseal(folder)
    assert "not a plain .npy array" in failed_level(folder).detail
    for wrong in (expected(images())[:, :2], expected(images()) * np.float32("nan")):
        path.write_bytes(golden.npy_bytes(wrong))
        reseal(folder)
        assert "do not fit the manifest" in failed_level(folder).detail


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04" + bytes(200), "does not begin as a .npy file"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118, "its header is not Python text"),
        (golden.npy_bytes(expected(images()))[:-4], "92 follow"),
        (
            golden.npy_bytes(expected(images())).replace(b"(8, 3)", b"(8, 3000000000)"),
            "needs 96000000000 bytes",
        ),
        (golden.npy_bytes(expected(images())).replace(b": False", b": True "), "not columns"),
        (golden.npy_bytes(np.array(2.5, np.float32)), "do not fit the manifest"),
        (golden.npy_bytes(np.array(["a"] * 8)), "do not fit the manifest"),
    ],
    ids=["zip", "nested", "cut", "huge", "columns", "scalar", "text"],
)
@pytest.mark.parametrize("name", ["inputs", "outputs"])
def test_a_hostile_golden_array_is_one_line(
    folder: Path, name: str, content: bytes, why: str
) -> None:
    (folder / f"golden/{name}.npy").write_bytes(content)
    reseal(folder)
    failed = failed_level(folder)
    assert failed.level == 3
    assert "golden" in failed.detail
    assert "\n" not in failed.detail
    assert why in failed.detail or name == "inputs"


def _loosened(folder: Path, part: str = "", **changes: object) -> str:
    """Why a bundle fails whose tolerance, and the small file that repeats it, say something else."""
    value = json.loads((folder / "manifest.json").read_bytes())
    golden_of = (value[part] if part else value)["golden"]
    golden_of["tolerance"] = {**golden_of["tolerance"], **changes}
    (folder / "manifest.json").write_bytes(json.dumps(value).encode())
    found = read_json(manifest.Manifest, folder / "manifest.json")
    (folder / manifest.TOLERANCE).write_bytes(to_json(found.golden_file()))
    reseal(folder)
    failed = failed_level(folder)
    assert failed.level == 3
    return failed.detail


def test_a_tolerance_that_is_wider_than_edgeprune_gives_is_refused(tmp_path: Path) -> None:
    fp32 = make_bundle(tmp_path / "fp32")
    atol = read_json(manifest.Manifest, fp32 / "manifest.json").golden.tolerance.atol
    said = "golden.tolerance must allow an error of at most"
    assert _loosened(fp32, atol=1e30) == (
        f"{said} {atol:.3g} for fp32 files of the format onnx, but allows 1e+30"
    )
    assert said in _loosened(fp32, atol=1.01 * atol)
    assert _loosened(fp32, atol=atol, min_argmax_agreement=0.0) == (
        "golden.tolerance must need the same class in at least 100% for fp32 files of the format onnx, but needs it in 0%"
    )
    int8 = make_bundle(tmp_path / "int8", eight_bit=True)
    assert "at least 85% for int8" in _loosened(int8, min_argmax_agreement=0.8)


def test_a_tighter_tolerance_is_the_makers_own_choice(folder: Path) -> None:
    value = read_json(manifest.Manifest, folder / "manifest.json")
    rules = value.golden.tolerance.model_copy(update={"atol": value.golden.tolerance.atol / 2})
    changed = value.model_copy(
        update={"golden": value.golden.model_copy(update={"tolerance": rules})}
    )
    write_json(changed, folder / "manifest.json")
    (folder / manifest.TOLERANCE).write_bytes(to_json(changed.golden_file()))
    reseal(folder)
    assert verify.verify(folder).ok


def test_a_runtime_that_is_not_installed_here_is_not_run_with_the_reason(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", runtime="tensorrt")
    report = verify.verify(folder)
    assert report.ok
    assert _statuses(report) == ["passed", "passed", "not-run", "not-run", "not-run"]
    assert "tensors not compared: tensorrt does not run on this-machine" in report.levels[3].detail
    assert not verify.verify(folder, devices=[("desk", STAND_IN)]).ok


def test_an_int8_tflite_bundle_passes_with_and_without_xnnpack(tmp_path: Path) -> None:
    artifact = tflite_file(tmp_path / "m.tflite")
    steps = np.rint(np.clip(expected(images()) / 0.25, -128, 127))
    payload = Payload(
        model=artifact,
        model_file=tmp_path / "m.tflite",
        golden_inputs=images(),
        golden_outputs=(steps * 0.25).astype(np.float32),
    )
    folder = write_bundle(tmp_path / "bundle", facts("litert"), payload)
    report = verify.verify(folder)
    assert report.ok, report
    assert "allowed 0.75" in report.levels[4].detail
    assert report.levels[4].detail.endswith("the built-in kernels run it too")


def test_the_report_of_a_best_effort_bundle_says_so(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", failed_gates=("latency",))
    detail = verify.verify(folder).levels[0].detail
    assert detail == "tiny-net for rpi4, best-effort, gates missed: latency"


def test_a_manifest_in_another_key_order_is_still_the_manifest(folder: Path) -> None:
    assert (folder / "manifest.json").read_bytes() == to_json(
        read_json(manifest.Manifest, folder / "manifest.json")
    )
    reseal(folder)
    assert verify.verify(folder).ok


def test_a_folder_that_is_given_as_a_dot_is_named(tmp_path, monkeypatch):
    (tmp_path / "wrong").mkdir()
    monkeypatch.chdir(tmp_path / "wrong")
    with pytest.raises(IntegrityError, match=r"must hold manifest\.json, but wrong does not"):
        check_structure(Path())
