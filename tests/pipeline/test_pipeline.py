"""Whole deployments from outside: files in, command line, exit code, bundle and report out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinynet
import torch

import edgeprune
from edgeprune.bundle.manifest import Manifest
from edgeprune.errors import IntegrityError, SpecError
from edgeprune.pipeline import run as pipeline
from edgeprune.plan.latency.kernel_times import read_times
from edgeprune.records.base import read_json, read_yaml
from edgeprune.records.files import write_json
from edgeprune.records.plan import PlanFile
from edgeprune.records.report import Report
from edgeprune.records.workload import Augment, Preprocess, Recovery, Workload

MISSED = 6
BEFORE_PLAN = tinynet.STAGES[: tinynet.STAGES.index("plan")]


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    return tinynet.deployed(tmp_path_factory)


@pytest.fixture(scope="session")
def report(deployed: tinynet.Run) -> Report:
    return read_report(deployed.folder)


@pytest.fixture
def project(deployed: tinynet.Run, tmp_path: Path) -> Path:
    """A project whose run folder ``run`` already has everything that was measured before the plan."""
    home = tinynet.project(tmp_path / "project")
    for name, folder in tinynet.stage_folders(deployed.folder).items():
        if name in BEFORE_PLAN:
            shutil.copytree(folder, home / "run" / "stages" / folder.name)
    return home


def read_report(run: Path) -> Report:
    return read_json(Report, run / "report.json")


def read_manifest(bundle: Path) -> Manifest:
    return read_json(Manifest, bundle / "manifest.json")


def deploy(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return tinynet.edgeprune_here(home, "deploy", "--target", "this-machine", "--run", "run", *args)


def write_narrowest_plan(project: Path, report: Report) -> None:
    """``narrowest.json``: as few channels as were timed in every group."""
    folders = tinynet.stage_folders(project / "run")
    table = json.loads((folders["kernels"] / "stage.json").read_text())
    grids = {group: tuple(widths) for group, widths in table["result"]["grids"].items()}
    plan = PlanFile(
        target=report.target,
        budget=report.budget,
        precision=report.plan.precision,
        dense_ms=report.plan.dense_ms,
        predicted_ms=report.plan.predicted_ms,
        measured_ms=report.plan.predicted_ms,
        widths={group: widths[0] for group, widths in grids.items()},
        admissible_widths=grids,
    )
    write_json(plan, project / "narrowest.json")


def test_a_deployment_leaves_a_bundle_and_a_report(deployed):
    for name in ("bundle/manifest.json", "bundle.zip", "report.html", "report.json", "run.json"):
        assert (deployed.folder / name).stat().st_size > 0
    assert not list(deployed.folder.rglob("*.part"))


def test_the_exit_code_follows_the_gates(deployed, report):
    assert report.passed is all(gate.met for gate in report.gates)
    assert deployed.done.returncode == (0 if report.passed else MISSED), deployed.done.stderr


def test_the_gates_say_what_the_rows_say(report):
    rows = {(r.variant, r.precision): r for r in report.variants}
    assert len(rows) == len(report.variants) == 4
    shipped, dense = rows["pruned", report.shipped], rows["dense", "fp32"]
    gates = {gate.name: gate for gate in report.gates}
    assert gates["latency"].value == shipped.ratio_to_dense
    assert gates["latency"].limit == 0.8
    assert gates["accuracy"].value == pytest.approx(dense.quality - shipped.quality)
    assert gates["numerics"].value >= 0.99


def test_the_budget_was_met_on_the_device_before_training_and_within_noise_after_it(report):
    chosen = [c for c in report.checks if c.widths == report.plan.widths() and c.within_budget]
    assert chosen
    (latency,) = (gate for gate in report.gates if gate.name == "latency")
    assert latency.value < 0.8 * 1.08


def test_what_was_pruned_is_smaller_and_what_was_measured_is_kept(report):
    rows = {(r.variant, r.precision): r for r in report.variants}
    for precision in ("fp32", "int8"):
        dense, pruned = rows["dense", precision], rows["pruned", precision]
        assert pruned.parameters < dense.parameters
        assert pruned.size_bytes < dense.size_bytes
        assert pruned.macs < dense.macs
        assert dense.median_ms == report.measurements[f"dense-{precision}"].median_ms
    # The precision that was searched in; the other one may gain nothing on a net this small.
    assert rows["pruned", report.shipped].ratio_to_dense < 1
    assert rows["dense", "int8"].size_bytes < rows["dense", "fp32"].size_bytes
    assert all(len(m.samples_ns()) >= 8 * 5 for m in report.measurements.values())


def test_this_machine_is_the_real_thing_as_a_target_of_its_own(report):
    assert report.stamp == report.fingerprint.stamp == "measured"
    assert report.fingerprint.transport == "local"


def test_the_ledger_has_every_stage_in_order(report):
    assert [entry.stage for entry in report.ledger if entry.stage != "quantised"] == [
        "dense", "pruned", "compensated", "recovered", "exported", "on-device",
    ]  # fmt: skip
    assert {entry.n for entry in report.ledger} == {tinynet.COUNTS["development"]}
    assert report.test_n == tinynet.COUNTS["test"]


def test_every_stage_is_in_the_account_of_the_time(report):
    names = [stage.name for stage in report.stages]
    assert [name for name in names if name in tinynet.STAGES] == list(tinynet.STAGES)
    assert all(stage.seconds >= 0 and not stage.cached for stage in report.stages)


class Text(HTMLParser):
    """The words of a page, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_the_page_shows_the_result_and_loads_nothing(deployed, report):
    page = Text()
    page.feed((deployed.folder / "report.html").read_text())
    text = " ".join(page.words)
    assert report.headline in text
    assert report.target in text
    assert not [link for link in page.loads if link.startswith(("http", "//"))]


def test_the_bundle_is_of_the_file_that_was_measured(deployed, report):
    manifest = read_manifest(deployed.folder / "bundle")
    shipped = report.measurements[f"pruned-{report.shipped}"]
    (model,) = (deployed.folder / "bundle" / "models").iterdir()
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert digest == manifest.model.sha256
    # The same file without the texts at its end.
    assert manifest.source_sha256 == shipped.artifact_sha256
    assert manifest.latency.median_ms == shipped.median_ms
    assert manifest.status == ("best-effort" if not report.passed else tinynet.kept_status(report))


def test_the_same_run_and_source_date_epoch_give_the_same_bundle_again(
    deployed, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    home = tinynet.project(tmp_path / "again")
    tinynet.copied_run(deployed.folder, home / "run")
    zips = []
    for _ in range(2):
        done = deploy(home, "--latency", "80%")
        assert done.returncode in (0, MISSED), done.stderr
        zips.append((home / "run" / "bundle.zip").read_bytes())
    assert zips[0] == zips[1]


def test_the_bundle_tells_nothing_of_the_machine_it_was_made_on(deployed):
    bundle = deployed.folder / "bundle"
    content = b"".join(path.read_bytes() for path in bundle.rglob("*") if path.is_file())
    assert str(deployed.project).encode() not in content
    assert b"/site-packages/" not in content
    record = json.loads((bundle / "repro" / "repro.json").read_bytes())
    assert record["command"].startswith("edgeprune deploy --target this-machine")
    assert record["versions"]["python"]
    assert (bundle / "repro" / "edgeprune.yaml").read_text().startswith("schema_version: 1")


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_the_bundle_verifies_and_predicts_its_golden_outputs(deployed, name):
    assert edgeprune.verify(deployed.folder / name).ok
    golden = deployed.folder / "bundle" / "golden"
    with edgeprune.load(deployed.folder / name) as bundle:
        found = bundle.predict(np.load(golden / "inputs.npy"))
        assert bundle.labels == tuple(tinynet.settings()["labels"])
    assert np.array_equal(found, np.load(golden / "outputs.npy"))


def test_the_sample_in_the_bundle_runs_without_edgeprune(deployed, tmp_path):
    bundle = tmp_path / "elsewhere"
    shutil.copytree(deployed.folder / "bundle", bundle)
    command = [sys.executable, "-I", "samples/python/predict.py", "--check"]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout


@pytest.mark.slow
def test_a_budget_over_the_dense_latency_prunes_nothing_and_passes(project):
    done = deploy(project, "--latency", "1000ms")
    assert done.returncode == 0, done.stderr
    found = read_report(project / "run")
    assert all(len(group.kept) == group.channels for group in found.plan.groups)
    assert found.passed
    assert read_manifest(project / "run" / "bundle").status == tinynet.kept_status(found)


def test_a_missed_accuracy_gate_ships_a_marked_best_effort(project, report):
    tinynet.write_settings(project, recovery={"epochs": 0})
    write_narrowest_plan(project, report)  # far too small to answer as the dense net does
    done = deploy(project, "--latency", "80%", "--plan", "narrowest.json", "--max-drop", "0%")
    check_best_effort(project, done)


@pytest.mark.slow
def test_a_search_that_misses_the_accuracy_gate_ships_a_marked_best_effort(project):
    tinynet.write_settings(project, recovery={"epochs": 0})
    write_doubtful_development(project)
    done = deploy(project, "--latency", "70%", "--importance", "random", "--max-drop", "0%")
    check_best_effort(project, done)


def write_doubtful_development(project: Path) -> None:
    """Development images so noisy that the dense net, whose answers are the labels, decides many of them by a hair."""
    x, _ = tinynet.arrays()["development"]
    noise = np.random.default_rng(0).normal(0, 120, x.shape)
    x = np.clip(x + noise, 0, 255).astype(np.uint8)
    with torch.no_grad():
        y = tinynet.trained()(torch.from_numpy(x)[:, None].float() / 255).argmax(1).numpy()
    with np.load(project / "data.npz") as data:
        np.savez(project / "data.npz", **{**data, "development_x": x, "development_y": y})


def check_best_effort(project: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == MISSED, done.stdout
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    (hint,) = (line for line in done.stderr.splitlines() if line.startswith("hint:"))
    found = read_report(project / "run")
    best = next(r for r in found.variants if (r.variant, r.precision) == ("pruned", found.shipped))
    assert not found.passed
    assert "accuracy dropped" in error
    assert f"the best accuracy reached at this latency is {best.quality:.2%}" in hint
    bundle = project / "run" / "bundle"
    manifest = read_manifest(bundle)
    assert manifest.status == "best-effort"
    assert "accuracy" in manifest.failed_gates
    assert "BEST EFFORT" in (bundle / "README.md").read_text().splitlines()[0]
    assert edgeprune.verify(bundle).ok  # whole, though not good enough


def test_a_budget_out_of_reach_is_refused_before_any_training(project):
    done = deploy(project, "--latency", "1%")
    assert done.returncode == MISSED
    assert "below the fastest admissible latency" in done.stderr
    assert set(tinynet.stage_folders(project / "run")) == set(BEFORE_PLAN)
    assert not (project / "run" / "bundle").exists()


def test_arrays_beside_a_model_that_is_only_named_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tinynet.project(tmp_path / "project"))
    data = {"train": tinynet.arrays()["train"]}
    with pytest.raises(SpecError) as error:
        edgeprune.deploy("net.py:build", data, target="this-machine")
    assert (
        error.value.message
        == "data must be a path where the model is named, as net.py:build is, but is dict"
    )
    assert "deploy(build(), data, ...)" in (error.value.hint or "")


def test_the_package_lists_what_it_offers():
    assert {"deploy", "load", "load_pruned", "verify"} <= set(dir(edgeprune))


@pytest.mark.slow  # all is measured anew; the API itself is met in the next test, live objects in those of workloads
def test_the_python_api_takes_live_objects_and_returns_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tinynet.project(tmp_path / "project"))
    x, y = tinynet.arrays()["train"]
    model = tinynet.trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = edgeprune.deploy(
        model,
        {"train": (x[:256], y[:256]), "development": tinynet.arrays()["development"]},
        target="this-machine",
        latency=0.8,
        max_drop=0.3,
        preprocess=Preprocess(color="grey"),
        labels=["flat", "rising", "upright", "falling"],
        settings=Workload(
            model="net.py:build",
            data="data.npz",
            recovery=Recovery(epochs=0.5, augment=Augment(shift_pixels=0)),
        ),
        run=tmp_path / "run",
    )
    assert isinstance(found, Report)
    assert found.settings["recovery epochs"] == 0.5
    assert any(len(g.kept) < g.channels for g in found.plan.groups)
    assert {gate.name for gate in found.gates if gate.met} >= {"accuracy", "numerics"}
    assert read_report(tmp_path / "run") == found
    assert all(bool((v == before[k]).all()) for k, v in model.state_dict().items())


def from_python(home: Path, **flags: Any) -> Report:
    """The deployment of a project's command line, asked for from Python."""
    return edgeprune.deploy(
        "net.py:build",
        "data.npz",
        weights="weights.safetensors",
        target="this-machine",
        latency=0.8,
        settings=read_yaml(Workload, home / "edgeprune.yaml"),
        run=home / "run",
        **flags,
    )


def test_the_python_api_takes_a_factory_with_the_settings_of_a_project(
    deployed, tmp_path, monkeypatch
):
    home = tinynet.project(tmp_path / "project")
    monkeypatch.chdir(home)
    tinynet.copied_run(deployed.folder, home / "run")
    found = from_python(home)
    # The same request as on the command line, so that nothing is done again.
    assert [s.name for s in found.stages if s.cached] == list(tinynet.STAGES)
    assert found.folder == home / "run"
    with edgeprune.load(found.bundle) as net:
        assert net.predict(tinynet.arrays()["test"][0][:2]).shape == (2, tinynet.CLASSES)


def test_the_python_api_takes_kernel_times_and_a_plan(deployed, tmp_path, monkeypatch):
    home = tinynet.project(tmp_path / "project")
    monkeypatch.chdir(home)
    tinynet.copied_run(deployed.folder, home / "run")
    found = from_python(home, tables="times.json")
    kept = read_times(home / "times.json")
    assert kept is not None
    assert 0 < len(kept.times) <= found.latency_model.kernels_measured
    with pytest.raises(IntegrityError, match="not a valid KernelTimes"):
        from_python(home, tables=home / "edgeprune.yaml")
    with pytest.raises(SpecError, match=r"there is no plan none\.json"):
        from_python(home, plan="none.json")
    plan = PlanFile(
        target="this-machine", budget="80%", precision="int8", dense_ms=1.0, predicted_ms=1.0,
        measured_ms=1.0, widths=found.plan.widths(), admissible_widths={},
    )  # fmt: skip
    write_json(plan, home / "plan.json")
    jobs = []

    def stop(job, path, progress):
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "deploy", stop)
    with pytest.raises(KeyboardInterrupt):
        from_python(home, plan="plan.json")
    assert jobs[0].widths == found.plan.widths()


@pytest.mark.slow
def test_a_deployment_for_a_board_that_is_not_here_is_a_stand_in(tmp_path):
    home = tinynet.project(tmp_path / "project")
    tinynet.write_float_target(home, "rpi4")
    done = tinynet.edgeprune(
        home, "deploy", "--target", "rpi4", "--latency", "80%", "--run", "run", "--json"
    )
    found = Report.model_validate_json(done.stdout)
    assert done.returncode == (0 if found.passed else MISSED), done.stderr
    assert found.stamp == "stand-in"
    assert "stand-in" in (home / "run" / "report.html").read_text()
    (model,) = (home / "run" / "bundle" / "models").iterdir()
    assert model.suffix == ".tflite"
    assert edgeprune.verify(home / "run" / "bundle.zip").ok
    assert json.loads((home / "run" / "run.json").read_text())["target"] == "rpi4"
