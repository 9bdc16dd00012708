"""The pins that ship: sound, complete, and honest about the boards that have none."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from edgeprune.devices.agent.environments import RUNTIMES, env_name
from edgeprune.devices.setup.runtime_pins import (
    RUNTIME_PACKAGES,
    RuntimePins,
    Wheel,
    load_pins,
)
from edgeprune.errors import DeviceError
from edgeprune.records.formats import runtime_facts

PINS = load_pins()
CLASSES = [(board.python, board.machine) for board in PINS.classes]
BULLSEYE, BOOKWORM, JETPACK_5 = "2.31", "2.36", "2.31"


def candidates(runtime="litert", python="3.11.2", machine="aarch64", bits=64, glibc=BOOKWORM):
    return PINS.candidates(runtime, python=python, machine=machine, bits=bits, glibc=glibc)


def versions(*arguments, **facts) -> list[str]:
    return [candidate.version for candidate in candidates(*arguments, **facts)]


def every():
    for board in PINS.classes:
        for runtime, sets in board.runtimes.items():
            for found in (PINS._candidate(runtime, board, files) for files in sets):
                yield board, runtime, found


def test_the_boards_that_people_have_are_there():
    assert {("cp38", "aarch64"), ("cp39", "aarch64"), ("cp311", "armv7l")} <= set(CLASSES)
    for minor in (10, 11, 12, 13):
        assert {(f"cp3{minor}", "aarch64"), (f"cp3{minor}", "x86_64")} <= set(CLASSES)


def test_every_set_is_the_runtime_its_numpy_and_a_pip():
    for board, runtime, found in every():
        names = [wheel.name for wheel in found.wheels]
        numpy = [] if "numpy" in board.system else ["numpy"]
        assert names == [RUNTIME_PACKAGES[runtime], *numpy], (board.python, board.machine)
        assert found.pip.name == "pip"
        assert found.pip.python in ("py3", "py2.py3")


def test_every_wheel_fits_the_python_and_the_machine_of_its_class():
    for board, _, found in every():
        for wheel in found.wheels:
            assert wheel.python == board.python
            assert all(tag.endswith(board.machine) for tag in wheel.platforms)
            assert (2, 17) <= wheel.min_glibc <= (2, 36)


def test_the_known_killers_and_the_untried_are_not_pinned():
    for _, runtime, found in every():
        version = tuple(int(part) for part in found.version.split("."))
        if runtime == "onnxruntime":
            assert version <= (1, 27, 0)
            assert version[:2] != (1, 21)  # dies on a Cortex-A72
        numpy = [wheel.version for wheel in found.wheels if wheel.name == "numpy"]
        if runtime == "tflite-runtime" and numpy:
            assert numpy[0].startswith("1.")


def test_all_runtimes_of_a_board_share_one_numpy_so_that_it_is_sent_once():
    for board in PINS.classes:
        sets = [found for other, _, found in every() if other == board]
        assert len({w.file for found in sets for w in found.wheels if w.name == "numpy"}) <= 1


def test_host_and_agent_mean_the_same_runtimes_and_the_same_folders():
    of_wheels = {n: package for n, (_, package) in RUNTIMES.items() if runtime_facts(n).wheels}
    assert of_wheels == RUNTIME_PACKAGES
    for _, runtime, found in every():
        wheels = [{"sha256": wheel.sha256, "version": wheel.version} for wheel in found.wheels]
        assert env_name(runtime, wheels) == found.env_name


def test_the_c_library_decides_which_version_comes_first():
    assert versions("tflite-runtime", glibc=BOOKWORM) == ["2.14.0"]
    assert versions("tflite-runtime", python="3.9.2", glibc="2.34") == ["2.14.0", "2.13.0"]
    assert versions("tflite-runtime", python="3.9.2", glibc=BULLSEYE) == ["2.13.0"]
    assert versions("tflite-runtime", python="3.8.10", glibc=JETPACK_5) == ["2.13.0"]
    assert versions("onnxruntime", python="3.8.10", glibc=JETPACK_5) == ["1.19.2"]
    assert versions("litert")[0] == "2.3.0"
    assert versions("onnxruntime")[:2] == ["1.27.0", "1.24.4"]


def test_a_32_bit_system_gets_tflite_runtime_with_the_numpy_of_the_system():
    for machine in ("armv7l", "aarch64"):  # a 64-bit kernel under a 32-bit system says aarch64
        (found,) = candidates("tflite-runtime", machine=machine, bits=32)
        assert found.wheels[0].platforms == ("manylinux_2_34_armv7l",)
        assert found.system == {"numpy": "python3-numpy"}
        assert [wheel.name for wheel in found.wheels] == ["tflite-runtime"]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"machine": "aarch64", "bits": 32}, "Python 3.11.2 on the 32-bit user space of aarch64"),
        ({"machine": "armv6l", "bits": 32}, "on armv6l"),
        ({"machine": "riscv64"}, "Python 3.11.2 on riscv64"),
        ({"machine": "x86_64", "bits": 32}, "32-bit user space of x86_64"),
        ({"python": "3.8.10"}, "Python 3.8.10 on aarch64"),
        ({"python": "3.15.0"}, "Python 3.15.0"),
        ({"glibc": None}, "aarch64 without glibc"),
        ({"glibc": "2.24"}, "glibc 2.24, as it needs 2.27"),
    ],
)
def test_a_board_without_wheels_is_told_which_boards_have_some(facts, words):
    with pytest.raises(DeviceError, match="no wheels of litert run on this board") as caught:
        candidates(**facts)
    assert words in caught.value.message
    assert "aarch64 (Python 3.9, 3.10, 3.11, 3.12, 3.13, 3.14; glibc 2.27" in caught.value.hint
    assert "armv7l" not in caught.value.hint


def test_a_runtime_of_the_system_is_not_installed():
    with pytest.raises(DeviceError, match="does not install the runtime 'tensorrt'"):
        candidates("tensorrt")


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../numpy-1.0-py3-none-any.whl"},
        {"file": "numpy-1.0.tar.gz"},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"size_bytes": 0},
    ],
)
def test_a_pin_must_be_a_wheel_with_a_whole_hash(change):
    good = {"file": "numpy-1.0-py3-none-any.whl", "sha256": "0" * 64, "size_bytes": 1}
    assert Wheel(**good).version == "1.0"
    with pytest.raises(ValidationError):
        Wheel(**{**good, **change})


def test_pins_name_every_wheel_once_and_no_class_twice():
    content = PINS.model_dump()
    RuntimePins.model_validate(content)
    twice = {**content, "classes": [*content["classes"], content["classes"][0]]}
    spare = {"numpy-9.0-py3-none-any.whl": {"sha256": "0" * 64, "size_bytes": 1}}
    first, second = list(content["wheels"])[:2]
    same = {**content["wheels"], first: content["wheels"][second]}
    for wrong in (
        twice,
        {**content, "wheels": {**content["wheels"], **spare}},
        {**content, "wheels": same},
    ):
        with pytest.raises(ValidationError):
            RuntimePins.model_validate(wrong)
