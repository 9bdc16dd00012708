"""A net run in stretches gives each layer what one pass of all samples gives it, and runs nothing twice that a module hides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compress.evaluate import run_once
from edgeprune.compress.repair import relay
from edgeprune.compress.repair.relay import Relay


class Block(nn.Module):
    """A residual block that writes into its own input's copy, as many do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.act(self.first(x)))
        y += x
        return functional.relu_(y)


class Plain(nn.Module):
    """Blocks one behind the other: each block's output is all that the next ones see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


class Skipping(Plain):
    """What the stem says is needed at the very end: no block hides it."""

    def forward(self, x: Tensor) -> Tensor:
        seen = functional.relu(self.stem(x))
        return self.head(self.blocks(seen).mean((2, 3)) + seen.amax((2, 3)))


LAYERS = ["blocks.0.first", "blocks.0.last", "blocks.1.first", "blocks.1.last", "head"]


def net(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return kind().eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def given(model: nn.Module, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    run_once(model, x, [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))])
    return torch.cat(seen)


@pytest.mark.parametrize("kind", [Plain, Skipping])
def test_each_layer_sees_what_one_pass_would_show_it_though_those_before_it_change(
    kind, monkeypatch
):
    monkeypatch.setattr(relay, "MAX_BATCH", 4)
    model, x = net(kind), images(9)
    on_the_way = Relay(model, x)
    for number, name in enumerate(LAYERS):
        seen: list[Tensor] = []
        parts: list[slice] = []
        on_the_way.reach(
            name, lambda t, part, s=seen, p=parts: (s.append(t.clone()), p.append(part))
        )
        assert [len(x[part]) for part in parts] == [3, 3, 3]
        torch.testing.assert_close(torch.cat(seen), given(model, name, x))
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(1.5)
        if number + 1 < len(LAYERS):
            on_the_way.wait(name, LAYERS[number + 1])
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Counted(nn.Conv2d):
    """Counts how often it runs."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


@pytest.mark.parametrize(("kind", "runs"), [(Plain, 0), (Skipping, 6)])
def test_what_lies_before_a_module_that_hides_it_is_not_run_again(kind, runs, monkeypatch):
    monkeypatch.setattr(relay, "MAX_BATCH", 4)
    model = net(kind)
    model.stem = Counted(3, 4, 3, padding=1)
    on_the_way = Relay(model, images(8))  # two batches
    on_the_way.wait("blocks.0.last", "blocks.1.first")
    model.stem.runs = 0
    for name in ("blocks.1.first", "blocks.1.last", "head"):
        on_the_way.reach(name, lambda *_: None)
    assert model.stem.runs == runs


def test_outputs_that_would_fill_the_memory_are_not_waited_as(monkeypatch):
    monkeypatch.setattr(relay, "MAX_WAITING_BYTES", 8 * 3 * 4)
    model, x = net(Plain), images(8)
    on_the_way = Relay(model, x)
    on_the_way.wait("blocks.0.last", "blocks.1.first")
    seen: list[Tensor] = []
    on_the_way.reach("blocks.1.last", lambda t, _: seen.append(t.clone()))
    torch.testing.assert_close(torch.cat(seen), given(model, "blocks.1.last", x))
