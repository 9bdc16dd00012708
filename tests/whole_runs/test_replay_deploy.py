"""Search and pipeline against the recorded behaviour of a board, without the board."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import replayed
import tinynet

from edgeprune.bundle.manifest import Manifest
from edgeprune.devices.store import MeasurementStore
from edgeprune.records.base import read_json
from edgeprune.records.report import Report

pytestmark = pytest.mark.slow  # whole deployments; test_recording has the quick ones
REPLAY = (*replayed.COMMAND, "--device", "replayed")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    return replayed.recorded(tmp_path_factory)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[replayed.Zygote]:
    with replayed.zygote(tmp_path_factory.mktemp("zygote")) as made:
        yield made


@pytest.fixture(scope="module")
def again(recorded, zygote, tmp_path_factory) -> Path:
    """The project of a deployment that was replayed from end to end."""
    home = replayed.replaying(recorded, tmp_path_factory.mktemp("again") / "project")
    assert zygote.run(home, *REPLAY) in (0, 6), (home / "log").read_text()
    return home


def report(run: Path) -> Report:
    return read_json(Report, run / "report.json")


def model_sha256(run: Path) -> str:
    """Of the model without the texts inside it, which name the device: a replay is another."""
    return read_json(Manifest, run / "bundle" / "manifest.json").source_sha256


def test_a_replayed_deployment_ends_in_the_same_plan_and_the_same_file(recorded, again):
    first, second = report(recorded.folder), report(again / "run")
    assert second.plan == first.plan
    assert second.checks == first.checks
    assert second.gates == first.gates
    assert model_sha256(again / "run") == model_sha256(recorded.folder)


def test_replayed_latencies_are_those_that_were_measured(recorded, again):
    first, second = report(recorded.folder).measurements, report(again / "run").measurements
    assert {n: m.blocks for n, m in second.items()} == {n: m.blocks for n, m in first.items()}
    assert {m.stamp for m in second.values()} == {"stand-in"}


def test_the_report_says_that_it_was_replayed_and_from_what(recorded, again):
    found = report(again / "run")
    assert any(n.startswith(f"replayed from {replayed.RECORDING}") for n in found.notes)
    assert not any("replayed" in note for note in report(recorded.folder).notes)
    assert (found.device, found.fingerprint.device) == ("replayed", "desk")
    assert found.fingerprint.transport == "replay"


def test_a_plan_of_another_budget_may_not_be_covered_and_says_so(recorded, zygote, tmp_path):
    home = replayed.replaying(recorded, tmp_path / "project")
    shutil.copytree(recorded.project / "run" / "stages", home / "run" / "stages")
    other = ("plan", "kernels", "nets", "dense-latency", "importance")
    for name, folder in tinynet.stage_folders(home / "run").items():
        if name in other:
            shutil.rmtree(folder)
    tinynet.write_settings(
        home, recovery={"epochs": 1}, preprocess={"color": "grey", "mean": [0.1]}
    )
    assert zygote.run(home, *REPLAY, "--dry-run") == 4
    (error,) = (x for x in (home / "log").read_text().splitlines() if x.startswith("error:"))
    assert "the recording desk.epr does not cover load of" in error


def test_a_stage_that_was_killed_takes_its_timings_from_the_store(recorded, zygote, tmp_path):
    home = replayed.replaying(recorded, tmp_path / "project")
    pid = zygote.start(home, *REPLAY, "--dry-run")
    replayed.wait_until(lambda: any((home / "run").glob("stages/nets-*/stage.json")), pid)
    replayed.kill(pid)
    assert zygote.code() < 0
    kernels = tinynet.stage_folders(home / "run")["kernels"]
    first = (kernels / "stage.json").read_text()
    # Kernels that are twice as slow in the store alone show where the second run takes its times from.
    slower(home / "run" / "measurements.sqlite")
    shutil.rmtree(kernels)
    assert zygote.run(home, *REPLAY, "--dry-run") in (0, 4, 6), (home / "log").read_text()
    second = (kernels / "stage.json").read_text()
    assert total_ns(second) == pytest.approx(2 * total_ns(first), rel=1e-6)


def slower(path: Path) -> None:
    """Double the samples of every timing in a store."""
    with MeasurementStore(path) as store:
        rows = store._database.execute("SELECT key FROM replies").fetchall()
        for (key,) in rows:
            reply = store.get(key)
            assert reply is not None
            for blocks in reply["blocks"].values():
                for block in blocks:
                    block["samples_ns"] = [2 * ns for ns in block["samples_ns"]]
            store.put(key, reply)
    assert len(rows) >= 3


def total_ns(stage: str) -> float:
    """All times of the staircases of a kernel stage."""
    found = json.loads(stage)["result"]["staircases"]
    return sum(ns for s in found.values() for ns in s["ns"])
