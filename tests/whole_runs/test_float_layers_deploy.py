"""A whole deployment whose INT8 search keeps a layer in float: named in manifest and report, and in float in the file, alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinynet
import torch
import yaml
from safetensors.torch import save_file

import edgeprune
from edgeprune.bundle.manifest import Manifest
from edgeprune.errors import IntegrityError
from edgeprune.formats.inside.anatomy import anatomy
from edgeprune.formats.inside.eight_bits import file_kind, require_eight_bits
from edgeprune.records import catalog
from edgeprune.records.base import read_json
from edgeprune.records.report import Report

pytestmark = pytest.mark.slow

SPOILED = "11"  # the linear layer of the tiny net
LAYERS = ("0", "3", "6", SPOILED)


def spoiled_state() -> dict[str, torch.Tensor]:
    """The trained net, whose last layer has huge weights for a channel that is always 0: no 8 bits can hold them beside the others."""
    state = {name: value.clone() for name, value in tinynet.trained_state().items()}
    state["7.weight"][0] = 1e-3
    state["7.bias"][0] = -1.0
    state[f"{SPOILED}.weight"][:, 0] = 1e5
    return state


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    """The spoiled net at a budget that leaves it as it is, so that what INT8 loses is what the layer costs."""
    home = tinynet.project(tmp_path_factory.mktemp("floats") / "p", recovery={"epochs": 0})
    save_file(spoiled_state(), home / "weights.safetensors")
    # INT8 alone: on some processors onnxruntime is faster in FP32, which would ship then.
    own = catalog.target("this-machine").model_copy(update={"precisions": ("int8",)})
    (home / "int8").mkdir()
    (home / "int8" / "this-machine.yaml").write_text(
        yaml.safe_dump(own.model_dump(mode="json", exclude_none=True))
    )
    flags = ("--target", "int8/this-machine.yaml", "--latency", "1000ms", "--run", "run")
    return tinynet.Run(home, home / "run", tinynet.edgeprune_here(home, "deploy", *flags))


@pytest.fixture(scope="module")
def report(deployed: tinynet.Run) -> Report:
    assert deployed.done.returncode == 0, deployed.done.stderr
    return read_json(Report, deployed.folder / "report.json")


@pytest.fixture(scope="module")
def manifest(deployed: tinynet.Run, report: Report) -> Manifest:
    return read_json(Manifest, deployed.folder / "bundle" / "manifest.json")


def content(deployed: tinynet.Run, manifest: Manifest) -> bytes:
    return Path(deployed.folder, "bundle", manifest.model.path).read_bytes()


def test_the_layer_that_spoils_int8_stays_in_float(report, manifest):
    assert (report.shipped, manifest.model.precision) == ("int8", "int8")
    assert report.int8 is not None
    assert SPOILED in manifest.float_layers
    assert manifest.float_layers == report.int8.float_layers
    assert report.int8.drop() < 0.5 * report.int8.drop("own ranges")


def test_the_file_has_exactly_these_layers_in_float(deployed, manifest):
    found = anatomy(file_kind(manifest.model), content(deployed, manifest))
    assert found is not None
    assert {layer.name for layer in found.layers} == set(LAYERS)
    in_float = {layer.name for layer in found.layers if not layer.eight_bit}
    assert in_float == set(manifest.float_layers)


def test_the_checks_of_an_int8_file_pass_with_these_layers_and_with_no_others(deployed, manifest):
    shipped = content(deployed, manifest)
    require_eight_bits(manifest.model, shipped, manifest.float_layers)
    with pytest.raises(IntegrityError, match="of its layers in 8 bits, but"):
        require_eight_bits(manifest.model, shipped)
    verified = edgeprune.verify(deployed.folder / "bundle.zip")
    assert verified.ok, verified
    (operators,) = (c for c in verified.levels[3].checks if c.name == "operators")
    assert operators.status == "passed"
    named = ", ".join(manifest.float_layers)
    assert operators.detail.endswith(f"left in float on purpose: {named}")


def test_the_report_names_the_layer_and_what_a_millisecond_in_it_brings(deployed, report):
    assert report.int8 is not None
    (kept,) = (x for x in report.int8.layers if x.layer == SPOILED)
    assert kept.in_float
    assert kept.gain_nats > 0
    assert kept.extra_ms is not None
    assert any("layers of the INT8 file that stay in float" in note for note in report.notes)
    for text in ((deployed.folder / "report.html").read_text(), deployed.done.stdout):
        assert "nats less per ms" in text
        assert "stays in float" in text
