"""Rows of the table of targets: who answers, which are replaced, and what they say."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blocks
import emulated_board
import numpy as np
import pytest
import targets_board
import torch
from targets_blocks import EMULATED, WORKED_OUT, TargetResults, TargetRow, merged, targets_block
from targets_board import BUILT_IN, Int8File, error_steps, rows_on_the_board
from torch import nn

import targets
from edgeprune.devices.link.frames import Refusal
from edgeprune.errors import FormatError
from edgeprune.progress import Silent
from edgeprune.records.device import Device
from edgeprune.records.int8 import LayerFallback
from edgeprune.workload.dataset import Split
from targets import rows_of


def row(net: str = "example", target: str = "rpi4", **changes: object) -> TargetRow:
    facts: dict[str, object] = {
        "net": net, "target": target, "format": "tflite", "precision": "int8", "where": "litert, host", "seconds": 1.5,
        "size_bytes": 2000, "agreement": 0.99, "error_steps": 3.0, "accuracy": 0.9,
    }  # fmt: skip
    return TargetRow.model_validate(facts | changes)


def results(*rows: TargetRow) -> TargetResults:
    return TargetResults(
        command="c", created="2026-01-01T00:00:00Z", split="development", n=1000, torch_accuracy={"example": 0.9},
        versions={}, rows=rows,
    )  # fmt: skip


def test_a_row_that_is_made_again_replaces_the_old_one_and_the_others_stay():
    old = (row(accuracy=0.1), row(target="iphone"), row("b"))
    found = merged(old, (row(accuracy=0.2), row("c")))
    assert [(r.net, r.target, r.accuracy) for r in found] == [
        ("b", "rpi4", 0.9), ("c", "rpi4", 0.9), ("example", "rpi4", 0.2), ("example", "iphone", 0.9),
    ]  # fmt: skip


def test_both_precisions_of_a_place_are_replaced_together():
    old = (row(precision="fp32", accuracy=0.1), row(accuracy=0.1))
    new = (row(precision="fp32", accuracy=0.2), row(accuracy=0.3))
    assert merged(old, new) == new


def test_the_emulated_board_has_a_row_of_its_own():
    there = row(where=f"litert, {EMULATED}", from_host_steps=0.0)
    assert merged((row(),), (there,)) == (row(), there)
    assert merged((row(), there), (row(accuracy=0.5),)) == (row(accuracy=0.5), there)


def test_answers_of_the_emulated_board_are_no_stand_in():
    shown = targets_block(
        results(row(), row(where=f"litert, {EMULATED}", from_host_steps=1.25)), blocks.table
    )
    assert "litert, host (stand-in)" in shown
    assert f"litert, {EMULATED}; 1.2 steps from this machine's answers" in shown


def test_layers_that_cost_int8_are_named_worst_first():
    costs = tuple(LayerFallback(layer=n, gain_nats=g) for n, g in (("a", 0.1), ("b", 0.5)))
    assert "`b` 0.5, `a` 0.1" in targets_block(results(row(costs=costs)), blocks.table)


def test_an_error_is_told_in_steps_of_the_exact_range():
    exact = torch.tensor([[0.0, 255.0]])
    assert error_steps(exact + torch.tensor([[0.0, -3.0]]), exact) == pytest.approx(3.0)


class Answers(nn.Module):
    """Two logits of one pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], 1)


class FakeFormat:
    """Writes a few bytes."""

    def __init__(self, name: str) -> None:
        self.info = SimpleNamespace(name=name, suffix=f".{name}", layout="NCHW")

    def export(self, model: nn.Module, example: Any, path: Path) -> SimpleNamespace:
        path.write_bytes(b"float")
        return SimpleNamespace(precision="fp32", op_counts={})

    def quantize(self, fp32: Path, calibration: Any, path: Path, *, model: nn.Module) -> Any:
        path.write_bytes(b"steps")
        return SimpleNamespace(precision="int8", op_counts={"int8:CONV_2D": 2})


class WorkedOutFormat(FakeFormat):
    """Its files can be worked out: the INT8 file is 2/255 of the range off. ``unknown`` says that an operation is not known."""

    unknown = False

    def evaluate(self, path: Path, x: np.ndarray) -> np.ndarray:
        if self.unknown:
            raise FormatError("the operation einsum is not worked out here")
        off = 2 * 4 / 255 if path.read_bytes() == b"steps" else 0
        return Answers()(torch.from_numpy(x)).numpy() + np.float32(off)


class FakeContext:
    """A target whose files are tried on four images of one pixel; ``delegates`` lists the kernels that were asked for on this machine.

    The built-in kernels answer 2/255 of the range off.
    """

    def __init__(self, shipped: str, form: Any, *, runs: bool = True) -> None:
        pixels = np.array([[1.0], [-1.0], [2.0], [-2.0]], np.float32)
        y = np.array([0, 1, 0, 0])
        development = Split(pixels, y)
        self.job = SimpleNamespace(
            target=SimpleNamespace(name="rpi3-32bit", runtime=SimpleNamespace(name="litert")),
            shipped_runtime=shipped,
            loaded=SimpleNamespace(dataset=SimpleNamespace(development=development)),
        )
        self.ship, self.runs_ship, self.host = form, runs, "host"
        self.development = torch.from_numpy(pixels)
        self.model, self.example, self.calibration = Answers().eval(), pixels[:1], pixels
        self.progress = Silent()
        self.delegates: list[bool] = []

    def runtime_on(self, board: Any) -> SimpleNamespace:
        return SimpleNamespace(name="litert")

    def run_file(
        self, board: Any, path: Path, x: np.ndarray, *, delegate: bool = True
    ) -> torch.Tensor:
        self.delegates.append(delegate)
        return self.model(torch.from_numpy(x)) + (0 if delegate else 2 * 4 / 255)


@pytest.mark.parametrize(
    ("shipped", "asked", "kernels", "off"),
    [("tflite-runtime", [True, True, False], BUILT_IN, 2.0), ("litert", [True, True], "", 0.0)],
)
def test_the_board_gets_the_runtime_that_ships_and_its_kernels_for_reference(
    tmp_path, shipped, asked, kernels, off
):
    context: Any = FakeContext(shipped, FakeFormat("tflite"))
    for_board: list[Int8File] = []
    rows = rows_of(context, "example", tmp_path, for_board)
    (file,) = for_board
    assert (file.runtime, file.kernels, context.delegates) == (shipped, kernels, asked)
    assert error_steps(file.answers, file.exact) == pytest.approx(off, abs=1e-4)
    assert rows[1].where == "litert, host"  # where the answers of that row are from
    assert (rows[1].agreement, rows[1].accuracy) == (1.0, 0.75)


def test_without_a_board_nothing_is_run_for_it(tmp_path):
    context: Any = FakeContext("tflite-runtime", FakeFormat("tflite"))
    rows_of(context, "example", tmp_path, None)
    assert context.delegates == [True, True]


class FakeBoard:
    """Answers as the net does, or refuses a file; ``asked`` lists the Pythons and runtimes."""

    def __init__(self, python: str, asked: list[tuple[str, str]], refuses: bool) -> None:
        self._python, self._asked, self._refuses = python, asked, refuses

    def load(self, key: str, content: bytes, *, runtime: str, threads: int) -> None:
        self._asked.append((self._python, runtime))
        if self._refuses:
            raise Refusal("load", "the scale is too small")

    def infer(self, key: str, x: np.ndarray) -> np.ndarray:
        return Answers()(torch.from_numpy(x)).numpy()

    def unload(self, keys: list[str]) -> None:
        pass


def board_rows(tmp_path: Path, monkeypatch: Any, *, refuses: bool) -> tuple[TargetRow, list[Any]]:
    asked: list[Any] = []
    device = Device(transport="local", targets=())

    @contextlib.contextmanager
    def opened(name: str, there: Device, exclusive: bool) -> Any:
        yield FakeBoard(there.python, asked, refuses)

    monkeypatch.setattr(emulated_board, "emulated_board", lambda: contextlib.nullcontext(device))
    monkeypatch.setattr(targets_board, "open_board", opened)
    context: Any = FakeContext("tflite-runtime", FakeFormat("tflite"))
    for_board: list[Int8File] = []
    rows_of(context, "example", tmp_path, for_board)
    (found,) = rows_on_the_board(for_board, Silent(), "2026-01-01T00:00:00Z")
    return found, asked


def test_a_file_for_tflite_runtime_is_run_by_it_on_the_board(tmp_path, monkeypatch):
    found, asked = board_rows(tmp_path, monkeypatch, refuses=False)
    assert asked == [("/opt/tflite/bin/python", "tflite-runtime")]
    assert found.where == f"tflite-runtime, {EMULATED}"
    assert found.from_host_steps == pytest.approx(2.0, abs=1e-4)
    shown = targets_block(results(found), blocks.table)
    assert f"{EMULATED}; 2.0 steps from this machine's answers by its built-in kernels" in shown


def test_a_file_that_the_board_refuses_is_a_row_that_says_so(tmp_path, monkeypatch):
    found, _ = board_rows(tmp_path, monkeypatch, refuses=True)
    assert found.agreement is None
    shown = targets_block(results(found), blocks.table)
    assert f"tflite-runtime, {EMULATED}: the scale is too small" in shown


def test_a_file_that_nothing_here_runs_is_worked_out_and_says_so(tmp_path):
    context: Any = FakeContext("coreml", WorkedOutFormat("coreml"), runs=False)
    for_board: list[Int8File] = []
    fp16, int8 = rows_of(context, "example", tmp_path, for_board)
    assert context.delegates == []
    assert fp16.where == int8.where == WORKED_OUT
    assert (fp16.agreement, fp16.accuracy, fp16.error_steps) == (1.0, 0.75, None)
    assert (int8.agreement, int8.accuracy) == (1.0, 0.75)
    assert int8.error_steps == pytest.approx(2.0, abs=1e-4)
    shown = targets_block(results(int8), blocks.table)
    assert f"| {WORKED_OUT} | 100.00% | 2.0 | 75.00% |" in shown
    assert "stand-in" not in shown
    assert "torch computed the operations in the file" in shown


def test_few_images_are_worked_out_and_the_row_says_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "WORKED_OUT_IMAGES", 3)
    context: Any = FakeContext("coreml", WorkedOutFormat("coreml"), runs=False)
    _, int8 = rows_of(context, "example", tmp_path, None)
    assert (int8.n, int8.agreement, int8.accuracy) == (3, 1.0, 1.0)  # the fourth is wrong
    assert f"| {WORKED_OUT}; n = 3 | 100.00% |" in targets_block(results(int8), blocks.table)


def test_a_file_that_cannot_be_worked_out_stays_not_run(tmp_path):
    form = WorkedOutFormat("coreml")
    form.unknown = True
    for unknown in (form, FakeFormat("other")):
        context: Any = FakeContext("coreml", unknown, runs=False)
        rows = rows_of(context, "example", tmp_path, [])
        assert [(row.where, row.agreement) for row in rows] == [("not run", None)] * 2
        assert rows[1].int8_ops == 2


def test_a_net_that_is_not_converted_has_one_row_that_says_why(tmp_path, monkeypatch):
    def refused(*_: Any) -> Any:
        raise FormatError("the operator foo cannot be converted")

    context: Any = FakeContext("litert", FakeFormat("tflite"))
    monkeypatch.setattr(context.ship, "export", refused)
    (found,) = rows_of(context, "example", tmp_path, [])
    assert (found.precision, found.message) == ("fp32", "the operator foo cannot be converted")
    assert found.where == ""
