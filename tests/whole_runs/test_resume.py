"""A run that is killed anywhere goes on where it was and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinynet
from sshd import wait_until_gone

from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.pipeline.stages import kernels
from edgeprune.plan.table import measure_table
from edgeprune.progress import Silent
from edgeprune.records.base import read_json
from edgeprune.records.files import sha256_file
from edgeprune.records.report import Report

EXPORT = "pruned.fp32.onnx"
COMMAND = ("deploy", "--target", "this-machine", "--latency", "80%", "--run", "run")
AGAIN = ("deploy", "--target", "this-machine", "--latency", "80%")


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    return tinynet.deployed(tmp_path_factory)


def project_with(deployed: tinynet.Run, folder: Path, stages: tuple[str, ...]) -> Path:
    """A project whose run folder has these finished stages."""
    home = tinynet.project(folder)
    for name, stage in tinynet.stage_folders(deployed.folder).items():
        if name in stages:
            shutil.copytree(stage, home / "run" / "stages" / stage.name)
    return home


def before(stage: str) -> tuple[str, ...]:
    return tinynet.STAGES[: tinynet.STAGES.index(stage)]


def kill_when(home: Path, reached: Callable[[], bool]) -> None:
    """Start the deployment and end it with SIGKILL as soon as ``reached`` says so; its child processes end by themselves."""
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeprune", *COMMAND],
            cwd=home, env=tinynet.environment(home), stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    children: list[int] = []
    deadline = time.monotonic() + 200
    try:
        while not reached():
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.005)
        children = child_processes(process.pid)
    finally:  # whatever went wrong: one that lived on would hold the device against the tests after it
        process.kill()
        process.wait(10)
    for child in children:
        wait_until_gone(child, 30)


def child_processes(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found += map(int, (task / "children").read_text().split())
    return found


def started(home: Path, stage: str) -> Callable[[], bool]:
    return lambda: any((home / "run").glob(f"stages/{stage}-[0-9a-f]*"))


def finished(home: Path, stage: str) -> Callable[[], bool]:
    return lambda: stage in tinynet.stage_folders(home / "run")


def export_digest(home: Path) -> str:
    return sha256_file(tinynet.stage_folders(home / "run")["export"] / EXPORT)


def check_finished(home: Path, done: subprocess.CompletedProcess[str]) -> Report:
    """The report of a run that has ended well."""
    assert done.returncode in (0, 6), done.stderr
    found = read_json(Report, home / "run" / "report.json")
    assert done.returncode == (0 if found.passed else 6), done.stderr
    assert not list((home / "run").rglob("*.part"))
    return found


def test_a_kill_during_the_training_changes_nothing_in_the_result(deployed, tmp_path):
    killed = project_with(deployed, tmp_path / "killed", before("recover"))
    kill_when(killed, lambda: any((killed / "run").glob("stages/recover-*/.checkpoint")))
    assert not finished(killed, "recover")()
    done = tinynet.edgeprune(killed, *COMMAND)
    found = check_finished(killed, done)
    # The same as from the same stages without a stop, up to the exported file.
    assert export_digest(killed) == export_digest(deployed.project)
    assert {s.name for s in found.stages if s.cached} == set(before("recover"))


# One stage of each kind: a conversion, kernel times, scores, the search, the cut, an export, and the last measurement. Each costs a minute;
# a kill in the training is in the test before.
KILLED_IN = ("dense", "kernels", "importance", "plan", "prune", "export", "final-latency")


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLED_IN)
def test_a_kill_in_any_stage_is_made_good_by_the_same_command(deployed, tmp_path, stage):
    home = project_with(deployed, tmp_path / "killed", before(stage))
    kill_when(home, started(home, stage))
    done = tinynet.edgeprune(home, *COMMAND)
    check_finished(home, done)
    if "plan" in before(stage):  # the same structure, so the same file to the last bit
        assert export_digest(home) == export_digest(deployed.project)


def test_kernel_times_that_are_taken_anew_take_the_nets_and_costs_of_their_own_widths(
    deployed, tmp_path, monkeypatch
):
    kept = tuple(name for name in before("plan") if name != "kernels")
    home = project_with(deployed, tmp_path / "again", kept)
    measure = measure_table

    def with_fewer_widths(*args: Any, **named: Any) -> Any:
        table = measure(*args, **named)
        fewer = {g: w if len(w) < 3 else (*w[:-2], w[-1]) for g, w in table.grids.items()}
        assert fewer != table.grids
        return table.model_copy(update={"grids": fewer})

    monkeypatch.setattr(kernels, "measure_table", with_fewer_widths)
    done = tinynet.edgeprune_here(home, *COMMAND, "--dry-run")
    assert done.returncode == 0, done.stderr
    for name in ("nets", "importance"):  # those of the earlier widths lie beside them
        assert len(list(home.glob(f"run/stages/{name}-*/stage.json"))) == 2


def test_a_finished_run_is_shown_again_without_any_work(deployed, tmp_path):
    home = tinynet.project(tmp_path / "project")
    shutil.copytree(deployed.folder, home / "other")
    done = tinynet.edgeprune_here(home, *AGAIN, "--resume", "other")
    assert done.returncode == deployed.done.returncode, done.stderr
    first = read_json(Report, deployed.folder / "report.json")
    again = read_json(Report, home / "other" / "report.json")
    assert [s.name for s in again.stages if s.cached] == list(tinynet.STAGES)
    assert (again.gates, again.variants, again.plan) == (first.gates, first.variants, first.plan)


@pytest.mark.parametrize(
    "change",
    [
        ("--seed", "7"),
        ("--latency", "79%"),
        ("--max-drop", "3%"),
        ("--importance", "l2"),
        ("--scope", "local"),
    ],
)
def test_resuming_with_other_settings_is_refused(deployed, tmp_path, change):
    home = tinynet.project(tmp_path / "project")
    shutil.copytree(deployed.folder, home / "other")
    report = (home / "other" / "report.json").read_bytes()
    done = tinynet.edgeprune_here(home, *AGAIN, *change, "--resume", "other")
    assert done.returncode == 2
    assert done.stderr.startswith("error: other is a run of other inputs")
    assert len(done.stderr.splitlines()) == 2  # and one hint
    assert (home / "other" / "report.json").read_bytes() == report


def test_resuming_a_folder_that_is_no_run_is_refused(tmp_path):
    home = tinynet.project(tmp_path / "project")
    (home / "other").mkdir()
    done = tinynet.edgeprune_here(home, *AGAIN, "--resume", "other")
    assert done.returncode == 2
    assert done.stderr.startswith("error: other is no run folder")
    assert not list((home / "other").iterdir())


def test_a_damaged_stage_is_made_again_with_a_note(deployed, tmp_path):
    home = project_with(deployed, tmp_path / "project", tinynet.STAGES)
    good = export_digest(home)
    file = tinynet.stage_folders(home / "run")["export"] / EXPORT
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = tinynet.edgeprune_here(home, *COMMAND)
    found = check_finished(home, done)
    assert [s.name for s in found.stages if s.name in tinynet.STAGES and not s.cached] == ["export"]
    assert any("damaged and made again" in note and EXPORT in note for note in found.notes)
    assert "damaged and made again" in done.stderr
    assert export_digest(home) == good


def test_two_processes_never_work_on_one_run(tmp_path):
    home = tinynet.project(tmp_path / "project")
    with RunFolder(home / "run", Silent()):
        done = tinynet.edgeprune(home, *COMMAND)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(
        "error: another edgeprune is using the run folder"
    )
    assert not list((home / "run").glob("stages/*"))
