"""Bundles of ExecuTorch programs: which samples lie in them, what their texts say, and what verify says of XNNPACK's share."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_checks import failed_level, reseal
from bundle_fixture import CHANNELS, CLASSES, PREPROCESS, SIDE, expected, facts, images, weights
from torch import nn

pytest.importorskip("executorch")

from edgeprune import formats
from edgeprune.bundle.device_check import Check
from edgeprune.bundle.integrity import check_structure
from edgeprune.bundle.model_check import operators_check
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.errors import IntegrityError
from edgeprune.workload.dataset import model_input


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


def test_verify_counts_what_is_in_the_program_itself(bundle):
    operators = _checks(bundle, 3)["operators"]
    assert operators.status == "passed"
    assert operators.detail == (
        "XNNPACK has 2 of 2 operations and 100% of the multiply-accumulates, 0% are in 8 bits"
    )


def _without_xnnpack(counts: dict[str, int]) -> dict[str, int]:
    return {**counts, "macs:xnnpack": 0}


def _one_node_more(counts: dict[str, int]) -> dict[str, int]:
    return {**counts, "xnnpack:FullyConnected": counts["xnnpack:FullyConnected"] + 1}


@pytest.mark.parametrize(
    ("tamper", "detail"),
    [
        (_without_xnnpack, r"the model must have 0 macs:xnnpack, but has \d+"),
        (_one_node_more, "the model must have 2 xnnpack:FullyConnected, but has 1"),
        (lambda counts: {}, r"the model must have 0 macs, but has \d+"),
        (
            lambda counts: {**counts, "aten::mm.out": 1},
            "the model must have 1 aten::mm.out, but has 0",
        ),
    ],
    ids=["share", "nodes", "nothing", "operators"],
)
def test_a_manifest_that_counts_other_operators_than_the_program_fails(
    bundle, tmp_path, tamper, detail
):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    model = check_structure(folder).model
    counts = tamper(model.op_counts)
    assert counts != model.op_counts
    reseal(folder, model=model.model_copy(update={"op_counts": counts}).model_dump(mode="json"))
    failed = failed_level(folder)
    assert failed.level == 3
    assert re.fullmatch(detail, failed.detail)


def test_a_manifest_that_names_other_operators_of_the_runtime_fails(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    model = check_structure(folder).model.model_copy(update={"operators": ("aten::mm.out",)})
    reseal(folder, model=model.model_dump(mode="json"))
    failed = failed_level(folder)
    assert failed.level == 3
    assert failed.detail == (
        "the model needs the runtime's operators none, but the manifest names aten::mm.out"
    )


def test_a_damaged_program_is_an_integrity_error_and_never_crashes(bundle):
    manifest = check_structure(bundle)
    whole = (bundle / manifest.model.path).read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            operators_check(
                manifest, bytes(damaged[: draw.choice((len(damaged), len(damaged) // 2))])
            )
        except IntegrityError:
            refused += 1
    assert refused > 0


def _checks(bundle: Path, level: int) -> dict[str, Check]:
    report = verify(bundle)
    assert report.ok, report
    return {check.name: check for check in report.levels[level].checks}
