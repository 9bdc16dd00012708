"""Setting a board up: the agent's own code in real environments, with the host's real choices; only the link between them is not real."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
from wheelhouse import DIES, FAILS, described, pins_of, quick_pip, runtime_wheel

from edgeprune.devices.agent import environments, wire
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.setup import provision
from edgeprune.devices.setup.runtime_pins import load_pins
from edgeprune.errors import DeviceError, IntegrityError
from edgeprune.progress import Silent
from edgeprune.records.device import Device

HERE = {"machine": platform.machine(), "python": platform.python_version(), "bits": 64}


class BoardHere:
    """A board without a link: its cache is a folder, and requests go straight to the agent's functions."""

    def __init__(self, folder: Path, python: str = sys.executable, **facts) -> None:
        self.name, self.device = "here", Device(transport="local", targets=("rpi4",))
        self.folder, self.python = folder, python
        self.facts = {**HERE, "glibc": platform.libc_ver()[1], **facts}
        self.installs = 0

    def hello(self):
        return self.facts

    def push(self, content):
        path = self.folder / "cache" / environments.hashlib.sha256(content).hexdigest()
        if path.exists():
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return len(content)

    def request(self, op, fields, blob=b"", *, work_s):
        workdir = str(self.folder)
        if op == "env_list":
            return {"environments": environments.listed(workdir)}, b""
        assert op == "env_install"
        self.installs += 1
        try:
            cached = lambda sha256: str(self.folder / "cache" / sha256)  # noqa: E731
            return environments.install(workdir, self.python, fields, cached), b""
        except wire.Refused as error:
            raise Refusal(error.kind, str(error)) from error


@pytest.fixture
def stick(tmp_path) -> Path:
    """A folder with wheels, so that nothing is downloaded."""
    folder = tmp_path / "stick"
    quick_pip(folder)
    return folder


@pytest.fixture
def board(tmp_path) -> BoardHere:
    return BoardHere(tmp_path / "board")


def setup(board, stick, *candidates, runtimes=("tflite-runtime",), **more):
    pins = pins_of(quick_pip(stick), *candidates, **more)
    cache = stick.parent / "cache"
    return provision.setup(board, runtimes, progress=Silent(), wheels=stick, pins=pins, cache=cache)


def test_a_runtime_is_sent_installed_and_not_sent_again(board, stick):
    wheel = runtime_wheel(stick, "2.14.0")
    first = setup(board, stick, wheel)
    (done,) = first.runtimes
    assert (done.runtime, done.version, done.status) == ("tflite-runtime", "2.14.0", "installed")
    assert first.bytes_sent == wheel.stat().st_size + quick_pip(stick).stat().st_size
    assert set(first.seconds) == {"fetch", "push", "venv", "pip", "probe"}
    again = setup(board, stick, wheel)
    assert again.runtimes[0].status == "already-there"
    assert again.bytes_sent == 0
    assert board.installs == 1


def test_a_version_that_dies_at_import_gives_way_to_the_next_and_is_remembered(board, stick):
    new, old = runtime_wheel(stick, "2.14.0", DIES), runtime_wheel(stick, "2.13.0")
    report = setup(board, stick, new, old)
    (done,) = report.runtimes
    assert (done.version, done.status) == ("2.13.0", "installed")
    assert "died of signal 4 (SIGILL)" in done.reason
    again = setup(board, stick, new, old)
    assert again.runtimes[0].status == "already-there"
    assert again.runtimes[0].reason == "tflite-runtime 2.14.0 died here earlier"
    assert again.bytes_sent == 0
    assert board.installs == 2


def test_a_better_version_that_is_new_in_the_pins_is_installed_beside_the_old(board, stick):
    old, new = runtime_wheel(stick, "2.13.0"), runtime_wheel(stick, "2.14.0")
    setup(board, stick, old)
    assert setup(board, stick, new, old).runtimes[0].version == "2.14.0"
    back = setup(board, stick, old, new)  # pins of an older edgeprune
    assert (back.runtimes[0].status, back.bytes_sent) == ("already-there", 0)
    python = environments.python_for(str(board.folder), "tflite-runtime")
    assert environments.probe(python, "tflite-runtime") == "2.13.0"


def test_when_every_version_dies_the_error_says_how(board, stick):
    dying = [runtime_wheel(stick, version, DIES) for version in ("2.14.0", "2.13.0")]
    with pytest.raises(DeviceError, match="no pinned version of tflite-runtime can be imported"):
        setup(board, stick, *dying)


def test_an_import_that_fails_in_another_way_is_told_and_not_tried_around(board, stick):
    broken, old = runtime_wheel(stick, "2.14.0", FAILS), runtime_wheel(stick, "2.13.0")
    with pytest.raises(DeviceError, match=r"libmissing\.so\.1"):
        setup(board, stick, broken, old)


def test_one_runtime_that_cannot_be_had_does_not_stop_the_others(board, stick):
    wheel = runtime_wheel(stick, "2.14.0")
    report = setup(board, stick, wheel, runtimes=("litert", "tflite-runtime", "tensorrt"))
    assert [done.status for done in report.runtimes] == ["refused", "installed", "refused"]
    assert "no wheels of litert run on this board" in report.runtimes[0].reason
    assert "does not install the runtime 'tensorrt'" in report.runtimes[2].reason


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"machine": "riscv64"}, "on riscv64"),
        ({"machine": "armv7l", "bits": 32, "python": "3.11.2"}, "on armv7l"),
        ({"machine": "aarch64", "bits": 32, "python": "3.11.2"}, "32-bit user space of aarch64"),
        ({"machine": "aarch64", "python": "3.11.2", "glibc": "2.19"}, "needs 2.27"),
        ({"glibc": None}, "without glibc"),
    ],
)
def test_a_board_that_nothing_runs_on_is_refused_before_anything_is_sent(tmp_path, facts, words):
    board = BoardHere(tmp_path / "board", **facts)
    with pytest.raises(DeviceError, match=words) as caught:
        provision.setup(board, [], progress=Silent())
    assert "aarch64 (Python 3.9" in caught.value.hint
    assert not board.folder.exists()


def test_a_missing_package_of_the_system_is_named(board, stick):
    wheel = runtime_wheel(stick, "2.14.0")
    with pytest.raises(DeviceError, match="sudo apt install python3-numpy"):
        setup(board, stick, wheel, system={"nowhere_here": "python3-numpy"})


def test_an_altered_wheel_is_never_sent(board, stick):
    wheel = runtime_wheel(stick, "2.14.0")
    pins = pins_of(quick_pip(stick), wheel)
    runtime_wheel(stick, "2.14.0", "ALTERED = 1\n")
    with pytest.raises(IntegrityError, match=r"tflite_runtime-2\.14\.0"):
        provision.setup(board, ["tflite-runtime"], progress=Silent(), wheels=stick, pins=pins)
    assert not board.folder.exists()


def test_a_folder_on_the_board_that_cannot_be_used_stops_the_setup(stick, tmp_path):
    (tmp_path / "file").write_text("")
    board = BoardHere(tmp_path / "board")
    board.push = lambda content: len(content)
    board.folder = tmp_path / "file"
    with pytest.raises(DeviceError, match="cannot write in") as caught:
        setup(board, stick, runtime_wheel(stick, "2.14.0"))
    assert "set workdir of this device" in caught.value.hint


def test_the_targets_of_a_device_say_which_runtimes_it_needs():
    device = Device(transport="local", targets=("rpi4", "rpi5", "rpi3-32bit"))
    assert provision.runtimes_of(device)[0] == "litert"
    assert len(set(provision.runtimes_of(device))) == len(provision.runtimes_of(device))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["litert", "tflite-runtime", "onnxruntime"])
def test_the_pinned_wheels_of_this_machine_install_and_import(tmp_path, runtime):
    """Needs pip's index or a filled cache; tflite-runtime has no wheels for Python 3.12 and later."""
    board = BoardHere(tmp_path / "board")
    facts = {key: board.facts[key] for key in ("python", "machine", "bits", "glibc")}
    try:
        best = load_pins().candidates(runtime, **facts)[0]
    except DeviceError:
        assert runtime == "tflite-runtime"
        assert sys.version_info >= (3, 12)
        return
    report = provision.setup(board, [runtime], progress=Silent())
    assert report.runtimes[0].status == "installed"
    assert report.runtimes[0].version.startswith(best.version)
    assert report.bytes_sent == best.size_bytes
    assert provision.setup(board, [runtime], progress=Silent()).bytes_sent == 0


def test_the_stick_of_these_tests_holds_what_its_pins_say(stick):
    wheel = runtime_wheel(stick, "2.14.0")
    assert described(wheel).sha256 == described(runtime_wheel(stick, "2.14.0")).sha256
