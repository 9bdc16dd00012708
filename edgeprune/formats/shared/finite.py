"""Values without end inside a net: INT8 has no range for them, so they are refused by the name of what makes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import FormatError

if TYPE_CHECKING:
    from torch import nn

LOOKED_AT = 8  # samples that are run once more to find the operator


def require_finite(
    ends: Mapping[str, tuple[float, float]],
    makers: Mapping[str, tuple[str, str, tuple[str, ...]]],
) -> None:
    """Raise unless the values of every tensor of a file have an end.

    Args:
        ends: smallest and largest value of each tensor.
        makers: operator type, torch layer and inputs of each tensor that an operator writes, in the order of the file.

    Raises:
        FormatError: they have not; names the operator of the first such tensor, and its layer.
    """
    wrong = {name for name, pair in ends.items() if not np.isfinite(pair).all()}
    if wrong:
        first = next((name for name in makers if name in wrong), min(wrong))
        operator, layer, _ = makers.get(first, (first, "", ()))
        raise unbounded(operator, layer)


def unbounded(operator: str, layer: str) -> FormatError:
    """The error of an operator that makes NaN or Inf; ``layer`` is ``""`` for the model's own ``forward``."""
    return FormatError(
        f"INT8 needs values with an end, but {operator} of {layer or 'the model itself'} gives NaN or Inf"
        " for the calibration samples",
        hint="bound the values there; a mask may hold a number just below all scores in place of -inf",
    )


def require_bounded(prepared: nn.Module) -> None:
    """Raise unless all that the observers of torch in a calibrated module saw has an end; one that keeps no extremes is not asked.

    Raises:
        ArithmeticError: it has not; :func:`explained` finds the operator.
    """
    import torch

    for module in prepared.modules():
        low, high = getattr(module, "min_val", None), getattr(module, "max_val", None)
        if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor):
            # One that saw nothing has its ends the other way round: from Inf to -Inf.
            endless = low.isnan() | high.isnan() | (low == -torch.inf) | (high == torch.inf)
            if bool(endless.any()):
                raise ArithmeticError("a value is NaN or Inf")


def explained(error: FormatError, model: nn.Module, samples: np.ndarray) -> FormatError:
    """The error of the first operator of a torch model that makes NaN or Inf of some samples; ``error`` where none does.

    Args:
        error: what a toolchain said.
        model: any torch module, traced or not.
        samples: ``float32 [N, ...]``; a few are run.
    """
    import torch

    found: list[Any] = []

    class FiniteWatch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            """The value of a node, which is noted where it has no end."""
            value = super().run_node(n)
            is_value = n.op == "call_function" and isinstance(value, torch.Tensor)
            if is_value and not bool(torch.isfinite(value).all()):
                found.append(n)
            return value

    x = [torch.from_numpy(samples[i : i + 1]) for i in range(min(len(samples), LOOKED_AT))]
    try:
        with torch.no_grad():
            program = torch.export.export(copy.deepcopy(model).eval(), (x[0],), strict=False)
            watch = FiniteWatch(program.module(check_guards=False))
            for sample in x:
                watch.run(sample)
    except Exception:  # an error is being explained; failing to is no further error
        return error
    if not found:
        return error
    stack = list(found[0].meta.get("nn_module_stack", {}).values())
    return unbounded(str(found[0].target), str(stack[-1][0]) if stack else "")
