"""Operators that a profile names: which words there are, what is warned of, and what is refused."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import pytest
import tinynet
import torch
import yaml
from torch import nn
from torch.nn import functional

from edgeprune.errors import ModelError, SpecError
from edgeprune.pipeline.files.operators import check, places
from edgeprune.records import catalog
from edgeprune.records.base import parse
from edgeprune.records.operators import WORDS, word_of
from edgeprune.records.target import Profile
from edgeprune.workload.trace import traced

SAID = {"cost": "runs on the CPU", "source": "a data sheet, page 4", "read_on": "2026-11-29"}


SPECTRAL = """
import torch
from torch import nn


class Mix(nn.Module):
    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(1, 16, 3), Mix()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.mix(self.stem(x)).mean((2, 3)))


def build():
    return Net()
"""


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
    plain = catalog.profile("cortex-a72").model_dump(mode="json") | {
        "avoid_ops": [],
        "forbidden_ops": [],
    }
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
        (nn.Upsample(scale_factor=2, mode="bicubic"), "bicubic"), (nn.Fold(4, 2, stride=2), "fold"),
        (nn.Unfold(2), "unfold"), (nn.AdaptiveMaxPool2d(2), "adaptive_max_pool"),
    ],
)  # fmt: skip
def test_a_layer_is_found_by_its_word(module, word):
    shape = (1, 12, 4) if word == "fold" else (1, 3, 8, 8)
    found = places(traced(nn.Sequential(module).eval(), torch.zeros(shape).numpy()))
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


def _max_unpool(x: torch.Tensor) -> torch.Tensor:
    return functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), 2)


class Doing(nn.Module):
    """One operation of a shipped profile's list, as a layer."""

    OPERATIONS: ClassVar[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "bicubic": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bicubic"),
        "adaptive_max_pool": lambda x: functional.adaptive_max_pool2d(x, 1),
        "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x), n=x.shape[3]),
        "fft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:]),
        "fftn": lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3)), dim=(2, 3)),
        "fold": lambda x: functional.fold(functional.unfold(x, 2, stride=2), 8, 2, stride=2),
        "mish": functional.mish,
        "max_unpool": _max_unpool,
    }

    def __init__(self, word: str) -> None:
        super().__init__()
        self.operation = self.OPERATIONS[word]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x)


TARGETS = {name: catalog.target(name) for name in catalog.targets()}
FORBIDDEN = [
    (target.name, form, fact.op)
    for target in TARGETS.values()
    for form in (target.format, *(other.format for other in target.formats))
    for fact in catalog.profile(target.profile).forbidden_ops
]


@pytest.mark.parametrize(("name", "form", "word"), FORBIDDEN)
def test_what_a_shipped_profile_forbids_is_refused_with_its_layer_and_source(name, form, word):
    profile = catalog.profile(TARGETS[name].profile)
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 3, 1), odd=Doing(word)))
    program = traced(model.eval(), torch.zeros(1, 3, 8, 8).numpy())
    (fact,) = (f for f in profile.forbidden_ops if f.op == word)
    if form in fact.decomposed_by:
        check(program, profile, form)
        return
    said = rf"{profile.name} cannot run, but has {word} in odd: .*\({re.escape(fact.source)}"
    with pytest.raises(ModelError, match=said) as caught:
        check(program, profile, form)
    assert "\n" not in str(caught.value)
    assert "choose a target with another profile" in str(caught.value)


@pytest.mark.parametrize("name", sorted({target.profile for target in TARGETS.values()}))
def test_every_shipped_profile_says_what_cannot_run(name):
    assert catalog.profile(name).forbidden_ops


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


def test_a_run_for_a_shipped_target_stops_at_what_its_accelerator_lacks(tmp_path):
    home = tinynet.project(tmp_path / "home", weights=None, labels=None)
    (home / "net.py").write_text(SPECTRAL)
    done = tinynet.edgeprune_here(home, "deploy", "--target", "jetson-orin-nano", "--dry-run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.returncode, len(errors)) == (3, 1), done.stderr
    assert "jetson-orin cannot run, but has fft2 in mix: is not read by TensorRT's" in errors[0]
    assert not list(home.rglob("*.onnx"))
