"""A board that another client holds: it is waited for, with who holds it, and no longer than the user allows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinynet
import torch
import yaml
from bundle_fixture import make_bundle

from edgeprune import deploy, formats
from edgeprune.cli import main as cli
from edgeprune.devices.board import open_board
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.link.wait import WAIT_MINUTES, take_in_turn, wait_seconds
from edgeprune.errors import Busy, EdgepruneError, MissingTool, SpecError
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.options import Options
from edgeprune.records.device import Device
from edgeprune.records.formats import all_facts, format_facts

ANNA = {"user": "anna", "host": "laptop", "job": "deploy for rpi4", "since_s": 300.0, "pid": 4711}


class Clock:
    """Seconds that pass only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def waited(free_after_s: float, wait_s: float) -> tuple[list[str], Clock]:
    """What is said while a board is held for so long."""
    said: list[str] = []
    clock = Clock()

    def take() -> None:
        if clock.now < free_after_s:
            owner = {**ANNA, "since_s": 300.0 + clock.now}
            raise Refusal("busy", f"device 'pi' answered: {json.dumps(owner)}")

    take_in_turn("pi", take, wait_s, said.append, clock, clock.sleep)
    return said, clock


def test_a_free_board_is_taken_without_a_word():
    assert waited(0, 600)[0] == []


def test_who_holds_a_board_is_said_at_once_and_then_once_a_minute():
    said, clock = waited(150, 600)
    assert clock.now == 150
    assert said == [
        "pi is held by anna@laptop for 5 min (deploy for rpi4); waiting up to 10 min for it",
        "pi is still held by anna@laptop for 6 min (deploy for rpi4); waiting up to 9 min for it",
        "pi is still held by anna@laptop for 7 min (deploy for rpi4); waiting up to 8 min for it",
        "pi is free now, after 2 min",
    ]


def test_a_long_wait_is_said_about_twenty_times_at_most():
    said, _ = waited(24 * 3600, 24 * 3600 + 1)
    assert len(said) <= 22


def test_a_wait_ends_when_it_is_over_with_who_holds_the_board_and_the_flag():
    with pytest.raises(Busy) as caught:
        waited(1e9, 600)
    assert caught.value.exit_code == 75
    assert str(caught.value) == (
        "device 'pi' is held by anna@laptop for 15 min (deploy for rpi4),"
        " still after a wait of 10 min;"
        " give more minutes with --wait, or wait for it with: edgeprune devices wait pi"
    )


def test_without_a_wait_nothing_is_said():
    with pytest.raises(Busy, match="anna@laptop for 5 min") as caught:
        waited(1e9, 0)
    assert "waited" not in caught.value.message


def test_another_refusal_is_not_waited_for():
    def refuse() -> None:
        raise Refusal("lease", "no place for a lock")

    with pytest.raises(Refusal, match="no place"):
        take_in_turn("pi", refuse, 600, print, Clock(), Clock().sleep)


@pytest.mark.parametrize("holder", ["", "{", "[1]", '{"user": 3, "since_s": "soon"}', "{" * 5000])
def test_a_board_that_lies_about_its_holder_is_waited_for_all_the_same(holder):
    def take() -> None:
        raise Refusal("busy", f"device 'pi' answered: {holder}")

    clock = Clock()
    with pytest.raises(Busy, match="is held by "):
        take_in_turn("pi", take, 5, lambda _: None, clock, clock.sleep)
    assert clock.now == 5


@pytest.mark.parametrize("minutes", [-1, float("nan"), float("inf"), 1e9, "soon", [], 10**400])
def test_a_wait_must_be_a_number_of_minutes(minutes):
    with pytest.raises(SpecError, match="wait must be a number of minutes from 0 to 10080"):
        wait_seconds(minutes)


def test_a_wait_is_ten_minutes_where_nobody_says_otherwise():
    assert wait_seconds(None) == 600 == 60 * WAIT_MINUTES
    assert wait_seconds(0.5) == 30
    assert f"default {WAIT_MINUTES:g}," in help_of_wait()


def help_of_wait() -> str:
    (option,) = (p for p in cli.cli.commands["verify"].params if p.name == "wait")
    return str(option.help)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "words",
    [["deploy"], ["search"], ["profile"], ["verify"], ["devices", "setup"], ["devices", "clean"], ["devices", "restore"]],
)  # fmt: skip
def test_every_command_that_takes_a_board_can_wait_for_it(words):
    command: Any = cli.cli
    for word in words:
        command = command.commands[word]
    assert "--wait" in {name for p in command.params for name in p.opts}


# A board that is held, by a process of its own


def held_device(folder: Path) -> Device:
    return Device(
        transport="local", targets=("this-machine",), stand_in=True, lease_file=str(folder / "lock")
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose only board is held for the length of the test."""
    folder = tinynet.project(tmp_path / "project")
    device = held_device(tmp_path).model_dump(mode="json", exclude_defaults=True)
    device["targets"] = ["this-machine", "rpi4"]
    record = {"schema_version": 1, "devices": {"this-machine": device}}
    (folder / "devices.yaml").write_text(yaml.safe_dump(record))
    return folder


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[None]:
    with open_board("here", held_device(tmp_path), job="deploy for rpi5"):
        yield


DEPLOY = ("deploy", "--target", "this-machine", "--latency", "80%")


@pytest.mark.usefixtures("holder")
def test_a_busy_board_is_exit_code_75_after_the_wait_and_at_once_without(project):
    done = tinynet.edgeprune_here(project, *DEPLOY, "--wait", "0")
    assert done.returncode == 75
    assert "waiting" not in done.stderr
    assert "(deploy for rpi5)" in done.stderr
    done = tinynet.edgeprune_here(project, *DEPLOY, "--wait", "0.02")
    assert done.returncode == 75
    assert done.stderr.count("this-machine is held by") == 1
    error, hint = done.stderr.splitlines()[-2:]
    assert "deploy for rpi5), still after a wait of 1 s" in error
    assert "--wait" in hint


@pytest.mark.usefixtures("holder")
def test_a_busy_board_is_waited_for_from_python_too(project, monkeypatch):
    monkeypatch.chdir(project)
    x, y = tinynet.arrays()["train"]
    with pytest.raises(Busy, match="after a wait of 1 s"):
        deploy(
            tinynet.trained(),
            (x, y),
            target="this-machine",
            latency="80%",
            preprocess=api.Preprocess(color="grey"),
            wait=0.02,
        )


@pytest.mark.usefixtures("holder")
def test_verify_says_that_a_board_is_busy_with_its_own_exit_code(tmp_path, monkeypatch):
    make_bundle(tmp_path / "given")
    device = held_device(tmp_path).model_copy(update={"stand_in": False})
    monkeypatch.setattr("edgeprune.records.catalog.device", lambda _: device)
    done = tinynet.edgeprune_here(tmp_path, "verify", "given", "--device", "pi", "--wait", "0.02")
    assert done.returncode == 75
    assert "pi is held by" in done.stderr
    assert "L5 golden on pi" in done.stdout


def test_a_wait_that_is_interrupted_ends_cleanly(project, tmp_path):
    with open_board("here", held_device(tmp_path), job="deploy for rpi5"):
        words = [sys.executable, "-m", "edgeprune", *DEPLOY, "--wait", "5"]
        process = subprocess.Popen(
            words,
            cwd=project,
            env=tinynet.environment(project),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "this-machine is held by" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in err


def test_who_waits_goes_on_when_the_board_is_free(tmp_path):
    said: list[str] = []
    first = open_board("here", held_device(tmp_path), job="deploy for rpi5")
    began = time.monotonic()

    def free(text: str) -> None:
        said.append(text)
        first.close()

    with open_board("here", held_device(tmp_path), wait_s=60, say=free):
        assert time.monotonic() - began < 30
    assert [line.partition(" by ")[0].partition(",")[0] for line in said] == [
        "here is held",
        "here is free now",
    ]


# What can be told without the board is told before it is asked for


class Asked(Exception):
    """The board was asked for."""


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Asked

    monkeypatch.setattr(pipeline, "open_board", refuse)


def asked_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.chdir(folder)
    from edgeprune.records.base import read_yaml
    from edgeprune.records.workload import Workload
    from edgeprune.workload.load import load_workload

    loaded = load_workload(read_yaml(Workload, folder / "edgeprune.yaml"), folder)
    given = Options(**{"target": "this-machine", "latency": "80%", **options})
    from edgeprune.progress import Silent

    api.search_loaded(loaded, given, Silent())


@pytest.mark.usefixtures("no_board")
def test_a_sound_request_asks_for_its_board(project, monkeypatch):
    with pytest.raises(Asked):
        asked_of(project, monkeypatch)


def branching(folder: Path) -> None:
    source = tinynet.MODEL_SOURCE.replace("def build():", "def plain():") + (
        "\n\nclass Undecided(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.body = plain()\n"
        "    def forward(self, x):\n"
        "        y = self.body(x)\n        return y if y.sum() > 0 else -y\n"
        "\n\ndef build():\n    return Undecided()\n"
    )
    (folder / "net.py").write_text(source)
    tinynet.write_settings(folder, weights=None)


def forbidden(folder: Path) -> None:
    """A profile that cannot run the pooling of the model."""
    from edgeprune.records import catalog

    for kind in ("targets", "profiles"):
        (folder / kind).mkdir()
    target = catalog.target("this-machine")
    record = yaml.safe_load(catalog.profiles()[target.profile].read_text())
    fact = {
        "op": "adaptive_avg_pool",
        "cost": "missing",
        "source": "https://example.org/ops",
        "read_on": "2026-12-01",
    }
    record = {**record, "name": "bare", "forbidden_ops": [fact]}
    (folder / "profiles" / "bare.yaml").write_text(yaml.safe_dump(record))
    plain = yaml.safe_load(catalog.targets()["this-machine"].read_text())
    (folder / "targets" / "this-machine.yaml").write_text(
        yaml.safe_dump({**plain, "profile": "bare"})
    )


@pytest.mark.usefixtures("no_board")
@pytest.mark.parametrize(
    ("spoil", "says"),
    [(branching, "the model cannot be traced"), (forbidden, "must have no operator that bare")],
)
def test_a_model_that_cannot_run_there_is_refused_before_the_board(
    project, monkeypatch, spoil, says
):
    monkeypatch.chdir(project)
    spoil(project)
    with pytest.raises(EdgepruneError, match=says):
        asked_of(project, monkeypatch)


@pytest.mark.usefixtures("no_board")
@pytest.mark.parametrize("extra", [f.name for f in all_facts() if f.tools])
def test_a_missing_package_of_an_extra_is_found_before_the_board(extra, project, monkeypatch):
    monkeypatch.setitem(sys.modules, format_facts(extra).tools[-1].replace("-", "_"), None)
    with pytest.raises(MissingTool, match=rf"edgeprune\[{extra}\]"):
        formats.require_tools(extra)
    if extra == "onnx":  # the format of this machine
        with pytest.raises(MissingTool):
            asked_of(project, monkeypatch)


@pytest.mark.usefixtures("no_board")
def test_a_plan_that_does_not_fit_is_refused_before_the_board(project, monkeypatch):
    record = {
        "schema_version": 1,
        "target": "this-machine",
        "budget": "80%",
        "precision": "int8",
        "dense_ms": 2.5,
        "predicted_ms": 1.25,
        "measured_ms": 1.5,
        "widths": {"gone": 8},
        "admissible_widths": {},
    }
    (project / "plan.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="gone"):
        asked_of(project, monkeypatch, plan=project / "plan.json")


def test_what_was_worked_out_before_the_board_is_not_worked_out_again(project, monkeypatch):
    """The trace of the model is made once."""
    traces: list[object] = []
    export = torch.export.export

    def counted(model: Any, *args: Any, **rest: Any) -> Any:
        traces.append(type(model).__name__)
        return export(model, *args, **rest)

    from edgeprune.pipeline.context import Context
    from edgeprune.pipeline.stages import static_checks
    from edgeprune.workload import trace

    monkeypatch.setattr(trace.torch.export, "export", counted)
    loaded = api.from_objects(
        tinynet.trained(), tinynet.arrays(), preprocess=api.Preprocess(color="grey")
    )
    monkeypatch.chdir(project)
    job = api.resolve(loaded, Options(target="this-machine", latency="80%"))
    early = static_checks.check(job, for_planning=True)
    assert early is not None
    context = Context(job, None, None, None, None, None, None)  # type: ignore[arg-type]
    context.share(early)
    assert context.program is early.program
    assert context.groups is early.groups
    assert len(traces) == 1
