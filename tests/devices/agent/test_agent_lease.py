"""The lock that keeps two clients of a board apart, and what its file may claim."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sshd import wait_until_gone

from edgeprune.devices.agent.lease import Lease
from edgeprune.devices.agent.wire import Refused
from edgeprune.devices.board import open_board
from edgeprune.errors import Busy
from edgeprune.records.device import Device

OWNER = {"user": "ann", "host": "laptop", "job": "deploy"}
ONE, OTHER = "1" * 32, "2" * 32


def test_a_second_client_is_told_who_holds_the_board(tmp_path):
    path = str(tmp_path / "lock")
    first, second = Lease([path]), Lease([path])
    first.acquire(OWNER, ONE)
    with pytest.raises(Refused) as caught:
        second.acquire(dict(OWNER, user="bob"), OTHER)
    assert caught.value.kind == "busy"
    holder = json.loads(str(caught.value))
    assert (holder["user"], holder["host"], holder["pid"]) == ("ann", "laptop", os.getpid())
    first.release()
    second.acquire(OWNER, OTHER)
    assert second.held


def test_nobody_owns_a_free_board_whatever_its_file_says(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps(dict(OWNER, pid=1, session=ONE)))
    lease = Lease([str(path)])
    assert lease.owner() is None
    assert not lease.is_taken()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[1]",
        '{"pid": "x", "user": 5, "since_boot_s": "soon"}',
        '{"pid": -1}',
        "\0" * 9,
    ],
)
def test_nonsense_in_the_file_costs_only_the_name_of_the_holder(tmp_path, text):
    path = tmp_path / "lock"
    holder, other = Lease([str(path)]), Lease([str(path)])
    holder.acquire(OWNER, ONE)
    path.write_text(text)
    found = other.owner()
    assert found is not None
    assert isinstance(found["pid"], int)
    assert found["since_s"] == 0.0
    with pytest.raises(Refused, match="pid"):
        other.acquire(OWNER, OTHER)


def test_a_process_that_is_no_agent_is_never_ended(tmp_path):
    path = tmp_path / "lock"
    holder, other = Lease([str(path)]), Lease([str(path)])
    holder.acquire(OWNER, ONE)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        path.write_text(json.dumps(dict(OWNER, pid=bystander.pid, session=OTHER)))
        assert other.end_holder() is False
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait(10)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "lock").symlink_to(victim)
    lease = Lease([str(tmp_path / "lock"), str(tmp_path / "own" / "lock")])
    lease.acquire(OWNER, ONE)
    assert lease.path == str(tmp_path / "own" / "lock")
    assert victim.read_text() == "precious"


def test_a_board_without_a_place_for_a_lock_says_so():
    with pytest.raises(Refused) as caught:
        Lease(["/proc/no/lock"]).acquire(OWNER, ONE)
    assert caught.value.kind == "lease"


def device(tmp_path: Path) -> Device:
    lease = str(tmp_path / "lease")
    return Device(transport="local", targets=(), stand_in=True, lease_file=lease)


def test_two_clients_of_one_board_take_turns(tmp_path):
    first = open_board("here", device(tmp_path), job="deploy for rpi4")
    with pytest.raises(Busy, match="deploy for rpi4") as caught:
        open_board("here", device(tmp_path))
    assert caught.value.exit_code == 75
    assert "devices wait here" in str(caught.value)
    with open_board("here", device(tmp_path), exclusive=False) as looking:
        owner = looking.request("who", {})[0]["owner"]
        assert owner["job"] == "deploy for rpi4"
        first.close()
        assert looking.request("who", {})[0]["owner"] is None
    open_board("here", device(tmp_path)).close()


def test_waiting_ends_when_the_board_is_free(tmp_path):
    hold = (
        "import sys, time; from edgeprune.devices.board import open_board;"
        " from edgeprune.records.device import Device;"
        f" b = open_board('here', Device.model_validate_json({device(tmp_path).model_dump_json()!r}));"
        " print('held', flush=True); time.sleep(1.5); b.close()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    start = time.monotonic()
    open_board("here", device(tmp_path), wait_s=30).close()
    assert 0.2 < time.monotonic() - start < 30
    assert holder.wait(20) == 0


def test_breaking_the_lease_ends_the_client_that_holds_it(tmp_path):
    first = open_board("here", device(tmp_path), backoff_s=())
    with open_board("here", device(tmp_path), exclusive=False) as other:
        reply, _ = other.request("break", {})
        assert reply["ended"] is True
        assert reply["owner"]["pid"] > 0
        wait_until_gone(reply["owner"]["pid"])
        assert other.request("who", {})[0]["owner"] is None
    first.close()


def test_a_client_that_is_killed_frees_the_board_at_once(tmp_path):
    hold = (
        "import sys, time; from edgeprune.devices.board import open_board;"
        " from edgeprune.records.device import Device;"
        f" b = open_board('here', Device.model_validate_json({device(tmp_path).model_dump_json()!r}));"
        " print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    open_board("here", device(tmp_path), wait_s=5).close()


def test_a_silent_client_loses_the_board_when_its_time_is_up(tmp_path):
    quick = device(tmp_path).model_copy(update={"lease_ttl_s": 2.0})
    first = open_board("here", quick, backoff_s=())
    first.session._closed.set()  # its heart stops; the connection stays
    start = time.monotonic()
    open_board("here", device(tmp_path), wait_s=20).close()
    assert time.monotonic() - start < 15
    first.close()
