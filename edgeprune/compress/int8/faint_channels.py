"""Channels too faint for INT8: given just enough signal that the integer kernels accept them and keep their constants.

An INT8 kernel adds the bias as a 32-bit integer in steps of (input scale x weight scale of the channel). Where the weights of a channel
are nearly zero, so is the step, the bias overflows, and the channel's constant is lost without a word. Where all channels of a layer are
silent, the scale of its output is nearly zero, and the kernels with a fused ReLU6 refuse the file
(``no_integer_overflow_from_quantization``). Both were seen with ai-edge-quantizer 0.10.0 and the built-in kernels of ai-edge-litert 2.3.0.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from edgeprune.compress.groups.coupling import WEIGHTED, moves_whole_groups
from edgeprune.compress.groups.find import find_groups
from edgeprune.compress.groups.masked import SAME_OUTPUT, InputRange, filter_of, record_inputs
from edgeprune.compress.groups.surgery import ChannelGroup, weights_by_input
from edgeprune.errors import ModelError
from edgeprune.workload.answers import evaluating, logits
from edgeprune.workload.modes import eval_copy

# |bias| / (input scale * weight scale) has to stay below 2^31; half of it leaves room for other calibration samples.
LARGEST_BIAS_STEPS = 2.0**30
LEVELS = 255 * 127  # steps of an 8-bit input times those of a symmetric 8-bit weight
MARGIN = 1.5  # so that a channel that was helped once needs no help again
# Below this range 6 / scale does not fit 32 bits (7e-7), or a bias of 1 behind weights of 1 does not (3e-5).
SILENT_RANGE = 1e-4
SIGNAL = 1.0  # what a stand-in channel says in a layer that is silent as a whole


@dataclass(frozen=True)
class _Unit:
    """A convolution or linear layer and, where there is one, the batch norm that its output goes to."""

    layer: nn.Module
    norm: _BatchNorm | None


def rescue_silent(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with weights that survive INT8, saying the same in floating point.

    Call it right before quantisation. Where a filter is too faint for its channel's bias, one of its weights is raised to the smallest
    value that fits, and the bias takes back what that adds (what is left is below 1e-4 of the bias). Where a layer is silent as a whole,
    one channel, whose readers are set to zero, says a constant. Transposed convolutions are left alone.

    Args:
        model: in eval mode; not changed.
        x: calibration inputs ``[N, ...]``.

    Returns:
        A new model and notes; for a model without such channels an exact copy and no notes. Calling it again changes nothing.
    """
    original = eval_copy(model)
    helped = copy.deepcopy(original)
    units = _units(helped, x[:2])
    ranges = _ranges(helped, units, x)
    notes = _speak_up(helped, units, ranges, x)
    if notes:
        ranges = _ranges(helped, units, x)
    for name, unit in units.items():
        count = _raise_filters(unit, ranges[name])
        if count:
            notes.append(f"{name}: {count} filters too faint for INT8 were raised to what fits")
    if not notes:
        return original, ()
    expected, found = logits(original, x), logits(helped, x)
    difference = float((expected - found).abs().max())
    if not difference <= SAME_OUTPUT * float(expected.abs().max()):
        return original, (
            f"channels too faint for INT8 stay: raising them would change the outputs by {difference:.2g}",
        )
    return helped, tuple(notes)


def _units(model: nn.Module, x: torch.Tensor) -> dict[str, _Unit]:
    """Every layer that runs, in order, with the batch norm that takes its output, if both run once."""
    outputs: dict[str, torch.Tensor] = {}
    takers: dict[int, list[nn.Module]] = {}
    runs: dict[str, int] = {}

    def ran(name: str, output: torch.Tensor) -> None:
        outputs[name] = output
        runs[name] = runs.get(name, 0) + 1

    handles = []
    norm_runs: dict[nn.Module, int] = {}

    def taken(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        takers.setdefault(id(args[0]), []).append(module)
        norm_runs[module] = norm_runs.get(module, 0) + 1

    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and not isinstance(module, _ConvTransposeNd):
            handles.append(module.register_forward_hook(lambda _, __, out, at=name: ran(at, out)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(taken))
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    layers = dict(model.named_modules())
    units = {}
    for name, output in outputs.items():
        # Outputs are alive until here, so an id names one tensor.
        norms = takers.get(id(output), [])
        single = len(norms) == 1 and runs[name] == 1 and norm_runs[norms[0]] == 1
        norm = norms[0] if single and _is_plain(norms[0]) else None
        if not norms or norm is not None:
            units[name] = _Unit(layers[name], norm if isinstance(norm, _BatchNorm) else None)
    return units


def norms_behind(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """For each layer whose output only one batch norm takes, both running once: the name of that batch norm."""
    names = {id(module): name for name, module in model.named_modules()}
    return {n: names[id(u.norm)] for n, u in _units(model, x).items() if u.norm is not None}


def _is_plain(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and norm.affine and norm.running_var is not None


def _raise_filters(unit: _Unit, given: InputRange) -> int:
    """Raise one weight of each filter that is too faint for its bias; how many were."""
    assert given.low is not None
    assert given.high is not None
    span = float(given.high.max().clamp(min=0) - given.low.min().clamp(max=0))
    if span == 0:
        return 0
    scale, constant = _folded(unit)
    strongest = _strongest(unit.layer).double() * scale.abs()
    needed = constant.abs() * LEVELS / (LARGEST_BIAS_STEPS * span)
    faint = [int(i) for i in (strongest < needed).nonzero().flatten()]
    middle = (given.high.double() + given.low.double()) / 2
    with torch.no_grad():
        for index in faint:
            _unfold(unit, index, float(scale[index]), float(constant[index]))
            weights = filter_of(unit.layer, index)
            centre = weights
            for size in weights.shape[1:]:
                centre = centre.select(1, size // 2)
            # One that is not zero, where there is one: zeros may be of a pattern that an accelerator makes use of.
            place = int((centre != 0).int().argmax())
            before = float(centre[place])
            centre[place] = MARGIN * float(needed[index])
            inputs = weights_by_input(unit.layer).shape[2]
            outputs = len(scale) // (int(middle.numel()) // inputs)
            read = index // outputs * inputs + place
            added = (float(centre[place]) - before) * float(middle[read])
            _set_constant(unit, index, float(constant[index]) - added)
    return len(faint)


def _strongest(layer: nn.Module) -> torch.Tensor:
    """Largest absolute weight of each output channel."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().flatten(1).abs().amax(1)


def _folded(unit: _Unit) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor on the weights and the constant of each output channel, the batch norm being folded in; ``float64 [C]``."""
    strongest = _strongest(unit.layer)
    bias = unit.layer.bias
    own = bias.detach().double() if isinstance(bias, torch.Tensor) else strongest.double() * 0
    norm = unit.norm
    if norm is None:
        return torch.ones_like(own), own
    assert norm.running_mean is not None
    scale = norm.weight.detach().double() / _deviation(norm)
    return scale, (own - norm.running_mean.double()) * scale + norm.bias.detach().double()


def _deviation(norm: _BatchNorm) -> torch.Tensor:
    assert norm.running_var is not None
    return (norm.running_var.double() + norm.eps).sqrt()


def _unfold(unit: _Unit, index: int, scale: float, constant: float) -> None:
    """Move what the batch norm does to one channel into the filter, so that the norm only adds the constant."""
    if unit.norm is None:
        return
    assert unit.norm.running_mean is not None
    filter_of(unit.layer, index).mul_(scale)
    if isinstance(unit.layer.bias, torch.Tensor):
        unit.layer.bias[index] = 0
    unit.norm.weight[index] = float(_deviation(unit.norm)[index])
    unit.norm.running_mean[index] = 0
    unit.norm.bias[index] = constant


def _set_constant(unit: _Unit, index: int, constant: float) -> None:
    """Set what a channel adds; its norm, if any, has been unfolded."""
    if unit.norm is not None:
        unit.norm.bias[index] = constant
    elif isinstance(unit.layer.bias, torch.Tensor):
        unit.layer.bias[index] = constant


def _ranges(model: nn.Module, units: Mapping[str, _Unit], x: torch.Tensor) -> dict[str, InputRange]:
    """What every unit's layer is given."""
    ranges = {name: InputRange() for name in units}
    record_inputs(model, x, ranges)
    return ranges


def _speak_up(
    model: nn.Module,
    units: Mapping[str, _Unit],
    ranges: Mapping[str, InputRange],
    x: torch.Tensor,
) -> list[str]:
    """Give each group of channels that is silent as a whole one channel with a constant that nobody listens to."""
    layers = dict(model.named_modules())
    silent = {
        name
        for name, found in ranges.items()
        if found.low is not None
        and found.high is not None
        and float(torch.maximum(found.high.abs(), found.low.abs()).max()) < SILENT_RANGE
    }
    if not silent:
        return []
    try:
        groups, _ = find_groups(model, x[:1])
    except ModelError:
        groups = ()
    notes = []
    for group in groups:
        if _stand_in(group, silent, units, layers):
            notes.append(f"{group.name}: silent as a whole; one channel got a constant for INT8")
    return notes


def _stand_in(
    group: ChannelGroup,
    silent: set[str],
    units: Mapping[str, _Unit],
    layers: Mapping[str, nn.Module],
) -> bool:
    """Let channel 0 of a silent group say a constant, and make deaf to it whoever heard nothing; whether anything was done.

    Channels go from the writers through depthwise layers, if any, to the consumers: each of these two hops may be silent on its own.
    """
    own = {c.layer: c.indices[0] for c in group.couplings if c.side == "out"}
    own = {name: i for name, i in own.items() if isinstance(layers.get(name), WEIGHTED)}
    if not all(name in units and _can_say(units[name]) for name in own):
        return False
    between = [name for name in own if moves_whole_groups(layers[name])]
    writers = [name for name in own if name not in between]
    unheard = all(c.layer in silent for c in group.consumers())
    first_hop = set(between) <= silent if between else unheard
    with torch.no_grad():
        for name in writers if first_hop else ():
            _say(units[name], own[name], SIGNAL)
        for name in between:
            if unheard:
                _say(units[name], own[name], SIGNAL)
            elif first_hop:
                _say(units[name], own[name], None)
        for coupling in group.consumers() if unheard else ():
            weights = weights_by_input(layers[coupling.layer])
            for index in coupling.indices[0]:
                weights[index // weights.shape[2], :, index % weights.shape[2]] = 0
    return first_hop or unheard


def _can_say(unit: _Unit) -> bool:
    return unit.norm is not None or isinstance(unit.layer.bias, torch.Tensor)


def _say(unit: _Unit, indices: Sequence[int], constant: float | None) -> None:
    """Make channels deaf; they say ``constant``, or what they add already."""
    _, present = _folded(unit)
    for index in indices:
        filter_of(unit.layer, index).zero_()
        said = float(present[index]) if constant is None else constant
        _unfold(unit, index, 0.0, said)
        _set_constant(unit, index, said)
