"""Entries of devices.yaml: what is added and removed, and what stays byte for byte as it was."""

from __future__ import annotations

import contextlib
import difflib
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repo import REPO

from edgeprune.devices.inventory import entries
from edgeprune.errors import SpecError, UnknownName
from edgeprune.records import catalog
from edgeprune.records.device import Device, HostKey

PIN, OTHER = ("SHA256:" + letter * 43 for letter in "AB")


def board(**changes: object) -> Device:
    facts = {
        "transport": "ssh",
        "targets": ("rpi4",),
        "host": "pi.local",
        "user": "pi",
        "auth": {"method": "key", "key_file": "~/.ssh/id_ed25519"},
        "host_key": {"sha256": PIN},
    }
    return Device(**(facts | changes))


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def changes(before: str, after: str) -> tuple[list[str], list[str]]:
    """Lines that went and lines that came."""
    lines = list(difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True)))
    return [x[2:] for x in lines if x[0] == "-"], [x[2:] for x in lines if x[0] == "+"]


SHIPPED = (REPO / "devices.yaml").read_text("utf-8")
FORMS = {
    "the shipped file": SHIPPED,
    "no end of line": "schema_version: 1\ndevices:\n  a: {transport: local, targets: []}",
    "windows lines": "schema_version: 1\r\ndevices:\r\n  a:\r\n    transport: local\r\n    targets: []\r\n",
    "four spaces": "devices:\n    a:\n        transport: local\n        targets:\n        - rpi4\nschema_version: 1\n",
    "devices first": "devices:\n  a: # mine\n    targets: [] # none\n    transport: local # here\n\n# then\nschema_version: 1\n",
    "comments inside": "schema_version: 1\ndevices:\n  a:\n    transport: local\n    targets: []\n    # stand_in: true\n\n  # b:\n",
    "end marks": "---\nschema_version: 1\ndevices:\n  a: {transport: local,\n    targets: []}\n...\n",
    "a byte order mark": "\ufeffschema_version: 1\ndevices:\n  a: {transport: local, targets: []}\n",
    "none yet": "# mine\nschema_version: 1\ndevices: {} # none yet\n# end\n",
    "nothing": "schema_version: 1\ndevices: # none yet\n  # a: {transport: local, targets: []}\n",
    "null": "devices: null\nschema_version: 1\n",
    "unindented text": "schema_version: 1\ndevices:"
    "\n  a:\n    transport: local\n    targets: []\n    workdir: |-\n      /srv/edge\n\n# end\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_an_added_device_is_read_back_and_nothing_else_changes(tmp_path, form):
    path = written(tmp_path / "devices.yaml", FORMS[form])
    before = entries._read(path)[1]
    entries.add_device(path, "pi-desk", board())
    after = path.read_bytes().decode()
    found = catalog.devices(path)
    assert found["pi-desk"] == board()
    assert {k: v for k, v in found.items() if k in before} == before
    gone, came = changes(FORMS[form], after)
    assert len(gone) <= 1  # the line that lacked its end, or held {}
    for line in gone:
        assert any(new.split("#")[-1].strip() in line for new in came)
    assert ("\r\n" in after) == ("\r\n" in FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_removing_what_was_added_gives_the_same_file_again(tmp_path, form):
    path = written(tmp_path / "devices.yaml", FORMS[form])
    had_devices = bool(entries._read(path)[1])
    entries.add_device(path, "pi-desk", board())
    entries.remove_device(path, "pi-desk")
    after = path.read_bytes().decode()
    if had_devices:
        assert after.rstrip("\r\n") == FORMS[form].rstrip("\r\n")
    else:
        assert entries._read(path)[1] == {}
        assert after == FORMS[form].replace("devices: null", "devices: {}").replace(
            "devices: #", "devices: {} #"
        )


def test_the_only_device_can_be_removed_and_another_added(tmp_path):
    path = tmp_path / "devices.yaml"
    for name in ("first", "second"):
        entries.add_device(path, name, board())
        assert [n for n in catalog.devices(path) if n != "this-machine"] == [name]
        entries.remove_device(path, name)
    assert list(catalog.devices(path)) == ["this-machine"]


def test_a_missing_file_is_made_with_its_folder(tmp_path):
    path = tmp_path / "config" / "devices.yaml"
    entries.add_device(path, "pi-desk", board())
    text = path.read_text()
    assert text.splitlines()[1:] == [
        "schema_version: 1",
        "devices:",
        "  pi-desk:",
        "    transport: ssh",
        "    targets: [rpi4]",
        "    host: pi.local",
        "    user: pi",
        "    auth: {method: key, key_file: ~/.ssh/id_ed25519}",
        f"    host_key: {{sha256: '{PIN}'}}",
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_comments_that_belong_to_an_entry_go_with_it_and_the_others_stay(tmp_path):
    text = FORMS["comments inside"]
    path = written(tmp_path / "devices.yaml", text)
    entries.add_device(path, "pi-desk", board())
    lines = path.read_text().splitlines()
    assert lines.index("    # stand_in: true") < lines.index("  pi-desk:") < lines.index("  # b:")
    entries.remove_device(path, "a")
    assert "stand_in" not in path.read_text()
    assert "  # b:" in path.read_text()


def test_the_mode_is_kept_and_a_link_is_followed(tmp_path):
    real = written(tmp_path / "real.yaml", SHIPPED)
    real.chmod(0o600)
    link = tmp_path / "devices.yaml"
    link.symlink_to(real)
    entries.add_device(link, "pi-desk", board())
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert "pi-desk" in catalog.devices(real)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["devices.yaml", "real.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "schema_version: 1\ndevices: {a: {transport: local, targets: []}}\n",
        "{schema_version: 1, devices: {}}\n",
        "? schema_version\n: 1\n? devices\n: a: {transport: local, targets: []}\n",
        "schema_version: 1\ndevices: !!map\n  a: &x\n    transport: local\n    targets: []\n  ? b\n  : {transport: local, targets: []}\n",
    ],
)
def test_a_form_that_cannot_be_added_to_is_refused_or_edited_rightly_but_never_damaged(
    tmp_path, text
):
    path = written(tmp_path / "devices.yaml", text)
    before = entries._read(path)[1]
    with contextlib.suppress(SpecError):
        entries.add_device(path, "pi-desk", board())
    after = entries._read(path)[1]
    assert after == {**before, "pi-desk": board()} or path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["devices.yaml"]


def test_a_file_in_flow_style_names_what_to_do(tmp_path):
    text = "schema_version: 1\ndevices: {a: {transport: local, targets: []}}\n"
    path = written(tmp_path / "devices.yaml", text)
    for edit in (
        lambda: entries.add_device(path, "pi-desk", board()),
        lambda: entries.check_addable(path, "pi-desk"),
        lambda: entries.remove_device(path, "a"),
    ):
        with pytest.raises(SpecError, match="cannot be edited"):
            edit()
    assert path.read_text() == text


def test_a_name_that_exists_is_not_overwritten(tmp_path):
    path = written(tmp_path / "devices.yaml", SHIPPED)
    for edit in (
        lambda: entries.add_device(path, "this-machine", board()),
        lambda: entries.check_addable(path, "this-machine"),
    ):
        with pytest.raises(SpecError, match="exists already"):
            edit()
    assert path.read_text() == SHIPPED


def test_a_file_that_is_wrong_is_named_and_left_alone(tmp_path):
    text = SHIPPED.replace("stand_in", "stand-in")
    path = written(tmp_path / "devices.yaml", text)
    with pytest.raises(UnknownName, match="stand_in"):
        entries.add_device(path, "pi-desk", board())
    assert path.read_text() == text


def test_what_is_not_there_cannot_be_removed_or_pinned(tmp_path):
    path = written(tmp_path / "devices.yaml", SHIPPED)
    with pytest.raises(UnknownName, match="pi-desk"):
        entries.remove_device(path, "pi-desk")
    with pytest.raises(UnknownName, match="pi-desk"):
        entries.repin(path, "pi-desk", PIN, HostKey(sha256=OTHER))
    with pytest.raises(SpecError, match="no host key"):
        entries.repin(path, "this-machine", PIN, HostKey(sha256=OTHER))


PINNED_FORMS = {
    "flow": f"host_key: {{sha256: '{PIN}'}} # by hand",
    "plain": f"host_key: {{sha256: {PIN}}}",
    "block": f'host_key:\n      sha256: "{PIN}"\n    # end',
    "typed": f"host_key: {{key_type: ssh-ed25519, sha256: '{PIN}'}}",
    "typed block": f"host_key:\n      sha256: '{PIN}'\n      key_type: ssh-ed25519 # kind",
}


@pytest.mark.parametrize("key_type", ["ssh-ed25519", "ecdsa-sha2-nistp256"])
@pytest.mark.parametrize("form", PINNED_FORMS)
def test_a_pin_is_replaced_in_its_place(tmp_path, form, key_type):
    entry = f"""\
  pi-desk:
    transport: ssh
    {PINNED_FORMS[form]}
    targets: [rpi4]
    host: pi.local
    user: pi
    auth: {{method: key, key_file: ~/.ssh/id_ed25519}} # keep
"""
    text = f"schema_version: 1\ndevices:\n  # mine\n{entry}# end\n"
    path = written(tmp_path / "devices.yaml", text)
    new = HostKey(sha256=OTHER, key_type=key_type)
    with pytest.raises(SpecError, match="pinned"):
        entries.repin(path, "pi-desk", OTHER, new)
    assert path.read_text() == text
    entries.repin(path, "pi-desk", PIN, new)
    assert catalog.devices(path)["pi-desk"] == board(host_key=new)
    if key_type == "ssh-ed25519":
        assert path.read_text() == text.replace(PIN, OTHER)
    entries.repin(path, "pi-desk", OTHER, HostKey(sha256=PIN))
    assert catalog.devices(path)["pi-desk"].host_key == HostKey(sha256=PIN)


def test_every_key_that_is_set_is_written_and_no_other(tmp_path):
    path = tmp_path / "devices.yaml"
    full = board(
        targets=(),
        port=2222,
        auth={"method": "password", "password_ref": "env:BOARD"},
        host_key={"sha256": PIN, "key_type": "ssh-rsa"},
        stand_in=True,
        python="~/edge/bin/python",
        thermal={"soft_limit_c": 70.0},
        tuning={"allow": True},
    )
    entries.add_device(path, "full", full)
    assert catalog.devices(path)["full"] == full
    assert "lease" not in path.read_text()


NAMES = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,12}\Z")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    form=st.sampled_from(sorted(FORMS)),
    data=st.data(),
)
def test_any_names_can_be_added_and_removed_in_any_order(tmp_path, names, form, data):
    path = written(tmp_path / "devices.yaml", FORMS[form])
    original = entries._read(path)[1]
    names = [name for name in names if name not in original]
    for name in names:
        entries.add_device(path, name, board())
    assert list(entries._read(path)[1]) == [*original, *names]
    for name in data.draw(st.permutations(names)):
        entries.remove_device(path, name)
    assert entries._read(path)[1] == original
