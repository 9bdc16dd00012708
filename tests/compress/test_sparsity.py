"""2:4 sparsity: the pattern, who can have it, what it costs, and that no update of the weights breaks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from healing_fixture import PREPROCESS, SETTINGS, Stopper, damaged, splits, teacher
from pattern import without_pattern
from sparsity_fixture import groups_of_four, stored_weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from edgeprune import formats
from edgeprune.compress.evaluate import kl_nats
from edgeprune.compress.heal import two_of_four
from edgeprune.compress.heal.recover import recover
from edgeprune.compress.heal.sparsify import masked_by_magnitude, sparsified
from edgeprune.compress.heal.two_of_four import eligible, has_pattern, mask_of
from edgeprune.compress.int8.faint_channels import rescue_silent
from edgeprune.compress.int8.fakequant import fake_quantised, plain
from edgeprune.errors import ModelError
from edgeprune.formats.onnx.sparsity import sparse_layers
from edgeprune.pipeline import api
from edgeprune.pipeline.options import Options
from edgeprune.progress import Silent
from edgeprune.records.workload import Preprocess, Recovery, Workload
from edgeprune.workload.answers import logits
from edgeprune.workload.load import from_objects

SPARSE = SETTINGS.model_copy(update={"sparsity": "2:4"})
SHAPES = [(3, 4), (5, 12), (2, 8, 3, 3), (1, 4, 1, 1), (6, 16, 1, 5)]


class Wide(nn.Module):
    """Layers of every kind, for ``[N, 1, 8, 8]``; those without a name in ``ELIGIBLE`` cannot have the pattern."""

    ELIGIBLE = ("conv", "down", "classifier")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)  # one input channel
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 12, 1, stride=2)
        self.classifier = nn.Linear(12 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.conv(self.depthwise(x))))
        return self.classifier(torch.relu(self.down(x)).flatten(1))


def wide(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Wide().eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_larger_two_of_every_four_input_channels_stay(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    for _ in range(20):
        weight = torch.randn(shape, generator=generator)
        mask = mask_of(weight)
        assert mask.shape == weight.shape
        for values, kept in zip(groups_of_four(weight), groups_of_four(mask), strict=True):
            assert int(kept.sum()) == 2
            assert values[kept].abs().min() >= values[~kept].abs().max()
        masked = weight * mask
        assert has_pattern(masked)
        assert not has_pattern(weight)
        assert torch.equal(masked, masked * mask_of(masked))  # twice is as good as once


def test_of_equal_weights_the_earlier_channels_stay() -> None:
    assert mask_of(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]
    assert mask_of(torch.tensor([[1.0, -2.0, 2.0, -1.0]])).tolist() == [[False, True, True, False]]
    assert mask_of(torch.tensor([[0.0, 3.0, -3.0, 3.0]])).tolist() == [[False, True, True, False]]
    assert mask_of(torch.zeros(1, 4)).tolist() == [[True, True, False, False]]
    assert mask_of(torch.tensor([[np.nan, 1.0, 2.0, np.nan]])).tolist() == [[False, True, True, False]]  # fmt: skip


def test_a_mask_does_not_depend_on_the_memory_format() -> None:
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mask_of(weight), mask_of(last))


@pytest.mark.parametrize("shape", [(4, 3), (2, 6, 3, 3), (4,)])
def test_input_channels_that_are_no_multiple_of_four_have_no_mask(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        mask_of(torch.ones(shape))
    assert not has_pattern(torch.zeros(shape))


def test_only_layers_that_the_rule_is_for_are_eligible() -> None:
    model = wide()
    assert tuple(eligible(model)) == Wide.ELIGIBLE
    reasons = {name: two_of_four.reason_to_skip(layer) for name, layer in model.named_children()}
    assert "no multiple of 4" in reasons["stem"]
    assert reasons["depthwise"] == "grouped convolution"
    assert "BatchNorm2d" in reasons["norm"]

    class Standardised(nn.Conv2d):
        """Its zeros are gone in the weights that it computes with."""

    assert "subclass" in two_of_four.reason_to_skip(Standardised(8, 8, 3))
    bound = parametrizations.weight_norm(nn.Linear(8, 8))
    assert "parametrisation" in two_of_four.reason_to_skip(bound)
    with pytest.raises(ModelError, match="the model has none"):
        two_of_four.require_eligible(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(6, 2))
        )


def test_a_model_without_such_a_layer_is_refused_before_any_work() -> None:
    rows = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    loaded = from_objects(
        nn.Linear(6, 2),
        {split: (rows, np.arange(40) % 2) for split in ("train", "validation")},
        settings=Workload(
            model="net.py:build",
            data="data.npz",
            preprocess=Preprocess(kind="none"),
            recovery=Recovery(sparsity="2:4"),
        ),
    )
    with pytest.raises(ModelError, match="the model has none"):
        api.resolve(loaded, Options(target="jetson-orin-nano"))


def test_masking_gives_the_pattern_to_a_copy() -> None:
    model = wide()
    assert without_pattern(model.state_dict(), Wide.ELIGIBLE) == Wide.ELIGIBLE
    masked = masked_by_magnitude(model)
    state = masked.state_dict()
    assert without_pattern(state, Wide.ELIGIBLE) == ()
    state["down.weight"][3, 4:7] = 0.5
    assert without_pattern(state, Wide.ELIGIBLE) == ("down",)
    assert not has_pattern(model.get_submodule("down").weight)  # the given model is as it was


def test_fitting_what_stays_again_costs_less_than_masking_alone() -> None:
    model = wide()
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    sparse, found = sparsified(model, x, progress=Silent())
    assert without_pattern(sparse.state_dict(), Wide.ELIGIBLE) == ()
    assert found.layers == Wide.ELIGIBLE
    assert found.refitted
    assert found.kl_refitted < 0.5 * found.kl_masked
    fresh = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    reference = logits(model, fresh)
    plainly = masked_by_magnitude(model)
    assert kl_nats(reference, logits(sparse, fresh)) < kl_nats(reference, logits(plainly, fresh))
    again, _ = sparsified(model, x, progress=Silent())
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), again.parameters(), strict=True))  # fmt: skip


def test_what_stays_solves_its_own_least_squares_problem() -> None:
    """One linear layer against numpy, row by row."""
    torch.manual_seed(4)
    layer = nn.Sequential(nn.Linear(8, 3))
    mixing = torch.randn(8, 8)
    x = torch.randn(600, 8) @ mixing  # inputs that hang together, so that others can stand in
    sparse, found = sparsified(layer, x, progress=Silent())
    assert found.refitted
    fit = x[:480].double().numpy()
    fit = fit - fit.mean(0)
    weight = layer[0].weight.detach().double().numpy()
    pull = 1e-2 * np.diag(fit.T @ fit).mean()
    for row, kept in enumerate(mask_of(layer[0].weight).numpy()):
        gram = fit[:, kept].T @ fit[:, kept] + pull * np.eye(4)
        wanted = np.linalg.solve(gram, fit[:, kept].T @ (fit @ weight[row]) + pull * weight[row][kept])  # fmt: skip
        np.testing.assert_allclose(sparse[0].weight[row].detach()[kept], wanted, rtol=1e-3, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("fresh_zeros", [True, False])
def test_training_and_averaging_keep_the_pattern(fresh_zeros: bool) -> None:
    dense = wide(3)
    train, selection = splits(labelled=False)
    student = damaged(dense)
    if fresh_zeros:
        student = masked_by_magnitude(student)
    healed = recover(
        student, dense, train, selection, SPARSE, preprocess=PREPROCESS, seed=0, progress=Silent()
    )
    assert healed.best_epoch > 0  # it is the moving average of a trained net, not what came in
    state = healed.model.state_dict()
    assert without_pattern(state, Wide.ELIGIBLE) == ()
    for name in Wide.ELIGIBLE:
        assert torch.equal(state[f"{name}.weight"] != 0, mask_of(student.get_submodule(name).weight))  # fmt: skip
    dense_run = recover(
        student, dense, train, selection, SETTINGS, preprocess=PREPROCESS, seed=0, progress=Silent()
    )
    assert without_pattern(dense_run.model.state_dict(), Wide.ELIGIBLE) == Wide.ELIGIBLE


def test_an_interrupted_training_goes_on_to_the_same_sparse_weights(tmp_path) -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    student = masked_by_magnitude(damaged(dense))

    def run(progress, checkpoint):
        return recover(
            student, dense, train, selection, SPARSE,
            preprocess=PREPROCESS, seed=1, progress=progress, checkpoint=checkpoint,
        )  # fmt: skip

    whole = run(Silent(), None).model
    assert run(Stopper(at_step=11), tmp_path / "state").interrupted
    resumed = run(Silent(), tmp_path / "state").model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))  # fmt: skip
    assert has_pattern(resumed.get_submodule("classifier").weight)


def test_training_with_rounding_keeps_the_pattern() -> None:
    dense = wide(5)
    train, selection = splits(labelled=False)
    student = masked_by_magnitude(dense)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    rounding = fake_quantised(student, x, frozen_after=4)
    settings = SPARSE.model_copy(update={"epochs": 1.0})
    found = recover(
        rounding,
        dense,
        train,
        selection,
        settings,
        preprocess=PREPROCESS,
        seed=0,
        progress=Silent(),
    )
    assert without_pattern(plain(found.model).state_dict(), Wide.ELIGIBLE) == ()


def test_raising_a_filter_that_is_too_faint_for_int8_keeps_the_pattern() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)
    ).eval()  # fmt: skip
    with torch.no_grad():
        # So that the first input channel is not among those that stay.
        model[0].weight[:, :2] *= 0.1
        model[0].weight[2] *= 1e-9
        model[0].bias[2] = 0.0
        model[1].bias[2] = 3.0
    sparse, x = masked_by_magnitude(model), torch.randn(32, 4, 8, 8)
    rescued, notes = rescue_silent(sparse, x)
    assert notes
    assert without_pattern(rescued.state_dict(), ["0", "4"]) == ()
    with torch.no_grad():
        torch.testing.assert_close(rescued(x), sparse(x), rtol=1e-4, atol=1e-4)


def test_the_onnx_files_have_the_pattern_in_the_weights_that_they_store(tmp_path: Path) -> None:
    tensorrt = formats.load("tensorrt")
    assert isinstance(tensorrt, formats.ShowsSparsity)
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    dense = wide()
    sparse, _ = sparsified(dense, x, progress=Silent())
    wanted = {"stem": False, "depthwise": False, "conv": True, "down": True, "classifier": True}
    for name, model in (("dense", dense), ("sparse", sparse)):
        fp32, int8 = tmp_path / f"{name}.fp32.onnx", tmp_path / f"{name}.int8.onnx"
        tensorrt.export(model, x[:1].numpy(), fp32)
        tensorrt.quantize(fp32, x.numpy(), int8, model=model)
        for file in (fp32, int8):
            stated = tensorrt.sparse_layers(file)
            assert stated == (wanted if name == "sparse" else dict.fromkeys(wanted, False))
            for node, weight in stored_weights(file).items():
                layer = node.rpartition("/")[0]
                assert weight.dtype == (np.int8 if file is int8 else np.float32)
                if stated[layer]:
                    zeros = (groups_of_four(torch.from_numpy(weight)) == 0).sum(1)
                    assert int(zeros.min()) >= 2


def test_a_stored_zero_counts_only_where_it_stands_for_zero() -> None:
    """An asymmetric file: its zeros are not at the integer 0."""
    helper = onnx.helper
    steps = np.asarray([[5, 0, 0, 7]], np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["steps", "scale", "zero"], ["weight"]),
        helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1),
    ]
    for zero, expected in ((0, {"y": True}), (3, {})):
        constants = {"steps": steps, "scale": np.float32(0.1), "zero": np.int8(zero)}
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])],
            [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        )
        assert sparse_layers(helper.make_model(graph).SerializeToString()) == expected
