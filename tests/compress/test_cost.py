"""Work by arithmetic."""

from __future__ import annotations

import pytest

from edgeprune.compress.size import LayerShape, macs


def test_a_convolution_counts_every_tap_of_every_output_position() -> None:
    layer = LayerShape("conv", 16, 32, kernel=(3, 5), out_hw=(7, 9))
    assert macs(layer) == 7 * 9 * 32 * 16 * 15


def test_a_depthwise_convolution_reads_one_channel_per_output() -> None:
    layer = LayerShape("conv", 24, 24, kernel=(3, 3), groups=24, out_hw=(14, 14))
    assert macs(layer) == 14 * 14 * 24 * 9


def test_a_grouped_convolution_reads_its_share_of_the_inputs() -> None:
    layer = LayerShape("conv", 32, 64, kernel=(1, 1), groups=4, out_hw=(2, 3))
    assert macs(layer) == 6 * 64 * 8


def test_a_linear_layer_is_applied_to_every_token() -> None:
    layer = LayerShape("linear", 100, 10, out_hw=(1, 50))
    assert macs(layer) == 50 * 100 * 10


@pytest.mark.parametrize(
    "sizes",
    [
        {"in_channels": 0},
        {"out_hw": (0, 4)},
        {"groups": 3},
        {"kind": "linear", "kernel": (3, 3)},
    ],
)
def test_impossible_shapes_are_refused(sizes: dict[str, object]) -> None:
    usual: dict[str, object] = {"kind": "conv", "in_channels": 8, "out_channels": 8}
    with pytest.raises(ValueError, match="but got"):
        LayerShape(**{**usual, **sizes})  # type: ignore[arg-type]
