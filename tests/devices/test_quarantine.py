"""Boards that are not trusted: remembered, told, lifted, and not chosen by themselves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.devices.inventory import quarantine
from edgeprune.errors import IntegrityError, SpecError
from edgeprune.pipeline.options import Options, check_names, chosen_device
from edgeprune.records import catalog
from edgeprune.records.workload import Workload

SSH = (
    "transport: ssh, host: pi.local, user: pi, auth: {method: key, key_file: ~/.ssh/id},"
    f" host_key: {{sha256: 'SHA256:{'A' * 43}'}}"
)
TWO_PIS = f"""schema_version: 1
devices:
  first: {{{SSH}, targets: [rpi4]}}
  second: {{{SSH}, targets: [rpi4, rpi5]}}
  here: {{transport: local, targets: [rpi4]}}
  desk: {{transport: local, targets: [rpi4], stand_in: true}}
  double: {{{SSH}, targets: [rpi4], stand_in: true}}
  old: {{transport: replay, targets: [rpi4], recording: old.jsonl}}
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "edgeprune" / "quarantine.json"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.yaml").write_text(TWO_PIS)
    return tmp_path


def test_nothing_is_in_quarantine_before_anything_was_put_there(state):
    assert quarantine.entries() == {}
    assert quarantine.reason("pi") is None
    assert quarantine.lift("pi") is False
    assert not state.exists()


def test_a_device_stays_until_it_is_lifted(state):
    quarantine.put("pi", "too warm")
    quarantine.put("other", "too noisy")
    quarantine.put("pi", "still too warm")
    assert quarantine.reason("pi") == "still too warm"
    assert quarantine.entries()["pi"].at.endswith("Z")
    assert quarantine.lift("pi") is True
    assert quarantine.lift("pi") is False
    assert list(quarantine.entries()) == ["other"]
    assert quarantine.path() == state


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=400))
def test_any_reason_comes_back_as_one_printable_line(reason):
    quarantine.put("pi", reason)
    found = quarantine.reason("pi")
    assert found is not None
    assert found.isprintable()
    assert len(found) == min(len(reason), quarantine.MAX_REASON)


def test_writers_at_the_same_time_lose_nothing():
    names = [f"pi-{i}" for i in range(16)]
    threads = [threading.Thread(target=quarantine.put, args=(n, "noisy")) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(quarantine.entries()) == set(names)


def test_a_relative_state_folder_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert quarantine.path() == Path("~/.local/state/edgeprune/quarantine.json").expanduser()


def test_a_file_that_is_damaged_is_named_with_the_way_out(state):
    state.parent.mkdir(parents=True)
    state.write_text("{")
    with pytest.raises(IntegrityError, match=r"remove .*quarantine\.json"):
        quarantine.reason("pi")


def test_a_folder_that_cannot_be_made_is_told(state):
    state.parent.parent.write_text("a file where a folder belongs")
    with pytest.raises(SpecError, match="cannot write"):
        quarantine.put("pi", "noisy")


def test_a_device_in_quarantine_is_not_chosen_by_itself(project):
    assert catalog.device_for("rpi4")[0] == "first"
    assert catalog.device_for("rpi4", quarantined={"first"})[0] == "second"
    assert catalog.device_for("rpi5", quarantined={"second"})[0] == "this-machine"
    assert catalog.device_for("rpi4", "first", quarantined={"first"})[0] == "first"


def test_the_user_is_told_who_takes_the_place_and_why(project):
    options, workload = Options(target="rpi4"), Workload(model="m.py:make", data="d")
    target = catalog.target("rpi4")
    assert chosen_device(options, workload, target)[0::2] == ("first", ())
    quarantine.put("first", "its clock jumps")
    name, _, (note,) = chosen_device(options, workload, target)
    assert name == "second"
    assert note == "first is in quarantine, second takes its place: its clock jumps"
    check_names(options, workload)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_device_in_quarantine_that_the_user_names_is_used_with_a_note(project, in_file):
    quarantine.put("first", "its clock jumps")
    options = Options(target="rpi4", device=None if in_file else "first")
    workload = Workload(model="m.py:make", data="d", device="first" if in_file else None)
    name, _, (note,) = chosen_device(options, workload, catalog.target("rpi4"))
    assert name == "first"
    assert note == "first is in quarantine, its figures may be wrong: its clock jumps"


def test_the_other_boards_of_a_target_may_help_but_no_stand_in_and_no_recording(project):
    def names(target: str, chosen: str) -> list[str]:
        device = catalog.device(chosen)
        return [name for name, _ in catalog.companions_for(target, chosen, device)]

    assert names("rpi4", "first") == ["second", "here"]
    assert names("rpi4", "here") == ["first", "second"]
    assert names("rpi5", "second") == []
    assert names("rpi4", "desk") == ["double"]
    assert names("rpi4", "double") == ["desk", "this-machine"]
