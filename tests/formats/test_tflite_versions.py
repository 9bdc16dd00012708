"""Operators of ``.tflite`` files against those that the oldest runtime of each name loads: at export, and in ``verify``."""

from __future__ import annotations

import pytest
import zoo
from bundle_checks import failed_level, level_checks, reseal
from bundle_fixture import tflite_bundle

from edgeprune import formats
from edgeprune.bundle import verify
from edgeprune.bundle.manifest import Manifest
from edgeprune.bundle.model_check import versions_check
from edgeprune.devices.setup.runtime_pins import load_pins
from edgeprune.errors import FormatError
from edgeprune.formats import check_runtime
from edgeprune.formats.tflite.graph import read_model, write_model
from edgeprune.formats.tflite.inspect import check_versions
from edgeprune.formats.tflite.versions import oldest
from edgeprune.records.base import read_json

RUNTIMES = ("litert", "tflite-runtime")
CONV_2D = 3


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    model, x = zoo.make(zoo.ZOO["plain"])
    path = tmp_path_factory.mktemp("plain") / "x.tflite"
    formats.load("tflite").export(model, x.numpy()[:1], path)
    return path.read_bytes()


def raised(content: bytes, version: int) -> bytes:
    tree = read_model(content)
    for code in tree.operatorCodes:
        if code.builtinCode == CONV_2D:
            code.version = version
    return write_model(tree)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_table_is_of_the_oldest_version_that_may_come_onto_a_board(runtime):
    pins = load_pins()
    pinned = {
        tuple(map(int, pins._wheel(files[0]).version.split(".")))
        for board in pins.classes
        for files in board.runtimes.get(runtime, ())
    }
    table = oldest(runtime)
    assert table is not None
    assert table.runtime == runtime
    assert tuple(map(int, table.version.split("."))) == min(pinned)
    assert table.version in table.source


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_tables_know_the_usual_operators(runtime):
    known = oldest(runtime).most
    assert known["CONV_2D"] >= 5
    assert known["QUANTIZE"] >= 2
    assert len(known) > 100


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_operator_newer_than_the_oldest_runtime_is_refused_by_name_and_version(content, runtime):
    table = oldest(runtime)
    most = table.most["CONV_2D"]
    check_versions(raised(content, most), runtime)
    said = rf"CONV_2D version {most + 1} .* {table.name} knows it up to version {most};"
    with pytest.raises(FormatError, match=said):
        check_versions(raised(content, most + 1), runtime)


def test_an_operator_that_the_oldest_runtime_does_not_know_is_refused():
    with pytest.raises(FormatError, match=r"NEW version 1 is in the file, but litert .* not know"):
        oldest("litert").check(3, [("CONV_2D", 1), ("NEW", 1)])


def test_a_newer_schema_is_refused(content):
    tree = read_model(content)
    tree.version = 4
    with pytest.raises(FormatError, match="schema version 4"):
        check_versions(write_model(tree), "litert")


def test_the_export_is_checked_for_the_runtime_that_ships(content, tmp_path):
    path = tmp_path / "x.tflite"
    path.write_bytes(raised(content, 99))
    form = formats.load("tflite")
    with pytest.raises(FormatError, match="CONV_2D version 99"):
        check_runtime(form, path, "litert")
    assert check_runtime(form, path, "executorch") == ()


def test_verify_names_the_oldest_runtime_that_loads_the_model(tmp_path):
    checks = level_checks(verify.verify(tflite_bundle(tmp_path)), 3)
    assert checks["versions"].status == "passed"
    assert checks["versions"].detail.startswith(f"{oldest('litert').name} loads every operator")


def test_verify_fails_a_model_that_the_oldest_runtime_cannot_load(tmp_path):
    folder = tflite_bundle(tmp_path)
    model = folder / "models/model.int8.tflite"
    tree = read_model(model.read_bytes())
    tree.operatorCodes[0].version = 99
    model.write_bytes(write_model(tree))
    reseal(folder)
    failed = failed_level(folder)
    assert failed.level == 3
    assert failed.detail.startswith("FULLY_CONNECTED version 99 is in the file, but litert ")


def test_without_the_names_of_operators_nothing_is_claimed(tmp_path, monkeypatch):
    folder = tflite_bundle(tmp_path)
    manifest = read_json(Manifest, folder / "manifest.json")
    monkeypatch.setattr("edgeprune.formats.tflite.reader.operator_names", dict)
    found = versions_check(manifest, (folder / manifest.model.path).read_bytes())
    assert found.status == "not-run"
