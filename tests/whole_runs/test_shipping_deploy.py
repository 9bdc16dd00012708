"""Whole deployments whose INT8 file is refused at the end: FP32 ships within the budget, else the run ends and says both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tinynet

import edgeprune
from edgeprune.bundle.manifest import Manifest
from edgeprune.errors import FormatError, IntegrityError
from edgeprune.pipeline.files import export
from edgeprune.pipeline.stages import gates
from edgeprune.records.base import read_json
from edgeprune.records.report import Report

pytestmark = pytest.mark.slow

REFUSED = 5
FROM_EXPORT = tinynet.STAGES[tinynet.STAGES.index("export") :]
COARSE = "an int8 model must compute at least 90% of its layers in 8 bits, but 1 of 4 do"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with everything that is measured before the plan; the net is not healed, for it is not cut."""
    source = tinynet.deployed(tmp_path_factory)
    project = tinynet.project(tmp_path_factory.mktemp("refused") / "p", recovery={"epochs": 0})
    tinynet.copied_run(source.folder, project / "run")
    return project


def deploy(home: Path, run: str = "run"):
    flags = ("--target", "this-machine", "--latency", "1000ms", "--run", run)
    return tinynet.edgeprune_here(home, "deploy", *flags)


def refuse_pruned(monkeypatch) -> None:
    """The check of a bundle's reader refuses the pruned INT8 file, and not the dense one; INT8 counts as the faster one."""
    real = export.require_eight_bits

    def check(artifact, content, float_layers=()):
        if artifact.path.startswith("pruned"):
            raise IntegrityError(COARSE)
        real(artifact, content, float_layers)

    monkeypatch.setattr(export, "require_eight_bits", check)
    monkeypatch.setattr(gates, "choose", lambda *_: gates.Choice("int8", "it is the faster one"))


def is_whole(home: Path, run: str, why: str) -> tuple[Report, Manifest]:
    """The report and the manifest of a run that shipped FP32 and says so everywhere."""
    folder = home / run
    report = read_json(Report, folder / "report.json")
    manifest = read_json(Manifest, folder / "bundle" / "manifest.json")
    line = f"INT8 was refused: {why}; FP32 ships"
    assert report.shipped == "fp32"
    assert report.shipped_reason == report.why_fp32 == manifest.why_fp32 == line
    assert report.passed
    assert (manifest.model.precision, manifest.status) == (
        "fp32",
        tinynet.kept_status(report),
    )
    assert f"| why FP32 | {line} |" in (folder / "bundle" / "README.md").read_text()
    assert line in (folder / "report.html").read_text()
    assert edgeprune.verify(folder / "bundle.zip").ok
    return report, manifest


def test_fp32_ships_in_place_of_a_file_that_a_check_refuses(home, monkeypatch):
    refuse_pruned(monkeypatch)
    done = deploy(home)
    assert done.returncode == 0, done.stderr
    why = f"pruned.int8.onnx cannot ship as INT8: {COARSE}"
    report, _ = is_whole(home, "run", why)
    assert len(report.variants) == 4  # the refused file was timed, and is shown
    assert f"INT8 was refused: {why}; FP32 ships" in " ".join(done.stdout.split())
    assert f"note: INT8 was refused: {why}; FP32 ships" in done.stderr

    # The same run again, with FP32 over the budget: nothing is made or measured anew, and the end is as it always was, with both reasons.
    real = gates.latency_gate

    def over(measured, budget, precision):
        gate = real(measured, budget, precision)
        return gate.model_copy(update={"met": precision == "int8"})

    monkeypatch.setattr(gates, "latency_gate", over)
    before = {p: p.stat().st_mtime_ns for p in home.glob("run/stages/*/stage.json")}
    done = deploy(home)
    assert done.returncode == REFUSED
    (error,) = (x for x in done.stderr.splitlines() if x.startswith("error:"))
    assert why in error
    assert "FP32 misses the budget" in error
    assert {p: p.stat().st_mtime_ns for p in home.glob("run/stages/*/stage.json")} == before


def test_fp32_ships_where_the_conversion_is_refused(home, monkeypatch):
    def quantise(*arguments, **options):
        raise FormatError("only 12% of the multiply-accumulates became INT8")

    monkeypatch.setattr(export, "best_int8", quantise)
    tinynet.copied_run(home / "run", home / "other")
    for name in FROM_EXPORT:  # of this deployment, and of the one that it began with
        for folder in home.glob(f"other/stages/{name}-*"):
            shutil.rmtree(folder)
    done = deploy(home, "other")
    assert done.returncode == 0, done.stderr
    report, _ = is_whole(home, "other", "only 12% of the multiply-accumulates became INT8")
    assert [(r.variant, r.precision) for r in report.variants] == [
        ("dense", "fp32"), ("dense", "int8"), ("pruned", "fp32"),
    ]  # fmt: skip
    assert report.int8 is None
    assert "The variants" in done.stdout
