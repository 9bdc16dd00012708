"""trtexec: arguments with which every version times alike, and its output read whatever the version."""

import math
import stat
from pathlib import Path

import pytest

from edgeprune.devices.agent import trtexec
from edgeprune.devices.agent.wire import Refused

OUTPUT = Path(__file__).with_name("trtexec")


def parsed(name):
    return trtexec.parse((OUTPUT / f"{name}.txt").read_text())


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("8.5-unstable", (8, 5, 2)),
        ("8.6", (8, 6, 2)),
        ("10.3", (10, 3, 0)),
        ("11.0", (11, 0, 0)),
    ],
)
def test_the_summary_of_every_version_is_read(name, version):
    found = parsed(name)
    assert (found["version"], found["passed"], found["error"]) == (version, True, "")
    assert found["throughput_qps"] == 1103.46
    compute = found["times"]["gpu_compute_time"]
    assert (compute["median"], compute["p90"], compute["p99"]) == (0.854492, 0.894531, 1.0625)
    assert ("h2d_latency" in found["times"]) == (version < (11,))


def test_an_unstable_time_is_said_with_both_numbers():
    found = parsed("8.5-unstable")
    assert math.isclose(found["cv_ratio"], 0.0481233)
    (note,) = trtexec.notes_of(found)
    assert "varies by 4.8 % (over 2.5 %)" in note
    assert trtexec.notes_of(parsed("8.6")) == []


def test_the_first_error_is_the_one_that_is_told():
    assert "OutOfMemory" in parsed("8.5-out-of-memory")["error"]
    assert "MysteryOp" in parsed("10.3-unknown-operator")["error"]
    assert not parsed("10.3-unknown-operator")["passed"]


def test_what_is_no_number_is_left_out():
    line = "[x] [I] GPU Compute Time: min = nan ms, max = inf ms, mean = 1.5 ms, median = 1.25 ms"
    assert trtexec.parse(line)["times"] == {"gpu_compute_time": {"mean": 1.5, "median": 1.25}}
    assert trtexec.parse("")["times"] == {}
    assert trtexec.parse("")["version"] is None


def test_older_versions_are_told_to_time_as_the_newest_does():
    old, new = trtexec.timing_flags(8), trtexec.timing_flags(11)
    assert set(old) - set(new) == {"--useSpinWait", "--useCudaGraph", "--noDataTransfers"}
    assert set(new) < set(old)
    assert trtexec.timing_flags(10) == old


def test_the_arguments_are_a_list_with_a_workspace_in_mebibytes():
    common = {
        "workspace_bytes": 300 << 20,
        "timing_cache": "/c",
        "sparse": True,
        "timed": False,
    }
    older = trtexec.build_arguments(
        "trtexec", "/m;rm -rf x", "/e", "mixed", version=(8, 5, 2), **common
    )
    newer = trtexec.build_arguments("trtexec", "/m", "/e", "fp32", version=(8, 6, 1), **common)
    assert older[1] == "--onnx=/m;rm -rf x"  # one argument; no shell reads it
    assert {"--memPoolSize=workspace:300", "--int8", "--fp16", "--sparsity=enable"} < set(older)
    assert older[-1] == "--buildOnly"
    assert newer[-1] == "--skipInference"
    assert not {"--int8", "--fp16"} & set(newer)


def program(folder, text):
    path = folder / "trtexec"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return [str(path)]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (f"cat '{OUTPUT}/8.5-out-of-memory.txt'; exit 1", "memory", "ran out of memory: Error"),
        ("kill -9 $$", "memory", "ran out of memory"),
        (f"cat '{OUTPUT}/10.3-unknown-operator.txt'; exit 1", "load", "ended with code 1.*MysteryOp"),
        ("kill -11 $$", "load", "died of signal 11"),
        ("exit 0", "load", "ended with code 0"),  # without its PASSED line nothing is believed
        ("sleep 9", "timeout", "took over 1 s"),
    ],
)  # fmt: skip
def test_a_build_that_fails_says_how(tmp_path, text, kind, words):
    with pytest.raises(Refused, match=words) as caught:
        trtexec.run(program(tmp_path, text), 1.0)
    assert caught.value.kind == kind


def test_a_program_that_is_not_there_is_a_runtime_that_is_not_there():
    with pytest.raises(Refused, match="cannot run /nowhere/trtexec") as caught:
        trtexec.run(["/nowhere/trtexec"], 1.0)
    assert caught.value.kind == "runtime"
