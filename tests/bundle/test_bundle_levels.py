"""What the levels of verify look at: operators and types, who computes them, and the time on a device."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bundle_checks import failed_level, level_checks, reseal, this_machine
from bundle_fixture import (
    expected,
    facts,
    images,
    make_bundle,
    onnx_file,
    tflite_bundle,
    tflite_file,
)

from edgeprune.bundle import device_check as behaviour
from edgeprune.bundle import verify
from edgeprune.bundle.golden import judge
from edgeprune.bundle.manifest import Manifest
from edgeprune.bundle.verify import require_ok
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.devices.board import open_board
from edgeprune.devices.plans import Loaded, TimingPlan
from edgeprune.errors import BudgetError, IntegrityError
from edgeprune.formats import load as load_format
from edgeprune.formats.inside.anatomy import anatomy
from edgeprune.records.base import read_json


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_operators_are_counted_as_the_exporters_count_them(tmp_path, form):
    path = tmp_path / f"m.{form}"
    onnx_file(path, eight_bit=True) if form == "onnx" else tflite_file(path)
    found = anatomy(form, path.read_bytes())
    assert found is not None
    described = load_format(form).describe(path).op_counts
    assert dict(found.operators) == {op: n for op, n in described.items() if ":" not in op}
    assert (found.weighted, found.eight_bit) == (1, 1)


def test_float_layers_are_told_from_8_bit_ones(tmp_path):
    onnx_file(tmp_path / "m")
    found = anatomy("onnx", (tmp_path / "m").read_bytes())
    assert found is not None
    assert (found.weighted, found.eight_bit) == (1, 0)
    assert found.tensors == {"float32": 1}
    assert anatomy("coreml", b"anything") is None


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_a_damaged_graph_is_an_integrity_error_and_never_crashes(tmp_path, form):
    path = tmp_path / "m"
    onnx_file(path, eight_bit=True) if form == "onnx" else tflite_file(path)
    whole = path.read_bytes()
    outcomes = set()
    for at in range(0, len(whole), 3):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            try:
                outcomes.add(anatomy(form, damaged) is None)
            except IntegrityError:
                outcomes.add("refused")
    assert outcomes == {False, "refused"}


def test_int8_weights_behind_float_activations_are_not_int8(tmp_path):
    from onnx import helper, load, save

    folder = make_bundle(tmp_path / "bundle", eight_bit=True)
    model = load(folder / "models/model.int8.onnx")
    nodes = [n for n in model.graph.node if n.output[0] in ("weight",)]
    flat = helper.make_node("Flatten", ["input"], ["flat"])
    gemm = helper.make_node("Gemm", ["flat", "weight"], ["output"], transB=1)
    del model.graph.node[:]
    model.graph.node.extend([flat, *nodes, gemm])
    save(model, folder / "models/model.int8.onnx")
    reseal(folder)
    failed = failed_level(folder)
    assert failed.level == 3
    assert "at least 90% of its layers in 8 bits, but 0 of 1 do" in failed.detail


def test_another_graph_than_the_manifest_lists_fails(tmp_path):
    artifact = onnx_file(tmp_path / "m.onnx").model_copy(
        update={"op_counts": {"Gemm": 2, "Flatten": 1}}
    )
    payload = Payload(artifact, tmp_path / "m.onnx", images(), expected(images()))
    failed = failed_level(write_bundle(tmp_path / "bundle", facts(), payload))
    assert (failed.level, failed.detail) == (3, "the model must have 2 Gemm, but has 1")


def test_the_error_is_given_in_steps_of_the_output(tmp_path):
    folder = tflite_bundle(tmp_path)
    manifest = read_json(Manifest, folder / "manifest.json")
    golden = np.load(folder / "golden/outputs.npy")
    off = golden.copy()
    off[0, 0] += 0.5
    found = judge(off, golden, manifest)
    assert (found.step, found.max_abs_error) == (0.25, 0.5)
    assert found.mean_abs_error == pytest.approx(0.5 / 24)
    assert "in steps 2 and 0.0833" in str(found)


def test_the_golden_check_fails_when_classes_change_within_the_tolerance(tmp_path):
    manifest = read_json(Manifest, make_bundle(tmp_path / "b") / "manifest.json")
    golden = np.zeros((8, 3), np.float32)
    golden[:, 0] = 1e-5
    found = judge(golden[:, ::-1], golden, manifest)
    assert found.max_abs_error < found.limit
    assert not found.ok


def test_xnnpack_tells_how_much_it_took(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "LOCAL", this_machine(tmp_path))
    report = verify.verify(tflite_bundle(tmp_path))
    delegate = level_checks(report, 4)["delegate"]
    assert (delegate.status, delegate.detail) == ("passed", "XNNPACK took 1 of 1 operators")


class Pi:
    """A strict board, of which the check needs no more than its name."""

    name = "pi"


@pytest.mark.parametrize(
    ("runtime", "precision", "status"),
    [
        ("litert", "int8", "failed"),
        ("tflite-runtime", "fp32", "failed"),
        ("tflite-runtime", "int8", "not-run"),
    ],
)
def test_no_operator_in_xnnpack_is_no_fault_of_a_runtime_that_gives_it_none(
    tmp_path, runtime, precision, status
):
    manifest = read_json(Manifest, tflite_bundle(tmp_path) / "manifest.json")
    manifest = manifest.model_copy(
        update={
            "runtime": manifest.runtime.model_copy(update={"name": runtime}),
            "model": manifest.model.model_copy(update={"precision": precision}),
        }
    )
    loaded = Loaded("model", 1, 1, manifest.model.inputs, manifest.model.outputs, (0, 30))
    found = behaviour.delegate_check(Pi(), manifest, loaded, must=True)  # type: ignore[arg-type]
    assert found.status == status
    assert found.detail.startswith("XNNPACK took 0 of 30 operators")
    assert ("built-in kernels run the INT8 operators" in found.detail) is (status == "not-run")


@pytest.mark.parametrize(
    ("counts", "status", "detail"),
    [
        ({"macs": 200, "macs:xnnpack": 200}, "passed", "XNNPACK runs 100% of"),
        ({"macs": 200, "macs:xnnpack": 100}, "passed", "XNNPACK runs 50% of"),
        ({"macs": 200, "macs:xnnpack": 98}, "failed", "XNNPACK runs 49% of"),
        ({"macs": 200, "macs:xnnpack": 0}, "failed", "XNNPACK runs 0% of"),
        ({"macs": 0, "macs:xnnpack": 0}, "not-run", "the manifest does not count"),
        ({"macs": 200}, "not-run", "the manifest does not count"),
        ({}, "not-run", "the manifest does not count"),
    ],
)
def test_the_share_of_xnnpack_in_a_pte_is_that_of_the_manifest(tmp_path, counts, status, detail):
    manifest = read_json(Manifest, make_bundle(tmp_path / "b") / "manifest.json")
    model = manifest.model.model_copy(update={"format": "executorch", "op_counts": counts})
    loaded = Loaded("model", 1, 1, model.inputs, model.outputs)
    runtime = manifest.runtime.model_copy(update={"name": "executorch"})
    manifest = manifest.model_copy(update={"model": model, "runtime": runtime})
    for must in (True, False):
        found = behaviour.delegate_check(Pi(), manifest, loaded, must=must)  # type: ignore[arg-type]
        assert found.status == status
        assert found.detail.startswith(detail)


def test_the_built_in_kernels_are_no_delegate(tmp_path):
    tflite_file(tmp_path / "m.tflite")
    content = (tmp_path / "m.tflite").read_bytes()
    with open_board("here", this_machine(tmp_path)) as board:
        fast = board.load("a", content, runtime="litert", threads=1)
        slow = board.load("b", content, runtime="litert", threads=1, delegate=False)
    assert (fast.delegated, slow.delegated) == ((1, 1), (0, 1))


def test_onnxruntime_tells_its_provider_and_how_much_is_8_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "LOCAL", this_machine(tmp_path))
    report = verify.verify(make_bundle(tmp_path / "bundle", eight_bit=True))
    delegate = level_checks(report, 4)["delegate"]
    assert delegate.status == "passed", delegate
    assert "on CPUExecutionProvider" in delegate.detail
    assert "1 compute in 8 bits, 0 that could do not" in delegate.detail


def test_a_machine_that_another_program_measures_on_is_not_disturbed(tmp_path, monkeypatch):
    local = this_machine(tmp_path)
    monkeypatch.setattr(verify, "LOCAL", local)
    folder = make_bundle(tmp_path / "bundle")
    with open_board("held", local):
        report = verify.verify(folder)
    assert report.ok
    assert level_checks(report, 4)["delegate"].status == "not-run"


@pytest.mark.parametrize("key", ["operators", "metadata", "tensors"])
def test_level_3_names_each_thing_that_it_compared(tmp_path, key):
    assert level_checks(verify.verify(make_bundle(tmp_path / "bundle")), 3)[key].status == "passed"


def _timed(
    tmp_path: Path, limit_ms: float, median_ms: float, *, stand_in: bool
) -> verify.VerifyReport:
    latency = facts().latency.model_copy(update={"limit_ms": limit_ms, "median_ms": median_ms})
    folder = make_bundle(tmp_path / f"b{limit_ms}", latency=latency)
    return verify.verify(folder, devices=[("desk", this_machine(tmp_path, stand_in=stand_in))])


def test_latency_on_a_device_is_judged_against_the_budget_and_the_manifest(tmp_path, monkeypatch):
    quick = TimingPlan(rounds=4, block_ms=5.0, min_runs=3, max_runs=20, warmup_ms=20.0)
    monkeypatch.setattr(behaviour, "_PLAN", quick)
    fine = _timed(tmp_path, 1000.0, 500.0, stand_in=False)
    assert fine.ok, fine
    assert level_checks(fine, 5)["latency"].detail.endswith(
        "the manifest says 500, the budget 1000)"
    )
    slow = _timed(tmp_path, 1e-6, 1e-6, stand_in=False)
    assert not slow.ok
    assert slow.levels[5].detail.startswith("latency: median ")
    with pytest.raises(BudgetError, match="failed level 5"):
        require_ok(slow)


def test_the_time_of_a_stand_in_is_not_judged(tmp_path):
    report = _timed(tmp_path, 1e-6, 1e-6, stand_in=True)
    assert report.ok
    latency = level_checks(report, 5)["latency"]
    assert latency.status == "not-run"
    assert "stand-in" in latency.detail


def test_a_bundle_copied_elsewhere_verifies_as_before(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    shutil.copytree(folder, tmp_path / "elsewhere" / "other-name")
    assert verify.verify(tmp_path / "elsewhere" / "other-name").ok
