"""The agent on a Mac: Core ML through a coremltools that records what it is asked, and Linux-only calls that must not be missed there."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import coreml_fixture
import numpy as np
import pytest

from edgeprune.devices.agent import coreml, environments, lease, machine, runtimes, telemetry
from edgeprune.devices.agent import worker as workers
from edgeprune.devices.agent.wire import Refused
from edgeprune.devices.board import open_board
from edgeprune.devices.link import replies
from edgeprune.devices.link.frames import Refusal
from edgeprune.errors import DeviceError
from edgeprune.formats.shared.model_bytes import packed
from edgeprune.records.device import Device

SCALE, BIAS = 1 / (255 * 0.5), -0.25 / 0.5


class Value:
    """A description of one input or output, as the protobuf message reads."""

    def __init__(
        self, name: str, shape: tuple[int, ...] = (), image: tuple[int, int] | None = None
    ):
        kind = "imageType" if image else "multiArrayType" if shape else "stringType"
        height, width = image or (0, 0)
        self.name = name
        self.type = types.SimpleNamespace(
            WhichOneof=lambda _: kind,
            imageType=types.SimpleNamespace(height=height, width=width),
            multiArrayType=types.SimpleNamespace(shape=shape),
        )


class Tools:
    """Stands for coremltools: keeps every call, and answers with the mean brightness of the image."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.images: list[np.ndarray] = []
        units = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
        self.module = types.ModuleType("coremltools")
        self.module.ComputeUnit = types.SimpleNamespace(**{u: u for u in units})
        utils = types.SimpleNamespace(load_spec=self.load_spec, compile_model=self.compile_model)
        self.module.models = types.SimpleNamespace(utils=utils, CompiledMLModel=self.compiled)
        self.inputs = [Value("image", image=(8, 8))]
        self.notes = {"edgeprune.scale": repr(SCALE), "edgeprune.bias": repr(BIAS)}

    def load_spec(self, path: str) -> Any:
        self.calls.append(("load_spec", sorted(p.name for p in Path(path).iterdir())))
        outputs = [Value("classLabel"), Value("output", (1, 3))]
        metadata = types.SimpleNamespace(userDefined=self.notes)
        description = types.SimpleNamespace(input=self.inputs, output=outputs, metadata=metadata)
        return types.SimpleNamespace(description=description)

    def compile_model(self, path: str, target: str) -> str:
        self.calls.append(("compile", Path(target).name))
        return target

    def compiled(self, path: str, compute_units: str) -> Any:
        self.calls.append(("load", compute_units))
        return types.SimpleNamespace(predict=self.predict)

    def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
        x = np.asarray(next(iter(feeds.values())), np.float32)
        self.images.append(x)
        return {"classLabel": "cat", "output": np.array([[x.mean(), 0, 1]], np.float64)}


@pytest.fixture
def mac(monkeypatch) -> Tools:
    """This process as a Mac with coremltools."""
    tools = Tools()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "coremltools", tools.module)
    return tools


def content() -> bytes:
    return packed(coreml_fixture.files("fp16"))


@pytest.mark.parametrize(
    ("runtime", "units"),
    [
        ("coreml", "ALL"),
        ("coreml-ne", "CPU_AND_NE"),
        ("coreml-gpu", "CPU_AND_GPU"),
        ("coreml-cpu", "CPU_ONLY"),
    ],
)
def test_a_package_is_compiled_and_loaded_for_the_processors_of_its_runtime(mac, runtime, units):
    model = runtimes.open_model(content(), runtime, 1, True)
    assert [name for name, _ in mac.calls] == ["load_spec", "compile", "load"]
    assert mac.calls[0][1] == ["Data", "Manifest.json"]
    assert mac.calls[-1][1] == units
    assert min(model.compile_ns, model.load_ns, model.first_ns) > 0
    assert model.inputs == [{"name": "image", "shape": [1, 1, 8, 8], "dtype": "float32"}]
    assert model.outputs == [{"name": "output", "shape": [1, 3], "dtype": "float32"}]


def test_a_sample_becomes_the_pixels_it_came_from(mac):
    model = runtimes.open_model(content(), "coreml", 1, True)
    pixels = coreml_fixture.raw(3)
    answers = runtimes.infer(model, coreml_fixture.seen(pixels))
    assert answers.shape == (3, 3)
    assert answers.dtype == np.float32
    assert [np.array_equal(a, b) for a, b in zip(mac.images[-3:], pixels, strict=True)] == [
        True
    ] * 3
    assert np.allclose(answers[:, 0], pixels.reshape(3, -1).mean(1))


def test_a_colour_sample_is_denormalised_by_channel(mac):
    mac.inputs = [Value("image", image=(4, 5))]
    mac.notes = {
        "edgeprune.scale": repr(1 / 255),
        "edgeprune.bias": "0.0 0.0 0.0",
        "edgeprune.mean": "0.4 0.5 0.6",
        "edgeprune.std": "0.2 0.25 0.3",
    }
    model = runtimes.open_model(content(), "coreml", 1, True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    x = (pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    model.call(x.transpose(2, 0, 1)[None].astype(np.float32))
    assert np.array_equal(mac.images[-1], pixels)


def test_numbers_go_in_as_they_are(mac):
    mac.inputs = [Value("input", (1, 4))]
    model = runtimes.open_model(content(), "coreml", 1, True)
    model.call(np.arange(4, dtype=np.float32)[None])
    assert mac.images[-1].tolist() == [[0, 1, 2, 3]]


def test_a_worker_times_it_and_tells_the_compilation_apart(mac):
    worker = workers.Worker()
    blob = content()
    request = {
        "op": "load",
        "keys": ["net"],
        "sizes": [len(blob)],
        "runtime": "coreml",
        "threads": 1,
        "delegate": True,
    }
    reply, _ = worker.serve(request, blob)
    loaded = replies.ManyLoaded.model_validate_json(json.dumps({"models": reply["models"]})).models[
        "net"
    ]
    assert isinstance(loaded, replies.LoadedModel)
    assert loaded.compile_ns is not None
    assert worker.models["net"].answer() == worker.models["net"].answer()


def test_an_image_package_that_tells_no_scale_is_refused(mac):
    mac.notes = {}
    with pytest.raises(Refused, match="does not say how it scales"):
        runtimes.open_model(content(), "coreml", 1, True)


def test_a_package_with_a_path_that_leaves_its_folder_is_refused(mac, tmp_path):
    blob = packed({"ok": b"1"}).replace(b"ok", b"..")
    with pytest.raises(Refused, match="must not hold"):
        coreml.unpack(blob, str(tmp_path / "net"))
    assert not list(tmp_path.iterdir())


def test_a_board_that_is_no_mac_says_so():
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    for attempt in (
        lambda: runtimes.open_model(content(), "coreml", 1, True),
        lambda: environments.probe(sys.executable, "coreml"),
    ):
        with pytest.raises(Refused, match="Core ML runs on a Mac only, and this board runs linux"):
            attempt()


def test_a_board_refuses_the_runtime_with_a_typed_error(tmp_path):
    device = Device(
        transport="local", targets=(), stand_in=True, lease_file=str(tmp_path / "lease")
    )
    with open_board("here", device) as board:
        with pytest.raises(DeviceError, match="Core ML runs on a Mac only"):
            board.runtime_version("coreml")
        with pytest.raises(Refusal, match="Core ML runs on a Mac only"):
            board.load("net", content(), runtime="coreml", threads=1)


# What a Mac lacks


def test_a_machine_without_proc_and_sys_is_described(mac, monkeypatch):
    monkeypatch.setattr(machine, "read_text", lambda path: None)
    monkeypatch.setattr(machine.os.path, "exists", lambda path: False)
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    told = {"machdep.cpu.brand_string": "Apple M4", "kern.bootsessionuuid": "0A-1B"}
    monkeypatch.setattr(machine, "sysctl", told.get)
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    facts = machine.machine_facts()
    assert (facts["cpu_model"], facts["boot_id"]) == ("Apple M4", "0a-1b")
    assert not facts["emulated"]
    assert facts["affinity"] is None
    assert machine.usable_cpus() == []
    replies.Hello.model_validate_json(json.dumps(facts))


def test_sysctl_is_asked_on_a_mac_only(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(sys, "platform", "linux")
    assert machine.sysctl("kern.bootsessionuuid") is None
    assert asked == []


def test_telemetry_of_a_machine_without_proc_and_sys_is_all_unknown(mac, tmp_path):
    found = telemetry.snapshot(str(tmp_path))
    assert {k: v for k, v in found.items() if v not in (None, [])} == {}


def test_the_lock_is_named_without_proc(mac, tmp_path, monkeypatch):
    def missing(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(lease.os, "readlink", missing)
    taken = lease.Lease([str(tmp_path / "gone" / "lock" / "x"), str(tmp_path / "lease")])
    assert taken.path == str(tmp_path / "lease")


def test_an_agent_is_recognised_by_ps(mac, monkeypatch):
    monkeypatch.setattr(lease, "read_text", lambda path: None)
    lines = {"1": "/usr/bin/python3 -B /x/agent-0123456789abcdef.pyz", "2": "/bin/zsh"}
    monkeypatch.setattr(lease, "run", lambda root, program, *a: lines.get(a[1]))
    assert lease._is_agent(1)
    assert not lease._is_agent(2)


def test_memory_of_a_worker_is_counted_in_bytes_on_a_mac(mac, monkeypatch):
    usage = types.SimpleNamespace(ru_maxrss=5_000_000)
    monkeypatch.setattr(workers.resource, "getrusage", lambda who: usage)
    assert workers.peak_memory_bytes() == 5_000_000


def test_a_worker_starts_without_prctl_affinity_and_proc(mac, monkeypatch, tmp_path):
    monkeypatch.setattr(workers.ctypes, "CDLL", lambda name: object())
    monkeypatch.delattr(workers.os, "sched_setaffinity", raising=False)
    limits = []
    monkeypatch.setattr(workers.resource, "setrlimit", lambda *a: limits.append(a))
    real = open

    def no_proc(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", no_proc)
    workers.prepare(os.getppid(), [0])
    assert len(limits) == 1
    assert len(workers.shuffle_memory()) == 4
