"""Files as found: whatever lies in one, its reader answers with a record or with one error of ours that names it."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tinynet
import torch
import yaml
from repo import REPO
from report_fixture import make_fingerprint, make_report
from safetensors.torch import save

from edgeprune import deploy
from edgeprune.compress.heal import checkpoint
from edgeprune.compress.pruned_file import load_pruned, save_pruned
from edgeprune.devices.board import open_board
from edgeprune.devices.inventory.proposals import login_method
from edgeprune.devices.link.secrets import read_private
from edgeprune.errors import DeviceError, EdgepruneError, IntegrityError, ModelError, SpecError
from edgeprune.pipeline.run_folder import RunFolder
from edgeprune.plan.latency.kernel_times import KernelTime, KernelTimes, read_times
from edgeprune.progress import Silent
from edgeprune.records import catalog
from edgeprune.records.base import Record, load_yaml, read_json, read_yaml
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes, to_json
from edgeprune.records.plan import PlanFile
from edgeprune.records.report import Report
from edgeprune.records.workload import Preprocess, Workload
from edgeprune.report import compare_text, render_terminal
from edgeprune.workload import data as imagedata
from edgeprune.workload import model
from edgeprune.workload.load import load_workload

LOCAL = Device(transport="local", targets=(), stand_in=True)
MUTANTS = int(os.environ.get("EDGEPRUNE_READER_MUTANTS", "40"))  # of each kind of file
IMAGES = Preprocess(color="grey")


# Kinds of files: what a sound one holds, and what reads it.


@dataclass(frozen=True)
class Kind:
    name: str
    file: str
    sound: Callable[[], bytes]
    read: Callable[[Path], object]


def settings() -> bytes:
    text = yaml.safe_dump(tinynet.settings(recovery={"epochs": 1.5}, latency="60%", seed=3))
    return text.encode()


def devices() -> bytes:
    return (REPO / "devices.yaml").read_bytes()


def plan() -> bytes:
    record = {
        "schema_version": 1,
        "target": "rpi4",
        "budget": "60%",
        "precision": "int8",
        "dense_ms": 2.5,
        "predicted_ms": 1.25,
        "measured_ms": 1.5,
        "widths": {"0": 8, "3": 12},
        "admissible_widths": {"0": [4, 8], "3": [12, 16]},
    }
    return json.dumps(record).encode()


def times() -> bytes:
    rows = (KernelTime(signature="conv", widths=(8, 16), ns=120.5),)
    found = KernelTimes(
        created="2026-11-24T10:00:00Z",
        fingerprint=make_fingerprint(),
        precision="int8",
        format="onnx",
        times=rows,
    )
    return to_json(found)


def shown_report(path: Path) -> object:
    found = read_json(Report, path)
    return render_terminal(found), compare_text([found, found])


def archive(arrays: dict[str, np.ndarray] | None = None) -> bytes:
    stream = io.BytesIO()
    x = np.arange(8 * 4 * 4, dtype=np.uint8).reshape(8, 4, 4)
    np.savez(stream, **(arrays or {"train_x": x, "train_y": np.arange(8) % 2}))
    return stream.getvalue()


def data(path: Path) -> object:
    return imagedata.load_data(str(path), Path(), preprocess=IMAGES, labels=None)


def weights() -> bytes:
    return save({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int64)})


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(3, 2)}, stream)
    return stream.getvalue()


def written(make: Callable[[Path], object]) -> bytes:
    """Content of a file that is written by its own writer."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make(path := Path(folder) / "file.epr")
        return path.read_bytes()


def pair() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def recorded(path: Path) -> None:
    """A recording of one question to this machine."""
    with open_board("here", LOCAL, record=path) as board:
        board.runtime_version("onnxruntime")


def replayed(path: Path) -> object:
    device = Device(transport="replay", targets=(), recording=str(path))
    with open_board("in-ci", device) as board:
        return board.runtime_version("onnxruntime")


def saved_checkpoint(path: Path) -> None:
    checkpoint.save(path, {"a": torch.ones(3)}, {"epoch": 3}, "digest")


class Kept(Record):
    """What the stage of a run made."""

    value: int = 3


def stage(run: Path) -> Path:
    """The record of the only stage of a run, which is made where there is none or a damaged one."""
    with RunFolder(run, Silent()) as opened:
        found = opened.stage("one", "other", {"x": 1}, Kept, lambda _: Kept())
    assert found.result == Kept()
    return found.path("stage.json")


def staged(path: Path) -> None:
    path.write_bytes(stage(path.parent / "run").read_bytes())


def stage_record(path: Path) -> object:
    record = stage(path.parent / "run")
    record.write_bytes(path.read_bytes())
    return stage(path.parent / "run")


KINDS = (
    Kind("settings", "edgeprune.yaml", settings, lambda p: read_yaml(Workload, p)),
    Kind("devices", "devices.yaml", devices, catalog.devices),
    Kind("target", "rpi4.yaml", lambda: (REPO / "targets/rpi4.yaml").read_bytes(), catalog.target),
    Kind(
        "profile",
        "cortex-a72.yaml",
        lambda: (REPO / "profiles/cortex-a72.yaml").read_bytes(),
        catalog.profile,
    ),
    Kind("plan", "plan.json", plan, lambda p: read_yaml(PlanFile, p)),
    Kind("times", "times.json", times, read_times),
    Kind("report", "report.json", lambda: to_json(make_report()), shown_report),
    Kind("stage", "stage.json", lambda: written(staged), stage_record),
    Kind("npz", "data.npz", archive, data),
    Kind("safetensors", "weights.safetensors", weights, model.read_weights),
    Kind("torch file", "weights.pt", pickled, model.read_weights),
    Kind(
        "pruned file",
        "pruned.safetensors",
        lambda: written(lambda p: save_pruned(pair(), p)),
        lambda p: load_pruned(pair, p),
    ),
    Kind(
        "checkpoint",
        "checkpoint.safetensors",
        lambda: written(saved_checkpoint),
        lambda p: checkpoint.load(p, "digest"),
    ),
    Kind("recording", "board.epr", lambda: written(recorded), replayed),
)


# What may be in a file. Text goes in at places where a value stands, bytes anywhere.

TEXTS = (
    "!!int x", "!!float y", "!!bool maybe", "!!binary '*'", "!!timestamp soon", "!!null {}", "!!set {a, b}", "!!omap [a: 1]",
    "0b_", "0x_", "0o9", "1:99", "-", "." , "_", "9" * 5000, "1" + ":59" * 3000, "1e999999", ".inf", "-.inf", ".nan", "null", "true", "[]",
    "{}", '""', '"\\ud800"', '"\\U00110000"', '"\\x00"', "'" + "n" * 300 + "'", "&a [*a, *a]", "*gone", "? [k]\n: v", "{[1]: 2}",
    "<<: 3", "2026-13-99", "!<x> y", "%TAG", "|", "[" * 40, "[" * 1200, '{"a":' * 1200, "-1", "1e400", "18446744073709551616", "1.5",
    "~nosuchuser/x", '"a": 1, "a": 2', "\u202e", "\t",
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"PK\x03\x04",
    b"\x80\x04",
    b"\n",
    b"\xff" * 8,
)


def mutant(sound: bytes, draw: random.Random) -> bytes:
    """A file with one to three faults."""
    content = bytearray(sound)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at, to = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        fault = draw.randrange(7)
        if fault == 0:
            del content[at:]
        elif fault == 1:
            del content[at : min(to, at + 40)]
        elif fault == 2:
            content[at:at] = content[at : min(to, at + 200)]
        elif fault == 3:
            content[at:at] = draw.choice(BYTES)
        elif fault == 4 and content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
        else:
            _put_value(content, at, draw)
    return bytes(content)


def _put_value(content: bytearray, at: int, draw: random.Random) -> None:
    """Replace the value behind the next colon."""
    start = content.find(b":", at) + 1
    ends = [e for e in (content.find(c, start) for c in (b",", b"\n", b"}")) if e >= 0]
    end = min(ends, default=len(content))
    content[start:end] = b" " + draw.choice(TEXTS).encode()


@pytest.fixture(scope="module")
def sound_files() -> dict[str, bytes]:
    return {kind.name: kind.sound() for kind in KINDS}


def outcome(kind: Kind, folder: Path, content: bytes) -> str:
    """What reading a file came to: ``read``, or the kind of error; every error is one line."""
    path = folder / kind.file
    path.write_bytes(content)
    try:
        kind.read(path)
    except EdgepruneError as error:
        if not 0 < len(error.message) < 1200:
            raise AssertionError(f"{kind.name}: {len(error.message)} characters") from error
        return type(error).__name__
    except Exception as error:
        raise AssertionError(
            f"{kind.name}: {type(error).__name__} for {content[:4000]!r}"
        ) from error
    return "read"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(kind, sound_files, tmp_path):
    draw = random.Random(f"readers {kind.name}")
    sound = sound_files[kind.name]
    assert outcome(kind, tmp_path, sound) == "read"
    assert outcome(kind, tmp_path, b"") in ("SpecError", "ModelError", "IntegrityError", "read")
    found = [outcome(kind, tmp_path, mutant(sound, draw)) for _ in range(MUTANTS)]
    assert kind.name == "stage" or set(found) - {"read"}  # the faults are faults
    if shown := os.environ.get("EDGEPRUNE_READER_COUNTS"):
        with Path(shown).open("a") as stream:
            counts = {name: found.count(name) for name in sorted(set(found))}
            stream.write(f"{kind.name}: {len(found)} {counts}\n")


# The faults one by one, with what is said of them.


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: !!int x", r"line 2 is not valid: 'x' is no int"),
        ("a: 0b_", r"line 1 is not valid: '0b_' is no int"),
        ("a: !!float soon", "'soon' is no float"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!timestamp soon", "'soon' is no timestamp"),
        ("a: " + "9" * 5000, "line 1 is not valid: a number must have at most 64 characters"),
        ("a: 1" + ":59" * 300_000, "a number must have at most 64 characters"),
        ('a: "\\U00110000"', r"is not valid: .*range\(0x110000\)"),
        ("a: \x00", "is not valid: "),
    ],
)
def test_a_value_that_yaml_cannot_read_is_named_with_its_line(tmp_path, text, says):
    (path := tmp_path / "some.yaml").write_text(text)
    with pytest.raises(SpecError, match=rf"(?s)some\.yaml.*{says}"):
        load_yaml(path)


def test_a_half_of_a_character_in_yaml_is_refused_with_the_name_of_the_file(tmp_path):
    (path := tmp_path / "edgeprune.yaml").write_text('model: "\\ud800"\ndata: x.npz\n')
    with pytest.raises(SpecError, match=r"edgeprune\.yaml"):
        read_yaml(Workload, path)


def test_no_more_of_a_file_without_an_end_is_read_than_shows_that_it_is_too_large():
    with pytest.raises(SpecError, match="at most 1048576 bytes"):
        load_yaml(Path("/dev/zero"))


PATHS = ("n" * 300, "folder/" + "n" * 300, "~nosuchuser/file", "nul\0here", "half\ud800")


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_none_can_have_is_one_line_wherever_it_is_given(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tinynet.project(tmp_path))
    record = read_yaml(Workload, tmp_path / "edgeprune.yaml")
    x = np.zeros((32, 24, 24), np.uint8)
    tries: list[Callable[[], object]] = [
        lambda: deploy("net.py:build", path, target="rpi4"),
        lambda: deploy("net.py:build", f"{path}.npz", target="rpi4"),
        lambda: deploy("net.py:build", "data.npz", weights=path, target="rpi4"),
        lambda: deploy(f"{path}.py:build", "data.npz", target="rpi4"),
        lambda: deploy("net.py:build", "data.npz", target=f"{path}.yaml", preprocess=IMAGES),
        *(
            (
                lambda flag=flag: deploy(
                    tinynet.build(),
                    x,
                    target="rpi4",
                    task="classify",
                    preprocess=IMAGES,
                    **{flag: path},
                )
            )
            for flag in ("run", "tables", "plan")
        ),
        lambda: load_workload(record.model_copy(update={"weights": path}), tmp_path),
        lambda: load_pruned(pair, path),
        lambda: open_board("x", Device(transport="replay", targets=(), recording=path)),
        lambda: read_private(Path(path), "key file"),
        lambda: login_method(path, None, None, None),
    ]
    for attempt in tries:
        with pytest.raises((SpecError, IntegrityError)) as caught:
            attempt()
        assert len(str(caught.value)) < 1000


def test_a_folder_in_place_of_a_key_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match="must be a regular file"):
        read_private(tmp_path, "key file")


def member(content: bytes) -> bytes:
    """An ``.npz`` whose ``x`` is these bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        out.writestr("x.npy", content)
    return stream.getvalue()


def header(text: str) -> bytes:
    line = (text + "\n").encode("latin-1")
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


def with_compression(number: int) -> bytes:
    """A sound archive whose first member says that it is compressed in another way."""
    content = bytearray(archive())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(mark) + offset] = number
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"no zip",
        archive({"x": np.array([{}, []], dtype=object)}),
        member(b""),
        member(header("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999, 9), }")),
        member(header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 9), }")),
        member(header("{'descr': [], 'fortran_order': False, 'shape': (1,), }")),
        member(header("{'descr': ('<f4', (1, 2, 3)), 'fortran_order': 0, 'shape': 3}")),
        member(header("{'descr': [('a',)], 'fortran_order': False, 'shape': (1,), }")),
        member(header("(" * 5000)),
        member(header("{'descr': '" + "<" * 3000 + "f4'}")),
        with_compression(12),
        with_compression(97),
    ],
)
def test_an_npz_with_a_strange_member_is_named(tmp_path, content):
    (path := tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ModelError, match=r"data\.npz"):
        data(path)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"__metadata__": 3}',
        '{"a": {"dtype": "F8_E9M9", "shape": [1], "data_offsets": [0, 1]}}',
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999999]}}',
        '{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 0]}}',
        "[" * 5000,
        "\\ud800",
    ],
)
def test_safetensors_with_a_strange_header_are_named(tmp_path, text):
    raw = text.encode()
    (path := tmp_path / "w.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelError, match=r"w\.safetensors"):
        model.read_weights(path)


def resealed(content: bytes, reply: bytes) -> bytes:
    """A recording with another answer to its only question, and the digest of that."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        index = json.loads(old.read("recording.json"))
        for row in index["exchanges"]:
            row["reply"] = {"sha256": sha256_bytes(reply), "size_bytes": len(reply)}
        new.writestr("recording.json", json.dumps(index))
        for number in range(len(index["exchanges"])):
            new.writestr(f"replies/{number:08d}.json", reply)
    return stream.getvalue()


@pytest.mark.parametrize(
    "reply",
    [
        b"not JSON",
        b"\xff",
        b"[]",
        b"{}",
        b'{"ok": true, "version": ' + b"[" * 50_000,
        b'{"ok": true, "version": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"ok": true, "version": ' + b"9" * 5000 + b"}",
        b'{"ok": true, "version": "\\ud800"}',
        b'{"ok": false, "kind": [], "error": {"a": NaN}}',
        b'{"ok": true, "version": "1.0", "id": "another"}',
    ],
)
def test_a_recording_with_a_strange_answer_is_an_error_of_the_board(sound_files, tmp_path, reply):
    (path := tmp_path / "board.epr").write_bytes(resealed(sound_files["recording"], reply))
    if reply.endswith(b'"another"}'):  # the number of an answer is the transport's own
        assert replayed(path) == "1.0"
        return
    with pytest.raises((DeviceError, IntegrityError)):
        replayed(path)


LONG = "n" * 300
NAMED = ("net.py:build", "--data", "data.npz", "--target", "this-machine")


@pytest.mark.parametrize(
    "words",
    [
        ("deploy", LONG),
        ("deploy", f"{LONG}.py:build", *NAMED[1:]),
        ("deploy", "net.py:build", "--data", LONG, "--target", "this-machine"),
        ("deploy", *NAMED, "--weights", LONG),
        ("deploy", *NAMED[:-1], f"{LONG}.yaml"),
        ("deploy", *NAMED, "--rewind-weights", LONG, "--start", "rewound", "--color", "grey"),
        ("deploy", "--target", "this-machine", "--run", LONG),
        ("deploy", "--target", "this-machine", "--resume", LONG),
        ("deploy", "--target", "this-machine", "--plan", LONG),
        ("deploy", "--target", "this-machine", "--tables", LONG),
        ("profile", "--target", "this-machine", "--record", f"{LONG}.epr"),
        ("report", LONG),
        ("compare", LONG, LONG),
        ("verify", LONG),
        ("verify", ".", "--key", LONG),
        ("bundle", "sign", LONG, "--key", LONG),
        ("bundle", "sign", ".", "--key", LONG),
        ("bundle", "sign", ".", "--key", f"file:{LONG}"),
        ("bundle", "schema", LONG),
        ("init", "--yes", "--data", LONG),
        ("targets", "show", f"./{LONG}"),
        ("profiles", "show", f"~nosuchuser/{LONG}.yaml"),
        ("devices", "add", "x", "pi@127.0.0.1:1", "--key", LONG, "--fingerprint", "SHA256:" + "A" * 43),
        ("devices", "remove", "x", "--file", LONG),
        ("devices", "setup", "this-machine", "--wheels", LONG),
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)  # fmt: skip
def test_a_name_of_300_characters_is_one_line_in_every_flag(tmp_path, words):
    project = tinynet.project(tmp_path / "project")
    if words[0] == "init":
        (project / "edgeprune.yaml").unlink()
    done = tinynet.edgeprune_here(project, *words)
    assert done.returncode in (2, 3, 4, 7), done.stderr
    assert done.stderr.startswith("error:")
    assert "Traceback" not in done.stderr
