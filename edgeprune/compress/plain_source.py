"""A model as plain PyTorch source that needs neither the user's code nor edgeprune: its layers, and its forward pass as traced."""

from __future__ import annotations

import ast
import operator
import re
import types
from typing import Any

import torch
from torch import fx, nn

from edgeprune.compress.groups.surgery import Removed
from edgeprune.errors import ModelError
from edgeprune.workload.factories import one_line
from edgeprune.workload.modes import can_train

_TEMPLATE = '''"""{title}

Written by edgeprune from a trace in eval mode: layers that act otherwise in training (dropout as a function, say) are fixed as they are in
use. The weights are those of the file beside it:

    model.load_state_dict(safetensors.torch.load_file("pruned.safetensors"))
"""

{imports}


class Pruned(nn.Module):
    """The model."""

    def __init__(self) -> None:
        super().__init__()
{layers}

    def _put(self, path, value):
        """Set a layer, parameter or buffer at a dotted path."""
        owner = self
        *folders, name = path.split(".")
        for folder in folders:
            if not hasattr(owner, folder):
                owner.add_module(folder, nn.Module())
            owner = getattr(owner, folder)
        if isinstance(value, nn.Module):
            owner.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)

{forward}


def build():
    """The model, without its weights, in eval mode."""
    return Pruned().eval()
'''
_SUMS = (operator.add, operator.iadd, torch.add)
_BUILTINS = {"abs", "float", "getattr", "int", "len", "max", "min", "slice", "sum"}
_WORDS = re.compile(r"(?<==)(same|valid)(?=[,)])")  # torch prints padding=same without quotes


def model_source(model: nn.Module, title: str) -> str:
    """Source of a module whose ``build()`` makes the same network, with the same names in its state dict.

    Args:
        model: in eval mode; layers of ``torch.nn``, however nested, and functions of torch between them.
        title: the first line of the module's docstring.

    Raises:
        ModelError: the model cannot be traced, or has a layer that plain source cannot state; names it.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's forward may raise anything under a tracer
        raise ModelError(f"the model cannot be written as source: {one_line(error)}") from error
    _drop_removed(graph, model)
    for node in graph.nodes:
        node.type = None  # an annotation may name what only the user's code has
    lines = [f"        self._put({name!r}, {value})" for name, value in _parts(model, graph)]
    code = graph.python_code("self")
    body = re.sub(r"\n+$", "", code.src.strip("\n"))
    forward = "\n".join(f"    {line}" if line.strip() else "" for line in body.splitlines())
    return _TEMPLATE.format(
        title=title.replace("\\", "/").replace('"', "'"),
        imports="\n".join(_imports(code.globals)),
        layers="\n".join(lines) or "        pass",
        forward=forward,
    )


class _Tracer(fx.Tracer):
    """Keeps what stands for removed layers in one piece."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is not looked into."""
        return isinstance(m, Removed) or super().is_leaf_module(m, module_qualified_name)


def _drop_removed(graph: fx.Graph, model: nn.Module) -> None:
    """Take removed blocks out of the traced graph: ``x + removed`` is ``x``, and what only led there goes."""
    modules = dict(model.named_modules())
    dead = [n for n in graph.nodes if isinstance(modules.get(str(n.target)), Removed)]
    dead = [node for node in dead if node.op == "call_module"]
    for node in dead:
        for user in list(node.users):
            others = [a for a in user.args if a is not node]
            if (
                user.target in _SUMS
                and len(user.args) == 2
                and len(others) == 1
                and not user.kwargs
            ):
                assert isinstance(others[0], fx.Node)
                user.replace_all_uses_with(others[0])
                graph.erase_node(user)
    led = set(dead)
    for node in graph.nodes:
        if any(given in led for given in node.all_input_nodes):
            led.add(node)
    for node in reversed(list(graph.nodes)):
        if node in led and not node.users:
            graph.erase_node(node)
            led.discard(node)
    for node in led.intersection(dead):  # a layer that the block's sum does not read directly
        node.op, node.target = "call_function", torch.zeros_like
        node.args = node.args[:1]


def _parts(model: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """What the forward pass uses, each once: dotted names, and the expressions that make them."""
    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), _layer(str(node.target), modules[str(node.target)]))
        elif node.op == "get_attr":
            found.setdefault(str(node.target), _tensor(model, str(node.target)))
    # What no layer of the trace owns and a state dict has all the same must be there too.
    owned = [name for name in found if name in modules]
    for name in model.state_dict():
        if name not in found and not any(name.startswith(f"{owner}.") for owner in owned):
            found[name] = _tensor(model, name)
    return list(found.items())


def _layer(name: str, layer: nn.Module) -> str:
    text = f"nn.{_WORDS.sub(lambda m: repr(m[0]), repr(layer))}"
    is_torch = type(layer).__module__.startswith("torch.nn.") and "\n" not in text
    if is_torch and _shapes(_made(text)) == _shapes(layer):
        return text
    raise ModelError(
        f"the model cannot be written as source: {name} is a {type(layer).__name__}, which plain source cannot state"
    )


def _made(text: str) -> nn.Module | None:
    """The layer that ``nn.Name(literal, key=literal)`` makes, if it makes one."""
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            return None
        values = [ast.literal_eval(value) for value in call.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        made = getattr(nn, call.func.attr)(*values, **named)
    except Exception:  # torch prints some layers in a form of its own, and refuses some values with errors of any type
        return None
    return made if isinstance(made, nn.Module) else None


def _shapes(layer: nn.Module | None) -> dict[str, torch.Size] | None:
    if layer is None:
        return None
    return {name: value.shape for name, value in layer.state_dict().items()}


def _tensor(model: nn.Module, path: str) -> str:
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    shape = tuple(value.shape)
    if isinstance(value, nn.Parameter):
        grad = "" if can_train(value) else ", requires_grad=False"
        return f"nn.Parameter(torch.zeros({shape}, dtype={value.dtype}){grad})"
    if not isinstance(value, torch.Tensor) or path not in model.state_dict():
        raise ModelError(
            f"the model cannot be written as source: {path} is used and is in no state dict"
        )
    return f"torch.zeros({shape}, dtype={value.dtype})"


def _imports(used: dict[str, Any]) -> list[str]:
    """Import lines for what the traced code names."""
    lines = {"import torch", "from torch import nn"}
    for name, value in used.items():
        if name in ("torch", "inf", "nan", "NoneType", "device", "Tensor", "fx_pytree", "pytree"):
            if name in ("inf", "nan"):
                lines.add(f"from math import {name}")
            elif name in ("device", "Tensor"):
                lines.add(f"from torch import {name}")
            continue
        if isinstance(value, types.ModuleType):
            lines.add(
                f"import {value.__name__} as {name}" if value.__name__ != name else f"import {name}"
            )
            continue
        if name in _BUILTINS and getattr(value, "__module__", "") == "builtins":
            continue
        home, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if (
            own is None
            or home is None
            or not home.startswith(("torch", "_operator", "operator", "math"))
        ):
            raise ModelError(
                f"the model cannot be written as source: it calls {name}, which is no function of torch"
            )
        home = home.removeprefix("_") if home == "_operator" else home
        lines.add(
            f"from {home} import {own} as {name}" if own != name else f"from {home} import {own}"
        )
    return sorted(lines, key=lambda line: (not line.startswith("import"), line))
