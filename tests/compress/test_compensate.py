"""Repair without training: fresh batch-norm statistics, and least squares on what a pruned layer sees."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from repair_fixture import KEPT, KEPT_OUTPUTS, dense_net, samples, without_channels
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compress import evaluate
from edgeprune.compress.evaluate import kl_nats, quality
from edgeprune.compress.readings import as_positions, reading_of
from edgeprune.compress.repair import compensate as module
from edgeprune.compress.repair import relay
from edgeprune.compress.repair.compensate import compensate
from edgeprune.compress.repair.least_squares import LayerFit, RowSums, refit
from edgeprune.compress.repair.norm_statistics import HeldOut, best, judged, recalibrate_batchnorm
from edgeprune.errors import ModelError
from edgeprune.progress import Silent
from edgeprune.workload.answers import device_of, logits


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.9))
    net.train()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(10, 3)
    whole = recalibrate_batchnorm(net, x)
    seen = net[0](x).detach()
    torch.testing.assert_close(whole[1].running_mean, seen.mean(0))
    torch.testing.assert_close(whole[1].running_var, seen.var(0, correction=1))
    halves = recalibrate_batchnorm(net, x, batch_size=5)
    mean = (seen[:5].mean(0) + seen[5:].mean(0)) / 2
    var = (seen[:5].var(0, correction=1) + seen[5:].var(0, correction=1)) / 2
    torch.testing.assert_close(halves[1].running_mean, mean)
    torch.testing.assert_close(halves[1].running_var, var)
    assert whole[1].momentum == 0.3
    assert not any(part.training for part in whole.modules())
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_last_batch_is_never_a_single_sample() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 4, 8):
        assert recalibrate_batchnorm(net, x, batch_size=size)[1].running_var.isfinite().all()
    with pytest.raises(ModelError, match="at least 2"):
        recalibrate_batchnorm(net, x[:1])


def test_a_net_without_batchnorm_comes_back_as_a_copy() -> None:
    net = nn.Linear(2, 2)
    found = recalibrate_batchnorm(net, torch.zeros(1, 2))
    assert found is not net
    assert torch.equal(found.weight, net.weight)
    assert found.weight.data_ptr() != net.weight.data_ptr()


def test_compensation_brings_a_pruned_net_closer_to_the_dense_one() -> None:
    dense = dense_net()
    pruned = without_channels(dense, KEPT)
    kept_states = [copy.deepcopy(net.state_dict()) for net in (dense, pruned)]
    found, report = compensate(pruned, dense, KEPT_OUTPUTS, samples(200), progress=Silent())
    assert report.used
    assert report.kl_compensated < 0.7 * report.kl_recalibrated
    assert [fit.name for fit in report.fitted] == ["mix"]
    assert report.fitted[0].error_after < report.fitted[0].error_before
    fresh = samples(300, seed=9)
    reference = logits(dense, fresh)
    recalibrated = recalibrate_batchnorm(pruned, samples(200))
    after, before = (kl_nats(reference, logits(net, fresh)) for net in (found, recalibrated))
    assert after < before
    for net, state in zip((dense, pruned), kept_states, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
        assert not net.training


def test_statistics_of_few_samples_are_not_taken_where_the_dense_ones_are_better() -> None:
    dense, other = (
        dense_net(),
        samples(60, seed=3) * torch.linspace(0.2, 3, 60)[:, None, None, None],
    )
    held_out = HeldOut(samples(200, seed=4), logits(dense, samples(200, seed=4)))
    pruned = without_channels(dense, KEPT)
    found = judged(pruned, other, held_out)
    assert [one.statistics for one in found] == ["kept", "mixed", "fresh"]
    assert [one.nats for one in found] == [pytest.approx(held_out.nats(m.model)) for m in found]
    assert best(found).statistics == "kept"
    assert best(found).model is pruned
    fresh, mixed = (found[i].model.norm1.running_var for i in (2, 1))
    torch.testing.assert_close(fresh, recalibrate_batchnorm(pruned, other).norm1.running_var)
    torch.testing.assert_close(mixed, (fresh + pruned.norm1.running_var) / 2)
    shifted = samples(200, seed=4) * 3  # what the dense statistics do not know
    held_out = HeldOut(shifted, logits(recalibrate_batchnorm(dense, shifted), shifted))
    assert best(judged(pruned, shifted, held_out)).statistics == "fresh"
    assert [
        one.statistics
        for one in judged(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), other, held_out)
    ] == ["kept"]


def test_the_dense_net_loses_nothing_to_a_repair_from_few_samples() -> None:
    dense = dense_net()
    found, report = compensate(dense, dense, {}, samples(20, seed=5), progress=Silent())
    assert report.kl_pruned == report.kl_recalibrated == 0
    assert report.statistics == "kept"
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in dense.state_dict().items())


def test_a_repaired_layer_gives_the_mean_of_the_dense_one_under_the_statistics_it_had() -> None:
    dense, x = dense_net(), samples(200)
    held_out = HeldOut(samples(100, seed=9), logits(dense, samples(100, seed=9)))
    found = module.repaired(without_channels(dense, KEPT), dense, KEPT_OUTPUTS, x, held_out)
    assert found.nats == min(
        one.nats for one in judged(found.model, x, held_out) if one.statistics == "kept"
    )
    seen: dict[str, list[Tensor]] = {"dense": [], "found": []}
    solved = module._solved(
        without_channels(dense, KEPT), dense, KEPT_OUTPUTS, x, 2304, 64, (1e-2,), Silent()
    )[0]
    assert solved is not None
    for name, net in (("dense", dense), ("found", solved)):
        evaluate.run_once(
            net, x, [net.norm2.register_forward_hook(lambda *a, n=name: seen[n].append(a[2]))]
        )
    means = [torch.cat(parts).mean((0, 2, 3)) for parts in seen.values()]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0.05)
    assert torch.equal(solved.norm1.running_mean, dense.norm1.running_mean[list(KEPT)])
    assert not any(m.training for m in found.model.modules())


def test_a_pass_ends_behind_the_last_layer_that_is_watched_and_leaves_no_hook() -> None:
    net, ran = dense_net(), []
    handles = [
        getattr(net, name).register_forward_hook(lambda *_, n=name: ran.append(n))
        for name in ("stem", "mix", "classifier")
    ]
    evaluate.run_once(net, samples(200), handles, last="mix")
    assert ran == ["stem", "mix"] * 2  # batches of 128
    logits(net, samples(4))
    assert len(ran) == 4


def test_channels_that_others_repeat_cost_nothing_after_compensation() -> None:
    dense = dense_net()
    # Each removed channel says what a kept one says, twice as loud.
    twins = {1: 0, 4: 3, 8: 7, 10: 11}
    with torch.no_grad():
        for gone, twin in twins.items():
            for layer in (dense.stem, dense.norm1, dense.depthwise):
                for tensor in layer.state_dict().values():
                    if tensor.ndim:
                        tensor[gone] = tensor[twin]
            dense.norm1.weight[gone] *= 2
            dense.norm1.bias[gone] *= 2
            dense.depthwise.bias[gone] *= 2
    dense = recalibrate_batchnorm(dense, samples(400))
    pruned = without_channels(dense, KEPT)
    found, report = compensate(
        pruned, dense, KEPT_OUTPUTS, samples(400), progress=Silent(), ridges=(1e-6,)
    )
    assert report.kl_recalibrated > 1e-2
    assert report.kl_compensated < 1e-3
    assert report.fitted[0].error_before > 0.05
    assert report.fitted[0].error_after < 1e-4
    wanted = dense.mix.weight[:, list(KEPT)].detach().clone()
    for gone, twin in twins.items():
        wanted[:, KEPT.index(twin)] += 2 * dense.mix.weight[:, gone]
    torch.testing.assert_close(found.mix.weight, wanted, rtol=0, atol=0.02)


def test_a_net_that_lost_nothing_is_left_alone() -> None:
    dense = dense_net()
    found, report = compensate(dense, dense, {}, samples(50), progress=Silent())
    assert not report.fitted
    assert not report.skipped
    assert not report.used
    assert "no layer" in report.note
    assert torch.equal(found.mix.weight, dense.mix.weight)


def test_a_repair_that_does_not_help_is_not_kept() -> None:
    dense = dense_net()
    pruned = without_channels(dense, KEPT)
    x = samples(200)
    x[:160] = 0.01 * x[:160] + 5  # what is fitted says nothing about what is held out
    found, report = compensate(pruned, dense, KEPT_OUTPUTS, x, progress=Silent(), ridges=(1e-4,))
    assert not report.used
    assert report.kl_compensated >= report.kl_recalibrated
    assert "not kept" in report.note
    assert torch.equal(found.mix.weight, pruned.mix.weight)


def test_layers_that_cannot_be_refitted_are_skipped_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(6, width)
            self.twice = nn.Linear(width, width)
            self.grouped = nn.Conv2d(width, 8, 1, groups=2)
            self.wide = nn.Linear(width, 8)
            self.unused = nn.Linear(width, 8)
            self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(width, 4))
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
            mixed = self.grouped(x[..., None, None]).flatten(1)
            return self.last(mixed + self.wide(x)) + self.computed(x)[:, :3]

    torch.manual_seed(0)
    dense, pruned = Odd(8), Odd(6)
    kept = {"first": tuple(range(6)), "twice": tuple(range(6))}
    _, report = compensate(pruned, dense, kept, torch.randn(60, 6), progress=Silent(), max_inputs=3)
    assert dict(report.skipped) == {
        "twice": "it does not run exactly once on one tensor of all samples",
        "grouped": "grouped convolution",
        "wide": "6 input taps are over the limit of 3",
        "unused": "it does not run exactly once on one tensor of all samples",
        "computed": "its weight is computed by a parametrisation",
    }
    assert not report.fitted
    _, report = compensate(pruned, dense, kept, torch.randn(10, 6), progress=Silent())
    assert dict(report.skipped)["wide"] == "8 rows are too few for 6 input taps"


def test_linear_layers_over_tokens_are_fitted_with_their_bias() -> None:
    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up = nn.Linear(6, width)
            self.down = nn.Linear(width, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))

    torch.manual_seed(0)
    dense, pruned = Tokens(16), Tokens(10)
    with torch.no_grad():
        dense.head.weight.mul_(10)
        # Removed neurons leave a mean behind, which only the bias can replace.
        dense.up.bias.add_(2)
    kept = tuple(range(10))
    state = dense.state_dict()
    state["up.weight"], state["up.bias"] = state["up.weight"][:10], state["up.bias"][:10]
    state["down.weight"] = state["down.weight"][:, :10]
    pruned.load_state_dict(state)
    x = torch.randn(200, 7, 6, generator=torch.Generator().manual_seed(0))
    found, report = compensate(pruned, dense, {"up": kept}, x, progress=Silent())
    assert report.used
    assert [fit.name for fit in report.fitted] == ["down"]
    assert report.fitted[0].rows == 160 * 7
    assert report.kl_compensated < 0.2 * report.kl_recalibrated
    assert not torch.equal(found.down.bias, pruned.down.bias)


def sums(x: Tensor, y: Tensor, *, centred: bool = True, batches: int = 3) -> RowSums:
    found = RowSums(centred)
    for a, b in zip(x.tensor_split(batches), y.tensor_split(batches), strict=True):
        found.add(a, b)
    return found


def test_a_strong_pull_leaves_the_weights_where_they_are() -> None:
    dense = dense_net()
    pruned = without_channels(dense, KEPT)
    x, y = torch.randn(400, 72), torch.randn(400, 16)
    layer = copy.deepcopy(pruned.mix)
    assert isinstance(refit("mix", layer, sums(x, y), ridge=1e9), LayerFit)
    torch.testing.assert_close(layer.weight, pruned.mix.weight, rtol=0, atol=1e-5)


def test_the_solution_is_that_of_the_stacked_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, 3)
    x, y = (torch.randn(90, n, generator=generator) for n in (5, 3))
    now = layer.weight.detach().double().T
    deviations = (x - x.mean(0)).double()
    pull = 0.1 * float(deviations.square().sum(0).mean())
    rows = torch.cat([deviations, math.sqrt(pull) * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([(y - y.mean(0)).double(), math.sqrt(pull) * now])
    expected = torch.linalg.lstsq(rows, wanted).solution
    found = refit("layer", layer, sums(x, y), ridge=0.1)
    assert isinstance(found, LayerFit)
    torch.testing.assert_close(layer.weight.T.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x).mean(0), y.mean(0), rtol=0, atol=1e-5)
    missed = (deviations @ expected - (y - y.mean(0))).square().sum() / (
        y - y.mean(0)
    ).square().sum()
    assert found.error_after == pytest.approx(float(missed), rel=1e-3)
    silent = refit("layer", layer, sums(torch.zeros(90, 5), y), ridge=0.1)
    assert silent == "its inputs or the dense outputs do not vary"


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
        {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": 5, "padding": "valid"},
        {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_sampled_rows_times_the_weight_are_the_convolution(options: dict) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, bias=False, **options)
    x = torch.randn(2, 3, 7, 8)
    output = as_positions(layer, layer(x)).detach()
    where = torch.randint(output.shape[1], (2, 9), generator=torch.Generator().manual_seed(0))
    reading = reading_of(layer, x.shape[1:])
    assert reading is not None
    rows = reading.rows(x, where)
    expected = torch.stack([output[n, where[n]] for n in range(2)]).flatten(0, 1)
    torch.testing.assert_close(rows @ layer.weight.detach().flatten(1).T, expected)


@pytest.mark.parametrize("centred", [True, False])
def test_sums_do_not_depend_on_the_batches_nor_on_a_large_mean(centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, n, generator=generator) + 1000 * centred for n in (5, 3))
    whole, parts = (sums(x, y, centred=centred, batches=n) for n in (1, 7))
    x, y = x.double(), y.double()
    x, y = (x - x.mean(0), y - y.mean(0)) if centred else (x, y)
    for found in (whole.equations(0.1), parts.equations(0.1)):
        assert found is not None
        torch.testing.assert_close(found.gram, x.T @ x, rtol=0, atol=1e-2)
        torch.testing.assert_close(found.cross, x.T @ y, rtol=0, atol=1e-2)
        assert found.energy == pytest.approx(float(y.square().sum()), rel=1e-4)


def test_a_bound_on_memory_reduces_the_positions_and_never_the_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = dense_net()
    pruned = without_channels(dense, KEPT)
    whole = compensate(pruned, dense, KEPT_OUTPUTS, samples(500), progress=Silent())[1]
    assert (whole.n_samples, whole.fitted[0].rows) == (400, 4400)
    monkeypatch.setattr(relay, "MAX_BATCH_BYTES", 4 * 12 * 64 * 10)
    streamed = compensate(pruned, dense, KEPT_OUTPUTS, samples(500), progress=Silent())[1]
    assert streamed.fitted[0].rows == 4400
    assert streamed.kl_compensated == pytest.approx(whole.kl_compensated, rel=1e-4)
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", 4 * 400 * 3 * 16)
    fewer_rows = compensate(pruned, dense, KEPT_OUTPUTS, samples(500), progress=Silent())[1]
    assert (fewer_rows.n_samples, fewer_rows.fitted[0].rows) == (400, 1200)


def test_kept_channels_must_fit_the_layers() -> None:
    dense = dense_net()
    pruned = without_channels(dense, KEPT)
    wrong = {**KEPT_OUTPUTS, "mix": (0, 1)}
    with pytest.raises(ModelError, match="'mix' must name 16 of 16"):
        compensate(pruned, dense, wrong, samples(40), progress=Silent())
    with pytest.raises(ModelError, match="at least 10"):
        compensate(pruned, dense, KEPT_OUTPUTS, samples(9), progress=Silent())


def test_the_same_inputs_give_the_same_repair() -> None:
    dense = dense_net()
    pruned = without_channels(dense, KEPT)
    found = [
        compensate(pruned, dense, KEPT_OUTPUTS, samples(100), progress=Silent())[0]
        for _ in range(2)
    ]
    states = [net.state_dict() for net in found]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_quality_is_accuracy_with_labels_and_agreement_without() -> None:
    found = np.array([[2.0, 1.0], [0.0, 3.0], [np.nan, 0.0], [1.0, 0.0]])
    reference = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert quality(found, np.array([0, 1, 0, 1]), reference) == ("accuracy", 0.5)
    assert quality(found, None, reference) == ("agreement", 0.5)  # a row of NaN never counts


def test_the_divergence_is_that_of_the_formula() -> None:
    reference, found = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    assert kl_nats(reference, reference) == 0
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_nats(reference, found) == pytest.approx(expected)
    assert kl_nats(reference + 5, found - 2) == pytest.approx(expected)


def test_logits_do_not_depend_on_the_batches_and_restore_every_mode() -> None:
    net = dense_net().train()
    net.norm1.eval()
    x = samples(7)
    whole = logits(net, x)
    assert whole.shape == (7, 5)
    torch.testing.assert_close(logits(net, x, batch_size=2), whole)
    assert net.training
    assert not net.norm1.training
    (whole.requires_grad_() ** 2).sum().backward()  # not an inference tensor: usable as a target
    with pytest.raises(ModelError, match="at least one sample"):
        logits(net, x[:0])
    with pytest.raises(ModelError, match=r"returned \[7, 3, 8, 8\]"):
        logits(nn.Identity(), x)
    with pytest.raises(ModelError, match="returned tuple"):
        logits(nn.LSTM(3, 3), torch.zeros(2, 2, 3))
    assert device_of(nn.Identity()).type == "cpu"
