"""A deployment for an iPhone on a machine that is no Mac: searched and timed on the twin, converted, checked, bundled, and not run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tinynet
import yaml
from sshd import QUICK_REPORT

from edgeprune import formats
from edgeprune.bundle.integrity import read_model
from edgeprune.bundle.manifest import Manifest
from edgeprune.devices.board import open_board
from edgeprune.errors import DeviceError, FormatError
from edgeprune.pipeline import app
from edgeprune.pipeline import run as pipeline
from edgeprune.records.base import read_json
from edgeprune.records.device import Device
from edgeprune.records.report import Report

MISSED = 6
LABELS = ("flat", "rising", "upright", "falling")


def desk(home: Path, **changes: object) -> dict[str, object]:
    device = {
        "transport": "local",
        "stand_in": True,
        "targets": ["iphone"],
        "lease_file": str(home / "lease"),
        "report": QUICK_REPORT,
        **changes,
    }
    record = {"schema_version": 1, "devices": {"this-machine": device}}
    (home / "devices.yaml").write_text(yaml.safe_dump(record))
    return device


@pytest.mark.slow
def test_the_whole_way_ends_in_a_checked_package_that_was_not_run(tmp_path: Path) -> None:
    home = tinynet.project(
        tmp_path / "project",
        max_drop="100%",
        author="the tests",
        license="MIT",
        version="3",
        recovery={"epochs": 0.2, "batch_size": 64},
    )
    desk(home)
    flags = ("--target", "iphone", "--latency", "90%", "--run", "run")
    done = tinynet.edgeprune(home, "deploy", *flags, timeout_s=900)
    assert done.returncode in (0, MISSED), done.stderr  # a busy machine may miss the latency gate
    assert "the coreml file was not run: not every machine here has coreml" in " ".join(
        done.stdout.split()
    )
    report = read_json(Report, home / "run" / "report.json")
    assert done.returncode == (0 if report.passed else MISSED)
    assert [g.name for g in report.gates if g.missed] == ([] if report.passed else ["latency"])
    assert report.stamp == "stand-in"
    assert [g.name for g in report.gates if g.not_run] == ["numerics"]
    (evidence,) = [note for note in report.notes if "worked out operation by operation" in note]
    assert "(not run)" in evidence
    bundle = home / "run" / "bundle"
    manifest = read_json(Manifest, bundle / "manifest.json")
    assert (manifest.golden_source, manifest.runtime.min_version) == ("worked-out", "not run")
    assert (manifest.license, manifest.labels) == ("MIT", LABELS)
    assert (
        manifest.model.op_counts["weights:int8" if report.shipped == "int8" else "weights:float16"]
        == 4
    )
    package = bundle / manifest.model.path
    assert package.name == "Classifier.mlpackage"
    read_model(bundle, manifest)
    golden, raw = np.load(bundle / "golden/outputs.npy"), np.load(bundle / "golden/inputs.npy")
    x = raw[:, None].astype(np.float32) / 255
    assert np.allclose(formats.load("coreml").evaluate(package, x), golden)
    checked = tinynet.edgeprune(home, "verify", "run/bundle", "--json")
    statuses = [level["status"] for level in json.loads(checked.stdout)["levels"]]
    assert checked.returncode == 0
    assert statuses == ["passed", "passed", *["not-run"] * 4]


def test_a_board_that_is_named_for_an_iphone_and_is_no_mac_is_an_error(tmp_path: Path) -> None:
    device = Device.model_validate(
        {"transport": "local", "targets": ("iphone",), "lease_file": str(tmp_path / "lease")}
    )
    job = SimpleNamespace(
        target=SimpleNamespace(name="iphone", runtime=SimpleNamespace(name="coreml"))
    )
    with (
        open_board("pi-desk", device) as board,
        pytest.raises(DeviceError, match="'pi-desk' cannot time the target iphone") as error,
    ):
        pipeline._require(board, job, formats.load("coreml").info)  # type: ignore[arg-type]
    assert "Core ML runs on a Mac only, and this board runs linux" in str(error.value)
    assert "Mac" in (error.value.hint or "")


# What an app is told


def job(*, units: str | None = None, **changes: object) -> SimpleNamespace:
    workload = SimpleNamespace(model="net.py:build", author=None, license=None, version=None)
    loaded = {
        "workload": workload,
        "labels": ("a\nb", "c"),
        "n_classes": 2,
        "outputs": "logits",
        "preprocess": None,
        "dataset": SimpleNamespace(digest="d"),
    }
    return SimpleNamespace(
        loaded=SimpleNamespace(**{**loaded, **changes}),
        target=SimpleNamespace(name="iphone", compute_units=units),
        profile=SimpleNamespace(name="apple", int8_schemes=("weight-only-int8-per-channel", "x")),
    )


def test_labels_are_one_line_each_and_numbered_where_none_were_given() -> None:
    assert app.labels_of(job()) == ("a b", "c")
    assert app.labels_of(job(labels=None)) == ("class 0", "class 1")


def test_the_scheme_that_the_profile_names_first_is_the_one_that_ships() -> None:
    assert app.app_facts(job()).int8_scheme == "weight-only-int8-per-channel"


def test_an_app_is_told_the_compute_units_of_the_target() -> None:
    assert app.app_facts(job()).compute_units == "ALL"
    assert app.app_facts(job(units="CPU_AND_NE")).compute_units == "CPU_AND_NE"


def test_formats_without_a_place_for_facts_stay_as_they_are() -> None:
    onnx = formats.load("onnx")
    assert app.for_app(onnx, job()) is onnx
    assert app.for_app(formats.load("coreml"), job()).facts.labels == ("a b", "c")


class Silent:
    said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("refuses", [False, True])
def test_answers_are_worked_out_only_where_the_file_was_not_run(refuses: bool) -> None:
    import torch

    class Form:
        info = formats.load("onnx").info

        def evaluate(self, path: Path, x: np.ndarray) -> np.ndarray:
            if refuses:
                raise FormatError("an operation is not known")
            return x[:, :2]

    x = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    context = SimpleNamespace(
        ship=Form(),
        runs_ship=False,
        development=x,
        reference=x,
        progress=Silent(),
        job=SimpleNamespace(
            loaded=SimpleNamespace(
                dataset=SimpleNamespace(development=SimpleNamespace(y=np.array([0, 1, 1])))
            )
        ),
    )
    found = app.worked_out(context, Path("net"))
    if refuses:
        assert found is None
        assert "not known" in context.progress.said[-1]
        return
    assert found.answers.tolist() == x.tolist()
    assert "accuracy 66.67% on 3 development samples, dense 66.67%" in found.note
    context.runs_ship = True
    assert app.worked_out(context, Path("net")) is None
