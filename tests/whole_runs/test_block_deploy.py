"""A whole deployment in which a residual block is removed: plan, healing, files, bundle, report, and the ways back from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinynet
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune.compress.pruned_file import load_pruned
from edgeprune.formats import load
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json
from edgeprune.records.plan import PlanFile
from edgeprune.records.report import Report

pytestmark = pytest.mark.slow
SOURCE = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + x)


class Bottleneck(nn.Module):
    def __init__(self, c, w):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, w, 1, bias=False), nn.BatchNorm2d(w)
        self.conv2, self.bn2 = nn.Conv2d(w, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.conv3, self.bn3 = nn.Conv2d(w, c, 1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + x)


def build():
    """Two basic residual blocks and a bottleneck."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32), Block(32), Bottleneck(32, 16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )
'''  # fmt: skip


def build() -> nn.Module:
    names: dict[str, object] = {}
    exec(SOURCE, names)
    made = names["build"]()  # type: ignore[operator]
    assert isinstance(made, nn.Module)
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after the deployment of a plan that takes the first block and the bottleneck out."""
    home = tinynet.project(tmp_path_factory.mktemp("blocks") / "project", max_drop="100%")
    (home / "net.py").write_text(SOURCE)
    torch.manual_seed(0)
    save_file(build().state_dict(), home / "weights.safetensors")
    plan = PlanFile(
        target="this-machine", budget="90%", precision="int8", dense_ms=1, predicted_ms=1, measured_ms=1,
        widths={"3.conv1": 0, "4.conv1": 16, "5.conv1": 0, "5.conv2": 0}, admissible_widths={},
    )  # fmt: skip
    write_json(plan, home / "mine.json")
    args = ("--target", "this-machine", "--latency", "90%", "--plan", "mine.json", "--run", "run")
    done = tinynet.edgeprune(home, "deploy", *args)
    assert (home / "run" / "report.json").exists(), done.stderr
    return home


def test_the_plan_that_was_deployed_says_that_the_block_is_removed(project) -> None:
    report = read_json(Report, project / "run" / "report.json")
    group = next(g for g in report.plan.groups if g.name == "3.conv1")
    assert group.kept == ()
    assert group.note == "block removed"
    assert group.layers == ("3.conv1", "3.bn1", "3.conv2", "3.bn2")
    assert group.saved_ms_predicted > 0
    assert "32 → block removed" in (project / "run" / "report.html").read_text()
    widths = {w.layer: w.out_after for w in report.layer_widths}
    assert (widths["3.conv1"], widths["3.conv2"], widths["4.conv1"]) == (0, 0, 16)
    assert [widths[f"5.conv{i}"] for i in (1, 2, 3)] == [0, 0, 0]


def test_a_bottleneck_goes_with_both_its_groups_and_counts_once(project) -> None:
    plan = read_json(Report, project / "run" / "report.json").plan
    first, second = (next(g for g in plan.groups if g.name == f"5.conv{i}") for i in (1, 2))
    assert first.kept == second.kept == ()
    assert first.note == second.note == "block removed"
    assert (
        first.layers
        == second.layers
        == tuple(f"5.{n}{i}" for i in (1, 2, 3) for n in ("conv", "bn"))
    )
    assert first.saved_ms_predicted > 0
    assert first.cost_nats > 0
    assert (second.saved_ms_predicted, second.cost_nats) == (0, 0)


def test_what_ships_has_no_operator_of_the_blocks(project) -> None:
    report = read_json(Report, project / "run" / "report.json")
    rows = {(r.variant, r.precision): r for r in report.variants}
    assert rows["pruned", "fp32"].macs < 0.4 * rows["dense", "fp32"].macs
    (dense,) = (project / "run").glob("stages/dense-*/dense.fp32.onnx")
    (pruned,) = (project / "run").glob("stages/export-*/pruned.fp32.onnx")
    before, after = (load("onnx").describe(path).op_counts for path in (dense, pruned))
    # The activations behind the sums go with them: others come right before.
    gone = {op: before[op] - after[op] for op in ("Conv", "Add", "Relu")}
    assert gone == {"Conv": 5, "Add": 2, "Relu": 5}


def test_the_bundle_verifies(project) -> None:
    done = tinynet.edgeprune(project, "verify", "run/bundle")
    assert done.returncode == 0, done.stderr


def test_the_weights_come_back_into_the_factory_and_into_plain_source(project) -> None:
    file = project / "run" / "pruned.safetensors"
    model = load_pruned(build, file)
    names: dict[str, object] = {}
    text = (project / "run" / "pruned.py").read_text()
    exec(text, names)
    plain = names["build"]()  # type: ignore[operator]
    plain.load_state_dict(load_file(file))
    x = torch.from_numpy(np.random.default_rng(0).random((4, 1, 24, 24), np.float32))
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert "4.conv1" in text
    assert not any(layer in text for layer in ("3.conv", "3.bn", "5.conv", "5.bn", "zeros_like"))
