"""Where a report lies: known to whoever made or read it, never written into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_fixture import make_report

from edgeprune.errors import SpecError
from edgeprune.records.base import read_json
from edgeprune.records.files import to_json, write_json
from edgeprune.records.report import Report


def test_a_report_that_was_read_knows_its_folder_and_its_bundle(tmp_path: Path, monkeypatch):
    made = make_report().model_copy(update={"bundle_name": "bundle"})
    monkeypatch.chdir(tmp_path)
    write_json(made, Path("run/report.json"))
    found = read_json(Report, Path("run/report.json"))
    assert found.folder == tmp_path / "run"
    assert found.bundle == tmp_path / "run" / "bundle"
    assert found.model_copy(update={"notes": ()}).folder == found.folder


def test_a_report_without_a_file_says_that_it_lies_nowhere():
    made = make_report()
    for place in ("folder", "bundle"):
        with pytest.raises(SpecError, match="this Report lies in no folder"):
            getattr(made, place)


def test_the_place_of_a_report_is_not_written_into_it(tmp_path: Path):
    made = make_report()
    plain = to_json(made)
    made.lies_in(tmp_path)
    assert to_json(made) == plain
    assert str(tmp_path) not in repr(made)
    assert isinstance(json.loads(plain)["bundle"], str)
