"""What voids a block and what keeps a measurement from starting: fake boards, injected clocks, and one real busy process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from fakeboard import FakeBoard

from edgeprune.devices.agent import validity
from edgeprune.records.measurement import Telemetry

OURS = 4242
HZ = validity.TICKS_PER_S
BUSY_FOR_A_SHORT_WHILE = """
import time
end = time.monotonic() + 20
while time.monotonic() < end:
    sum(range(10_000))
"""


class Scene:
    """A fake board whose time and counters a test moves by hand."""

    def __init__(self, folder, name: str = "rpi4-cool") -> None:
        self.board = FakeBoard(folder, name)
        self.now_s, self.wall_s = 1000.0, 1_790_000_000.0
        self.busy = self.ours = self.faults = 0
        self.pids = [OURS]
        self.settle()

    def settle(self) -> None:
        self.board.busy_ticks(self.busy)
        self.board.own(OURS, ticks=self.ours, faults=self.faults)

    def watch(self, **limits: float) -> validity.Watch:
        watch = validity.Watch(
            self.board.root, lambda: self.pids, limits, lambda: self.now_s, lambda: self.wall_s
        )
        watch.start()
        return watch

    def pass_time(self, seconds: float, *, ours: float = 1.0, foreign: float = 0.0) -> None:
        """Let time pass in which we and others use so many cores."""
        self.now_s += seconds
        self.wall_s += seconds
        self.ours += round(ours * seconds * HZ)
        self.busy += round((ours + foreign) * seconds * HZ)
        self.settle()


@pytest.fixture
def scene(tmp_path) -> Scene:
    return Scene(tmp_path)


def test_a_quiet_lap_is_valid_and_its_telemetry_fits_the_record(scene):
    watch = scene.watch()
    scene.pass_time(0.5)
    lap = watch.lap()
    assert (lap.reasons, lap.notes, lap.foreign_cpu_ratio) == ([], [], 0.0)
    assert set(lap.telemetry) == set(Telemetry.model_fields)


# Row 14 of the failure matrix.
def test_throttling_voids_until_it_ends(scene):
    watch = scene.watch()
    scene.board.throttled(0x6)
    assert watch.lap().reasons == ["frequency-capped, throttled now; limit: none"]
    assert watch.lap().reasons == ["frequency-capped, throttled now; limit: none"]
    scene.board.throttled(0x0)
    assert watch.lap().reasons == []


def test_throttling_that_began_and_ended_between_two_looks_voids_once(scene):
    watch = scene.watch()
    scene.board.throttled(0x4_0000)
    assert watch.lap().reasons == ["throttled since the last look; limit: none"]
    assert watch.lap().reasons == []


# Row 15.
def test_under_voltage_voids_whoever_tells_it(scene):
    watch = scene.watch()
    scene.board.throttled(0x1_0001)
    assert watch.lap().reasons == ["under-voltage now; limit: none"]
    scene.board.throttled(0x1_0000)
    assert watch.lap().reasons == []
    scene.board.write("/sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    assert watch.lap().reasons == ["under-voltage now; limit: none"]


def test_over_current_events_void_the_lap_they_happened_in(tmp_path):
    scene = Scene(tmp_path, "jetson-orin")
    watch = scene.watch()
    assert watch.lap().reasons == []
    scene.board.write("/sys/class/hwmon/hwmon3/oc3_event_cnt", "9\n")
    assert watch.lap().reasons == ["over-current events 4 > 0"]
    assert watch.lap().reasons == []


# Row 16.
def test_a_changed_governor_voids_all_that_follows(scene):
    watch = scene.watch()
    scene.board.policy(0, "scaling_governor", "powersave")
    for _ in range(2):
        assert watch.lap().reasons == ["governor powersave != ondemand at the start"]
    scene.board.policy(0, "scaling_governor", "ondemand")
    assert watch.lap().reasons == []


def test_a_changed_power_mode_voids(tmp_path):
    scene = Scene(tmp_path, "jetson-orin")
    watch = scene.watch()
    scene.board.answer("/usr/sbin/nvpmodel", "-q", "NV Power Mode: 7W\n1\n")
    assert watch.lap().reasons == ["power mode 7W != 15W at the start"]


def test_a_processor_that_goes_offline_voids(scene):
    watch = scene.watch()
    scene.board.write("/sys/devices/system/cpu/online", "0-1,3\n")
    assert watch.lap().reasons == ["cpus online 3 < 4 at the start"]


def test_a_real_clock_below_the_asked_one_voids(scene):
    scene.board.policy(0, "scaling_cur_freq", 1_500_000)
    scene.board.real_clock(1_500_345_728)
    watch = scene.watch()
    assert watch.lap().reasons == []
    scene.board.real_clock(1_000_265_600)
    assert watch.lap().reasons == ["clock 1000 MHz < 97 % of 1500 MHz asked for"]


def test_a_governor_that_lowers_the_clock_of_an_idle_board_voids_nothing(scene):
    scene.board.policy(0, "scaling_cur_freq", 1_500_000)
    scene.board.real_clock(1_500_345_728)
    watch = scene.watch()
    scene.board.policy(0, "scaling_cur_freq", 600_000)
    scene.board.real_clock(600_117_184)
    assert watch.lap().reasons == []


def test_a_lower_asked_clock_voids_only_under_the_governor_performance(tmp_path):
    scene = Scene(tmp_path, "generic-arm")
    watch = scene.watch()
    scene.board.policy(4, "scaling_cur_freq", 408_000)
    scene.board.policy(0, "scaling_cur_freq", 408_000)
    assert watch.lap().reasons == []
    for policy in (0, 4):
        scene.board.policy(policy, "scaling_governor", "performance")
        scene.board.policy(policy, "scaling_cur_freq", 1_800_000)
    watch = scene.watch()
    for policy in (0, 4):
        scene.board.policy(policy, "scaling_cur_freq", 1_750_000)
    assert watch.lap().reasons == []
    for policy in (0, 4):
        scene.board.policy(policy, "scaling_cur_freq", 1_740_000)
    assert watch.lap().reasons == ["clock 1740 MHz < 97 % of 1800 MHz at the start"]


@pytest.mark.parametrize(("soft_c", "hot_c"), [(80.0, 75.0), (60.0, 55.0), (110.0, 75.0)])
def test_five_degrees_below_the_lower_limit_a_block_is_void(scene, soft_c, hot_c):
    watch = scene.watch(soft_limit_c=soft_c)
    zone = "/sys/class/thermal/thermal_zone0/temp"
    scene.board.write(zone, f"{hot_c * 1000 - 1:.0f}\n")
    assert watch.lap().reasons == []
    scene.board.write(zone, f"{hot_c * 1000:.0f}\n")
    assert watch.lap().reasons == [f"temperature {hot_c:.1f} C >= {hot_c:.1f} C"]


def test_foreign_load_is_what_is_left_of_all_cores_without_ours(scene):
    watch = scene.watch()
    scene.pass_time(1.0, ours=3.0, foreign=0.16)
    lap = watch.lap()
    assert (lap.reasons, lap.foreign_cpu_ratio) == ([], 0.04)
    scene.pass_time(1.0, ours=1.0, foreign=0.5)
    lap = watch.lap()
    assert (lap.reasons, lap.foreign_cpu_ratio) == (
        ["other programs used 12.5 % of the processors, over 5 %"],
        0.125,
    )
    assert lap.telemetry["foreign_cpu_ratio"] == 0.125
    scene.pass_time(1.0)
    assert watch.lap().reasons == []


def test_windows_too_short_for_ticks_are_judged_together(scene):
    watch = scene.watch()
    for _ in range(2):
        scene.pass_time(0.08, foreign=2.0)
        assert watch.lap()[:2] == ([], None)
    scene.pass_time(0.08, foreign=2.0)
    assert watch.lap().reasons == ["other programs used 50.0 % of the processors, over 5 %"]


def test_two_ticks_on_one_core_are_chance(scene):
    scene.board.write("/sys/devices/system/cpu/online", "0\n")
    watch = scene.watch()
    scene.pass_time(0.2, foreign=0.1)
    lap = watch.lap()
    assert (lap.reasons, lap.foreign_cpu_ratio) == ([], pytest.approx(0.1))
    scene.pass_time(0.2, foreign=0.15)
    assert watch.lap().reasons == ["other programs used 15.0 % of the processors, over 5 %"]


def test_a_worker_that_ended_makes_the_load_unknown_not_foreign(scene):
    watch = scene.watch()
    scene.pass_time(1.0, ours=2.0)
    scene.board.remove(f"/proc/{OURS}/stat")
    lap = watch.lap()
    assert (lap.reasons, lap.foreign_cpu_ratio) == ([], None)
    assert lap.notes == ["a process of ours ended; what other programs used was not judged"]


def test_an_id_that_another_process_got_is_not_ours_of_before(scene):
    watch = scene.watch()
    scene.now_s += 1.0
    scene.wall_s += 1.0
    scene.board.own(OURS, ticks=10_000, faults=50, born=9999)
    lap = watch.lap()
    assert (lap.reasons, lap.foreign_cpu_ratio) == ([], None)


def test_a_worker_that_joins_is_ours_from_its_first_tick(scene):
    watch = scene.watch()
    scene.pids = [OURS, 77]
    scene.board.own(77, ticks=HZ, faults=30)
    scene.busy += HZ
    scene.pass_time(1.0)
    assert watch.lap()[:2] == ([], 0.0)


def test_major_faults_and_swapping_in_void_the_lap(scene):
    watch = scene.watch()
    scene.faults = 3
    scene.pass_time(0.5)
    scene.board.write("/proc/vmstat", "pswpin 19\npswpout 9\n")
    assert watch.lap().reasons == ["major page faults 3 > 0", "pages swapped in 12 > 0"]
    scene.pass_time(0.5)
    assert watch.lap().reasons == []


# Rows 18 and 19.
@pytest.mark.parametrize("jump_s", [3600.0, -1.5])
def test_a_jump_of_the_wall_clock_is_noted_and_voids_nothing(scene, jump_s):
    watch = scene.watch()
    scene.pass_time(0.5)
    scene.wall_s += jump_s
    lap = watch.lap()
    assert lap.reasons == []
    jumped = f"wall clock jumped by {jump_s:+.1f} s; times are of the monotonic clock"
    assert lap.notes == [jumped]
    scene.pass_time(0.5)
    assert watch.lap().notes == []


def test_a_small_step_of_the_wall_clock_is_not_worth_a_note(scene):
    watch = scene.watch()
    scene.pass_time(0.5)
    scene.wall_s += 0.9
    assert watch.lap().notes == []


def test_a_board_in_1970_is_noted_and_voids_nothing(scene):
    scene.wall_s = 40.0
    watch = scene.watch()
    scene.pass_time(0.5)
    lap = watch.lap()
    assert lap.reasons == []
    assert lap.notes == ["wall clock was never set; times are of the monotonic clock"]


def test_what_can_no_longer_be_read_is_noted(scene):
    watch = scene.watch()
    scene.board.remove("/usr/bin/vcgencmd")
    scene.board.remove("/sys/class/hwmon")
    scene.board.remove("/sys/class/thermal")
    lap = watch.lap()
    assert lap.reasons == []
    lost = "no longer readable: temperature_c, temperature_limit_c, throttled"
    assert lap.notes == [lost]


@pytest.mark.parametrize("content", [b"", b"\xff\0garbage (", b"cpu x y", b"1 (a) S"])
def test_garbage_in_every_counter_never_raises_and_voids_nothing(scene, content):
    watch = scene.watch()
    for path in ("/proc/stat", "/proc/vmstat", f"/proc/{OURS}/stat"):
        scene.board.write(path, content)
    for _ in range(2):
        scene.now_s += 1.0
        scene.wall_s += 1.0
        assert watch.lap()[:2] == ([], None)


def test_an_empty_board_voids_nothing(tmp_path):
    watch = validity.Watch(str(tmp_path), lambda: [1], {})
    watch.start()
    assert watch.lap()[:2] == ([], None)


# Row 17, on this machine: its own load is whatever it is, so one watch is told of the busy child and the other is not.
@pytest.fixture
def busy_child() -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", BUSY_FOR_A_SHORT_WHILE])
    yield child.pid
    child.kill()
    child.wait()


def test_a_real_busy_process_is_foreign_to_who_does_not_own_it(busy_child):
    time.sleep(0.1)
    knowing = validity.Watch("/", lambda: [os.getpid(), busy_child], {})
    unknowing = validity.Watch("/", lambda: [os.getpid()], {})
    knowing.start()
    unknowing.start()
    before = own_ticks(busy_child)
    time.sleep(1.0)
    used = own_ticks(busy_child) - before
    theirs, ours = unknowing.lap(), knowing.lap()
    cores = ours.telemetry["cpus_online"]
    assert used > 10, "the child had no processor to be busy on"
    assert any(reason.startswith("other programs used ") for reason in theirs.reasons)
    assert theirs.foreign_cpu_ratio is not None
    assert ours.foreign_cpu_ratio is not None
    parted = theirs.foreign_cpu_ratio - ours.foreign_cpu_ratio
    assert parted == pytest.approx(used / HZ / cores, abs=0.06)


def own_ticks(pid: int) -> int:
    (own,) = validity.counters("/", [pid], time.monotonic).own.values()
    return own.ticks


class Gate:
    """The gate on a scene; sleeping passes time and may change the board."""

    def __init__(self, scene: Scene, *, foreign: float = 0.0, then=lambda gate: None) -> None:
        self.scene, self.foreign, self.then = scene, foreign, then
        self.slept, self.alive = 0.0, 0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.scene.pass_time(seconds, ours=0.0, foreign=self.foreign)
        self.then(self)

    def beat(self) -> None:
        self.alive += 1

    def wait(self, expected_bytes: int = 0, **limits: float) -> list[str]:
        return validity.wait_until_ready(
            self.scene.board.root,
            limits,
            expected_bytes,
            lambda: self.scene.pids,
            clock=lambda: self.scene.now_s,
            sleep=self.sleep,
            alive=self.beat,
        )


def test_a_quiet_board_is_ready_after_one_look(scene):
    gate = Gate(scene)
    assert gate.wait(expected_bytes=1 << 30) == []
    assert (gate.slept, gate.alive) == (1.0, 1)


def test_the_gate_names_all_that_speaks_against_measuring(scene):
    scene.board.throttled(0x1)
    scene.board.write("/sys/class/thermal/thermal_zone0/temp", "61000\n")
    scene.board.write("/proc/loadavg", "2.00 1.00 1.00 1/180 2042\n")
    gate = Gate(scene, foreign=1.0)
    assert gate.wait(expected_bytes=2 << 30, wait_s=0) == [
        "under-voltage now; limit: none",
        "temperature 61.0 C > 60.0 C",
        "load of the last minute 0.50 per core >= 0.3",
        "other programs used 25.0 % of the processors, over 5 %",
        "memory available 3223 MiB < 4096 MiB",
    ]
    assert gate.alive == 1


def test_the_gate_waits_until_the_other_load_is_gone(scene):
    def calm_down(gate: Gate) -> None:
        if gate.slept > 20:
            gate.foreign = 0.0

    gate = Gate(scene, foreign=2.0, then=calm_down)
    assert gate.wait(wait_s=300) == []
    assert 20 < gate.slept < 30
    assert gate.alive >= 7


def test_the_gate_gives_up_when_its_time_is_over_and_says_why(scene):
    gate = Gate(scene, foreign=0.4)
    assert gate.wait(wait_s=30) == ["other programs used 10.0 % of the processors, over 5 %"]
    assert 30 <= gate.slept <= 32
    assert gate.alive >= 10


def test_a_warm_board_may_start_where_the_registry_says_so_but_never_where_blocks_are_void(scene):
    scene.board.write("/sys/class/thermal/thermal_zone0/temp", "70000\n")
    assert Gate(scene).wait(wait_s=0, start_below_c=72) == []
    assert Gate(scene).wait(wait_s=0, start_below_c=65) == ["temperature 70.0 C > 65.0 C"]
    scene.board.write("/sys/class/thermal/thermal_zone0/temp", "76000\n")
    assert Gate(scene).wait(wait_s=0, start_below_c=90) == ["temperature 76.0 C > 75.0 C"]


def test_swapping_in_keeps_the_gate_shut(scene):
    def swap(gate: Gate) -> None:
        scene.board.write("/proc/vmstat", "pswpin 8\n")

    assert Gate(scene, then=swap).wait(wait_s=0) == ["pages swapped in 1 > 0"]


def test_a_caller_can_leave_its_own_load_out_of_the_gate(scene):
    scene.board.write("/proc/loadavg", "4.00 1.00 1.00 1/180 2042\n")
    assert Gate(scene).wait(wait_s=0) == ["load of the last minute 1.00 per core >= 0.3"]
    assert Gate(scene).wait(wait_s=0, load_per_core=math.inf) == []


def test_a_board_that_shows_nothing_is_ready(tmp_path):
    assert (
        validity.wait_until_ready(
            str(tmp_path), {"wait_s": 0}, 1 << 40, lambda: [], sleep=lambda seconds: None
        )
        == []
    )
