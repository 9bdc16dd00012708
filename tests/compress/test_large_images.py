"""Large images pass a few at a time wherever samples have nothing to do with each other, so that memory does not grow with their number."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import int8_fixture
import numpy as np
import torch
from torch import nn

from edgeprune import formats
from edgeprune.compress.groups.masked import InputRange, record_inputs
from edgeprune.compress.int8.equalise import correct_biases
from edgeprune.pipeline.context import INFER_CHUNK, INFER_NUMBERS, Context
from edgeprune.records.workload import Preprocess
from edgeprune.workload import batches
from edgeprune.workload.answers import logits
from edgeprune.workload.dataset import Split, model_input


def test_images_are_prepared_without_a_second_copy_of_all_of_them():
    raw = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), dtype=np.uint8)
    preprocess = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    tracemalloc.start()
    found = model_input(raw, preprocess)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * found.nbytes
    expected = (raw.astype(np.float32) / 255 - np.float32([0.4, 0.5, 0.6])) / np.float32(
        [0.2, 0.3, 0.4]
    )
    assert np.array_equal(found, expected.transpose(0, 3, 1, 2))


class Watched(nn.Module):
    """A small classifier that knows the largest batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 4, 16, 16), nn.Linear(4, 5)
        self.largest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, x.numel())
        return self.head(self.stem(x).mean((2, 3)))


def test_large_images_pass_a_few_at_a_time_and_say_the_same(monkeypatch):
    net, x = Watched().eval(), torch.randn(40, 3, 224, 224)
    together = InputRange()
    together.add(net.stem(x).detach().mean((2, 3)), -1)
    with torch.no_grad():
        expected = net(x)
    net.largest = 0
    assert torch.allclose(logits(net, x), expected, atol=1e-6)
    ranges = {"stem": InputRange(), "head": InputRange()}
    record_inputs(net, x, ranges)
    assert net.largest <= batches.MAX_PASS_NUMBERS
    assert torch.allclose(ranges["head"].high, together.high, atol=1e-6)
    assert torch.equal(ranges["stem"].low, x.amin((0, 2, 3)))


def test_biases_are_corrected_the_same_in_parts(monkeypatch):
    net, x = int8_fixture.uneven(), torch.from_numpy(int8_fixture.samples(30))
    whole, _ = correct_biases(net, x)
    monkeypatch.setattr(batches, "MAX_PASS_NUMBERS", 7 * x[0].numel())
    parts, note = correct_biases(net, x)
    assert note == "the biases of 3 layers corrected"
    for name, value in parts.state_dict().items():
        assert torch.allclose(value, whole.state_dict()[name], rtol=1e-4, atol=1e-5), name


def test_a_board_gets_large_inputs_in_parts(tmp_path):
    asked: list[tuple[int, ...]] = []

    def infer(key: str, x: np.ndarray) -> np.ndarray:
        asked.append(x.shape)
        return x[:, 0, 0, :2]

    board = SimpleNamespace(load=lambda *_, **__: None, unload=lambda _: None, infer=infer)
    form = formats.load("tflite")
    runtime = SimpleNamespace(name="litert", threads=1)
    context = Context(None, form, form, board, board, board, None)  # type: ignore[arg-type]
    context.runtime_on = lambda _: runtime  # type: ignore[method-assign,assignment,return-value]
    (tmp_path / "a.tflite").write_bytes(b"x")
    for side, most in ((224, INFER_NUMBERS // (3 * 224 * 224)), (4, INFER_CHUNK)):
        asked.clear()
        x = np.random.default_rng(0).random((most + 3, 3, side, side), np.float32)
        found = context.run_file(board, tmp_path / "a.tflite", x)  # type: ignore[arg-type]
        assert asked == [(n, side, side, 3) for n in (most, 3)]
        assert np.array_equal(found.numpy(), x[:, :2, 0, 0])


def test_the_dense_answers_are_worked_out_without_all_images_in_memory():
    raw = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    split, net = Split(raw, None), Watched().eval()
    loaded = SimpleNamespace(
        model=net,
        dataset=SimpleNamespace(development=split),
        preprocess=Preprocess(),
        dead_channels={},
    )
    form = formats.load("onnx")
    context = Context(SimpleNamespace(loaded=loaded), form, form, None, None, None, None)  # type: ignore[arg-type]
    found = context.reference
    assert "development" not in vars(context)
    assert torch.allclose(found, logits(net, context.development), atol=1e-6)
