"""Where files of another format are judged in place of those that ship, the file that ships has the weights that were judged."""

from __future__ import annotations

from pathlib import Path

import int8_fixture
import numpy as np
import pytest
import torch

from edgeprune import formats
from edgeprune.compress.evaluate import agreement
from edgeprune.devices.board import open_board
from edgeprune.pipeline.files import export, int8
from edgeprune.pipeline.files.int8 import Quantised
from edgeprune.workload.answers import logits


class Ship:
    """A format whose INT8 files have no options, and are in truth ONNX: so they can be compared with the twin's."""

    def __init__(self) -> None:
        self.twin = formats.load("onnx")
        changes = {"name": "ship", "suffix": ".ship", "int8_options": False}
        self.info = self.twin.info.model_copy(update=changes)

    def __getattr__(self, name: str) -> object:
        return getattr(self.twin, name)


@pytest.fixture
def chosen(monkeypatch) -> list[Quantised]:
    """What the search chose, and layers in float that cost no time."""
    found: list[Quantised] = []

    def best(*arguments, **options):
        found.append(int8.best_int8(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(export, "best_int8", best)
    monkeypatch.setattr(int8, "_times", lambda context, paths: dict.fromkeys(paths, 1.0))
    return found


def shipped(folder: Path, ship: object, model: torch.nn.Module, effort: str = "thorough"):
    with open_board("here", int8_fixture.local(folder)) as board:
        context = int8_fixture.context_of(board, model, effort=effort, ship=ship)
        return context, export.pruned_files(context, context.model, folder, limit_ms=2.0)


def assert_ships_what_was_judged(files, folder: Path, found: Quantised) -> None:
    """The INT8 file that ships is that of the search, without float layers; the FP32 file keeps the weights of the recovery."""
    tried = [t.name for t in found.report.tries]
    assert not [n for n in tried if "float layers" in n or n.endswith(" ranges")][1:], tried
    assert files.float_layers("int8") == ()
    judged, ships = folder / files.int8.path, folder / files.shipping["int8"].path
    assert ships.suffix == ".ship"
    assert ships.read_bytes() == judged.read_bytes()
    wide = [(folder / a.path).read_bytes() for a in (files.fp32, files.shipping["fp32"])]
    assert wide[0] == wide[1]


def test_the_file_that_ships_is_the_one_that_was_judged(tmp_path, chosen):
    _, files = shipped(tmp_path, Ship(), int8_fixture.uneven())
    (found,) = chosen
    # Other weights than those of the recovery, and far better ones: or there would be nothing to lose on the way.
    assert found.report.chosen.startswith("equalised layers")
    own, *_ = found.report.tries
    assert max(t.quality for t in found.report.tries) > own.quality + 0.5
    assert_ships_what_was_judged(files, tmp_path, found)


def test_a_net_that_only_a_float_layer_would_save_ships_as_it_was_judged(tmp_path, chosen):
    _, files = shipped(tmp_path, Ship(), int8_fixture.spoiled())
    (found,) = chosen
    # All tries name one class for every sample, so that the last bits of a processor's sums decide which of them is "best".
    assert max(t.quality for t in found.report.tries) < 0.5
    assert_ships_what_was_judged(files, tmp_path, found)


def test_a_plain_file_ships_from_the_net_as_it_is(tmp_path, chosen):
    _, files = shipped(tmp_path, Ship(), int8_fixture.uneven(), effort="plain")
    assert chosen[0].report.chosen == "own ranges"
    ships, judged = tmp_path / files.shipping["int8"].path, tmp_path / files.int8.path
    assert ships.read_bytes() == judged.read_bytes()
    assert not list(tmp_path.glob("*int8-source*"))


@pytest.mark.slow
def test_a_core_ml_package_has_the_weights_that_were_judged(tmp_path, chosen):
    from coreml_fixture import read_program

    from edgeprune.formats.coreml.check import folded_weights

    form = formats.load("coreml")
    context, files = shipped(tmp_path, form, int8_fixture.uneven())
    (found,) = chosen
    package = tmp_path / files.shipping["int8"].path
    assert package.suffix == ".mlpackage"
    stored = [
        (value, step.reshape(-1, *[1] * (value.ndim - 1)))
        for _, value, step in read_program(package).weights()
    ]

    def fits(model: torch.nn.Module) -> list[bool]:
        wanted = folded_weights(model)
        return [
            bool((np.abs(value - w) <= 0.51 * step + 1e-3 * np.abs(w)).all())
            for (value, step), (_, w) in zip(stored, wanted, strict=True)
        ]

    assert fits(found.model) == [True] * 3
    assert not all(fits(context.model))
    x = int8_fixture.samples(64, seed=2)
    dense = logits(context.model, torch.from_numpy(x))
    plain = tmp_path / "plain.mlpackage"
    form.quantize(
        tmp_path / files.shipping["fp32"].path, context.calibration, plain, model=context.model
    )
    now, before = (
        agreement(torch.from_numpy(form.evaluate(p, x)), dense) for p in (package, plain)
    )
    assert now > before + 0.1
