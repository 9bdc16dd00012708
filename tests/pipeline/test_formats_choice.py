"""Which format ships: what a target may list, what a request may say, and a deployment that measures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinynet
from report_fixture import make_report

from edgeprune import formats
from edgeprune.bundle.manifest import Manifest
from edgeprune.errors import ModelError, SpecError, UnknownName
from edgeprune.pipeline import format_choice
from edgeprune.pipeline.context import FormatCandidate
from edgeprune.pipeline.format_choice import decide
from edgeprune.pipeline.options import Options, chosen_formats
from edgeprune.pipeline.run_folder import StageRecord
from edgeprune.records import catalog
from edgeprune.records.base import parse, read_json
from edgeprune.records.files import digest_of, to_json_text
from edgeprune.records.formats import format_facts, format_names
from edgeprune.records.measurement import Comparison
from edgeprune.records.report import FormatChoice, FormatRow, Report
from edgeprune.records.target import Target
from edgeprune.records.workload import Workload
from edgeprune.report import render_html, render_terminal

TARGET: dict[str, Any] = {
    "name": "my-board", "summary": "a board", "profile": "cortex-a72",
    "format": "tflite", "runtime": {"name": "litert"},
}  # fmt: skip
ONNX = {"format": "onnx", "runtime": {"name": "onnxruntime"}}
WORKLOAD = Workload(model="net.py:build", data="data.npz")


def test_a_target_without_alternatives_is_written_as_before():
    plain = parse(Target, TARGET, where="here")
    assert not {"formats", "compute_units"} & set(plain.model_dump(mode="json"))
    listed = parse(Target, TARGET | {"formats": [ONNX]}, where="here")
    assert parse(Target, listed.model_dump(mode="json"), where="here") == listed
    assert digest_of(plain) != digest_of(listed)


def test_compute_units_are_for_core_ml_and_tell_one_run_from_another():
    apple = TARGET | {"format": "coreml", "runtime": {"name": "coreml"}, "formats": [ONNX]}
    plain = parse(Target, apple, where="here")
    chosen = parse(Target, apple | {"compute_units": "CPU_AND_NE"}, where="here")
    assert parse(Target, chosen.model_dump(mode="json"), where="here") == chosen
    assert digest_of(plain) != digest_of(chosen)
    found = chosen_formats(Options(formats="auto"), WORKLOAD, chosen)
    assert [t.compute_units for t in found] == ["CPU_AND_NE", None]
    with pytest.raises(SpecError, match="compute_units is for coreml files, not for tflite"):
        parse(Target, TARGET | {"compute_units": "CPU_AND_NE"}, where="here")


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([ONNX, ONNX], "onnx is there twice"),
        ([{"format": "tflite", "runtime": {"name": "litert"}}], "tflite is there twice"),
        ([{"format": "onnx", "runtime": {"name": "litert"}}], "run by onnxruntime, not by litert"),
        ([{"format": "onnyx", "runtime": {"name": "onnxruntime"}}], "format"),
        ([ONNX | {"thread": 2}], "thread"),
        ([{"format": "onnx"}], "runtime"),
    ],
)
def test_a_wrong_list_of_formats_is_told(listed, said):
    with pytest.raises(SpecError, match=said):
        parse(Target, TARGET | {"formats": listed}, where="here")


def test_the_runtimes_of_a_format_are_those_of_its_module():
    assert {n: set(formats.load(n).info.runtimes) for n in formats.names()} == {
        n: set(format_facts(n).runtimes) for n in format_names()
    }


def test_a_request_takes_the_own_format_or_a_listed_one_or_all():
    target = catalog.target("rpi4")
    own = chosen_formats(Options(), WORKLOAD, target)
    assert [t.format for t in own] == ["tflite"]
    (onnx,) = chosen_formats(Options(formats="onnx"), WORKLOAD, target)
    assert (onnx.format, onnx.runtime.name, onnx.formats) == ("onnx", "onnxruntime", ())
    both = chosen_formats(Options(formats="auto"), WORKLOAD, target)
    assert [t.format for t in both] == ["tflite", "onnx"]
    in_file = WORKLOAD.model_copy(update={"formats": "onnx"})
    assert chosen_formats(Options(), in_file, target) == (onnx,)
    assert chosen_formats(Options(formats="tflite"), in_file, target) == own
    with pytest.raises(UnknownName) as found:
        chosen_formats(Options(formats="coreml"), WORKLOAD, target)
    assert found.value.hint is not None
    assert "auto, onnx, tflite" in found.value.hint


@pytest.mark.parametrize("given", ["nonsense", "coreml"])
def test_a_format_that_the_target_does_not_list_is_exit_code_2(tmp_path, given):
    home = tinynet.project(tmp_path / "project")
    done = tinynet.edgeprune_here(home, "deploy", "--target", "this-machine", "--formats", given)
    assert done.returncode == 2
    assert f"unknown format '{given}' in --formats for the target this-machine" in done.stderr
    assert "known: auto, onnx, tflite" in done.stderr


def choice(**changes: Any) -> FormatChoice:
    timed = {"holds": True, "agreement": 0.99, "spread_ratio": 0.01, "precision": "int8"}
    rows = (
        FormatRow(format="tflite", runtime="litert", median_ms=2.0, **timed),
        FormatRow(format="onnx", runtime="onnxruntime", reason="onnx is not installed"),
    )
    found = FormatChoice(
        own="tflite", chosen="tflite", precision="int8", reason="the only format that runs here",
        rows=rows, samples=256, device="this-machine", stamp="stand-in",
    )  # fmt: skip
    return found.model_copy(update=changes)


def test_the_table_is_in_the_text_and_on_the_page_and_says_stand_in():
    report = make_report(formats=choice())
    text = " ".join(render_terminal(report, width=110).split())
    page = render_html(report).decode()
    for said in (
        "The formats, dense model, stand-in times on this-machine",
        "tflite ships: the only format that runs here",
        "onnx is not installed",
        "not on the target's board",
    ):
        assert said in text
        assert said.replace("'", "&#x27;") in page
    measured = make_report(formats=choice(stamp="measured"))
    assert "not on the target's board" not in render_terminal(measured, width=110)


def test_a_report_without_the_choice_has_no_section():
    report = make_report()
    assert "The formats" not in render_terminal(report)
    assert 'href="#formats"' not in render_html(report).decode()


def timed(format_: str, precision: str, ms: float, *, holds: bool = True) -> FormatRow:
    return FormatRow(
        format=format_, runtime="r", precision=precision, median_ms=ms, agreement=ms / 10, holds=holds
    )  # type: ignore[arg-type]  # fmt: skip


def noise(width: float):
    """A comparison of two rows whose interval is that wide on either side."""

    def against(one: FormatRow, other: FormatRow) -> Comparison:
        ratio = (one.median_ms or 0) / (other.median_ms or 1)
        return Comparison(
            candidate="a", reference="b", ratio=ratio, low=ratio - width, high=ratio + width,
            confidence=0.95, rounds=9,
        )  # fmt: skip

    return against


ROWS = [timed("onnx", "fp32", 5.0), timed("onnx", "int8", 4.0), timed("tflite", "int8", 3.9)]


@pytest.mark.parametrize(
    ("rows", "width", "wins", "said"),
    [
        (ROWS, 0.01, "tflite", "fastest of the formats that hold: 0.975 (0.965 to 0.985) of the time of onnx"),
        (ROWS, 0.05, "onnx", "own format; tflite takes 0.975 (0.925 to 1.025) of its time, within the noise"),
        (ROWS[:2], 0.01, "onnx", "the only format that runs here"),
        ([*ROWS[:2], timed("tflite", "int8", 1.0, holds=False)], 0.01, "onnx", "the only format that holds"),
        ([timed("onnx", "int8", 1.0, holds=False), timed("tflite", "int8", 2.0, holds=False)], 0.01, "tflite", "no format holds"),
        ([timed("onnx", "int8", 1.0), timed("tflite", "int8", 1.01)], 0.05, "onnx", "of tflite, within the noise"),
    ],
)  # fmt: skip
def test_the_fastest_that_holds_wins_and_the_own_format_wins_a_tie(rows, width, wins, said):
    best, reason = decide(rows, "onnx", noise(width))
    assert best.format == wins
    assert said in reason


def test_an_operator_that_one_converter_keeps_is_a_reason_against_that_format_only(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("the model must have no operator that x cannot run, but has layer_norm")

    monkeypatch.setattr(format_choice, "dense_stage", refuse)
    target = catalog.target("this-machine")
    job: Any = SimpleNamespace(in_format=lambda _: None)
    made: Any = SimpleNamespace(runs_ship=True)
    run: Any = None
    found = format_choice._tried(
        job, FormatCandidate(target, "onnxruntime"), run, lambda _: made, None
    )
    assert "layer_norm" in found.refused().reason
    assert found.refused().median_ms is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    """The tiny net deployed for this machine in the format that is faster on it."""
    home = tinynet.project(tmp_path_factory.mktemp("formats") / "project")
    # In milliseconds that any computer keeps: which share of its time so small a net can lose is the processor's affair.
    args = ("--latency", "5ms", "--run", "run", "--formats", "auto")
    done = tinynet.edgeprune(home, "deploy", "--target", "this-machine", *args)
    assert (home / "run" / "report.json").exists(), done.stderr
    return tinynet.Run(home, home / "run", done)


def read_report(folder: Path) -> Report:
    return read_json(Report, folder / "report.json")


def test_the_fastest_row_that_holds_ships(run):
    report = read_report(run.folder)
    found = report.formats
    assert found is not None
    assert {(r.format, r.precision) for r in found.rows} == {
        (f, p) for f in ("onnx", "tflite") for p in ("fp32", "int8")
    }
    times = {(r.format, r.precision): r.median_ms for r in found.rows if r.holds}
    fastest = min(times, key=lambda key: times[key] or 0.0)
    if found.chosen == found.own:
        assert fastest[0] == found.own or "within the noise" in found.reason
    else:
        assert (found.chosen, found.precision) == fastest
    assert found.own == "onnx"
    assert all(r.agreement is not None and r.agreement > 0.9 for r in found.rows)
    assert {r.format for r in found.rows if r.ratio is not None} == {"tflite"}
    assert any(found.reason in line and found.chosen in line for line in report.notes)
    assert "The formats, dense model" in run.done.stdout


def test_the_bundle_names_the_format_that_ships_and_verifies(run):
    found = read_report(run.folder).formats
    assert found is not None
    manifest = read_json(Manifest, run.folder / "bundle" / "manifest.json")
    assert manifest.model.format == found.chosen
    assert manifest.runtime.name == {"onnx": "onnxruntime", "tflite": "litert"}[found.chosen]
    done = tinynet.edgeprune_here(run.project, "verify", "run/bundle")
    assert done.returncode == 0, done.stderr


def test_each_format_is_converted_once_and_its_cost_is_told_once(run):
    report = read_report(run.folder)
    costs = [s.name for s in report.stages]
    assert costs.count("dense, onnx") == costs.count("dense, tflite") == 1
    assert costs.count("formats") == 1
    assert "dense" not in costs
    stages = [read_json(StageRecord, p) for p in (run.folder / "stages").glob("*/stage.json")]
    assert sum(s.name == "dense" for s in stages) == 2


def test_a_format_without_its_converter_is_a_row_with_the_reason(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    home = tinynet.project(tmp_path / "project")
    args = ("--latency", "80%", "--run", "run", "--formats", "auto", "--dry-run")
    done = tinynet.edgeprune_here(home, "deploy", "--target", "this-machine", *args)
    assert done.returncode == 0, done.stderr
    folder = tinynet.stage_folders(home / "run")["formats"]
    found = FormatChoice.model_validate_json(
        to_json_text(read_json(StageRecord, folder / "stage.json").result)
    )
    (refused,) = [r for r in found.rows if r.format == "tflite"]
    assert refused.median_ms is None
    assert "litert_torch" in refused.reason or "litert-torch" in refused.reason
    assert "pip install" in refused.reason
    assert (found.chosen, found.reason) == ("onnx", "the only format that runs here")
    assert "tflite: not run:" in done.stderr
