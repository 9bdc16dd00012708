"""A board that nobody prepared: added, set up without a network or a pip of its own, and looked over, all by commands."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from build_board import board_folder
from emulated_board import BARE_PYTHON

from edgeprune.cli import main as cli
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.setup.provision import setup
from edgeprune.devices.setup.runtime_pins import RuntimePins, load_pins
from edgeprune.progress import Silent
from edgeprune.records import catalog
from edgeprune.records.base import parse
from edgeprune.records.device import Device

pytestmark = [pytest.mark.board, pytest.mark.timeout(1200)]
VERSIONS = {"litert": "2.3.0", "tflite-runtime": "2.14.0", "onnxruntime": "1.27.0"}
FLAGS = [word for name in VERSIONS for word in ("--runtime", name)]
KILLER = {  # built with instructions that a Cortex-A72 lacks: microsoft/onnxruntime#23957
    "onnxruntime-1.21.0-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl": {
        "sha256": "7f9156cf6f8ee133d07a751e6518cf6f84ed37fbf8243156bd4a2c4ee6e073c8",
        "size_bytes": 14159570,
    }
}


@pytest.fixture(autouse=True)
def wheel_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels are fetched once, and kept beside the board."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(board_folder() / "cache"))


@pytest.fixture(scope="module")
def desk(arm64_board: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``devices.yaml`` was written by ``devices add``."""
    folder = tmp_path_factory.mktemp("desk")
    assert arm64_board.host_key is not None
    assert arm64_board.auth is not None
    argv = ["devices", "add", "pi", f"{arm64_board.user}@127.0.0.1:{arm64_board.port}"]
    argv += ["--key", str(arm64_board.auth.key_file), "--python", BARE_PYTHON]
    argv += ["--workdir", "~/desk"]  # other tests want a board without environments
    argv += ["--fingerprint", arm64_board.host_key.sha256, "--target", "rpi4"]
    cli.main([*argv, "--file", str(folder / "devices.yaml")])
    return folder


@pytest.fixture
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(desk)
    return desk


@pytest.fixture(scope="module")
def first_setup(desk: Path) -> str:
    """What ``devices setup`` says the first time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setenv("XDG_CACHE_HOME", str(board_folder() / "cache"))
        return said(["devices", "setup", "pi", "--quiet", *FLAGS])


def said(argv: list[str]) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        cli.main(argv)
    return stdout.getvalue()


def test_add_writes_an_entry_that_other_commands_use(at_desk, arm64_board):
    entry = catalog.device("pi")
    assert entry.host_key == arm64_board.host_key
    assert entry.targets == ("rpi4",)
    assert "pi is free" in said(["devices", "who", "pi"])


def test_setup_installs_every_runtime_and_a_second_one_sends_nothing(first_setup, at_desk):
    for runtime, version in VERSIONS.items():
        (line,) = (text for text in first_setup.splitlines() if text.startswith(runtime))
        assert line.split() == [runtime, version, "installed"]
    again = said(["devices", "setup", "pi", "--quiet", *FLAGS])
    assert again.count("already-there") == len(VERSIONS)
    assert "sent 0 B " in again


def test_check_names_the_processor_its_instructions_and_the_runtimes(first_setup, at_desk):
    shown = said(["devices", "check", "pi"])
    assert "aarch64" in shown
    assert "dotprod no" in shown
    assert "i8mm no" in shown
    assert "emulated: models run, but their times mean nothing" in shown
    for runtime, version in VERSIONS.items():
        (line,) = (text for text in shown.splitlines() if f"runtime {runtime} " in text)
        assert line.split()[-1] == version


@pytest.mark.parametrize("runtime", VERSIONS)
def test_what_was_set_up_answers_as_it_should(first_setup, at_desk, files, host, runtime):
    kind = ("onnx" if runtime == "onnxruntime" else "tflite", "int8")
    content, x = files.path(*kind).read_bytes(), files.inputs(kind[0])[:8]

    def answers(board: Board, name: str) -> np.ndarray:
        board.load("net", content, runtime=name, threads=1)
        return board.infer("net", x)

    is_onnx = runtime == "onnxruntime"
    expected = files.unfused("int8")[:8] if is_onnx else answers(host, "litert")
    with open_board("pi", catalog.device("pi"), exclusive=False) as board:
        found = answers(board, runtime)
    assert np.abs(found - expected).max() <= 2.001 * files.step(*kind, expected)


def pins_with_a_killer() -> RuntimePins:
    """The pins of this board, with a version first that dies on its processor."""
    shipped = load_pins()
    (board,) = (c for c in shipped.classes if (c.python, c.machine) == ("cp311", "aarch64"))
    sets = board.runtimes["onnxruntime"]
    killer = (*KILLER, *sets[0][1:])
    chosen = board.model_copy(update={"runtimes": {"onnxruntime": (killer, sets[0])}})
    known = {file: pin.model_dump(mode="json") for file, pin in shipped.wheels.items()} | KILLER
    used = {chosen.pip, *killer, *sets[0]}
    fields = {
        "schema_version": 1,
        "wheels": {file: known[file] for file in used},
        "classes": [chosen.model_dump(mode="json")],
    }
    return parse(RuntimePins, fields, where="the pins of this test")


def test_a_runtime_that_dies_of_an_illegal_instruction_gives_way_to_the_next(arm64_board):
    changes = {"python": BARE_PYTHON, "workdir": "~/another"}
    device = arm64_board.model_copy(update=changes)
    with open_board("pi", device) as board:
        found = setup(board, ["onnxruntime"], progress=Silent(), pins=pins_with_a_killer())
        again = setup(board, ["onnxruntime"], progress=Silent(), pins=pins_with_a_killer())
        assert board.runtime_version("onnxruntime") == VERSIONS["onnxruntime"]
    (runtime,) = found.runtimes
    assert (runtime.version, runtime.status) == (VERSIONS["onnxruntime"], "installed")
    assert "signal 4 (SIGILL" in str(runtime.reason)
    assert (again.bytes_sent, again.runtimes[0].status) == (0, "already-there")
