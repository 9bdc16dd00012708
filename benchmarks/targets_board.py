"""INT8 files of ``targets.py`` on the emulated arm64 board of the tests: answers are real, times mean nothing and are not taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from targets_blocks import EMULATED, TargetRow

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.link.frames import Refusal
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.pipeline.context import Context
from edgeprune.progress import Progress
from edgeprune.workload.dataset import to_layout

TESTS = Path(__file__).parents[1] / "tests"
BOARD_FORMATS = ("tflite", "onnx")
# XNNPACK gets no INT8 operator from tflite-runtime 2.14 unless it is asked to, and rounds requantised sums unlike the built-in kernels.
BUILT_IN_INT8 = ("tflite-runtime",)
BUILT_IN = "built-in"
CHUNK = 50  # images a call: emulation is slow, and a call has a time limit


@dataclass(frozen=True)
class Int8File:
    """An INT8 file, the images and their labels, and what torch, the FP32 file and the INT8 file answer on this machine.

    ``kernels`` says which computed ``answers`` here, where they are not those that the runtime takes by itself.
    """

    net: str
    target: str
    format: str
    layout: str
    runtime: str  # that the target ships with, whatever stands in for it on this machine
    path: Path
    x: np.ndarray
    y: np.ndarray | None
    expected: torch.Tensor
    exact: torch.Tensor
    answers: torch.Tensor
    kernels: str = ""


def by_its_kernels(context: Context, file: Int8File) -> Int8File:
    """The file with the answers that this machine gives by the kernels that its runtime has for INT8 on a board."""
    if file.runtime not in BUILT_IN_INT8:
        return file
    answers = context.run_file(context.host, file.path, file.x, delegate=False)
    return replace(file, answers=answers, kernels=BUILT_IN)


def error_steps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of two answers, in steps of 1/255 of the range of ``exact``."""
    step = float(exact.max() - exact.min()) / 255
    return float((found - exact).abs().max()) / step


def rows_on_the_board(
    files: list[Int8File], progress: Progress, created: str
) -> Iterator[TargetRow]:
    """A row for each file in a format that the board has a runtime for, as soon as it is there: emulation takes minutes a file."""
    sys.path[:0] = [str(TESTS / "fixtures"), str(TESTS / "emulated_board")]
    from emulated_board import PYTHONS, emulated_board

    with emulated_board() as device:
        for runtime, python in PYTHONS.items():
            mine = [f for f in files if f.format in BOARD_FORMATS and f.runtime == runtime]
            if not mine:
                continue
            there = device.model_copy(update={"python": python})
            with open_board("emulated", there, exclusive=False) as board:
                for file in mine:
                    row = _asked(board, file, created)
                    told = row.message or row.agreement
                    progress.say(f"{file.net:18} {file.target:12} {runtime}: {told}")
                    yield row


def _asked(board: Board, file: Int8File, created: str) -> TargetRow:
    """What the board answers; its runtime may refuse a file that this machine runs, and that is a row too."""
    row = TargetRow(
        net=file.net,
        target=file.target,
        format=file.format,
        precision="int8",
        where=f"{file.runtime}, {EMULATED}",
        seconds=0.0,
        size_bytes=len(model_bytes(file.path)),
        created=created,
    )
    try:
        board.load("net", file.path.read_bytes(), runtime=file.runtime, threads=1)
        found = _answers(board, file)
    except Refusal as refusal:
        return row.model_copy(update={"message": refusal.message})
    finally:
        board.unload(["net"])
    classes = found.argmax(1)
    changes = {
        "error_steps": error_steps(found, file.exact),
        "from_host_steps": error_steps(found, file.answers),
        "host_kernels": file.kernels,
        "agreement": float((classes == file.expected).double().mean()),
        "accuracy": None if file.y is None else float((classes.numpy() == file.y).mean()),
    }
    return row.model_copy(update=changes)


def _answers(board: Board, file: Int8File) -> torch.Tensor:
    laid_out = to_layout(file.x, file.layout)
    chunks = range(0, len(laid_out), CHUNK)
    parts = [board.infer("net", laid_out[i : i + CHUNK]) for i in chunks]
    return torch.from_numpy(np.concatenate(parts)).reshape(file.answers.shape)
