"""Names to specs: lookup order, paths, shadowing, devices and examples."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from edgeprune.errors import SpecError, UnknownName
from edgeprune.records import catalog

TARGET = """\
schema_version: 1
name: {name}
summary: {summary}
profile: {profile}
format: tflite
runtime: {{name: litert}}
"""
PI = """\
  {name}:
    transport: ssh
    targets: [{targets}]
    host: pi.local
    user: pi
    auth: {{method: key, key_file: ~/.ssh/id}}
    host_key: {{sha256: "SHA256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project folder, and the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_target(folder: Path, name: str, summary: str, profile: str = "cortex-a72") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(TARGET.format(name=name, summary=summary, profile=profile))
    return path


def write_devices(folder: Path, *entries: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "devices.yaml"
    path.write_text("schema_version: 1\ndevices:\n" + "".join(entries))
    return path


def test_shipped_names_are_found_from_any_folder(project):
    assert catalog.target("rpi4").profile == "cortex-a72"
    assert catalog.profile("cortex-a72").name == "cortex-a72"


def test_the_project_wins_over_the_user_and_the_user_over_the_shipped(project, user_config):
    assert catalog.target("rpi4").summary.startswith("Raspberry")
    write_target(user_config / "targets", "rpi4", "of the user")
    assert catalog.target("rpi4").summary == "of the user"
    write_target(project / "targets", "rpi4", "of the project")
    assert catalog.target("rpi4").summary == "of the project"


def test_a_private_board_needs_no_fork(project):
    write_target(project / "targets", "my-board", "mine")
    assert catalog.target("my-board").summary == "mine"
    assert catalog.targets()["my-board"] == Path("targets/my-board.yaml")
    assert "rpi4" in catalog.targets()


def test_shadowing_a_shipped_name_is_told_once_per_lookup(project, caplog):
    write_target(project / "targets", "rpi4", "mine")
    write_target(project / "targets", "my-board", "mine")
    with caplog.at_level(logging.WARNING):
        catalog.target("my-board")
        assert caplog.messages == []
        catalog.target("rpi4")
    assert caplog.messages == ["targets/rpi4.yaml shadows the shipped target rpi4"]


def test_the_shipped_file_itself_is_no_shadow(monkeypatch, caplog):
    monkeypatch.chdir(catalog.targets()["rpi4"].parents[1])
    with caplog.at_level(logging.WARNING):
        catalog.target("rpi4")
    assert caplog.messages == []


@pytest.mark.parametrize("as_argument", [str, Path, lambda path: f"./{path.name}"])
def test_a_path_is_read_as_it_is(project, as_argument):
    path = write_target(project, "rpi4", "by path")
    assert catalog.target(as_argument(path)).summary == "by path"


def test_a_file_in_this_folder_is_a_path_by_its_ending(project):
    write_target(project, "my-board", "by path")
    assert catalog.target("my-board.yaml").summary == "by path"
    with pytest.raises(UnknownName, match="unknown target 'my-board'"):
        catalog.target("my-board")


def test_an_unknown_name_suggests_the_nearest_one(project):
    with pytest.raises(UnknownName, match=r"unknown target 'rpi-4'; did you mean 'rpi4'"):
        catalog.target("rpi-4")
    with pytest.raises(UnknownName, match=r"unknown profile 'cortex-a7'; did you mean 'cortex-a7"):
        catalog.profile("cortex-a7")


def test_a_path_that_does_not_exist_is_a_spec_error(project):
    with pytest.raises(SpecError, match="cannot read"):
        catalog.target("targets/none.yaml")


def test_a_name_must_equal_the_file_stem(project):
    write_target(project, "a", "x").rename(project / "b.yaml")
    with pytest.raises(SpecError, match=r"name in b\.yaml must equal the file's stem 'b'"):
        catalog.target("b.yaml")


def test_a_target_of_an_unknown_profile_names_the_file(project):
    write_target(project / "targets", "my-board", "x", profile="cortex-a27")
    with pytest.raises(UnknownName, match=r"'cortex-a27' in targets/my-board\.yaml; did you mean"):
        catalog.target("my-board")


def test_a_relative_config_home_is_ignored(project, monkeypatch):
    write_target(project / "conf" / "edgeprune" / "targets", "my-board", "x")
    monkeypatch.setenv("XDG_CONFIG_HOME", "conf")
    assert "my-board" not in catalog.targets()


def test_this_machine_always_exists_as_a_stand_in(project):
    devices = catalog.devices()
    assert list(devices) == ["this-machine"]
    assert devices["this-machine"].transport == "local"
    assert devices["this-machine"].stand_in
    assert "rpi4" in devices["this-machine"].targets


def test_devices_of_the_project_win_over_those_of_the_user(project, user_config):
    write_devices(user_config, PI.format(name="users", targets="rpi4"))
    assert list(catalog.devices()) == ["users", "this-machine"]
    write_devices(project, PI.format(name="projects", targets="rpi4"))
    assert list(catalog.devices()) == ["projects", "this-machine"]
    assert list(catalog.devices(user_config / "devices.yaml")) == ["users", "this-machine"]


def test_a_devices_file_that_is_named_must_exist(project):
    with pytest.raises(SpecError, match="cannot read"):
        catalog.devices(project / "none.yaml")


def test_the_file_may_describe_this_machine_but_not_move_it_elsewhere(project):
    entry = "  this-machine: {transport: local, targets: [rpi5]}\n"
    write_devices(project, entry)
    assert not catalog.device("this-machine").stand_in
    write_devices(project, PI.format(name="this-machine", targets="rpi4"))
    with pytest.raises(SpecError, match="must have transport local"):
        catalog.devices()


def test_an_unknown_device_suggests_the_nearest_one(project):
    write_devices(project, PI.format(name="pi-desk", targets="rpi4"))
    with pytest.raises(UnknownName, match="did you mean 'pi-desk'"):
        catalog.device("pi-dsk")


def test_without_a_wish_the_first_real_device_that_lists_the_target_is_chosen(project):
    write_devices(
        project,
        "  this-machine: {transport: local, stand_in: true, targets: [rpi4]}\n",
        PI.format(name="other", targets="rpi5"),
        PI.format(name="first", targets="rpi5, rpi4"),
        PI.format(name="second", targets="rpi4"),
    )
    assert catalog.device_for("rpi4")[0] == "first"
    assert catalog.device_for("rpi5")[0] == "other"
    assert catalog.device_for("iphone")[0] == "this-machine"


def test_edgeprune_on_the_board_itself_times_the_real_thing(project):
    write_devices(project, "  here: {transport: local, targets: [rpi4]}\n")
    assert catalog.device_for("rpi4")[0] == "here"
    assert catalog.device_for("rpi5")[0] == "this-machine"


def test_a_recording_is_used_only_when_it_is_wanted(project):
    Path("devices.yaml").write_text(
        "schema_version: 1\n"
        "devices:\n"
        "  june: {transport: replay, recording: june.epr, targets: [rpi4]}\n"
    )
    assert catalog.device_for("rpi4")[0] == "this-machine"
    assert catalog.device_for("rpi4", "june")[0] == "june"


def test_a_wanted_device_must_list_the_target_unless_it_stands_in(project):
    write_devices(project, PI.format(name="pi-desk", targets="rpi4"))
    assert catalog.device_for("rpi4", "pi-desk")[0] == "pi-desk"
    assert catalog.device_for("anything", "this-machine")[0] == "this-machine"
    with pytest.raises(SpecError, match=r"'pi-desk' must list the target 'rpi5'.*lists rpi4"):
        catalog.device_for("rpi5", "pi-desk")
    with pytest.raises(UnknownName, match="unknown device 'pi'"):
        catalog.device_for("rpi4", "pi")


def test_the_shipped_example_is_found_by_name(project):
    folder = catalog.example_dir("fashion-mnist")
    assert folder.name == "fashion_mnist"
    assert (folder / "net.py").is_file()


def test_an_unknown_example_suggests_the_nearest_one(project):
    with pytest.raises(UnknownName, match="did you mean 'fashion-mnist'"):
        catalog.example_dir("fashion_mnist")
