"""Sound models of every habit are pruned, healed, saved and written as those of a textbook are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.compress.heal.fresh_weights import reinitialised
from edgeprune.compress.heal.recover import recover
from edgeprune.compress.plain_source import model_source
from edgeprune.compress.pruned_file import load_pruned, save_pruned
from edgeprune.compress.scores import importance
from edgeprune.errors import ModelError
from edgeprune.pipeline.stages import measure
from edgeprune.progress import Silent
from edgeprune.records.workload import Recovery
from edgeprune.workload import model as intake
from edgeprune.workload.dataset import model_input
from edgeprune.workload.load import LoadedWorkload, from_objects
from edgeprune.workload.memory import quick_input
from edgeprune.workload.modes import settle


def conv(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())


class Plain(nn.Module):
    """Two convolutions and a classifier, for ``[N, 3, 12, 12]``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = conv(3, 12), conv(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> object:
        return self.head(self.two(self.one(x)).mean((2, 3)))


class FrozenNorm(Plain):
    """Keeps batch norm frozen while it is fine-tuned; what it overrides returns nothing."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.one[1].eval()

    def eval(self) -> None:  # type: ignore[override]
        super().eval()

    def to(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        super().to(*args, **kwargs)  # type: ignore[arg-type]

    def float(self) -> None:  # type: ignore[override]
        super().float()


class TrainsItself(Plain):
    """Has a training loop by the name of torch's switch."""

    def train(self, loader: object) -> None:  # type: ignore[override]
        for _ in loader:  # type: ignore[attr-defined]
            raise AssertionError


class WholeNumbers(Plain):
    """A table of rows and a mask, kept as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(15, -1, -1), requires_grad=False)
        self.mask = nn.Parameter(torch.ones(4, dtype=torch.bool), requires_grad=False)

    def forward(self, x: Tensor) -> object:
        x = self.two(self.one(x)).mean((2, 3))
        return self.head(x[:, self.rows]) * self.mask


class AuxiliaryHead(Plain):
    """Answers with a second head in training mode; nothing else reads it, so it is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> object:
        x = self.one(x)
        y = self.head(self.two(x).mean((2, 3)))
        return {"logits": y, "aux": self.aux(x.mean((2, 3)))} if self.training else y


class OnlyInUse(Plain):
    """Another function in training mode."""

    def forward(self, x: Tensor) -> object:
        assert not self.training
        return super().forward(x)


class Viewed(Plain):
    """Flattens by ``view``, which wants the numbers in the plain order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 9, 4)

    def forward(self, x: Tensor) -> object:
        x = self.two(self.one(x))
        return self.head(x.view(len(x), -1))


class Tied(Plain):
    """One weight under two names, and a grid that is kept from the first pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.middle.weight
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> object:
        x = self.two(self.one(x)).mean((2, 3))
        if self.grid is None:
            self.grid = self.head.weight.new_ones(16)
        return self.head(self.again(self.middle(x * self.grid)))


SOUND = [
    Plain, FrozenNorm, TrainsItself, WholeNumbers, AuxiliaryHead, OnlyInUse, Viewed, Tied,
]  # fmt: skip


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def data(n: int = 24) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return {"train": (x, np.arange(n) % 4), "val": (x[:16], np.arange(16) % 4)}


def loaded(model: nn.Module) -> LoadedWorkload:
    return from_objects(model, data())


def pruned(work: LoadedWorkload) -> nn.Module:
    x = torch.from_numpy(model_input(work.dataset.train.x, work.preprocess))
    groups, _ = find_groups(work.model, x[:1])
    scores = importance.fisher(work.model, groups, quick_input(work.model, x), 0)
    worst = {g: np.argsort(s)[: len(s) // 2].tolist() for g, s in scores.items()}
    return remove_channels(work.model, {g.name: g for g in groups}, worst, x[:1])


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_model_of_any_habit_is_pruned_healed_saved_and_written(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    work = loaded(made(kind))
    x = torch.from_numpy(model_input(work.dataset.train.x, work.preprocess))
    small = pruned(work)
    healed = recover(
        small,
        work.model,
        work.dataset.train,
        work.dataset.selection,
        Recovery(epochs=2, batch_size=8, learning_rate=0.05),
        preprocess=work.preprocess,
        seed=0,
        progress=Silent(),
    )
    assert healed.epochs_run == 2
    assert all(row.loss is not None for row in healed.history[1:])
    measure.save_weights(healed.model, tmp_path / "weights.safetensors")
    measure.with_weights(small, tmp_path / "weights.safetensors")
    save_pruned(healed.model, tmp_path / "pruned.safetensors", work.model)
    again = load_pruned(lambda: made(kind), tmp_path / "pruned.safetensors")
    with torch.no_grad():
        expected = healed.model(x)
        torch.testing.assert_close(again(x), expected)
        torch.testing.assert_close(
            torch.export.export(again, (x[:2],), strict=False).module()(x[:2]), expected[:2]
        )
    if kind in (Viewed, Tied):  # data-dependent for a tracer: len(x), and what was kept
        return
    space: dict[str, object] = {}
    exec(model_source(healed.model, "A net."), space)
    plain = space["build"]()  # type: ignore[operator]
    plain.load_state_dict(healed.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), expected)


def test_whole_numbers_survive_healing_and_a_fresh_start() -> None:
    work = loaded(made(WholeNumbers))
    assert torch.equal(work.model.rows, torch.arange(15, -1, -1))
    with pytest.raises(ModelError, match="needs layers that can set"):
        reinitialised(nn.Sequential(Scale()), 0)
    fresh = reinitialised(nn.Sequential(nn.Linear(3, 3), Table()), 0)
    assert torch.equal(fresh[1].rows, torch.arange(3))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(3), requires_grad=False)


def test_a_state_dict_goes_in_where_loading_is_overridden_and_returns_nothing(
    tmp_path: Path,
) -> None:
    class Loads(Plain):
        def load_state_dict(self, state: dict, strict: bool = True) -> None:  # type: ignore[override,type-arg]
            super().load_state_dict(state, strict)

    state = made(Plain).state_dict()
    ready, _ = intake.prepare(made(Loads), state, where="w")
    assert torch.equal(ready.head.weight, state["head.weight"])
    state.pop("head.bias")
    with pytest.raises(ModelError, match=r"lacks head\.bias"):
        intake.prepare(made(Loads), state, where="w")


def test_what_its_own_eval_leaves_in_training_mode_is_switched_off_and_said() -> None:
    class Dreams(Plain):
        def train(self, mode: bool = True) -> Dreams:
            super().train(mode)
            self.two[1].train()
            return self

    work = loaded(made(Dreams))
    assert any("its eval() leaves two.1 in training mode" in note for note in work.notes)
    assert not any(m.training for m in work.model.modules())
    work.model.eval()  # as libraries do
    assert not any(m.training for m in work.model.modules())
    assert settle(work.model) == ()
