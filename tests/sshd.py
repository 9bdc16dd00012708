"""What tests of devices share: a real sshd on loopback with keys of its own, and a model that numpy can check."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.records.device import Device

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
# Final measurements for tests that deploy but do not look at figures.
QUICK_REPORT = {
    "sessions": 1,
    "rounds": 8,
    "block_ms": 5.0,
    "warmup_ms": 5.0,
    "min_runs": 16,
    "sentinel": False,
}
WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


@dataclass(frozen=True)
class Sshd:
    """A running server and what a client needs to reach it."""

    folder: Path
    port: int
    fingerprint: str

    def device(self, **changes: Any) -> Device:
        """A device that logs in here; ``changes`` replace single keys."""
        facts: dict[str, Any] = {
            "transport": "ssh",
            "targets": (),
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "auth": {"method": "key", "key_file": str(self.folder / "login")},
            "host_key": {"sha256": self.fingerprint},
            "workdir": str(self.folder / "work"),
            "lease_file": str(self.folder / "lease"),
            "python": sys.executable,
            "stand_in": True,
            "report": QUICK_REPORT,
        }
        return Device(**(facts | changes))

    def log(self) -> str:
        """What the server wrote so far."""
        return (self.folder / "log").read_text()


def keygen(path: Path) -> str:
    """A new Ed25519 key pair; gives its fingerprint."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    command = ["ssh-keygen", "-lf", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(folder: Path, *extra: str, prefix: Sequence[str] = ()) -> Iterator[Sshd]:
    """Run sshd in ``folder``; ``extra`` lines win over the usual configuration. Skips the test where sshd is not installed.

    ``prefix`` starts the command line: a program that runs the server in another environment.
    """
    if not Path(SSHD).exists() or shutil.which("ssh-keygen") is None:
        pytest.skip("openssh-server is not installed")
    fingerprint = keygen(folder / "host")
    keygen(folder / "login")
    shutil.copy(folder / "login.pub", folder / "authorized_keys")
    port = free_port()
    lines = [
        *extra,
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder}/host",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        f"PidFile {folder}/pid",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin yes",
        "LogLevel DEBUG1",
    ]
    (folder / "config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # privilege separation asks for it
    command = [*prefix, SSHD, "-D", "-E", str(folder / "log"), "-f", str(folder / "config")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, process, folder / "log")
        yield Sshd(folder, port, fingerprint)
    finally:
        process.send_signal(signal.SIGKILL if prefix else signal.SIGTERM)  # unshare blocks SIGTERM
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"sshd did not start: {log.read_text() if log.exists() else 'no log'}")


def wait_until_gone(pid: int, seconds: float = 10) -> None:
    """Return when no such process runs; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} still runs")


def matmul_file(weight: np.ndarray = WEIGHT) -> bytes:
    """An ONNX file that computes ``x @ weight``."""
    onnx = pytest.importorskip("onnx")
    helper, rows, columns = onnx.helper, *weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "matmul",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, columns])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 13)]
    content: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=8
    ).SerializeToString()
    return content


def script(path: Path, text: str) -> str:
    """An executable file; gives its path."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)
