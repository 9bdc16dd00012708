"""Calibration sees every sample of a file once, in order, and keeps none: whatever is made of the file, and however many there are."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import int8_fixture
import numpy as np
import onnxruntime.quantization as tools
import pytest
import zoo

from edgeprune import formats
from edgeprune.devices.board import open_board
from edgeprune.formats import QuantizeOptions
from edgeprune.formats.onnx import inspect as onnx_inspect
from edgeprune.formats.onnx.format import VARIANTS, OnnxFormat
from edgeprune.formats.shared import calibration as shared
from edgeprune.formats.shared.ranges import spreads
from edgeprune.formats.tflite import inspect as tflite_inspect
from edgeprune.pipeline.files import export as conversion
from edgeprune.pipeline.files import int8_types
from edgeprune.pipeline.files.records import TypesRow
from edgeprune.records import catalog

INSPECTION = {"onnx": onnx_inspect, "tflite": tflite_inspect}


def samples(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 12, 12)).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    """No test finds what another has calibrated."""
    monkeypatch.setattr(shared, "_seen", {})


@pytest.fixture(scope="module", params=["tflite", "onnx"])
def exported(request, tmp_path_factory):
    form = formats.load(request.param)
    path = tmp_path_factory.mktemp(request.param) / f"fp32{form.info.suffix}"
    form.export(zoo.make(zoo.ZOO["squeeze-excite"])[0], samples(1), path)
    return form, path


@pytest.fixture
def shown(exported, monkeypatch) -> list[int]:
    """How many samples every look into a file has shown."""
    return counted(monkeypatch, exported[0].info.name)


def counted(monkeypatch, name: str) -> list[int]:
    looks: list[int] = []
    plain = INSPECTION[name].activations

    def activations(content: bytes, x: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        looks.append(0)
        for sample in plain(content, x):
            looks[-1] += 1
            yield sample

    monkeypatch.setattr(INSPECTION[name], "activations", activations)
    return looks


# Once


def test_a_file_is_looked_at_once_for_its_extremes_and_once_to_count(exported, shown, tmp_path):
    form, path = exported
    layers = [QuantizeOptions(float_layers=(name,)) for name in ("project", "head.2")]
    for options in (QuantizeOptions(), *layers):
        form.quantize(path, samples(8), tmp_path / "a", options=options)
    assert shown == [8]
    for ranges in ("percentile", "mse", "minmax"):
        form.quantize(path, samples(8), tmp_path / "a", options=QuantizeOptions(ranges=ranges))
    assert shown == [8, 8]
    form.quantize(path, samples(8, seed=1), tmp_path / "a")
    assert shown == [8, 8, 8]


def test_what_was_seen_of_the_oldest_file_is_forgotten(exported, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "KEPT", 2)
    form, path = exported
    for seed in (0, 1, 0, 2, 0, 1):
        form.quantize(path, samples(4, seed), tmp_path / "a")
    assert shown == [4, 4, 4, 4]
    assert len(shared._seen) == 2


def test_files_after_another_look_the_same_as_without(exported, tmp_path):
    form, path = exported
    options = [QuantizeOptions(ranges=r) for r in ("minmax", "mse", "percentile")]
    for number, one in enumerate(options):
        form.quantize(path, samples(8), tmp_path / f"{number}", options=one)
    for number, one in enumerate(options):
        shared._seen.clear()
        form.quantize(path, samples(8), tmp_path / "fresh", options=one)
        assert (tmp_path / "fresh").read_bytes() == (tmp_path / f"{number}").read_bytes()


def test_ranges_are_those_of_onnxruntimes_own_calibration(tmp_path):
    path, own, x = tmp_path / "a.onnx", tmp_path / "own.onnx", samples(8)
    OnnxFormat().export(zoo.make(zoo.ZOO["squeeze-excite"])[0], x[:1], path)
    kinds = {"uint8": tools.QuantType.QUInt8, "int8": tools.QuantType.QInt8}

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"input": x[i : i + 1]} for i in range(len(x))])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    for types in VARIANTS:
        form = OnnxFormat(types)
        found = form.quantize(path, x, tmp_path / "b.onnx")
        kind = kinds[types.activations]
        tools.quantize_static(
            path, own, Reader(), per_channel=types.per_channel, activation_type=kind
        )
        ours, theirs = form.ranges(tmp_path / "b.onnx"), form.ranges(own)
        assert ours.keys() == theirs.keys()
        for name, (low, high) in theirs.items():
            assert ours[name] == pytest.approx((low, high), abs=1e-5 * (high - low)), name
        assert found.op_counts == form.describe(own).op_counts


def timed(name: str) -> TypesRow:
    return TypesRow(name=name, median_ms=1, ratio=1, ratio_high=1, agreement=1, holds=True)


def test_the_pre_flight_quantises_each_variant_once_and_calibrates_once(tmp_path, monkeypatch):
    looks, files = counted(monkeypatch, "onnx"), []
    plain = OnnxFormat.quantize

    def quantize(self, fp32: Path, *rest, **options):
        files.append((fp32.name, self.types.name))
        return plain(self, fp32, *rest, **options)

    monkeypatch.setattr(OnnxFormat, "quantize", quantize)
    monkeypatch.setattr(int8_types, "_rows", lambda context, paths, _: (*map(timed, paths),))
    with open_board("here", int8_fixture.local(tmp_path)) as board:
        context = int8_fixture.context_of(board, int8_fixture.uneven())
        context.job.profile = catalog.profile("x86-64")
        made = conversion.dense_files(context, tmp_path)
    assert files == [("dense.fp32.onnx", types.name) for types in VARIANTS]
    calibration = len(context.calibration)
    warnings = min(32, calibration)
    assert looks == [calibration, warnings, warnings]
    assert {row.name for row in made.types} == {types.name for types in VARIANTS}


# Memory


def test_no_sample_outlives_the_next():
    alive: weakref.WeakSet[np.ndarray] = weakref.WeakSet()

    class Kept(np.ndarray):
        """An array that a weak set can hold."""

        __hash__ = object.__hash__

    def passes() -> Iterator[dict[str, np.ndarray]]:
        for i in range(20):
            value = samples(1, i).view(Kept)
            alive.add(value)
            assert len(alive) <= 2
            yield {"x": value}

    assert int(spreads(passes)["x"].counts.sum()) == 20 * samples(1).size


def test_memory_does_not_grow_with_the_number_of_samples(exported, tmp_path):
    form, path = exported

    def peak(n: int) -> int:
        x = samples(n)
        gc.collect()
        tracemalloc.start()
        try:
            form.quantize(path, x, tmp_path / "a")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # imports
    few, many = peak(8), peak(264)
    all_samples = samples(256).nbytes
    assert many - few < all_samples / 4
