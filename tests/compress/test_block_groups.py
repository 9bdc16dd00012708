"""Residual blocks in which several channel groups lie: they go together or not at all, in models, files, predictions and plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blockfiles import BlockFiles, run
from clock_fixture import CHAIN, FULL, Clock, Net, basis_of, groups, kernel_ns, table_of
from removable_blocks import found_in, random_statistics, without
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import conv_bn, head

from edgeprune import formats
from edgeprune.compress.groups.find import ChannelGroup, find_groups, mask_identity, remove_channels
from edgeprune.compress.groups.surgery import RemovableBlock, Removed
from edgeprune.compress.plain_source import model_source
from edgeprune.compress.pruned_file import load_pruned, save_pruned
from edgeprune.compress.repair.compensate import repaired
from edgeprune.compress.repair.norm_statistics import HeldOut, recalibrate_batchnorm
from edgeprune.compress.scores.importance import cost_curves, l2
from edgeprune.compress.size import layer_widths
from edgeprune.compress.structure_loss import AfterRepair
from edgeprune.errors import FormatError, ModelError, SpecError
from edgeprune.formats import Format
from edgeprune.formats.shared.widths import distinct_widths
from edgeprune.pipeline.stages import steps
from edgeprune.plan import guarantee
from edgeprune.plan.basis import Basis
from edgeprune.plan.measured import MeasuredTable, ScoresResult
from edgeprune.plan.net_model import fit, kernel_model, measure_nets
from edgeprune.plan.result import BLOCK_REMOVED
from edgeprune.plan.solver import solve as search
from edgeprune.plan.table import measure_table
from edgeprune.progress import Silent
from edgeprune.records.budget import parse_budget
from edgeprune.workload.answers import logits


class Bottleneck(nn.Module):
    """Convolutions of these widths in a row, the first of them 1x1, and one back; the sum goes through a ReLU."""

    def __init__(self, channels: int, *widths: int, cardinality: int = 1) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            conv_bn(channels, widths[0], 1),
            *(conv_bn(a, b, 3, 1, cardinality) for a, b in itertools.pairwise(widths)),
        )
        self.out = nn.Sequential(
            nn.Conv2d(widths[-1], channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.out(self.inner(x)) + x)


class Gated(nn.Module):
    """MobileNetV3: expand, depthwise, squeeze and excite, project, add."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand, self.depth = conv_bn(channels, wide, 1), conv_bn(wide, wide, 3, 1, wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
        self.project = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.project(y * gate)


class Around(nn.Module):
    """A stem, blocks, and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = conv_bn(3, 32), nn.Sequential(*blocks)
        self.last, self.head = conv_bn(32, 24, s=2), head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))


class Resizing(nn.Module):
    """A branch whose middle has another size: without its layers, what is left of it no longer fits the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.up = conv_bn(32, 16, 3, 2), conv_bn(16, 16), nn.Conv2d(16, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.interpolate(self.mid(self.down(x)), scale_factor=2.0))


class Nested(nn.Module):
    """A branch in which another branch lies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            conv_bn(32, 16, 1), conv_bn(16, 12), nn.Conv2d(12, 16, 1), nn.Conv2d(16, 32, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        inner = self.a(x)
        return x + self.d(inner + self.c(self.b(inner)))


def build() -> nn.Module:
    """Two bottlenecks, with two and with three inner groups."""
    return Around(Bottleneck(32, 8, 16), Bottleneck(32, 16, 8, 12))


FIRST = ("blocks.0.inner.0.0", "blocks.0.inner.1.0")
SECOND = ("blocks.1.inner.0.0", "blocks.1.inner.1.0", "blocks.1.inner.2.0")


def made(block: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return random_statistics(Around(block())), torch.randn(2, 3, 16, 16)


def bottlenecks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return random_statistics(build()), torch.randn(2, 3, 16, 16)


# Models


def test_all_groups_of_a_bottleneck_have_its_block() -> None:
    found = found_in(*bottlenecks())
    assert set(found) == {*FIRST, *SECOND}
    for names in (FIRST, SECOND):
        (block,) = {found[name] for name in names}
        assert block.groups == names
        assert block.end == f"{names[0][:8]}.out.1"
        assert len(block.layers) == 2 * (len(names) + 1)


@pytest.mark.parametrize(
    ("block", "inside"),
    [
        pytest.param(lambda: Bottleneck(32, 16, 16, cardinality=2), 2, id="two groups of channels"),
        pytest.param(lambda: Bottleneck(32, 16, 24, 16, cardinality=2), 3, id="two such layers"),
        pytest.param(lambda: Bottleneck(32, 16, 16, cardinality=8), 0, id="as in a ResNeXt"),
        pytest.param(lambda: Gated(32, 48), 2, id="squeeze and excite"),
    ],
)
def test_a_block_goes_whatever_its_convolutions_are(block, inside: int) -> None:
    model, x = made(block)
    found = found_in(model, x)
    (same,) = set(found.values())
    assert len(same.groups) == inside
    smaller = without(model, x, *found)
    silent = model.get_submodule(same.end).register_forward_hook(lambda *a: a[2] * 0)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(smaller(x), expected, atol=1e-5)
        silent.remove()
        assert not torch.allclose(smaller(x), model(x), atol=1e-3)


def test_a_block_that_cannot_be_run_without_its_layers_stays_with_all_its_groups() -> None:
    model, x = made(Resizing)
    groups, _ = find_groups(model, x[:1])
    assert {"blocks.0.down.0", "blocks.0.mid.0"} <= {g.name for g in groups}
    assert found_in(model, x) == {}


def test_of_nested_blocks_only_the_inner_one_is_offered() -> None:
    found = found_in(*made(Nested))
    assert set(found) == {"blocks.0.b.0"}
    assert found["blocks.0.b.0"].groups == ()


@pytest.mark.parametrize("left", SECOND)
def test_one_group_of_a_block_cannot_stay_behind(left: str) -> None:
    model, x = bottlenecks()
    with pytest.raises(ModelError, match=rf"only together with {left}: they lie in one residual"):
        without(model, x, *(name for name in SECOND if name != left))
    known = {g.name: g for g in find_groups(model, x[:1])[0] if g.name != left}
    removed = {n: range(g.channels) for n, g in known.items() if n in SECOND}
    with pytest.raises(ModelError, match="only together with"):
        remove_channels(model, known, removed, x[:1])


def test_blocks_go_beside_narrower_groups_and_the_rest_trains_and_is_found_again() -> None:
    model, x = bottlenecks()
    groups, _ = find_groups(model, x[:1])
    removed = {g.name: range(0 if g.name in FIRST else g.channels // 2, g.channels) for g in groups}
    assert mask_identity(model, groups, removed, x) is None
    smaller = remove_channels(model, {g.name: g for g in groups}, removed, x[:1])
    smaller.train()(x).sum().backward()  # type: ignore[no-untyped-call]
    left, _ = find_groups(smaller.eval(), x[:1])
    by_name = {g.name: g for g in left}
    assert by_name.keys().isdisjoint(FIRST)
    assert all(isinstance(smaller.get_submodule(n), Removed) for n in FIRST)
    after = {w.layer: (w.in_after, w.out_after) for w in layer_widths(model, smaller)}
    assert after["blocks.0.out.0"] == after[FIRST[0]] == (0, 0)
    assert after[SECOND[0]] == (16, 8)


def test_a_bottleneck_that_is_gone_stays_gone_in_the_models_file_and_source(tmp_path: Path) -> None:
    dense, x = bottlenecks()
    model = without(dense, x, *FIRST, widths={"stem.0": 16, SECOND[1]: 4})
    save_pruned(model, tmp_path / "pruned.safetensors", dense)
    found = load_pruned(build, tmp_path / "pruned.safetensors")
    text = model_source(model, "The net.")
    names: dict[str, object] = {}
    exec(text, names)
    plain = names["build"]()  # type: ignore[operator]
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
        assert torch.allclose(plain(x), model(x), atol=1e-6)
    assert repr(found) == repr(model)
    assert not any(word in text for word in ("blocks.0", "zeros_like"))


def test_the_first_group_bears_what_the_block_costs_and_no_width_costs_more(monkeypatch) -> None:
    model, _ = bottlenecks()
    with torch.no_grad():
        model.get_submodule("head.2").weight.mul_(8)  # or the block would hardly be missed
    x = torch.randn(64, 3, 16, 16)
    model = recalibrate_batchnorm(model, x)
    groups, _ = find_groups(model, x[:1])
    grids = {g.name: (*((0,) if g.block else ()), 4, g.channels) for g in groups}
    asked: list[set[str]] = []
    measured = AfterRepair.__call__

    def counted(self: AfterRepair, kept: Mapping[str, tuple[int, ...]]) -> float:
        asked.append({name for name, own in kept.items() if not own})
        return measured(self, kept)

    monkeypatch.setattr(AfterRepair, "__call__", counted)
    curves = cost_curves(model, groups, l2(model, groups, x, 0), grids, x)
    assert [names for names in asked if names] == [set(FIRST), set(SECOND)]  # once a block
    held_out = HeldOut(x[32:], logits(model, x[32:]))
    expected = repaired(without(model, x, *FIRST), model, {}, x[:32], held_out).nats
    assert expected > 0.01
    assert curves[FIRST[0]][0] == pytest.approx(expected, rel=1e-4)
    assert curves[FIRST[1]][0] == 0
    for name in (*FIRST, *SECOND):
        bound = curves[(FIRST if name in FIRST else SECOND)[0]][0]
        assert (np.diff(curves[name][1:]) < 0).all()
        assert curves[name][1] <= bound + 1e-8
        assert curves[name][-1] == 0


# Files


class Files(BlockFiles):
    """The net as files of one format: dense, at other widths, without one block, and without any."""

    def __init__(self, form: Format, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.model, self.x = bottlenecks()
        groups, _ = find_groups(self.model, self.x[:1])
        self.full = {g.name: g.channels for g in groups}
        self.changed = distinct_widths(self.full, {g.name: g.step for g in groups})
        self.nets = {
            "dense": self.model,
            "variant": without(self.model, self.x, widths=self.changed),
            "one": without(self.model, self.x, *FIRST),
            "none": without(self.model, self.x, *FIRST, *SECOND),
        }
        samples = np.random.default_rng(0).random((4, 3, 16, 16), np.float32)
        for name, net in self.nets.items():
            form.export(net, self.x[:1].numpy(), self.path(name, "fp32"))
            form.quantize(self.path(name, "fp32"), samples, self.path(name, "int8"))

    def answers(self, content: bytes) -> np.ndarray:
        return run(content, self.form.info.name, self.x[:1].numpy())

    def expected(self, name: str) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(self.nets[name](self.x[:1]).numpy())


@pytest.fixture(scope="module", params=["onnx", pytest.param("tflite", marks=pytest.mark.slow)])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(formats.load(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("name", "convolutions", "additions"), [("one", 6, 1), ("none", 2, 0)])
def test_an_export_says_what_torch_says_and_has_no_operator_of_a_block_that_is_gone(
    files, name, convolutions, additions
) -> None:
    path = files.path(name, "fp32")
    assert np.allclose(files.answers(path.read_bytes()), files.expected(name), atol=1e-5)
    counts = files.counts(path)
    assert counts.get("Conv", counts.get("CONV_2D")) == convolutions
    assert counts.get("Add", counts.get("ADD", 0)) == additions


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("name", "gone"), [("one", FIRST), ("none", (*FIRST, *SECOND))])
def test_a_resized_file_is_that_of_a_genuine_export(files, precision, name, gone, tmp_path) -> None:
    file = files.resizable(precision)
    assert set(file.blocks) == {*FIRST, *SECOND}
    content = file.resized(dict.fromkeys(gone, 0))
    path = tmp_path / f"resized{files.form.info.suffix}"
    path.write_bytes(content)
    assert files.counts(path) == files.counts(files.path(name, precision))
    found = files.answers(content)
    if precision == "fp32":
        assert np.allclose(found, files.expected(name), atol=1e-5)
    assert found.shape == (1, 5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_is_written_without_a_whole_block_only(files, precision) -> None:
    file = files.resizable(precision)
    assert file.blocks[FIRST[0]] == file.blocks[FIRST[1]]
    assert file.blocks[FIRST[0]].isdisjoint(file.blocks[SECOND[0]])
    half = {g: n // 2 for g, n in files.full.items()}
    narrow = files.answers(file.resized({**half, **dict.fromkeys(SECOND, 0)}))
    assert narrow.shape == (1, 5)
    with pytest.raises(FormatError, match=rf"only be left out of the file if {SECOND[1]} of"):
        file.resized({SECOND[0]: 0, SECOND[2]: 0})


# Predictions


def tied_groups() -> tuple[ChannelGroup, ...]:
    """The groups of the clock's net, of which the first two lie in one block."""
    block = RemovableBlock(("x",), "x", ("a", "b"))
    return tuple(replace(g, block=block) if g.name in block.groups else g for g in groups())


class BlockNet(Net):
    """The clock's net, of which all kernels but the last are one block."""

    blocks: Mapping[str, frozenset[int]] = dict.fromkeys("ab", frozenset({0, 1, 2, 3}))


def tied_table(clock: Clock, file: Net | None = None) -> MeasuredTable:
    return measure_table(
        clock,  # type: ignore[arg-type]
        file or BlockNet(), tied_groups(), fingerprint_key="clock", format_name="onnx", progress=Silent(),
    )  # fmt: skip


def tied_basis(clock: Clock, cost: float = 1e-3) -> Basis:
    """A basis in which the block may go, for this cost."""
    file, table = BlockNet(), tied_table(clock)
    nets = measure_nets(clock, file, table.grids, seed=0)  # type: ignore[arg-type]
    raw = kernel_model(file, table, FULL)
    basis = basis_of(table, nets, *fit(raw, nets, table.kernels_measured))
    curves = {n: np.minimum(c, cost if n != "c" else 1.0) for n, c in basis.curves.items()}
    curves["b"][0] = 0.0  # the first group bears it
    return replace(basis, groups=tied_groups(), curves=curves)


@pytest.mark.parametrize(
    "blocks",
    [
        {"a": {0, 1, 2, 3}},
        {"a": {0, 1}, "b": {0, 1, 2}},
        {"a": {0, 1, 2}, "b": {0, 1, 2}, "c": {0, 1, 2}},
    ],
)
def test_width_0_is_offered_only_where_model_and_file_agree_on_the_groups(blocks) -> None:
    assert [g[0] for g in tied_table(Clock()).grids.values()][:2] == [0, 0]
    file = BlockNet()
    file.blocks = {name: frozenset(inside) for name, inside in blocks.items()}
    assert all(grid[0] for grid in tied_table(Clock(), file).grids.values())


def test_without_a_block_none_of_its_kernels_takes_time_and_all_else_is_as_it_was() -> None:
    clock = Clock(noise_ratio=0)
    model = kernel_model(BlockNet(), tied_table(clock), FULL)
    plain = kernel_model(Net(), table_of(clock), FULL)
    last = kernel_ns(CHAIN[-1], FULL) / 1e6
    assert model.predict({"a": 0, "b": 0}) == pytest.approx(last)
    for widths in ({"a": 32, "b": 48}, {"a": 32}, {"b": 48, "c": 64}, {}):
        assert model.predict(widths) == pytest.approx(plain.predict(widths))


def test_whole_nets_are_timed_with_whole_blocks_only() -> None:
    clock = Clock()
    nets = measure_nets(clock, BlockNet(), tied_table(clock).grids, seed=0)  # type: ignore[arg-type]
    kinds = [(bool(w["a"]), bool(w["b"])) for w in nets.widths]
    assert set(kinds) == {(True, True), (False, False)}


# Plans


@pytest.mark.parametrize("removal_is_dear", [True, False])
def test_a_plan_has_width_0_for_all_groups_of_a_block_or_for_none(removal_is_dear) -> None:
    clock = Clock()

    def loss(kept: Mapping[str, tuple[int, ...]]) -> float:
        return float((not kept["a"]) == removal_is_dear)

    found = guarantee.make_plan(
        clock,  # type: ignore[arg-type]
        BlockNet(),
        replace(tied_basis(clock), loss=loss),
        budget=parse_budget("60%"),
        progress=Silent(),
    )
    structures = [c.widths for c in found.checks] + [p.widths for p in found.points]
    assert {(bool(w["a"]), bool(w["b"])) for w in structures} == {(True, True), (False, False)}
    assert bool(found.plan.widths()["a"]) == removal_is_dear


def test_a_removed_block_counts_once_in_a_plan_and_whole_in_what_was_possible() -> None:
    clock = Clock()
    basis = tied_basis(clock)
    found = guarantee.given_plan(
        clock,  # type: ignore[arg-type]
        BlockNet(), basis, {"a": 0, "b": 0, "c": 64}, budget=parse_budget("60%"), progress=Silent(),
    )  # fmt: skip
    entries = {g.name: g for g in found.plan.groups}
    model, cut = basis.model, {"a": 0, "b": 0, "c": 64}
    whole = model.predict({"c": 64}) - model.predict(cut)
    assert entries["a"].saved_ms_predicted == pytest.approx(whole)
    assert entries["b"].saved_ms_predicted == 0
    assert found.plan.predicted_cost_nats == pytest.approx(1e-3 + basis.cost_nats("c", 64))
    assert (entries["a"].cost_nats, entries["b"].cost_nats) == (1e-3, 0)
    assert all(entries[n].note == BLOCK_REMOVED for n in "ab")
    saved = model.predict({}) - model.predict({"a": 0, "b": 0})
    for curve in found.curves[:2]:
        first = curve.choices[0]
        assert (first.width, first.cost_nats) == (0, 1e-3)
        assert first.saved_ms == pytest.approx(saved)
    assert basis.blocks_removed(cut) == 1
    charged = basis.problem(removal_charge=3.0)
    assert sum(charged.cost_nats[n][0] for n in "ab") == pytest.approx(3e-3)


@pytest.mark.parametrize("widths", [{"a": 0, "b": 96}, {"b": 0}, {"a": 0, "c": 64}])
def test_a_given_plan_that_takes_half_a_block_out_is_refused(widths) -> None:
    clock = Clock()
    with pytest.raises(
        SpecError, match=r"must have width 0 all or none, but the plan has a: "
    ) as no:
        guarantee.given_plan(
            clock,  # type: ignore[arg-type]
            BlockNet(), tied_basis(clock), widths, budget=parse_budget("60%"), progress=Silent(),
        )  # fmt: skip
    assert "\n" not in no.value.message


@pytest.mark.parametrize(
    ("widths", "told"),
    [
        ({"a": 0, "b": 96}, "must have width 0 all or none, but the plan has a: 0, b: 96"),
        ({"c": 0}, "the width of c must be one of 1, 2, 3, 4"),
        ({"a": 1000}, "but the plan has 1000"),
        ({"d": 8}, "unknown group 'd'"),
    ],
)
def test_a_given_plan_that_the_model_cannot_have_is_refused_before_anything_is_timed(
    widths, told
) -> None:
    with pytest.raises(SpecError, match=told):
        guarantee.check_given(widths, tied_basis(Clock()).groups)
    guarantee.check_given({"a": 0, "b": 0, "c": 5}, tied_basis(Clock()).groups)


def test_a_block_that_went_in_an_earlier_step_stays_gone() -> None:
    basis = tied_basis(Clock())
    kept = {"a": (), "b": (), "c": tuple(range(128))}
    n = len(basis.model.grids["c"])
    scores = ScoresResult(scores={"c": (1.0,) * 128}, curves={"c": tuple(np.linspace(1, 0, n))})
    later = steps.narrowed_basis(basis, kept, scores)
    for charge in (1.0, 3.0, float("inf")):
        problem = later.problem(removal_charge=charge)
        assert problem.grids["a"] == problem.grids["b"] == (0,)
        assert search.solve(problem, 1e9).widths == {"a": 0, "b": 0, "c": 128}
    assert all(basis.problem(removal_charge=float("inf")).grids[name][0] for name in "ab")
    evenly = replace(basis, scope="local").problem()
    assert all(s.widths["a"] and s.widths["b"] for s in search.even_structures(evenly))
