"""Operations of Core ML programs worked out with torch, one by one, against what their definition gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgeprune.formats.coreml.evaluate import Unknown, evaluate
from edgeprune.formats.coreml.program import MilOperation, MilProgram, dequantized

X = np.random.default_rng(1).standard_normal((1, 4, 7, 6)).astype(np.float32)
T = torch.from_numpy(X)
W = torch.from_numpy(np.random.default_rng(2).standard_normal((8, 4, 3, 3)).astype(np.float32))
DW = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 1, 3, 3)).astype(np.float32))


def program(
    kind: str, dtype: str = "float32", inputs: dict | None = None, **constants: Any
) -> MilProgram:
    """One operation on the input ``x``; whole numbers, flags and tensors become arrays."""
    arrays = {
        key: value if isinstance(value, str) else np.asarray(value)
        for key, value in constants.items()
    }
    names = inputs or {"x": ("x",)}
    operation = MilOperation(kind, names, arrays, ("y",), (dtype,), ((),))
    return MilProgram((operation,), {}, ("x",), ("y",))


def answer(kind: str, x: np.ndarray = X, **constants: Any) -> np.ndarray:
    return evaluate(program(kind, **constants), x, "y")


CASES = {
    "conv, custom padding and stride": (
        ("conv", {"weight": W, "pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2]}),
        lambda: functional.conv2d(T, W, stride=2, padding=1),
    ),
    "conv, same": (
        ("conv", {"weight": W, "pad_type": "same"}),
        lambda: functional.conv2d(T, W, padding=1),
    ),
    "conv, uneven padding": (
        ("conv", {"weight": W, "pad_type": "custom", "pad": [0, 1, 2, 0]}),
        lambda: functional.conv2d(functional.pad(T, (2, 0, 0, 1)), W),
    ),
    "depthwise, dilated": (
        ("conv", {"weight": DW, "groups": 4, "dilations": [2, 2], "pad_type": "valid"}),
        lambda: functional.conv2d(T, DW, groups=4, dilation=2),
    ),
    "max pool": (
        ("max_pool", {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}),
        lambda: functional.max_pool2d(T, 3, 2, 1),
    ),
    "average pool that counts no padding": (
        (
            "avg_pool",
            {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1], "exclude_padding_from_average": True},
        ),
        lambda: functional.avg_pool2d(T, 3, 2, 1, count_include_pad=False),
    ),
    "mean": (("reduce_mean", {"axes": [-2, -1], "keep_dims": True}), lambda: T.mean((2, 3), keepdim=True)),
    "maximum over axes": (("reduce_max", {"axes": [2, 3]}), lambda: T.amax((2, 3))),
    "hard sigmoid": (("sigmoid_hard", {"alpha": 1 / 6, "beta": 0.5}), lambda: functional.hardsigmoid(T)),
    "relu from a threshold on": (("thresholded_relu", {"alpha": 0.5}), lambda: T * (T >= 0.5)),
    "clip": (("clip", {"alpha": 0.0, "beta": 0.5}), lambda: T.clamp(0, 0.5)),
    "gelu": (("gelu", {"mode": "EXACT"}), lambda: functional.gelu(T)),
    "softmax": (("softmax", {"axis": 1}), lambda: torch.softmax(T, 1)),
    "transpose": (("transpose", {"perm": [0, 2, 3, 1]}), lambda: T.permute(0, 2, 3, 1)),
    "nearest upsampling": (
        ("upsample_nearest_neighbor", {"scale_factor_height": 2.0, "scale_factor_width": 3.0}),
        lambda: functional.interpolate(T, scale_factor=(2.0, 3.0), mode="nearest"),
    ),
    "reshape": (("reshape", {"shape": [1, -1]}), lambda: T.reshape(1, -1)),
    "pad": (("pad", {"pad": [0, 0, 0, 0, 1, 2, 3, 4], "mode": "constant"}), lambda: functional.pad(T, (3, 4, 1, 2))),
    "slice": (
        ("slice_by_index", {"begin": [0, 1, 0, 0], "end": [1, 3, 7, 6], "stride": [1, 1, 2, 1], "end_mask": [False, False, True, True]}),
        lambda: T[:, 1:3, ::2],
    ),
    "layer norm": (
        ("layer_norm", {"axes": [-1], "epsilon": 1e-5, "gamma": np.arange(6, dtype=np.float32)}),
        lambda: functional.layer_norm(T, (6,), torch.arange(6.0)),
    ),
    "add a constant": (("add", {"y": np.float32(2)}), lambda: T + 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_what_torch_gives(name: str) -> None:
    (kind, constants), wanted = CASES[name]
    found, expected = answer(kind, **constants), wanted().numpy()
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=1e-5)


def test_a_result_has_the_precision_that_the_program_declares() -> None:
    wide, half = answer("relu"), answer("relu", dtype="float16")
    assert np.array_equal(half, wide.astype(np.float16).astype(np.float32))
    assert not np.array_equal(half, wide)


def test_quantised_values_are_whole_clipped_and_come_back_by_their_scale() -> None:
    x = np.array([[-9, -0.26, 0.24, 0.26, 9]], np.float32)
    inputs = {"input": ("x",)}
    steps = answer("quantize", x, inputs=inputs, scale=np.float32(0.5), output_dtype="int8")
    assert steps.tolist() == [[-18, -1, 0, 1, 18]]
    wide = answer(
        "quantize",
        x * 100,
        inputs=inputs,
        scale=np.float32(0.5),
        zero_point=np.uint8(128),
        output_dtype="uint8",
    )
    assert wide.tolist() == [[0, 76, 176, 180, 255]]
    back = answer("dequantize", steps, inputs=inputs, scale=np.float32(0.5))
    assert back.tolist() == [[-9, -0.5, 0, 0.5, 9]]
    shifted = answer(
        "dequantize", wide, inputs=inputs, scale=np.float32(0.5), zero_point=np.uint8(128)
    )
    assert shifted.tolist() == [[-64, -26, 24, 26, 63.5]]


def test_stored_weights_come_back_by_their_channel() -> None:
    stored = np.array([[1, -2], [3, 4]], np.int8)
    constants = {
        "quantized_data": stored,
        "zero_point": np.int8(1),
        "scale": np.array([0.5, 2], np.float16),
        "axis": np.int32(0),
    }
    value, steps = dequantized(
        MilOperation("constexpr_affine_dequantize", {}, constants, ("w",), ("float16",), ((2, 2),))
    )
    assert value.tolist() == [[0, -1.5], [4, 6]]
    assert steps.tolist() == [0.5, 2]


def test_samples_that_a_program_would_mix_are_worked_out_one_by_one() -> None:
    x = np.concatenate([X, 2 * X, -X])
    centred = answer("reduce_mean", x, axes=[0, 1, 2, 3], keep_dims=True)
    assert np.allclose(centred[:, 0, 0, 0], [X.mean(), 2 * X.mean(), -X.mean()], atol=1e-6)
    flat = answer("reshape", x, shape=[1, 168])
    assert np.array_equal(flat, x.reshape(3, 168))


def test_an_operation_that_is_not_known_is_named() -> None:
    with pytest.raises(Unknown, match="the operation gru"):
        answer("gru")
    with pytest.raises(Unknown, match="padding by reflect"):
        answer("pad", pad=[0] * 8, mode="reflect")
