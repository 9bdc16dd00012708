"""What this project set out to reach, beside what its results files hold. Misses keep their line, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from blocks import BudgetResults, stamp_text
from compare_records import OURS, CompareResults, CompareRow
from predictor_blocks import PredictorResults
from walltime_blocks import WallTime

from edgeprune.records.base import Record, read_json
from edgeprune.report.figures import share_text, signed

R = TypeVar("R", bound=Record)
# Why a quantity may miss what was asked or aimed at. Shown only while it does.
REASONS = {
    "points": "The lines of ResNet-20-wide at two epochs and of MobileNetV2 have one seed; seeds of one line of the example lie up to 0.8"
    " points apart.",
    "margin": "Where every pruned net heals to within a few images of dense, no pruner can be ahead of another: two epochs do not tell"
    " them apart on this net. A third of an epoch does.",
    "predictor": "A kernel timed alone may find its weights in the cache where a whole net does not: the correction has a term for bytes"
    " and a bend for that, and the smallest nets stay off. The search measures what it proposes: an error costs a trial, not the budget.",
    "slack": "Admissible widths are steps of 8 and more, and of the structures within a budget the one that really loses least"
    " ships; what still fits is added to it.",
    "fp32": "Depthwise layers gain less from INT8 on this processor than dense ones, so a net of them has to be cut deeper for the"
    " same factor.",
}


@dataclass(frozen=True)
class Goal:
    """One figure with its stamp.

    ``must`` and ``aim`` are bounds: the figure is at least them, or at most where ``is_most``. ``found`` is ``None`` where nothing was
    measured.
    """

    about: str
    quantity: str
    must: float | None
    aim: float
    found: float | None
    text: Callable[[float], str]
    is_most: bool = False
    stamp: str = ""  # of what the figure was timed on

    @property
    def reached(self) -> str:
        """``aim``, ``asked``, ``missed`` or ``not run``."""
        if self.found is None:
            return "not run"
        sign = -1 if self.is_most else 1
        if sign * self.found >= sign * self.aim - 1e-9:
            return "aim"
        is_asked = self.must is not None and sign * self.found >= sign * self.must - 1e-9
        return "asked" if is_asked else "missed"


def points(value: float) -> str:
    """Percentage points with their sign."""
    return f"{signed(value * 100, 2)} pt"


def percent(value: float) -> str:
    """Per cent with two decimals: a bound may be missed by the second."""
    return f"{value:.2%}".replace("%", " %")


def _read(cls: type[R], path: Path) -> R | None:
    return read_json(cls, path) if path.is_file() else None


def _row(results: CompareResults | None, budget: str, method: str = OURS) -> CompareRow | None:
    rows = () if results is None else results.rows
    found = (r for r in rows if r.method == method and r.budget == budget and r.trained)
    return next(found, None)


def _accuracy(results: CompareResults | None, budget: str) -> float | None:
    """Mean test accuracy over seeds against dense INT8, as a ratio."""
    row = _row(results, budget)
    if results is None or row is None:
        return None
    return math.fsum(t.test for t in row.trained) / len(row.trained) - results.dense_test["int8"]


def _margin(results: CompareResults | None, budget: str) -> float | None:
    """Over the best of the other pruners: of those that are no part of ours."""
    rows = () if results is None else results.rows
    others = [
        r.versus.margin
        for r in rows
        if r.budget == budget and r.versus is not None and not r.method.startswith(OURS)
    ]
    return min(others, default=None)


def _one_shot(results: CompareResults | None, budget: str) -> float | None:
    row = _row(results, budget)
    if row is None or row.one_shot is None or row.one_shot.compensated is None:
        return None
    return row.one_shot.compensated - row.one_shot.naive


def _against_fp32(results: CompareResults | None) -> float | None:
    """The largest speed-up over dense FP32 of a file that lost at most half a point against it."""
    if results is None:
        return None
    found = [
        row.against_fp32
        for row in results.rows
        if row.method == OURS and row.against_fp32 is not None and row.trained
        if math.fsum(t.test for t in row.trained) / len(row.trained) >= results.dense_test["fp32"] - 0.005
    ]  # fmt: skip
    return max(found, default=None)


def _stamp(results: CompareResults | BudgetResults | WallTime | None) -> str:
    return "" if results is None else stamp_text(results.fingerprint)


def goals(folder: Path) -> Iterator[Goal]:
    """Every figure that was asked for, from the results files in a folder. Raises as :func:`edgeprune.records.base.read_json`."""
    nets = {
        n: _read(CompareResults, folder / f"compare-{n}.json")
        for n in ("example", "resnet20-wide", "resnet20-wide-brief", "mobilenetv2-half")
    }
    resnet, mobile, example = nets["resnet20-wide"], nets["mobilenetv2-half"], nets["example"]
    for budget, must, aim in (("2x", -0.002, 0.0), ("3x", -0.005, -0.002), ("4x", -0.01, -0.005)):
        about = f"ResNet-20-wide, INT8 against dense INT8 at {budget}"
        yield Goal(
            "points", about, must, aim, _accuracy(resnet, budget), points, stamp=_stamp(resnet)
        )
    for budget, must, aim in (("1.5x", -0.004, -0.001), ("2x", -0.01, -0.005)):
        about = f"MobileNetV2 of half width, INT8 against dense INT8 at {budget}"
        yield Goal(
            "points", about, must, aim, _accuracy(mobile, budget), points, stamp=_stamp(mobile)
        )
    for name, found in (
        ("the example", example),
        ("ResNet-20-wide", nets["resnet20-wide-brief"]),
        ("ResNet-20-wide", resnet),
    ):
        epochs = "" if found is None else f", {found.epochs:g} epochs"
        for budget, least, aim in (("3x", 0.002, 0.005), ("4x", None, 0.01)):
            about = f"margin over the best other pruner at {budget}, {name}{epochs}"
            yield Goal(
                "margin", about, least, aim, _margin(found, budget), points, stamp=_stamp(found)
            )
    about = "accuracy at 2x without training, over plain removal, ResNet-20-wide"
    yield Goal("one-shot", about, 0.2, 0.4, _one_shot(resnet, "2x"), points, stamp=_stamp(resnet))
    yield from _predictor_goals(_read(PredictorResults, folder / "predictor.json"))
    yield from _budget_goals(_read(BudgetResults, folder / "budgets.json"))
    walltime = _read(WallTime, folder / "walltime.json")
    minutes = None if walltime is None else walltime.seconds / 60
    about = "wall time before training, MobileNetV2 at 224 pixels, 2 cores"
    yield Goal("walltime", about, 10, 3, minutes, lambda v: f"{v:.1f} min", True, _stamp(walltime))
    for name, found in (("ResNet-20-wide", resnet), ("MobileNetV2 of half width", mobile)):
        about = f"pruned INT8 against dense FP32 at up to 0.5 points, {name}"
        yield Goal(
            "fp32", about, 4, 8, _against_fp32(found), lambda v: f"{v:.1f}x", stamp=_stamp(found)
        )


def _predictor_goals(found: PredictorResults | None) -> Iterator[Goal]:
    for row in () if found is None else found.rows:
        stamp = stamp_text(row.fingerprint)
        name = f"{row.model.rpartition(':')[2]}, {row.precision}, {row.fingerprint.runtime}"
        mean, most = (
            f"prediction of new structures, mean error, {name}",
            "the same, 95th percentile",
        )
        yield Goal("predictor", mean, 0.03, 0.015, row.mean_error_ratio, percent, True, stamp)
        yield Goal("predictor", most, 0.08, 0.04, row.p95_error_ratio, percent, True, stamp)
    if found is not None and found.rows:
        most = max(row.kernels for row in found.rows)
        yield Goal("kernels", "kernels timed for it, at most", 250, 100, most, str, is_most=True)


def _budget_goals(found: BudgetResults | None) -> Iterator[Goal]:
    done = [] if found is None else [r.achieved for r in found.rows if r.achieved is not None]
    met = sum(a.latency_met for a in done) / len(done) if done else None
    slack = max((a.slack_ratio for a in done), default=None)
    yield Goal(
        "budget",
        "files that met their latency budget, the example",
        1,
        1,
        met,
        share_text,
        stamp=_stamp(found),
    )
    about = "unused share of a budget, at most, the example"
    yield Goal("slack", about, 0.05, 0.02, slack, share_text, True, _stamp(found))


def goals_block(found: Sequence[Goal], table: Callable[..., str]) -> str:
    """A line for each figure, and the reasons of those that fell short."""
    rows = [
        (
            goal.quantity,
            "" if goal.must is None else goal.text(goal.must),
            goal.text(goal.aim),
            "" if goal.found is None else goal.text(goal.found),
            goal.reached,
            goal.stamp,
        )
        for goal in found
    ]
    short = [g for g in found if g.reached in ("missed", "asked")]
    reasons = [f"- {REASONS[a]}" for a in dict.fromkeys(g.about for g in short) if a in REASONS]
    head = ("quantity", "asked", "aim", "found", "reached", "timed on")
    why = ["What falls short of its aim, and why:\n", *reasons] if reasons else []
    return "\n\n".join(part for part in (table(head, rows), "\n".join(why)) if part)
