"""What the agent reads of a board: fake boards written from documentation, stub commands, and garbage."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakeboard import BOARDS, FakeBoard
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.devices.agent import telemetry
from edgeprune.devices.agent.machine import read_text
from edgeprune.records.measurement import Telemetry

MODULES = ("wire.py", "machine.py", "telemetry.py", "validity.py", "tuning.py")
AGENT = Path(telemetry.__file__).parent


@pytest.fixture
def board(tmp_path):
    return lambda name: FakeBoard(tmp_path, name)


def record_of(snapshot: dict) -> Telemetry:
    return Telemetry.model_validate_json(json.dumps(snapshot))


@pytest.mark.parametrize("name", sorted(path.stem for path in BOARDS.glob("*.json")))
def test_every_board_fills_the_record_of_the_host(board, name):
    snapshot = telemetry.snapshot(board(name).root)
    assert set(snapshot) == set(Telemetry.model_fields) - {"foreign_cpu_ratio"}
    record = record_of(snapshot)
    for field in ("load_1min", "temperature_c", "clock_hz", "governor", "cpus_online"):
        assert getattr(record, field) is not None


def test_a_cool_raspberry_pi(board):
    assert telemetry.snapshot(board("rpi4-cool").root) == {
        "load_1min": 0.12,
        "temperature_c": 45.764,
        "temperature_limit_c": 80.0,
        "clock_hz": 600117184,
        "clock_limit_hz": 1_500_000_000,
        "governor": "ondemand",
        "power_mode": None,
        "throttled": False,
        "throttle": [],
        "throttle_seen": [],
        "throttle_events": None,
        "available_memory_bytes": 3300000 * 1024,
        "cpus_online": 4,
    }


def test_a_hot_raspberry_pi_tells_its_real_clock_and_what_limits_it(board):
    snapshot = telemetry.snapshot(board("rpi4-throttled").root)
    assert snapshot["clock_hz"] == 1000265600
    assert snapshot["throttled"] is True
    assert snapshot["throttle"] == ["frequency-capped", "soft-limit", "throttled"]
    assert snapshot["throttle_seen"] == snapshot["throttle"]


@pytest.mark.parametrize("bit", range(4))
def test_each_bit_of_get_throttled_has_its_name_now_and_since(board, bit):
    fake = board("rpi4-cool")
    fake.throttled(1 << bit)
    assert telemetry.throttling(fake.root) == (True, [telemetry.THROTTLE_BITS[bit]], [])
    fake.throttled(1 << bit + 16)
    assert telemetry.throttling(fake.root) == (False, [], [telemetry.THROTTLE_BITS[bit]])


def test_the_alarm_of_the_kernel_is_under_voltage_even_without_vcgencmd(board):
    fake = board("rpi4-cool")
    fake.remove("/usr/bin/vcgencmd")
    assert telemetry.throttling(fake.root) == (False, [], [])
    fake.write("/sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    assert telemetry.throttling(fake.root) == (True, ["under-voltage"], [])
    fake.write("/sys/class/hwmon/hwmon1/name", "some_other_chip\n")
    assert telemetry.throttling(fake.root) == (None, [], [])


def test_a_jetson_tells_its_power_mode_and_counts_over_current_events(board):
    snapshot = telemetry.snapshot(board("jetson-orin").root)
    assert (snapshot["power_mode"], snapshot["throttle_events"]) == ("15W", 7)
    assert (snapshot["temperature_c"], snapshot["temperature_limit_c"]) == (48.312, 99.0)
    assert snapshot["clock_hz"] == 1_510_400_000  # of the faster cluster
    assert snapshot["throttled"] is None  # nothing on this board tells


def test_nvpmodel_never_gets_an_answer_to_its_question(board):
    fake = board("jetson-orin")
    script = 'echo "Reboot required, type YES: "; read answer || answer=none; echo "NV Power Mode: $answer"'
    fake.program("/usr/sbin/nvpmodel", script + "\n")
    assert telemetry.power_mode(fake.root) == "none"


def test_a_power_mode_counts_though_nvpmodel_may_not_read_every_limit(board):
    fake = board("jetson-orin")
    fake.program(
        "/usr/sbin/nvpmodel", 'echo "NV Power Mode: MODE_15W"; echo 2; echo E >&2; exit 1\n'
    )
    assert telemetry.power_mode(fake.root) == "MODE_15W"


def test_a_generic_board_caps_its_clock_by_a_cooling_device(board):
    fake = board("generic-arm")
    snapshot = telemetry.snapshot(fake.root)
    assert (snapshot["throttled"], snapshot["temperature_limit_c"]) == (False, 70.0)
    fake.write("/sys/class/thermal/cooling_device0/cur_state", "3\n")
    fake.policy(4, "scaling_max_freq", 1_200_000)
    snapshot = telemetry.snapshot(fake.root)
    assert (snapshot["throttled"], snapshot["throttle"]) == (True, ["frequency-capped"])
    assert snapshot["clock_limit_hz"] == 1_416_000_000


def test_only_sensors_of_the_die_count_while_there_are_any(board):
    fake = board("jetson-orin")
    assert telemetry.temperatures(fake.root)[0] == 48.312  # the PMIC stands at 100 at all times
    for number in (0, 1, 3):
        fake.remove(f"/sys/class/thermal/thermal_zone{number}")
    assert telemetry.temperatures(fake.root) == (None, None)
    fake.write("/sys/class/thermal/thermal_zone5/type", "board\n")
    fake.write("/sys/class/thermal/thermal_zone5/temp", "39000\n")
    assert telemetry.temperatures(fake.root) == (39.0, None)


def test_governors_of_two_clusters_are_told_together(board):
    fake = board("generic-arm")
    fake.policy(4, "scaling_governor", "performance")
    assert telemetry.clock(fake.root).governor == "performance+schedutil"
    assert not telemetry.clock(fake.root).is_fixed
    fake.policy(0, "scaling_governor", "performance")
    assert telemetry.clock(fake.root).is_fixed
    fake.policy(0, "scaling_driver", "intel_pstate")
    assert not telemetry.clock(fake.root).is_fixed


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 1), ("0-3", 4), ("0-1,3", 3), ("3-1", None), ("0-99999", None), ("", None), ("x", None)],
)
def test_the_list_of_processors(board, text, count):
    fake = board("rpi4-cool")
    fake.write("/sys/devices/system/cpu/online", text + "\n")
    assert telemetry.cpus_online(fake.root) == count


@pytest.mark.parametrize(
    ("path", "content", "field"),
    [
        ("/sys/class/thermal/thermal_zone0/temp", "999000", "temperature_c"),
        ("/sys/class/thermal/thermal_zone0/temp", "0", "temperature_c"),
        ("/sys/class/thermal/thermal_zone0/temp", "-256000", "temperature_c"),
        ("/proc/loadavg", "nan 0.0 0.0", "load_1min"),
        ("/proc/meminfo", "MemAvailable: -5 kB", "available_memory_bytes"),
    ],
)
def test_a_value_that_cannot_be_true_is_none(board, path, content, field):
    fake = board("rpi4-cool")
    fake.write(path, content)
    assert telemetry.snapshot(fake.root)[field] is None


@pytest.mark.parametrize("output", ["frequency(48)=0\n", "frequency(48)=9e9", "VCHI failed\n", ""])
def test_without_a_plausible_real_clock_the_asked_one_stands(board, output):
    fake = board("rpi4-cool")
    fake.answer("/usr/bin/vcgencmd", "measure_clock arm", output)
    assert telemetry.snapshot(fake.root)["clock_hz"] == 600_000_000


def test_an_asked_clock_that_moves_while_the_real_one_is_measured_is_not_compared(board):
    fake = board("rpi4-cool")
    cur = fake.path("/sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq")
    fake.program("/usr/bin/vcgencmd", f"echo 1500000 > '{cur}'\necho 'frequency(48)=600117184'\n")
    assert telemetry.clock(fake.root)[:2] == (600117184, None)


def test_a_command_that_hangs_is_ended_with_all_it_started(board, monkeypatch):
    monkeypatch.setattr(telemetry, "COMMAND_TIMEOUT_S", 0.3)
    fake = board("jetson-orin")
    fake.program("/usr/sbin/nvpmodel", f"sleep 60 & echo $! > '{fake.root}/pid'\nwait\n")
    start = time.monotonic()
    assert telemetry.power_mode(fake.root) is None
    assert time.monotonic() - start < 5
    sleeper = int(fake.path("pid").read_text())
    deadline = time.monotonic() + 5
    while is_alive(sleeper) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(sleeper)


def is_alive(pid: int) -> bool:
    text = read_text(f"/proc/{pid}/stat") or ""
    return bool(text) and text.rpartition(")")[2].split()[0] != "Z"


def test_an_empty_board_tells_nothing(tmp_path):
    snapshot = telemetry.snapshot(str(tmp_path))
    assert snapshot.pop("throttle") == snapshot.pop("throttle_seen") == []
    assert set(snapshot.values()) == {None}


def test_files_that_cannot_be_read_or_never_end_are_passed_over(board):
    fake = board("rpi4-cool")
    path = fake.path("/proc/loadavg")
    path.unlink()
    os.mkfifo(path)  # nobody will ever write: reading must not wait
    fake.remove("/proc/meminfo")
    fake.path("/proc/meminfo").mkdir()
    snapshot = telemetry.snapshot(fake.root)
    assert (snapshot["load_1min"], snapshot["available_memory_bytes"]) == (None, None)
    assert read_text("/dev/zero") == ""  # stops at its limit


@pytest.mark.parametrize("name", ["rpi4-cool", "jetson-orin", "generic-arm"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    garbage=st.binary(max_size=60) | st.sampled_from([b"9" * 50, b"-1", b"1e9", b"\xff\0", b"0x5"])
)
def test_garbage_in_every_file_and_answer_never_raises(tmp_path_factory, name, garbage):
    fake = FakeBoard(tmp_path_factory.mktemp("garbage"), name)
    for path in fake.folder.rglob("*"):
        if path.is_file() and "bin" not in path.parts[-2]:
            path.write_bytes(garbage)
    record_of(telemetry.snapshot(fake.root))
    shutil.rmtree(fake.folder)


@pytest.mark.parametrize("name", ["rpi4-cool", "jetson-orin", "generic-arm"])
def test_words_in_every_file_give_none(board, name):
    fake = board(name)
    for path in fake.folder.rglob("*"):
        if path.is_file() and "bin" not in path.parts[-2]:
            path.write_text("out of order!\n")
    snapshot = telemetry.snapshot(fake.root)
    assert snapshot.pop("throttle") == snapshot.pop("throttle_seen") == []
    assert set(snapshot.values()) == {None}


def test_this_machine_is_read_from_its_own_root():
    record = record_of(telemetry.snapshot())
    assert record.load_1min is not None
    assert record.cpus_online == len(os.sched_getaffinity(0)) or record.cpus_online >= 1
    assert record.available_memory_bytes > 1 << 20


@pytest.mark.parametrize("module", MODULES)
def test_the_modules_on_the_board_are_python_3_8(module):
    ast.parse((AGENT / module).read_text(), feature_version=(3, 8))


def test_the_modules_run_under_another_package_name_without_edgeprune(tmp_path):
    package = tmp_path / "edgeprune_agent"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for module in MODULES:
        shutil.copy(AGENT / module, package / module)
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from edgeprune_agent import telemetry, tuning, validity
watch = validity.Watch("/", lambda: [], {}); watch.start(); print(len(watch.lap().telemetry))
assert not any(name.partition(".")[0] == "edgeprune" for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{len(Telemetry.model_fields)}\n"), done.stderr
