"""A net run in stretches, so that each layer can be looked at with all samples and none of what lies in front is run again.

All batches run up to a layer, wait there, and run on when it was changed. Where the output of one module is all that the rest of the net
depends on, a batch waits as that output; elsewhere it starts again from where it waited last. Which modules those are is found by running
the net with everything in front of them replaced.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.workload.answers import device_of

MAX_BATCH, MAX_BATCH_BYTES = 64, 48 * 1024**2  # samples, and the largest activation of all of them
MAX_WAITING_BYTES = 512 * 1024**2  # of all outputs that batches wait as
MOST_TRIES = 4  # modules that are tried between two layers


@dataclass(frozen=True)
class _ModuleCall:
    """A module that ran once and returned a tensor of all samples: its place in the order of starts and ends, and what it returned."""

    name: str
    start: int
    end: int
    output: Tensor

    @property
    def preference(self) -> tuple[int, int, int]:
        """Smaller is better: outer modules, then small outputs, then late ones."""
        return self.name.count("."), self.output.numel(), -self.end


class _RelayDone(Exception):
    """A batch is where it was to run to."""


class Relay:
    """Batches of samples on their way through a model in eval mode, which may be changed behind where they wait."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._few = x[:2]
        self._calls, self._answer, largest = _watched(model, self._few)
        self._parts = _even_parts(len(x), MAX_BATCH_BYTES // max(1, 4 * largest))
        self._x = x
        self._waiting: list[Tensor] = []  # one for each batch, once there is a waypoint
        self._replaced: tuple[
            _ModuleCall, ...
        ] = ()  # what is not run again; the last one is the waypoint

    def reach(self, name: str, look: Callable[[Tensor, slice], None]) -> None:
        """Run all batches up to a layer and show its input, with the samples that it is of, to ``look``."""

        def stop(part: slice, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            look(args[0], part)
            raise _RelayDone

        for number, part in enumerate(self._parts):
            hook = functools.partial(stop, part)
            self._run(number, self._modules[name].register_forward_pre_hook(hook))

    def wait(self, behind: str, before: str) -> None:
        """Let all batches wait between two layers that ran one behind the other, if there is a module to wait at."""
        found = self._waypoint(behind, before)
        if found is None:
            return
        arrived: list[Tensor] = []

        def stop(layer: nn.Module, args: object, output: Tensor) -> None:
            arrived.append(output.clone())
            raise _RelayDone

        for number in range(len(self._parts)):
            self._run(number, self._modules[found.name].register_forward_hook(stop))
            if self._waiting:  # what has run on is not needed there again
                self._waiting[number] = arrived[number]
        self._waiting, self._replaced = arrived, self._in_front(found)

    def _run(self, number: int, handle: torch.utils.hooks.RemovableHandle) -> None:
        given = self._waiting[number] if self._waiting else None
        x = self._x[self._parts[number]].to(device_of(self._model))
        try:
            with torch.no_grad(), contextlib.suppress(_RelayDone), self._skipping(given):
                self._model(x)
        finally:
            handle.remove()

    def _waypoint(self, behind: str, before: str) -> _ModuleCall | None:
        first, last = self._calls[behind].end, self._calls[before].start
        fitting = MAX_WAITING_BYTES // max(1, 4 * len(self._x))
        between = [
            call
            for call in self._calls.values()
            if first <= call.end < last and call.output[0].numel() <= fitting
        ]
        for call in sorted(between, key=lambda c: c.preference)[:MOST_TRIES]:
            if self._is_all_that_counts(call):
                return call
        return None

    def _in_front(self, waypoint: _ModuleCall) -> tuple[_ModuleCall, ...]:
        """The outermost of the modules that have ended where the waypoint has, in their order."""
        ended = [call for call in self._calls.values() if call.end <= waypoint.end]
        names = {call.name for call in ended}
        outer = [c for c in ended if not any(parent in names for parent in _parents(c.name))]
        return tuple(sorted(outer, key=lambda c: c.end))

    def _is_all_that_counts(self, waypoint: _ModuleCall) -> bool:
        """Whether the model answers as before when only this output is right and all before it is made up."""
        replaced = self._in_front(waypoint)
        if not replaced or replaced[-1] is not waypoint:
            return False
        try:
            with torch.no_grad(), _replacing(self._modules, replaced, waypoint.output):
                answer = self._model(self._few.to(device_of(self._model)))
        except Exception:  # what is made up may be refused in any way
            return False
        return isinstance(answer, Tensor) and torch.equal(answer, self._answer)

    def _skipping(self, given: Tensor | None) -> contextlib.AbstractContextManager[None]:
        if given is None:
            return contextlib.nullcontext()
        return _replacing(self._modules, self._replaced, given)


def _even_parts(n: int, fitting: int) -> list[slice]:
    """Batches of ``n`` samples, as even as can be: some models take no single sample."""
    size = max(1, min(MAX_BATCH, fitting))
    bounds = np.linspace(0, n, -(-n // size) + 1).round().astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _watched(model: nn.Module, x: Tensor) -> tuple[dict[str, _ModuleCall], Tensor, int]:
    """Every module that ran once on all samples, the answer, and the largest output of one sample in numbers."""
    clock, largest = 0, x[0].numel()
    starts: dict[str, list[int]] = {}
    calls: dict[str, _ModuleCall] = {}

    def begin(name: str, *_: object) -> None:
        nonlocal clock
        clock += 1
        starts.setdefault(name, []).append(clock)

    def end(name: str, module: nn.Module, args: object, output: object) -> None:
        nonlocal clock, largest
        clock += 1
        if isinstance(output, Tensor) and output.ndim and len(output) == len(x):
            # A copy: what runs next may write into it.
            calls[name] = _ModuleCall(name, starts[name][-1], clock, output.clone())
            largest = max(largest, output[0].numel())

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(functools.partial(begin, name)))
            handles.append(module.register_forward_hook(functools.partial(end, name)))
    try:
        with torch.no_grad():
            answer = model(x.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return {n: c for n, c in calls.items() if len(starts[n]) == 1}, answer, largest


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@contextlib.contextmanager
def _replacing(
    modules: dict[str, nn.Module], replaced: Sequence[_ModuleCall], given: Tensor
) -> Iterator[None]:
    """Modules do not run: the last one returns what is given, the others ones of the right shape."""

    def made_up(shape: torch.Size, *_: object, **__: object) -> Tensor:
        return torch.ones(len(given), *shape, dtype=given.dtype, device=given.device)

    own = {}
    try:
        for call in replaced:
            module = modules[call.name]
            own[call.name] = module.__dict__.get("forward")
            stand_in = functools.partial(made_up, call.output.shape[1:])
            module.__dict__["forward"] = stand_in
        # A copy: the next layer may write into it.
        modules[replaced[-1].name].__dict__["forward"] = lambda *_, **__: given.clone()
        yield
    finally:
        for name, forward in own.items():
            if forward is None:
                del modules[name].__dict__["forward"]
            else:
                modules[name].__dict__["forward"] = forward
