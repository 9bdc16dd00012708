"""Every block and picture of README.md and docs, from the results files. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

from blocks import (
    BudgetResults,
    MeasurementResults,
    budgets_block,
    demo_block,
    measurement_block,
    prediction_block,
    stamp_text,
    table,
)
from board_blocks import BoardResults, boards_block, matrix_block
from compare_blocks import compare_block, compare_summary
from compare_plot import compare_plot
from compare_records import CompareResults
from goals import goals, goals_block
from int8_blocks import RecipeResults, int8_block
from picture_blocks import picture_blocks
from predictor_blocks import PredictorResults, predictor_block
from targets_blocks import TargetResults, targets_block
from walltime_blocks import WallTime, walltime_block
from zoo_blocks import ZooResults, zoo_block

from edgeprune.records.base import read_json
from edgeprune.records.report import Report

README_NETS = ("example", "mobilenetv2-half")
# "-brief" is the same net healed for less, which keeps apart what long training makes equal.
COMPARISONS = (
    "example", "resnet20-wide", "resnet20-wide-brief", "mobilenetv2-half", "mobilenetv2-half-earlier",
)  # fmt: skip


def load_blocks(results: Path) -> dict[str, str | None]:
    """Every block by name; ``None`` while its results file is not there.

    Args:
        results: the folder with ``demo.json``, ``budgets.json``, ``measurement.json``, ``boards.json``, ``emulated-setup.json``,
            ``predictor.json``, ``zoo.json``, ``targets.json``, ``int8.json``, ``pictures.json``,
            ``walltime.json`` and ``compare-NET.json``.

    Raises:
        IntegrityError: a results file is damaged.
    """
    demo, budgets = results / "demo.json", results / "budgets.json"
    measurement = results / "measurement.json"
    boards, setup = results / "boards.json", results / "emulated-setup.json"
    names = (
        "demo",
        "budgets",
        "prediction",
        "predictor",
        "measurement",
        "boards",
        "zoo",
        "targets",
        "int8",
        "walltime",
    )
    found: dict[str, str | None] = dict.fromkeys(names)
    found |= picture_blocks(results, stamp_text)
    found["failures"] = matrix_block()
    asked = tuple(goals(results))
    any_found = any(goal.found is not None for goal in asked)
    found["goals"] = goals_block(asked, table) if any_found else None
    if demo.is_file():
        found["demo"] = demo_block(read_json(Report, demo))
    if budgets.is_file():
        read = read_json(BudgetResults, budgets)
        found |= {"budgets": budgets_block(read), "prediction": prediction_block(read)}
    if measurement.is_file():
        found["measurement"] = measurement_block(read_json(MeasurementResults, measurement))
    predictor = results / "predictor.json"
    if predictor.is_file():
        predicted = read_json(PredictorResults, predictor)
        found["predictor"] = predictor_block(predicted, table, stamp_text)
    if (walltime := results / "walltime.json").is_file():
        timed = read_json(WallTime, walltime)
        found["walltime"] = walltime_block(timed, table, stamp_text)
    if (targets := results / "targets.json").is_file():
        converted = read_json(TargetResults, targets)
        found["targets"] = targets_block(converted, table)
        found["targets-short"] = targets_block(
            converted, table, precisions=("int8",), nets=README_NETS
        )
    if (recipes := results / "int8.json").is_file():
        found["int8"] = int8_block(read_json(RecipeResults, recipes), table)
    if (zoo := results / "zoo.json").is_file():
        found["zoo"] = zoo_block(read_json(ZooResults, zoo), table)
    for net in COMPARISONS:
        path = results / f"compare-{net}.json"
        found |= {f"compare-{net}": None, f"compare-{net}-short": None}
        if path.is_file():
            compared = read_json(CompareResults, path)
            stamp = stamp_text(compared.fingerprint)
            found[f"compare-{net}"] = compare_block(compared, table, stamp)
            found[f"compare-{net}-short"] = compare_summary(compared, stamp)
    if boards.is_file():
        costs = json.loads(setup.read_bytes()) if setup.is_file() else None
        found["boards"] = boards_block(read_json(BoardResults, boards), costs)
    return found


def load_plots(results: Path) -> dict[str, str]:
    """Pictures by their place in the checkout. Raises as :func:`load_blocks`."""
    found = {}
    for net in COMPARISONS:
        path = results / f"compare-{net}.json"
        drawn = compare_plot(read_json(CompareResults, path)) if path.is_file() else None
        if drawn is not None:
            found[f"docs/compare-{net}.svg"] = drawn.decode()
    return found
