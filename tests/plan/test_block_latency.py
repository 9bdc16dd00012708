"""What a removed block saves: kernel tables, the calls of its kernels, and the search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from edgeprune.compress.groups.find import ChannelGroup
from edgeprune.compress.groups.surgery import RemovableBlock
from edgeprune.formats import Kernel
from edgeprune.plan.latency import call_overhead
from edgeprune.plan.latency.table import LatencyTable, tabulate
from edgeprune.plan.measured import MeasuredTable
from edgeprune.plan.net_model import kernel_model
from edgeprune.plan.solver import solve as search
from edgeprune.plan.solver.solve import Problem
from edgeprune.plan.table import measure_table
from edgeprune.progress import Silent

# Stem, into the branch, out of it, addition, head.
CHAIN = (("s",), ("s", "i"), ("i",), ("s",), ("s",))
NS = (900.0, 700.0, 500.0, 100.0, 800.0)


class Chain:
    """A resizable file of five kernels, of which the middle three are the block of group ``i``."""

    kernels = tuple(
        Kernel(n, f"k{n}", "Conv", "", f"sig{n}", variables, (1, 8), (1, 8))
        for n, variables in enumerate(CHAIN)
    )
    blocks: Mapping[str, frozenset[int]] = {"i": frozenset({1, 2, 3})}

    def resized(self, widths: Mapping[str, int]) -> bytes:
        return b""

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        return bytes([index, *widths.values()])


class Stand:
    """Times kernels by what they are."""

    precision = "int8"

    def kernels(
        self, files: Mapping[str, bytes], progress: object, purpose: str
    ) -> dict[str, float]:
        # What is not there is not timed.
        assert all(0 not in content[1:] for content in files.values())
        return {n: NS[c[0]] * float(np.mean([w / 16 for w in c[1:]])) for n, c in files.items()}


def groups_of(block: RemovableBlock | None) -> tuple[ChannelGroup, ...]:
    return (
        ChannelGroup("s", "s", 16, 1, "spine", ()),
        ChannelGroup("i", "i", 16, 1, "inner", (), block),
    )


def table_of(block: RemovableBlock | None) -> MeasuredTable:
    return measure_table(
        Stand(),  # type: ignore[arg-type]
        Chain(), groups_of(block), fingerprint_key="x", format_name="onnx", progress=Silent(),
    )  # fmt: skip


def test_width_0_is_offered_where_model_and_file_can_do_without_the_block() -> None:
    assert table_of(RemovableBlock(("b",), "b")).grids["i"][0] == 0
    assert table_of(RemovableBlock(("b",), "b")).grids["s"][0] > 0
    assert table_of(None).grids["i"][0] > 0


def test_a_removed_block_takes_no_time_and_all_else_takes_what_it_took() -> None:
    full = {"s": 16, "i": 16}
    model = kernel_model(Chain(), table_of(RemovableBlock(("b",), "b")), full)
    plain = kernel_model(Chain(), table_of(None), full)
    assert model.predict({}) * 1e6 == pytest.approx(sum(NS))
    assert model.predict({"i": 0}) * 1e6 == pytest.approx(NS[0] + NS[4])
    for widths in ({"s": 8, "i": 8}, {"i": 4}, {"s": 4}):
        assert model.predict(widths) == pytest.approx(plain.predict(widths))
    assert model.predict({"s": 8, "i": 0}) * 1e6 == pytest.approx((NS[0] + NS[4]) / 2)


def test_the_call_of_each_kernel_that_goes_with_a_block_can_be_given_back_and_no_other() -> None:
    measured = table_of(RemovableBlock(("b",), "b"))
    raw = kernel_model(Chain(), measured, {"s": 16, "i": 16})
    quickest_ms = min(p.ns for k in measured.table.kernels for p in k.points) / 1e6
    assert call_overhead.quickest_ms(measured.table) == quickest_ms > 0
    assert "calls" not in str(kernel_model(Chain(), table_of(None), {"s": 16, "i": 16}).factors)
    model = dataclasses.replace(raw, class_scales={call_overhead.OP: 0.5})
    for widths in ({}, {"i": 8}, {"s": 8}):
        assert model.predict(widths) == raw.predict(widths)
    for widths in ({"i": 0}, {"s": 8, "i": 0}):
        assert model.predict(widths) == pytest.approx(raw.predict(widths) + 3 * 0.5 * quickest_ms)


def test_kernels_that_follow_no_group_go_with_their_block_too() -> None:
    class Fixed(Chain):
        kernels = (Kernel(0, "k", "Conv", "", "f", (), (1,), (1,)), *Chain.kernels[1:])
        blocks: Mapping[str, frozenset[int]] = {"i": frozenset({0, 1, 2, 3})}

    base = table_of(RemovableBlock(("b",), "b"))
    fixed = tabulate("f@", "Conv", [], {(): 300.0})
    table = LatencyTable(
        fingerprint_key="x", precision="int8", format="onnx", kernels=(*base.table.kernels, fixed)
    )
    measured = base.model_copy(update={"table": table})
    model = kernel_model(Fixed(), measured, {"s": 16, "i": 16})
    assert model.predict({}) * 1e6 == pytest.approx(300 + sum(NS[1:]))
    assert model.predict({"i": 0}) * 1e6 == pytest.approx(NS[4])


@pytest.mark.parametrize(("bypass_nats", "expected"), [(0.01, True), (5.0, False)])
def test_the_solver_removes_a_block_where_that_is_the_cheapest(bypass_nats, expected) -> None:
    model = kernel_model(Chain(), table_of(RemovableBlock(("b",), "b")), {"s": 16, "i": 16})
    costs = {g: 2 * (1 - np.array(grid) / 16) for g, grid in model.grids.items()}
    costs["i"] = np.minimum(costs["i"], bypass_nats)
    costs["i"][0] = bypass_nats
    solution = search.solve(Problem(model.grids, costs, model), 0.7 * model.predict({}))
    assert (solution.widths["i"] == 0) is expected
    assert solution.predicted_ms <= 0.7 * model.predict({})
