"""What people write: budgets, targets, devices and workloads, and how mistakes in them are told."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import SpecError, UnknownName
from edgeprune.records.base import parse
from edgeprune.records.budget import parse_budget, parse_drop
from edgeprune.records.device import Device, DeviceFile
from edgeprune.records.target import Fact, Profile, Target
from edgeprune.records.workload import Preprocess, Workload

FINGERPRINT = "SHA256:" + base64.b64encode(bytes(range(32))).decode().rstrip("=")
TARGET = {
    "name": "my-board",
    "summary": "a board",
    "profile": "cortex-a72",
    "format": "tflite",
    "runtime": {"name": "litert"},
}
SSH = {
    "transport": "ssh",
    "targets": ["rpi4"],
    "host": "pi.local",
    "user": "pi",
    "auth": {"method": "key", "key_file": "~/.ssh/id"},
    "host_key": {"sha256": FINGERPRINT},
}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("15ms", "ms", 15.0),
        (" 0.25 ms ", "ms", 0.25),
        ("60%", "ratio", 0.6),
        ("100%", "ratio", 1.0),
        ("2.5x", "ratio", 0.4),
        ("1x", "ratio", 1.0),
    ],
)
def test_budgets_are_absolute_a_share_or_a_speed_up(text, kind, value):
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))
    assert budget.text == text.strip()


@pytest.mark.parametrize(
    "text", ["", "15", "ms", "15 s", "-5ms", "0ms", "0%", "101%", "0.5x", "1e3ms", "15ms ok"]
)
def test_other_budgets_are_refused_with_the_value(text):
    with pytest.raises(ValueError, match="latency budget") as caught:
        parse_budget(text)
    assert repr(text) in str(caught.value)


@given(st.floats(0.01, 100), st.floats(0.01, 1e4))
def test_a_share_of_the_dense_latency_never_exceeds_it(percent, dense_ms):
    limit_ms = parse_budget(f"{percent:.4f}%").limit_ms(dense_ms)
    assert 0 < limit_ms <= dense_ms * (1 + 1e-12)


def test_an_absolute_budget_ignores_the_dense_latency():
    assert parse_budget("15ms").limit_ms(400.0) == 15.0


@pytest.mark.parametrize(("text", "ratio"), [("1%", 0.01), ("0%", 0.0), (" 0.5 % ", 0.005)])
def test_an_accuracy_drop_is_in_percentage_points(text, ratio):
    assert parse_drop(text) == pytest.approx(ratio)


@pytest.mark.parametrize("text", ["1", "-1%", "101%", "one%", ""])
def test_other_drops_are_refused(text):
    with pytest.raises(ValueError, match="max_drop must be between"):
        parse_drop(text)


def test_a_target_has_the_documented_defaults():
    target = parse(Target, TARGET, where="here")
    assert (target.latency, target.max_drop, target.bundle) == ("60%", "1%", "python")
    assert target.precisions == ("fp32", "int8")
    assert target.runtime.threads == 1
    assert target.quantization.per_channel


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"latency": "fast"}, "latency in here: a latency budget must look like"),
        ({"max_drop": "1"}, "max_drop in here: max_drop must be between"),
        ({"format": "caffe"}, "format in here"),
        ({"runtime": {"name": "litert", "threads": 0}}, "runtime.threads in here"),
        ({"precisions": ["int4"]}, "precisions"),
        ({"name": "My Board"}, "name in here"),
        ({"schema_version": 2}, "schema_version in here"),
        ({"quantization": {"calibration_samples": 1}}, "quantization.calibration_samples in here"),
    ],
)
def test_a_wrong_target_names_the_field_and_the_file(change, place):
    with pytest.raises(SpecError, match=place):
        parse(Target, TARGET | change, where="here")


def test_a_misspelt_key_of_a_target_is_corrected():
    with pytest.raises(UnknownName, match=r"did you mean 'runtime\.threads'"):
        parse(Target, TARGET | {"runtime": {"name": "litert", "thread": 1}}, where="here")


def test_a_profile_needs_a_source_and_a_date_for_every_fact():
    fact = {"value": 4, "source": "a data sheet", "read_on": "2026-11-23"}
    assert parse(Fact, fact, where="here").value == 4
    for missing in ("source", "read_on"):
        with pytest.raises(SpecError, match=missing):
            parse(Fact, {k: v for k, v in fact.items() if k != missing}, where="here")
    with pytest.raises(SpecError, match="read_on"):
        parse(Fact, fact | {"read_on": "last year"}, where="here")
    with pytest.raises(SpecError, match="source"):
        parse(Fact, fact | {"source": "web"}, where="here")


@pytest.mark.parametrize("value", [4, 0.5, "neon", True, [4, 32]])
def test_a_fact_keeps_the_type_of_its_value(value):
    fact = parse(
        Fact, {"value": value, "source": "a data sheet", "read_on": "2026-11-23"}, where="x"
    )
    expected = tuple(value) if isinstance(value, list) else value
    assert fact.value == expected
    assert type(fact.value) is type(expected)


@pytest.mark.parametrize("step", [0, 257, 8.0])
def test_a_channel_step_is_a_small_positive_integer(step):
    steps = {"conv": step, "depthwise": 8, "linear": 8, "source": "kernels", "read_on": "x"}
    profile = {
        "name": "p",
        "summary": "",
        "isa": "",
        "kernel_library": "",
        "facts": {},
        "channel_steps": {"int8": steps | {"source": "kernel sources", "read_on": "2026-11-23"}},
        "int8_schemes": [],
    }
    with pytest.raises(SpecError, match=r"channel_steps\.int8\.conv"):
        parse(Profile, profile, where="here")


def test_an_ssh_device_with_a_pinned_key_is_accepted():
    device = parse(Device, SSH, where="here")
    assert device.port == 22
    assert not device.stand_in


@pytest.mark.parametrize("key", ["host", "user", "auth", "host_key"])
def test_an_ssh_device_must_say_how_it_is_reached_and_recognised(key):
    with pytest.raises(SpecError, match=f"an ssh device must have {key}"):
        parse(Device, {k: v for k, v in SSH.items() if k != key}, where="here")


@pytest.mark.parametrize(
    "auth",
    [
        {"method": "key", "key_file": "~/k", "passphrase_ref": "env:PASS"},
        {"method": "password", "password_ref": "file:/run/secret"},
        {"method": "agent", "key_fingerprint": FINGERPRINT},
    ],
)
def test_each_way_to_log_in_is_read_back(auth):
    device = parse(Device, SSH | {"auth": auth}, where="here")
    assert device.auth is not None
    assert device.auth.method == auth["method"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"auth": {"method": "password", "password": "hunter2"}},
        {"auth": {"method": "password", "password_ref": "hunter2"}},
        {"auth": {"method": "key", "key_file": "k", "passphrase_ref": "hunter2"}},
        {"auth": {"method": "password", "password_ref": "env:X", "password": "hunter2"}},
        {"auth": {"method": "key", "key_file": "k", "passphrase": "hunter2"}},
        {"password": "hunter2"},
    ],
)
def test_a_literal_secret_is_refused_and_never_repeated(wrong):
    with pytest.raises(SpecError) as caught:
        parse(Device, SSH | wrong, where="here")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "pi.local; reboot"},
        {"host": "-oProxyCommand=x y"},
        {"user": "$(id)"},
        {"workdir": "~/a b"},
        {"python": "python3; id"},
        {"port": 0},
        {"host_key": {"sha256": "SHA256:short"}},
        {"connect_timeout_s": 0.0},
        {"transport": "telnet"},
    ],
)
def test_device_fields_that_could_reach_a_shell_or_weaken_the_link_are_refused(wrong):
    with pytest.raises(SpecError):
        parse(Device, SSH | wrong, where="here")


def test_a_misspelt_key_of_a_device_is_corrected():
    devices = {"devices": {"pi": SSH | {"hots": "x"}}}
    with pytest.raises(UnknownName, match=r"did you mean 'devices\.pi\.host'"):
        parse(DeviceFile, devices, where="devices.yaml")


def test_a_device_name_is_checked():
    with pytest.raises(SpecError, match="devices"):
        parse(DeviceFile, {"devices": {"My Pi": SSH}}, where="devices.yaml")


@pytest.mark.parametrize(
    ("preprocess", "problem"),
    [
        ({"mean": [0.5, 0.5]}, "mean must have 1 or 3"),
        ({"color": "grey", "std": [1.0, 1.0, 1.0]}, "std must have 1 or 1"),
        ({"std": [0.0]}, "std must be > 0"),
    ],
)
def test_preprocessing_that_does_not_fit_its_channels_is_refused(preprocess, problem):
    with pytest.raises(SpecError, match=problem):
        parse(Preprocess, preprocess, where="here")


def test_a_workload_needs_only_a_model_and_data():
    workload = parse(Workload, {"model": "net.py:make", "data": "images"}, where="here")
    assert workload.recovery.epochs > 0
    assert workload.target is None


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"model": "net.py"}, "model in here"),
        ({"model": "net.py:not a name"}, "model in here"),
        ({"latency": "soon"}, "latency in here"),
        ({"max_drop": "soon"}, "max_drop in here"),
        ({"seed": -1}, "seed in here"),
        ({"recovery": {"batch_size": 1}}, "recovery.batch_size in here"),
    ],
)
def test_a_wrong_workload_names_the_field(change, place):
    with pytest.raises(SpecError, match=place):
        parse(Workload, {"model": "net.py:make", "data": "images"} | change, where="here")
