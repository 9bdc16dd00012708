"""Rows of the table of targets: which are replaced, what they say, and which arguments a results file keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import blocks
from targets_blocks import EMULATED, TargetResults, TargetRow, merged, targets_block
from targets_board import error_steps

from edgeprune.int8_results import LayerFallback


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
