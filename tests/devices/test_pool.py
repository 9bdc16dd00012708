"""Several boards time kernels together: work is spread, results are the primary's, and a board that fails or drifts gives its work back."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fakeagent import HELLO, fake_device
from hypothesis import given
from hypothesis import strategies as st
from sshd import free_port, matmul_file, script, serve, wait_until_gone

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.inventory import quarantine
from edgeprune.devices.plans import Timing, TimingPlan
from edgeprune.devices.timing.companions import (
    LIMITS,
    MIN_SHARED,
    REFERENCE_FILES,
    Limits,
    check_drift,
    differences,
    reference_names,
    scale_of,
    series,
)
from edgeprune.devices.timing.pool import Pool, open_pool
from edgeprune.errors import DeviceError, LinkLost, Unreliable
from edgeprune.pipeline.stages.finish import boards_note
from edgeprune.plan.bench import Stand
from edgeprune.plan.latency.table import LatencyTable
from edgeprune.plan.measured import MeasuredTable
from edgeprune.progress import Bar, Silent
from edgeprune.records.device import Device
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.target import Runtime

QUICK = TimingPlan(rounds=4, block_ms=0.2, min_runs=2, max_runs=4, warmup_ms=0.5)
ORT = {"runtime": "onnxruntime", "threads": 1}
ANYTHING = Limits(spread_ratio=1e9, off_ratio=1e9, drift_ratio=1e9)  # this machine is shared

# Answers of a fake board. ``TIMED`` counts its timings, the reference included; a kernel's number fixes its time.
PRELUDE = """
import os
USUAL["hello"].update({hello!r})
TIMED = 0
TENSOR = {{"name": "x", "shape": [1], "dtype": "float32"}}
LOADED = {{"load_ns": 1000, "first_ns": 1000, "inputs": [TENSOR], "outputs": [TENSOR]}}
MOMENT = {{}}

def answer(request, head):
    global TIMED
    op = request["op"]
    if op == "runtime":
        return dict(head, version="1.0"), b""
    if op == "load_many":
        models = {{key: LOADED if {loads} else {{"error": "no"}} for key in request["keys"]}}
        return dict(head, models=models), b""
    assert op == "time", op
    TIMED += 1
    {event}
    with open({log!r}, "a") as log:
        print(*request["keys"], file=log)
    blocks = {{}}
    for key in request["keys"]:
        number = int(key)
        ns = round((2000 + 100 * number) * ({factor}))
        blocks[key] = [
            {{"round": i, "calls_per_sample": 1, "samples_ns": [ns] * request["min_runs"]}}
            for i in range(request["rounds"])
        ]
    time.sleep({sleep_s})
    return dict(
        head, blocks=blocks, before=MOMENT, after=MOMENT, peak_memory_bytes={{}},
        stop_reason="rounds", notes=[],
    ), b""
"""
FILES = {str(i): b"%d" % i * (i + 1) for i in range(120)}
EXACT = {name: 2000.0 + 100 * int(name) for name in FILES}


class Ear(Silent):
    """Progress that remembers, and calls back on every step of a bar."""

    def __init__(self, on_step: Callable[[str], None] = lambda _: None) -> None:
        self.said: list[str] = []
        self.steps = 0.0
        self._on_step = on_step

    @contextlib.contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        yield self

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.steps += steps
        self._on_step(note)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@dataclasses.dataclass
class Desk:
    """Fake boards in a folder; the primary is slower, so that companions get work whatever else runs here."""

    folder: Path
    ear: Ear = dataclasses.field(default_factory=Ear)

    def device(
        self,
        name: str,
        *,
        factor: str = "1",
        event: str = "pass",
        loads: str = "True",
        sleep_s: float = 0.02,
        **hello: object,
    ) -> Device:
        (self.folder / name).mkdir()
        log = str(self.folder / name / "log")
        prelude = PRELUDE.format(
            factor=factor, event=event, loads=loads, log=log, sleep_s=sleep_s, hello=hello
        )
        return fake_device(self.folder / name, "answer(request, head)", prelude)

    @contextlib.contextmanager
    def pool(self, **companions: Device) -> Iterator[Pool]:
        with (
            open_board("main", self.device("main", sleep_s=0.15), backoff_s=()) as primary,
            self.around(primary, **companions) as pool,
        ):
            yield pool

    @contextlib.contextmanager
    def around(
        self, primary: Board, *, limits: Limits = LIMITS, **companions: Device
    ) -> Iterator[Pool]:
        with open_pool(
            primary,
            tuple(companions.items()),
            **ORT,
            job="test",
            say=self.ear.say,
            backoff_s=(),
            limits=limits,
        ) as pool:
            yield pool

    def timed(self, *names: str) -> list[str]:
        """Kernels that these boards have timed, each as often as it was timed."""
        return [key for name in names for key in (self.folder / name / "log").read_text().split()]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def kernels(desk: Desk, pool: Pool) -> dict[str, float]:
    return pool.time_kernels(FILES, progress=desk.ear, plan=QUICK)


def test_work_is_spread_and_every_time_is_as_the_primary_would_give_it(desk):
    slow, fast = desk.device("slow", factor="1.1"), desk.device("fast", factor="0.9")
    with desk.pool(slow=slow, fast=fast) as pool:
        found = kernels(desk, pool)
    assert list(found) == list(FILES)
    assert found == pytest.approx(EXACT, rel=1e-3)
    assert set(pool.boards) == {"main", "slow", "fast"}
    assert sum(pool.boards.values()) == len(FILES) == desk.ear.steps
    assert pool.scales == pytest.approx({"slow": 1 / 1.1, "fast": 1 / 0.9}, rel=1e-3)
    reference = set(reference_names(FILES))
    others = [key for key in desk.timed("main", "slow", "fast") if key not in reference]
    assert sorted(others) == sorted(FILES.keys() - reference)  # each once, on one board
    assert desk.ear.said == ["slow, fast time kernels together with main"]


def test_a_second_call_is_calibrated_anew_and_counts_on(desk):
    flag = desk.folder / "flag"
    other = desk.device("other", factor=f"1.2 if os.path.exists({str(flag)!r}) else 1")
    with desk.pool(other=other) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
        assert pool.scales == {"other": 1.0}
        flag.touch()
        assert kernels(desk, pool) == pytest.approx(EXACT, rel=1e-3)
    assert pool.scales == pytest.approx({"other": 1 / 1.2}, rel=1e-3)
    assert sum(pool.boards.values()) == 2 * len(FILES)


def test_a_board_that_dies_in_a_chunk_gives_it_back(desk):
    doomed = desk.device("doomed", event="TIMED == 3 and os.kill(os.getpid(), 9)")
    with desk.pool(doomed=doomed, steady=desk.device("steady")) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
        assert pool.companions == ("steady",)
        assert kernels(desk, pool) == pytest.approx(EXACT)
    # What it had finished before the link broke counts; its second chunk was timed by the others.
    assert 0 < pool.boards["doomed"] < 30
    assert sum(pool.boards.values()) == 2 * len(FILES) == desk.ear.steps
    (line,) = desk.ear.said[1:]
    assert line.startswith("doomed leaves, its work moves: ")
    assert quarantine.entries() == {}


def test_a_board_whose_times_scatter_is_quarantined_and_nothing_of_it_counts(desk):
    with desk.pool(noisy=desk.device("noisy", factor="0.85 + 0.3 * (number % 7) / 6")) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
        assert pool.companions == ()
        assert kernels(desk, pool) == pytest.approx(EXACT)
    assert pool.boards == {"main": 2 * len(FILES)}
    assert pool.scales == {}
    assert desk.timed("noisy") == list(reference_names(FILES))
    assert "spread by" in (quarantine.reason("noisy") or "")
    assert desk.ear.said[-1].startswith("noisy is quarantined, its work moves: ")


def test_a_board_that_is_a_quarter_off_is_quarantined(desk):
    with desk.pool(slow=desk.device("slow", factor="1.3")) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
    assert pool.boards == {"main": len(FILES)}
    assert "its times are 1.30 of those" in (quarantine.reason("slow") or "")


def test_a_board_that_drifts_while_it_works_is_quarantined_and_its_work_moves(desk):
    with desk.pool(warm=desk.device("warm", factor="1 if TIMED == 1 else 1.08")) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
    assert len(desk.timed("warm")) > 2 * REFERENCE_FILES  # it had work
    assert pool.boards == {"main": len(FILES)}
    assert desk.ear.steps == len(FILES)
    assert "changed by +8.0% while it worked" in (quarantine.reason("warm") or "")


def test_a_board_that_answers_something_implausible_is_quarantined(desk):
    liar = desk.device("liar", factor="-1 if TIMED == 2 else 1")
    with desk.pool(liar=liar) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
    assert pool.boards == {"main": len(FILES)}
    assert "wrong blocks" in (quarantine.reason("liar") or "")


def test_a_quarantine_that_cannot_be_written_does_not_end_the_run(desk, monkeypatch):
    blocked = desk.folder / "blocked"
    blocked.write_text("a file where a folder belongs")
    with desk.pool(slow=desk.device("slow", factor="1.3")) as pool:
        monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
        assert kernels(desk, pool) == pytest.approx(EXACT)
    assert "not remembered" in desk.ear.said[-1]


def test_what_does_not_load_on_a_companion_is_for_the_primary_to_judge(desk):
    loads = f"key in {reference_names(FILES)!r}"
    with desk.pool(picky=desk.device("picky", loads=loads)) as pool:
        assert kernels(desk, pool) == pytest.approx(EXACT)
    assert pool.boards == {"main": len(FILES)}
    assert desk.ear.steps == len(FILES)
    assert len(desk.ear.said) == 1  # it loads on the primary, so there is nothing to tell


def test_what_does_not_load_anywhere_is_named_once_and_left_out(desk):
    bad = "int(key) != 7"
    primary = desk.device("main", loads=bad, sleep_s=0.15)
    with (
        open_board("main", primary) as board,
        desk.around(board, other=desk.device("other", loads=bad)) as pool,
    ):
        found = kernels(desk, pool)
    assert found.keys() == FILES.keys() - {"7"}
    assert [line for line in desk.ear.said if "load" in line] == [
        "7 does not load on device 'main': no"
    ]


def test_kernels_none_of_which_loads_are_an_error_with_several_boards_too(desk):
    primary = desk.device("main", loads="False")
    with (
        open_board("main", primary) as board,
        desk.around(board, other=desk.device("other", loads="False")) as pool,
        pytest.raises(DeviceError, match=r"no kernel could be timed: .* does not load on .*'main'"),
    ):
        kernels(desk, pool)


@pytest.mark.parametrize("at", [1, 2])
def test_a_primary_that_fails_ends_the_call_with_its_error(desk, at):
    primary = desk.device("main", event=f"TIMED == {at} and sys.exit('no more power')")
    with (
        open_board("main", primary, backoff_s=()) as board,
        desk.around(board, other=desk.device("other")) as pool,
        pytest.raises(LinkLost, match="no more power"),
    ):
        kernels(desk, pool)
    assert quarantine.entries() == {}


def test_a_fault_of_the_program_in_a_thread_is_not_swallowed(desk, monkeypatch):
    with desk.pool(other=desk.device("other")) as pool:
        monkeypatch.setattr("edgeprune.devices.timing.pool.scale_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kernels(desk, pool)


def test_few_kernels_are_timed_on_the_primary_alone(desk):
    few = dict(list(FILES.items())[: 2 * REFERENCE_FILES - 1])
    with desk.pool(other=desk.device("other")) as pool:
        found = pool.time_kernels(few, progress=desk.ear, plan=QUICK)
    assert found == pytest.approx({name: EXACT[name] for name in few})
    assert pool.boards == {"main": len(few)}
    assert not (desk.folder / "other" / "log").exists()


def test_boards_that_cannot_help_are_left_out_with_the_reason(desk):
    quarantine.put("distrusted", "its clock jumps")
    facts = {"transport": "local", "targets": (), "stand_in": True, "python": sys.executable}
    busy = Device(**facts, lease_file=str(desk.folder / "lease"))
    nowhere = Device(
        transport="ssh",
        targets=(),
        host="127.0.0.1",
        port=free_port(),
        user="nobody",
        auth={"method": "key", "key_file": str(desk.folder / "key")},
        host_key={"sha256": "SHA256:" + "A" * 43},
    )
    with (
        open_board("holder", busy, job="other work"),
        desk.pool(
            distrusted=desk.device("distrusted"),
            busy=busy,
            nowhere=nowhere,
            newer=desk.device("newer", cpu_model="Raspberry Pi 5 Model B Rev 1.0"),
        ) as pool,
    ):
        assert pool.companions == ()
        assert kernels(desk, pool) == pytest.approx(EXACT)
    said = {line.split()[0]: line for line in desk.ear.said}
    assert set(said) == {"distrusted", "busy", "nowhere", "newer"}
    assert said["distrusted"].endswith("does not take part: it is in quarantine: its clock jumps")
    assert "is held by" in said["busy"]
    assert "other work" in said["busy"]
    assert "127.0.0.1" in said["nowhere"]
    assert "cpu Raspberry Pi 5 Model B Rev 1.0, not Raspberry Pi 4" in said["newer"]


def test_companions_are_free_again_when_the_pool_is_closed(desk):
    lease = str(desk.folder / "lease")
    here = Device(transport="local", targets=(), stand_in=True)
    other = here.model_copy(update={"lease_file": lease})
    with open_board("here", here) as primary:
        with desk.around(primary, other=other) as pool:
            assert pool.companions == ("other",)
            with pytest.raises(DeviceError, match="is held by"):
                open_board("other", other)
        open_board("other", other).close()


def onnx_files(count: int) -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    return {
        f"kernel-{i}": matmul_file(draw.standard_normal((4 + i, 3)).astype(np.float32))
        for i in range(count)
    }


def meet(barrier: threading.Barrier, *boards: Board) -> None:
    """Let every board wait for the others at its first chunk after the reference, so that each has work."""

    def patient(board: Board) -> Callable[..., Timing]:
        calls, timing = itertools.count(), board.time

        def time(keys: Sequence[str], plan: TimingPlan, *, purpose: str = "") -> Timing:
            if next(calls) == 1:
                barrier.wait(60)
            return timing(keys, plan, purpose=purpose)

        return time

    for board in boards:
        board.time = patient(board)  # type: ignore[method-assign]


def test_three_real_boards_time_each_file_once(desk):
    files = onnx_files(60)
    with ExitStack() as stack:
        remote = {}
        for name in ("one", "two"):
            (desk.folder / name).mkdir()
            remote[name] = stack.enter_context(serve(desk.folder / name)).device()
        here = Device(transport="local", targets=(), stand_in=True)
        primary = stack.enter_context(open_board("here", here))
        pool = stack.enter_context(desk.around(primary, limits=ANYTHING, **remote))
        meet(threading.Barrier(3), primary, *pool._companions)
        found = pool.time_kernels(files, progress=desk.ear, plan=QUICK)
    assert list(found) == list(files)
    assert all(0 < ns < 1e9 for ns in found.values())
    assert sum(pool.boards.values()) == len(files) == desk.ear.steps
    assert set(pool.boards) == {"here", "one", "two"}
    assert set(pool.scales) == {"one", "two"}
    assert quarantine.entries() == {}


def test_a_real_agent_that_is_killed_at_work_loses_nothing(desk):
    pid_file = desk.folder / "agents"
    text = f'#!/bin/sh\necho $$ >>{pid_file}\nexec {sys.executable} "$@"\n'
    files = onnx_files(80)
    killed: list[int] = []

    def kill(note: str) -> None:
        if note == "doomed" and not killed:
            killed.append(int(pid_file.read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)

    desk.ear = Ear(kill)
    with serve(desk.folder) as server:
        python = script(desk.folder / "python-there", text)
        here = Device(transport="local", targets=(), stand_in=True)
        with (
            open_board("here", here) as primary,
            desk.around(primary, limits=ANYTHING, doomed=server.device(python=python)) as pool,
        ):
            meet(threading.Barrier(2), primary, *pool._companions)
            found = pool.time_kernels(files, progress=desk.ear, plan=QUICK)
            assert pool.companions == ()
    assert list(found) == list(files)
    assert sum(pool.boards.values()) == len(files) == desk.ear.steps
    assert pool.boards["doomed"] > 0  # the chunk that it had finished
    assert desk.ear.said[-1].startswith("doomed leaves, its work moves: ")
    assert quarantine.entries() == {}
    wait_until_gone(killed[0])


def test_a_stand_times_kernels_with_its_pool_and_alone(desk):
    runtime = Runtime(name="onnxruntime", threads=1)
    with desk.pool(other=desk.device("other")) as pool:
        primary = pool._primary
        assert Stand(primary, runtime, "fp32", pool).kernels(FILES, desk.ear, "a") == EXACT
        assert pool.boards["other"] > 0
        alone = Stand(primary, runtime, "fp32").kernels(FILES, desk.ear, "b")
    assert alone == EXACT


def test_the_report_says_which_boards_timed_the_kernels():
    table = LatencyTable(fingerprint_key="f" * 16, precision="fp32", format="onnx", kernels=())
    alone = MeasuredTable(
        table=table, grids={}, staircases={}, kernels_measured=30, boards={"main": 30}
    )
    assert boards_note(alone) == ()
    taken = {"kernels_taken": 20, "times_created": "2026-11-24T10:00:00Z"}
    assert boards_note(alone.model_copy(update=taken)) == (
        "20 of 30 kernel times from an earlier search on this board, 2026-11-24",
    )
    several = alone.model_copy(update={"boards": {"main": 20, "b": 10}, "scales": {"b": 0.98765}})
    assert boards_note(several) == (
        "kernels were timed on 2 boards: 20 on main, 10 on b (times 0.9877);"
        " everything else was measured on the first alone",
    )


# The rules, without boards

NS = st.floats(1e2, 1e8)


@given(st.lists(NS, min_size=MIN_SHARED, max_size=40), st.floats(0.76, 1.24))
def test_one_factor_between_two_boards_is_found_and_undone(times, factor):
    primary = {str(i): ns for i, ns in enumerate(times)}
    companion = {name: ns * factor for name, ns in primary.items()}
    scale = scale_of(primary, companion, LIMITS)
    assert {n: ns * scale for n, ns in companion.items()} == pytest.approx(primary)


@given(st.lists(st.tuples(NS, st.floats(0.5, 2)), min_size=MIN_SHARED, max_size=40))
def test_a_scale_is_only_given_within_the_limits(pairs):
    primary = {str(i): ns for i, (ns, _) in enumerate(pairs)}
    companion = {str(i): ns * ratio for i, (ns, ratio) in enumerate(pairs)}
    ratios = sorted(companion[name] / primary[name] for name in primary)
    median = statistics.median(ratios)
    try:
        scale = scale_of(primary, companion, LIMITS)
    except Unreliable:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        assert abs(median - 1) > LIMITS.off_ratio or high - low > 2 * LIMITS.spread_ratio * median
    else:
        assert scale * median == pytest.approx(1)
        assert abs(median - 1) <= LIMITS.off_ratio
        # Half of the kernels lie within three times the allowed half of the inter-quartile range.
        near = [r for r in ratios if abs(r - median) <= 3 * LIMITS.spread_ratio * median]
        assert 2 * len(near) >= len(ratios)


def test_too_few_kernels_in_common_say_nothing():
    times = {str(i): 1000.0 for i in range(MIN_SHARED - 1)}
    with pytest.raises(Unreliable, match="only 7 reference kernels"):
        scale_of(times, times, LIMITS)


@given(st.lists(NS, min_size=MIN_SHARED, max_size=40), st.floats(0.9, 1.1))
def test_a_drift_is_an_error_from_three_percent_on(times, factor):
    before = {str(i): ns for i, ns in enumerate(times)}
    after = {name: ns * factor for name, ns in before.items()}
    if abs(factor - 1) > 0.0301:
        with pytest.raises(Unreliable, match="changed by"):
            check_drift(before, after, LIMITS)
    elif abs(factor - 1) < 0.0299:
        check_drift(before, after, LIMITS)


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 5000), max_size=60), st.randoms())
def test_the_reference_spans_the_sizes_whatever_the_order(sizes, random):
    files = {name: b"x" * size for name, size in sizes.items()}
    shuffled = list(files.items())
    random.shuffle(shuffled)
    found = reference_names(files)
    assert found == reference_names(dict(shuffled))
    assert len(found) == len(set(found)) == min(len(files), REFERENCE_FILES)
    if files:
        chosen = [sizes[name] for name in found]
        assert (min(chosen), max(chosen)) == (min(sizes.values()), max(sizes.values()))


def fingerprint(**changes: object) -> Fingerprint:
    facts = {k: v for k, v in HELLO.items() if k in Fingerprint.model_fields}
    facts["cpu_flags"] = tuple(facts["cpu_flags"])
    run = {"runtime": "litert", "runtime_version": "2.0", "threads": 4, "stamp": "measured"}
    return Fingerprint(**{**facts, "device": "pi", "transport": "ssh", **run, **changes})


SAME_CLASS = {
    "device": st.text(max_size=5),
    "hostname_digest": st.text("0123456789abcdef", min_size=12, max_size=12),
    "transport": st.sampled_from(["ssh", "local"]),
    "memory_bytes": st.integers(2**30, 2**34),
    "python": st.sampled_from(["3.9.2", "3.12.1"]),
    "kernel": st.integers(0, 99).map(lambda patch: f"6.1.{patch}-v8"),
    "cpu_flags": st.permutations(HELLO["cpu_flags"]).map(tuple),
}


@given(st.fixed_dictionaries({}, optional=SAME_CLASS))
def test_boards_of_a_class_may_differ_in_what_does_not_change_times(changes):
    assert differences(fingerprint(), fingerprint(**changes)) == ()
    assert differences(fingerprint(**changes), fingerprint()) == ()


@pytest.mark.parametrize(
    ("field", "value", "phrase"),
    [
        ("machine", "armv7l", "machine armv7l, not aarch64"),
        ("cpu_model", "other", "cpu other, not Raspberry"),
        ("cpu_flags", ("fp",), "other cpu flags"),
        ("cores", 2, "cores 2, not 4"),
        ("page_size_bytes", 16384, "page size 16384, not 4096"),
        ("kernel", "6.12.0", "kernel 6.12, not 6.1"),
        ("governor", None, "governor None, not ondemand"),
        ("runtime", "onnxruntime", "runtime onnxruntime 2.0, not litert 2.0"),
        ("runtime_version", "2.1", "runtime litert 2.1, not litert 2.0"),
        ("threads", 1, "threads 1, not 4"),
        ("stamp", "stand-in", "stamp stand-in, not measured"),
    ],
)
def test_boards_of_two_classes_differ_by_name(field, value, phrase):
    (found,) = differences(fingerprint(), fingerprint(**{field: value}))
    assert found.startswith(phrase)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("6.6.31-v8", "6.6"), ("6.12", "6.12"), ("5.4", "5.4"), ("custom", "custom")],
)
def test_the_series_of_a_kernel_is_major_and_minor(kernel, expected):
    assert series(kernel) == expected
