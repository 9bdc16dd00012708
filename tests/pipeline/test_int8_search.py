"""Which INT8 file is kept: what is tried, in which order layers stay in float, and that only what helps is taken.

The files are real and are run. Times, and where it is said answers, are put in place so that a test decides what is best.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import int8_fixture
import pytest
import torch
from int8_fixture import LAYERS, samples, spoiled, uneven

from edgeprune.compress.evaluate import kl_nats, quality
from edgeprune.devices.board import open_board
from edgeprune.errors import FormatError
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import int8
from edgeprune.pipeline.files.int8 import Quantised, Search, best_int8
from edgeprune.workload.answers import logits

RANGES = ["own ranges", "percentile ranges", "least-error ranges"]
TRAINED = "training with rounding"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    with open_board("here", int8_fixture.local(folder)) as board:
        yield board


@pytest.fixture
def free(monkeypatch):
    """Every file takes the same time: layers in float cost nothing."""
    monkeypatch.setattr(int8, "_times", lambda context, paths: dict.fromkeys(paths, 1.0))


def best(context: Context, folder: Path, limit_ms: float = 2.0) -> Quantised:
    fp32 = folder / "net.fp32.onnx"
    context.whole.export(context.model, context.example, fp32)
    return best_int8(context, context.model, fp32, folder / "net.int8.onnx", limit_ms=limit_ms)


def search_of(context: Context, folder: Path) -> Search:
    """A search whose first file has the format's own ranges."""
    fp32 = folder / "net.fp32.onnx"
    context.whole.export(context.model, context.example, fp32)
    split = context.job.loaded.dataset.selection
    exact = context.run_file(context.host, fp32, split.x)
    reference = logits(context.model, torch.from_numpy(split.x))
    search = Search(context, folder, split.x, split.y, reference, exact)
    search.add("own ranges", fp32, context.model, int8.QuantizeOptions())
    return search


def names(found: Quantised) -> list[str]:
    return [t.name for t in found.report.tries]


def in_float(search: Search) -> list[tuple[str, ...]]:
    return [c.options.float_layers for c in search.found if c.options.float_layers]


# What is tried, and what is kept


@pytest.mark.parametrize("effort", ["plain", "auto"])
def test_nothing_is_tried_where_the_effort_is_plain_or_the_cost_is_allowed(
    here, tmp_path, monkeypatch, effort
):
    monkeypatch.setattr(int8, "ALLOWED_DROP", -1.0 if effort == "plain" else 1.0)
    found = best(int8_fixture.context_of(here, uneven(), effort=effort), tmp_path)
    assert (names(found), found.report.chosen) == (["own ranges"], "own ranges")


def test_all_is_tried_in_order_and_the_best_file_is_the_one_that_is_written(here, tmp_path, free):
    context = int8_fixture.context_of(here, uneven(), effort="thorough")
    found = best(context, tmp_path)
    report, tried = found.report, names(found)
    assert tried[:3] == RANGES
    assert tried[3] == "equalised layers"
    assert tried[4].endswith("corrected biases")
    assert tried[-1] == TRAINED
    ranks = [(t.quality, -t.loss_nats) for t in report.tries]
    assert report.chosen == tried[ranks.index(max(ranks))]
    own, kept = report.tries[0], report.tries[tried.index(report.chosen)]
    assert own.quality + 0.1 < kept.quality
    split = context.job.loaded.dataset.selection
    answers = context.run_file(context.host, tmp_path / "net.int8.onnx", split.x)
    assert quality(answers, split.y, answers)[1] == kept.quality
    assert report.drop() == report.fp32 - kept.quality


def test_the_search_ends_as_soon_as_the_cost_is_allowed(here, tmp_path, monkeypatch, free):
    monkeypatch.setattr(int8, "ALLOWED_DROP", 0.1)
    tried = names(best(int8_fixture.context_of(here, uneven()), tmp_path))
    assert tried[:4] == [*RANGES, "equalised layers"]
    assert TRAINED not in tried


def test_a_recipe_that_brings_nothing_is_not_kept(here, tmp_path, monkeypatch, free):
    monkeypatch.setattr(int8, "kl_nats", lambda *_: 0.5)
    monkeypatch.setattr(int8, "quality", lambda *_: ("accuracy", 0.5))
    context = int8_fixture.context_of(here, uneven(), effort="thorough")
    found = best(context, tmp_path)
    assert len(names(found)) > 5
    assert found.report.chosen == "own ranges"
    assert found.model is context.model
    plain = tmp_path / "plain.onnx"
    context.whole.quantize(tmp_path / "net.fp32.onnx", context.calibration, plain)
    assert (tmp_path / "net.int8.onnx").read_bytes() == plain.read_bytes()


def test_equal_quality_is_decided_by_the_loss_and_equal_loss_by_the_order(here, tmp_path):
    search = search_of(int8_fixture.context_of(here, uneven()), tmp_path)
    first = search.found[0]

    def rated(name: str, value: float, loss: float) -> int8.Int8Candidate:
        tried = int8.Int8Try(name=name, quality=value, loss_nats=loss)
        return int8.replace(first, tried=tried)

    search.found = [rated("a", 0.8, 0.2), rated("b", 0.8, 0.1), rated("c", 0.8, 0.1)]
    assert search.best.tried.name == "b"
    search.found.append(rated("d", 0.9, 0.4))
    assert search.best.tried.name == "d"


def test_a_file_that_the_toolchain_refuses_is_left_out_but_not_the_first(
    here, tmp_path, monkeypatch
):
    context = int8_fixture.context_of(here, uneven())
    search = search_of(context, tmp_path)
    arguments = (tmp_path / "net.fp32.onnx", context.model, int8.QuantizeOptions(io="int8"))
    search.add("refused", *arguments)
    assert [c.tried.name for c in search.found] == ["own ranges"]
    assert "INT8 with refused left out: ONNX files take" in context.progress.lines[-1]
    search.found = []
    with pytest.raises(FormatError, match="ONNX files take"):
        search.add("first", *arguments)


# Layers in float


def test_the_layer_that_spoils_the_file_brings_most_and_stays_in_float(here, tmp_path, free):
    found = best(int8_fixture.context_of(here, spoiled()), tmp_path)
    assert "1 float layers" in found.report.chosen
    assert found.report.float_layers == ("7",)
    assert found.report.layers[0].layer == "7"
    assert found.report.layers[0].gain_nats > 2 * abs(found.report.layers[1].gain_nats)
    assert found.report.drop() < 0.5 * found.report.drop("own ranges")
    assert found.artifact.op_counts["weights:int8"] == 2
    assert found.artifact.op_counts["weights:float32"] == 1


def test_gains_are_the_loss_that_one_layer_in_float_takes_away(here, tmp_path):
    context = int8_fixture.context_of(here, spoiled())
    search = search_of(context, tmp_path)
    start = search.found[0]
    scanned = int8.layer_gains(search, start)
    assert tuple(scanned) == LAYERS
    few = search.x[: int8.SCANNED]
    for layer, (gain, path) in scanned.items():
        found = context.run_file(context.host, path, few)
        assert gain == pytest.approx(start.tried.loss_nats - kl_nats(search.exact, found))
        counts = context.whole.describe(path).op_counts
        assert (counts["weights:int8"], counts["weights:float32"]) == (2, 1), layer
    assert max(scanned, key=lambda n: scanned[n][0]) == "7"


def floated(search, monkeypatch, gains, extra, limit_ms=100.0):
    """Layers in float by gains and times that are given; the file without any takes 1 ms."""
    path = search.found[0].path
    monkeypatch.setattr(int8, "layer_gains", lambda *_: {n: (g, path) for n, g in gains.items()})
    asked = []

    def times(context, paths):
        asked.append(set(paths))
        return {n: 1 + extra.get(n, 0.0) for n in paths}

    monkeypatch.setattr(int8, "_times", times)
    layers = int8._try_float_layers(search, limit_ms)
    assert asked == [{"", *(n for n, g in gains.items() if g > 0)}]
    return layers


@pytest.mark.parametrize(
    ("limit_ms", "wanted"),
    [
        (100.0, [("7",), ("7", "3"), ("7", "3", "0")]),  # 5, 2 and 0.3 nats for a millisecond
        (1.5, [("7",), ("7", "3")]),
        (1.1, [("7",)]),
        (1.01, []),
    ],
)
def test_layers_go_to_float_by_what_they_bring_for_a_millisecond_within_the_limit(
    here, tmp_path, monkeypatch, limit_ms, wanted
):
    monkeypatch.setattr(int8, "ALLOWED_DROP", -1.0)
    search = search_of(int8_fixture.context_of(here, uneven()), tmp_path)
    gains, extra = {"0": 0.3, "3": 0.2, "7": 0.1}, {"0": 1.0, "3": 0.1, "7": 0.02}
    layers = floated(search, monkeypatch, gains, extra, limit_ms)
    assert in_float(search) == wanted
    assert [(x.layer, x.gain_nats) for x in layers] == [("0", 0.3), ("3", 0.2), ("7", 0.1)]
    assert [x.extra_ms for x in layers] == pytest.approx([1.0, 0.1, 0.02])


def test_a_layer_over_the_limit_does_not_keep_a_cheaper_one_out(here, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "ALLOWED_DROP", -1.0)
    search = search_of(int8_fixture.context_of(here, uneven()), tmp_path)
    floated(search, monkeypatch, {"0": 0.9, "3": 0.01}, {"0": 0.5, "3": 0.1}, 1.2)
    assert in_float(search) == [("3",)]


def test_a_layer_that_brings_nothing_is_neither_timed_nor_tried(here, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "ALLOWED_DROP", -1.0)
    search = search_of(int8_fixture.context_of(here, uneven()), tmp_path)
    layers = floated(search, monkeypatch, {"0": -0.1, "3": 0.2, "7": 0.0}, {})
    assert in_float(search) == [("3",)]
    assert {x.layer: x.extra_ms for x in layers} == {"3": 0.0, "7": None, "0": None}


def test_no_more_layers_go_to_float_than_are_needed(here, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "ALLOWED_DROP", 1.0)
    search = search_of(int8_fixture.context_of(here, uneven()), tmp_path)
    floated(search, monkeypatch, dict.fromkeys(LAYERS, 0.1), {})
    assert in_float(search) == [("0",)]


# Training with rounding


def trained_to(monkeypatch, change):
    """Training that leaves the net as it is, but for ``change`` of the weights of its last layer."""

    def recover(student, *arguments, **settings):
        with torch.no_grad():
            change(student[7].layer.weight)
        return SimpleNamespace(model=student, best_epoch=1, epochs_run=1.0)

    monkeypatch.setattr(int8, "recover", recover)


def test_training_is_kept_where_it_is_better(here, tmp_path, monkeypatch, free):
    trained_to(monkeypatch, lambda weight: weight[:, 0].zero_())  # the huge weights say nothing
    context = int8_fixture.context_of(here, spoiled())
    found = best(context, tmp_path, limit_ms=0.5)  # no room for layers in float
    assert found.report.chosen == TRAINED
    assert found.report.drop() < found.report.drop("own ranges") - 0.1
    assert found.report.tries[-1].note == "epoch 1 of 1"
    assert not found.model[7].weight[:, 0].any()
    assert (context.model[7].weight[:, 0] == 1e5).all()  # what came in is as it was
    assert found.report.float_layers == ()


def test_training_is_not_kept_where_it_is_worse(here, tmp_path, monkeypatch, free):
    trained_to(monkeypatch, lambda weight: weight.zero_())
    found = best(int8_fixture.context_of(here, uneven(), effort="thorough"), tmp_path)
    assert names(found)[-1] == TRAINED
    assert found.report.chosen != TRAINED
    assert found.report.drop() < found.report.drop(TRAINED)
    assert found.model[7].weight.any()


def test_training_that_fails_is_left_out_and_said(here, tmp_path, monkeypatch, free):
    def recover(*arguments, **settings):
        raise RuntimeError("no memory\nmore")

    monkeypatch.setattr(int8, "recover", recover)
    context = int8_fixture.context_of(here, uneven(), effort="thorough")
    assert TRAINED not in names(best(context, tmp_path))
    assert context.progress.lines[-1].strip() == "training with rounding left out: no memory"


def test_real_training_never_makes_the_file_worse(here, tmp_path):
    context = int8_fixture.context_of(here, uneven())
    search = search_of(context, tmp_path)
    before = search.best.rank
    int8._try_training(search, context.model)
    assert [c.tried.name for c in search.found] == ["own ranges", TRAINED]
    assert search.found[1].tried.note.startswith("epoch ")
    assert search.best.rank >= before
    x = torch.from_numpy(samples(8, seed=9))
    assert torch.isfinite(search.found[1].model(x)).all()
