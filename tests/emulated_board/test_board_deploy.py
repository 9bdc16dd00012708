"""Whole commands on the emulated board: its answers are judged, and its times are shown for what they are or not taken at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tinynet
from emulated_board import write_devices
from small_project import small_project

from edgeprune.bundle.manifest import Manifest
from edgeprune.errors import DeviceError
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import Job
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.stages.kernels import plan_stages
from edgeprune.pipeline.stages.measure import EMULATED_SAMPLES
from edgeprune.progress import Silent
from edgeprune.records.base import read_json, read_yaml
from edgeprune.records.device import Device
from edgeprune.records.report import ProfileReport, Report
from edgeprune.records.workload import Workload
from edgeprune.workload.dataset import model_input
from edgeprune.workload.load import load_workload

pytestmark = [pytest.mark.board, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def small(arm64_board: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = small_project(tmp_path_factory.mktemp("small"))
    write_devices(home, arm64_board)
    return home


def test_a_profile_on_an_emulated_board_shows_both_precisions_stamped_emulated(small):
    done = tinynet.edgeprune(
        small, "profile", "--target", "rpi4", "--device", "litert", "--json", timeout_s=600
    )
    assert done.returncode == 0, done.stderr
    found = ProfileReport.model_validate_json(done.stdout)
    assert found.device == "litert"
    assert found.fingerprint.machine == "aarch64"
    assert {p: m.stamp for p, m in found.measurements.items()} == {
        "fp32": "emulated",
        "int8": "emulated",
    }
    assert sum(layer.int8_ms is not None for layer in found.layers) >= 4


def test_a_deployment_is_timed_here_and_proved_on_the_emulated_board(small):
    # In milliseconds that any computer keeps: which share of its time so small a net can lose is the processor's affair.
    args = ["--target", "rpi4", "--device", "litert", "--latency", "100ms", "--run", "run"]
    done = tinynet.edgeprune(small, "deploy", *args, timeout_s=800)
    assert done.returncode == 0, done.stderr
    report = read_json(Report, small / "run" / "report.json")

    assert report.stamp == report.fingerprint.stamp == "stand-in"
    assert report.device == report.fingerprint.device == "this-machine"
    assert report.fingerprint.runtime == "litert"
    assert {m.stamp for m in report.measurements.values()} == {"stand-in"}
    told = "numerics were verified on the emulated device litert; times are of this machine"
    assert any(note.startswith(told) for note in report.notes)

    answered = [entry for entry in report.ledger if entry.stage == "on-device"]
    assert [(entry.where, entry.n) for entry in answered] == [("litert", EMULATED_SAMPLES)]
    (numerics,) = (gate for gate in report.gates if gate.name == "numerics")
    assert numerics.met
    manifest = read_json(Manifest, small / "run" / "bundle" / "manifest.json")
    assert (manifest.latency.device, manifest.latency.stamp) == ("this-machine", "stand-in")
    assert (manifest.runtime.name, manifest.runtime.min_version) == ("litert", "2.3.0")

    done = tinynet.edgeprune(small, "verify", "run/bundle", "--device", "litert", "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)["levels"][-1]
    assert (last["name"], last["status"]) == ("golden on litert", "passed")


def resolved(home: Path, target: str, device: str) -> Job:
    loaded = load_workload(read_yaml(Workload, home / "edgeprune.yaml"), home)
    return api.resolve(loaded, Options(target=target, device=device))


def test_each_board_runs_the_files_with_the_runtime_that_it_can_have(small, monkeypatch, files):
    """tflite-runtime on the board, and LiteRT where this machine stands in for its times."""
    monkeypatch.chdir(small)
    job = resolved(small, "rpi3-32bit", "tflite-runtime")
    with pipeline.opened(job, Silent()) as context:
        boards = (context.board, context.proof)
        assert [context.runtime_on(b).name for b in boards] == ["litert", "tflite-runtime"]
        assert context.board is context.host
        assert "times are of litert, which stands in for tflite-runtime" in context.notes
        x = model_input(files.raw[:4], files.preprocess)
        here, there = (context.run_file(b, files.path("tflite", "int8"), x) for b in boards)
    assert here.argmax(1).tolist() == there.argmax(1).tolist()


def test_no_plan_is_made_on_times_of_an_emulated_board(small, monkeypatch):
    """What keeps them out does not rest on who opens the boards."""
    monkeypatch.chdir(small)
    job = resolved(small, "rpi4", "litert")
    with (
        RunFolder(small / "refused", Silent()) as run,
        pipeline.opened(job, Silent(), for_planning=False) as context,
        pytest.raises(DeviceError, match="'litert' is emulated"),
    ):
        plan_stages(context, run)
    assert list((small / "refused").rglob("*.tflite")) == []
