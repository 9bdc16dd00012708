"""The command line as its users meet it: what is listed, shown and printed, and which setting wins."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tinynet
import yaml

from edgeprune import __version__
from edgeprune.errors import SpecError
from edgeprune.pipeline import api
from edgeprune.pipeline.options import Options
from edgeprune.records.base import read_yaml
from edgeprune.records.plan import PlanResult
from edgeprune.records.report import Report
from edgeprune.records.target import Profile, Target
from edgeprune.records.workload import Workload
from edgeprune.workload.load import from_objects

COMMANDS = ("compare", "deploy", "devices", "doctor", "init", "profile", "profiles", "report",
    "search", "targets", "verify", "bundle")  # fmt: skip


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    return tinynet.deployed(tmp_path_factory)


def printed(cwd: Path, *args: str) -> str:
    """What a command printed; it has to end well and without a word on stderr."""
    done = tinynet.edgeprune(cwd, *args)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_help_lists_every_command(tmp_path):
    text = printed(tmp_path, "--help")
    listed = {line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line}
    assert listed == set(COMMANDS)


@pytest.mark.parametrize(
    "command", ["deploy", "profile", "init", "verify", "report", "compare", "search"]
)
def test_every_command_explains_itself(tmp_path, command):
    text = printed(tmp_path, command, "--help")
    assert f"edgeprune {command}" in text
    assert all(line.strip() for line in text.splitlines() if line.startswith("  -"))


def test_a_group_without_a_command_shows_its_help(tmp_path):
    done = tinynet.edgeprune(tmp_path, "targets")
    assert "list" in done.stderr + done.stdout
    assert "error:" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--target", "rpi4", "--latency", "50%", "deploy", "--json"),
            "'--target' before the command\nhint: options go after the command:"
            " edgeprune deploy --target rpi4 --latency 50% --json\n",
        ),
        (
            ("devices", "--json", "list"),
            "'--json' before the command\nhint: options go after the command: edgeprune devices list --json\n",
        ),
        (
            ("--json", "devices", "list"),
            "'--json' before the command\nhint: options go after the command: edgeprune devices list --json\n",
        ),
        (
            ("--max-drop", "1%"),
            "'--max-drop' before the command\nhint: options go after the command, such as: edgeprune deploy --max-drop\n",
        ),
        (
            ("--nowhere", "deploy"),
            "'--nowhere'\nhint: edgeprune --help lists what there is\n",
        ),
        (
            ("compare", "--target", "rpi4"),
            "'--target'\nhint: edgeprune compare --help lists what there is\n",
        ),
    ],
)
def test_an_option_before_its_command_is_told_its_place(tmp_path, words, said):
    done = tinynet.edgeprune_here(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no such option {said}"


def test_no_line_of_a_list_of_commands_is_cut_off(tmp_path):
    for group in ((), ("devices",), ("bundle",), ("targets",), ("profiles",)):
        shown = tinynet.edgeprune_here(tmp_path, *group, "--help").stdout
        assert "..." not in shown.partition("Commands:")[2]


def test_what_the_int8_schemes_are_stands_above_the_records_that_name_them(tmp_path):
    for group, name in (("targets", "rpi4"), ("profiles", "x86-64")):
        first, *rest = printed(tmp_path, group, "show", name).splitlines()
        assert first.startswith("# static-int8: weights and activations are INT8")
        assert "static-int8" in "\n".join(rest)


def test_the_version_is_that_of_the_package(tmp_path):
    assert printed(tmp_path, "--version").strip() == f"edgeprune, version {__version__}"


def test_targets_are_listed_with_their_format_and_profile(tmp_path):
    found = json.loads(printed(tmp_path, "targets", "list", "--json"))
    assert found["rpi4"]["format"] == "tflite"
    assert found["this-machine"]["profile"] == "x86-64"
    text = printed(tmp_path, "targets", "list")
    assert [line.split()[0] for line in text.splitlines()] == ["name", *found]


def test_profiles_are_listed(tmp_path):
    found = json.loads(printed(tmp_path, "profiles", "list", "--json"))
    assert "aarch64" in found["cortex-a72"]["isa"] or "arm" in found["cortex-a72"]["isa"].lower()


@pytest.mark.parametrize(
    ("group", "name", "record"),
    [("targets", "rpi4", Target), ("profiles", "x86-64", Profile)],
)
def test_what_is_shown_can_be_written_to_a_file_of_ones_own(tmp_path, group, name, record):
    text = printed(tmp_path, group, "show", name)
    assert "null" not in text
    (tmp_path / group).mkdir()
    own = tmp_path / group / "mine.yaml"
    own.write_text(yaml.safe_dump({**yaml.safe_load(text), "name": "mine"}))
    assert read_yaml(record, own).name == "mine"
    assert "mine" in json.loads(printed(tmp_path, group, "list", "--json"))


def test_devices_of_the_folder_are_listed_beside_this_machine(tmp_path):
    board = {
        "transport": "ssh", "targets": ["rpi4"], "host": "pi.local", "user": "pi",
        "auth": {"method": "agent", "key_fingerprint": "SHA256:" + "A" * 43},
        "host_key": {"sha256": "SHA256:" + "B" * 43},
    }  # fmt: skip
    (tmp_path / "devices.yaml").write_text(
        yaml.safe_dump({"schema_version": 1, "devices": {"pi-desk": board}})
    )
    found = json.loads(printed(tmp_path, "devices", "list", "--json"))
    assert found["pi-desk"]["address"] == "pi@pi.local:22"
    assert found["this-machine"]["transport"] == "local"


def test_doctor_names_versions_and_devices(tmp_path):
    text = printed(tmp_path, "doctor")
    assert __version__ in text
    assert "onnxruntime" in text
    assert "this-machine" in text


@pytest.mark.parametrize(
    "args",
    [
        ("targets", "list", "--json"),
        ("deploy", "--target", "this-machine", "--latency", "15"),
        ("deploy", "--target", "nowhere"),
        ("report", "gone"),
    ],
)
def test_a_command_in_the_process_of_the_tests_is_the_same_command(tmp_path, args):
    home = tinynet.project(tmp_path / "project")
    apart, here = tinynet.edgeprune(home, *args), tinynet.edgeprune_here(home, *args)
    assert (here.returncode, here.stdout) == (apart.returncode, apart.stdout)
    assert here.stderr == apart.stderr


def test_the_report_is_shown_again_and_as_json(deployed):
    text = printed(deployed.project, "report", "run")
    assert text == deployed.done.stdout.partition("\nbundle  run/bundle and")[0] + "\n"
    found = Report.model_validate_json(printed(deployed.project, "report", "run", "--json"))
    assert found.headline in text


def test_two_runs_are_compared_side_by_side(deployed, tmp_path):
    shutil.copytree(deployed.folder, tmp_path / "first")
    shutil.copytree(deployed.folder, tmp_path / "second")
    text = printed(tmp_path, "compare", "first", "second")
    found = Report.model_validate_json((tmp_path / "first" / "report.json").read_bytes())
    assert text.count(found.target) >= 2


def test_verify_prints_every_level_and_as_json(deployed):
    text = printed(deployed.project, "verify", "run/bundle")
    levels = [line.split()[0] for line in text.splitlines() if line.startswith("L")]
    assert levels == ["L0", "L1", "L2", "L3", "L4", "L5"]
    found = json.loads(printed(deployed.project, "verify", "run/bundle.zip", "--json"))
    assert found["ok"]
    run = {f"L{level['level']}": level["status"] for level in found["levels"]}
    # The bundle is not signed (L2), and no device was named (L5).
    assert [name for name, status in run.items() if status != "passed"] == ["L2", "L5"]
    assert run["L2"] == run["L5"] == "not-run"


def test_results_go_to_stdout_and_progress_to_stderr(deployed):
    assert deployed.done.stdout.startswith(("PASSED", "FAILED"))
    assert "[1/8]" in deployed.done.stderr
    assert "[1/8]" not in deployed.done.stdout


def test_a_quiet_run_says_nothing_but_the_json_result(deployed, tmp_path):
    home = tinynet.project(tmp_path / "project")
    tinynet.copied_run(deployed.folder, home / "run")
    flags = ("--target", "this-machine", "--latency", "80%", "--run", "run", "--quiet", "--json")
    done = tinynet.edgeprune(home, "deploy", *flags)
    found = Report.model_validate_json(done.stdout)
    assert [s.name for s in found.stages if s.cached] == list(tinynet.STAGES)
    assert found.passed is (done.returncode == 0)
    assert done.stderr == "" or not found.passed


def set_as_trained(found: re.Match[str]) -> str:
    """The tiny net is trained on pixels in [0, 1], as they are."""
    return f"  {found[1]}: [{0.0 if found[1] == 'mean' else 1.0}]"


# As the file asks, mean and std are made those of the training: then nothing is measured anew. As written, everything is.
@pytest.mark.parametrize("is_checked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_init_writes_settings_that_a_dry_run_takes(deployed, tmp_path, is_checked):
    home = tinynet.project(tmp_path / "project")
    (home / "edgeprune.yaml").unlink()
    (home / "data.npz").rename(home / "pixels.npz")
    done = tinynet.edgeprune(home, "init", "--yes", "--target", "this-machine")
    assert done.returncode == 0, done.stderr
    written = read_yaml(Workload, home / "edgeprune.yaml")
    assert (written.model, written.data) == ("net.py:build", "pixels.npz")
    assert written.target == "this-machine"
    if is_checked:
        text = (home / "edgeprune.yaml").read_text()
        text, n = re.subn(r"(?m)^  (mean|std): .*$", set_as_trained, text)
        assert n == 2
        (home / "edgeprune.yaml").write_text(text)
    tinynet.copied_run(deployed.folder, home / "run")
    measured = set(tinynet.stage_folders(home / "run").values())
    dry = tinynet.edgeprune(
        home, "deploy", "--dry-run", "--json", "--run", "run", "--latency", "80%"
    )
    assert dry.returncode == 0, dry.stderr
    if is_checked:
        assert set(tinynet.stage_folders(home / "run").values()) == measured
    plan = PlanResult.model_validate_json(dry.stdout).plan
    assert any(c.widths == plan.widths() for c in PlanResult.model_validate_json(dry.stdout).checks)
    assert not (home / "run" / "bundle").exists()


def test_a_dry_run_prints_the_plan_and_stops(deployed, tmp_path):
    home = tinynet.project(tmp_path / "project")
    earlier = tinynet.STAGES[: tinynet.STAGES.index("prune")]
    for name, stage in tinynet.stage_folders(deployed.folder).items():
        if name in earlier:
            shutil.copytree(stage, home / "run" / "stages" / stage.name)
    flags = ("--target", "this-machine", "--latency", "80%", "--run", "run", "--dry-run")
    done = tinynet.edgeprune_here(home, "deploy", *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["group", "channels", "kept"]
    assert lines[-2].startswith("dense ")
    assert "measured" in lines[-2]
    assert lines[-1].startswith("feasible: ")
    assert set(tinynet.stage_folders(home / "run")) == set(earlier)
    written = {p.name for p in (home / "run").iterdir()}
    assert written - {"measurements.sqlite"} == {"stages", "run.json", ".lock"}


@pytest.mark.parametrize(
    ("yaml_target", "flags", "code"),
    [
        ("iphone", (), 5),  # the file is read
        ("iphone", ("--target", "nowhere"), 2),  # the flag wins
        ("nowhere", ("--target", "iphone"), 5),
    ],
)
def test_a_flag_wins_over_the_settings_file(tmp_path, monkeypatch, yaml_target, flags, code):
    monkeypatch.setattr("edgeprune.formats.names", lambda: ["onnx", "tflite"])
    tinynet.project(tmp_path, target=yaml_target)
    assert tinynet.edgeprune_here(tmp_path, "deploy", *flags).returncode == code


@pytest.mark.parametrize(
    ("flag", "settings", "expected"),
    [("40%", "70%", "40%"), (None, "70%", "70%"), (None, None, "60%")],  # 60 %: the target file
)
def test_a_flag_wins_over_the_settings_and_these_over_the_target(
    flag, settings, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    record = Workload(model="net.py:build", data="data.npz", latency=settings, seed=5)
    x, y = tinynet.arrays()["train"]
    loaded = from_objects(
        tinynet.trained(),
        (x[..., None], y),
        settings=record.model_copy(
            update={"preprocess": record.preprocess.model_copy(update={"color": "grey"})}
        ),
    )
    job = api.resolve(loaded, Options(target="this-machine", latency=flag))
    assert job.budget.text == expected
    assert job.max_drop == 0.01  # of the target file
    assert job.seed == 5
    assert api.resolve(loaded, Options(target="this-machine", seed=0)).seed == 0
    with pytest.raises(SpecError, match="no target was named"):
        api.resolve(loaded, Options())
