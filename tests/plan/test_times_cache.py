"""Kernel times that this computer keeps: of one board and set-up, at most a week old, and never in the way of a search."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import budgets
import compare
import predictor
import pytest
import tinynet
import walltime
from click.testing import CliRunner
from report_fixture import make_fingerprint, make_search_result

from edgeprune.pipeline.stages import kernels
from edgeprune.pipeline.stages.finish import boards_note
from edgeprune.plan.bench import Stand
from edgeprune.plan.latency import times_cache
from edgeprune.plan.latency.kernel_times import KernelTime, read_times, write_times
from edgeprune.plan.latency.table import LatencyTable
from edgeprune.plan.latency.times_cache import (
    MAX_AGE,
    SWITCH,
    TIME_FORMAT,
    TimesCache,
    now_text,
    open_cache,
)
from edgeprune.plan.measured import MeasuredTable
from edgeprune.records.formats import FormatName
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Precision
from edgeprune.records.target import Runtime
from edgeprune.report.search_page import render_search, render_search_html

BOARD = make_fingerprint()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache folder, with the cache on."""
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(**ns: float) -> tuple[KernelTime, ...]:
    return tuple(KernelTime(signature=s, widths=(8,), ns=value) for s, value in ns.items())


def ago(age: timedelta) -> str:
    return (datetime.now(timezone.utc) - age).strftime(TIME_FORMAT)


def opened(
    said: list[str],
    board: Fingerprint = BOARD,
    precision: Precision = "int8",
    form: FormatName = "onnx",
) -> TimesCache:
    found = open_cache(board, precision, form, said.append)
    assert found is not None
    return found


def test_every_board_set_up_precision_and_format_has_a_file_of_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = BOARD.model_copy(update={"governor": "powersave"})
    files = {
        opened([]).path,
        opened([], other).path,
        opened([], BOARD, "fp32").path,
        opened([], BOARD, "int8", "tflite").path,
    }
    assert len(files) == 4
    assert all(path.is_relative_to(cache / "edgeprune" / "kernel-times") for path in files)
    monkeypatch.setattr(times_cache, "VERSION", "9.9")
    assert opened([]).path not in files


def test_an_emulated_board_and_whoever_wants_none_have_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulated = BOARD.model_copy(update={"stamp": "emulated"})
    assert open_cache(emulated, "int8", "onnx", print) is None
    monkeypatch.setenv(SWITCH, "")
    assert open_cache(BOARD, "int8", "onnx", print) is not None
    monkeypatch.setenv(SWITCH, "1")
    assert open_cache(BOARD, "int8", "onnx", print) is None


def test_a_relative_cache_folder_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert opened([]).path.is_relative_to(tmp_path / "home" / ".cache" / "edgeprune")


def test_times_come_back_until_they_are_a_week_old() -> None:
    said: list[str] = []
    board = opened(said)
    assert board.read() is None
    board.keep(rows(conv=9.0), ago(MAX_AGE - timedelta(hours=1)))
    known = board.read()
    assert known is not None
    assert known.known() == {("conv", (8,)): 9.0}
    for age in (MAX_AGE + timedelta(hours=1), timedelta(hours=-1)):
        write_times(board.path, None, known.model_copy(update={"created": ago(age)}))
        assert board.read() is None
    board.keep(rows(add=7.0), now_text())  # takes the place of the old ones
    known = board.read()
    assert known is not None
    assert known.known() == {("add", (8,)): 7.0}
    assert said == []


def test_what_two_searches_timed_is_kept_with_the_date_of_the_older() -> None:
    said: list[str] = []
    board, older = opened(said), ago(timedelta(days=2))
    board.keep(rows(conv=9.0), older)
    board.keep(rows(conv=5.0, add=2.0), now_text())
    both = board.read()
    assert both is not None
    assert both.known() == {("conv", (8,)): 9.0, ("add", (8,)): 2.0}
    assert both.created == older
    assert said == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda text: text.replace("9.0", "-9.0"),
        lambda text: text.replace(BOARD.cpu_model, "Another"),
        lambda text: re.sub(r'"created": "[^"]*"', '"created": "yesterday"', text),
    ],
    ids=["cut off", "empty", "negative", "of another board", "no date"],
)
def test_a_damaged_file_is_said_in_one_line_and_made_anew(damage: Any) -> None:
    said: list[str] = []
    board = opened(said)
    board.keep(rows(conv=9.0), now_text())
    whole = board.path.read_text()
    board.path.write_text(damage(whole))
    assert board.path.read_text() != whole
    assert board.read() is None
    assert len(said) == 1
    assert "\n" not in said[0]
    assert "measured anew" in said[0]
    board.keep(rows(conv=7.0), now_text())
    again = board.read()
    assert again is not None
    assert again.known() == {("conv", (8,)): 7.0}
    assert len(said) == 1


def test_a_folder_that_cannot_be_used_is_said_and_fails_nothing(cache: Path) -> None:
    cache.write_text("a file")
    said: list[str] = []
    opened(said).keep(rows(conv=9.0), now_text())
    assert len(said) == 1
    assert "are not kept for later searches: cannot write" in said[0]


def aged(path: Path, age: timedelta, content: str = "{}") -> Path:
    """A file that was last written so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    then = (datetime.now(timezone.utc) - age).timestamp()
    os.utime(path, (then, then))
    return path


def test_files_that_are_too_old_for_any_search_are_removed_when_one_is_written() -> None:
    said: list[str] = []
    board = opened(said)
    root, name = board.path.parent.parent, "0123456789abcdef-tflite-int8.json"
    old, young = MAX_AGE + timedelta(hours=1), MAX_AGE - timedelta(hours=1)
    gone = [
        aged(board.path.parent / name, old),
        aged(root / "0.0.9" / name, old),
        aged(root / "0.0.8rc1" / name, old, "of a schema that nobody knows"),
    ]
    stays = [
        aged(board.path.parent / "fedcba9876543210-tflite-int8.json", young),
        aged(root / "0.0.9" / "fedcba9876543210-onnx-fp32.json", young),
        aged(root / "0.0.8rc1" / "notes.txt", old),
        aged(root / "mine" / name, old),
        aged(root / name, old),
        aged(root.parent / "0.0.9" / name, old),
    ]
    aged(root / "0.0.7" / name, old)
    board.keep(rows(conv=9.0), now_text())
    assert [path for path in gone if path.exists()] == []
    assert [path for path in stays if not path.exists()] == []
    assert not (root / "0.0.7").exists()  # a folder that nothing is left in
    assert board.path.exists()
    assert said == []


def test_what_a_link_leads_to_is_not_removed(tmp_path: Path) -> None:
    said: list[str] = []
    board = opened(said)
    root, name = board.path.parent.parent, "0123456789abcdef-tflite-int8.json"
    outside = aged(tmp_path / "outside" / name, MAX_AGE * 2)
    root.mkdir(parents=True)
    (root / "0.0.9").symlink_to(outside.parent, target_is_directory=True)
    (root / "0.0.8").mkdir()
    (root / "0.0.8" / name).symlink_to(outside)
    os.utime(root / "0.0.8" / name, (0, 0), follow_symlinks=False)
    board.keep(rows(conv=9.0), now_text())
    assert outside.exists()
    assert (root / "0.0.8" / name).is_symlink()
    assert said == []


def test_a_file_that_cannot_be_removed_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    board = opened(said)
    old = aged(board.path.parent.parent / "0.0.9" / board.path.name, MAX_AGE * 2)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == old:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    board.keep(rows(conv=9.0), now_text())
    assert old.exists()
    assert board.read() is not None
    assert said == []


def test_writers_at_once_never_leave_a_broken_file() -> None:
    said: list[str] = []
    board = opened(said)

    def write(name: str) -> None:
        for number in range(20):
            board.keep(rows(**{f"{name}{number}": 1.0}), now_text())
            board.read()

    writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert said == []
    known = board.read()
    assert known is not None
    assert known.times
    assert [p.name for p in board.path.parent.iterdir()] == [board.path.name]


def context_of(transport: str, **job: object) -> Any:
    device = SimpleNamespace(transport=transport)
    wanted = {"tables": None, "record": None, "device": device}
    return SimpleNamespace(
        job=SimpleNamespace(**{**wanted, **job}),
        board=SimpleNamespace(device=device),
        form=SimpleNamespace(info=SimpleNamespace(name="onnx")),
        fingerprint=lambda runtime: BOARD.model_copy(update={"threads": runtime.threads}),
        progress=SimpleNamespace(say=print),
    )


def test_times_that_are_recorded_replayed_or_kept_by_the_user_are_not_cached() -> None:
    runtime = Runtime(name="onnxruntime", threads=BOARD.threads)
    stand: Any = SimpleNamespace(runtime=runtime, kernel_runtime=None, precision="int8")
    for transport in ("local", "ssh"):
        used = kernels._times_cache(context_of(transport), stand)
        assert used is not None
        assert used.path == opened([]).path
    for other in (
        context_of("replay"),
        context_of("local", device=SimpleNamespace(transport="replay")),
        context_of("local", record=Path("x.epr")),
        context_of("local", tables=Path("times.json")),
    ):
        assert kernels._times_cache(other, stand) is None


class Bench:
    """A board whose kernels take what they are told, and the context of a run on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.boards = {"here": 2}
        self.stored = 0
        self.asked: list[dict[Any, float]] = []
        self.context = context_of("local")
        self.context.board.times_from_store = 0
        self.context.job.companions, self.context.groups = (), ((), ())
        self.context.job.target = SimpleNamespace(name="this-machine")
        self.context.progress = SimpleNamespace(say=self.said.append)
        self.stand = Stand(
            self.context.board, Runtime(name="onnxruntime", threads=BOARD.threads), "int8"
        )
        pool = SimpleNamespace(boards=self.boards, scales={})

        def open_pool(*_: object, runtime: str, **__: object) -> Any:
            # That of the fingerprint the times are kept under.
            assert runtime == self.stand.runtime.name
            return contextlib.nullcontext(pool)

        monkeypatch.setattr(kernels, "open_pool", open_pool)
        monkeypatch.setattr(kernels, "measure_table", self.measure_table)

    def measure_table(self, *_: object, known: dict[Any, float], **__: object) -> MeasuredTable:
        self.asked.append(dict(known))
        self.context.board.times_from_store += self.stored
        table = LatencyTable(fingerprint_key="f", precision="int8", format="onnx", kernels=())
        times = rows(**{"conv": 9.0, "add": 2.0, **{s: ns for (s, _), ns in known.items()}})
        return MeasuredTable(
            table=table, grids={}, staircases={}, kernels_measured=2, kernels_taken=len(known), times=times
        )  # fmt: skip

    def search(self) -> MeasuredTable:
        run: Any = SimpleNamespace(path=Path("run"))
        file: Any = None
        return kernels._measured_table(self.context, run, BOARD, self.stand, file, None)


def test_a_search_leaves_its_kernel_times_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    first = bench.search()
    assert (first.kernels_taken, bench.said) == (0, [])
    second = bench.search()
    assert bench.asked == [{}, {("conv", (8,)): 9.0, ("add", (8,)): 2.0}]
    day = first.times_created[:10]
    assert bench.said == [
        f"      2 of 2 kernel times from an earlier search on this board, {day};"
        " EDGEPRUNE_NO_CACHED_TIMES=1 times all anew"
    ]
    bench.context.job.tables = Path("times.json")  # named by the user: no variable turns that off
    monkeypatch.setattr(
        kernels, "read_times", lambda _: SimpleNamespace(
            created=day, times=(), check=lambda *_: None, known=lambda: {("conv", (8,)): 9.0}
        ),
    )  # fmt: skip
    bench.said.clear()
    bench.search()
    assert SWITCH not in " ".join(bench.said)
    assert "1 of 2 kernel times from an earlier search" in bench.said[-1]
    assert second.times_created == first.times_created
    assert boards_note(second) == (
        f"2 of 2 kernel times from an earlier search on this board, {day}",
    )


def test_times_of_two_boards_or_of_an_unknown_day_are_not_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.boards["other"] = 1
    bench.search()
    del bench.boards["other"]
    bench.stored = 1
    bench.search()
    assert not opened([]).path.exists()
    bench.stored = 0
    bench.search()
    assert opened([]).path.exists()


def test_a_report_tells_kernels_timed_now_from_earlier_ones() -> None:
    result = make_search_result()
    assert "184 kernel timings and" in " ".join(render_search(result).split())
    quality = result.latency_model.model_copy(update={"kernels_taken": 150})
    text = render_search(make_search_result(latency_model=quality))
    assert "184 kernel timings (150 by an earlier search) and" in " ".join(text.split())
    page = render_search_html(make_search_result(latency_model=quality)).decode()
    assert "184 (150 by an earlier search)" in page


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (walltime.main, ("--target", "nowhere")),
        (predictor.main, ("--shape", "wide", "--out", "none.json")),
        (budgets.main, ("--budgets", "fast")),
        (compare.main, ("--budgets", "fast")),
    ],
)
def test_benchmarks_time_every_kernel(
    command: Any, wrong: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "")  # so that it is put back
    assert CliRunner().invoke(command, wrong).exit_code != 0
    assert os.environ[SWITCH] == "1"
    assert open_cache(BOARD, "int8", "onnx", print) is None


def without(finished: Path, run: Path, *stages: str) -> None:
    """A run folder with all stages of another but these."""
    tinynet.copied_run(finished, run)
    for name, folder in tinynet.stage_folders(run).items():
        if name in stages:
            shutil.rmtree(folder)


@pytest.mark.slow
def test_a_second_search_on_the_same_board_takes_the_times_of_the_first(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tinynet.project(tmp_path / "project")
    monkeypatch.setenv(SWITCH, "1")  # other tests share this one, and whoever comes first makes it
    finished = tinynet.deployed(tmp_path_factory).folder
    monkeypatch.delenv(SWITCH)
    without(finished, home / "one", "kernels")
    without(finished, home / "two", "kernels", "nets", "plan")
    without(finished, home / "three", "kernels")
    args = ("search", "--target", "this-machine", "--latency", "80%", "--run")
    first = tinynet.edgeprune(home, *args, "one")
    assert first.returncode == 0, first.stderr
    assert "from an earlier search" not in first.stderr
    assert "by an earlier search" not in first.stdout
    (path,) = cache.rglob("*.json")
    kept = read_times(path)
    assert kept is not None
    second = tinynet.edgeprune(home, *args, "two")
    assert second.returncode == 0, second.stderr
    said = re.search(
        r"(\d+) of (\d+) kernel times from an earlier search on this board, ([-\d]+)", second.stderr
    )
    assert said is not None, second.stderr
    taken, measured = int(said[1]), int(said[2])
    assert 0 < taken <= measured
    assert said[3] == kept.created[:10]
    model = json.loads((home / "two" / "search.json").read_text())["latency_model"]
    assert (model["kernels_taken"], model["kernels_measured"]) == (taken, measured)
    assert f"({taken} by an earlier search)" in " ".join(second.stdout.split())
    known = read_times(path)
    assert known is not None
    assert known.known().items() >= kept.known().items()
    third = tinynet.edgeprune(home, *args, "three", **{SWITCH: "1"})
    assert third.returncode == 0, third.stderr
    assert "from an earlier search" not in third.stderr
    assert read_times(path) == known
    assert now_text()[:10] >= known.created[:10]
