"""The search for a good INT8 file, on a small trained net with a format's real tools and kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinynet
import torch

from edgeprune import api, pipeline, records
from edgeprune.int8 import best_int8
from edgeprune.int8_results import CalibrationReport, Int8Report, Int8Try, LayerFallback
from edgeprune.options import Options
from edgeprune.progress import Silent
from edgeprune.specs import Int8


def opened_job(folder: Path, effort: str):
    project = tinynet.project(folder, int8={"effort": effort})
    return project


def test_lines_say_cost_tries_float_layers_and_missing_classes():
    report = Int8Report(
        effort="auto",
        metric="accuracy",
        n=100,
        fp32=0.9,
        tries=(
            Int8Try(name="own ranges", quality=0.88, loss_nats=0.2),
            Int8Try(name="1 float layers", quality=0.9, loss_nats=0.01),
        ),
        chosen="1 float layers",
        layers=(LayerFallback(layer="conv", gain_nats=0.2, extra_ms=0.5, in_float=True),),
        calibration=CalibrationReport(
            samples=8, classes=3, classes_missing=(2,), held_out_samples=4,
            saturated_ratio=0.001, worst=(("conv/conv_2d", 0.01),),
        ),
    )  # fmt: skip
    lines = report.lines()
    assert lines[0].startswith("INT8 (1 float layers) costs 0.00 points on 100 samples")
    assert "own ranges 2.00" in lines[0]
    assert lines[1] == "layers of the INT8 file that stay in float: conv (+0.5 ms)"
    assert "classes 2:" in lines[2]
    assert "0.100% of the values of 4 held-out samples" in lines[3]
    assert all("\n" not in line for line in lines)
