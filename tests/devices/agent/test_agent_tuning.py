"""A governor that is changed and put back, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakeboard import FakeBoard

from edgeprune.devices.agent import tuning, wire

NOBODY = 65534
POLICIES = "/sys/devices/system/cpu/cpufreq"


@pytest.fixture
def board(tmp_path) -> FakeBoard:
    return FakeBoard(tmp_path / "root", "generic-arm")


@pytest.fixture
def workdir(tmp_path) -> str:
    return str(tmp_path / "work")


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A folder of a user that file modes bind; root is not bound by any, so root steps down."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, -1)
        os.seteuid(NOBODY)
    yield folder
    if is_root:
        os.seteuid(0)
    shutil.rmtree(folder)


def governors(board: FakeBoard) -> list[str]:
    paths = sorted(board.path(POLICIES).glob("policy*/scaling_governor"))
    return [path.read_text().strip() for path in paths]


def journal_of(workdir: str) -> Path:
    return Path(workdir) / "tuning.json"


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def lock(board: FakeBoard, policy: int) -> Path:
    path = board.path(f"{POLICIES}/policy{policy}/scaling_governor")
    path.chmod(0o444)
    return path


def fake_sudo(folder: Path, monkeypatch, script: str) -> Path:
    """A sudo that notes its arguments, one a line, and does as the script says."""
    sudo = folder / "bin" / "sudo"
    sudo.parent.mkdir()
    seen = folder / "sudo-arguments"
    sudo.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> '{seen}'\n{script}\n")
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sudo.parent}:{os.environ['PATH']}")
    return seen


def test_apply_changes_every_policy_and_restore_puts_all_back(board, workdir):
    board.policy(4, "scaling_governor", "ondemand")
    given = tuning.apply(board.root, workdir, "performance")
    before = {"policy0": "schedutil", "policy4": "ondemand"}
    assert given == {"governor": "performance", "before": before}
    assert governors(board) == ["performance", "performance"]
    assert json.loads(journal_of(workdir).read_text())["before"] == before
    assert journal_of(workdir).stat().st_mode & 0o777 == 0o600
    done = tuning.restore(board.root, workdir)
    assert done == ["policy0 back to schedutil", "policy4 back to ondemand"]
    assert governors(board) == ["schedutil", "ondemand"]
    assert names_in(workdir) == []


def test_restore_with_nothing_to_do_does_nothing(board, workdir):
    assert tuning.restore(board.root, workdir) == []
    tuning.apply(board.root, workdir, "performance")
    tuning.restore(board.root, workdir)
    assert tuning.restore(board.root, workdir) == []


def test_a_second_apply_does_not_forget_the_first_values(board, workdir):
    tuning.apply(board.root, workdir, "performance")
    tuning.apply(board.root, workdir, "performance")
    tuning.apply(board.root, workdir, "powersave")
    assert governors(board) == ["powersave", "powersave"]
    tuning.restore(board.root, workdir)
    assert governors(board) == ["schedutil", "schedutil"]


def test_a_governor_that_is_set_already_leaves_no_journal(board, workdir):
    given = tuning.apply(board.root, workdir, "schedutil")
    assert given["before"] == {"policy0": "schedutil", "policy4": "schedutil"}
    assert not journal_of(workdir).exists()


def test_the_journal_is_on_disk_before_the_first_change(board, workdir, monkeypatch):
    synced = []
    real_fsync = os.fsync

    def fsync(file: int) -> None:
        synced.append((governors(board), str(Path(f"/proc/self/fd/{file}").readlink())))
        real_fsync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    tuning.apply(board.root, workdir, "performance")
    assert [kept for kept, _ in synced] == [["schedutil", "schedutil"]] * 2
    assert synced[0][1].startswith(f"{journal_of(workdir)}.")
    assert synced[1][1] == workdir


def test_a_change_that_a_power_cut_left_half_done_is_put_back(board, workdir):
    tuning.apply(board.root, workdir, "performance")
    board.policy(4, "scaling_governor", "schedutil")  # as if the cut came before the second write
    assert tuning.restore(board.root, workdir) == ["policy0 back to schedutil"]
    assert governors(board) == ["schedutil", "schedutil"]


def test_a_governor_that_somebody_else_set_since_stays(board, workdir):
    tuning.apply(board.root, workdir, "performance")
    board.policy(0, "scaling_governor", "powersave")
    assert tuning.restore(board.root, workdir) == [
        "policy0 stays at powersave, which somebody else set",
        "policy4 back to schedutil",
    ]
    assert governors(board) == ["powersave", "schedutil"]


def test_a_policy_that_went_with_its_cores_is_told(board, workdir):
    tuning.apply(board.root, workdir, "performance")
    board.remove(f"{POLICIES}/policy4")
    done = tuning.restore(board.root, workdir)
    assert done == ["policy0 back to schedutil", "policy4 is gone; it had schedutil"]


@pytest.mark.parametrize(
    ("governor", "message"),
    [
        ("turbo", "policy0 does not offer the governor turbo, only: conservative ondemand"),
        ("a; reboot", "a governor is named by letters and _"),
    ],
)
def test_a_governor_that_the_board_lacks_is_refused_before_any_change(
    board, workdir, governor, message
):
    with pytest.raises(wire.Refused, match=message) as refusal:
        tuning.apply(board.root, workdir, governor)
    assert refusal.value.kind == "tuning"
    assert governors(board) == ["schedutil", "schedutil"]
    assert not journal_of(workdir).exists()


def test_a_board_without_policies_or_with_garbage_in_one_is_refused(tmp_path, board, workdir):
    with pytest.raises(wire.Refused, match="no cpufreq policy"):
        tuning.apply(str(tmp_path / "nothing"), workdir, "performance")
    board.policy(4, "scaling_governor", "\x1b[31m?")
    with pytest.raises(wire.Refused, match="cannot read the governor of policy4"):
        tuning.apply(board.root, workdir, "performance")
    assert governors(board)[0] == "schedutil"


def test_a_workdir_that_cannot_be_written_leaves_the_board_alone(board, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(wire.Refused, match="nothing was changed"):
        tuning.apply(board.root, str(tmp_path / "file" / "work"), "performance")
    assert governors(board) == ["schedutil", "schedutil"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 5000,
        b'{"governor": "performance"}',
        b'{"governor": "performance", "before": {"../../etc": "ondemand"}}',
        b'{"governor": "performance", "before": {"policy0": "on demand"}}',
        b'{"governor": 1, "before": {"policy0": "ondemand"}}',
    ],
)
def test_a_journal_that_we_did_not_write_is_set_aside_unused(board, workdir, content):
    Path(workdir).mkdir()
    journal_of(workdir).write_bytes(content)
    assert tuning.restore(board.root, workdir) == [
        "tuning.json cannot be read; it is kept as tuning.json.bad"
    ]
    assert governors(board) == ["schedutil", "schedutil"]
    assert names_in(workdir) == ["tuning.json.bad"]
    assert tuning.restore(board.root, workdir) == []


def test_a_journal_that_is_a_link_is_not_followed(board, workdir, tmp_path):
    planted = tmp_path / "planted.json"
    planted.write_text('{"governor": "schedutil", "before": {"policy0": "powersave"}}')
    Path(workdir).mkdir()
    journal_of(workdir).symlink_to(planted)
    with pytest.raises(wire.Refused, match="cannot read"):
        tuning.restore(board.root, workdir)
    assert governors(board) == ["schedutil", "schedutil"]


def test_a_file_that_may_not_be_written_is_written_by_exactly_the_allowed_command(
    plain_user, monkeypatch
):
    board = FakeBoard(plain_user / "root", "generic-arm")
    path = lock(board, 4)
    write = 'chmod u+w "$3"; cat > "$3"; chmod u-w "$3"'
    seen = fake_sudo(plain_user, monkeypatch, write)
    workdir = str(plain_user / "work")
    tuning.apply(board.root, workdir, "performance")
    assert governors(board) == ["performance", "performance"]
    assert seen.read_text().splitlines() == ["-n", "/usr/bin/tee", str(path)]
    tuning.restore(board.root, workdir)
    assert governors(board) == ["schedutil", "schedutil"]
    assert seen.read_text().splitlines() == ["-n", "/usr/bin/tee", str(path)] * 2


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'sudo: a password is required' >&2; exit 1", "sudo: a password is required"),
        ("exit 1", "refused"),
        ("cat > /dev/null", "the kernel kept schedutil"),
    ],
)
def test_a_refused_change_is_undone_on_the_policies_that_took_it(
    plain_user, monkeypatch, script, message
):
    board = FakeBoard(plain_user / "root", "generic-arm")
    lock(board, 4)
    fake_sudo(plain_user, monkeypatch, script)
    workdir = str(plain_user / "work")
    with pytest.raises(wire.Refused, match=message) as refusal:
        tuning.apply(board.root, workdir, "performance")
    assert refusal.value.kind == "tuning"
    assert governors(board) == ["schedutil", "schedutil"]
    assert names_in(workdir) == []


def test_without_sudo_the_refusal_says_so(plain_user, monkeypatch):
    board = FakeBoard(plain_user / "root", "generic-arm")
    lock(board, 0)
    monkeypatch.setenv("PATH", str(plain_user))
    with pytest.raises(wire.Refused, match="no permission, and sudo: FileNotFoundError"):
        tuning.apply(board.root, str(plain_user / "work"), "performance")


def test_what_cannot_be_put_back_keeps_its_journal_for_the_next_try(plain_user, monkeypatch):
    board = FakeBoard(plain_user / "root", "generic-arm")
    workdir = str(plain_user / "work")
    tuning.apply(board.root, workdir, "performance")
    path = lock(board, 0)
    fake_sudo(plain_user, monkeypatch, "exit 1")
    with pytest.raises(wire.Refused, match=r"not put back: cannot set .*policy0"):
        tuning.restore(board.root, workdir)
    assert governors(board) == ["performance", "schedutil"]
    path.chmod(0o644)
    assert tuning.restore(board.root, workdir) == ["policy0 back to schedutil"]
    assert names_in(workdir) == []
