"""Where another machine stands in for a board, widths follow the profile of that board."""

from __future__ import annotations

from dataclasses import replace

import pytest
from clock_fixture import FULL, Clock, Net, groups, table_of

from edgeprune.plan.table import measure_table, prior_steps
from edgeprune.progress import Silent
from edgeprune.records.target import ChannelSteps


def steps(conv: int, depthwise: int, linear: int) -> ChannelSteps:
    return ChannelSteps(
        conv=conv, depthwise=depthwise, linear=linear, source="a table of this test", read_on="2026-11-25"
    )  # fmt: skip


def test_on_a_stand_in_widths_are_multiples_of_the_profile_of_the_board_that_counts():
    free = table_of(Clock(noise_ratio=0)).grids
    table = measure_table(
        Clock(noise_ratio=0),  # type: ignore[arg-type]
        Net(),
        groups(),
        fingerprint_key="clock",
        format_name="onnx",
        progress=Silent(),
        prior=prior_steps(Net(), steps(32, 1, 1)),
    )
    for group, grid in table.grids.items():
        assert grid[-1] == FULL[group]
        assert grid[:-1] == tuple(w for w in free[group] if w % 32 == 0 and w != FULL[group])
    assert any(w % 32 for grid in free.values() for w in grid)


@pytest.mark.parametrize(
    ("op", "roles", "step"),
    [
        ("CONV_2D", ("in", "out"), 8),
        ("DEPTHWISE_CONV_2D", ("both",), 16),
        ("Conv", ("both",), 16),
        ("FULLY_CONNECTED", ("in",), 4),
        ("Gemm", ("in",), 4),
        ("ADD", ("both",), 1),
    ],
)
def test_the_step_of_a_group_is_that_of_the_kernels_it_touches(op, roles, step):
    file = Net()
    file.kernels = (
        replace(Net.kernels[1], op=op, roles=roles, variables=("a", "b")[: len(roles)]),
    )
    assert prior_steps(file, steps(8, 16, 4)) == dict.fromkeys(("a", "b")[: len(roles)], step)


def test_a_group_of_several_kernels_gets_a_step_that_is_whole_in_the_tiles_of_all():
    file = Net()
    depthwise = replace(Net.kernels[0], op="DEPTHWISE_CONV_2D", roles=("both",), variables=("a",))
    linear = replace(Net.kernels[0], op="Gemm", roles=("in",), variables=("a",))
    file.kernels = (depthwise, linear)
    assert prior_steps(file, steps(1, 16, 12)) == {"a": 48}
