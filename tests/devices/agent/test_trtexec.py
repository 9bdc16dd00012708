"""trtexec: arguments with which every version times alike, and its output read whatever the version."""

import math
import stat

import pytest
import yaml
from repo import REPO

from edgeprune.devices.agent import trtexec
from edgeprune.devices.agent.wire import Refused

OUTPUT = REPO / "tests/fixtures/trtexec"
PUBLIC = OUTPUT / "public"
FACTS = yaml.safe_load((PUBLIC / "facts.yaml").read_text())


def parsed(name):
    return trtexec.parse((OUTPUT / f"{name}.txt").read_text())


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("8.5-unstable", (8, 5, 2)),
        ("8.6", (8, 6, 2)),
        ("10.3", (10, 3, 0)),
    ],
)
def test_the_summary_of_every_version_is_read(name, version):
    found = parsed(name)
    assert (found["version"], found["passed"], found["error"]) == (version, True, "")
    assert found["throughput_qps"] == 1103.46
    compute = found["times"]["gpu_compute_time"]
    assert (compute["median"], compute["p90"], compute["p99"]) == (0.854492, 0.894531, 1.0625)
    assert "h2d_latency" in found["times"]


def test_every_public_output_has_its_source_and_its_facts():
    files = {path.stem: path.read_text().splitlines()[0] for path in PUBLIC.glob("*.txt")}
    assert files == {name: f"# source: {found['source']}" for name, found in FACTS.items()}
    assert len({(found.get("version") or [0])[0] for found in FACTS.values()} - {0}) == 3


@pytest.mark.parametrize("name", FACTS)
def test_public_outputs_of_real_runs_are_read_whole(name):
    wanted = FACTS[name]
    found = trtexec.parse((PUBLIC / f"{name}.txt").read_text())
    assert found["version"] == (tuple(wanted["version"]) if "version" in wanted else None)
    assert found["passed"] == wanted.get("passed", False)
    assert found["throughput_qps"] == wanted.get("throughput_qps")
    assert found["times"] == wanted.get("times", {})
    assert found["error"] == wanted.get("error", "")
    assert found["cv_ratio"] == pytest.approx(wanted.get("cv_percent", 0) / 100 or None)
    assert bool(trtexec.notes_of(found)) == wanted.get("noted", False)


@pytest.mark.parametrize(
    ("digits", "version"),
    [
        ("8001", (8, 0, 1)), ("8205", (8, 2, 5)), ("8502", (8, 5, 2)), ("8611", (8, 6, 11)),
        ("100001", (10, 0, 1)), ("101602", (10, 16, 2)), ("110000", (11, 0, 0)),
    ],
)  # fmt: skip
def test_the_number_in_a_banner_is_a_version(digits, version):
    assert trtexec.version_of(digits) == version


def test_a_newer_trtexec_calls_deprecated_what_older_ones_are_told():
    text = (PUBLIC / "11.0.0-server.txt").read_text()
    told = set(trtexec.timing_flags(10)) - set(trtexec.timing_flags(11))
    assert told == {flag for flag in told if f"[W] {flag} is deprecated" in text}


def test_an_unstable_time_is_said_with_both_numbers():
    found = parsed("8.5-unstable")
    assert math.isclose(found["cv_ratio"], 0.0481233)
    (note,) = trtexec.notes_of(found)
    assert "varies by 4.8 % (over 2.5 %)" in note
    assert trtexec.notes_of(parsed("8.6")) == []


def test_the_first_error_is_the_one_that_is_told():
    assert "OutOfMemory" in parsed("8.5-out-of-memory")["error"]
    told = parsed("10.3-unknown-operator")["error"]
    assert 'While parsing node number 4 [MysteryOp -> "odd"]:' in told
    assert not parsed("10.3-unknown-operator")["passed"]


def test_what_the_onnx_parser_says_of_a_node_is_told_behind_the_node():
    told = parsed("10.3-unknown-operator")["error"]
    assert told.endswith(": [6] Invalid Node - /odd there is no importer for this operator")


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
