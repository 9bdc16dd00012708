"""Distillation heals, never harms, repeats itself for a seed, and survives interruptions."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from healing_fixture import PREPROCESS, SETTINGS, Net, Stopper, damaged, images, splits, teacher
from torch import nn

from edgeprune.compress.evaluate import agreement
from edgeprune.compress.heal.recover import recover
from edgeprune.errors import ModelError
from edgeprune.progress import Silent
from edgeprune.records.workload import Augment, Preprocess, Recovery
from edgeprune.workload.answers import raw_logits
from edgeprune.workload.batches import augmented, to_input
from edgeprune.workload.dataset import Split, model_input
from edgeprune.workload.memory import fast_copy


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_unlabelled_distillation_raises_the_agreement_of_a_damaged_student() -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    fresh = images(256, 2)
    settings = SETTINGS.model_copy(update={"epochs": 8.0})
    student = damaged(dense)
    healed = recover(
        student, dense, train, selection, settings, preprocess=PREPROCESS, seed=0, progress=Silent()
    )
    reference = raw_logits(dense, fresh, PREPROCESS)
    before = agreement(raw_logits(student, fresh, PREPROCESS), reference)
    after = agreement(raw_logits(healed.model, fresh, PREPROCESS), reference)
    assert after > before + 0.1
    assert not healed.model.training
    assert healed.epochs_run == 8
    assert healed.best_selection_quality == healed.history[healed.best_epoch].selection_quality


def test_labels_are_judged_by_accuracy_and_used_in_the_loss() -> None:
    dense = teacher()
    train, selection = splits(labelled=True)
    unlabelled = Split(train.x, None)
    found = [
        recover(damaged(dense), dense, part, selection, SETTINGS, preprocess=PREPROCESS, seed=0, progress=Silent())
        for part in (train, unlabelled)
    ]  # fmt: skip
    assert found[0].best_selection_quality > found[0].history[0].selection_quality
    assert not same_weights(found[0].model, found[1].model)


def test_the_same_seed_gives_identical_weights_and_another_seed_does_not() -> None:
    dense = teacher()
    train, selection = splits(labelled=True)
    found = [
        recover(damaged(dense), dense, train, selection, SETTINGS, preprocess=PREPROCESS, seed=seed, progress=Silent())
        for seed in (5, 5, 6)
    ]  # fmt: skip
    assert same_weights(found[0].model, found[1].model)
    assert not same_weights(found[0].model, found[2].model)


def test_models_and_the_global_random_state_are_not_changed() -> None:
    dense = teacher()
    student = damaged(dense).train()
    before = [copy.deepcopy(dense), copy.deepcopy(student)]
    train, selection = splits(labelled=True)
    state = torch.get_rng_state()
    recover(
        student, dense, train, selection, SETTINGS, preprocess=PREPROCESS, seed=0, progress=Silent()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(dense, before[0])
    assert same_weights(student, before[1])
    assert student.training
    assert not dense.training
    assert all(p.requires_grad and p.grad is None for p in (*dense.parameters(), *student.parameters()))  # fmt: skip


def test_a_perfect_student_comes_back_as_it_was() -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    ruinous = SETTINGS.model_copy(update={"learning_rate": 5.0})
    found = recover(
        dense, dense, train, selection, ruinous, preprocess=PREPROCESS, seed=0, progress=Silent()
    )
    assert found.best_epoch == 0
    assert found.best_selection_quality == 1
    assert same_weights(found.model, dense)


def test_diverging_training_is_reported_and_the_model_before_it_is_kept() -> None:
    dense = teacher()
    student = damaged(dense)
    _, selection = splits(labelled=False)
    hostile = Split(np.full((256, 1, 8, 8), np.inf, np.float32), None)
    told = Stopper()
    found = recover(
        student, dense, hostile, Split(model_input(selection.x, PREPROCESS), None), SETTINGS, preprocess=PREPROCESS, seed=0, progress=told
    )  # fmt: skip
    assert any("diverged" in line for line in told.lines)
    assert found.best_epoch == 0
    assert same_weights(found.model, student)


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.5, 4), (1.25, 10)])
def test_epochs_may_be_fractions(epochs: float, steps: int) -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    settings = SETTINGS.model_copy(update={"epochs": epochs})
    told = Stopper()
    found = recover(
        damaged(dense), dense, train, selection, settings, preprocess=PREPROCESS, seed=0, progress=told
    )  # fmt: skip
    assert told.total == told.done == steps
    assert found.epochs_run == steps / 8
    assert found.history[-1].epoch == epochs
    of = {note.partition(",")[0] for note in told.notes}
    assert of == {f"epoch {i + 1} of {math.ceil(epochs)}" for i in range(math.ceil(epochs))}


def test_a_time_limit_ends_a_long_plan_and_fills_the_bar() -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    settings = SETTINGS.model_copy(update={"epochs": 1000.0, "max_minutes": 0.01})
    told = Stopper()
    found = recover(
        damaged(dense), dense, train, selection, settings, preprocess=PREPROCESS, seed=0, progress=told
    )  # fmt: skip
    assert 0 < found.epochs_run < 1000
    assert told.done == pytest.approx(told.total)
    assert found.seconds < 20
    assert not found.interrupted


def test_ctrl_c_keeps_what_is_done() -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    found = recover(
        damaged(dense), dense, train, selection, SETTINGS, preprocess=PREPROCESS, seed=0, progress=Stopper(at_step=13)
    )  # fmt: skip
    assert found.interrupted
    assert found.epochs_run == 13 / 8
    assert [row.epoch for row in found.history] == [0, 1, 13 / 8]
    assert found.best_selection_quality == max(row.selection_quality for row in found.history)
    expected = agreement(
        raw_logits(found.model, selection.x, PREPROCESS), raw_logits(dense, selection.x, PREPROCESS)
    )
    assert found.best_selection_quality == pytest.approx(expected)


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    dense = teacher()
    train, selection = splits(labelled=True)
    path = tmp_path / "recovery.safetensors"

    def run(told: Stopper, checkpoint: Path | None):
        return recover(
            damaged(dense), dense, train, selection, SETTINGS,
            preprocess=PREPROCESS, seed=0, progress=told, checkpoint=checkpoint,
        )  # fmt: skip

    whole = run(Stopper(), None)
    assert run(Stopper(at_step=11), path).interrupted
    told = Stopper()
    continued = run(told, path)
    assert told.lines == ["continuing the recovery after 1 epochs"]
    assert told.done == told.total == 24
    assert len(told.notes) == 1 + 16  # one catching up, then only the steps that were missing
    assert same_weights(continued.model, whole.model)
    qualities = [[row.selection_quality for row in run.history] for run in (continued, whole)]
    assert qualities[0] == qualities[1]
    finished = run(Stopper(), path)
    assert same_weights(finished.model, whole.model)
    assert finished.epochs_run == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.previous"]


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(tmp_path: Path) -> None:
    dense = teacher()
    train, selection = splits(labelled=True)
    path = tmp_path / "recovery.safetensors"

    def run(told: Stopper, checkpoint: Path | None):
        return recover(
            damaged(dense), dense, train, selection, SETTINGS,
            preprocess=PREPROCESS, seed=0, progress=told, checkpoint=checkpoint,
        )  # fmt: skip

    whole = run(Stopper(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = Stopper()
    again = run(told, path)
    assert told.lines[0].startswith("going on from the checkpoint before the last: ")
    assert told.lines[1] == "continuing the recovery after 2 epochs"
    assert same_weights(again.model, whole.model)


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "settings"])
def test_a_checkpoint_that_does_not_fit_is_ignored_with_a_note(tmp_path: Path, damage: str) -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    path = tmp_path / "recovery.safetensors"
    settings = SETTINGS.model_copy(update={"epochs": 1.0})

    def run(told: Stopper, settings: Recovery):
        return recover(
            damaged(dense), dense, train, selection, settings,
            preprocess=PREPROCESS, seed=0, progress=told, checkpoint=path,
        )  # fmt: skip

    first = run(Stopper(), settings)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        settings = settings.model_copy(update={"learning_rate": 0.01})
    told = Stopper()
    again = run(told, settings)
    assert len(told.lines) == 1
    assert told.lines[0].startswith("starting the recovery afresh: ")
    assert again.epochs_run == 1
    assert same_weights(again.model, first.model) == (damage != "settings")


def test_the_gradient_of_a_strided_pointwise_convolution_with_few_inputs_is_right() -> None:
    """In ``channels_last`` memory oneDNN overruns a buffer there: a crash with one thread, wrong gradients with more."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 1, stride=2)
    x = torch.randn(32, 4, 16, 16)
    exact = copy.deepcopy(layer).double()
    exact(x.double()).square().sum().backward()
    trained = fast_copy(nn.Sequential(nn.Identity(), layer), torch.device("cpu"))
    for _ in range(20):
        trained.zero_grad()
        trained(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert exact.weight.grad is not None
    found = trained[1].weight.grad
    assert torch.allclose(found.double(), exact.weight.grad, rtol=1e-4)


def test_one_training_sample_is_refused() -> None:
    dense = teacher()
    train, selection = splits(labelled=False)
    with pytest.raises(ModelError, match="at least 2"):
        recover(
            dense, dense, train.head(1), selection, SETTINGS, preprocess=PREPROCESS, seed=0, progress=Silent()
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3)])
def test_torch_preprocessing_equals_the_recorded_one(shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    color = "grey" if len(shape) == 3 else "rgb"
    values = (0.4,) if color == "grey" else (0.4, 0.5, 0.6)
    preprocess = Preprocess(color=color, mean=values, std=values)
    found = to_input(torch.from_numpy(raw), preprocess)
    assert found.shape == (5, 1 if color == "grey" else 3, 6, 7)
    np.testing.assert_allclose(found.numpy(), model_input(raw, preprocess), rtol=0, atol=1e-6)
    floats = torch.rand(2, 3)
    assert torch.equal(to_input(floats, Preprocess(kind="none")), floats)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_augmentation_only_shifts_and_mirrors(channels: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(1, 256, (64, 5, 6, *channels), generator=generator, dtype=torch.uint8)
    found = augmented(raw, Augment(shift_pixels=1, mirror=True), generator)
    assert found.shape == raw.shape
    assert found.dtype == torch.uint8
    kinds = set()
    for image, moved in zip(raw, found, strict=True):
        candidates = {}
        for mirror in (False, True):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    canvas = torch.zeros(7, 8, *channels, dtype=torch.uint8)
                    canvas[1:6, 1:7] = image
                    view = canvas[1 + dy : 6 + dy, 1 + dx : 7 + dx]
                    candidates[mirror, dy, dx] = view.flip(1) if mirror else view
        kinds |= {key for key, view in candidates.items() if torch.equal(view, moved)}
        assert any(torch.equal(view, moved) for view in candidates.values())
    assert len(kinds) >= 12  # of 18: every image drew for itself
    still = augmented(raw, Augment(shift_pixels=0), generator)
    assert torch.equal(still, raw)


def test_weights_that_training_cannot_reach_do_not_stop_the_checkpoint(tmp_path: Path) -> None:
    class WithSpare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.tied = self.classifier

    torch.manual_seed(0)
    dense = WithSpare().eval()
    train, selection = splits(labelled=False)
    settings = SETTINGS.model_copy(update={"epochs": 1.0})
    found = [
        recover(
            damaged(dense), dense, train, selection, settings, preprocess=PREPROCESS, seed=0, progress=Silent(), checkpoint=tmp_path / "c"
        )
        for _ in range(2)
    ]  # fmt: skip
    assert same_weights(found[0].model, found[1].model)
