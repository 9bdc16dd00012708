"""A pruned model goes through its file unchanged, and no other file, model or damage passes for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import ZOO, make

from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.compress.plain_source import model_source
from edgeprune.compress.pruned_file import load_pruned, save_pruned
from edgeprune.errors import IntegrityError, ModelError, SpecError

NETS = [
    "plain", "residual", "inverted", "multiplier", "grouped", "dense", "inception", "squeeze-excite", "flattened", "gated",
    "shared-head", "shared", "layer-norm", "one-dimensional", "mlp", "transposed",
]  # fmt: skip


def pruned(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A net of the zoo without a third of every group, and inputs."""
    model, x = make(ZOO[name])
    groups, _ = find_groups(model, x[:1])
    by_name = {g.name: g for g in groups}
    removed = {}
    for group in groups:
        gone = group.channels // 3 // group.step * group.step
        removed[group.name] = list(range(gone))
    return remove_channels(model, by_name, removed, x[:1]), x


@pytest.mark.parametrize("name", NETS)
def test_every_net_of_the_zoo_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model, x = pruned(name)
    save_pruned(model, tmp_path / "pruned.safetensors")
    torch.manual_seed(99)  # other weights than those that were pruned
    found = load_pruned(ZOO[name].build, tmp_path / "pruned.safetensors")
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert repr(found) == repr(model)
    found.train()(x).sum().backward()  # type: ignore[no-untyped-call]


def test_a_bias_that_pruning_added_comes_back(tmp_path: Path) -> None:
    model, x = pruned("plain")
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is None)
    layer.bias = nn.Parameter(torch.randn(layer.out_channels))
    save_pruned(model, tmp_path / "pruned.safetensors")
    found = load_pruned(ZOO["plain"].build, tmp_path / "pruned.safetensors")
    with torch.no_grad():
        assert torch.equal(found(x), model(x))


def test_a_factory_may_be_named_as_for_deploy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = pruned("mlp")
    save_pruned(model, tmp_path / "pruned.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from zoo import ZOO\n\n\ndef build():\n    return ZOO['mlp'].build()\n"
    )
    found = load_pruned("net.py:build", "pruned.safetensors")
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    with pytest.raises(SpecError, match="no such file"):
        load_pruned("other.py:build", "pruned.safetensors")


def test_another_model_is_told_apart(tmp_path: Path) -> None:
    model, _ = pruned("plain")
    path = tmp_path / "pruned.safetensors"
    save_pruned(model, path)
    for other in (ZOO["residual"].build, ZOO["mlp"].build, lambda: nn.Linear(3, 3)):
        with pytest.raises(ModelError, match="another model"):
            load_pruned(other, path)
    with pytest.raises(ModelError, match="torch module"):
        load_pruned(lambda: "a net", path)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("change", ["head", "padding", "activation", "width", "extra"])
def test_a_factory_that_differs_in_any_setting_is_told_apart(change: str, tmp_path: Path) -> None:
    def build(change: str = "") -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(
                3, 24 if change == "width" else 16, 3, padding=0 if change == "padding" else 1
            ),
            nn.SiLU() if change == "activation" else nn.ReLU(),
            nn.Conv2d(24 if change == "width" else 16, 8, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5 if change == "head" else 4),
            *([nn.Identity()] if change == "extra" else []),
        )

    dense = build().eval()
    x = torch.randn(2, 3, 8, 8)
    groups, _ = find_groups(dense, x[:1])
    removed = {g.name: range(4) for g in groups if g.channels == 16}
    small = remove_channels(dense, {g.name: g for g in groups}, removed, x[:1])
    save_pruned(small, tmp_path / "p.safetensors", dense)
    with torch.no_grad():
        assert torch.equal(load_pruned(build, tmp_path / "p.safetensors")(x), small(x))
    with pytest.raises(ModelError, match="another model"):
        load_pruned(lambda: build(change), tmp_path / "p.safetensors")


def header(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    """The header of a safetensors file, and what follows it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def test_widths_that_do_not_fit_the_weights_are_told(tmp_path: Path) -> None:
    model, _ = pruned("plain")
    path = tmp_path / "pruned.safetensors"
    save_pruned(model, path)
    head, rest = header(path)
    spec = json.loads(str(head["__metadata__"]["edgeprune"]))
    name = next(n for n, w in spec["layers"].items() if "out_channels" in w)
    for width, error in (
        (1, ModelError),
        (10**6, ModelError),
        (0, IntegrityError),
        ("os.system", IntegrityError),
    ):
        spec["layers"][name]["out_channels"] = width
        head["__metadata__"]["edgeprune"] = json.dumps(spec)
        text = json.dumps(head).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
        with pytest.raises(error):
            load_pruned(ZOO["plain"].build, path)


def test_damage_and_other_files_are_no_pruned_models(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, _ = pruned("plain")
    path = tmp_path / "pruned.safetensors"
    save_pruned(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match="damaged"):
        load_pruned(ZOO["plain"].build, path)
    path.write_bytes(b"\x80\x04" + content)
    with pytest.raises(IntegrityError, match="damaged"):
        load_pruned(ZOO["plain"].build, path)
    save_file(model.state_dict(), path)
    with pytest.raises(IntegrityError, match="not the widths"):
        load_pruned(ZOO["plain"].build, path)
    with pytest.raises(SpecError, match="no file"):
        load_pruned(ZOO["plain"].build, tmp_path / "gone.safetensors")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_pruned(model, path)
    with pytest.raises(IntegrityError, match="finite"):
        load_pruned(ZOO["plain"].build, path)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        """One matrix, read by two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.relu(self.one(x)))

    model = Tied().eval()
    save_pruned(model, tmp_path / "tied.safetensors")
    found = load_pruned(Tied, tmp_path / "tied.safetensors")
    assert found.one.weight is found.two.weight


def module_of(text: str) -> dict[str, object]:
    """What a source file defines."""
    found: dict[str, object] = {}
    exec(compile(text, "pruned.py", "exec"), found)
    return found


@pytest.mark.parametrize(
    "name", [*NETS, "u-net", "shuffled", "spatial-gate", "functional", "layer-scale", "group-norm"]
)
def test_every_net_of_the_zoo_can_be_written_as_plain_source(name: str) -> None:
    model, x = pruned(name)
    text = model_source(model, f"The net {name}.")
    assert "edgeprune" not in "".join(line for line in text.splitlines() if "import" in line)
    built = module_of(text)["build"]()  # type: ignore[operator]
    assert isinstance(built, nn.Module)
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(built(x), model(x))


def test_a_title_cannot_end_the_docstring() -> None:
    model, _ = make(ZOO["mlp"])
    text = model_source(model, 'net.py:build"""\nraise SystemExit(1)\n"""\\')
    built = module_of(text)["build"]()  # type: ignore[operator]
    assert built.load_state_dict(model.state_dict())  # type: ignore[attr-defined]


def test_what_plain_source_cannot_say_is_named() -> None:
    class Own(nn.Module):
        """Calls a function of the user's."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    with pytest.raises(ModelError, match="attention is a MultiheadAttention"):
        model_source(Own().eval(), "x")

    class Branching(nn.Module):
        """Looks at its data."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot be written as source"):
        model_source(Branching(), "x")
