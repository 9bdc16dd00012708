"""What a net that answers with probabilities is compared, scored and healed on: the logits of its twin without softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.bundle.golden import default_tolerance
from edgeprune.compress.evaluate import kl_nats
from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.compress.heal.recover import recover
from edgeprune.compress.scores import importance
from edgeprune.compress.structure_loss import AfterRepair
from edgeprune.formats.coreml.convert import Dressed, Entry
from edgeprune.progress import Silent
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.workload import Augment, Preprocess, Recovery
from edgeprune.workload.answers import answers, logits
from edgeprune.workload.load import from_objects
from edgeprune.workload.outputs import as_logits, file_logits, mark, seen

ROWS = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)


def body(*last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), *last).eval()


def test_only_rows_of_nothing_below_0_that_sum_to_1_are_probabilities() -> None:
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 4
    assert seen(z.softmax(1)) == seen(z.softmax(1).half().float()) == "probabilities"
    for other in (z, z.sigmoid(), z.log_softmax(1), z.relu(), z / z.sum(1, keepdim=True)):
        assert seen(other) == "logits"


def twins(scale: float = 1.0) -> tuple[nn.Module, nn.Module]:
    """The same weights without and with softmax, as intake leaves them."""
    plain, soft = body(), body(nn.Softmax(1))
    with torch.no_grad():
        for net in (plain, soft):
            net[2].weight.mul_(scale)  # type: ignore[index,operator]
    mark(soft, seen(answers(soft, torch.from_numpy(ROWS))))
    return plain, soft


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logits_of_a_softmax_net_say_what_those_of_its_twin_say(scale) -> None:
    plain, soft = twins(scale)
    x = torch.from_numpy(ROWS)
    wanted, found = logits(plain, x).log_softmax(1), logits(soft, x)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(answers(soft, x).sum(1), torch.ones(48))


def test_a_probability_of_0_is_a_finite_logit_with_finite_gradients() -> None:
    _, soft = twins()
    z = torch.tensor([[200.0, 0.0, -90.0, 80.0]], requires_grad=True)
    found = as_logits(z.softmax(1), soft)
    nn.functional.kl_div(
        found.log_softmax(1), torch.full((1, 4), 0.25).log(), log_target=True, reduction="sum"
    ).backward()
    assert found.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_zeros_of_an_int8_file_weigh_less_than_what_it_answered() -> None:
    draw = torch.Generator().manual_seed(0)
    plain, soft = twins()
    p = (torch.randn(64, 1000, generator=draw) * 3).softmax(1)
    rounded = (p * 256).round() / 256
    assert float((rounded == 0).float().mean()) > 0.9
    fine = kl_nats(file_logits(p, soft), file_logits(rounded, soft))
    wrong = kl_nats(file_logits(p, soft), file_logits(rounded.roll(1, 1), soft))
    assert 0 <= fine < 1 < wrong
    assert torch.equal(file_logits(p, plain), p)


@pytest.mark.parametrize("name", ["fisher", "taylor", "hessian"])
def test_channels_of_a_softmax_net_score_as_those_of_its_twin(name) -> None:
    x = torch.from_numpy(ROWS)
    found = []
    for net in twins():
        groups, _ = find_groups(net, x[:1])
        found.append(importance.BY_NAME[name](net, groups, x, 0))
    assert all(np.abs(s).max() > 0 for s in found[0].values())
    for group, scores in found[0].items():
        assert np.allclose(found[1][group], scores, rtol=1e-2, atol=1e-5)


def test_a_structure_of_a_softmax_net_costs_what_that_of_its_twin_costs() -> None:
    x = torch.from_numpy(ROWS)
    costs = []
    for net in twins(3.0):
        groups, _ = find_groups(net, x[:1])
        costs.append(AfterRepair(net, groups, x)({groups[0].name: range(4)}))
    assert costs[0] > 0.01
    assert costs[1] == pytest.approx(costs[0], rel=1e-3)


def test_a_softmax_net_heals_to_the_weights_that_its_twin_heals_to() -> None:
    rows = np.random.default_rng(1).standard_normal((320, 6)).astype(np.float32)
    example, healed = torch.from_numpy(ROWS[:1]), []
    for net in twins(3.0):
        found = from_objects(net, rows, preprocess=Preprocess(kind="none"), task="classify")
        groups, _ = find_groups(found.model, example)
        gone = {groups[0].name: range(12)}
        small = remove_channels(found.model, {g.name: g for g in groups}, gone, example)
        settings = Recovery(epochs=2, batch_size=16, augment=Augment(shift_pixels=0))
        result = recover(
            small,
            found.model,
            found.dataset.train,
            found.dataset.selection,
            settings,
            preprocess=found.preprocess,
            seed=0,
            progress=Silent(),
        )
        healed.append((result, small))
    (first, before), (second, _) = healed
    assert [r.selection_quality for r in first.history] == [
        r.selection_quality for r in second.history
    ]
    assert not torch.allclose(first.model[0].weight, before[0].weight)  # type: ignore[index]
    for key, value in first.model.state_dict().items():
        assert torch.allclose(second.model.state_dict()[key], value, atol=1e-3)


def artifact(precision: str) -> Artifact:
    tensor = TensorSpec(name="t", shape=(1, 4), dtype="float32")
    return Artifact.model_validate(
        {
            "path": "m", "format": "onnx", "precision": precision, "size_bytes": 1,
            "sha256": "0" * 64, "inputs": (tensor,), "outputs": (tensor,), "op_counts": {},
        }
    )  # fmt: skip


def test_the_tolerance_of_small_probabilities_is_small_and_of_int8_a_softmax_step() -> None:
    small = np.full((8, 4), 0.25, np.float32)
    small[:, 0] = 0.26
    kind = {"answers": "probabilities"}
    assert default_tolerance(artifact("fp32"), small, **kind).atol == pytest.approx(0.26e-4)
    assert default_tolerance(artifact("fp32"), small).atol == pytest.approx(0.26e-4)
    assert default_tolerance(artifact("fp16"), small, **kind).atol == pytest.approx(0.013)
    assert default_tolerance(artifact("int8"), small, **kind).atol == pytest.approx(3 / 256)


def test_a_core_ml_file_does_not_take_the_softmax_of_probabilities() -> None:
    plain, soft = twins(3.0)
    x = torch.from_numpy(ROWS)
    wanted = plain(x).softmax(1)
    assert torch.allclose(Dressed(plain, Entry(), True)(x)[1], wanted, atol=1e-6)
    own, table = Dressed(soft, Entry(), True)(x)
    assert torch.allclose(own, wanted, atol=1e-6)
    assert torch.allclose(table, wanted, atol=1e-6)
