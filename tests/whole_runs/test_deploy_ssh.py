"""A whole deployment on a board behind a real SSH server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinynet
import yaml
from sshd import Sshd, serve

from edgeprune.bundle.manifest import Manifest
from edgeprune.records.base import read_json
from edgeprune.records.report import Report

BOARD = "shelf"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


def write_devices(home: Path, server: Sshd, **changes: object) -> None:
    board = server.device(targets=("this-machine",), **changes)
    devices = {BOARD: board.model_dump(mode="json")}
    (home / "devices.yaml").write_text(yaml.safe_dump({"schema_version": 1, "devices": devices}))


@pytest.fixture(scope="module")
def deployed(server: Sshd, tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    """A deployment that found the board in ``devices.yaml`` because it lists the target."""
    home = tinynet.project(tmp_path_factory.mktemp("ssh") / "project")
    write_devices(home, server)
    args = ("deploy", "--target", "this-machine", "--latency", "1000ms", "--run", "run")
    return tinynet.Run(home, home / "run", tinynet.edgeprune_here(home, *args))


@pytest.fixture(scope="module")
def report(deployed: tinynet.Run) -> Report:
    assert deployed.done.returncode == 0, deployed.done.stderr
    return read_json(Report, deployed.folder / "report.json")


def test_the_board_that_lists_the_target_is_used(report):
    assert report.device == report.fingerprint.device == BOARD
    assert report.fingerprint.transport == "ssh"


def test_a_board_that_stands_in_for_another_says_so(report):
    assert report.stamp == "stand-in"
    assert {m.stamp for m in report.measurements.values()} == {"stand-in"}


def test_a_budget_over_the_dense_latency_prunes_nothing_and_passes(deployed, report):
    assert all(len(group.kept) == group.channels for group in report.plan.groups)
    assert report.passed
    manifest = read_json(Manifest, deployed.folder / "bundle" / "manifest.json")
    assert manifest.status == tinynet.kept_status(report)


def test_the_last_line_of_the_ledger_is_what_the_board_answered(report):
    on_device = [entry for entry in report.ledger if entry.stage == "on-device"]
    assert [entry.where for entry in on_device] == [BOARD]
    assert on_device[0].note == ""  # it is not this machine
    (numerics,) = (gate for gate in report.gates if gate.name == "numerics")
    assert numerics.met
    assert numerics.value == 1.0  # the same runtime on the same processor


def test_the_bundle_runs_its_golden_samples_on_the_board(deployed):
    done = tinynet.edgeprune_here(
        deployed.project, "verify", "run/bundle.zip", "--device", BOARD, "--json"
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)["levels"][-1]
    assert (last["level"], last["name"], last["status"]) == (5, f"golden on {BOARD}", "passed")


@pytest.mark.slow
def test_a_board_that_is_the_real_thing_is_stamped_measured(server, tmp_path):
    home = tinynet.project(tmp_path / "project")
    write_devices(home, server, stand_in=False, max_foreign_cpu_ratio=1.0)
    done = tinynet.edgeprune_here(
        home, "profile", "--target", "this-machine", "--device", BOARD, "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fingerprint"]["stamp"] == "measured"
    assert {m["stamp"] for m in found["measurements"].values()} == {"measured"}


def test_a_board_without_the_runtime_fails_before_anything_is_exported(server, tmp_path):
    home = tinynet.project(tmp_path / "project")
    write_devices(home, server, python="/usr/bin/python3")
    done = tinynet.edgeprune_here(home, "deploy", "--target", "this-machine", "--run", "run")
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-2].startswith("error:")
    assert "pip install" in done.stderr.splitlines()[-1]
    assert not list((home / "run").glob("stages/*"))
