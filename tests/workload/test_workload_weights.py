"""Weights files, masks of earlier pruning, and dead channels."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from edgeprune.errors import ModelError
from edgeprune.workload.model import dead_channels, digest, fold_masks, prepare, read_weights


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def state(seed: int = 1) -> dict[str, torch.Tensor]:
    return net(seed).state_dict()


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_usual_way_to_save_weights_is_read(
    tmp_path: Path, kind: str, wrapper: str | None, prefix: str
) -> None:
    named = {prefix + name: tensor for name, tensor in state().items()}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(named, path)
    else:
        content = named if wrapper is None else {"epoch": 3, wrapper: named}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    model, notes = prepare(net(), read_weights(path), where="w")
    assert_same(model, state())
    assert notes == ()


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    content = {"weight": [0.0, 1.0], "run": Runs(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ModelError) as caught:
        read_weights(path)
    assert not trace.exists()
    assert "refused" in str(caught.value)
    assert "posix.mkdir" in str(caught.value)
    assert "torch.save(model.state_dict(), 'weights.pt')" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_saved_model_is_refused_with_the_way_to_save_it_again(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"torch\.nn\.modules\.container\.Sequential.*state_dict"):
        read_weights(tmp_path / "w.pt")


def test_torchscript_weights_are_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="TorchScript archive"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, share: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("these are not weights at all")
    with pytest.raises(ModelError, match="not a weights file"):
        read_weights(tmp_path / "w.pt")
    torch.save([torch.zeros(2)], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds list"):
        read_weights(tmp_path / "w.pt")
    torch.save({"a": torch.zeros(2), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="'epoch' is int"):
        read_weights(tmp_path / "w.pt")


def test_missing_and_unexpected_tensors_are_listed_with_their_shapes() -> None:
    given_state = state()
    del given_state["3.bias"]
    given_state["extra.weight"] = torch.zeros(2, 3)
    with pytest.raises(ModelError) as caught:
        prepare(net(), given_state, where="w.pt")
    assert "lacks 3.bias [5]" in str(caught.value)
    assert "has extra.weight [2, 3] besides" in str(caught.value)


def test_many_problems_are_cut_short() -> None:
    wrong = {f"layer{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ModelError, match=r"and \d+ more"):
        prepare(net(), wrong, where="w.pt")


def test_a_wrong_shape_shows_both() -> None:
    given_state = {**state(), "3.weight": torch.zeros(5, 20)}
    with pytest.raises(ModelError, match=r"3\.weight is \[5, 20\] in the file but \[5, 16\]"):
        prepare(net(), given_state, where="w.pt")


def test_weights_from_before_the_batch_counter_are_taken() -> None:
    given_state = {n: t for n, t in state().items() if not n.endswith("num_batches_tracked")}
    model, _ = prepare(net(), given_state, where="w.pt")
    assert torch.equal(model.state_dict()["3.weight"], state()["3.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "3.bias"])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    given_state = state()
    given_state[name].view(-1)[1] = value
    with pytest.raises(ModelError, match=rf"{name} of w\.pt has 1 NaN or Inf"):
        prepare(net(), given_state, where="w.pt")


def pruned_net() -> nn.Module:
    model = net(2)
    prune.ln_structured(model[0], "weight", amount=0.5, n=1, dim=0)
    prune.l1_unstructured(model[3], "weight", amount=0.3)
    prune.random_unstructured(model[3], "weight", amount=0.2)  # two masks on one tensor
    return model


def test_masks_in_a_weights_file_are_multiplied_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    masked = pruned_net()
    torch.save(masked.state_dict(), tmp_path / "w.pt")
    model, notes = prepare(net(), read_weights(tmp_path / "w.pt"), where="w.pt")
    assert torch.equal(model[0].weight, masked[0].weight)
    assert torch.equal(model[3].weight, masked[3].weight)
    assert "folded into 2 tensors" in notes[0]


def test_a_live_pruned_model_becomes_plain_and_stays_as_it_was() -> None:
    masked = pruned_net()
    x = torch.randn(2, 3, 4, 4)
    masked.eval()
    expected = masked(x)
    model, notes = prepare(masked, None, where="live")
    assert prune.is_pruned(masked)
    assert not prune.is_pruned(model)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert torch.equal(model(x), expected)
    assert isinstance(model[0].weight, nn.Parameter)
    assert notes


def test_a_pruned_factory_takes_pruned_weights_and_plain_weights() -> None:
    masked = pruned_net()
    expected = masked[3].weight.detach().clone()
    model, _ = prepare(pruned_net(), masked.state_dict(), where="w.pt")
    assert torch.equal(model[3].weight, expected)
    model, _ = prepare(pruned_net(), state(), where="w.pt")
    assert_same(model, state())


def test_weight_and_spectral_norm_of_both_kinds_become_plain() -> None:
    x = torch.randn(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layers = [torch.nn.utils.weight_norm(nn.Linear(16, 3))]
    layers.append(torch.nn.utils.spectral_norm(nn.Linear(16, 3)))
    layers.append(parametrizations.weight_norm(nn.Linear(16, 3)))
    layers.append(parametrizations.spectral_norm(nn.Linear(16, 3)))
    for layer in layers:
        layer.eval()  # spectral norm changes its state at each pass in training mode
        layer(x)
        model, _ = prepare(nn.Sequential(layer), None, where="live")
        assert set(model.state_dict()) == {"0.weight", "0.bias"}
        assert torch.allclose(model(x), layer(x))


def test_only_pairs_of_orig_and_mask_are_folded() -> None:
    folded, count = fold_masks(
        {
            "a.weight_orig": torch.tensor([1.0, 2.0]),
            "a.weight_mask": torch.tensor([0.0, 1.0]),
            "b.attention_mask": torch.ones(2),
            "c.weight_orig": torch.ones(1),
        }
    )
    assert count == 1
    assert folded.keys() == {"a.weight", "b.attention_mask", "c.weight_orig"}
    assert folded["a.weight"].tolist() == [0.0, 2.0]


def test_channels_masked_as_a_whole_are_reported_as_dead() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[[1, 3]] = 0
        model[0].bias[[1]] = 0
        model[3].weight[4, :-1] = 0
    assert dead_channels(model) == {"0": (1,)}
    with torch.no_grad():
        model[0].bias[3] = 0
    assert dead_channels(model) == {"0": (1, 3)}


def test_dead_channels_of_transposed_and_grouped_convolutions_are_output_channels() -> None:
    transposed = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    with torch.no_grad():
        transposed.weight[3:, 1] = 0  # second group, its second output: channel 3
        depthwise.weight[2] = 0
    model = nn.Sequential(transposed, depthwise)
    assert dead_channels(model) == {"0": (3,), "1": (2,)}
    assert bool((transposed(torch.randn(1, 6, 5, 5))[:, 3] == 0).all())


def test_the_digest_tells_names_values_and_code_apart() -> None:
    model = net()
    first = digest(model, "code")
    assert digest(net(), "code") == first
    assert digest(model, "other code") != first
    assert digest(nn.Sequential(model), "code") != first
    with torch.no_grad():
        model[3].bias[0] += 1e-6
    assert digest(model, "code") != first
