"""A workload brought to life: the model, its data and what is known about both, checked against each other.

Notation: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from edgeprune.errors import ModelError, SpecError
from edgeprune.records.files import sha256_file
from edgeprune.records.paths import located
from edgeprune.records.workload import Preprocess, Workload
from edgeprune.workload import data as imagedata
from edgeprune.workload import model as intake
from edgeprune.workload import preflight, tasks
from edgeprune.workload.class_numbers import far_outside
from edgeprune.workload.dataset import Dataset, model_input
from edgeprune.workload.factories import call_factory
from edgeprune.workload.outputs import Outputs, mark, outputs_of, seen


@dataclass(frozen=True)
class LoadedWorkload:
    """Everything that the stages after it need.

    ``model`` is a copy of the user's, in eval mode, float32, on the CPU. ``input_shapes`` has one shape for each input of the model,
    without the batch, as torch sees it, such as ``(1, 28, 28)``. ``model_digest`` identifies weights and code. ``dead_channels`` maps
    a layer to its output channels whose weights and bias are all zero: pruned before, but not yet removed. ``preprocess`` is the
    recorded one with ``size`` filled in from the data. ``earlier`` is the model with the weights to rewind to, where those were named,
    and ``earlier_digest`` identifies them.
    """

    model: nn.Module
    dataset: Dataset
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    input_shapes: tuple[tuple[int, ...], ...]
    n_classes: int
    workload: Workload
    base: Path
    model_digest: str
    dead_channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    earlier: nn.Module | None = None
    earlier_digest: str = ""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of the only input, without the batch."""
        return self.input_shapes[0]

    @property
    def outputs(self) -> Outputs:
        """What the model was seen to answer with."""
        return outputs_of(self.model)


def load_workload(workload: Workload, base: Path) -> LoadedWorkload:
    """The live model and data that a workload names.

    Args:
        workload: the record; its paths are relative to ``base``.
        base: the folder of ``edgeprune.yaml``.

    Raises:
        SpecError: a file, module or name in the record is not there.
        ModelError: the model cannot be built, its weights do not fit or are not finite, the data breaks a rule, the model does not accept
            the data, or it cannot do what it will have to (:mod:`edgeprune.workload.preflight`); says which.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)  # a factory without weights gives the same model each time
        made = call_factory(workload.model, base, key="model")
    _require_module(made.value, workload.model)
    state: dict[str, torch.Tensor] | None = None
    if workload.weights is not None:
        state = _weights_file("weights", workload.weights, base)
    data = imagedata.load_data(
        workload.data, base, preprocess=workload.preprocess, labels=workload.labels
    )
    source = sha256_file(made.source) if made.source is not None else ""
    notes = [] if state is not None else ["no weights file: the weights are those the factory set"]
    return _assemble(made.value, state, data, workload, base, source=source, notes=notes)


def from_objects(
    model: nn.Module,
    data: Any,
    *,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    task: Literal["classify"] | None = None,
    settings: Workload | None = None,
    base: Path | None = None,
) -> LoadedWorkload:
    """The same from a live model and data, for use from Python; neither is changed.

    Args:
        model: any module with weights; a copy is taken.
        data: a mapping of split to ``(x, y)`` or ``x``, one ``(x, y)``, one ``x``, or the path of a folder or ``.npz``.
        preprocess: how ``x`` becomes the model's input; default: that of ``settings``, else plain rgb; float arrays are passed as they are.
        labels: class names.
        task: what the model is for; needed where the data has neither labels nor class names.
        settings: where target, budgets, recovery and seed come from; its model, weights and data are not used.
        base: the folder that relative paths in ``data`` start from; default: the current one.

    Raises:
        ModelError, SpecError: as :func:`load_workload`.
    """
    _require_module(model, "the model")
    base = base or Path.cwd()
    changes: dict[str, Any] = {"model": f"python:{type(model).__name__}", "weights": None}
    changes["data"] = str(data) if isinstance(data, (str, Path)) else "python objects"
    if preprocess is not None:
        changes["preprocess"] = preprocess
    if labels is not None:
        changes["labels"] = tuple(labels)
    if task is not None:
        changes["task"] = task
    workload = Workload(**changes) if settings is None else settings.model_copy(update=changes)
    if isinstance(data, (str, Path)):
        loaded = imagedata.load_data(
            str(data), base, preprocess=workload.preprocess, labels=workload.labels
        )
    else:
        loaded = imagedata.from_value(
            data, preprocess=workload.preprocess, labels=workload.labels, where="data"
        )
    return _assemble(model, None, loaded, workload, base, source=_source_of(model), notes=[])


def _weights_file(key: str, name: str, base: Path) -> dict[str, torch.Tensor]:
    path = located(name, base, what=key)
    if not path.is_file():
        what = "which is a folder" if path.is_dir() else f"but there is no such file in {base}"
        raise SpecError(f"{key} names {name}, {what}", hint="give a file of safetensors or torch")
    return intake.read_weights(path)


def _earlier(
    model: nn.Module, ready: nn.Module, workload: Workload, base: Path
) -> nn.Module | None:
    """The model with the weights to rewind to, where those were named; it has the tensors of the model that is ready."""
    name = workload.recovery.rewind_weights
    if name is None:
        return None
    state = _weights_file("rewind_weights", name, base)
    earlier, _ = intake.prepare(model, state, where=name)
    if intake.dead_channels(ready):
        raise ModelError(
            f"weights can be rewound to {name} only where no channels are masked, but some of {workload.weights or workload.model} are",
            hint="remove the masked channels before, or leave start: rewound out",
        )
    return earlier


def _require_module(value: Any, where: str) -> None:
    if isinstance(value, torch.jit.ScriptModule):
        raise ModelError(
            f"{where} is a TorchScript module, whose layers cannot be pruned",
            hint="give the Python model and its state dict",
        )
    if not isinstance(value, nn.Module):
        raise ModelError(f"{where} must be a torch.nn.Module, but is {_kind(value)}")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _source_of(model: nn.Module) -> str:
    try:
        return inspect.getsource(type(model))
    except (OSError, TypeError):  # defined at a prompt, or built in
        return repr(model)


def _assemble(
    model: nn.Module,
    state: dict[str, torch.Tensor] | None,
    data: imagedata.Data,
    workload: Workload,
    base: Path,
    *,
    source: str,
    notes: list[str],
) -> LoadedWorkload:
    ready, model_notes = intake.prepare(model, state, where=workload.weights or workload.model)
    earlier = _earlier(model, ready, workload, base)
    first = data.dataset.train.x[:2]
    batch = model_input(np.concatenate([first, first])[:2], data.preprocess)
    n_classes = check_accepts(ready, batch)
    _check_classes(n_classes, data)
    said = tasks.ask(ready, data)
    tasks.check_is_classifier(said, data, workload.task, batch[0].size)
    outputs = seen(said)
    for known in (ready, earlier):
        if known is not None:
            mark(known, outputs)
    preflight.check(ready, data.dataset.train, data.preprocess, workload.recovery)
    return LoadedWorkload(
        model=ready,
        dataset=data.dataset,
        preprocess=data.preprocess,
        labels=data.labels,
        input_shapes=(tuple(int(d) for d in batch.shape[1:]),),
        n_classes=n_classes,
        workload=workload,
        base=base,
        model_digest=intake.digest(ready, source),
        dead_channels=intake.dead_channels(ready),
        notes=(*notes, *model_notes, *data.notes, *tasks.output_notes(said)),
        earlier=earlier,
        earlier_digest="" if earlier is None else intake.digest(earlier, ""),
    )


def check_accepts(model: nn.Module, batch: np.ndarray) -> int:
    """The number of classes, once the model has shown that it takes this input and answers with finite logits.

    Args:
        model: in eval mode; not changed.
        batch: ``float32 [N, ...]`` as the model sees it.

    Raises:
        ModelError: the forward pass fails (names the layer and its input), or the output is not finite float ``[N, K]`` with ``K >= 2``.
    """
    output = preflight.one_pass(copy.deepcopy(model), torch.from_numpy(batch))
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"the model must return one tensor of logits, but returned {_kind(output)}",
            hint="wrap it in a module that returns the logits",
        )
    shape = list(output.shape)
    if output.ndim != 2 or shape[0] != len(batch) or shape[1] < 2:
        raise ModelError(
            f"the model must return logits [N, K] with K >= 2, but for N = {len(batch)} it returned {shape}",
            hint=tasks.shape_hint(batch.shape, shape),
        )
    if not output.is_floating_point():
        raise ModelError(
            f"the model must return floating-point logits, but returned {output.dtype}"
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelError(
            "the model must return finite logits, but returned NaN or Inf for the first samples",
            hint="check preprocess: mean and std, and the weights",
        )
    return int(shape[1])


def _check_classes(n_classes: int, data: imagedata.Data) -> None:
    if data.labels is not None and len(data.labels) != n_classes:
        raise ModelError(
            f"the model's outputs must match the labels, but it has {n_classes} outputs for {len(data.labels)} labels"
        )
    splits = data.dataset
    for name in ("train", "selection", "development", "test"):
        split = getattr(splits, name)
        if split is None or split.y is None:
            continue
        top = int(split.y.max())
        if top >= n_classes:
            raise ModelError(
                f"labels must be below the model's {n_classes} outputs, but {name} has {top}",
                hint=far_outside(top, n_classes),
            )
