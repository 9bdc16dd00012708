"""A pruned model as one file without code: widths and weights, to be put into the model that the user's own factory builds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgeprune.compress.groups.surgery import Removed, remove_block
from edgeprune.errors import IntegrityError, ModelError, SpecError
from edgeprune.records.base import Record
from edgeprune.records.files import to_json, write_bytes
from edgeprune.records.paths import located
from edgeprune.workload.factories import call_factory
from edgeprune.workload.model import prepare
from edgeprune.workload.modes import can_train, in_eval

# What says how wide a layer is; surgery changes nothing else about a module.
WIDTHS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels", "num_groups",
    "num_parameters",
)  # fmt: skip
_KEY = "edgeprune"
_SHOWN = 3

Width = Annotated[int, Field(ge=1, le=1 << 24)]


class PrunedSpec(Record):
    """The widths of every layer that has any: layer -> attribute -> value.

    ``removed`` are the layers of removed blocks.
    ``dense`` is what the dense model's modules say of themselves (their ``extra_repr``), by name: it tells the factory from others.
    """

    schema_version: Literal[1] = 1
    layers: dict[str, dict[str, Width]]
    dense: dict[str, str] = {}
    removed: tuple[str, ...] = ()


def save_pruned(model: nn.Module, path: Path, dense: nn.Module | None = None) -> None:
    """Write a pruned model for :func:`load_pruned`: safetensors, with the widths in its header; written atomically.

    Args:
        model: the pruned model.
        path: the file.
        dense: the model as the factory built it, so that another factory is told apart.

    Raises:
        SpecError, NoSpace: it cannot be written.
    """
    spec = PrunedSpec(
        layers={name: found for name, m in model.named_modules() if (found := _widths(m))},
        removed=tuple(name for name, m in model.named_modules() if isinstance(m, Removed)),
    )
    if dense is not None:
        spec = spec.model_copy(update={"dense": _descriptions(dense)})
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in model.state_dict().items()}
    text = to_json(spec).decode()
    write_bytes(path, save(tensors, metadata={_KEY: text}))


def load_pruned(factory: Callable[[], nn.Module] | str, file: Path | str) -> nn.Module:
    """A pruned model, rebuilt from the code that built the dense one; no code and no pickle is in the file.

    Args:
        factory: builds the dense model, as ``deploy`` was given it: a function, or ``file.py:factory``.
        file: ``pruned.safetensors`` of a run folder, or what :func:`save_pruned` wrote.

    Returns:
        A float32 module in eval mode on the CPU, ready to run, to train on, or to export.
        An auxiliary head that only training mode uses is as wide as it was: train without it.

    Raises:
        SpecError: there is no such file, or ``factory`` names none.
        IntegrityError: the file is damaged, or is not one of a pruned model.
        ModelError: the factory builds another model than the one that was pruned.
    """
    path = located(file, what="file")
    spec, tensors = _read(path)
    built = (
        call_factory(factory, Path.cwd(), key="model").value
        if isinstance(factory, str)
        else factory()
    )
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"the factory must return a torch module, but returned {type(built).__name__}"
        )
    model, _ = prepare(built, None, where=str(factory))
    _check_dense(model, spec, path)
    _take_out(model, spec, path)
    _set_widths(model, spec, path)
    _set_tensors(model, tensors, path)
    return in_eval(model)


def _descriptions(model: nn.Module) -> dict[str, str]:
    """What every module without parts says of itself: its kind, and its settings as torch prints them."""
    return {
        name: f"{type(m).__name__}({m.extra_repr()})"
        for name, m in model.named_modules()
        if not next(m.children(), None)
    }


def _check_dense(model: nn.Module, spec: PrunedSpec, path: Path) -> None:
    if not spec.dense:
        return
    own = _descriptions(model)
    problems = [
        f"{name} is {own.get(name, 'missing')} and was {said}"
        for name, said in spec.dense.items()
        if own.get(name) != said
    ]
    problems += [f"{name} was not there" for name in own if name not in spec.dense]
    if problems:
        raise _other_model(path, problems)


def _widths(module: nn.Module) -> dict[str, int]:
    """The widths of one layer; those of modules that are no layers are their own affair."""
    if not isinstance(module, _ConvNd | nn.Linear | _NormBase | nn.GroupNorm | nn.PReLU):
        return {}
    return {name: getattr(module, name) for name in WIDTHS if hasattr(module, name)}


def _read(path: Path) -> tuple[PrunedSpec, dict[str, Tensor]]:
    if not path.is_file():
        raise SpecError(f"there is no file {path}")
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as stream:
            text = (stream.metadata() or {}).get(_KEY)
            if text is None:
                raise IntegrityError(
                    f"{path} holds weights, but not the widths of a pruned model",
                    hint="give pruned.safetensors of a run folder",
                )
            spec = PrunedSpec.model_validate_json(text)
            return spec, {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except IntegrityError:
        raise
    except Exception as error:  # the library leaves unknown types and sizes to Python and torch
        raise IntegrityError(f"{path} is damaged, or not the file of a pruned model") from error


def _take_out(model: nn.Module, spec: PrunedSpec, path: Path) -> None:
    modules = dict(model.named_modules())
    problems = [f"the layer {name!r} is missing" for name in spec.removed if name not in modules]
    problems += [
        f"the layer {name!r} is another"
        for name in spec.removed
        if name == "" or next(modules.get(name, model).children(), None) is not None
    ]
    if problems:
        raise _other_model(path, problems)
    remove_block(model, spec.removed)


def _set_widths(model: nn.Module, spec: PrunedSpec, path: Path) -> None:
    modules = dict(model.named_modules())
    for name, widths in spec.layers.items():
        own = _widths(modules[name]) if name in modules else {}
        if own.keys() != widths.keys():
            raise _other_model(path, [f"the layer {name!r} is another, or missing"])
        for attribute, width in widths.items():
            if width > own[attribute]:
                raise _other_model(
                    path, [f"{name}.{attribute} is {width} there and {own[attribute]} here"]
                )
            setattr(modules[name], attribute, width)


def _set_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    modules = dict(model.named_modules())
    owned = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    problems = [f"{name} is not in the file" for name in owned if name not in tensors]
    tied: dict[int, nn.Parameter] = {}
    for name, value in tensors.items():
        owner_name, _, own_name = name.rpartition(".")
        owner = modules.get(owner_name)
        if owner is None or not (own_name in owner._parameters or own_name in owner._buffers):
            problems.append(f"{name} is not in the model")
            continue
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise IntegrityError(f"weights must be finite, but {name} of {path} is not")
        if own_name in owner._buffers:
            owner._buffers[own_name] = value
            continue
        old = owner._parameters[own_name]  # None where pruning gave a layer its first bias
        parameter = tied.get(id(old)) if old is not None else None
        if parameter is None or not torch.equal(parameter, value):
            parameter = nn.Parameter(value, requires_grad=can_train(value))
        owner._parameters[own_name] = parameter
        if old is not None:
            tied[id(old)] = parameter
    problems += [text for name, module in modules.items() for text in _misfits(name, module)]
    if problems:
        raise _other_model(path, problems)


def _misfits(name: str, module: nn.Module) -> list[str]:
    """Tensors of one layer that do not have the size that its widths say."""
    expected: dict[str, tuple[int, ...]] = {}
    if isinstance(module, _ConvNd):
        ends = (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, _ConvTransposeNd):
            ends = (module.in_channels, module.out_channels // module.groups)
        expected = {"weight": (*ends, *module.kernel_size), "bias": (module.out_channels,)}
    elif isinstance(module, nn.Linear):
        expected = {
            "weight": (module.out_features, module.in_features),
            "bias": (module.out_features,),
        }
    elif isinstance(module, _NormBase | nn.GroupNorm | nn.PReLU):
        (width,) = [
            int(getattr(module, a))
            for a in ("num_features", "num_channels", "num_parameters")
            if hasattr(module, a)
        ]
        expected = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
    found = {key: getattr(module, key, None) for key in expected}
    return [
        f"{name}.{key} is {list(value.shape)} and should be {list(expected[key])}"
        for key, value in found.items()
        if isinstance(value, Tensor) and tuple(value.shape) != expected[key]
    ]


def _other_model(path: Path, problems: list[str]) -> ModelError:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ModelError(
        f"the factory builds another model than the one of {path}: {', '.join(problems[:_SHOWN])}{more}",
        hint="give the factory that was deployed",
    )
