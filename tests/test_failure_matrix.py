"""What can go wrong between a host and its boards, as one table: every fault has a test, or says why it has none here.

A row is added or completed by writing the name of a test function, as ``module::function`` without ``.py``; several may stand in one
row. A row that no test can cover here starts with ``needs hardware:`` or ``other part:``, and says why or which.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REASONS = ("needs hardware: ", "other part: ")

# (number, fault, how it is produced here, required behaviour, tests or a reason)
ROWS: tuple[tuple[int, str, str, str, tuple[str, ...]], ...] = (
    (
        1,
        "power loss in a measurement",
        "agent killed, another boot id on return",
        "block void, connect again, repeat the candidate once",
        ("other part: needs the session that connects again, and its journal",),
    ),
    (
        2,
        "reset of the connection",
        "proxy sends RST",
        "lost link at once, a new connection works",
        ("test_faults_link::test_a_reset_during_a_command_is_a_lost_link_at_once",),
    ),
    (
        3,
        "black hole",
        "packets dropped by a socket filter; a far end that only acknowledges",
        "noticed in 12 s by TCP, or by the deadline; never an end of output",
        (
            "test_faults_link::test_a_hole_under_a_silent_command_is_noticed_by_tcp",
            "test_faults_link::test_a_far_end_that_hangs_meets_the_deadline",
            "test_faults_link::test_a_transfer_that_stands_still_is_given_up",
        ),
    ),
    (
        4,
        "slow link",
        "proxy at 40 kB/s",
        "a transfer ends well however long it takes, as long as it moves",
        (
            "test_faults_link::test_a_slow_link_moves_a_file_for_longer_than_it_may_stall",
            "test_faults_link::test_a_slow_link_brings_a_file_for_longer_than_it_may_stall",
        ),
    ),
    (
        5,
        "flipped bits on the wire",
        "proxy flips one bit",
        "lost link or deadline, nothing accepted",
        (
            "test_faults_link::test_a_flipped_bit_is_never_a_success",
            "test_faults_link::test_a_flipped_bit_in_a_file_never_arrives",
        ),
    ),
    (
        6,
        "worker hangs",
        "worker stopped by a signal",
        "worker killed, candidate timed out, twice is infeasible",
        ("other part: needs the agent's worker processes",),
    ),
    (
        7,
        "agent or sshd hangs",
        "agent that sleeps; a far end that only acknowledges",
        "given up at the deadline",
        (
            "test_devices_board::test_an_agent_that_never_answers_is_given_up",
            "test_faults_link::test_a_far_end_that_hangs_meets_the_deadline",
        ),
    ),
    (
        8,
        "disk full at a transfer",
        "tmpfs of 2 MB",
        "error with needed and available bytes, nothing under the final name",
        (
            "test_faults_disk::test_a_full_disk_is_named_with_its_room_and_nothing_is_left",
            "test_faults_disk::test_a_full_disk_keeps_the_older_file",
        ),
    ),
    (
        9,
        "disk full at a result",
        "tmpfs on either side",
        "result comes in its frame; the host stops cleanly",
        ("other part: needs the journal on the board",),
    ),
    (
        10,
        "workdir cannot be written",
        "read-only tmpfs",
        "error says so and suggests another workdir",
        ("test_faults_disk::test_a_read_only_disk_is_named_and_another_workdir_suggested",),
    ),
    (
        11,
        "wrong architecture, libc or word size",
        "made-up facts of a board",
        "refused with the list of what works",
        ("other part: needs the setup of runtimes",),
    ),
    (
        12,
        "illegal instruction at an import",
        "emulated older CPU",
        "next pinned version",
        ("other part: needs the setup of runtimes",),
    ),
    (
        13,
        "out of memory",
        "limited worker",
        "candidate infeasible, agent lives on",
        ("other part: needs the agent's worker processes",),
    ),
    (
        14,
        "thermal throttling",
        "stub of the firmware tool",
        "block void, cool down, at most 3 repeats",
        ("other part: needs the state of the board around each block",),
    ),
    (
        15,
        "under-voltage",
        "stub of the firmware tool",
        "warning, unreliable",
        ("other part: needs the state of the board around each block",),
    ),
    (
        16,
        "governor or power mode changed meanwhile",
        "made-up /sys",
        "void since the last good reference",
        ("other part: needs the state of the board around each block",),
    ),
    (
        17,
        "other load on the board",
        "a busy process on the same core",
        "wait, then void",
        ("other part: needs the state of the board around each block",),
    ),
    (
        18,
        "clock of host or board jumps",
        "made-up clock",
        "times stand, jump is flagged",
        ("other part: needs the state of the board around each block",),
    ),
    (
        19,
        "board without a clock of its own",
        "made-up clock",
        "flagged, nothing depends on it",
        ("other part: needs the state of the board around each block",),
    ),
    (
        20,
        "host sleeps",
        "host stopped by a signal",
        "connect again",
        ("other part: needs the session that connects again",),
    ),
    (
        21,
        "runtime missing or too old",
        "a Python without it",
        "says how to install it, never installs by itself",
        (
            "test_devices_board::test_a_runtime_that_is_not_installed_says_how_to_get_it",
            "test_devices_board::test_the_agent_runs_where_nothing_but_python_is_installed",
        ),
    ),
    (
        22,
        "operator that the runtime does not have",
        "a file that does not load",
        "reported for this file, the others go on",
        (
            "test_devices_board::test_one_file_among_many_that_does_not_load_is_reported_by_its_key",
            "test_devices_board::test_a_file_that_is_no_model_is_refused_as_such",
        ),
    ),
    (
        23,
        "delegate falls back",
        "provider that is not there",
        "marked, not ranked with the others",
        ("other part: needs the delegates of the runtimes",),
    ),
    (
        24,
        "wrong numbers on the board",
        "damaged weight",
        "fails, never ships",
        ("other part: golden outputs belong to the bundle",),
    ),
    (
        25,
        "outputs differ from call to call",
        "stub worker",
        "fails, or is reported with a tolerance",
        ("other part: golden outputs belong to the bundle",),
    ),
    (
        26,
        "host key changed",
        "second sshd with another key",
        "exit 4 before any login, both keys shown",
        (
            "test_faults_login::test_a_changed_host_key_ends_before_any_login_and_shows_both_keys",
            "test_devices_ssh::test_another_host_key_is_refused_before_any_login",
        ),
    ),
    (
        27,
        "unknown host",
        "device without a pin",
        "refused; the key can be read without a login",
        (
            "test_faults_login::test_a_device_without_a_pin_is_refused_and_its_key_can_be_read_without_a_login",
        ),
    ),
    (
        28,
        "wrong password or key",
        "real sshd, counted in its log",
        "one attempt, login refused",
        (
            "test_faults_login::test_a_refused_key_is_one_attempt_and_the_next_login_still_works",
            "test_faults_login::test_a_refused_password_is_one_attempt",
        ),
    ),
    (
        29,
        "sshd has no room",
        "MaxStartups 1 and a client that waits",
        "unreachable, so that it can be tried again",
        (
            "test_faults_login::test_a_server_with_no_room_is_unreachable_until_there_is_room",
            "test_faults_login::test_a_connection_that_breaks_in_the_login_is_no_refused_login",
        ),
    ),
    (
        30,
        "two users, one board",
        "two clients",
        "exit 75 with the owner's name",
        ("other part: needs the lock on the board",),
    ),
    (
        31,
        "owner of a board crashed",
        "agent killed",
        "the next client goes on",
        ("other part: needs the lock on the board",),
    ),
    (
        32,
        "host killed in a search",
        "killed at random moments",
        "resumed with the same result",
        ("other part: test_resume belongs to the pipeline",),
    ),
    (
        33,
        "damaged checkpoint",
        "cut and changed files",
        "earlier generation",
        ("other part: test_runfolder belongs to the pipeline",),
    ),
    (
        34,
        "damaged journal",
        "changed bytes",
        "rebuilt, or stops",
        ("other part: needs the journal of the host",),
    ),
    (
        35,
        "bundle cut or changed",
        "cut, added and swapped files",
        "exit 7 with names",
        ("other part: test_bundle_verify belongs to the bundle",),
    ),
    (
        36,
        "part of a file on the board",
        "cut and reset in a transfer",
        "never under its final name, removed",
        (
            "test_faults_link::test_half_a_file_has_never_its_final_name",
            "test_faults_link::test_an_older_file_survives_a_transfer_that_breaks",
        ),
    ),
    (
        37,
        "flood or noise of the login shell",
        "ForceCommand that prints 5 MB, or without end",
        "error, not a hang",
        (
            "test_faults_login::test_a_shell_that_floods_is_an_error_and_not_a_hang",
            "test_faults_login::test_an_agent_that_starts_in_a_flood_is_refused",
            "test_devices_ssh::test_noise_of_the_login_shell_is_skipped",
        ),
    ),
    (
        38,
        "engine of another version or GPU",
        "changed fingerprint",
        "built again, or refused",
        ("needs hardware: engines are built by TensorRT on a Jetson",),
    ),
    (
        39,
        "engine builds differ",
        "stub builder",
        "spread of three builds reported",
        ("needs hardware: engines are built by TensorRT on a Jetson",),
    ),
    (
        40,
        "power mode wants a reboot",
        "stub tool",
        "never answered with yes",
        ("other part: needs the tuning of a board",),
    ),
    (
        41,
        "Ctrl-C twice, or SIGTERM",
        "signals",
        "exit 130, lease free, tuning restored",
        ("other part: needs the lock on the board and its tuning",),
    ),
    (
        42,
        "adb: unauthorized, offline, two phones",
        "stub adb",
        "errors that tell them apart",
        ("needs hardware: there is no transport for phones yet",),
    ),
    (
        43,
        "phone on low battery",
        "stub adb",
        "not measured",
        ("needs hardware: there is no transport for phones yet",),
    ),
    (
        44,
        "reference model drifts",
        "made-up ramp of latencies",
        "blocks quarantined",
        ("other part: belongs to the measurement",),
    ),
)


def functions_by_module() -> dict[str, set[str]]:
    """Names of the test functions by module."""
    return {
        path.stem: {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for path in HERE.glob("test_*.py")
    }


TESTS = functions_by_module()


def test_the_table_is_complete_and_in_order():
    assert [row[0] for row in ROWS] == list(range(1, 45))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_every_fault_has_a_test_that_exists_or_a_reason(row):
    _, fault, produced, required, cover = row
    assert all((fault, produced, required, cover))
    for entry in cover:
        if entry.startswith(REASONS):
            assert len(cover) == 1
            continue
        module, _, name = entry.partition("::")
        assert name in TESTS.get(module, ()), f"there is no {entry}"
