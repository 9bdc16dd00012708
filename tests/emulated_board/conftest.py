"""Fixtures of all tests on the emulated board."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from build_board import BoardUnavailable
from emulated_board import emulated_board, write_devices
from example_files import ExampleFiles, make_example_files

from edgeprune.devices.board import Board, open_board
from edgeprune.records.device import Device


@pytest.fixture(scope="session")
def arm64_board() -> Iterator[Device]:
    """An SSH device that is a Debian bookworm arm64 under qemu, with its key pinned and LiteRT as its Python.

    ``/opt/tflite`` and ``/opt/ort`` on it hold the other runtimes. Built at the first use, which takes minutes.
    """
    opened = emulated_board()
    try:
        device = opened.__enter__()
    except BoardUnavailable as reason:
        pytest.skip(f"no emulated board here: {reason}")
    try:
        yield device
    finally:
        opened.__exit__(None, None, None)


@pytest.fixture(scope="session")
def host() -> Iterator[Board]:
    """This machine, which others may use at the same time."""
    local = Device(transport="local", targets=(), stand_in=True)
    with open_board("here", local, exclusive=False) as opened:
        yield opened


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> ExampleFiles:
    """The trained example in both formats and precisions."""
    return make_example_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm64_board: Device) -> Path:
    """A folder whose ``devices.yaml`` names the board, as the working directory."""
    write_devices(tmp_path, arm64_board)
    monkeypatch.chdir(tmp_path)
    return tmp_path
