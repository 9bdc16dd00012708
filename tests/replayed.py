"""A deployment of the tiny net that was recorded once, projects that replay it, and commands that start without importing anew."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tinynet
import yaml
from sshd import QUICK_REPORT

COMMAND = ("deploy", "--target", "desk", "--latency", "80%", "--run", "run")
RECORDING = "desk.epr"
# A disturbed stand-in is used all the same, so that these tests do not depend on what else runs on this machine.
DEVICES = {
    "desk": {"transport": "local", "targets": ["desk"], "stand_in": True, "report": QUICK_REPORT},
    "replayed": {"transport": "replay", "targets": ["desk"], "recording": RECORDING},
}
ZYGOTE = """
import os, sys
from edgeprune import formats
from edgeprune.cli import main as cli
from edgeprune.pipeline import api
from edgeprune.pipeline.stages import measure
from edgeprune.report import render_html
import onnx, onnxruntime, onnxscript, torch.onnx, torch.export
formats.load("onnx")
print("ready", flush=True)
for line in sys.stdin:
    folder, *argv = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0); os.dup2(log, 1); os.dup2(log, 2)
        sys.argv = ["edgeprune", *argv]
        code = 1
        try:
            cli.main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def project(folder: Path, **changes: object) -> Path:
    """A project of the tiny net with both devices; ``changes`` as for :func:`tinynet.settings`."""
    home = tinynet.project(folder, **changes)
    target = yaml.safe_load((tinynet.REPO / "targets" / "this-machine.yaml").read_text())
    (home / "targets").mkdir()
    (home / "targets" / "desk.yaml").write_text(yaml.safe_dump({**target, "name": "desk"}))
    listed = {"schema_version": 1, "devices": DEVICES}
    (home / "devices.yaml").write_text(yaml.safe_dump(listed))
    return home


def recorded(factory: pytest.TempPathFactory) -> tinynet.Run:
    """The tiny net deployed on this machine as a stand-in, with a recording beside the run; made once for one run of tests."""
    home = tinynet.shared_folder(factory) / "recorded-project"
    args = (*COMMAND, "--device", "desk", "--record", RECORDING)
    return tinynet.finished_once(home, lambda: tinynet.edgeprune(project(home), *args))


def replaying(source: tinynet.Run, folder: Path) -> Path:
    """A fresh project with the recording of another."""
    home = project(folder)
    shutil.copy(source.project / RECORDING, home / RECORDING)
    return home


class Zygote:
    """Starts ``edgeprune`` commands by forking a process that has imported everything: in a second, not in ten."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, home: Path, *argv: str) -> int:
        """The process id of a command that runs in a folder; its output is added to ``log`` there."""
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join([str(home), *argv]) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def code(self) -> int:
        """The exit code of the command that was started last, once it has ended; negative for a signal."""
        return int(self._line())

    def run(self, home: Path, *argv: str) -> int:
        """The exit code of a command."""
        self.start(home, *argv)
        return self.code()


@contextmanager
def zygote(folder: Path) -> Iterator[Zygote]:
    """A running :class:`Zygote`."""
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], cwd=folder, env=tinynet.environment(folder), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    made = Zygote(process)
    try:
        assert made._line() == "ready"
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def kill(pid: int) -> None:
    """End one process at once, as a power cut would."""
    os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def wait_until(reached: object, pid: int, *, within_s: float = 120) -> None:
    """Wait until ``reached()`` is true or the process has ended."""
    deadline = time.monotonic() + within_s
    while is_running(pid) and not reached():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)
