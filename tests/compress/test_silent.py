"""Filters too faint for INT8: the float model says the same, the INT8 file keeps its constants and is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, make

from edgeprune.compress.int8.faint_channels import rescue_silent
from edgeprune.devices.board import open_board
from edgeprune.errors import DeviceError
from edgeprune.records.device import Device

CHANNEL = 2


def faint_net(scale: float, constant: float, channels: slice) -> tuple[nn.Module, Tensor]:
    """A convolution, a depthwise one and a pointwise one; some first filters are faint and end in a constant."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[channels] *= scale
        model[0].bias[channels] = 0
        model[1].bias[channels] = constant
    return model, torch.randn(32, 3, 8, 8)


def int8_logits(model: nn.Module, x: Tensor, folder: Path) -> np.ndarray:
    """What the quantised file says on the built-in kernels."""
    pytest.importorskip("litert_torch")
    from edgeprune import formats

    tflite = formats.load("tflite")
    tflite.export(model, x[:1].numpy(), folder / "fp32.tflite")
    tflite.quantize(folder / "fp32.tflite", x.numpy(), folder / "int8.tflite")
    with open_board("here", Device(transport="local", targets=("rpi4",))) as board:
        content = (folder / "int8.tflite").read_bytes()
        board.load("net", content, runtime="litert", threads=1, delegate=False)
        return board.infer("net", x.permute(0, 2, 3, 1).numpy())


def folded_bias_steps(model: nn.Module, x: Tensor) -> Tensor:
    """Bias of the first convolution with its norm, in steps of input scale x weight scale."""
    conv, norm = model[0], model[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    constant = (conv.bias - norm.running_mean) * factor + norm.bias
    weight_scale = conv.weight.flatten(1).abs().amax(1) * factor.abs() / 127
    return constant.abs() / (weight_scale * (x.max() - x.min()) / 255)


@pytest.mark.parametrize("scale", [1e-6, 1e-12, 0.0])
def test_a_faint_filter_gets_the_weight_that_its_bias_needs(scale: float) -> None:
    model, x = faint_net(scale, 3.0, slice(CHANNEL, CHANNEL + 1))
    assert not folded_bias_steps(model, x)[CHANNEL] < 2**31
    rescued, notes = rescue_silent(model, x)
    assert notes == ("0: 1 filters too faint for INT8 were raised to what fits",)
    assert folded_bias_steps(rescued, x).max() < 2**30
    with torch.no_grad():
        torch.testing.assert_close(rescued(x), model(x), rtol=1e-4, atol=1e-4)


def test_other_channels_keep_their_exact_values() -> None:
    model, x = faint_net(1e-12, 3.0, slice(CHANNEL, CHANNEL + 1))
    rescued, _ = rescue_silent(model, x)
    for name, value in model.state_dict().items():
        now = rescued.state_dict()[name]
        if name.startswith(("0.", "1.")) and value.dim():
            rest = [i for i in range(8) if i != CHANNEL]
            value, now = value[rest], now[rest]
        assert torch.equal(value, now), name


def test_a_second_rescue_changes_nothing() -> None:
    for channels in (slice(CHANNEL, CHANNEL + 1), slice(None)):
        model, x = faint_net(1e-12, 0.0 if channels == slice(None) else 3.0, channels)
        once, _ = rescue_silent(model, x)
        twice, notes = rescue_silent(once, x)
        assert notes == ()
        assert all(torch.equal(v, once.state_dict()[k]) for k, v in twice.state_dict().items())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_healthy_nets_come_back_exactly(name: str) -> None:
    model, x = make(ZOO[name])
    rescued, notes = rescue_silent(model, x)
    assert rescued is not model
    assert notes == ()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in rescued.state_dict().items())


def test_a_silent_layer_gets_one_channel_with_a_constant_that_nobody_reads() -> None:
    model, x = faint_net(1e-12, 0.0, slice(None))
    rescued, notes = rescue_silent(model, x)
    assert "0: silent as a whole" in notes[0]
    with torch.no_grad():
        torch.testing.assert_close(rescued(x), model(x), rtol=1e-4, atol=1e-4)
        assert float(rescued[:3](x).max()) == pytest.approx(1, abs=1e-3)
    assert rescued[3].weight[0].abs().max() < 1e-4  # deaf, but for what its bias needs
    torch.testing.assert_close(rescued[3].bias, model[3].bias, rtol=1e-3, atol=1e-4)


def test_a_silent_depthwise_layer_speaks_to_readers_that_are_deaf_to_it() -> None:
    model, x = faint_net(1.0, 0.5, slice(0))
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()
    rescued, notes = rescue_silent(model, x)
    assert "0: silent as a whole" in notes[0]
    with torch.no_grad():
        torch.testing.assert_close(rescued(x), model(x), rtol=1e-4, atol=1e-4)
        assert float(rescued[:5](x).max()) == pytest.approx(1, abs=1e-3)
    assert not rescued[5].weight[:, 0].any()
    assert torch.equal(rescued[0].weight, model[0].weight)


@pytest.mark.slow
def test_the_int8_file_keeps_the_constant_of_a_faint_channel(tmp_path: Path) -> None:
    model, x = faint_net(1e-6, 3.0, slice(CHANNEL, CHANNEL + 1))
    with torch.no_grad():
        expected = model(x).numpy()
    lost = np.abs(int8_logits(model, x, tmp_path) - expected).max()
    kept = np.abs(int8_logits(rescue_silent(model, x)[0], x, tmp_path) - expected).max()
    assert kept < 0.6 * lost


@pytest.mark.slow
def test_the_built_in_kernels_refuse_a_silent_layer_until_it_is_rescued(tmp_path: Path) -> None:
    model, x = faint_net(1e-12, 0.0, slice(None))
    with pytest.raises(DeviceError, match="no_integer_overflow_from_quantization"):
        int8_logits(model, x, tmp_path)
    with torch.no_grad():
        expected = model(x).numpy()
    found = int8_logits(rescue_silent(model, x)[0], x, tmp_path)
    assert np.abs(found - expected).max() < 0.02
