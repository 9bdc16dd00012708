"""Build an emulated arm64 board: a Debian bookworm root with real arm64 runtimes, run by qemu through binfmt.

Run as root: ``python tests/emulated_board/build_board.py``. The root lies in ``$EDGEPRUNE_BOARD_DIR``, or
``~/.cache/edgeprune/board-arm64``, and is kept until its recipe changes. Packages come from the Debian mirror that apt uses on this
machine, wheels from where pip takes its own; wheels are fetched and unpacked on the host, because that is many times faster than under
emulation.

What it changes outside of that folder: it installs the Debian packages of ``TOOLS`` that are missing, mounts ``binfmt_misc`` and enables
``qemu-aarch64`` there. Both stay, as after an ``apt-get install qemu-user-static``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TOOLS = {  # Debian package: a file that shows that it is there
    "debootstrap": "/usr/sbin/debootstrap",
    "qemu-user-static": "/usr/bin/qemu-aarch64-static",
    "binfmt-support": "/usr/sbin/update-binfmts",
    "openssh-server": "/usr/sbin/sshd",
}
SUITE = "bookworm"  # what Raspberry Pi OS 12 is made of: Python 3.11.2, glibc 2.36
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RUNTIMES = {  # environment under /opt: requirements, module that must import
    "litert": (("ai-edge-litert==2.3.0",), "ai_edge_litert.interpreter"),
    "tflite": (("tflite-runtime==2.14.0", "numpy==1.26.4"), "tflite_runtime.interpreter"),
    "ort": (("onnxruntime==1.32.0",), "onnxruntime"),
}
RECIPE = 1  # raise it when a step changes what the root holds
PYTHON = "3.11"
# Raspberry Pi 3, 4 and 5. qemu's own choice, "max", has SVE, with which XNNPACK's INT8 kernels compute garbage under qemu 7.2; without
# SVE, as on every Pi, they agree with x86 bit for bit.
PROCESSORS = ("cortex-a53", "cortex-a72", "cortex-a76")
DEFAULT_PROCESSOR = "cortex-a72"
GLIBC_MINOR = 36
BINFMT = Path("/proc/sys/fs/binfmt_misc")
_MOUNTED = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
STAMP = "board.json"
HOME = "home/edgeprune"  # of the user of the board, below the root


class BoardUnavailable(Exception):
    """This machine cannot hold the board; the message says why."""


def board_folder() -> Path:
    """Where the board lies or will lie."""
    given = os.environ.get("EDGEPRUNE_BOARD_DIR")
    return Path(given) if given else Path.home() / ".cache" / "edgeprune" / "board-arm64"


def recipe_digest() -> str:
    """Digest of what the root is made of: a root of another recipe is built again."""
    parts = json.dumps(
        [RECIPE, SUITE, PYTHON, GLIBC_MINOR, PROCESSORS, DEFAULT_PROCESSOR, RUNTIMES]
    )
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def isolated(*, proc: str) -> list[str]:
    """Start of a command line whose mounts and processes vanish with it.

    Args:
        proc: folder on which a /proc of its own is mounted.
    """
    unshare = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
    return [*unshare, "--kill-child=KILL", f"--mount-proc={proc}"]


def in_root(root: Path, argv: Sequence[str], timeout_s: float, cpuinfo: Path | None = None) -> str:
    """Run a command of the board in its root; gives what it prints. ``cpuinfo`` replaces /proc/cpuinfo there."""
    mounted = ["sh", "-c", _MOUNTED, "sh", str(cpuinfo), f"{root}/proc/cpuinfo"] if cpuinfo else []
    clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root"]
    inside = ["chroot", str(root), *clean, *argv]
    return _run([*isolated(proc=f"{root}/proc"), *mounted, *inside], timeout_s)


def ensure_board() -> Path:
    """The root of the board, built first when it is missing or of another recipe.

    Raises:
        BoardUnavailable: this machine lacks what it takes: root, an x86-64 Debian with apt, namespaces, or the network at the first build.
        RuntimeError: a step that should have worked did not.
    """
    _check_machine()
    folder = board_folder()
    folder.mkdir(parents=True, exist_ok=True)
    _check_parents(folder)
    with _locked(folder / "lock"):
        _install_tools()
        _enable_emulation()
        stamp, root = folder / STAMP, folder / "root"
        if stamp.is_file() and json.loads(stamp.read_text()).get("recipe") == recipe_digest():
            return root
        stamp.unlink(missing_ok=True)
        steps = _build(folder, root)
        record = {"recipe": recipe_digest(), "seconds": steps}
        stamp.write_text(json.dumps(record, indent=1) + "\n")
    return root


def _build(folder: Path, root: Path) -> dict[str, float]:
    """Build beside the final place and rename at the end; gives seconds by step."""
    part = folder / "root.part"
    for leftover in (root, part):
        if leftover.exists():
            shutil.rmtree(leftover)
    seconds: dict[str, float] = {}
    for name, step in (
        ("debian", lambda: _debootstrap(part)),
        ("wheels", lambda: _download(folder / "wheels")),
        ("environments", lambda: _environments(part, folder / "wheels")),
    ):
        start = time.monotonic()
        print(f"board: {name} ...", file=sys.stderr, flush=True)
        step()
        seconds[name] = round(time.monotonic() - start, 1)
    part.rename(root)
    return seconds


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise BoardUnavailable("building and entering the emulated board needs root")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise BoardUnavailable(f"made for x86-64 Linux, but this is {platform.machine()}")
    if shutil.which("apt-get") is None or not Path(KEYRING).is_file():
        raise BoardUnavailable(f"needs apt-get and {KEYRING}: a Debian host")
    try:
        _run([*isolated(proc="/proc"), "true"], 20)
    except (RuntimeError, OSError) as error:
        raise BoardUnavailable(f"needs mount and process namespaces: {error}") from error


def _check_parents(folder: Path) -> None:
    """sshd enters a root only when nobody but root could have changed the way to it."""
    for place in (folder.resolve(), *folder.resolve().parents):
        found = place.stat()
        if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BoardUnavailable(
                f"{place} must belong to root and be writable by root alone; set EDGEPRUNE_BOARD_DIR"
            )


def _install_tools() -> None:
    missing = [package for package, path in TOOLS.items() if not Path(path).exists()]
    if not missing:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        _run(["apt-get", "update", "-q"], 180, environment)
        options = ["-y", "-q", "--no-install-recommends"]
        _run(["apt-get", "install", *options, *missing], 300, environment)
    except RuntimeError as error:
        raise BoardUnavailable(f"cannot install {', '.join(missing)}: {error}") from error


def _enable_emulation() -> None:
    entry = BINFMT / "qemu-aarch64"
    try:
        if not (BINFMT / "register").exists():
            _run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], 20)
        if not entry.exists():
            _run(["update-binfmts", "--enable", "qemu-aarch64"], 60)
    except RuntimeError as error:
        raise BoardUnavailable(f"cannot enable qemu-aarch64 in binfmt_misc: {error}") from error
    words = entry.read_text().split() if entry.exists() else []
    flags = words[words.index("flags:") + 1] if "flags:" in words else ""
    if "enabled" not in words or "F" not in flags:  # F: the interpreter is found from inside a root
        raise BoardUnavailable("qemu-aarch64 is not enabled in binfmt_misc with the flag F")


def debian_mirror() -> str:
    """The address of the Debian archive that apt uses on this machine."""
    columns = "$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)"
    listed = _run(["apt-get", "indextargets", "--format", columns, "Created-By: Packages"], 60)
    for line in listed.splitlines():
        origin, codename, component, address = line.split(" ", 3)
        if origin == "Debian" and component == "main" and "-" not in codename:
            return address
    raise BoardUnavailable("apt on this machine lists no Debian archive; run: apt-get update")


def _debootstrap(root: Path) -> None:
    options = ["--arch=arm64", "--variant=minbase", "--include=python3", f"--keyring={KEYRING}"]
    command = ["debootstrap", *options, SUITE, str(root), debian_mirror()]
    try:
        _run([*isolated(proc="/proc"), *command], 900)
    except RuntimeError as error:
        raise BoardUnavailable(f"debootstrap failed: {error}") from error
    shutil.rmtree(root / "var/cache/apt/archives")
    shutil.rmtree(root / "var/lib/apt/lists")
    (root / "etc/hostname").write_text("emulated-board\n")
    # Without these lists XNNPACK does not know the processor and silently leaves everything to the built-in kernels, and
    # onnxruntime 1.28 and later die of signal 11 when imported.
    processors = root / "sys/devices/system/cpu"
    processors.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (processors / name).write_text("0-3\n")


def _platforms() -> Iterator[str]:
    """Platform tags of wheels that run on the board's C library, newest first."""
    for minor in range(GLIBC_MINOR, 16, -1):
        yield f"--platform=manylinux_2_{minor}_aarch64"
    yield "--platform=manylinux2014_aarch64"


def _pip(command: str, *arguments: str) -> list[str]:
    wheels_only = ["--only-binary=:all:", *_platforms(), f"--python-version={PYTHON}"]
    quiet = ["--disable-pip-version-check", "--no-input", "-q"]
    return [sys.executable, "-m", "pip", command, *quiet, *wheels_only, *arguments]


def _download(wheels: Path) -> None:
    """Each environment has a folder of its own, so that its pins cannot meet those of another."""
    for name, (requirements, _) in RUNTIMES.items():
        try:
            _run(_pip("download", f"--dest={wheels / name}", *requirements), 300)
        except RuntimeError as error:
            raise BoardUnavailable(f"cannot fetch {', '.join(requirements)}: {error}") from error


def _environments(root: Path, wheels: Path) -> None:
    for name, (requirements, module) in RUNTIMES.items():
        place = f"/opt/{name}"
        in_root(root, ["/usr/bin/python3", "-m", "venv", "--without-pip", place], 120)
        site = f"{place}/lib/python{PYTHON}/site-packages"
        sources = ["--no-index", f"--find-links={wheels / name}", "--no-compile"]
        _run(_pip("install", *sources, f"--target={root}{site}", *requirements), 180)
        _processors(root / place[1:] / "bin")
        python = f"{place}/bin/python"
        # The user of the board cannot write there, so what is not compiled now is compiled at every start.
        in_root(root, [python, "-m", "compileall", "-q", "-j2", site], 600)
        in_root(root, [python, "-c", f"import {module}"], 120)


def _processors(binaries: Path) -> None:
    """Start Python on a processor of a board: ``python`` on the usual one, ``python-cortex-a53`` and so on by name.

    An agent starts in an empty environment, so what qemu should emulate has to be set behind that.
    """
    for name in ("", *PROCESSORS):
        path = binaries / (f"python-{name}" if name else "python")
        path.unlink(missing_ok=True)
        processor = name or DEFAULT_PROCESSOR
        path.write_text(f'#!/bin/sh\nQEMU_CPU={processor} exec "${{0%/*}}/python3" "$@"\n')
        path.chmod(0o755)


def _run(argv: Sequence[str], timeout_s: float, environment: dict[str, str] | None = None) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed or took too long; the message has the end of what it said.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(argv)} took over {timeout_s:g} s") from error
    if done.returncode != 0:
        said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the kernel frees the lock when its holder dies."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build, and say where."""
    start = time.monotonic()
    try:
        root = ensure_board()
    except BoardUnavailable as reason:
        print(f"no board here: {reason}", file=sys.stderr)
        return 1
    print(f"{root} ({time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
