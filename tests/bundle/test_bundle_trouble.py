"""What this computer cannot do is not held against a bundle: the level was not run, and nothing passes by it."""

from __future__ import annotations

import errno
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_checks import failed_level
from bundle_fixture import expected, facts, images, make_bundle, onnx_file
from onnx import numpy_helper

from edgeprune.bundle.trouble import is_trouble
from edgeprune.bundle.verify import VerifyReport, require_ok, verify
from edgeprune.bundle.write import Payload, write_bundle, zip_path
from edgeprune.devices.link.frames import Refusal
from edgeprune.errors import DeviceError, IntegrityError, LinkLost, NoSpace
from edgeprune.records.files import sha256_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def _trouble(path: Path, level: int) -> str:
    """What is said where a level could not be run; nothing failed, and nothing after it passed."""
    report: VerifyReport = verify(path)
    assert not report.ok
    assert not [found for found in report.levels if found.status == "failed"]
    (found,) = (x for x in report.levels if x.trouble)
    assert (found.level, found.status) == (level, "not-run")
    assert all(x.status == "not-run" for x in report.levels if x.level > level)
    assert "\n" not in found.detail
    with pytest.raises(DeviceError, match=f"was not checked: {found.name}"):
        require_ok(report)
    return found.detail


@pytest.mark.parametrize("home", ["missing", "none"])
def test_no_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    if home == "missing":
        monkeypatch.setenv("HOME", str(folder / "nowhere"))
        assert "is not there; set HOME" in _trouble(folder, 3)
        return

    def unknown(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(unknown))
    assert "does not say where the home folder is" in _trouble(folder, 3)


def test_a_data_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "taken"))
    assert "cannot write" in _trouble(folder, 3)


def test_no_folder_to_unpack_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert "no room to unpack bundle.zip: No such file" in _trouble(zip_path(folder), 0)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 2000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full(folder: Path, small_files: None) -> None:
    assert _trouble(zip_path(folder), 0) == "cannot unpack bundle.zip: File too large"


def test_a_model_that_answers_with_nothing_finite_is_the_bundles_fault(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    artifact = onnx_file(path)
    model = onnx.load(path)
    weight = numpy_helper.to_array(model.graph.initializer[0]) * np.float32("nan")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    content = model.SerializeToString()
    path.write_bytes(content)
    changes = {"sha256": sha256_bytes(content), "size_bytes": len(content)}
    payload = Payload(artifact.model_copy(update=changes), path, images(), expected(images()))
    failed = failed_level(write_bundle(tmp_path / "bundle", facts(), payload))
    assert (failed.level, failed.trouble) == (4, False)
    assert "not finite" in failed.detail


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (IntegrityError("the answers differ"), False),
        (DeviceError("the agent did not start"), True),
        (LinkLost("the agent ended"), True),
        (NoSpace("no space left"), True),
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EINVAL, "Invalid argument"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (Refusal("space", "8 bytes do not fit"), True),
        (Refusal("memory", "the board ran out of memory"), True),
        (Refusal("crash", "the model's process died of signal 11"), False),
        (Refusal("fault", "answered: ValueError: no"), False),
        (Refusal("fault", "answered: OSError: [Errno 28] No space left on device: '/tmp/x'"), True),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:40],
)
def test_what_tells_of_the_computer_and_what_of_the_bundle(
    error: BaseException, expected: bool
) -> None:
    assert is_trouble(error) is expected
    told = IntegrityError("cannot read labels.txt")
    told.__cause__ = error if isinstance(error, OSError) else None
    assert is_trouble(told) is (expected and isinstance(error, OSError))
