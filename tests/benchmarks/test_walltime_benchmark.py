"""The benchmark of a search's wall time: a real search on a small net, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import blocks
import pytest
import tinynet
import walltime
from click.testing import CliRunner
from walltime_blocks import SolverTime, WallTime, walltime_block

from edgeprune.records.base import read_json


@pytest.mark.slow
def test_every_second_of_a_search_is_in_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(walltime, "load", tinynet.loaded)
    out = tmp_path / "walltime.json"
    asked = ["--target", "this-machine", "--latency", "80%", "--out", str(out)]
    done = CliRunner().invoke(walltime.main, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = read_json(WallTime, out)
    names = [stage.name for stage in found.stages]
    before_training = tinynet.STAGES[: tinynet.STAGES.index("prune")]
    assert names == ["opening the device", *before_training]
    assert 0.7 * found.seconds < sum(stage.seconds for stage in found.stages) <= found.seconds
    assert 0 < found.ratio < 1
    block = walltime_block(found, blocks.table, lambda _: "stand-in")
    assert all(f"| {name} |" in block for name in names)
    assert found.solver is not None
    assert 0 < found.solver.solve_seconds < found.seconds
    assert 2 <= found.solver.points <= 64
    assert found.solver.groups <= found.groups < found.solver.choices
    assert f"for a front of {found.solver.points} structures" in block
    assert str(tmp_path) not in out.read_text()


def test_results_from_before_the_solver_was_timed_say_nothing_of_it():
    committed = read_json(WallTime, blocks.RESULTS / "walltime.json")
    earlier = committed.model_copy(update={"solver": None})
    timed = earlier.model_copy(
        update={
            "solver": SolverTime(
                groups=25, choices=200, solve_seconds=0.25, pareto_seconds=1.5, points=64, repeats=5
            )
        }
    )
    before, after = (
        walltime_block(f, blocks.table, lambda _: "stand-in") for f in (earlier, timed)
    )
    assert "solver" not in before
    assert after.startswith(before)
    assert (
        "(25 groups, 200 widths): **250 ms** for a budget, 1.5 s for a front of 64 structures"
        in after
    )


def test_a_target_that_does_not_exist_is_one_line_and_writes_nothing(tmp_path: Path):
    out = tmp_path / "walltime.json"
    done = CliRunner().invoke(walltime.main, ["--target", "nowhere", "--out", str(out)])
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "nowhere" in done.output
    assert not out.exists()
