"""What a board survives and what that costs: time until the next client gets it after a failure, and the overhead of a measurement.

``python benchmarks/boards.py`` writes ``benchmarks/results/boards.json``. The board is this machine behind a real sshd on loopback and a
proxy that can drop packets, so seconds are those of the protocol and of a stand-in, not of a network or a board.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO / "tests" / "fixtures")]

from board_blocks import BoardResults, Overhead, Recovery  # noqa: E402
from faultproxy import FaultProxy  # noqa: E402
from sshd import Sshd, matmul_file, serve  # noqa: E402

from edgeprune.devices.board import Board, open_board  # noqa: E402
from edgeprune.devices.plans import KERNEL, REPORT, SEARCH, TimingPlan  # noqa: E402
from edgeprune.records.device import Device  # noqa: E402
from edgeprune.records.files import write_json  # noqa: E402

OUT = REPO / "benchmarks" / "results" / "boards.json"
ORT = {"runtime": "onnxruntime", "threads": 1}
PATIENCE_S = 120.0
HOLDER = """
import sys, time
from edgeprune.devices.board import open_board
from edgeprune.records.device import Device
with open_board("board", Device.model_validate_json(sys.argv[1])) as board:
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def holder(device: Device) -> Iterator[subprocess.Popen[str]]:
    """Another program that holds the board until it is told to stop, or worse."""
    argv = [sys.executable, "-c", HOLDER, device.model_dump_json()]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.wait(10)


def agent_pid(device: Device) -> int:
    """The process on the board that holds the lease."""
    with open_board("board", device, exclusive=False) as board:
        pid: int = board.request("who", {})[0]["owner"]["pid"]
    return pid


def until_free(device: Device, fail: Callable[[], None]) -> float:
    """Seconds from a failure until another client holds the board."""
    start = time.monotonic()
    fail()
    open_board("next", device, wait_s=PATIENCE_S).close()
    return time.monotonic() - start


def after_a_hole(server: Sshd) -> float:
    """The link of the holder swallows everything; nobody is told."""
    with FaultProxy(server.port) as proxy, holder(server.device(port=proxy.port)):
        return until_free(server.device(), proxy.hole)


def after_an_agent_kill(server: Sshd) -> float:
    """The agent on the board dies."""
    device = server.device()
    with holder(device) as child:
        pid = agent_pid(device)

        def fail() -> None:
            child.send_signal(signal.SIGSTOP)  # or it would take the board again
            os.kill(pid, signal.SIGKILL)

        return until_free(device, fail)


def after_a_host_kill(server: Sshd) -> float:
    """The program that holds the board dies."""
    device = server.device()
    with holder(device) as child:
        return until_free(device, child.kill)


def idle(server: Sshd) -> float:
    """Nothing fails: what connecting and taking the lease costs by itself."""
    return until_free(server.device(), lambda: None)


FAILURES: tuple[tuple[str, Callable[[Sshd], float]], ...] = (
    ("none", idle),
    ("black hole on the link", after_a_hole),
    ("agent killed", after_an_agent_kill),
    ("host killed", after_a_host_kill),
)


def overhead(board: Board, name: str, plan: TimingPlan, models: int) -> Overhead:
    """Wall time of one timing request on the host, over the time inside the runtime."""
    keys = [f"{name}-{i}" for i in range(models)]
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    files = {key: matmul_file(weight) for key in keys}
    if name == "kernels":
        board.load_many(files, **ORT)
    else:
        for key, content in files.items():
            board.load(key, content, **ORT)
    start = time.monotonic()
    timing = board.time(keys, plan)
    wall_s = time.monotonic() - start
    board.unload(keys)
    inside_s = sum(timing.inside_ns.values()) / 1e9
    return Overhead(request=name, models=models, wall_s=wall_s, inside_s=inside_s)


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Of every failure.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT)
def main(repeats: int, out: Path) -> None:
    """Break things and take the time."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-boards-") as folder:
        Path(folder).chmod(0o755)
        with serve(Path(folder)) as server:
            device = server.device()
            recoveries = []
            for name, run in FAILURES:
                seconds = tuple(run(server) for _ in range(repeats))
                print(f"{name}: {', '.join(f'{s:.1f}' for s in seconds)} s", flush=True)
                recoveries.append(Recovery(failure=name, seconds=seconds))
            with open_board("board", device) as board:
                fingerprint = board.fingerprint(**ORT)
                costs = tuple(
                    overhead(board, name, plan, models)
                    for name, plan, models in (
                        ("kernels", KERNEL, 64),
                        ("search", SEARCH, 2),
                        ("report", REPORT, 4),
                    )
                )
    found = BoardResults(
        fingerprint=fingerprint,
        lease_ttl_s=device.lease_ttl_s,
        recoveries=tuple(recoveries),
        overheads=costs,
    )
    write_json(found, out)
    for cost in costs:
        print(f"{cost.request}: {cost.ratio:.1%} over the runtime")


if __name__ == "__main__":
    main()
