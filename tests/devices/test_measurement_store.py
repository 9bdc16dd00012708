"""Timings that outlive the program, whatever happens to it or to their file."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakeagent import fake_device
from repo import REPO
from sshd import WEIGHT, matmul_file, serve

from edgeprune.devices.board import Board, open_board
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.store import MeasurementStore, store_key
from edgeprune.errors import DeviceError, SpecError, Unreliable
from edgeprune.records.device import Device

PLAN = TimingPlan(rounds=4, block_ms=0.2, min_runs=2, max_runs=4, warmup_ms=0.5)
ORT = {"runtime": "onnxruntime", "threads": 1}
LOCAL = Device(transport="local", targets=(), stand_in=True)
REPLY = {"blocks": {"m": [{"samples_ns": [1, 2, 3]}]}, "text": "e" * 3000}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "measurements.sqlite"


@pytest.fixture
def store(path) -> Iterator[MeasurementStore]:
    with MeasurementStore(path) as opened:
        yield opened


def board_with(store: MeasurementStore | None) -> Board:
    board = open_board("here", LOCAL, store=store)
    board.load("m", matmul_file(), **ORT)
    return board


def test_a_reply_is_found_again_by_its_key_alone(store):
    store.put("one", REPLY)
    assert store.get("one") == REPLY
    assert store.get("two") is None
    store.put("one", {"new": 1})
    assert store.get("one") == {"new": 1}


def test_every_part_of_a_timing_is_in_its_key():
    load = {"key": "m", "sha256": "0" * 64, "runtime": "onnxruntime", "threads": 1}
    fields = {"keys": ["m"], "rounds": 4, "purpose": "nets"}
    keys = {
        store_key(["f"], [("m", load)], fields),
        store_key(["g"], [("m", load)], fields),
        store_key(["f"], [("n", load)], fields),
        store_key(["f"], [("m", {**load, "sha256": "1" * 64})], fields),
        store_key(["f"], [("m", load)], {**fields, "rounds": 5}),
        store_key(["f"], [("m", load)], {**fields, "purpose": "check-0"}),
    }
    assert len(keys) == 6


def test_a_timing_with_a_purpose_is_made_once(store):
    with board_with(store) as board:
        first = board.time(["m"], PLAN, purpose="nets")
        assert board.times_from_store == 0
    with board_with(store) as board:
        assert board.time(["m"], PLAN, purpose="nets") == first
        assert board.times_from_store == 1
        assert board.time(["m"], PLAN, purpose="check-0") != first
        board.load("m", matmul_file(WEIGHT * 2), **ORT)
        assert board.time(["m"], PLAN, purpose="nets") != first
        assert board.times_from_store == 1


def test_a_timing_without_a_purpose_is_always_made_anew(store):
    with board_with(store) as board:
        assert board.time(["m"], PLAN) != board.time(["m"], PLAN)


def test_kernels_that_share_a_request_are_kept_by_the_files_of_all(store):
    with board_with(store) as board:
        files = {"a": matmul_file(), "b": matmul_file(WEIGHT * 2)}
        board.load_many(files, **ORT)
        first = board.time(["a", "b"], PLAN, purpose="kernels-0")
        board.load_many(files, **ORT)
        assert board.time(["a", "b"], PLAN, purpose="kernels-0") == first
        board.load_many({**files, "b": matmul_file(WEIGHT * 3)}, **ORT)
        assert board.time(["a", "b"], PLAN, purpose="kernels-0") != first


def test_a_disturbed_timing_of_a_board_is_not_kept(store, tmp_path):
    reply = """(dict(head, **{
        "runtime": {"version": "1.0"},
        "load": {"load_ns": 1000, "first_ns": 1000,
            "inputs": [{"name": "x", "shape": [1], "dtype": "float32"}],
            "outputs": [{"name": "y", "shape": [1], "dtype": "float32"}]},
        "time": {"blocks": {"m": [{"round": 0, "calls_per_sample": 1, "samples_ns": [10, 10], "rejected": "hot"}]},
            "before": {}, "after": {}, "peak_memory_bytes": {}, "stop_reason": "rejected", "notes": []},
        "ready": {"reasons": [], "telemetry": {}},
    }[request["op"]]), b"")"""
    plan = TimingPlan(rounds=1, block_ms=1, min_runs=1, max_runs=4, warmup_ms=1)
    fake = fake_device(tmp_path, reply).python
    with serve(tmp_path) as server:
        device = server.device(python=fake, stand_in=False)  # this machine itself is never refused
        with open_board("fake", device, store=store) as board:
            board.load("m", b"content", **ORT)
            with pytest.raises(Unreliable):
                board.time(["m"], plan, purpose="nets")
    with sqlite3.connect(store.path) as database:
        assert database.execute("SELECT count(*) FROM replies").fetchone() == (0,)


def test_what_was_put_is_there_after_a_kill(path):
    program = f"""
import os, pathlib, signal
from edgeprune.devices.store import MeasurementStore
store = MeasurementStore(pathlib.Path({str(path)!r}))
for number in range(20):
    store.put(str(number), {{"number": number}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == -signal.SIGKILL
    with MeasurementStore(path) as store:
        assert [store.get(str(n)) for n in range(20)] == [{"number": n} for n in range(20)]
        assert not store.notes


def filled(path: Path) -> dict[str, dict[str, object]]:
    replies = {f"{n:016x}": {**REPLY, "number": n} for n in range(40)}
    with MeasurementStore(path) as store:
        for key, reply in replies.items():
            store.put(key, reply)
    return replies


def test_a_damaged_file_is_set_aside_with_a_note_and_made_anew(path):
    filled(path)
    path.write_bytes(b"no database" * 1000)
    with MeasurementStore(path) as store:
        assert "set aside as measurements.sqlite.bad" in store.notes[0]
        assert store.get(f"{0:016x}") is None
        store.put("new", REPLY)
        assert store.get("new") == REPLY
    assert path.with_name("measurements.sqlite.bad").read_bytes().startswith(b"no database")


def test_no_flipped_bit_and_no_cut_gives_a_wrong_reply_or_a_traceback(tmp_path):
    source = tmp_path / "good.sqlite"
    replies = filled(source)
    good = source.read_bytes()
    draw = np.random.default_rng(0)
    path = tmp_path / "copy" / "measurements.sqlite"
    n_lost = 0
    for number in range(150):
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        # Half of the damage goes to the first page, which holds the structure.
        place = int(draw.integers(0, 4096 if number % 2 else len(good)))
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(draw.integers(0, 8))
        path.write_bytes(good[:place] if number % 10 == 0 else damaged)
        with MeasurementStore(path) as store:
            found = {key: store.get(key) for key in replies}
            store.put("new", REPLY)
            assert store.get("new") == REPLY
            noted = bool(store.notes)
        assert all(value is None or value == replies[key] for key, value in found.items())
        lost = [key for key, value in found.items() if value is None]
        n_lost += bool(lost)
        assert noted or len(lost) <= 1  # a key that was bent is a measurement that is not there
    assert n_lost > 20


def test_a_database_of_another_version_is_set_aside(path):
    filled(path)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with MeasurementStore(path) as store:
        assert "it is of version 9" in store.notes[0]


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(SpecError, match="nowhere"):
        MeasurementStore(tmp_path / "nowhere" / "measurements.sqlite")


def test_a_stored_reply_is_checked_like_any_other(store, monkeypatch):
    with board_with(store) as board:
        monkeypatch.setattr(store, "get", lambda _: {"blocks": {"other": []}})
        with pytest.raises(DeviceError):
            board.time(["m"], PLAN, purpose="nets")
