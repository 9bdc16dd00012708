"""Environments of runtimes on the board: made from wheels that the host sent, without a network, and tried before they count.

An environment is ``<workdir>/env/<runtime>-<version>-<digest8>``, where the digest is that of its wheels. It counts once its
``ready.json`` is there, which is written last; whatever has none is left over from a power cut or a failure, and is removed when the next
one is made. Who calls :func:`install`, :func:`remove` or :func:`check_workdir` holds the lease of the board.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

from . import wire
from .coreml import check_system
from .gpu import NO_PACKAGE
from .runtimes import MODULES, RUNTIMES

PROBE = """
import importlib, importlib.metadata, sys
importlib.import_module(sys.argv[1])
package = sys.modules[sys.argv[1].split(".")[0]]
print(getattr(package, "__version__", None) or importlib.metadata.version(sys.argv[2]))
"""
READY = "ready.json"
PROBE_S = 90.0  # ExecuTorch imports torch, which takes half a minute on a busy machine
VENV_S = 180.0
PIP_S = 1200.0  # three wheels unpacked onto a slow card; 11 s on an emulated board
SPARE_BYTES = 4 << 20  # the empty environment, and what a file system needs beside the files
# What a child of the agent may know of where it runs. A user's PIP_* and PYTHON* must not change what is installed.
CLEAN_ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/nonexistent",
    # Which processor an emulated board has: without it the runtime would be tried on one, and run on another.
    **{name: os.environ[name] for name in ("QEMU_CPU",) if name in os.environ},
}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
_VERSION = re.compile(r"^[0-9][A-Za-z0-9.+!_]{0,40}$")
_FILE = re.compile(r"^[A-Za-z0-9_.+!-]{1,200}\.whl$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_ENV = re.compile(r"^[a-z-]{1,30}-[0-9][A-Za-z0-9.+!_]{0,40}-[0-9a-f]{8}$")
_MODULE = re.compile(r"^[a-z][a-z0-9_]{0,40}$")


def install(
    workdir: str, python: str, request: Dict[str, Any], cached: Callable[[str], str]
) -> Dict[str, Any]:
    """Make an environment, try its runtime, and only then let it count. One that is there already becomes the preferred one.

    Args:
        workdir: folder of the agent; environments lie in its ``env``.
        python: the interpreter to make it from.
        request: ``runtime``; ``wheels``, a list of ``{name, version, file, sha256}`` whose first is the runtime's; ``pip``, one such;
            ``system``, modules that the board's own Python must have, each with the Debian package that brings it; ``after``, names of
            environments that were tried first and failed; ``min_free_bytes``.
        cached: the path of a file that the host sent, by its SHA-256.

    Returns:
        The content of its ``ready.json``, with ``seconds`` by step and ``is_new``.

    Raises:
        wire.Refused: ``request``: it makes no sense. ``workdir``: nothing can be written or run there. ``space``. ``missing-package``.
            ``install``: venv or pip failed. ``runtime-signal``: the import died. ``runtime``: it failed or took too long.
    """
    asked = _checked(request)
    wheels, pip, name = asked["wheels"], asked["pip"], env_name(asked["runtime"], asked["wheels"])
    place = os.path.join(workdir, "env", name)
    check_workdir(workdir)
    sweep(workdir)
    found = _ready(place)
    serial = 1 + max([known["serial"] for known in listed(workdir)] or [0])
    if found is not None:
        found = dict(found, serial=serial, after=asked["after"])
        _write_ready(place, found)
        return dict(found, seconds={}, is_new=False)
    _check_system(python, asked["system"])
    files = [(wheel, cached(wheel["sha256"])) for wheel in [*wheels, pip]]
    _check_space(workdir, [path for _, path in files], asked["min_free_bytes"])
    seconds: Dict[str, float] = {}
    try:
        start = time.monotonic()
        _make_venv(python, place, bool(asked["system"]))
        seconds["venv"] = time.monotonic() - start
        _fill(place, files)
        seconds["pip"] = time.monotonic() - start - seconds["venv"]
        version = probe(_python_in(place), asked["runtime"])
        seconds["probe"] = time.monotonic() - start - seconds["venv"] - seconds["pip"]
        ready = {
            "runtime": asked["runtime"],
            "version": version,
            "wheels": [wheel["sha256"] for wheel in wheels],
            "python": _version_of(_python_in(place)),
            "serial": serial,
            "after": asked["after"],
        }
        _write_ready(place, ready)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    rounded = {step: round(value, 3) for step, value in seconds.items()}
    return dict(ready, name=name, seconds=rounded, is_new=True)


def env_name(runtime: str, wheels: Sequence[Dict[str, Any]]) -> str:
    """Folder of an environment: the runtime, its version, and eight digits of the digest of its wheels."""
    text = "\n".join(sorted(wheel["sha256"] for wheel in wheels))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "%s-%s-%s" % (runtime, wheels[0]["version"], digest)


def listed(workdir: str) -> List[Dict[str, Any]]:
    """The environments that count, each as in its ``ready.json`` and with its ``name``; the preferred one of a runtime comes first."""
    found = [_ready(os.path.join(workdir, "env", name)) for name in _folders(workdir)]
    return sorted((ready for ready in found if ready), key=lambda ready: -int(ready["serial"]))


def python_for(workdir: str, runtime: str) -> Optional[str]:
    """The interpreter that has this runtime: of the environment that was last asked for; ``None`` where there is none."""
    for ready in listed(workdir):
        if ready["runtime"] == runtime:
            return _python_in(os.path.join(workdir, "env", ready["name"]))
    return None


def remove(workdir: str, keep: Iterable[str]) -> List[str]:
    """Remove every environment but those named, and give the names of what went."""
    kept = set(keep)
    gone = [name for name in _folders(workdir) if name not in kept]
    for name in gone:
        _remove(os.path.join(workdir, "env", name))
    return gone


def sweep(workdir: str) -> List[str]:
    """Remove what was left half-made, and give its names."""
    ready = {known["name"] for known in listed(workdir)}
    return remove(workdir, ready)


def probe(python: str, runtime: str, timeout_s: float = PROBE_S) -> str:
    """Version of a runtime, imported in a child that may die of an illegal instruction in our place.

    Args:
        python: an interpreter: the agent's own, or that of an environment.
        runtime: one of ``RUNTIMES``.
        timeout_s: patience with the import.

    Raises:
        wire.Refused: ``runtime-signal``: the import died of a signal. ``runtime``: unknown, not installed, broken or too slow.
    """
    if runtime not in MODULES:
        raise wire.Refused("runtime", "this agent cannot run the runtime " + runtime)
    check_system(runtime)
    own = python == sys.executable
    # pip wrote no bytecode; the first import in an environment writes that of what it loads, which later starts then save.
    flags = ("-IB" if sys.flags.isolated else "-B") if own else "-I"
    command = [python, flags, "-c", PROBE, *MODULES[runtime]]
    try:
        done = _run(command, timeout_s, env=None if own else CLEAN_ENV)
    except subprocess.TimeoutExpired:
        text = "importing %s took over %d s" % (runtime, timeout_s)
        raise wire.Refused("runtime", text) from None
    except OSError as error:
        raise wire.Refused("runtime", "cannot run %s: %s" % (python, error.strerror)) from error
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [""]
    if done.returncode < 0:
        text = "importing %s died of %s" % (runtime, _signal_name(-done.returncode))
        raise wire.Refused("runtime-signal", text)
    if done.returncode > 0 and runtime == "tensorrt" and "No module named" in lines[-1]:
        raise wire.Refused("runtime", NO_PACKAGE)
    if done.returncode > 0:
        raise wire.Refused("runtime", "cannot import %s: %s" % (runtime, lines[-1]))
    return str(lines[-1])


def check_workdir(workdir: str) -> None:
    """Make the folder of the agent where it is missing, write a program there and run it.

    Raises:
        wire.Refused: ``workdir``: it cannot be written, or nothing in it can be run. ``space``: its disk is full.
    """
    advice = "; set workdir of this device to a folder on another file system"
    try:
        os.makedirs(workdir, mode=0o700, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".probe-", dir=workdir)
    except OSError as error:
        raise _disk_failure(error, "cannot write in %s: " % workdir, advice) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(b"#!/bin/sh\nexit 0\n")
        os.chmod(path, 0o700)
        done = _run_busy(path)
    except subprocess.TimeoutExpired as error:
        text = "a program in %s did not end within 10 s%s" % (workdir, advice)
        raise wire.Refused("workdir", text) from error
    except OSError as error:
        raise _disk_failure(error, "cannot run programs in %s: " % workdir, advice) from error
    finally:
        os.unlink(path)
    if done.returncode:
        text = "a program in %s ended with %d%s" % (workdir, done.returncode, advice)
        raise wire.Refused("workdir", text)


def _run_busy(path: str) -> Any:
    """Run a file that was just written. A child of another thread may still hold it open for a moment."""
    for pause in (0.05, 0.2, None):
        try:
            return _run([path], 10.0, env=CLEAN_ENV)
        except OSError as error:
            if error.errno != errno.ETXTBSY or pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the loop returns or raises")


def _disk_failure(error: OSError, what: str, advice: str) -> wire.Refused:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return wire.Refused("space", "%s%s" % (what, reason))
    return wire.Refused("workdir", "%s%s%s" % (what, reason, advice))


def _checked(request: Dict[str, Any]) -> Dict[str, Any]:
    """The request with its defaults; names go into paths and command lines, so they are held to what such names look like."""

    def wheel(value: Any) -> Dict[str, str]:
        rules = {"name": _NAME, "version": _VERSION, "file": _FILE, "sha256": _SHA256}
        if not isinstance(value, dict):
            raise wire.Refused("request", "a wheel must be an object")
        for key, rule in rules.items():
            if not isinstance(value.get(key), str) or not rule.match(value[key]):
                raise wire.Refused("request", "a wheel has a wrong " + key)
        return {key: value[key] for key in rules}

    if request.get("runtime") not in RUNTIMES:
        raise wire.Refused("request", "this agent cannot install %r" % (request.get("runtime"),))
    wheels, system = request.get("wheels"), request.get("system") or {}
    if not isinstance(wheels, list) or not 1 <= len(wheels) <= 50:
        raise wire.Refused("request", "wheels must be a list of 1 to 50")
    if not all(_MODULE.match(str(key)) and _NAME.match(str(system[key])) for key in system):
        raise wire.Refused("request", "system must map modules to packages")
    after = request.get("after") or []
    if not all(isinstance(name, str) and _ENV.match(name) for name in after):
        raise wire.Refused("request", "after must be names of environments")
    return {
        "runtime": request["runtime"],
        "wheels": [wheel(value) for value in wheels],
        "pip": wheel(request.get("pip")),
        "system": dict(system),
        "after": list(after),
        "min_free_bytes": max(0, int(request.get("min_free_bytes") or 0)),
    }


def _check_system(python: str, system: Dict[str, str]) -> None:
    for module, package in system.items():
        done = _run([python, "-IB", "-c", "import " + module], PROBE_S, env=CLEAN_ENV)
        if done.returncode:
            text = "%s has no %s; install it on the board: sudo apt install %s"
            raise wire.Refused("missing-package", text % (python, module, package))


def _check_space(workdir: str, paths: Sequence[str], min_free_bytes: int) -> None:
    """Refuse before anything is written. Unpacked sizes come from the wheels; pip is only linked to."""
    needed = SPARE_BYTES
    try:
        for path in paths[:-1]:
            with zipfile.ZipFile(path) as archive:
                needed += sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        raise wire.Refused("install", "a wheel cannot be read: %s" % error) from error
    disk = os.statvfs(workdir)
    available = disk.f_bavail * disk.f_frsize
    if available < needed + min_free_bytes:
        text = "the environment needs %d bytes in %s and %d must stay free, but %d are free"
        raise wire.Refused("space", text % (needed, workdir, min_free_bytes, available))


def _make_venv(python: str, place: str, with_system: bool) -> None:
    os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
    # --without-pip: Debian splits ensurepip off, and the pip that we run is the one that we pinned.
    options = ["--without-pip", *(["--system-site-packages"] if with_system else [])]
    _step("making the environment", [python, "-IB", "-m", "venv", *options, place], VENV_S)


def _fill(place: str, files: Sequence[Any]) -> None:
    """Let the pinned pip install the wheels, from a folder that holds nothing else."""
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=place) as wheelhouse:
        for wheel, path in files:
            _link(path, os.path.join(wheelhouse, wheel["file"]))
        pip_wheel, pip_path = files[-1]
        # pip checks the others, and nobody checks pip.
        if _sha256_of(pip_path) != pip_wheel["sha256"]:
            raise wire.Refused("install", "the file of pip is not what its hash says")
        requirements = os.path.join(wheelhouse, "requirements.txt")
        with open(requirements, "w", encoding="utf-8") as stream:
            for wheel, _ in files[:-1]:
                stream.write("%(name)s==%(version)s --hash=sha256:%(sha256)s\n" % wheel)
        pip = os.path.join(wheelhouse, pip_wheel["file"], "pip")
        options = ["--isolated", "--no-index", "--no-deps", "--require-hashes", "--no-compile"]
        options += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
        sources = ["--find-links", wheelhouse, "-r", requirements]
        command = [_python_in(place), "-sEB", pip, "install", *options, *sources]
        _step("installing the wheels", command, PIP_S)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise _disk_failure(error, "cannot copy a wheel: ", "") from error


def _step(what: str, command: Sequence[str], timeout_s: float) -> None:
    try:
        done = _run(command, timeout_s, env=CLEAN_ENV)
    except subprocess.TimeoutExpired:
        raise wire.Refused("install", "%s took over %d s" % (what, timeout_s)) from None
    except OSError as error:
        text = "%s failed: %s: %s" % (what, command[0], error.strerror)
        raise wire.Refused("install", text) from error
    if not done.returncode:
        return
    tail = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])[-600:]
    if "No space left on device" in done.stderr or "Disk quota exceeded" in done.stderr:
        raise wire.Refused("space", "%s filled the disk" % what)
    reason = _signal_name(-done.returncode) if done.returncode < 0 else str(done.returncode)
    raise wire.Refused("install", "%s ended with %s: %s" % (what, reason, tail))


def _run(command: Sequence[str], timeout_s: float, env: Optional[Dict[str, str]]) -> Any:
    """A finished child. It never reads the agent's stdin, which belongs to the host, and after the timeout its children die with it."""
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=env,
        universal_newlines=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=timeout_s)
    except BaseException:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except OSError:
            pass
        child.communicate()
        raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def _signal_name(number: int) -> str:
    try:
        return "signal %d (%s)" % (number, signal.Signals(number).name)
    except ValueError:
        return "signal %d" % number


def _version_of(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return str(_run([python, "-IB", "-c", code], PROBE_S, env=CLEAN_ENV).stdout).strip()


def _python_in(place: str) -> str:
    return os.path.join(place, "bin", "python")


def _folders(workdir: str) -> List[str]:
    try:
        return sorted(os.listdir(os.path.join(workdir, "env")))
    except OSError:
        return []


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.unlink(path)


def _ready(place: str) -> Optional[Dict[str, Any]]:
    """The content of ``ready.json`` with the folder's name, or ``None`` when this is no finished environment."""
    name = os.path.basename(place)
    try:
        with open(os.path.join(place, READY), encoding="utf-8") as stream:
            ready = json.loads(stream.read(1 << 16))
    except (OSError, ValueError):
        return None
    kinds = {"runtime": str, "version": str, "python": str, "wheels": list, "serial": int}
    if not isinstance(ready, dict) or not isinstance(ready.get("after"), list):
        return None
    if not all(isinstance(ready.get(key), kind) for key, kind in kinds.items()):
        return None
    hashes = [{"sha256": str(sha256), "version": ready["version"]} for sha256 in ready["wheels"]]
    if not hashes or not name.startswith(ready["runtime"] + "-"):
        return None
    if name[-8:] != env_name(ready["runtime"], hashes)[-8:]:
        return None
    return dict(ready, name=name)


def _write_ready(place: str, ready: Dict[str, Any]) -> None:
    """Everything is on the disk before the file that says so."""
    content = json.dumps({key: value for key, value in ready.items() if key != "name"})
    os.sync()
    path = os.path.join(place, READY)
    with open(path + ".part", "w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path + ".part", path)
    folder = os.open(place, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()
