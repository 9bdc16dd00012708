"""What a model is asked before anything is measured or exported: everything that it will have to do later, once, on two samples.

Whoever brings a model that cannot do it is told at once and told about the model; later a converter would be blamed, or hours be lost.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from edgeprune.compress.heal.recover import recover
from edgeprune.errors import ModelError
from edgeprune.progress import Silent
from edgeprune.records.workload import Preprocess, Recovery
from edgeprune.workload.dataset import Split, model_input
from edgeprune.workload.factories import one_line
from edgeprune.workload.modes import eval_copy

SAMPLES = 2
SAME_ANSWER = 1e-3  # of the range of the answers: float32 sums in another order differ by less


def check(model: nn.Module, first: Split, preprocess: Preprocess, settings: Recovery) -> None:
    """Raise unless a model answers for itself, alike each time, one sample at a time as in a batch, and can be healed.

    Args:
        model: in eval mode; neither its weights nor its statistics are changed.
        first: the first raw training samples, at most two of which are used.
        preprocess: the recorded constants of the input.
        settings: of the healing to come.

    Raises:
        ModelError: it does not; names the layer where one is to blame.
    """
    few = first.head(SAMPLES)
    with torch.random.fork_rng(devices=[]):
        _require_own_answer(model, torch.from_numpy(model_input(few.x, preprocess)))
        _require_healing(model, few, preprocess, settings)


def one_pass(model: nn.Module, batch: Tensor) -> Any:
    """What a model says about ``[N, ...]``, without gradients.

    Raises:
        ModelError: it fails; names the innermost layer that was entered and not left.
    """
    watch = _Watch(model)
    try:
        with torch.no_grad():
            return model(batch)
    except (Exception, SystemExit) as error:  # anything can be raised by the user's forward
        raise ModelError(
            f"the model does not accept the data: {watch.where()}: {one_line(error)}",
            hint=f"the data gives the model [N, {', '.join(map(str, batch.shape[1:]))}]; check preprocess",
        ) from error
    finally:
        watch.end()


class _Watch:
    """Which layer of a model, or of copies made meanwhile, is running."""

    def __init__(self, model: nn.Module) -> None:
        self._kind = type(model).__name__
        self._entered: list[tuple[str, nn.Module, str]] = []
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(
                module.register_forward_pre_hook(lambda m, i, name=name: self._enter(name, m, i))
            )
            self._handles.append(module.register_forward_hook(lambda *_: self._leave()))

    def _enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes = [str(list(i.shape)) for i in inputs if isinstance(i, Tensor)]
        self._entered.append((name, module, ", ".join(shapes) or "no tensor"))

    def _leave(self) -> None:
        self._entered.pop()

    def where(self) -> str:
        """The innermost layer that is running, and what it was given."""
        if not self._entered:
            return f"{self._kind}.forward failed"
        name, module, shapes = self._entered[-1]
        return f"{_layer(name, module)} failed on input {shapes}"

    @property
    def is_running(self) -> bool:
        """Whether a layer was entered and not left."""
        return bool(self._entered)

    def end(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _layer(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"layer {name!r} ({kind})" if name else f"{kind}.forward"


def _require_own_answer(model: nn.Module, batch: Tensor) -> None:
    """Raise unless the answer to a sample is the same each time, and whatever else is in its batch."""
    pair = _unlike(batch)
    asked = eval_copy(model)
    together, again, alone = (one_pass(asked, x) for x in (pair, pair, pair[:1]))
    if not isinstance(alone, Tensor) or alone.shape != together[:1].shape:
        got = list(alone.shape) if isinstance(alone, Tensor) else type(alone).__name__
        raise ModelError(
            f"the model must return {list(together[:1].shape)} for one sample, but returned {got}",
            hint="squeeze() takes the dimension of a single sample away: name the dimension that is to go",
        )
    if (share := _difference(together, again)) > SAME_ANSWER:
        raise ModelError(
            "the model must answer the same input twice with the same output, but two runs in eval mode differ by"
            f" {share:.2g} of their range{_blame(model, pair, pair)}",
            hint="dropout as a function needs training=self.training; nothing may be random, or count its calls",
        )
    if (share := _difference(together[:1], alone)) > SAME_ANSWER:
        raise ModelError(
            "the answer to a sample must not depend on the others in its batch, but alone it differs by"
            f" {share:.2g} of its range{_blame(model, pair, pair[:1])}",
            hint="on the board samples come one by one: batch norm needs running statistics, other layers their own sample",
        )


def _unlike(batch: Tensor) -> Tensor:
    """Two samples that differ: the first two, or the first and its mirror image."""
    pair = torch.cat([batch, batch])[:SAMPLES]
    if torch.equal(pair[0], pair[1]):
        pair[1] = pair[0].flip(tuple(range(pair.ndim - 1)))
    return pair


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the range of the answers; infinite where one is not finite."""
    scale = float(one.max() - one.min())
    found = float((one - other).abs().max())
    if not found < float("inf"):
        return float("inf")
    # A model that says nearly the same of every class rounds in relation to its answers, not to their range.
    return found / max(scale, 1e-2 * float(one.abs().max()), 1e-30)


@dataclass(frozen=True)
class _LayerCall:
    """One layer at work on the first sample."""

    name: str
    module: nn.Module
    given: Sequence[Tensor]
    said: Tensor


def _blame(model: nn.Module, one: Tensor, other: Tensor) -> str:
    """The first module, in the order they finish, that is given the same in both batches and says something else; empty if none is."""
    for a, b in zip(_calls(model, one), _calls(model, other), strict=False):
        same = a.name == b.name and all(map(_alike, a.given, b.given))
        if same and not _alike(a.said, b.said):
            norm = isinstance(a.module, _NormBase) and not a.module.track_running_stats
            why = ", which has track_running_stats=False" if norm else ""
            return f", first in {_layer(a.name, a.module)}{why}"
    return ""


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape and torch.equal(one, other)
    return _difference(one, other) <= SAME_ANSWER


def _calls(model: nn.Module, batch: Tensor) -> list[_LayerCall]:
    """Every call of every module that gives a tensor, in the order they finish."""
    watched = eval_copy(model)
    found: list[_LayerCall] = []
    entered: list[list[Tensor]] = []

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Copies: layers may write to what they are given.
        entered.append([i[:1].clone() for i in inputs if isinstance(i, Tensor) and i.ndim])

    def leave(name: str, module: nn.Module, output: Any) -> None:
        given = entered.pop()
        if isinstance(output, Tensor) and output.ndim and output.numel():
            found.append(_LayerCall(name, module, given, output[:1].clone()))

    for name, module in watched.named_modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda m, _, output, name=name: leave(name, m, output))
    with torch.no_grad(), contextlib.suppress(Exception):  # one that counts its calls may fail now
        watched(batch)
    return found


def _require_healing(
    model: nn.Module, few: Split, preprocess: Preprocess, settings: Recovery
) -> None:
    """One step of the healing to come, the model being its own teacher."""
    count = max(SAMPLES, len(few))
    index = [i % len(few) for i in range(count)]
    pair = Split(few.x[index], None if few.y is None else few.y[index])
    changes: dict[str, Any] = {"epochs": min(1.0, settings.epochs), "batch_size": count}
    # The dense model has no pattern of zeros yet, and a clock must not decide what is tried.
    changes |= {"sparsity": "none", "max_minutes": None}
    student = copy.deepcopy(model)
    watch = _Watch(student)
    try:
        healed = recover(
            student,
            model,
            pair,
            pair,
            settings.model_copy(update=changes),
            preprocess=preprocess,
            seed=0,
            progress=Silent(),
        )
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # anything can be raised by the user's forward
        where = f"{watch.where()}: " if watch.is_running else ""
        raise ModelError(
            f"the model cannot be healed, which takes gradients: {where}{one_line(error)}",
            hint="in its forward, write x = relu(x) in place of relu_(x), and leave no_grad() and detach() out",
        ) from error
    if healed.interrupted:  # healing takes Ctrl-C as its end, and here there is more to end
        raise KeyboardInterrupt
