"""Results on the board for a client that comes back."""

from __future__ import annotations

import json
import os

import pytest

from edgeprune.devices.agent.journal import KEPT, Journal

ONE, OTHER = "1" * 32, "2" * 32


def test_a_result_is_found_by_a_later_process_of_the_same_session(tmp_path):
    assert Journal(str(tmp_path), ONE).add("7", {"blocks": [1, 2]}) is True
    later = Journal(str(tmp_path), ONE)
    assert later.find("7") == {"blocks": [1, 2]}
    assert later.find("8") is None
    assert Journal(str(tmp_path), OTHER).find("7") is None


def test_a_torn_last_line_is_not_there_and_the_lines_before_are(tmp_path):
    journal = Journal(str(tmp_path), ONE)
    journal.add("1", {"x": 1})
    journal.add("2", {"x": 2})
    (path,) = (tmp_path / "journal").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    later = Journal(str(tmp_path), ONE)
    assert later.find("1") == {"x": 1}
    assert later.find("2") is None


@pytest.mark.parametrize("damage", [b"\xff\x00", b"[]", b"{}", b"7", b'{"op_id": []}'])
def test_a_damaged_line_costs_no_other_result(tmp_path, damage):
    journal = Journal(str(tmp_path), ONE)
    journal.add("1", {"x": 1})
    (path,) = (tmp_path / "journal").iterdir()
    path.write_bytes(damage + b"\n" + path.read_bytes())
    assert Journal(str(tmp_path), ONE).find("1") == {"x": 1}


def test_a_disk_that_takes_nothing_costs_only_the_journal(tmp_path):
    (tmp_path / "journal").write_text("in the way")
    journal = Journal(str(tmp_path), ONE)
    assert journal.add("1", {"x": 1}) is False
    assert journal.find("1") == {"x": 1}


def test_old_journals_are_swept_and_the_own_one_stays(tmp_path):
    own = Journal(str(tmp_path), ONE)
    own.add("1", {})
    for i in range(KEPT + 5):
        Journal(str(tmp_path), f"{i:032x}".replace("0", "a")).add("1", {})
    os.utime(tmp_path / "journal" / f"{ONE}.jsonl", (1, 1))
    own.sweep()
    names = [path.name for path in (tmp_path / "journal").iterdir()]
    assert len(names) == KEPT + 1
    assert f"{ONE}.jsonl" in names


@pytest.mark.parametrize("name", ["", "../x", "A" * 32, "1" * 65, "1" * 32 + "\n"])
def test_a_session_is_named_by_digits_alone(tmp_path, name):
    with pytest.raises(ValueError, match="hexadecimal"):
        Journal(str(tmp_path), name)


def test_each_line_is_json(tmp_path):
    Journal(str(tmp_path), ONE).add("1", {"x": "ü\n"})
    (path,) = (tmp_path / "journal").iterdir()
    assert json.loads(path.read_text())["result"] == {"x": "ü\n"}
