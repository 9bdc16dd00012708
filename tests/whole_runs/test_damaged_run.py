"""A run folder with a damaged file is made whole by the same command, or refused in one line; never believed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import replayed
from replayed import check_same

from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.progress import Silent
from edgeprune.records.base import Record
from edgeprune.records.files import write_bytes

COMMAND = (*replayed.COMMAND, "--device", "replayed")


class Figures(Record):
    """The result of the stage under test: any digit of it may be bent."""

    text: str
    ms: tuple[float, ...]


def made(path: Path) -> tuple[Figures, bytes, list[str]]:
    """The result and the file of a stage, and what the run noted."""

    def work(folder: Path) -> Figures:
        write_bytes(folder / "weights.bin", bytes(range(256)))
        return Figures(text="done", ms=(1.25, 2.5))

    with RunFolder(path, Silent()) as run:
        stage = run.stage("probe", "other", {"seed": 1}, Figures, work)
        return stage.result, stage.path("weights.bin").read_bytes(), run.notes


def test_no_flipped_bit_and_no_cut_of_a_stage_gives_another_result(tmp_path):
    first = made(tmp_path)
    (record,) = tmp_path.glob("stages/*/stage.json")
    (weights,) = tmp_path.glob("stages/*/weights.bin")
    draw = np.random.default_rng(0)
    for file in (record, weights):
        good = file.read_bytes()
        for number in range(80):
            place = int(draw.integers(0, len(good)))
            bent = bytearray(good)
            bent[place] ^= 1 << int(draw.integers(0, 8))
            file.write_bytes(good[:place] if number % 5 == 0 else bent)
            result, content, notes = made(tmp_path)
            assert (result, content) == first[:2]
            assert notes
            assert file is record or file.read_bytes() == good


def bent(content: bytes, draw: np.random.Generator) -> bytes:
    changed = bytearray(content)
    changed[int(draw.integers(0, len(content)))] ^= 1 << int(draw.integers(0, 8))
    return bytes(changed)


def cut(content: bytes, draw: np.random.Generator) -> bytes:
    return content[: int(draw.integers(0, len(content)))]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[replayed.Zygote]:
    with replayed.zygote(tmp_path_factory.mktemp("zygote")) as made:
        yield made


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory) -> Path:
    """The project of a replayed deployment."""
    recorded = replayed.recorded(tmp_path_factory)
    home = replayed.replaying(recorded, tmp_path_factory.mktemp("whole") / "project")
    assert zygote.run(home, *COMMAND) in (0, 6), (home / "log").read_text()
    return home


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damage", [bent, cut])
def test_every_file_of_a_run_may_be_damaged(whole, zygote, tmp_path, damage):
    home = tmp_path / "project"
    shutil.copytree(whole, home)
    run = home / "run"
    draw = np.random.default_rng(33)
    names = [
        *sorted(f.relative_to(run) for f in run.rglob("*") if f.is_file() and f.stat().st_size)
    ]
    assert {"run.json", "report.json", "measurements.sqlite", "bundle.zip"} <= set(map(str, names))
    # All files of one folder at a time; the record of a stage apart, because its damage hides that of the others.
    groups: dict[tuple[Path, bool], list[Path]] = {}
    for name in names:
        groups.setdefault((name.parent, name.name == "stage.json"), []).append(name)
    for group in groups.values():
        for name in group:
            (run / name).write_bytes(damage((run / name).read_bytes(), draw))
        (home / "log").unlink(missing_ok=True)
        assert zygote.run(home, *COMMAND) in (0, 6), (group, (home / "log").read_text())
        log = (home / "log").read_text()
        assert "Traceback" not in log, (group, log)
        if group[0].parts[0] == "stages" and not all(n.name.startswith(".") for n in group):
            assert "damaged and made again" in log, group
    for file in run.glob("*.bad"):
        file.unlink()
    check_same(whole / "run", run, is_damaged=True)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [bent, cut])
def test_resuming_a_run_whose_request_is_damaged_is_refused_in_one_line_or_goes_on(
    whole, zygote, tmp_path, damage
):
    home = tmp_path / "project"
    shutil.copytree(whole, home)
    again = tuple(x for x in COMMAND if x not in ("--run", "run"))
    good = (home / "run" / "run.json").read_bytes()
    draw = np.random.default_rng(7)
    for _ in range(4):
        (home / "run" / "run.json").write_bytes(damage(good, draw))
        (home / "log").unlink(missing_ok=True)
        code = zygote.run(home, *again, "--resume", "run")
        log = (home / "log").read_text()
        assert code in (0, 2, 6, 7), log
        assert "Traceback" not in log
        assert code in (0, 6) or sum(x.startswith("error: ") for x in log.splitlines()) == 1
