"""Bundles of ExecuTorch programs: which samples lie in them, what their texts say, and what verify says of XNNPACK's share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_fixture import CHANNELS, CLASSES, PREPROCESS, SIDE, expected, facts, images, weights
from torch import nn

pytest.importorskip("executorch")

from edgeprune import formats
from edgeprune.bundle.behaviour import Check
from edgeprune.bundle.integrity import check_structure
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.datasets import model_input


@pytest.fixture(scope="module", params=["android", "python"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the classifier of the fixture as a program, for an app and for a board."""
    folder = tmp_path_factory.mktemp("pte")
    net = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE * SIDE, CLASSES, bias=False)).eval()
    net[1].weight = nn.Parameter(torch.from_numpy(weights()))
    x = model_input(images(), PREPROCESS).astype(np.float32)
    artifact = formats.load("executorch").export(net, x[:1], folder / "net.pte")
    payload = Payload(artifact, folder / "net.pte", images(), expected(images()))
    return write_bundle(folder / "bundle", facts("executorch", kind=request.param), payload)


def test_the_samples_are_those_that_run_a_program(bundle):
    manifest = check_structure(bundle)
    assert manifest.model.path == "models/model.fp32.pte"
    names = {"python", "android"} if manifest.kind == "android" else {"python"}
    assert {path.name for path in (bundle / "samples").iterdir()} == names
    for path in bundle.rglob("*.md"):
        assert "cpp" not in path.read_text()


def test_readme_and_verify_say_that_a_program_carries_no_texts(bundle):
    assert "A `.pte` carries no texts" in (bundle / "README.md").read_text()
    assert _checks(bundle, 3)["metadata"] == Check(
        name="metadata", status="not-run", detail="a .pte carries no texts"
    )


def test_verify_judges_the_share_of_xnnpack_by_the_manifest(bundle):
    delegate = _checks(bundle, 4)["delegate"]
    assert delegate.status == "passed"
    assert delegate.detail.startswith("XNNPACK runs 100% of the multiply-accumulates")


def _checks(bundle: Path, level: int) -> dict[str, Check]:
    report = verify(bundle)
    assert report.ok, report
    return {check.name: check for check in report.levels[level].checks}
