"""What can go wrong between a host and its boards, as one table: every fault has a test, or says why it has none here.

A row is added or completed by writing the name of a test function, as ``module::function`` without ``.py``; several may stand in one
row. A row that no test can cover yet starts with ``needs hardware:`` or ``another issue:``, and says why.
"""

from __future__ import annotations

import ast

import pytest
from repo import REPO

REASONS = ("needs hardware: ", "another issue: ")

# (number, fault, how it is produced here, required behaviour, tests or a reason)
ROWS: tuple[tuple[int, str, str, str, tuple[str, ...]], ...] = (
    (
        1,
        "power loss in a measurement",
        "agent killed, another boot id on return",
        "block void, connect again, repeat the candidate once",
        (
            "test_faults_session::test_a_measurement_that_a_power_cut_ended_is_made_again_once_and_noted",
            "test_sessions::test_a_restart_of_the_board_is_noticed",
        ),
    ),
    (
        2,
        "reset of the connection",
        "proxy sends RST",
        "lost link at once, a new connection works",
        (
            "test_faults_link::test_a_reset_during_a_command_is_a_lost_link_at_once",
            "test_faults_session::test_a_reset_within_a_measurement_costs_one_reconnect_and_no_byte_twice",
        ),
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
            "test_faults_session::test_a_black_hole_within_a_measurement_is_noticed_and_survived",
            "test_faults_session::test_behind_a_black_hole_the_board_is_free_for_others_when_the_lease_ends",
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
            "test_faults_session::test_a_flipped_bit_within_a_measurement_costs_a_reconnect_and_nothing_else",
        ),
    ),
    (
        6,
        "worker hangs",
        "worker stopped by a signal",
        "worker killed, candidate timed out, twice is infeasible",
        ("test_faults_session::test_a_model_that_hangs_is_ended_in_time_and_the_others_live_on",),
    ),
    (
        7,
        "agent or sshd hangs",
        "agent that sleeps; a far end that only acknowledges",
        "given up at the deadline",
        (
            "test_devices_board::test_an_agent_that_never_answers_is_given_up",
            "test_faults_link::test_a_far_end_that_hangs_meets_the_deadline",
            "test_faults_session::test_an_agent_that_hangs_is_replaced_by_one_of_the_same_session",
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
        (
            "test_faults_session::test_a_disk_that_fills_up_on_the_board_costs_no_result",
            "test_agent_journal::test_a_disk_that_takes_nothing_costs_only_the_journal",
            "test_bundle_write::test_a_failed_write_leaves_the_old_bundle_and_no_litter",
        ),
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
        ("test_provision::test_a_board_that_nothing_runs_on_is_refused_before_anything_is_sent",),
    ),
    (
        12,
        "illegal instruction at an import",
        "emulated older CPU",
        "next pinned version",
        (
            "test_provision::test_a_version_that_dies_at_import_gives_way_to_the_next_and_is_remembered",
            "test_board_setup::test_a_runtime_that_dies_of_an_illegal_instruction_gives_way_to_the_next",
        ),
    ),
    (
        13,
        "out of memory",
        "limited worker",
        "candidate infeasible, agent lives on",
        (
            "test_faults_session::test_a_model_that_gets_no_memory_costs_neither_the_agent_nor_the_others",
            "test_sessions::test_a_model_that_kills_its_process_costs_neither_the_agent_nor_the_others",
        ),
    ),
    (
        14,
        "thermal throttling",
        "stub of the firmware tool",
        "block void, cool down, at most 3 repeats",
        (
            "test_agent_validity::test_throttling_voids_until_it_ends",
            "test_agent_validity::test_throttling_that_began_and_ended_between_two_looks_voids_once",
            "test_agent_telemetry::test_each_bit_of_get_throttled_has_its_name_now_and_since",
        ),
    ),
    (
        15,
        "under-voltage",
        "stub of the firmware tool",
        "warning, unreliable",
        (
            "test_agent_validity::test_under_voltage_voids_whoever_tells_it",
            "test_agent_telemetry::test_the_alarm_of_the_kernel_is_under_voltage_even_without_vcgencmd",
        ),
    ),
    (
        16,
        "governor or power mode changed meanwhile",
        "made-up /sys",
        "void since the last good reference",
        (
            "test_agent_validity::test_a_changed_governor_voids_all_that_follows",
            "test_agent_validity::test_a_changed_power_mode_voids",
        ),
    ),
    (
        17,
        "other load on the board",
        "a busy process on the same core",
        "wait, then void",
        (
            "test_agent_validity::test_a_real_busy_process_is_foreign_to_who_does_not_own_it",
            "test_agent_validity::test_the_gate_waits_until_the_other_load_is_gone",
        ),
    ),
    (
        18,
        "clock of host or board jumps",
        "made-up clock",
        "times stand, jump is flagged",
        ("test_agent_validity::test_a_jump_of_the_wall_clock_is_noted_and_voids_nothing",),
    ),
    (
        19,
        "board without a clock of its own",
        "made-up clock",
        "flagged, nothing depends on it",
        ("test_agent_validity::test_a_board_in_1970_is_noted_and_voids_nothing",),
    ),
    (
        20,
        "host sleeps",
        "host stopped by a signal",
        "connect again",
        ("test_faults_session::test_a_host_that_slept_lost_the_board_and_goes_on_when_it_wakes",),
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
        (
            "another issue: only XNNPACK can be chosen so far, and it is compiled into the runtimes; there is nothing to fall back from",
        ),
    ),
    (
        24,
        "wrong numbers on the board",
        "damaged weight",
        "fails, never ships",
        (
            "test_bundle_verify::test_wrong_golden_outputs_fail_on_the_host_with_the_figures",
            "test_bundle_verify::test_golden_samples_run_on_every_device_that_is_named",
        ),
    ),
    (
        25,
        "outputs differ from call to call",
        "stub worker",
        "fails, or is reported with a tolerance",
        (
            "test_faults_session::test_a_model_whose_outputs_differ_from_call_to_call_is_refused_as_such",
        ),
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
        "waits, with the owner's name; exit 75 when that takes longer than `--wait`",
        (
            "test_waiting::test_a_busy_board_is_exit_code_75_after_the_wait_and_at_once_without",
            "test_agent_lease::test_two_clients_of_one_board_take_turns",
            "test_agent_lease::test_a_second_client_is_told_who_holds_the_board",
        ),
    ),
    (
        31,
        "owner of a board crashed",
        "agent killed",
        "the next client goes on",
        (
            "test_agent_lease::test_a_client_that_is_killed_frees_the_board_at_once",
            "test_sessions::test_models_are_back_under_their_keys_after_the_agent_was_killed",
        ),
    ),
    (
        32,
        "host killed in a search",
        "killed at random moments",
        "resumed with the same result",
        (
            "test_resume::test_a_kill_during_the_training_changes_nothing_in_the_result",
            "test_resume::test_a_kill_in_any_stage_is_made_good_by_the_same_command",
        ),
    ),
    (
        33,
        "damaged checkpoint",
        "cut and changed files",
        "the stage is made again, with a note",
        (
            "test_runfolder::test_a_damaged_result_is_made_again_and_noted",
            "test_resume::test_a_damaged_stage_is_made_again_with_a_note",
        ),
    ),
    (
        34,
        "damaged journal",
        "cut and changed lines",
        "what is damaged was not measured; every other result stands",
        (
            "test_agent_journal::test_a_torn_last_line_is_not_there_and_the_lines_before_are",
            "test_agent_journal::test_a_damaged_line_costs_no_other_result",
            "test_measurement_store::test_a_damaged_file_is_set_aside_with_a_note_and_made_anew",
        ),
    ),
    (
        35,
        "bundle cut or changed",
        "cut, added and swapped files",
        "exit 7 with names",
        (
            "test_bundle_verify::test_a_cut_or_flipped_byte_fails_the_hashes_and_names_the_file",
            "test_bundle_verify::test_an_extra_a_missing_and_a_swapped_file_are_named",
        ),
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
        ("test_agent_telemetry::test_nvpmodel_never_gets_an_answer_to_its_question",),
    ),
    (
        41,
        "Ctrl-C twice, or SIGTERM",
        "signals",
        "exit 130 or 143; lease free, tuning restored",
        (
            "test_faults_session::test_a_command_that_is_interrupted_frees_the_board",
            "test_agent_tuning::test_apply_changes_every_policy_and_restore_puts_all_back",
        ),
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
        (
            "test_sentinel::test_a_drift_counts_in_both_directions",
            "test_report_tier::test_a_session_in_which_the_sentinel_moved_is_measured_again",
            "test_report_tier::test_a_sentinel_that_moves_far_twice_makes_it_unreliable",
        ),
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
        for path in (REPO / "tests").rglob("test_*.py")
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
