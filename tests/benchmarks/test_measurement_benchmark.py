"""The benchmark of measuring itself: models whose difference is known, results that go on, and the table made of them."""

from __future__ import annotations

import blocks
import measurement as script
import pytest
from click.testing import CliRunner
from report_fixture import make_fingerprint

from edgeprune.records.base import read_json


def results(*trials: blocks.Trial) -> blocks.MeasurementResults:
    return blocks.MeasurementResults(
        edgeprune_version="0", created="now", command="c", fingerprint=make_fingerprint(),
        layer="MatMul", block_ms=24, chain_ms={"100": 0.4}, versions={}, trials=trials,
    )  # fmt: skip


def paired(number: int, true: float, ratio: float, verdict: str, pairs: int) -> blocks.Trial:
    return blocks.Trial(
        number=number, rule="paired", true_ratio=true, ratio=ratio, verdict=verdict, pairs=pairs, seconds=1
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_block_counts_what_the_trials_say():
    trials = [
        paired(0, 1.0, 1.001, "tie", 8),
        paired(1, 1.0, 1.03, "slower", 30),
        paired(0, 1.02, 1.02, "slower", 12),
        paired(1, 1.02, 1.0, "undecided", 30),
        blocks.Trial(number=0, rule="benchmark_model", true_ratio=1, ratio=0.9, seconds=3),
    ]
    text = blocks.measurement_block(results(*trials))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[2] == "| paired | 2 | 1.55 % | 3.00 % | 50.0 % | 50.0 % | 50.0 % | 1.0 s |"
    assert (
        lines[3]
        == "| benchmark_model | 1 | 10.00 % | 10.00 % | 0.0 % | 100.0 % | no rule | 3.0 s |"
    )
    assert lines[6] == "| none | 2 |  | 50.0 % | 50.0 % | 0.0 % | 19 | 1.0 s |"
    assert lines[7] == "| +2 % | 2 | 50.0 % | 0.0 % | 0.0 % | 50.0 % | 12 | 1.0 s |"
    assert "stand-in: x86-64" in text
    assert blocks.measurement_block(results()) == "No trial was made."


def test_a_chain_has_as_many_equal_layers_as_it_says():
    onnx = pytest.importorskip("onnx")
    for layers in script.LAYERS:
        graph = onnx.load_from_string(script.chain(layers).content).graph
        assert len(graph.node) == layers
        assert {(n.op_type, n.input[1]) for n in graph.node} == {("MatMul", "matrix")}
        assert len(graph.initializer) == 1


@pytest.mark.slow
def test_trials_are_kept_and_go_on(tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "measurement.json"

    def run(*args: str) -> blocks.MeasurementResults:
        done = CliRunner().invoke(script.main, ["--out", str(out), "--block-ms", "1", *args])
        assert done.exit_code == 0, done.output
        return read_json(blocks.MeasurementResults, out)

    first = run("--trials", "1", "--only", "a-a")
    more = run("--trials", "2", "--only", "a-a", "--only", "shift")
    assert more.trials[0] == first.trials[0]
    found = sorted((t.true_ratio, t.number) for t in more.trials)
    assert found == [(1.0, 0), (1.0, 1), (1.02, 0), (1.02, 1), (1.05, 0), (1.05, 1)]
    assert run("--trials", "2", "--only", "a-a") == more
    other = CliRunner().invoke(script.main, ["--out", str(out), "--block-ms", "2"])
    assert other.exit_code == 1
    assert "another machine or set-up" in other.output
