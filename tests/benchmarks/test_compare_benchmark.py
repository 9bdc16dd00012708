"""The pruners that the benchmark compares: they cut what they say, and their arithmetic is right."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from xml.etree import ElementTree

import blocks
import numpy as np
import pytest
import torch
from compare_blocks import compare_block, compare_summary
from compare_plot import compare_plot
from compare_records import CompareResults, CompareRow, OneShot, Trained, Versus
from compare_runner import versus
from methods import torch_pruning as with_torch_pruning
from methods.candidate import Candidate, Method
from methods.paths import _carried, _knapsack, halp, path_method
from methods.rig import Rig, mcnemar
from methods.solver import (
    Cutter,
    additive,
    for_grids,
    geometric,
    mac_model,
    unaligned,
    uniform,
    without_removal,
)
from repo import REPO
from report_fixture import make_fingerprint
from torch import nn

from edgeprune.compress.groups.find import find_groups
from edgeprune.compress.scores.importance import l2, removal_order
from edgeprune.compress.size import work
from edgeprune.plan.latency.model import Factor, LatencyModel
from edgeprune.records.plan import LatencyModelQuality


@pytest.fixture(scope="module")
def cutter():
    torch.manual_seed(0)
    sys.path.insert(0, str(REPO / "examples" / "fashion_mnist"))
    import net

    model = net.build().eval()
    x = torch.randn(4, 1, 28, 28)
    groups, _ = find_groups(model, x[:1])
    return Cutter(model, groups, x[:1])


@pytest.fixture(scope="module")
def orders(cutter):
    return removal_order(l2(cutter.model, cutter.groups, torch.randn(2, 1, 28, 28), 0))


def grids_of(cutter, step=8):
    return {g.name: (*range(step, g.channels, step), g.channels) for g in cutter.groups}


def latency_of(cutter):
    return mac_model(cutter.model, cutter.groups, grids_of(cutter), cutter.example)


def test_the_count_of_macs_is_that_of_the_pruned_net(cutter, orders):
    model, smaller = latency_of(cutter), {g.name: 16 for g in cutter.groups}
    built = cutter.candidate(smaller, orders, repaired=False).build()
    found = model.predict(smaller) / model.predict({})
    true = work(built, cutter.example)[1] / work(cutter.model, cutter.example)[1]
    assert found == pytest.approx(true, rel=1e-6)


def test_an_additive_table_is_right_along_its_sides_alone():
    cost = np.multiply.outer([1.0, 2.0, 3.0], [1.0, 4.0])
    model = LatencyModel({"a": (1, 2, 3), "b": (1, 4)}, (Factor(("a", "b"), cost),))
    flat = additive(model)
    assert flat.predict({"a": 1}) == model.predict({"a": 1})
    assert flat.predict({"b": 1}) == model.predict({"b": 1})
    assert flat.predict({"a": 1, "b": 1}) < model.predict({"a": 1, "b": 1})


def test_weights_are_carried_over_two_cuts_as_over_one(cutter, orders):
    full = {g.name: list(range(g.channels)) for g in cutter.groups}
    first = {g.name: sorted(orders[g.name][8:].tolist()) for g in cutter.groups}
    second = {g.name: sorted(orders[g.name][16:].tolist()) for g in cutter.groups}
    sizes = [{n: len(k) for n, k in kept.items()} for kept in (first, second)]
    once = cutter.candidate(sizes[0], orders, repaired=False).build()
    twice = cutter.candidate(sizes[1], orders, repaired=False)
    carried = _carried(_zeroed(twice.build()), once, cutter.groups, first, second)
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(carried(x), twice.build()(x))
        again = _carried(_zeroed(once), cutter.model, cutter.groups, full, first)
        whole = cutter.candidate(sizes[0], orders, repaired=False).build()
        assert torch.equal(again(x), whole(x))


def _zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_the_knapsack_finds_what_trying_all_finds():
    generator = np.random.default_rng(3)
    for _ in range(20):
        choices = {
            name: [
                (w, float(w * generator.uniform(0.5, 1.5)), float(generator.random()))
                for w in (1, 2, 3, 4)
            ]
            for name in "abc"
        }
        room = generator.uniform(4, 10)
        found = _knapsack(choices, room, 20000)
        every = [
            (sum(v for _, _, v in picks), picks)
            for picks in itertools.product(*choices.values())
            if sum(c for _, c, _ in picks) <= room
        ]
        if not every:
            continue
        value = sum(next(v for w, _, v in choices[n] if w == found[n]) for n in choices)
        assert value == pytest.approx(max(e[0] for e in every), abs=1e-9)


def test_halp_walks_down_to_the_budget_of_its_own_table(cutter):
    latency = latency_of(cutter)
    generator = np.random.default_rng(0)
    scores = {g.name: generator.random(g.channels) for g in cutter.groups}
    writers = {
        g.name: [
            LatencyModel(latency.grids, (f,)) for f in latency.factors if f.variables[-1] == g.name
        ]
        for g in cutter.groups
    }
    path = halp(cutter, latency, writers, scores, steps=12)
    ms = [latency.predict(c.widths) for c in path]
    assert ms == sorted(ms, reverse=True)
    assert ms[-1] < 0.5 * ms[0]
    middle = path_method("halp", path).at(0.5)
    assert middle.build()(torch.randn(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize("name", sorted(with_torch_pruning.SETTINGS))
def test_torch_pruning_gives_nets_that_run_with_the_widths_that_are_read_off(cutter, name):
    torch.manual_seed(1)
    x, y = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))
    before = {k: v.clone() for k, v in cutter.model.state_dict().items()}
    for method in with_torch_pruning.methods(
        cutter.model, cutter.groups, x, y, seed=0, names=[name]
    ):
        found = method.at(0.5)
        layers = dict(found.build().named_modules())
        assert found.build()(x).shape == (32, 10)
        for group in cutter.groups:
            assert layers[group.root].out_channels == found.widths[group.name]
        if method.name.endswith("round8"):
            assert all(w % 8 == 0 for w in found.widths.values())
        assert sum(found.widths.values()) < 0.8 * sum(g.channels for g in cutter.groups)
    assert all(torch.equal(v, cutter.model.state_dict()[k]) for k, v in before.items())


def test_uniform_widths_are_rounded_and_never_over_full(cutter, orders):
    method = uniform(cutter, orders, rounding=8)
    assert method.at(0.0).widths == {g.name: g.channels for g in cutter.groups}
    assert all(w % 8 == 0 and w >= 8 for w in method.at(1.0).widths.values())


class _Fixed(Rig):
    """A rig whose device answers by formula."""

    def __init__(self, ratio_of, folder: Path) -> None:
        self.ratios, self._ratio_of, self.timed, self.folder = {}, ratio_of, 0, folder

    def measure(self, structures):
        for widths in structures:
            self.timed += 1
            self.ratios[tuple(sorted(widths.items()))] = self._ratio_of(widths["a"])


def test_the_least_pruned_net_within_the_budget_is_found(tmp_path):
    rig = _Fixed(lambda width: width / 1000, tmp_path)
    method = Method("m", "m", lambda knob: Candidate({"a": round(1000 - 900 * knob)}, nn.Identity))
    found = dict(rig.fit(method, (0.5, 0.25)))
    for asked, candidate in found.items():
        assert 0.985 * asked <= candidate.widths["a"] / 1000 <= asked
    assert rig.timed < 40


def test_a_budget_that_no_knob_reaches_is_said_also_when_asked_again(tmp_path):
    rig = _Fixed(lambda _: 0.9, tmp_path)
    method = Method("m", "m", lambda knob: Candidate({"a": round(100 * knob)}, nn.Identity))
    assert dict(rig.fit(method, (0.5,))) == {0.5: None}
    timed = rig.timed
    assert dict(rig.fit(method, (0.5,))) == {0.5: None}
    assert rig.timed == timed


def test_a_run_that_goes_on_makes_only_the_structures_that_were_found(tmp_path):
    made = []

    def at(knob: float) -> Candidate:
        made.append(knob)
        return Candidate({"a": round(1000 - 900 * knob)}, nn.Identity)

    first = dict(_Fixed(lambda width: width / 1000, tmp_path).fit(Method("m", "m", at), (0.5,)))
    made.clear()
    again = _Fixed(lambda width: width / 1000, tmp_path)
    both = dict(again.fit(Method("m", "m", at), (0.5, 0.25)))
    assert both[0.5].widths == first[0.5].widths
    assert both[0.25].widths["a"] <= 250
    made.clear()
    assert len(dict(again.fit(Method("m", "m", at), (0.5, 0.25)))) == len(made) == 2


def test_a_kept_structure_that_is_too_slow_now_is_looked_for_anew(tmp_path):
    method = Method("m", "m", lambda knob: Candidate({"a": round(1000 - 900 * knob)}, nn.Identity))
    dict(_Fixed(lambda width: width / 1000, tmp_path).fit(method, (0.5,)))
    slower = _Fixed(lambda width: width / 800, tmp_path)
    assert dict(slower.fit(method, (0.5,)))[0.5].widths["a"] <= 400


def test_ours_against_theirs_counts_images_that_one_alone_got_right():
    ours = [np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 0], bool)]
    theirs = [np.array([1, 0, 0, 0], bool), np.array([1, 0, 0, 1], bool)]
    found = versus(ours, theirs)
    assert (found.only_ours, found.only_theirs) == (3, 1)
    assert found.margin == pytest.approx(0.25)
    assert found.margin_low is None
    assert found.p == mcnemar(3, 1) == 0.625


def test_geometric_limits_end_at_the_last():
    assert geometric(8, 1, 3) == pytest.approx([4, 2, 1])


def made(*rows: CompareRow) -> CompareResults:
    return CompareResults(
        edgeprune_version="0", created="now", command="c", net="example", target="rpi4", device="d", precision="int8",
        fingerprint=make_fingerprint(), epochs=0.3, learning_rate=0.02, batch_size=128, train_images=100, development_n=50, test_n=1000,
        seeds=2, dense_development={"int8": 0.95, "fp32": 0.95}, dense_test={"int8": 0.95, "fp32": 0.95},
        dense_ms={"int8": 1.0, "fp32": 2.0}, versions={}, rows=rows, seconds=90.0,
        latency_model=LatencyModelQuality(
            kernels_measured=1, nets_fitted=1, nets_held_out=1, mean_error_ratio=0.01, worst_error_ratio=0.02
        ),
    )  # fmt: skip


def row(method: str, budget: str, *test: float, low: float | None = None) -> CompareRow:
    trained = tuple(Trained(seed=i, development=t, test=t, seconds=1) for i, t in enumerate(test))
    found = (
        Versus(margin=0.004, only_ours=30, only_theirs=22, p=0.3) if method != "edgeprune" else None
    )
    return CompareRow(
        method=method, family=method, budget=budget, asked_ratio=0.5, status="done", structure_ratio=0.49, ratio=0.495, low=low,
        one_shot=OneShot(naive=0.3, recalibrated=0.8, compensated=None), trained=trained, versus=found,
    )  # fmt: skip


def test_the_table_names_drops_margins_and_what_was_not_reached():
    missed = CompareRow(
        method="uniform", family="uniform", budget="4x", asked_ratio=0.25, status="not reached"
    )
    rows = (
        row("edgeprune", "2x", 0.949, 0.951),
        row("netadapt", "2x", 0.94, 0.942),
        row("edgeprune-minus-tiles", "2x", 0.9495),
        missed,
    )
    text = compare_block(made(*rows), blocks.table, "stand-in: x86-64")
    assert "| edgeprune | 49.5 % | 0.00 | 2 |" in text.replace("+0.00", "0.00").replace(
        "±0.00", "0.00"
    )
    assert (
        "best of the other pruners here, `netadapt` (2 seeds; 30 images right by it alone, 22 by the other"
        in text
    )
    assert "Missed: uniform at 4x: not reached." in text


def test_what_pruning_and_int8_gain_together_is_said_where_it_was_timed():
    timed = row("edgeprune", "2x", 0.949).model_copy(update={"against_fp32": 7.06})
    text = compare_block(made(timed), blocks.table, "s")
    assert "dense FP32 in the same rounds: 7.1 times as fast at 2x (\u22120.10 points)." in text
    assert "dense FP32 in" not in compare_block(
        made(row("edgeprune", "2x", 0.9)), blocks.table, "s"
    )


def test_a_file_that_is_surely_over_the_budget_says_so():
    text = compare_block(made(row("edgeprune", "2x", 0.949, low=0.51)), blocks.table, "s")
    assert "over the budget" in text


def test_the_picture_has_a_line_for_each_family_and_the_dense_net():
    rows = (
        row("edgeprune", "2x", 0.949),
        row("edgeprune", "4x", 0.94),
        row("netadapt", "2x", 0.93),
        row("edgeprune-minus-tiles", "2x", 0.9),
    )
    drawn = compare_plot(made(*rows))
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"edgeprune", "netadapt", "dense INT8"} <= set(texts)
    assert "edgeprune-minus-tiles" not in texts
    assert compare_plot(made()) is None


def test_without_removal_only_width_0_is_gone():
    cost = np.arange(12.0).reshape(3, 4)
    cost[0] = 0
    model = LatencyModel({"a": (0, 4, 8), "b": (2, 4, 6, 8)}, (Factor(("a", "b"), cost),))
    less = without_removal(model)
    assert less.grids == {"a": (4, 8), "b": (2, 4, 6, 8)}
    assert less.predict({"a": 4, "b": 6}) == model.predict({"a": 4, "b": 6})
    curves = {"a": np.array([3.0, 1.0, 0.0]), "b": np.array([3.0, 2.0, 1.0, 0.0])}
    assert for_grids(curves, less.grids)["a"].tolist() == [1.0, 0.0]
    smooth = unaligned(model, curves)
    assert smooth.model.predict({"a": 6, "b": 8}) == pytest.approx((7 + 11) / 2)
    assert additive(model).predict({"a": 0, "b": 2}) == 0


def test_the_share_has_its_interval_where_it_was_timed_in_pairs():
    timed = row("edgeprune", "2x", 0.949, low=0.48).model_copy(update={"high": 0.512})
    text = compare_block(made(timed), blocks.table, "s")
    assert "| edgeprune | 49.5 % (48.0 to 51.2) |" in text


def test_the_summary_has_a_line_for_each_budget_and_the_margin():
    rows = (row("edgeprune", "2x", 0.949, 0.951), row("netadapt", "2x", 0.94, 0.942))
    text = compare_summary(made(*rows), "stand-in: x86-64")
    assert "- 2x: 49.5 % of dense INT8 measured (stand-in: x86-64)" in text
    assert "(2 seeds)" in text
    assert "- At 2x, edgeprune is" in text
