"""Whole residual blocks: which can go, that the model without one says what it should, and that files and predictions follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from blockfiles import BlockFiles, run
from removable_blocks import found_in, random_statistics, without
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, conv_bn, head, make

from edgeprune import formats
from edgeprune.compress.groups.find import find_groups, mask_identity, remove_channels
from edgeprune.compress.groups.surgery import RemovableBlock, Removed
from edgeprune.compress.plain_source import model_source
from edgeprune.compress.pruned_file import load_pruned, save_pruned
from edgeprune.compress.repair.compensate import compensate, repaired
from edgeprune.compress.repair.norm_statistics import HeldOut
from edgeprune.compress.scores.importance import cost_curves, l2
from edgeprune.compress.size import layer_widths
from edgeprune.errors import FormatError, IntegrityError, ModelError
from edgeprune.formats import Format
from edgeprune.formats.shared.branches import Graph, Step, branch_of
from edgeprune.formats.shared.widths import distinct_widths
from edgeprune.progress import Silent
from edgeprune.workload.answers import logits
from examples.fashion_mnist.net import build

FOUND = {
    "residual": {"b1.0": RemovableBlock(("b1.0", "b1.1", "b2"), "b2")},
    "inverted": {
        "expand.0": RemovableBlock(
            ("expand.0", "expand.1", "depth.0", "depth.1", "project.0", "project.1"), "project.1"
        )
    },
    "attention": {"up": RemovableBlock(("n2", "up", "down"), "down")},
    "squeeze-excite": dict.fromkeys(
        ("expand", "squeeze"),
        RemovableBlock(
            ("expand", "depth", "squeeze", "excite", "project"), "project", ("expand", "squeeze")
        ),
    ),
}


class Branching(nn.Module):
    """A stem, a block whose kind is chosen, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.relu = kind, nn.ReLU(inplace=True)
        self.stem, self.a, self.b = conv_bn(3, 16), nn.Conv2d(16, 24, 3, 1, 1), nn.Conv2d(24, 16, 1)
        self.norm, self.mid = nn.BatchNorm2d(16), nn.Conv2d(24, 24, 3, 1, 1)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))
        self.next, self.head = conv_bn(16, 16), head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.next(self.block(self.stem(x) - 0.5)))

    def block(self, x: Tensor) -> Tensor:
        # An activation in place right behind the first layer of the branch.
        if self.kind == "pre-norm":
            return x + self.b(self.relu(self.a(self.relu(self.norm(x)))))
        inner = self.relu(self.a(x))
        # That is used inside and behind the block, as torchvision does.
        if self.kind == "one-activation":
            return self.relu(self.norm(self.b(inner)) + x)
        if self.kind == "views":
            return x + self.b(inner).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        if self.kind == "two-groups":
            return x + self.b(self.mid(inner))
        if self.kind == "read-elsewhere":
            return x + self.b(inner) + inner.mean(1, keepdim=True)
        if self.kind == "subtracted":
            return x - self.b(inner)
        if self.kind == "scaled-branch":
            return x + self.scale * self.b(inner)
        if self.kind == "scaled-skip":
            return 2 * x + self.b(inner)
        return x + x + self.b(inner)


@pytest.mark.parametrize("name", ZOO)
def test_only_branches_of_identity_skips_can_go(name: str) -> None:
    assert found_in(*make(ZOO[name])) == FOUND.get(name, {})


def test_the_example_net_has_four_removable_blocks() -> None:
    found = found_in(build().eval(), torch.rand(1, 1, 28, 28))
    assert {n: b.end for n, b in found.items()} == {
        "stage1.1.conv1": "stage1.1.bn2", "stage2.1.expand": "stage2.1.bn3",
        "stage3.1.expand": "stage3.1.bn3", "stage3.2.expand": "stage3.2.bn3",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["pre-norm", "one-activation", "views"])
def test_what_stands_around_the_layers_of_a_block_does_not_matter(kind: str) -> None:
    model, x = random_statistics(Branching(kind)), torch.randn(2, 3, 12, 12)
    block = found_in(model, x)["a"]
    assert {"a", "b"} <= set(block.layers)
    smaller = without(model, x, "a")
    skip = model.stem(x) - 0.5
    after = F.relu(skip) if kind == "one-activation" else skip
    with torch.no_grad():
        assert torch.allclose(smaller(x), model.head(model.next(after)), atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["read-elsewhere", "subtracted", "scaled-branch", "scaled-skip", "twice"]
)
def test_what_is_not_a_plain_identity_block_stays(kind: str) -> None:
    assert found_in(random_statistics(Branching(kind)), torch.randn(1, 3, 12, 12)) == {}


@pytest.mark.parametrize("name", FOUND)
def test_a_model_without_a_block_equals_one_whose_branch_says_zero(name: str) -> None:
    model, x = make(ZOO[name])
    smaller = without(model, x, *FOUND[name])
    for block in set(FOUND[name].values()):
        handle = model.get_submodule(block.end).register_forward_hook(lambda *a: a[2] * 0)
    with torch.no_grad():
        assert torch.allclose(smaller(x), model(x), atol=1e-6)
    handle.remove()
    with torch.no_grad():
        assert not torch.allclose(smaller(x), model(x), atol=1e-3)


def test_all_blocks_go_together_and_beside_narrower_groups() -> None:
    model, x = random_statistics(build()), torch.rand(3, 1, 28, 28)
    groups, _ = find_groups(model, x[:1])
    removed = {g.name: range(0 if g.block else g.channels // 2, g.channels) for g in groups}
    assert mask_identity(model, groups, removed, x) is None
    smaller = remove_channels(model, {g.name: g for g in groups}, removed, x[:1])
    smaller.train()(x).sum().backward()  # type: ignore[no-untyped-call]
    gone = {g.name: b for g in groups if (b := g.block)}
    assert all(
        isinstance(smaller.get_submodule(n), Removed) for b in gone.values() for n in b.layers
    )
    left, _ = find_groups(smaller, x[:1])
    assert {g.name for g in groups} - {g.name for g in left} == set(gone)


def test_all_channels_of_a_group_without_a_block_cannot_go() -> None:
    model, x = make(ZOO["residual"])
    with pytest.raises(ModelError, match="must be some of its 24"):
        without(model, x, "a1.0")


def test_width_0_costs_what_the_bypass_diverges_and_no_width_costs_more() -> None:
    model, _ = make(ZOO["residual"])
    with torch.no_grad():
        model.b2.weight.mul_(20)  # or the branch would hardly be missed
    x = torch.randn(64, 3, 12, 12)
    groups, _ = find_groups(model, x[:1])
    grids = {g.name: (*((0,) if g.block else ()), 8, g.channels) for g in groups}
    curves = cost_curves(model, groups, l2(model, groups, x, 0), grids, x)
    for group in groups:
        assert len(curves[group.name]) == len(grids[group.name])
        assert curves[group.name][-1] == 0
        assert (np.diff(curves[group.name]) < 0).all()
    held_out = HeldOut(x[32:], logits(model, x[32:]))
    expected = repaired(without(model, x, "b1.0"), model, {}, x[:32], held_out).nats
    assert expected > 0.01
    assert curves["b1.0"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", FOUND)
def test_a_model_without_a_block_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    dense, x = make(ZOO[name])
    model = without(dense, x, *FOUND[name], widths={} if name == "attention" else {"stem.0": 8})
    save_pruned(model, tmp_path / "pruned.safetensors", dense)
    found = load_pruned(ZOO[name].build, tmp_path / "pruned.safetensors")
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert repr(found) == repr(model)
    with pytest.raises((ModelError, IntegrityError)):
        load_pruned(ZOO["plain"].build, tmp_path / "pruned.safetensors")


def test_a_model_without_a_block_is_written_as_source_without_a_trace_of_it(tmp_path: Path) -> None:
    dense, x = make(ZOO["inverted"])
    model = without(dense, x, "expand.0")
    text = model_source(model, "The net.")
    names: dict[str, object] = {}
    exec(text, names)
    found = names["build"]()  # type: ignore[operator]
    found.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(found(x), model(x))
    assert not any(word in text for word in ("expand", "depth", "project", "zeros_like", " + "))


def test_layers_of_a_removed_block_have_no_channels_after() -> None:
    model, x = make(ZOO["residual"])
    after = {w.layer: w for w in layer_widths(model, without(model, x, "b1.0"))}
    assert {n for n, w in after.items() if w.out_after == 0} == {"b1.0", "b2"}
    assert (after["b2"].in_before, after["b2"].in_after) == (20, 0)


def test_layers_behind_a_removed_block_are_fitted_to_what_they_said_before() -> None:
    model = random_statistics(build())
    x = torch.rand(160, 1, 28, 28)
    pruned = without(model, x, "stage3.1.expand")
    repaired, report = compensate(pruned, model, {}, x, progress=Silent())
    assert {f.name for f in report.fitted} == {"stage3.2.expand", "stage3.2.project"}
    skipped = [name for name, _ in report.skipped]
    assert skipped == ["stage3.2.depthwise", "classifier"]  # has groups; too few samples for it
    assert all(fit.error_after < 0.8 * fit.error_before for fit in report.fitted)
    assert report.fitted[0].error_after < 0.02 * report.fitted[0].error_before
    assert min(report.kl_recalibrated, report.kl_compensated) <= report.kl_pruned
    assert isinstance(repaired.get_submodule("stage3.1.expand"), Removed)


# Files


class Files(BlockFiles):
    """A net as files of one format: dense, at other widths, and exported without its blocks."""

    def __init__(self, form: Format, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.model, self.x = random_statistics(TwoBlocks()), torch.rand(2, 3, 12, 12)
        groups, _ = find_groups(self.model, self.x[:1])
        self.full = {g.name: g.channels for g in groups}
        self.blocks = {g.name for g in groups if g.block}
        changed = distinct_widths(self.full, {g.name: g.step for g in groups})
        self.changed = changed
        self.bypassed = without(self.model, self.x, *self.blocks)
        variant = without(self.model, self.x, widths=changed)
        for name, net in (("dense", self.model), ("variant", variant), ("without", self.bypassed)):
            self.export(net, name)

    def export(self, model: nn.Module, name: str) -> None:
        fp32 = self.path(name, "fp32")
        self.form.export(model, self.x[:1].numpy(), fp32)
        samples = np.random.default_rng(0).random((4, 3, 12, 12), np.float32)
        self.form.quantize(fp32, samples, self.path(name, "int8"))


class TwoBlocks(nn.Module):
    """Two identity blocks in a row, plain and depthwise, with an activation behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a1 = conv_bn(3, 16), conv_bn(16, 20)
        self.a2 = nn.Conv2d(20, 16, 3, 1, 1)
        self.b1, self.b2, self.b3 = (
            conv_bn(16, 28, 1),
            conv_bn(28, 28, groups=28),
            nn.Conv2d(28, 16, 1),
        )
        self.last, self.head = conv_bn(16, 24, s=2), head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.a2(self.a1(x)) + x)
        return self.head(self.last(x + self.b3(self.b2(self.b1(x)))))


@pytest.fixture(scope="module", params=["onnx", pytest.param("tflite", marks=pytest.mark.slow)])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(formats.load(request.param), tmp_path_factory.mktemp(request.param))


def test_an_export_without_blocks_says_what_torch_says_and_has_none_of_their_operators(
    files,
) -> None:
    with torch.no_grad():
        expected = files.bypassed(files.x[:1]).numpy()
    path = files.path("without", "fp32")
    found = run(path.read_bytes(), files.form.info.name, files.x[:1].numpy())
    assert np.allclose(found, expected, atol=1e-5)
    counts = files.counts(path)
    assert not {"Add", "ADD", "DEPTHWISE_CONV_2D"} & counts.keys()
    assert counts.get("Conv", counts.get("CONV_2D")) == 2
    assert counts.get("Relu", 2) == 2  # that behind the first block would change nothing


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_resized_file_without_blocks_is_that_of_a_genuine_export(
    files, precision, tmp_path
) -> None:
    file = files.resizable(precision)
    assert set(file.blocks) == files.blocks == {"a1.0", "b1.0"}
    content = file.resized(dict.fromkeys(files.blocks, 0))
    path = tmp_path / f"resized{files.form.info.suffix}"
    path.write_bytes(content)
    assert files.counts(path) == files.counts(files.path("without", precision))
    found = run(content, files.form.info.name, files.x[:1].numpy())
    with torch.no_grad():
        expected = files.bypassed(files.x[:1]).numpy()
    if precision == "fp32":
        assert np.allclose(found, expected, atol=1e-5)
    assert found.shape == expected.shape


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_block_goes_and_everything_else_is_narrower(files, precision) -> None:
    file = files.resizable(precision)
    half = {g: n // 2 for g, n in files.full.items()}
    for group in sorted(files.blocks):
        widths = {**half, group: 0}
        found = run(file.resized(widths), files.form.info.name, files.x[:1].numpy())
        assert found.shape == (1, 5)
        assert np.isfinite(found).all()
    # Nothing was changed in place.
    assert file.resized(half) == files.resizable(precision).resized(half)


def test_the_kernels_of_a_block_are_its_layers_and_the_addition(files) -> None:
    file = files.resizable("fp32")
    inside = {g: [file.kernels[i] for i in sorted(found)] for g, found in file.blocks.items()}
    assert [k.layer for k in inside["a1.0"]][:2] == ["a1.0", "a2"]
    assert [k.layer for k in inside["b1.0"]][:3] == ["b1.0", "b2.0", "b3"]
    assert [found[-1].op.upper() for found in inside.values()] == ["ADD", "ADD"]


def test_a_group_that_is_no_block_cannot_have_width_0_in_a_file(files) -> None:
    with pytest.raises(FormatError, match=r"group stem\.0 is no block"):
        files.resizable("fp32").resized({"stem.0": 0})


# Branches of a graph


def graph(*steps: tuple[str, str], outputs: str = "z") -> Graph[str]:
    """Operators as ``("inputs", "outputs")``, one letter a tensor."""
    return Graph([Step(tuple(a), tuple(b)) for a, b in steps], set(outputs))


def test_a_branch_is_what_lies_between_a_tensor_and_its_sum() -> None:
    net = graph(("i", "x"), ("x", "a"), ("a", "b"), ("bx", "y"), ("y", "z"))
    (branch,) = net.branches({3})
    assert (set(branch.steps), branch.add, branch.skip, branch.total) == ({1, 2}, 3, "x", "y")
    assert branch_of([branch], {2}) is branch
    assert branch_of([branch], {2, 3}) is None
    assert branch_of([branch], ()) is None


@pytest.mark.parametrize(
    "steps",
    [
        [("i", "x"), ("x", "a"), ("a", "b"), ("bx", "y"), ("ya", "z")],  # read behind the sum
        [("i", "x"), ("xi", "a"), ("a", "b"), ("bx", "y"), ("y", "z")],  # another value comes in
        [
            ("i", "x"),
            ("x", "a"),
            ("x", "b"),
            ("ba", "y"),
            ("y", "z"),
        ],  # no side is handed on as it is
        [
            ("i", "x"),
            ("", "a"),
            ("ax", "b"),
            ("bx", "y"),
            ("y", "z"),
        ],  # something made from nothing
        [("i", "x"), ("x", "a"), ("a", "b"), ("bx", "z")],  # the sum is what the file returns
        [("i", "x"), ("x", "a"), ("a", "b"), ("xx", "y"), ("yb", "z")],
    ],
)
def test_a_way_that_is_not_closed_is_no_branch(steps) -> None:
    assert graph(*steps).branches({3}) == []
