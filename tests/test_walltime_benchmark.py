"""The benchmark of a search's wall time: a real search on a small net, and what is written of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tinynet
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import blocks
import walltime
from walltime_blocks import WallTime, walltime_block

from edgeprune import records
from edgeprune.specs import Preprocess
from edgeprune.workload import LoadedWorkload, from_objects


def small() -> LoadedWorkload:
    splits = {n: (x[..., None], y) for n, (x, y) in tinynet.arrays().items()}
    return from_objects(tinynet.trained(), splits, preprocess=Preprocess(color="grey"))


@pytest.mark.slow
def test_every_second_of_a_search_is_in_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(walltime, "load", small)
    out = tmp_path / "walltime.json"
    asked = ["--target", "this-machine", "--latency", "80%", "--out", str(out)]
    done = CliRunner().invoke(walltime.main, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = records.read_json(WallTime, out)
    names = [stage.name for stage in found.stages]
    before_training = tinynet.STAGES[: tinynet.STAGES.index("prune")]
    assert names == ["opening the device", *before_training]
    assert 0.7 * found.seconds < sum(stage.seconds for stage in found.stages) <= found.seconds
    assert 0 < found.ratio < 1
    block = walltime_block(found, blocks.table, lambda _: "stand-in")
    assert all(f"| {name} |" in block for name in names)
    assert str(tmp_path) not in out.read_text()


def test_a_target_that_does_not_exist_is_one_line_and_writes_nothing(tmp_path: Path):
    out = tmp_path / "walltime.json"
    done = CliRunner().invoke(walltime.main, ["--target", "nowhere", "--out", str(out)])
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "nowhere" in done.output
    assert not out.exists()
