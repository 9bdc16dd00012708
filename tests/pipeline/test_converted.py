"""Whole nets that are converted one by one, with kernels cut from files of a twin format; and files that nothing here can run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinynet
import torch
from measured_fixture import measured_files
from pydantic import ValidationError
from report_fixture import make_report

from edgeprune import formats
from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.errors import FormatError
from edgeprune.formats import Resizable, cut_in_place_of
from edgeprune.formats.shared.widths import distinct_widths
from edgeprune.pipeline.files.reconverted import Converted
from edgeprune.pipeline.stages import gates as verdict
from edgeprune.progress import Silent
from edgeprune.records.report import Gate
from edgeprune.report import facts, render_html, render_terminal


class Counted:
    """The ONNX format under another name, with ONNX as its twin; counts what is converted."""

    def __init__(self) -> None:
        self.onnx = formats.load("onnx")
        self.info = self.onnx.info.model_copy(update={"name": "counted", "twin": "onnx"})
        self.exported = self.quantised = 0

    def export(self, model, example, path):
        self.exported += 1
        return self.onnx.export(model, example, path)

    def quantize(self, fp32, calibration, path, *, model=None):
        assert model is not None, "a format with a twin quantises the model"
        self.quantised += 1
        return self.onnx.quantize(fp32, calibration, path, model=model)


def images(n: int) -> np.ndarray:
    x, _ = tinynet.images(n, 3)
    return x[:, None].astype(np.float32) / 255


def both(
    form: Counted, folder: Path, calibration: np.ndarray | None
) -> tuple[Resizable, Converted]:
    """The dense net as a file of the twin that takes any widths, and as one that is converted for each."""
    model, example = tinynet.build().eval(), torch.from_numpy(images(1))
    groups, _ = find_groups(model, example)
    full = {group.name: group.channels for group in groups}
    narrow = distinct_widths(full, {group.name: group.step for group in groups})
    removed = {name: range(narrow[name], width) for name, width in full.items()}
    dense, variant = folder / "dense.onnx", folder / "variant.onnx"
    form.onnx.export(model, images(1), dense)
    by_name = {group.name: group for group in groups}
    narrower = remove_channels(model, by_name, removed, example)
    form.onnx.export(narrower, images(1), variant)
    twin = form.onnx.resizable(dense, variant, full, narrow, model)
    made = Converted(
        twin,
        form=form,  # type: ignore[arg-type]
        model=model,
        groups=groups,
        example=images(1),
        calibration=calibration,
        progress=Silent(),
    )
    return twin, made


def shapes(content: bytes, path: Path) -> dict[str, tuple[int, ...]]:
    from edgeprune.formats.onnx.links import parse_model

    return {i.name: tuple(i.dims) for i in parse_model(content).graph.initializer if i.dims}


def test_kernels_are_the_twins_and_whole_nets_are_conversions_at_the_same_widths(tmp_path):
    form = Counted()
    twin, made = both(form, tmp_path, None)
    assert made.kernels == twin.kernels
    assert made.blocks == twin.blocks
    name = twin.kernels[0].variables[0]
    widths = {name: 16}
    assert made.kernel(0, widths) == twin.kernel(0, widths)
    got, expected = made.resized(widths), twin.resized(widths)
    assert shapes(got, tmp_path) == shapes(expected, tmp_path)
    assert form.exported == 1


def test_a_structure_is_converted_once_however_its_widths_are_named(tmp_path):
    form = Counted()
    twin, made = both(form, tmp_path, images(8))
    name = twin.kernels[0].variables[0]
    first = made.resized({})
    assert made.resized({name: 32}) == first  # 32 is its full width
    assert (form.exported, form.quantised) == (1, 1)
    assert made.resized({name: 24}) != first
    assert (form.exported, form.quantised) == (2, 2)


def test_a_format_with_a_twin_says_whose_files_are_cut():
    error = cut_in_place_of(Counted().info)
    assert isinstance(error, FormatError)
    assert "counted" in str(error)
    assert "its twin, onnx" in str(error)


def not_run_gate() -> Gate:
    return verdict.numerics_gate(1.0, None, not_run="no board here has coreml")


def test_a_file_that_was_not_run_is_neither_met_nor_missed():
    gate = not_run_gate()
    assert (gate.met, gate.missed, gate.not_run) == (False, False, True)
    assert gate.note == "no board here has coreml"
    with pytest.raises(ValidationError, match="must not be met"):
        Gate(name="numerics", limit=1, value=1, unit="agreement", met=True, not_run=True)


def test_gates_that_a_twin_was_judged_by_say_so():
    gate = Gate(name="latency", limit=1, value=0.9, unit="ms", met=True, note="of dense")
    said = verdict.of_twin(gate, "onnx")
    assert said.met
    assert said.note.startswith("of dense; judged on the onnx file")
    assert verdict.of_twin(not_run_gate(), "onnx") == not_run_gate()


def test_no_report_calls_a_file_verified_that_was_not_run():
    report = make_report()
    gates = (*(g for g in report.gates if g.name != "numerics"), not_run_gate())
    report = report.model_copy(update={"gates": gates, "passed": all(g.met for g in gates)})
    assert not report.passed
    assert facts.verdict(report) == "NOT VERIFIED: THE FILE THAT SHIPS WAS NOT RUN"
    text, page = render_terminal(report), render_html(report).decode()
    assert "NOT VERIFIED" in text
    assert "NOT RUN" in text
    assert "PASSED" not in text
    assert "NOT VERIFIED" in page
    assert ">not run<" in page
    assert facts.missed_gates(report) == []


def test_a_missed_gate_is_said_before_what_was_not_run():
    report = make_report()
    missed = Gate(name="latency", limit=1, value=2, unit="ms", met=False)
    report = report.model_copy(update={"gates": (missed, not_run_gate()), "passed": False})
    assert facts.verdict(report) == "BEST EFFORT"
    assert "missed: latency" in render_terminal(report)


def test_the_headline_says_what_was_not_run():
    measured = measured_files()
    met = Gate(name="latency", limit=1, value=0.9, unit="ms", met=True)
    line = verdict.headline(measured, "int8", (met, not_run_gate()))
    assert line.endswith("the other gates met; not run: numerics")
