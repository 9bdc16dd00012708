"""Environments on the board: real venvs and real, small wheels; the real pip where it matters, a quick one elsewhere."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from wheelhouse import (
    DIES,
    FAILS,
    NEEDS_NUMPY,
    SLEEPS,
    described,
    pip_wheel,
    quick_pip,
    runtime_wheel,
)

from edgeprune.devices.agent import environments, wire


@pytest.fixture(scope="session")
def pip(tmp_path_factory) -> Path:
    return quick_pip(tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="session")
def real_pip(tmp_path_factory) -> Path:
    return pip_wheel(tmp_path_factory.mktemp("real-pip"))


class Cache:
    """Files by hash, as the agent's own cache gives them."""

    def __init__(self, *paths: Path) -> None:
        self.paths = {described(path).sha256: str(path) for path in paths}

    def __call__(self, sha256: str) -> str:
        return self.paths[sha256]


def asked(pip: Path, *wheels: Path, **more) -> dict:
    keys = ("name", "version", "file", "sha256")
    pins = [{key: getattr(described(path), key) for key in keys} for path in (*wheels, pip)]
    return {"runtime": "tflite-runtime", "wheels": pins[:-1], "pip": pins[-1], **more}


def install(workdir: Path, pip: Path, *wheels: Path, **more) -> dict:
    request = asked(pip, *wheels, **more)
    return environments.install(str(workdir), sys.executable, request, Cache(pip, *wheels))


def refusal(kind: str, *arguments, **more) -> str:
    with pytest.raises(wire.Refused) as caught:
        install(*arguments, **more)
    assert caught.value.kind == kind, str(caught.value)
    return str(caught.value)


@pytest.fixture
def workdir(tmp_path) -> Path:
    return tmp_path / "work"


def test_an_environment_is_made_tried_and_listed(workdir, tmp_path, pip):
    wheel = runtime_wheel(tmp_path, "2.14.0")
    made = install(workdir, pip, wheel)
    assert made["is_new"]
    assert made["version"] == "2.14.0"
    assert set(made["seconds"]) == {"venv", "pip", "probe"}
    assert made["wheels"] == [described(wheel).sha256]
    (known,) = environments.listed(str(workdir))
    assert known["name"] == made["name"]
    assert made["name"].startswith("tflite-runtime-2.14.0-")
    python = environments.python_for(str(workdir), "tflite-runtime")
    assert python == str(workdir / "env" / made["name"] / "bin" / "python")
    assert environments.probe(python, "tflite-runtime") == "2.14.0"
    assert environments.python_for(str(workdir), "litert") is None
    left = {path.name for path in (workdir / "env" / made["name"]).iterdir()}
    assert not [name for name in left if name.startswith("wheels-") or name.endswith(".part")]


def test_settings_of_the_user_do_not_reach_the_installer(workdir, tmp_path, real_pip, monkeypatch):
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "nonsense")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "wrong"))
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "pip.py").write_text("raise SystemExit('the wrong pip')")
    assert install(workdir, real_pip, runtime_wheel(tmp_path, "2.14.0"))["version"] == "2.14.0"
    assert not (tmp_path / "elsewhere").exists()


def test_an_altered_wheel_is_refused_and_leaves_nothing(workdir, tmp_path, real_pip):
    wheel = runtime_wheel(tmp_path, "2.14.0")
    request, cache = asked(real_pip, wheel), Cache(real_pip, wheel)
    runtime_wheel(tmp_path, "2.14.0", "ALTERED = 1\n")
    with pytest.raises(wire.Refused, match="Expected sha256") as caught:
        environments.install(str(workdir), sys.executable, request, cache)
    assert caught.value.kind == "install"
    assert list((workdir / "env").iterdir()) == []


def test_an_altered_pip_is_never_run(workdir, tmp_path, pip):
    wheel, other = runtime_wheel(tmp_path, "2.14.0"), tmp_path / "pip-1.0-py3-none-any.whl"
    other.write_bytes(pip.read_bytes())
    request, cache = asked(other, wheel), Cache(other, wheel)
    with other.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(wire.Refused, match="pip is not what its hash says"):
        environments.install(str(workdir), sys.executable, request, cache)
    assert environments.listed(str(workdir)) == []


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (DIES, "runtime-signal", "died of signal 4 (SIGILL)"),
        (FAILS, "runtime", "cannot import tflite-runtime: ImportError: libmissing.so.1"),
    ],
)
def test_a_runtime_that_cannot_be_imported_does_not_count(
    workdir, tmp_path, pip, source, kind, words
):
    assert words in refusal(kind, workdir, pip, runtime_wheel(tmp_path, "2.14.0", source))
    assert environments.listed(str(workdir)) == []
    assert list((workdir / "env").iterdir()) == []


def test_an_import_that_hangs_is_ended(workdir, tmp_path, pip, monkeypatch):
    made = install(workdir, pip, runtime_wheel(tmp_path, "2.14.0"))
    place = workdir / "env" / made["name"]
    (module,) = place.rglob("tflite_runtime/interpreter.py")
    module.write_text(SLEEPS)
    with pytest.raises(wire.Refused, match="over 1 s"):
        environments.probe(str(place / "bin" / "python"), "tflite-runtime", timeout_s=1.0)


def test_what_a_power_cut_left_is_swept_by_the_next_install(workdir, tmp_path, pip):
    first = install(workdir, pip, runtime_wheel(tmp_path, "2.13.0"))
    half = workdir / "env" / "tflite-runtime-2.14.0-00000000"
    (half / "bin").mkdir(parents=True)
    broken = workdir / "env" / "onnxruntime-1.0.0-11111111"
    broken.mkdir()
    (broken / "ready.json").write_text(json.dumps({"runtime": "onnxruntime"})[:-4])
    install(workdir, pip, runtime_wheel(tmp_path, "2.14.0"))
    names = {path.name for path in (workdir / "env").iterdir()}
    assert len(names) == 2
    assert first["name"] in names
    assert half.name not in names
    assert broken.name not in names


def test_a_folder_with_the_ready_file_of_another_does_not_count(workdir, tmp_path, pip):
    made = install(workdir, pip, runtime_wheel(tmp_path, "2.14.0"))
    false = workdir / "env" / "tflite-runtime-2.14.0-00000000"
    false.mkdir()
    (false / "ready.json").write_bytes((workdir / "env" / made["name"] / "ready.json").read_bytes())
    assert [known["name"] for known in environments.listed(str(workdir))] == [made["name"]]
    assert environments.sweep(str(workdir)) == [false.name]


def test_the_environment_asked_for_last_is_preferred_and_is_not_made_again(workdir, tmp_path, pip):
    old, new = runtime_wheel(tmp_path, "2.13.0"), runtime_wheel(tmp_path, "2.14.0")
    first, second = install(workdir, pip, new), install(workdir, pip, old)
    assert environments.listed(str(workdir))[0]["name"] == second["name"]
    request = asked(pip, new)
    again = environments.install(str(workdir), sys.executable, request, Cache())  # needs no file
    assert not again["is_new"]
    assert again["name"] == first["name"]
    python = environments.python_for(str(workdir), "tflite-runtime")
    assert python is not None
    assert first["name"] in python
    assert environments.remove(str(workdir), [first["name"]]) == [second["name"]]
    assert [known["name"] for known in environments.listed(str(workdir))] == [first["name"]]


def test_too_small_a_disk_is_refused_before_anything_is_written(
    workdir, tmp_path, pip, monkeypatch
):
    disk = SimpleNamespace(f_bavail=1000, f_frsize=4096)
    monkeypatch.setattr(environments.os, "statvfs", lambda path: disk)
    text = refusal("space", workdir, pip, runtime_wheel(tmp_path, "2.14.0"), min_free_bytes=7)
    assert "7 must stay free, but 4096000 are free" in text
    assert not (workdir / "env").exists()


def test_a_disk_that_fills_up_while_installing_leaves_nothing(workdir, tmp_path, pip):
    """Needs root for the mount, as the emulated board does; elsewhere the check before it stands alone."""
    workdir.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(workdir)]
    wheel = runtime_wheel(tmp_path, "2.14.0", "X = '''%s'''\n" % ("0123456789abcdef" * 200_000))
    code = (
        "import sys, json; sys.path[:0] = json.loads(sys.argv[2])\n"
        "from edgeprune.devices.agent import environments, wire\n"
        "job = json.loads(sys.argv[1]); environments.SPARE_BYTES = -10**9\n"
        "try: environments.install(job['workdir'], job['python'], job['request'], job['paths'].get)\n"
        "except wire.Refused as error: print(error.kind, len(environments._folders(job['workdir'])))\n"
    )
    job = {"workdir": str(workdir), "python": sys.executable, "request": asked(pip, wheel)}
    job["paths"] = Cache(pip, wheel).paths
    python = [sys.executable, "-c", code, json.dumps(job), json.dumps(sys.path)]
    shell = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    done = subprocess.run(
        [*shell, 'm=$1; shift; $m && exec "$@"', "sh", " ".join(mounted), *python],
        capture_output=True,
        text=True,
        check=False,
    )
    if os.geteuid() != 0:
        assert done.returncode != 0
        return
    assert done.stdout == "space 0\n", done.stderr


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EROFS, "workdir"), (errno.EACCES, "workdir"), (errno.ENOSPC, "space")],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, number, kind):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(environments.tempfile, "mkstemp", refuse)
    with pytest.raises(wire.Refused) as caught:
        environments.check_workdir(str(tmp_path / "work"))
    assert caught.value.kind == kind
    assert str(tmp_path / "work") in str(caught.value)
    assert ("set workdir" in str(caught.value)) == (kind == "workdir")


@pytest.mark.parametrize("option", ["ro", "noexec"])
def test_a_read_only_or_noexec_file_system_is_refused(tmp_path, option):
    """A real mount where we may make one; elsewhere the same words come from the test above."""
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from edgeprune.devices.agent import environments, wire\n"
        "try: environments.check_workdir(sys.argv[1])\n"
        "except wire.Refused as error: print(error.kind, error)\n"
    )
    shell = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    python = [sys.executable, "-c", code, str(tmp_path), *filter(None, sys.path)]
    done = subprocess.run(
        [*shell, script, "sh", option, str(tmp_path), *python],
        capture_output=True,
        text=True,
        check=False,
    )
    if os.geteuid() != 0:
        assert done.returncode != 0
        return
    verb = {"ro": "cannot write in", "noexec": "cannot run programs in"}[option]
    assert done.stdout.startswith(f"workdir {verb} {tmp_path}: "), done.stderr
    assert "set workdir of this device" in done.stdout


def test_a_module_that_only_the_system_has_is_asked_for_first(workdir, tmp_path, pip):
    wheel = runtime_wheel(tmp_path, "2.14.0")
    text = refusal("missing-package", workdir, pip, wheel, system={"nowhere_here": "python3-x"})
    assert "sudo apt install python3-x" in text
    assert not (workdir / "env").exists()


def test_an_environment_may_see_the_modules_of_the_system(workdir, tmp_path, pip):
    """The system here is a virtual environment itself, so what its environment sees is the Python below it: asked for, not assumed."""
    wheel = runtime_wheel(tmp_path, "2.14.0")
    made = install(workdir, pip, wheel, system={"json": "python3"})
    settings = (workdir / "env" / made["name"] / "pyvenv.cfg").read_text()
    assert "include-system-site-packages = true" in settings
    other = runtime_wheel(tmp_path, "2.13.0", NEEDS_NUMPY)
    assert "No module named 'numpy'" in refusal("runtime", workdir, pip, other)


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": "../../etc"},
        {"wheels": []},
        {"wheels": [{"name": "a", "version": "1", "file": "../a.whl", "sha256": "0" * 64}]},
        {"wheels": [{"name": "-r", "version": "1", "file": "a.whl", "sha256": "0" * 64}]},
        {"wheels": [{"name": "a", "version": "1 -r /x", "file": "a.whl", "sha256": "0" * 64}]},
        {"wheels": [{"name": "a", "version": "1", "file": "a.whl", "sha256": "../" + "0" * 61}]},
        {"pip": None},
        {"system": {"os; x": "python3"}},
        {"after": ["../.."]},
    ],
)
def test_a_request_whose_names_are_no_names_is_refused(workdir, tmp_path, pip, change):
    request = {**asked(pip, runtime_wheel(tmp_path, "2.14.0")), **change}
    with pytest.raises(wire.Refused) as caught:
        environments.install(str(workdir), sys.executable, request, Cache())
    assert caught.value.kind == "request"
    assert not workdir.exists()


def test_a_runtime_that_nobody_knows_or_an_interpreter_that_is_not_there_is_refused():
    with pytest.raises(wire.Refused, match="cannot run the runtime"):
        environments.probe(sys.executable, "nothing")
    with pytest.raises(wire.Refused, match="cannot run /nowhere/python"):
        environments.probe("/nowhere/python", "litert")
