"""Kernel times in a file: kept, added to, and never taken for those of another board or set-up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinynet
from report_fixture import make_fingerprint

from edgeprune.errors import IntegrityError, SpecError
from edgeprune.pipeline.stages import kernels
from edgeprune.plan.latency.kernel_times import KernelTime, KernelTimes, read_times, write_times

NEW = KernelTimes(
    created="2026-11-24T10:00:00Z",
    fingerprint=make_fingerprint(),
    precision="int8",
    format="onnx",
    times=(),
)


def with_times(times: dict[tuple[str, tuple[int, ...]], float]) -> KernelTimes:
    rows = tuple(KernelTime(signature=s, widths=w, ns=ns) for (s, w), ns in times.items())
    return NEW.model_copy(update={"times": rows})


def test_times_come_back_and_earlier_ones_stand(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert read_times(path) is None
    write_times(path, None, with_times({("conv", (8, 16)): 120.5, ("dw", (8,)): 40.0}))
    first = read_times(path)
    assert first is not None
    assert first.known() == {("conv", (8, 16)): 120.5, ("dw", (8,)): 40.0}
    later = with_times({("conv", (8, 16)): 999.0, ("conv", (8, 8)): 60.0})
    write_times(path, first, later.model_copy(update={"created": "2027-01-01T00:00:00Z"}))
    second = read_times(path)
    assert second is not None
    assert second.known()["conv", (8, 16)] == 120.5
    assert second.known()["conv", (8, 8)] == 60.0
    assert second.created == "2026-11-24T10:00:00Z"
    older = later.model_copy(update={"created": "2026-01-01T00:00:00Z"})
    write_times(path, second, older)
    third = read_times(path)
    assert third is not None
    assert third.created == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hostname_digest": "0" * 16}, "hostname digest"),
        ({"cpu_model": "Raspberry Pi 5"}, "their cpu model is Example Xeon 2.1 GHz, and here it is Raspberry Pi 5"),
        ({"cpu_flags": ("avx2",)}, "their cpu flags are others"),
        ({"runtime_version": "9.9"}, "runtime version"),
        ({"threads": 4}, "threads"),
        ({"governor": "powersave"}, "governor"),
    ],
)  # fmt: skip
def test_times_of_another_board_or_set_up_are_refused(change: dict[str, Any], says: str) -> None:
    path = Path("times.json")
    with pytest.raises(SpecError, match="of another board or set-up") as caught:
        NEW.check(make_fingerprint().model_copy(update=change), "int8", "onnx", path)
    assert says in caught.value.message
    NEW.check(make_fingerprint().model_copy(update={"device": "renamed"}), "int8", "onnx", path)


def test_times_of_another_precision_or_format_are_refused() -> None:
    with pytest.raises(SpecError, match="their precision is int8, and here it is fp32"):
        NEW.check(make_fingerprint(), "fp32", "onnx", Path("times.json"))
    with pytest.raises(SpecError, match="their format is onnx, and here it is tflite"):
        NEW.check(make_fingerprint(), "int8", "tflite", Path("times.json"))


@pytest.mark.parametrize("ns", ["0.0", "-1.0", "NaN"])
def test_what_is_no_file_of_times_is_refused(tmp_path: Path, ns: str) -> None:
    path = tmp_path / "times.json"
    path.write_text("{}")
    with pytest.raises(IntegrityError):
        read_times(path)
    write_times(path, None, with_times({("conv", (8,)): 987.5}))
    path.write_text(path.read_text().replace("987.5", ns))
    with pytest.raises(IntegrityError, match=r"times\.0\.ns|Invalid JSON"):
        read_times(path)


def test_times_that_other_boards_took_are_not_written(tmp_path: Path) -> None:
    path, said = tmp_path / "times.json", []  # type: ignore[var-annotated]
    job = SimpleNamespace(tables=path, target=SimpleNamespace(format="onnx"))
    context = SimpleNamespace(
        job=job,
        progress=SimpleNamespace(say=said.append),
        form=SimpleNamespace(info=SimpleNamespace(name="onnx")),
    )
    made_on = make_fingerprint()
    times = with_times({("conv", (8,)): 9.0}).times
    shared = SimpleNamespace(boards={"one": 3, "two": 4}, times=times, times_created="")
    kernels._share_times(context, made_on, "int8", shared)  # type: ignore[arg-type]
    assert not path.exists()
    assert "times of two boards are never mixed" in said[0]
    when = "2026-11-01T00:00:00Z"  # the stage may be an old one of the run folder
    alone = SimpleNamespace(boards={"one": 7}, times=times, times_created=when)
    kernels._share_times(context, made_on, "int8", alone)  # type: ignore[arg-type]
    found = read_times(path)
    assert found is not None
    assert found.known() == {("conv", (8,)): 9.0}
    assert found.created == when


@pytest.mark.slow
def test_a_second_search_of_the_same_board_takes_the_times_of_the_first(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tinynet.project(tmp_path / "project")
    finished = tinynet.deployed(tmp_path_factory).folder
    for name in ("one", "two"):
        tinynet.copied_run(finished, home / name)
        for stage in (home / name / "stages").glob("kernels-*"):
            for path in stage.iterdir():
                path.unlink()
            stage.rmdir()
    args = ("search", "--target", "this-machine", "--latency", "80%", "--tables", "times.json")
    first = tinynet.edgeprune(home, *args, "--run", "one")
    assert first.returncode == 0, first.stderr
    assert "are taken from" not in first.stderr
    times = json.loads((home / "times.json").read_text())["times"]
    second = tinynet.edgeprune(home, *args, "--run", "two")
    assert second.returncode == 0, second.stderr
    assert f"{len(times)} kernel times of" in second.stderr
    assert json.loads((home / "times.json").read_text())["times"] == times
    both = tinynet.edgeprune(home, *args, "--record", "x.epr")
    assert both.returncode == 2
    assert "cannot be combined" in both.stderr
