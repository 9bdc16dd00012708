"""Whole nets from kernel tables: prediction, correction, sampling, and the widths that pay."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from kernel_points import probe_points

from edgeprune.errors import SpecError
from edgeprune.formats import Kernel
from edgeprune.plan.latency import call_overhead, weight_traffic
from edgeprune.plan.latency.correct import TimedNet, correct, evaluate
from edgeprune.plan.latency.model import Factor, LatencyModel, sample_nets
from edgeprune.plan.latency.table import KernelTable, LatencyTable, tabulate
from edgeprune.plan.measured import MeasuredTable
from edgeprune.plan.net_model import kernel_model

GRIDS = {
    "stem": (8, 16, 24, 32),
    "inner": tuple(range(16, 97, 8)),
    "late": tuple(range(16, 129, 8)),
}


@dataclass(frozen=True)
class Shape:
    signature: str
    op: str
    variables: tuple[str, ...]


KERNELS = (
    Shape("first", "CONV_2D", ("stem",)),
    Shape("conv", "CONV_2D", ("stem", "inner")),
    Shape("dw", "DEPTHWISE", ("inner",)),
    Shape("conv2", "CONV_2D", ("inner", "late")),
    # Between two places of one residual stage: both sides have its width.
    Shape("square", "CONV_2D", ("late",)),
    Shape("end", "SOFTMAX", ()),
)
COSTS: dict[str, Callable[..., float]] = {
    "first": lambda w: 9e4 + 3000.0 * w,
    "conv": lambda i, o: 2e4 + 120.0 * i * o,
    "dw": lambda w: 1e4 + 2500.0 * w,
    "conv2": lambda i, o: 2e4 + 80.0 * i * o,
    "square": lambda w: 3e4 + 25.0 * w * w,
    "end": lambda: 1e5,
}


def kernels_ms(widths: Mapping[str, int], scales: Mapping[str, float] | None = None) -> float:
    """The sum of the kernels, written out."""
    return sum(
        (scales or {}).get(k.op, 1.0) * COSTS[k.signature](*(widths[v] for v in k.variables)) / 1e6
        for k in KERNELS
    )


class Net:
    """A file of these kernels, whose weights weigh nothing."""

    kernels = tuple(
        Kernel(i, k.signature, k.op, "", k.signature, k.variables, (), ())
        for i, k in enumerate(KERNELS)
    )
    blocks: Mapping[str, frozenset[int]] = {}

    def resized(self, widths: Mapping[str, int]) -> bytes:
        return b""

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        return b""


def dense_net(grids: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: grid[-1] for name, grid in grids.items()}


def smallest_net(grids: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: grid[0] for name, grid in grids.items()}


def table_of(kernel: Shape) -> KernelTable:
    grids = [GRIDS[name] for name in kernel.variables]
    sides = ",".join(str(grid[-1]) for grid in grids)
    points = {p: COSTS[kernel.signature](*p) for p in probe_points(grids, seed=0)}
    return tabulate(f"{kernel.signature}@{sides}", kernel.op, grids, points)


def model() -> LatencyModel:
    table = LatencyTable(
        fingerprint_key="pi",
        precision="fp32",
        format="tflite",
        kernels=tuple(map(table_of, KERNELS)),
    )
    measured = MeasuredTable(table=table, grids=GRIDS, staircases={}, kernels_measured=0)
    return kernel_model(Net(), measured, dense_net(GRIDS))


def timed(
    truth: Callable[[Mapping[str, int]], float], count: int, seed: int, noise: float = 0.0
) -> list[TimedNet]:
    draw = random.Random(seed)
    nets = [dense_net(GRIDS), smallest_net(GRIDS), *sample_nets(GRIDS, count, seed)]
    return [TimedNet(net, truth(net) * (1 + draw.gauss(0, noise))) for net in nets]


def test_the_prediction_is_the_sum_of_the_kernels_at_every_structure() -> None:
    built = model()
    for net in sample_nets(GRIDS, 30, seed=1):
        assert built.predict(net) == pytest.approx(kernels_ms(net), rel=1e-3)
    assert built.predict({}) == pytest.approx(kernels_ms(dense_net(GRIDS)))


def test_merging_for_the_solver_changes_no_prediction() -> None:
    corrected = LatencyModel(
        GRIDS, model().factors, 0.2, 1.3, -0.05, {"CONV_2D": 0.7, "": 2.0, "DEPTHWISE": 3.0}
    )
    constant, factors = corrected.merged()
    assert len({f.variables for f in factors}) == len(factors)
    for net in sample_nets(GRIDS, 10, seed=2):
        place = {name: GRIDS[name].index(width) for name, width in net.items()}
        total = constant + sum(
            float(f.cost_ms[tuple(place[v] for v in f.variables)]) for f in factors
        )
        assert total == pytest.approx(corrected.predict(net))


def test_widths_off_the_grid_and_unknown_groups_are_refused() -> None:
    with pytest.raises(SpecError, match="width 33 of 'inner' is not on the grid"):
        model().predict({"inner": 33})
    with pytest.raises(SpecError, match="no such group"):
        model().predict({"outer": 32})


def test_factors_must_fit_their_grids() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        LatencyModel(GRIDS, (Factor(("stem",), np.zeros(3)),))
    with pytest.raises(ValueError, match="once"):
        LatencyModel(GRIDS, (Factor(("stem", "stem"), np.zeros((4, 4))),))


@pytest.mark.parametrize(("scale", "offset_ms"), [(0.85, 0.3), (1.17, -0.08), (3.0, 0.0)])
def test_ten_noisy_nets_recover_scale_and_offset(scale: float, offset_ms: float) -> None:
    def truth(net: Mapping[str, int]) -> float:
        return scale * kernels_ms(net) + offset_ms

    corrected = correct(model(), timed(truth, 8, seed=3, noise=0.01))
    assert corrected.scale == pytest.approx(scale, rel=0.05)
    assert corrected.offset_ms == pytest.approx(offset_ms, abs=0.05 * truth(dense_net(GRIDS)))
    assert not corrected.class_scales
    assert corrected.bend_per_ms == 0
    mean, worst = evaluate(corrected, timed(truth, 20, seed=4))
    assert mean < 0.01
    assert worst < 0.03
    assert evaluate(model(), timed(truth, 20, seed=4))[0] > 0.05


def test_a_correction_starts_from_the_kernels_whatever_was_there_before() -> None:
    nets = timed(lambda net: 1.4 * kernels_ms(net), 8, seed=3, noise=0.01)
    once = correct(model(), nets)
    twice = correct(correct(correct(model(), nets[:3]), nets), nets)
    assert (twice.scale, twice.offset_ms) == (once.scale, once.offset_ms)


def test_without_nets_nothing_is_corrected() -> None:
    corrected = correct(model(), [])
    assert corrected.scale == pytest.approx(1)
    assert corrected.offset_ms == 0


def test_heavy_nets_pull_the_fit_towards_them() -> None:
    nets = timed(lambda net: 1.2 * kernels_ms(net), 8, seed=3)
    odd = TimedNet(sample_nets(GRIDS, 1, seed=9)[0], 0.0, 1.0)
    odd = odd._replace(ms=1.3 * kernels_ms(odd.widths))
    errors = [
        abs(correct(model(), [*nets, odd._replace(weight=w)]).predict(odd.widths) / odd.ms - 1)
        for w in (1.0, 3.0, 30.0)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("slowed", [2, 5, 9])
@pytest.mark.parametrize("factor", [1.6, 3.0])
def test_one_net_that_something_else_slowed_down_does_not_bend_the_fit(
    slowed: int, factor: float
) -> None:
    def truth(net: Mapping[str, int]) -> float:
        return 1.2 * kernels_ms(net) + 0.1

    nets = timed(truth, 10, seed=3, noise=0.01)
    nets[slowed] = nets[slowed]._replace(ms=nets[slowed].ms * factor)
    mean, worst = evaluate(correct(model(), nets), timed(truth, 20, seed=4))
    assert mean < 0.015
    assert worst < 0.05


def test_kernel_classes_get_their_own_scales_when_one_is_not_enough() -> None:
    scales = {"CONV_2D": 0.8, "DEPTHWISE": 3.0}

    def truth(net: Mapping[str, int]) -> float:
        return kernels_ms(net, scales) + 0.1

    nets = timed(truth, 10, seed=5, noise=0.005)
    corrected = correct(model(), nets)
    ratio = corrected.class_scales["DEPTHWISE"] / corrected.class_scales["CONV_2D"]
    assert ratio == pytest.approx(3.0 / 0.8, rel=0.2)
    assert evaluate(corrected, timed(truth, 20, seed=6))[0] < 0.02


def test_a_large_net_that_is_slower_than_its_parts_gets_a_bend() -> None:
    dense_ms = kernels_ms(dense_net(GRIDS))

    def truth(net: Mapping[str, int]) -> float:
        linear = 0.9 * kernels_ms(net) + 0.02
        return linear + 0.25 / dense_ms * linear**2

    corrected = correct(model(), timed(truth, 10, seed=5, noise=0.005))
    assert corrected.bend_per_ms > 0
    mean, _ = evaluate(corrected, timed(truth, 20, seed=6))
    assert mean < 0.012
    # What the factors add up to is bent in one place, and back.
    constant, factors = corrected.merged()
    total = constant + sum(float(f.cost_ms[(-1,) * len(f.variables)]) for f in factors)
    assert corrected.bent(total) == pytest.approx(corrected.predict({}))
    assert corrected.straightened(corrected.predict({})) == pytest.approx(total)


BYTES = {"conv2": ("inner", "late")}


def megabytes(net: Mapping[str, int]) -> float:
    return sum(36e-6 * net[i] * net[o] for i, o in BYTES.values())


def model_with_bytes() -> LatencyModel:
    plain = model()
    sizes = tuple(
        Factor(
            names,
            36e-6 * np.multiply.outer(*(np.array(GRIDS[n]) for n in names)),
            weight_traffic.OP,
        )
        for names in BYTES.values()
    )
    return replace(plain, factors=(*plain.factors, *sizes), class_scales={weight_traffic.OP: 0.0})


def test_bytes_of_weights_count_nothing_before_whole_nets_show_that_they_do() -> None:
    net = sample_nets(GRIDS, 1, seed=2)[0]
    assert model_with_bytes().predict(net) == model().predict(net)
    assert correct(model_with_bytes(), []).predict(net) == correct(model(), []).predict(net)
    nets = timed(lambda n: 1.2 * kernels_ms(n), 10, seed=5, noise=0.005)
    assert correct(model_with_bytes(), nets).class_scales == {weight_traffic.OP: 0.0}


def test_whole_nets_that_wait_for_their_weights_get_a_cost_for_each_byte() -> None:
    def truth(net: Mapping[str, int]) -> float:
        return 0.5 * kernels_ms(net) + 5.0 * megabytes(net) + 0.05

    nets = timed(truth, 12, seed=5, noise=0.01)
    corrected = correct(model_with_bytes(), nets)
    assert corrected.scale * corrected.class_scales[weight_traffic.OP] > 2.5
    probes = timed(truth, 20, seed=6)
    assert evaluate(corrected, probes)[0] < 0.025
    assert evaluate(correct(model(), nets), probes)[0] > 0.04


CALL_MS = 0.09  # of a kernel alone; a net is called once
REMOVABLE = {**GRIDS, "inner": (0, *GRIDS["inner"])}


def model_with_calls() -> LatencyModel:
    """Every kernel that touches ``inner`` can go with it; each was timed with a call of its own."""

    def alone(kernel: Shape) -> np.ndarray:
        shape = [len(REMOVABLE[v]) for v in kernel.variables]
        points = itertools.product(*(REMOVABLE[v] for v in kernel.variables))
        return np.array(
            [0.0 if 0 in p else COSTS[kernel.signature](*p) / 1e6 + CALL_MS for p in points]
        ).reshape(shape)

    kernels = [k for k in KERNELS if k.variables and len(set(k.variables)) == len(k.variables)]
    times = [Factor(k.variables, alone(k), k.op) for k in kernels]
    gone = [Factor(f.variables, 0.1 * (f.cost_ms == 0), call_overhead.OP) for f in times]
    return LatencyModel(REMOVABLE, (*times, *gone), class_scales={call_overhead.OP: 0.0})


def in_one_call(net: Mapping[str, int]) -> float:
    present = [
        k for k in KERNELS
        if k.variables and len(set(k.variables)) == len(k.variables) and 0 not in [net[v] for v in k.variables]
    ]  # fmt: skip
    return CALL_MS + sum(COSTS[k.signature](*(net[v] for v in k.variables)) / 1e6 for k in present)


def test_a_kernel_that_goes_with_its_block_saves_no_call_of_its_own() -> None:
    draws = [dense_net(REMOVABLE), smallest_net(REMOVABLE), *sample_nets(REMOVABLE, 8, seed=3)]
    without = {**dense_net(REMOVABLE), "inner": 0}
    nets = [(net, in_one_call(net), 1.0) for net in (*draws, without)]
    probes = [(net, in_one_call(net)) for net in sample_nets(REMOVABLE, 24, seed=4)]
    probes += [({**net, "inner": 0}, in_one_call({**net, "inner": 0})) for net, _ in probes]
    corrected = correct(model_with_calls(), nets)
    assert corrected.class_scales[call_overhead.OP] > 0.5
    error = evaluate(corrected, probes)[0]
    assert error < 0.02
    blind = replace(
        model_with_calls(),
        factors=tuple(f for f in model_with_calls().factors if f.op != call_overhead.OP),
    )
    assert evaluate(correct(blind, nets), probes)[0] > max(0.03, 2 * error)


def test_predictions_stay_above_zero_whatever_the_nets_say() -> None:
    nets = [(net, max(1e-3, kernels_ms(net) - 0.6), 1.0) for net in sample_nets(GRIDS, 8, 0)]
    corrected = correct(model(), nets)
    assert corrected.scale > 0
    assert corrected.predict(smallest_net(GRIDS)) > 0


def test_timings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        correct(model(), [(dense_net(GRIDS), 0.0, 1.0)])
    with pytest.raises(ValueError, match="held-out"):
        evaluate(model(), [])


def test_any_first_few_sampled_nets_span_small_to_large() -> None:
    grids = {f"g{i}": tuple(range(8, 129, 8)) for i in range(30)}
    nets = sample_nets(grids, 12, seed=0)
    assert nets == sample_nets(grids, 12, seed=0)
    assert nets != sample_nets(grids, 12, seed=1)
    shares = [sum(net.values()) / sum(dense_net(grids).values()) for net in nets]
    assert min(shares[:8]) < 0.35
    assert max(shares[:8]) > 0.75
    assert all(net[g] in grid for net in nets for g, grid in grids.items())
    gaps = np.diff(sorted(shares))
    assert gaps.max() < 0.2


def test_a_model_on_narrower_grids_predicts_the_same() -> None:
    full = correct(model(), timed(lambda net: 1.2 * kernels_ms(net) + 0.2, 8, seed=0))
    small = full.between({"stem": 16, "inner": 24, "late": 128}, {"stem": 24, "inner": 64})
    assert small.grids == {"stem": (16, 24), "inner": (24, 32, 40, 48, 56, 64), "late": (128,)}
    for chosen in itertools.product(*small.grids.values()):
        net = dict(zip(small.grids, chosen, strict=True))
        assert small.predict(net) == pytest.approx(full.predict(net), rel=1e-12)
