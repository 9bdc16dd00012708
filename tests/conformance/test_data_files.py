"""Every shipped YAML loads, every name in it exists, and every hardware fact says where it comes from."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
from repo import REPO

from edgeprune import formats
from edgeprune.records import catalog
from edgeprune.records.base import read_yaml
from edgeprune.records.budget import parse_budget, parse_drop
from edgeprune.records.device import DeviceFile
from edgeprune.records.target import Profile, Target

TARGETS = sorted((REPO / "targets").iterdir())
PROFILES = sorted((REPO / "profiles").iterdir())
# A link, a file of a public repository, or a measurement of ours; plain "data sheet" cannot be looked up.
CITATION = re.compile(
    r"https?://\S+|\b[\w.-]+/[\w.-]+ [\w./-]+\.\w+|measured by this project on \S+"
)


def file_name(path: Path) -> str:
    return path.name


def test_there_is_a_target_for_each_supported_format():
    assert {read_yaml(Target, path).format for path in TARGETS} == {
        "tflite",
        "onnx",
        "tensorrt",
        "executorch",
        "coreml",
    }


@pytest.mark.parametrize("path", TARGETS, ids=file_name)
def test_every_target_loads_and_names_a_profile_that_knows_its_precisions(path):
    target = catalog.target(path)
    profile = catalog.profile(REPO / "profiles" / f"{target.profile}.yaml")
    assert set(target.precisions) <= set(profile.channel_steps)
    scheme = "static-int8-per-channel" if target.quantization.per_channel else "per-tensor"
    assert any(scheme in known for known in profile.int8_schemes)


@pytest.mark.parametrize("path", TARGETS, ids=file_name)
def test_every_target_has_the_default_gates(path):
    target = catalog.target(path)
    assert parse_budget(target.latency).value == pytest.approx(0.6)
    assert parse_drop(target.max_drop) == pytest.approx(0.01)


@pytest.mark.parametrize("path", TARGETS, ids=file_name)
def test_every_target_has_a_runtime_that_can_run_its_format(path):
    target = catalog.target(path)
    if target.format not in formats.names():
        pytest.skip(f"the format {target.format} has no module in this version")
    assert target.runtime.name in formats.load(target.format).info.runtimes


@pytest.mark.parametrize("path", PROFILES, ids=file_name)
def test_every_profile_loads_and_is_used(path):
    profile = catalog.profile(path)
    assert profile.summary
    assert profile.facts
    assert profile.name in {read_yaml(Target, target).profile for target in TARGETS}


@pytest.mark.parametrize("path", PROFILES, ids=file_name)
def test_every_fact_can_be_looked_up(path):
    profile = read_yaml(Profile, path)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    cited = {**profile.facts, **{f"steps {k}": v for k, v in profile.channel_steps.items()}}
    for name, fact in cited.items():
        assert CITATION.search(fact.source), f"{name}: {fact.source}"
        assert datetime.date.fromisoformat(fact.read_on) <= today + datetime.timedelta(days=1), name


@pytest.mark.parametrize("path", PROFILES, ids=file_name)
def test_channel_steps_are_powers_of_two(path):
    for steps in read_yaml(Profile, path).channel_steps.values():
        for step in (steps.conv, steps.depthwise, steps.linear):
            assert step & (step - 1) == 0


def test_the_devices_file_of_the_checkout_is_safe_to_start_from():
    devices = read_yaml(DeviceFile, REPO / "devices.yaml").devices
    assert set(devices) == {catalog.THIS_MACHINE}
    here = devices[catalog.THIS_MACHINE]
    assert here.transport == "local"
    assert here.stand_in
    known = {path.stem for path in TARGETS}
    assert set(here.targets) <= known
    assert {"rpi4", "rpi5", "this-machine"} <= set(here.targets)


def test_the_commented_devices_are_valid_when_uncommented(tmp_path):
    lines = (REPO / "devices.yaml").read_text().splitlines()
    entry = re.compile(r"^  # ( *[\w-]+:( .*)?)$")
    text = [f"  {m[1]}" if (m := entry.match(line)) else line for line in lines]
    path = tmp_path / "devices.yaml"
    path.write_text("\n".join(text))
    devices = read_yaml(DeviceFile, path).devices
    methods = {d.auth.method for d in devices.values() if d.auth is not None}
    assert methods == {"key", "agent", "password"}
    for device in devices.values():
        assert set(device.targets) <= {target.stem for target in TARGETS}
