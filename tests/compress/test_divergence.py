"""What a structure really costs before training: after the repair alone, and after a short healing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from healing_fixture import PREPROCESS, SETTINGS, damaged, images, splits, teacher
from torch import nn
from zoo import ZOO, make

from edgeprune.compress.groups.find import find_groups
from edgeprune.compress.heal.recover import updates_per_epoch
from edgeprune.compress.structure_loss import (
    FEWEST_UPDATES,
    TRIAL_UPDATES,
    UNUSABLE_NATS,
    AfterHealing,
    AfterRepair,
    trial_settings,
)
from edgeprune.records.workload import Recovery
from edgeprune.workload.dataset import model_input

NET = "residual"


def repair() -> AfterRepair:
    model, example = make(ZOO[NET])
    with torch.no_grad():
        [*model.modules()][-1].weight.mul_(100)  # random nets answer all alike
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, *example.shape[1:], generator=generator)
    x += 2 * torch.randn(96, len(x[0]), 1, 1, generator=generator)  # images that differ as a whole
    groups, _ = find_groups(model, x[:1])
    return AfterRepair(model, groups, x)


def test_a_structure_from_which_nothing_went_costs_nothing():
    loss = repair()
    assert loss({g.name: range(g.channels) for g in loss.groups}) == pytest.approx(0, abs=1e-6)
    assert loss({}) == pytest.approx(0, abs=1e-6)


def test_the_more_goes_the_more_it_costs_and_the_model_stays_as_it_is():
    loss = repair()
    before = copy.deepcopy(loss.model.state_dict())
    shares = [
        loss({g.name: range(max(1, int(g.channels * share))) for g in loss.groups})
        for share in (0.5, 0.1)
    ]
    assert 0 < shares[0] < shares[1]
    after = loss.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_structure_that_answers_nan_is_never_worth_it():
    loss = repair()
    broken = copy.deepcopy(loss.model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    assert loss.divergence(broken) == UNUSABLE_NATS


class Damaged(AfterRepair):
    """A repair that leaves much to heal."""

    def repaired(self, kept: Mapping[str, Sequence[int]]) -> nn.Module:
        return damaged(self.model)


def test_a_healed_structure_costs_less_than_one_that_was_only_repaired():
    train, selection = splits(labelled=False)
    held = torch.from_numpy(model_input(images(128, 5), PREPROCESS))
    dense = teacher()
    repair = Damaged(dense, find_groups(dense, held[:1])[0], held)
    settings = SETTINGS.model_copy(update={"epochs": 4.0})
    healing = AfterHealing(repair, dense, train, selection, settings, PREPROCESS, 0)
    assert healing({}) < 0.8 * repair.divergence(repair.repaired({}))


@pytest.mark.parametrize(
    ("epochs", "macs", "updates"),
    [
        (3.0, 1_000_000, TRIAL_UPDATES),  # enough of everything
        (0.04, 1_000_000, 0.04 * 421),  # never longer than the healing itself
        (3.0, 10**10, None),  # too large a net to try
        (0.0, 1_000_000, None),  # no healing is wanted
    ],
)
def test_a_trial_is_bounded_by_updates_by_the_whole_healing_and_by_macs(epochs, macs, updates):
    settings = trial_settings(Recovery(epochs=epochs), 54_000, macs)
    if updates is None:
        assert settings is None
        return
    assert settings is not None
    found = settings.epochs * updates_per_epoch(settings, 54_000)
    assert found == pytest.approx(int(updates))
    assert found >= FEWEST_UPDATES


def test_where_training_starts_from_other_weights_no_trial_would_tell():
    assert trial_settings(Recovery(epochs=3, start="fresh"), 54_000, 1_000_000) is None
