"""Stages on disk: kept when whole, made again when not, never shared by two processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repo import REPO

from edgeprune.errors import SpecError
from edgeprune.pipeline.run_folder import RunFolder, Stage
from edgeprune.progress import Silent
from edgeprune.records.base import Record
from edgeprune.records.files import write_bytes


class Answer(Record):
    """The result of the stage under test."""

    text: str


class Told(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class Work:
    """A stage that writes a file and counts how often it ran."""

    def __init__(self, text: str = "done") -> None:
        self.text, self.runs = text, 0

    def __call__(self, folder: Path) -> Answer:
        self.runs += 1
        write_bytes(folder / "weights.bin", self.text.encode())
        return Answer(text=self.text)


def run(
    path: Path, work: Callable[[Path], Answer], inputs: dict[str, object] | None = None
) -> Stage[Answer]:
    with RunFolder(path, Silent()) as folder:
        return folder.stage("probe", "other", inputs or {"seed": 1}, Answer, work)


def test_a_stage_runs_once_for_the_same_inputs(tmp_path):
    work = Work()
    first, second = run(tmp_path, work), run(tmp_path, work)
    assert work.runs == 1
    assert first.result == second.result == Answer(text="done")
    assert first.digest == second.digest
    assert second.path("weights.bin").read_bytes() == b"done"


def test_other_inputs_are_another_stage(tmp_path):
    work = Work()
    first, second = run(tmp_path, work, {"seed": 1}), run(tmp_path, work, {"seed": 2})
    assert work.runs == 2
    assert first.folder != second.folder


def test_the_order_of_the_inputs_does_not_matter(tmp_path):
    work = Work()
    run(tmp_path, work, {"a": 1, "b": 2})
    run(tmp_path, work, {"b": 2, "a": 1})
    assert work.runs == 1


def test_a_stage_that_fails_is_not_kept(tmp_path):
    def fail(folder: Path) -> Answer:
        write_bytes(folder / "weights.bin", b"half")
        raise SpecError("no")

    with pytest.raises(SpecError):
        run(tmp_path, fail)
    work = Work()
    assert run(tmp_path, work).result.text == "done"
    assert work.runs == 1


def test_what_an_unfinished_stage_left_is_there_for_the_next_attempt(tmp_path):
    def stop(folder: Path) -> Answer:
        write_bytes(folder / ".checkpoint", b"epoch 3")
        raise KeyboardInterrupt

    def go_on(folder: Path) -> Answer:
        return Answer(text=(folder / ".checkpoint").read_text())

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    assert run(tmp_path, go_on).result.text == "epoch 3"


def test_hidden_files_are_no_result(tmp_path):
    def work(folder: Path) -> Answer:
        write_bytes(folder / ".checkpoint", b"state")
        return Answer(text="done")

    stage = run(tmp_path, work)
    (stage.folder / ".checkpoint").unlink()
    again = Work("again")
    assert run(tmp_path, again).result.text == "done"
    assert again.runs == 0


def test_a_result_that_is_not_final_is_used_now_and_made_again_next_time(tmp_path):
    work = Work("interrupted")
    for _ in range(2):
        with RunFolder(tmp_path, Silent()) as folder:
            stage = folder.stage(
                "probe", "training", {}, Answer, work, final=lambda r: r.text != "interrupted"
            )
            assert stage.result.text == "interrupted"
    assert work.runs == 2


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def answer_with_another_type(path: Path) -> None:
    record = json.loads(path.read_text())
    record["result"]["text"] = 7
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("weights.bin", flip_a_byte),
        ("weights.bin", empty),
        ("weights.bin", Path.unlink),
        ("stage.json", empty),
        ("stage.json", cut_in_half),
        ("stage.json", answer_with_another_type),
    ],
)
def test_a_damaged_result_is_made_again_and_noted(tmp_path, file, damage):
    work = Work()
    damage(run(tmp_path, work).folder / file)
    told = Told()
    with RunFolder(tmp_path, told) as folder:
        stage = folder.stage("probe", "other", {"seed": 1}, Answer, work)
        assert len(folder.notes) == 1
        assert "damaged and made again" in folder.notes[0]
        assert "\n" not in folder.notes[0]
        assert told.lines == [f"  {folder.notes[0]}"]
    assert work.runs == 2
    assert stage.path("weights.bin").read_bytes() == b"done"


def test_the_record_of_another_stage_is_not_taken(tmp_path):
    work = Work()
    other = run(tmp_path, work, {"seed": 2}).folder / "stage.json"
    mine = run(tmp_path, work, {"seed": 1}).folder / "stage.json"
    mine.write_bytes(other.read_bytes())
    run(tmp_path, work, {"seed": 1})
    assert work.runs == 3


def test_what_is_kept_counts_with_its_first_time_and_is_said(tmp_path):
    run(tmp_path, Work())
    told = Told()
    with RunFolder(tmp_path, told) as folder:
        folder.stage("probe", "other", {"seed": 1}, Answer, Work())
        with folder.timed("closing", "other"):
            pass
        costs = folder.costs
    assert [(c.name, c.cached) for c in costs] == [("probe", True), ("closing", False)]
    assert told.lines == ["  probe: done earlier, kept"]


@contextlib.contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    code = (
        "import sys; from pathlib import Path; from edgeprune.progress import Silent;"
        "from edgeprune.pipeline.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1]), Silent()): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield
    holder.communicate()


def test_two_processes_never_share_a_run_folder(tmp_path):
    with held_by_another_process(tmp_path), pytest.raises(SpecError, match="another edgeprune"):
        RunFolder(tmp_path, Silent()).__enter__()
    with RunFolder(tmp_path, Silent()):  # and it is free again
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot use the run folder"):
        RunFolder(tmp_path / "file" / "run", Silent()).__enter__()
