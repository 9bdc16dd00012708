"""Operators that a profile names: which words there are, what is warned of, and what is refused."""

from __future__ import annotations

import pytest
import tinynet
import torch
import yaml
from torch import nn

from edgeprune import catalog
from edgeprune.conversion import traced
from edgeprune.errors import ModelError, SpecError
from edgeprune.operator_checks import check, places
from edgeprune.operators import WORDS, word_of
from edgeprune.records import parse
from edgeprune.specs import Profile

SAID = {"cost": "runs on the CPU", "source": "a data sheet, page 4", "read_on": "2026-11-29"}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(inplace=True))
        self.more = nn.ModuleList([nn.Hardswish() for _ in range(4)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.more:
            x = layer(x)
        return torch.softmax(self.norm(x.mean((2, 3))), 1)


@pytest.fixture(scope="module")
def program():
    return traced(Mixed().eval(), torch.zeros(1, 3, 8, 8).numpy())


def profile(**lists: object) -> Profile:
    plain = catalog.profile("cortex-a72").model_dump(mode="json") | {"avoid_ops": []}
    return parse(Profile, plain | lists, where="mine.yaml")


def test_every_traced_name_has_one_word():
    names = [name for found in WORDS.values() for name in found]
    assert len(names) == len(set(names))
    assert all(word_of(f"aten.{n}.default") == w for w, found in WORDS.items() for n in found)
    assert all(hasattr(torch.ops.aten, name) for name in names)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.Hardswish(inplace=True), "hard_swish"), (nn.SiLU(inplace=True), "silu"), (nn.GELU(), "gelu"),
        (nn.Softmax(1), "softmax"), (nn.LayerNorm(8), "layer_norm"), (nn.Upsample(scale_factor=2), "interpolate"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "interpolate"), (nn.Sigmoid(), "sigmoid"),
        (nn.ConvTranspose2d(3, 4, 2), "transposed_conv"), (nn.GroupNorm(1, 3), "group_norm"),
    ],
)  # fmt: skip
def test_a_layer_is_found_by_its_word(module, word):
    found = places(traced(nn.Sequential(module).eval(), torch.zeros(1, 3, 8, 8).numpy()))
    assert word in found
    assert found[word] == ("0",)


def test_an_operator_to_avoid_gives_one_line_with_place_cost_and_source(program):
    avoid = [{"op": "hard_swish", **SAID}, {"op": "gelu", **SAID}, {"op": "softmax", **SAID}]
    hard_swish, softmax = check(program, profile(avoid_ops=avoid), "tflite")
    assert hard_swish == (
        "hard_swish in stem.1, more.0, more.1 and 2 more: on cortex-a72 runs on the CPU"
        " (a data sheet, page 4, read 2026-11-29)"
    )
    assert softmax.startswith("softmax in the model itself: ")


def test_a_forbidden_operator_is_refused_unless_the_converter_replaces_it(program):
    banned = {"op": "layer_norm", "decomposed_by": ["onnx"], **SAID}
    mine = profile(forbidden_ops=[banned])
    assert check(program, mine, "onnx") == ()
    with pytest.raises(ModelError, match=r"cortex-a72 cannot run, but has layer_norm in norm: "):
        check(program, mine, "tflite")


def test_an_unknown_word_is_refused_with_the_known_ones():
    with pytest.raises(SpecError, match=r"avoid_ops.*unknown operator 'hardswish'.*hard_swish"):
        profile(avoid_ops=[{"op": "hardswish", **SAID}])


@pytest.mark.parametrize("missing", SAID)
def test_each_entry_says_what_it_costs_and_who_says_so(missing):
    entry = {k: v for k, v in SAID.items() if k != missing}
    with pytest.raises(SpecError, match=missing):
        profile(forbidden_ops=[{"op": "gelu", **entry}])


def test_an_operator_is_either_avoided_or_forbidden():
    entry = {"op": "gelu", **SAID}
    with pytest.raises(SpecError, match="gelu does not"):
        profile(avoid_ops=[entry], forbidden_ops=[entry])


def test_the_shipped_profiles_agree_with_the_words():
    assert all(catalog.profile(name) for name in catalog.profiles())


def test_a_run_stops_before_any_work_with_one_line(tmp_path):
    home = tinynet.project(tmp_path / "home")
    (home / "profiles").mkdir()
    own = catalog.profile("x86-64").model_dump(mode="json")
    own["forbidden_ops"] = [{"op": "adaptive_avg_pool", **SAID}]
    (home / "profiles" / "x86-64.yaml").write_text(yaml.safe_dump(own))
    shown = tinynet.edgeprune_here(home, "profiles", "show", "x86-64")
    assert "adaptive_avg_pool" in shown.stdout
    done = tinynet.edgeprune_here(home, "deploy", "--target", "this-machine", "--dry-run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.returncode, len(errors)) == (3, 1)
    assert "adaptive_avg_pool in 9: runs on the CPU" in errors[0]
