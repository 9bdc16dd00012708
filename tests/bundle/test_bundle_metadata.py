"""Texts inside the model file: there for everyone who opens it, and harmless where they are hostile."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bundle_checks import failed_level, reseal
from bundle_fixture import (
    LABELS,
    facts,
    make_bundle,
    onnx_file,
    tflite_bundle,
    tflite_file,
)

from edgeprune.bundle.integrity import labels_text
from edgeprune.bundle.manifest import Manifest, identity
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import model_texts
from edgeprune.errors import IntegrityError
from edgeprune.formats.onnx.texts import OnnxProps
from edgeprune.formats.shared import protobuf
from edgeprune.formats.shared.metadata import PREFIX, carrier
from edgeprune.formats.tflite import texts as tflite_texts
from edgeprune.records.base import read_json
from edgeprune.records.files import sha256_bytes

KEYS = ("name", "version", "source_sha256", "manifest_id", "preprocess", "license")
TEXTS = {PREFIX + key: f"{key} = été" for key in KEYS}
LABEL_BYTES = labels_text(LABELS)
WRITERS = {".onnx": onnx_file, ".tflite": tflite_file}


@pytest.fixture(params=WRITERS)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(suffix: str, tmp_path: Path) -> bytes:
    WRITERS[suffix](tmp_path / "model")
    return (tmp_path / "model").read_bytes()


def test_texts_come_back_and_the_model_before_them_is_untouched(suffix, source):
    found = carrier(suffix)
    assert found is not None
    assert found.read(source) is None
    whole = found.attach(source, TEXTS, LABEL_BYTES)
    assert whole == found.attach(source, dict(reversed(TEXTS.items())), LABEL_BYTES)
    inside = found.read(whole)
    assert inside is not None
    assert (dict(inside.texts), inside.labels, inside.model) == (TEXTS, LABEL_BYTES, source)


def test_a_suffix_without_a_carrier_has_none():
    assert carrier(".pte-like") is None


def test_onnxruntime_shows_the_texts_of_a_bundle(tmp_path):
    import onnxruntime

    folder = make_bundle(tmp_path / "bundle", license="MIT", version="2.1")
    session = onnxruntime.InferenceSession(str(folder / "models/model.fp32.onnx"))
    shown = session.get_modelmeta().custom_metadata_map
    manifest = read_json(Manifest, folder / "manifest.json")
    assert set(shown) == {PREFIX + key for key in (*KEYS, "labels")}
    assert shown["edgeprune.name"] == "tiny-net"
    assert (shown["edgeprune.license"], shown["edgeprune.version"]) == ("MIT", "2.1")
    assert shown["edgeprune.manifest_id"] == manifest.manifest_id
    assert shown["edgeprune.labels"].splitlines() == list(LABELS)
    assert json.loads(shown["edgeprune.preprocess"])["mean"] == [0.4, 0.5, 0.6]


def test_any_zip_reader_shows_the_texts_of_a_tflite_bundle_and_litert_still_runs_it(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model = tflite_bundle(tmp_path) / "models/model.int8.tflite"
    with zipfile.ZipFile(model) as tail:
        assert json.loads(tail.read("edgeprune.json"))["edgeprune.version"] == "not stated"
        assert tail.read("labels.txt") == LABEL_BYTES
    with_texts, without = (Interpreter(model_path=str(p)) for p in (model, tmp_path / "m.tflite"))
    answers = []
    for interpreter in (with_texts, without):
        interpreter.allocate_tensors()
        x = np.full((1, 4, 4, 3), 7, np.int8)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        answers.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    assert np.array_equal(*answers)


def test_the_manifest_id_names_the_maker_and_the_measured_file_without_a_cycle(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    manifest = read_json(Manifest, folder / "manifest.json")
    source = sha256_bytes((tmp_path / "bundle.source.onnx").read_bytes())
    assert manifest.source_sha256 == source != manifest.model.sha256
    assert manifest.manifest_id == identity(facts(), source)
    assert identity(facts(license="MIT"), source) != manifest.manifest_id
    assert identity(facts(), "0" * 64) != manifest.manifest_id


def _with_texts(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    reseal(folder)
    failed = failed_level(folder)
    assert failed.level == 3
    return failed.detail


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_texts_that_contradict_the_manifest_fail(tmp_path, kind):
    folder = make_bundle(tmp_path / "b") if kind == "onnx" else tflite_bundle(tmp_path)
    (model,) = (folder / "models").iterdir()
    name = f"models/{model.name}"
    held, source = (
        carrier(model.suffix),
        read_json(Manifest, folder / "manifest.json").source_sha256,
    )
    assert held is not None
    inside = held.read(model.read_bytes())
    assert inside is not None
    texts = model_texts(facts("onnxruntime" if kind == "onnx" else "litert"), source)
    assert dict(inside.texts) == texts
    other = {**texts, "edgeprune.license": "MIT"}
    cases = {
        "edgeprune.license inside": held.attach(inside.model, other, LABEL_BYTES),
        "the labels inside": held.attach(inside.model, texts, b"dog\ncat\n"),
        "carries none": inside.model,
    }
    for message, content in cases.items():
        assert message in _with_texts(folder, name, content)


def test_a_model_that_is_not_the_measured_one_fails_even_with_the_right_texts(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    model = folder / "models/model.fp32.onnx"
    content = bytearray(model.read_bytes())
    at = content.index(b"weight") + 40  # within the raw weights
    content[at] ^= 1
    detail = _with_texts(folder, "models/model.fp32.onnx", bytes(content))
    assert detail == "the model without its texts is not the one that was measured"


def test_a_manifest_cannot_hide_that_its_model_carries_texts_or_take_another_identity(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    found = read_json(Manifest, folder / "manifest.json")
    reseal(folder, embedded=[])
    said = "embedded must list the 6 texts inside the model, but lists "
    assert failed_level(folder).detail == f"{said}none"
    own = found.model.sha256
    reseal(folder, source_sha256=own, manifest_id=identity(found.facts(), own))
    assert "inside the model does not say" in failed_level(folder).detail
    changes = {"source_sha256": found.source_sha256, "manifest_id": found.manifest_id}
    reseal(folder, embedded=["edgeprune.name", "edgeprune.size"], **changes)
    assert failed_level(folder).detail == f"{said}edgeprune.name, edgeprune.size"
    reseal(folder, embedded=["edgeprune.name"], manifest_id="0" * 64)
    assert failed_level(folder).detail == "manifest_id is not that of the manifest"
    reseal(folder, name="other-net")
    assert failed_level(folder).detail == "manifest_id is not that of the manifest"


def test_a_bundle_without_texts_in_its_model_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr("edgeprune.formats.onnx.reader.CARRIER")
    folder = make_bundle(tmp_path / "bundle")
    manifest = read_json(Manifest, folder / "manifest.json")
    assert manifest.embedded == ()
    assert manifest.source_sha256 == manifest.model.sha256
    assert "The model file itself carries no texts" in (folder / "README.md").read_text()
    report = verify(folder)
    assert report.ok
    (check,) = (c for c in report.levels[3].checks if c.name == "metadata")
    assert check.status == "not-run"
    other = identity(manifest.facts(), "1" * 64)
    reseal(folder, source_sha256="1" * 64, manifest_id=other)
    assert "source_sha256 must be the model's own digest" in failed_level(folder).detail


def _zip(entries: list[tuple[zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO(b"TFL3 model")
    with zipfile.ZipFile(stream, "a") as out:
        for entry, data in entries:
            entry.compress_type = method
            out.writestr(entry, data)
    return stream.getvalue()


def _entries(record: bytes = b"{}", labels: bytes = b"a\n") -> list[tuple[zipfile.ZipInfo, bytes]]:
    return [
        (zipfile.ZipInfo("edgeprune.json"), record),
        (zipfile.ZipInfo("labels.txt"), labels),
    ]


def test_a_bomb_behind_a_tflite_model_is_never_unpacked():
    bomb = _zip(_entries(labels=bytes(50_000_000)), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    with pytest.raises(IntegrityError, match="stored plainly"):
        tflite_texts.ZipTail().read(bomb)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (_zip([*_entries(), (zipfile.ZipInfo("../evil"), b"")]), "alone"),
        (_zip(_entries()[:1]), "alone"),
        (_zip([_entries()[0], (zipfile.ZipInfo("../labels.txt"), b"")]), "alone"),
        (_zip(_entries(record=b" " * 300_000)), "at most"),
        (_zip(_entries(record=b"[" * 100_000)), "not JSON"),
        (_zip(_entries(record=b'{"a": {"b": 1}}')), "map keys to texts"),
        (_zip(_entries(record=b"[]")), "map keys to texts"),
        (_zip(_entries(record=b"\xff")), "not JSON"),
        (_zip(_entries())[:-6] + struct.pack("<I", 1) + b"\0\0", "does not end where"),
    ],
)
def test_a_hostile_zip_behind_a_model_is_an_integrity_error(tail: bytes, message: str):
    with pytest.raises(IntegrityError, match=message):
        tflite_texts.ZipTail().read(tail)


def test_huge_or_repeated_texts_in_an_onnx_file_are_refused(tmp_path):
    onnx_file(tmp_path / "m")
    source, props = (tmp_path / "m").read_bytes(), OnnxProps()
    with pytest.raises(IntegrityError, match="at most"):
        props.read(props.attach(source, {"edgeprune.name": "x" * 300_000}, b""))
    with pytest.raises(IntegrityError, match="too large"):
        props.read(source + protobuf.field_bytes(14, bytes(9 * 1024**2)))
    once = props.attach(source, TEXTS, LABEL_BYTES)
    with pytest.raises(IntegrityError, match="there twice"):
        props.read(props.attach(once, TEXTS, LABEL_BYTES))


def test_damaged_tails_never_raise_anything_but_integrity_errors(suffix, source):
    held = carrier(suffix)
    assert held is not None
    whole = held.attach(source, TEXTS, LABEL_BYTES)
    outcomes = set()
    for at in range(len(source), len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            try:
                outcomes.add(held.read(damaged) is None)
            except IntegrityError:
                outcomes.add("refused")
    assert "refused" in outcomes
