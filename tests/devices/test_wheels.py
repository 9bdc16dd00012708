"""Wheels on the host: the pinned bytes or none, from a folder, the cache, or a real pip that sees one folder and no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from wheelhouse import described, runtime_wheel

from edgeprune.devices.setup import wheels
from edgeprune.devices.setup.runtime_pins import Wheel
from edgeprune.errors import DeviceError, IntegrityError, SpecError
from edgeprune.progress import Silent


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only place where pip finds anything."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fetch(pin: Wheel, tmp_path: Path, folder: Path | None = None) -> Path:
    return wheels.fetch([pin, pin], tmp_path / "cache", Silent(), folder=folder)[pin.sha256]


def test_a_wheel_is_fetched_once_and_then_comes_from_the_cache(index, tmp_path):
    path = runtime_wheel(index, "2.14.0")
    pin = described(path)
    got = fetch(pin, tmp_path)
    assert got == tmp_path / "cache" / pin.sha256 / pin.file
    assert got.read_bytes() == path.read_bytes()
    path.unlink()
    assert fetch(pin, tmp_path) == got
    assert [p.name for p in got.parent.iterdir()] == [pin.file]


def test_an_altered_wheel_in_the_cache_is_fetched_again(index, tmp_path):
    pin = described(runtime_wheel(index, "2.14.0"))
    got = fetch(pin, tmp_path)
    got.write_bytes(got.read_bytes()[:-1] + b"x")
    assert described(fetch(pin, tmp_path)) == pin


def test_an_altered_wheel_in_the_index_is_refused(index, tmp_path):
    pin = described(runtime_wheel(index, "2.14.0"))
    runtime_wheel(index, "2.14.0", "ALTERED = 1\n")
    with pytest.raises(IntegrityError, match="not the pinned one"):
        fetch(pin, tmp_path)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_download_is_looked_at_again_here(index, tmp_path, monkeypatch):
    pin = described(runtime_wheel(index, "2.14.0"))
    lying = tmp_path / pin.file
    lying.write_bytes(b"not that")
    monkeypatch.setattr(wheels, "_download", lambda *_: lying)
    with pytest.raises(IntegrityError, match="has 8 bytes"):
        fetch(pin, tmp_path)


def test_without_a_network_the_error_names_the_file_and_where_to_put_it(index, tmp_path):
    pin = described(runtime_wheel(index, "2.14.0"))
    (index / pin.file).unlink()
    with pytest.raises(DeviceError, match=r"cannot get tflite_runtime-2\.14\.0") as caught:
        fetch(pin, tmp_path)
    assert "--wheels" in str(caught.value)
    with pytest.raises(DeviceError, match=f"put that file into {index}"):
        fetch(pin, tmp_path, folder=index)


def test_a_folder_of_the_user_is_searched_first_and_must_hold_the_pinned_bytes(index, tmp_path):
    folder = tmp_path / "usb-stick"
    pin = described(runtime_wheel(folder, "2.14.0"))
    assert fetch(pin, tmp_path, folder=folder) == folder / pin.file
    runtime_wheel(folder, "2.14.0", "ALTERED = 1\n")
    with pytest.raises(IntegrityError, match="put the pinned file there"):
        fetch(pin, tmp_path, folder=folder)
    with pytest.raises(SpecError, match="must be a folder"):
        fetch(pin, tmp_path, folder=tmp_path / "nowhere")


def test_pip_is_asked_for_the_board_and_not_for_this_computer():
    file = "numpy-1.26.4-cp39-cp39-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"
    tags = wheels._tags(Wheel(file=file, sha256="0" * 64, size_bytes=1))
    assert tags == [
        "--platform=manylinux_2_17_aarch64",
        "--platform=manylinux2014_aarch64",
        "--implementation=cp",
        "--python-version=3.9",
    ]


def test_the_cache_follows_the_xdg_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheels.cache_folder() == tmp_path / "edgeprune" / "wheels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert wheels.cache_folder() == tmp_path / "home" / ".cache" / "edgeprune" / "wheels"
