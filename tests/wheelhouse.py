"""Small real wheels for tests: a pretended runtime that imports, fails or dies, and pip as a wheel, real or quick."""

from __future__ import annotations

import base64
import functools
import hashlib
import platform
import sys
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from edgeprune.devices.setup.runtime_pins import RuntimePins, Wheel
from edgeprune.records.files import sha256_bytes

IMPORTS = "VALUE = 1\n"
DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
FAILS = "raise ImportError('libmissing.so.1: cannot open shared object file')\n"
SLEEPS = "import time\ntime.sleep(60)\n"
NEEDS_NUMPY = "import numpy\n"

PYTHON_TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
MACHINE = platform.machine()


def write_wheel(path: Path, files: Mapping[str, bytes]) -> Wheel:
    """A wheel with these files and the records that pip asks for."""
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    tag = "-".join(path.stem.split("-")[2:])
    every = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = "".join(
        f"{file},sha256={_digest(content)},{len(content)}\n" for file, content in every.items()
    )
    every[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in every.items():
            archive.writestr(zipfile.ZipInfo(file, (2024, 1, 1, 0, 0, 0)), content)
    return described(path)


def _digest(content: bytes) -> str:
    digest = hashlib.sha256(content).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def described(path: Path) -> Wheel:
    """The pin of a file."""
    content = path.read_bytes()
    return Wheel(file=path.name, sha256=sha256_bytes(content), size_bytes=len(content))


def runtime_wheel(folder: Path, version: str, interpreter: str = IMPORTS) -> Path:
    """A pretended tflite-runtime whose interpreter module has this source."""
    path = folder / f"tflite_runtime-{version}-py3-none-any.whl"
    init = f"__version__ = {version!r}\n".encode()
    files = {"tflite_runtime/__init__.py": init}
    write_wheel(path, {**files, "tflite_runtime/interpreter.py": interpreter.encode()})
    return path


@functools.cache
def _pip_files() -> dict[str, bytes]:
    distribution = metadata.distribution("pip")
    files = {}
    for file in distribution.files or ():
        if file.parts[0] == "pip" and file.suffix != ".pyc":
            files[file.as_posix()] = Path(str(distribution.locate_file(file))).read_bytes()
    return files


def pip_wheel(folder: Path) -> Path:
    """The pip of this Python, put into a wheel again."""
    path = folder / f"pip-{metadata.version('pip')}-py3-none-any.whl"
    if not path.exists():
        write_wheel(path, _pip_files())
    return path


_QUICK_PIP = """
import hashlib, pathlib, sys, sysconfig, zipfile
folder = pathlib.Path(sys.argv[sys.argv.index("--find-links") + 1])
for line in pathlib.Path(sys.argv[sys.argv.index("-r") + 1]).read_text().splitlines():
    name, version = line.split(" ")[0].split("==")
    (wheel,) = folder.glob("%s-%s-*.whl" % (name.replace("-", "_"), version))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != line.split("sha256:")[1]:
        sys.exit("THESE PACKAGES DO NOT MATCH THE HASHES")
    zipfile.ZipFile(wheel).extractall(sysconfig.get_paths()["purelib"])
"""


def quick_pip(folder: Path) -> Path:
    """A stand-in for pip that only unpacks: the real one takes seconds to start from a wheel."""
    path = folder / "pip-0.1-py3-none-any.whl"
    if not path.exists():
        write_wheel(path, {"pip/__main__.py": _QUICK_PIP.encode()})
    return path


def pins_of(pip: Path, *candidates: Path, system: dict[str, str] | None = None) -> RuntimePins:
    """Pins for this machine: every file is one candidate for tflite-runtime."""
    files = {path.name: described(path) for path in (pip, *candidates)}
    content = {
        "wheels": {
            name: {"sha256": wheel.sha256, "size_bytes": wheel.size_bytes}
            for name, wheel in files.items()
        },
        "classes": (
            {
                "python": PYTHON_TAG,
                "machine": MACHINE,
                "pip": pip.name,
                "system": system or {},
                "runtimes": {"tflite-runtime": tuple((path.name,) for path in candidates)},
            },
        ),
    }
    return RuntimePins.model_validate(content)
