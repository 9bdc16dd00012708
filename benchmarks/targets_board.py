"""INT8 files of ``targets.py`` on the emulated arm64 board of the tests: answers are real, times mean nothing and are not taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from targets_blocks import EMULATED, TargetRow

from edgeprune.datasets import to_layout
from edgeprune.devices.board import Board, open_board
from edgeprune.folders import model_bytes
from edgeprune.progress import Terminal

TESTS = Path(__file__).parents[1] / "tests"
BOARD_FORMATS = ("tflite", "onnx")
CHUNK = 50  # images a call: emulation is slow, and a call has a time limit


@dataclass(frozen=True)
class Int8File:
    """An INT8 file, the images and their labels, and what torch, the FP32 file and the INT8 file answer on this machine."""

    net: str
    target: str
    format: str
    layout: str
    runtime: str  # that of the target
    path: Path
    x: np.ndarray
    y: np.ndarray | None
    expected: torch.Tensor
    exact: torch.Tensor
    answers: torch.Tensor


def error_steps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of two answers, in steps of 1/255 of the range of ``exact``."""
    step = float(exact.max() - exact.min()) / 255
    return float((found - exact).abs().max()) / step


def rows_on_the_board(
    files: list[Int8File], progress: Terminal, created: str
) -> Iterator[TargetRow]:
    """A row for each file in a format that the board has a runtime for, as soon as it is there: emulation takes minutes a file."""
    sys.path[:0] = [str(TESTS), str(TESTS / "board")]
    from emulated_board import PYTHONS, emulated_board

    with emulated_board() as device:
        for runtime, python in PYTHONS.items():
            mine = [f for f in files if f.format in BOARD_FORMATS and f.runtime == runtime]
            if not mine:
                continue
            there = device.model_copy(update={"python": python})
            with open_board("emulated", there, exclusive=False) as board:
                for file in mine:
                    board.load("net", file.path.read_bytes(), runtime=runtime, threads=1)
                    row = _row(file, _answers(board, file), created)
                    board.unload(["net"])
                    progress.say(f"{file.net:18} {file.target:12} {runtime}: {row.agreement}")
                    yield row


def _answers(board: Board, file: Int8File) -> torch.Tensor:
    laid_out = to_layout(file.x, file.layout)
    chunks = range(0, len(laid_out), CHUNK)
    parts = [board.infer("net", laid_out[i : i + CHUNK]) for i in chunks]
    return torch.from_numpy(np.concatenate(parts)).reshape(file.answers.shape)


def _row(file: Int8File, found: torch.Tensor, created: str) -> TargetRow:
    classes = found.argmax(1)
    return TargetRow(
        net=file.net,
        target=file.target,
        format=file.format,
        precision="int8",
        where=f"{file.runtime}, {EMULATED}",
        seconds=0.0,
        size_bytes=len(model_bytes(file.path)),
        error_steps=error_steps(found, file.exact),
        from_host_steps=error_steps(found, file.answers),
        agreement=float((classes == file.expected).double().mean()),
        accuracy=None if file.y is None else float((classes.numpy() == file.y).mean()),
        created=created,
    )
