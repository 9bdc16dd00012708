"""What setting a board up costs: bytes sent and seconds by step, the first and the second time, on the emulated arm64 board.

``python benchmarks/emulated_setup.py``, as root on x86-64 Debian, writes ``benchmarks/results/emulated-setup.json``. Bytes are those of any
board; seconds are of an emulator and say nothing about a real one.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO / "tests" / name) for name in ("fixtures", "emulated_board")]

from build_board import board_folder  # noqa: E402
from emulated_board import BARE_PYTHON, emulated_board  # noqa: E402

from edgeprune.devices.board import open_board  # noqa: E402
from edgeprune.devices.setup.provision import SetupReport, setup  # noqa: E402
from edgeprune.progress import Silent  # noqa: E402
from edgeprune.records.base import Record  # noqa: E402
from edgeprune.records.files import write_json  # noqa: E402
from edgeprune.records.version import VERSION  # noqa: E402

RUNTIMES = ("litert", "tflite-runtime", "onnxruntime")


class Result(Record):
    """The results file."""

    schema_version: int = 1
    edgeprune_version: str = VERSION
    stamp: str = "emulated"
    agent_bytes: int
    first: SetupReport
    second: SetupReport


def main() -> None:
    """Set up an empty board twice."""
    from edgeprune.devices.link.agent_file import agent_bytes

    wheels = board_folder() / "cache" / "edgeprune" / "wheels"
    with emulated_board() as device:
        bare = device.model_copy(update={"python": BARE_PYTHON})
        with open_board("emulated", bare) as board:
            first, second = (
                setup(board, RUNTIMES, progress=Silent(), cache=wheels) for _ in range(2)
            )
    result = Result(agent_bytes=len(agent_bytes()), first=first, second=second)
    write_json(result, REPO / "benchmarks" / "results" / "emulated-setup.json")
    for name, found in (("first", first), ("second", second)):
        print(f"{name}: {found.bytes_sent} bytes, {sum(found.seconds.values()):.1f} s")


if __name__ == "__main__":
    main()
