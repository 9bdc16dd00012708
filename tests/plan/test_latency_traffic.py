"""Bytes of weights at every width, from the sizes of few files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from edgeprune.plan.latency.weight_traffic import MOST_NODES, weight_bytes

GRIDS = {"a": (8, 16, 40), "b": (8, 24, 32, 64)}


class Sizes:
    """Files of a kernel, counted."""

    def __init__(self, rule: str) -> None:
        self.rule, self.asked = rule, 0

    def __call__(self, widths: Mapping[str, int]) -> int:
        self.asked += 1
        return int(eval(self.rule, {}, dict(widths)))


def test_a_convolution_between_two_groups_is_known_everywhere_from_four_files() -> None:
    size = Sizes("700 + 36 * a * b + 4 * b")
    found = weight_bytes(size, GRIDS)
    assert found is not None
    assert size.asked == 4
    wanted = [[700 + 36 * a * b + 4 * b for b in GRIDS["b"]] for a in GRIDS["a"]]
    np.testing.assert_allclose(found, wanted)


def test_a_group_on_both_sides_of_its_weights_needs_three() -> None:
    size = Sizes("700 + 9 * b * b + 4 * b")
    found = weight_bytes(size, {"b": GRIDS["b"]}, square=("b",))
    assert found is not None
    assert size.asked == 3
    np.testing.assert_allclose(found, [700 + 9 * b * b + 4 * b for b in GRIDS["b"]])


def test_one_width_and_many_groups() -> None:
    single = weight_bytes(Sizes("4 * a * b"), {"a": (8,), "b": GRIDS["b"]})
    assert single is not None
    np.testing.assert_allclose(single, [[32 * b for b in GRIDS["b"]]])
    names = [f"g{i}" for i in range(7)]
    assert 2 ** len(names) > MOST_NODES
    size = Sizes("1")
    assert weight_bytes(size, dict.fromkeys(names, (8, 16))) is None
    assert size.asked == 0


@pytest.mark.parametrize("rule", ["5000", "5000 + a"])
def test_a_kernel_without_weights_has_none(rule: str) -> None:
    assert weight_bytes(Sizes(rule), {"a": GRIDS["a"]}) is None
    assert weight_bytes(Sizes("5000"), {}) is None
