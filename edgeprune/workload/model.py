"""The model side of intake: weights files, masks of earlier pruning, and checks; on a copy, never on the user's model."""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgeprune.errors import ModelError
from edgeprune.workload.factories import one_line
from edgeprune.workload.modes import on_device, settle

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile put these before every name
_SHOWN = 4

State = dict[str, torch.Tensor]


def read_weights(path: Path) -> State:
    """The state dict in a ``.safetensors`` file, or in a file that ``torch.save`` wrote; no code in it is run.

    A wrapping ``{"state_dict": ...}`` is opened and the prefixes of DataParallel and torch.compile are taken off.

    Raises:
        ModelError: the file is truncated, holds code or anything but named tensors.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f"{path} must hold a state dict of named tensors, but holds {type(content).__name__}"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{path} must hold named tensors only, but {name!r} is {type(value).__name__}",
                hint="save model.state_dict() alone",
            )
    return _without_prefix(dict(content))


def _read_safetensors(path: Path) -> State:
    from safetensors.torch import load_file

    try:
        loaded: State = load_file(path)
    except Exception as error:  # the library leaves unknown types and sizes to Python and torch
        raise ModelError(
            f"{path} is not a whole safetensors file: {one_line(error)}", hint="copy it again"
        ) from error
    return loaded


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # About old pickle protocols and TorchScript.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        needs = f" (it wants {named[1]})" if named else ""
        raise ModelError(
            f"{path} holds Python code or objects{needs}, not only weights, and is refused: nothing of it was run",
            hint="where it was trained, run torch.save(model.state_dict(), 'weights.pt')",
        ) from error
    except Exception as error:  # torch.load raises many kinds for damaged files
        if "TorchScript" in str(error):
            raise ModelError(
                f"{path} is a TorchScript archive, whose layers cannot be pruned",
                hint="save the Python model's state_dict() instead",
            ) from error
        raise ModelError(
            f"{path} is truncated, or not a weights file: {one_line(error)}", hint="copy it again"
        ) from error


def _without_prefix(state: State) -> State:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefix({n.removeprefix(prefix): t for n, t in state.items()})
    return state


def prepare(
    model: nn.Module, state: State | None, *, where: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """A plain copy of a model: eval mode, float32, on the CPU, weights loaded, masks of earlier pruning multiplied in.

    Args:
        model: the user's; not changed.
        state: weights to load, or ``None`` to keep the model's own.
        where: what errors call the weights.

    Returns:
        The copy, and notes on what was changed on the way in.

    Raises:
        ModelError: names or shapes of the weights do not fit, or a weight is NaN or Inf.
    """
    notes: list[str] = []
    ready = _copy(_unwrapped(model))
    _require_materialised(ready)
    if state is not None and set(state) != set(ready.state_dict()):
        _fold_modules(ready)
        state, folded = fold_masks(state)
        notes += (
            [f"pruning masks in the weights file folded into {folded} tensors"] if folded else []
        )
    if state is not None:
        _load(ready, state, where)
    folded = _fold_modules(ready)
    notes += (
        [f"pruning masks and reparametrisations folded into {folded} tensors"] if folded else []
    )
    types = sorted({str(t.dtype) for t in ready.state_dict().values() if t.is_floating_point()})
    if types not in ([], ["torch.float32"]):
        notes.append(f"weights converted from {', '.join(types)} to float32")
    ready = on_device(ready, torch.device("cpu"))
    if left := settle(ready):
        notes.append(
            f"its eval() leaves {_some(list(left))} in training mode; here all is in eval mode"
        )
    _require_finite(ready, where)
    return ready, tuple(notes)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of data-parallel training and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _copy(model: nn.Module) -> nn.Module:
    # torch.nn.utils.prune and weight_norm leave computed tensors on the module, which deepcopy refuses: give it ready copies.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # a module may hold anything, such as an open file
        raise ModelError(
            f"the model {type(model).__name__} cannot be copied: {one_line(error)}",
            hint="keep loggers, files and trainers out of the module",
        ) from error


def _require_materialised(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f"the model's tensor {name!r} has no values yet",
                hint="run one batch through lazy layers in the factory, and build on the cpu device",
            )


def fold_masks(state: State) -> tuple[State, int]:
    """A state dict whose ``<name>_orig`` and ``<name>_mask`` pairs (torch.nn.utils.prune) are their product, and how many were."""
    bases = [n.removesuffix("_orig") for n in state if n.endswith("_orig")]
    masked = {b for b in bases if f"{b}_mask" in state}
    folded: State = {}
    for name, tensor in state.items():
        base = name.removesuffix("_orig").removesuffix("_mask")
        if base not in masked or name == base:
            folded[name] = tensor
        elif name.endswith("_orig"):
            folded[base] = tensor * state[f"{base}_mask"].to(tensor.dtype)
    return folded, len(masked)


def _fold_modules(model: nn.Module) -> int:
    """How many tensors of our copy had prune hooks, parametrisations or hook-style norms; they are plain parameters now."""
    count = 0
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
                count += 1
            elif isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
                count += 1
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
                count += 1
        if parametrize.is_parametrized(module):
            _own_class(module)
            for name in list(getattr(module, "parametrizations", {})):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                count += 1
    return count


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own.

    torch makes such a class for each module, but a deep copy shares it, and removing the copy's parametrisation deletes the
    property from it: the user's model would lose its weight.
    """
    shared = type(module)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def _load(model: nn.Module, state: State, where: str) -> None:
    own = model.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)} in the file but {list(own[name].shape)} in the model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if wrong:
        raise ModelError(
            f"weights of {where} must fit the model, but {_some(wrong)}",
            hint="check that the factory builds the same net",
        )
    found: Any = model.load_state_dict(state, strict=False)
    if found is None:  # a model's own version may return nothing
        found = (set(own) - set(state), set(state) - set(own))
    missing, unexpected = map(sorted, found)
    # Files older than the counter of batch norm do not have it; it does not take part in inference.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    problems = [f"lacks {name} {list(own[name].shape)}" for name in missing]
    problems += [f"has {name} {list(state[name].shape)} besides" for name in unexpected]
    if problems:
        raise ModelError(
            f"weights of {where} must have exactly the model's tensors, but the file {_some(problems)}",
            hint="check that the factory builds the same net",
        )


def _some(problems: list[str]) -> str:
    more = len(problems) - _SHOWN
    return ", ".join(problems[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _require_finite(model: nn.Module, where: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"weights must be finite, but {name} of {where} has {bad} NaN or Inf values"
            )


def dead_channels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Output channels of convolutions and linear layers whose weights and bias are all exactly zero, by layer name."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        filters = _by_output(module)
        zero = (filters == 0).all(dim=1)
        if module.bias is not None:
            zero &= module.bias == 0
        if bool(zero.any()):
            found[name] = tuple(int(i) for i in zero.nonzero().flatten())
    return found


def _by_output(module: nn.Module) -> torch.Tensor:
    """Weights as ``[output channels, weights of one]``."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # stored [in, out / groups, ...]; the outputs of one group see only its inputs
        per_group = weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return per_group.reshape(module.out_channels, -1)
    return weight.reshape(len(weight), -1)


def digest(model: nn.Module, source: str) -> str:
    """SHA-256 over the names, types, shapes and bytes of every tensor, and over the code's text or digest."""
    total = hashlib.sha256(source.encode())
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        total.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return total.hexdigest()
