"""Weights that INT8 can hold better, in a net that says the same: cross-layer equalisation, and biases that make up for rounding.

Source of the formulas: Nagel, van Baalen, Blankevoort, Welling 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv:1906.04721 (sections 4.1 and 4.2). Notation: ``C`` channels between two layers, ``N`` samples.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.compress.evaluate import run_once
from edgeprune.workload.answers import BATCH, evaluating, logits
from edgeprune.workload.batches import passes
from edgeprune.workload.modes import eval_copy

SAME_OUTPUT = 1e-3  # of the largest output: float32 arithmetic in another order
SWEEPS = 20
SETTLED = 1e-3  # relative change of the scales at which sweeping ends
LARGEST_SCALE = 1e3  # a channel that is nearly dead in one layer must not blow up in the other
WEIGHT_LEVELS = 127
_CONV = ("conv1d", "conv2d")
_KEEPS_SCALE = ("relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "max_pool2d", "alias")


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but a batch norm and a positively homogeneous activation between them; names of modules."""

    first: str
    norm: str
    second: str


def pairs(model: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """All pairs of layers whose channels can be scaled against each other, in order of execution.

    Args:
        model: in eval mode; not changed. One that cannot be exported has none.
        example: one input ``[1, ...]``.
    """
    try:
        program = torch.export.export(eval_copy(model), (example,), strict=False)
    except Exception:  # whatever stops the export: no pairs are known then, and nothing is changed
        return ()
    names = {**program.graph_signature.inputs_to_parameters}
    shared = {n for n, count in Counter(map(id, _by_name(model).values())).items() if count > 1}
    owners: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            path, _, key = names[node.name].rpartition(".")
            single = len(node.users) == 1 and id(_by_name(model)[names[node.name]]) not in shared
            if single and key == "weight":
                owners[node.name] = path
    modules, found = dict(model.named_modules()), []
    for node in program.graph.nodes:
        first = _layer(node, owners)
        if first is None:
            continue
        norm, at = "", node
        while len(at.users) == 1:
            at = next(iter(at.users))
            kind = _kind(at)
            second = _layer(at, owners)
            if second is not None:
                if _fit(modules[first], modules[second]):
                    found.append(Pair(first, norm, second))
                break
            if kind == "batch_norm" and not norm and at.args[1] in program.graph.nodes:
                norm = owners.get(str(at.args[1]), "")
                if not norm:
                    break
            elif kind not in _KEEPS_SCALE:
                break
    return tuple(found)


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _kind(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _layer(node: torch.fx.Node, owners: Mapping[str, str]) -> str | None:
    """The module of a convolution or linear layer whose weights nothing else reads."""
    if node.op != "call_function" or _kind(node) not in (*_CONV, "linear"):
        return None
    return owners.get(str(node.args[1]))


def _fit(first: nn.Module, second: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    if not isinstance(first, kinds) or not isinstance(second, kinds):
        return False
    return _outputs(first) == _inputs(second) and _groups(second) in (1, _inputs(second))


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _inputs(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def _reads(layer: nn.Module) -> Tensor:
    """Largest weight that each input channel meets, ``[C]``."""
    weight: Tensor = layer.weight.detach().abs()  # type: ignore[operator]
    if _groups(layer) == 1:
        return weight.transpose(0, 1).flatten(1).amax(1)
    per_output = weight.flatten(1).amax(1)  # depthwise: consecutive outputs of one input channel
    return per_output.reshape(_inputs(layer), -1).amax(1)


def equalise(model: nn.Module, example: Tensor, x: Tensor) -> tuple[nn.Module, str]:
    """The model with the channels of all pairs scaled so that both layers have equal ranges, and one line on what was done.

    Channel ``i`` of the first layer is divided, and in the second multiplied, by ``s_i = sqrt(r1_i r2_i) / r2_i`` with the ranges
    ``r`` of its weights in either layer (equation 11 of the source). A batch norm in between takes the division.

    Args:
        model: in eval mode; not changed.
        example: one input ``[1, ...]``.
        x: inputs ``[N, ...]`` on which both models must say the same.

    Returns:
        A new model; an exact copy where there are no pairs, or where the outputs would change.
    """
    original = eval_copy(model)
    found = pairs(original, example)
    if not found:
        return original, "no pair of layers can be equalised"
    scaled = copy.deepcopy(original)
    modules = dict(scaled.named_modules())
    for _ in range(SWEEPS):
        change = max(_balance(modules, pair) for pair in found)
        if change < SETTLED:
            break
    expected, says = logits(original, x), logits(scaled, x)
    error = float((expected - says).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error <= SAME_OUTPUT:
        return original, f"equalisation left out: outputs would change by {error:.2g}"
    return scaled, f"{len(found)} pairs of layers equalised"


@torch.no_grad()
def _balance(modules: Mapping[str, nn.Module], pair: Pair) -> float:
    """Scale one pair; the largest relative change."""
    first, second = modules[pair.first], modules[pair.second]
    weight: Tensor = first.weight  # type: ignore[assignment]
    r1 = weight.abs().flatten(1).amax(1)
    norm = modules[pair.norm] if pair.norm else None
    if norm is not None:
        r1 = r1 * (norm.weight.abs() / (norm.running_var + norm.eps).sqrt())  # type: ignore[operator]
    r2 = _reads(second)
    scale = torch.where((r1 > 0) & (r2 > 0), (r1 / r2.clamp_min(1e-30)).sqrt(), torch.ones_like(r1))
    scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    target = first if norm is None else norm
    for key in ("weight", "bias"):
        value = getattr(target, key)
        if value is not None:
            value.div_(scale.reshape(-1, *[1] * (value.ndim - 1)))
    reader: Tensor = second.weight  # type: ignore[assignment]
    if _groups(second) == 1:
        reader.mul_(scale.reshape(1, -1, *[1] * (reader.ndim - 2)))
    else:
        per_output = scale.repeat_interleave(_outputs(second) // _inputs(second))
        reader.mul_(per_output.reshape(-1, *[1] * (reader.ndim - 1)))
    return float((scale - 1).abs().max())


def rounded(weight: Tensor) -> Tensor:
    """Weights as INT8 keeps them: symmetric, one scale for each output channel (the first dimension)."""
    largest = weight.abs().flatten(1).amax(1).clamp_min(1e-12)
    step = (largest / WEIGHT_LEVELS).reshape(-1, *[1] * (weight.ndim - 1))
    return (weight / step).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS) * step


def correct_biases(model: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    """The model with biases that take back what rounding the weights adds to the mean of each output channel.

    ``E[W' x] - E[W x]`` is taken over real inputs (the empirical form of the source, appendix D), layer after layer, so that a layer
    sees what the layers before it really give. Layers without a bias, transposed and shared ones are left alone; a batch norm behind a
    layer takes the correction in its running mean.

    Args:
        model: in eval mode; not changed.
        x: real inputs ``[N, ...]``.
    """
    corrected = eval_copy(model)
    quantised = copy.deepcopy(corrected)
    changed = 0
    wanted = _means(corrected, x)
    counts = Counter(id(layer.weight) for _, layer in _layers(quantised))
    for name, layer in _layers(quantised):
        if counts[id(layer.weight)] > 1 or name not in wanted:
            continue
        places = [_constant_of(m, name, x[:1]) for m in (corrected, quantised)]
        with torch.no_grad():
            layer.weight.copy_(rounded(layer.weight.detach()))  # type: ignore[operator]
        shift = _means(quantised, x, only=name)[name] - wanted[name]
        for place in places:
            if place is not None:
                constant, is_subtracted = place
                constant.data.add_(shift if is_subtracted else -shift)
        changed += places[0] is not None
    return corrected, f"the biases of {changed} layers corrected"


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]


def _constant_of(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, bool] | None:
    """The tensor that shifts a layer's output, and whether it is subtracted: its bias, or the running mean of its batch norm."""
    layer = model.get_submodule(name)
    bias = layer.bias
    if isinstance(bias, Tensor):
        return bias, False
    outputs: list[int] = []
    kept: list[Tensor] = []
    takers: list[nn.Module] = []

    def ran(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(id(output))
        kept.append(output)

    def taken(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in outputs:
            takers.append(module)

    handles = [layer.register_forward_hook(ran)]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles += [norm.register_forward_pre_hook(taken) for norm in norms]
    run_once(model, x, handles)
    if len(outputs) != 1 or len(takers) != 1:
        return None
    mean = takers[0].running_mean
    return (mean, True) if isinstance(mean, Tensor) else None


def _means(model: nn.Module, x: Tensor, only: str | None = None) -> dict[str, Tensor]:
    """Mean output of each channel, ``[C]``, of the layers that run once."""
    sums: dict[str, list[Tensor]] = {}  # of every run
    counts: Counter[str] = Counter()  # of values in a channel

    def ran(name: str, output: Tensor, is_linear: bool) -> None:
        channel = output.ndim - 1 if is_linear else 1
        mean = output.mean([d for d in range(output.ndim) if d != channel]).double()
        count = output.numel() // len(mean)
        sums.setdefault(name, []).append(mean * count)
        counts[name] += count

    handles = [
        layer.register_forward_hook(
            lambda m, __, out, at=name: ran(at, out, isinstance(m, nn.Linear))
        )
        for name, layer in _layers(model)
        if (only is None or name == only)
    ]
    parts = [*passes(x, BATCH)]
    try:
        with evaluating(model), torch.no_grad():
            for part in parts:
                model(x[part])
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (torch.stack(found).sum(0) / counts[name]).float()
        for name, found in sums.items()
        if len(found) == len(parts)
    }
