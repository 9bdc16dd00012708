"""Models that cannot do what will be asked of them are told so at intake, in one line, and about themselves."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import ModelError
from edgeprune.workload.load import from_objects


def conv(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())


class Plain(nn.Module):
    """Two convolutions and a classifier, for ``[N, 3, 12, 12]``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = conv(3, 12), conv(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> object:
        return self.head(self.two(self.one(x)).mean((2, 3)))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def data(n: int = 24) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return {"train": (x, np.arange(n) % 4), "val": (x[:16], np.arange(16) % 4)}


def test_neither_weights_nor_statistics_nor_the_random_state_are_changed() -> None:
    model = made(Plain)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ready = from_objects(model, data()).model
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in ready.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ready.modules())


class FunctionalDropout(Plain):
    def forward(self, x: Tensor) -> object:
        return self.head(F.dropout(self.two(self.one(x)).mean((2, 3)), 0.4))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class NoisyLayer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Sequential(conv(12, 16), Noise())


class CountsCalls(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> object:
        self.calls += 1
        return super().forward(x) * self.calls  # type: ignore[operator]


class BatchStatistics(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.two[1] = nn.BatchNorm2d(16, track_running_stats=False)


class OverTheBatch(Plain):
    def forward(self, x: Tensor) -> object:
        y = super().forward(x)
        return y - y.mean(0)  # type: ignore[attr-defined]


class Squeezed(Plain):
    def forward(self, x: Tensor) -> object:
        return super().forward(x).squeeze()  # type: ignore[attr-defined]


class WithoutGradient(Plain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> object:
        return super().forward(x)


class Quits(Plain):
    def forward(self, x: Tensor) -> object:
        sys.exit("no licence")


class OnePairOnly(Plain):
    def forward(self, x: Tensor) -> object:
        if len(x) == 1:
            raise ValueError("a batch of two, please")
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FunctionalDropout, r"same input twice.* first in FunctionalDropout\.forward"),
        (NoisyLayer, r"same input twice.* first in layer 'two\.1' \(Noise\)"),
        (CountsCalls, "same input twice"),
        (BatchStatistics, r"others in its batch.* layer 'two\.1' \(BatchNorm2d\), .*=False"),
        (OverTheBatch, r"others in its batch.* first in OverTheBatch\.forward"),
        (Squeezed, r"must return \[1, 4\] for one sample, but returned \[4\]"),
        (WithoutGradient, "cannot be healed.* does not require grad"),
        (Quits, r"Quits\.forward failed on input \[2, 3, 12, 12\]: SystemExit: no licence"),
        (OnePairOnly, r"failed on input \[1, 3, 12, 12\]: ValueError: a batch of two"),
    ],
)
def test_a_model_that_cannot_do_what_is_to_come_is_told_at_intake(
    kind: type[nn.Module], words: str
) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        from_objects(made(kind), data())
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message


def test_a_layer_that_fails_in_healing_alone_is_named() -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise RuntimeError("not with gradients")
            return x

    model = made(Plain)
    model.two = nn.Sequential(conv(12, 16), Fragile())
    with pytest.raises(ModelError, match=r"cannot be healed.* layer 'two\.1' \(Fragile\)"):
        from_objects(model, data())


def test_two_equal_samples_still_show_that_the_batch_matters() -> None:
    arrays = data()
    arrays["train"][0][1] = arrays["train"][0][0]
    with pytest.raises(ModelError, match="others in its batch"):
        from_objects(made(BatchStatistics), arrays)


def test_ctrl_c_in_the_trial_step_ends_the_command() -> None:
    class Pressed(Plain):
        def forward(self, x: Tensor) -> object:
            if torch.is_grad_enabled():
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        from_objects(made(Pressed), data())
