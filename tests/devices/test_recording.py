"""What a board answered can stand in for the board, and nothing else can."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakeagent import fake_device
from sshd import WEIGHT, matmul_file

from edgeprune.devices.agent.wire import MAGIC, frame
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.link.exchanges import FrameStream
from edgeprune.devices.link.frames import MAX_HEADER_BYTES, Refusal
from edgeprune.devices.link.recording import Recording, check_recordable, origin_of
from edgeprune.devices.plans import TimingPlan
from edgeprune.errors import DeviceError, EdgepruneError, IntegrityError, SpecError
from edgeprune.records.device import Device
from edgeprune.records.measurement import Fingerprint

PLAN = TimingPlan(rounds=4, block_ms=0.2, min_runs=2, max_runs=4, warmup_ms=0.5)
ORT = {"runtime": "onnxruntime", "threads": 1}
LOCAL = Device(transport="local", targets=(), stand_in=True)
X = np.ones((2, 4), np.float32)


def conversation(board: Board) -> list[object]:
    """Everything that a deployment asks of a board."""
    many = board.load_many({"a": matmul_file(WEIGHT * 2), "b": b"no model"}, **ORT)
    loaded = board.load("m", matmul_file(), **ORT)
    found: list[object] = [board.fingerprint(**ORT).cpu_model, loaded, many]
    found += [board.time(["m", "a"], PLAN, purpose=p) for p in ("one", "two")]
    found += [board.time(["a"], PLAN) for _ in range(2)]
    found += [board.infer("m", X).tolist(), board.profile("m", 3)]
    board.unload(["m", "a"])
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, list[object], Fingerprint]:
    path = tmp_path_factory.mktemp("recording") / "board.epr"
    with open_board("here", LOCAL, record=path) as board:
        return path, conversation(board), board.fingerprint(**ORT)


def replay(path: Path) -> Device:
    return Device(transport="replay", targets=(), recording=str(path))


@pytest.fixture
def board(recorded) -> Iterator[Board]:
    with open_board("in-ci", replay(recorded[0])) as opened:
        yield opened


def test_a_replay_answers_as_the_board_did_without_any_process(recorded, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a replay starts no process")

    monkeypatch.setattr("subprocess.Popen", refuse)
    with open_board("in-ci", replay(recorded[0])) as board:
        assert conversation(board) == recorded[1]


def test_the_fingerprint_is_the_recorded_one_over_another_transport(recorded, board):
    expected = recorded[2].model_copy(update={"transport": "replay"})
    assert board.fingerprint(**ORT) == expected
    assert expected.stamp == "stand-in"


def test_a_replay_says_that_it_is_one(board):
    (note,) = board.notes
    assert note.startswith("replayed from board.epr, recorded on 20")


def test_repeated_requests_get_the_recorded_replies_in_order_then_the_last_again(recorded, board):
    board.load_many({"a": matmul_file(WEIGHT * 2), "b": b"no model"}, **ORT)
    first, second = recorded[1][5], recorded[1][6]
    assert first != second
    assert [board.time(["a"], PLAN) for _ in range(3)] == [first, second, second]


def test_purposes_are_told_apart_in_any_order(recorded, board):
    board.load_many({"a": matmul_file(WEIGHT * 2), "b": b"no model"}, **ORT)
    board.load("m", matmul_file(), **ORT)
    found = [board.time(["m", "a"], PLAN, purpose=p) for p in ("two", "one", "two")]
    assert found == [recorded[1][4], recorded[1][3], recorded[1][4]]


def test_another_file_is_not_covered(board):
    with pytest.raises(
        DeviceError, match=r"board\.epr does not cover load of m.*another command.*other files"
    ):
        board.load("m", matmul_file(WEIGHT * 3), **ORT)


def test_another_plan_under_the_same_names_is_not_covered(board):
    board.load("m", matmul_file(), **ORT)
    with pytest.raises(DeviceError, match="does not cover time of m for nets"):
        board.time(["m"], PLAN, purpose="nets")


def test_times_of_one_file_are_not_given_for_another_of_the_same_name(recorded, board):
    board.load("a", matmul_file(), **ORT)  # recorded, but as m
    with pytest.raises(DeviceError, match="does not cover time of a"):
        board.time(["a"], PLAN)


def test_other_inputs_are_not_covered(board):
    board.load("m", matmul_file(), **ORT)
    with pytest.raises(DeviceError, match="does not cover infer of m"):
        board.infer("m", X + 1)


def test_what_a_recording_cannot_do_is_refused(board):
    with pytest.raises(Refusal, match="a recording answers"):
        board.request("status", {})


def test_a_recording_holds_no_model_no_input_and_no_user_name(recorded):
    with zipfile.ZipFile(recorded[0]) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights, pixels = WEIGHT.tobytes(), X.tobytes()
    assert all(weights not in part and pixels not in part for part in parts.values())
    hello = json.loads(parts["recording.json"])["origin"]["hello"]
    assert (hello["user"], hello["boot_id"]) == ("", "")


def test_a_recording_goes_on_where_an_earlier_one_of_the_same_board_ended(recorded, tmp_path):
    path = tmp_path / "longer.epr"
    path.write_bytes(recorded[0].read_bytes())
    with open_board("here", LOCAL, record=path) as board:
        board.load("new", matmul_file(WEIGHT * 5), **ORT)
    with open_board("in-ci", replay(path)) as board:
        assert conversation(board) == recorded[1]
        board.load("new", matmul_file(WEIGHT * 5), **ORT)


def test_a_recording_of_one_board_does_not_go_on_with_another(recorded, tmp_path):
    path = tmp_path / "other.epr"
    path.write_bytes(recorded[0].read_bytes())
    with pytest.raises(SpecError, match="cannot be gone on with"):
        open_board("fake", fake_device(tmp_path, "(head, b'')"), record=path)
    assert path.read_bytes() == recorded[0].read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_board_that_never_answers_leaves_no_recording(tmp_path):
    with pytest.raises(DeviceError):
        open_board(
            "bad", LOCAL.model_copy(update={"python": "/no/python"}), record=tmp_path / "x.epr"
        )
    assert not list(tmp_path.glob("*x.epr*"))


def test_recording_needs_its_own_suffix_and_a_board(recorded, tmp_path):
    with pytest.raises(SpecError, match=r"\*\.epr"):
        open_board("here", LOCAL, record=tmp_path / "devices.yaml")
    with pytest.raises(SpecError, match="is a replay"):
        open_board("again", replay(recorded[0]), record=tmp_path / "again.epr")


def test_where_no_recording_can_be_written_is_known_before_any_work(recorded, tmp_path):
    check_recordable(recorded[0])  # to be gone on with
    check_recordable(tmp_path / "new" / "folder" / "x.epr")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"cannot write the recording .* is no folder"):
        check_recordable(tmp_path / "file" / "x.epr")
    with pytest.raises(SpecError, match=r"must be named \*\.epr"):
        check_recordable(tmp_path / "x.json")
    (tmp_path / "text.epr").write_text("text")
    with pytest.raises(IntegrityError, match="no recording"):
        check_recordable(tmp_path / "text.epr")


def test_a_reply_that_came_out_of_the_journal_after_a_broken_link_is_recorded(tmp_path):
    prelude = """
import pathlib
MARK = pathlib.Path({!r})
BLOCK = {{"round": 0, "calls_per_sample": 1, "samples_ns": [1000, 1000]}}
TIMED = {{"blocks": {{"m": [BLOCK]}}, "before": {{}}, "after": {{}}, "peak_memory_bytes": {{}}, "stop_reason": "rounds", "notes": []}}
def time_reply():
    if not MARK.exists():
        MARK.touch()
        sys.exit()
    return TIMED
""".format(str(tmp_path / "mark"))
    reply = "(dict(head, **(time_reply() if request['op'] == 'time' else TIMED)), b'')"
    device = fake_device(tmp_path, reply, prelude)
    path = tmp_path / "broken.epr"
    plan = TimingPlan(rounds=1, block_ms=1, min_runs=1, max_runs=4, warmup_ms=1)
    with open_board("fake", device, record=path, backoff_s=(0.01,)) as board:
        timing = board.time(["m"], plan)
    with open_board("in-ci", replay(path)) as board:
        assert board.time(["m"], plan) == timing


def test_every_cut_and_every_flipped_byte_of_a_recording_is_noticed_or_harmless(recorded, tmp_path):
    good = recorded[0].read_bytes()
    path = tmp_path / "damaged.epr"
    draw = np.random.default_rng(0)
    noticed = 0
    for number, place in enumerate(draw.integers(0, len(good), 60)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(draw.integers(0, 8))
        path.write_bytes(good[:place] if number % 3 == 0 else flipped)
        try:
            with open_board("in-ci", replay(path)) as board:
                assert conversation(board) == recorded[1]
        except EdgepruneError:
            noticed += 1
    assert noticed >= 40


def rewritten(source: Path, target: Path, **changes: bytes) -> Path:
    """A recording with other parts; the names have ``__`` for ``/``."""
    replaced = {name.replace("__", "/"): content for name, content in changes.items()}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(name, old.read(name)))
    return target


def index_with(source: Path, **changes: object) -> bytes:
    with zipfile.ZipFile(source) as archive:
        return json.dumps({**json.loads(archive.read("recording.json")), **changes}).encode()


@pytest.mark.parametrize(
    "changes", [{"schema_version": 2}, {"exchanges": {}}, {"more": 1}, {"origin": None}]
)
def test_an_index_of_another_form_is_refused(recorded, tmp_path, changes):
    index = index_with(recorded[0], **changes)
    path = rewritten(recorded[0], tmp_path / "x.epr", **{"recording.json": index})
    with pytest.raises(IntegrityError, match="no recording"):
        Recording(path)


def test_a_part_that_unpacks_to_more_than_its_limit_is_not_read(recorded, tmp_path):
    bomb = b" " * (MAX_HEADER_BYTES + 100)
    path = rewritten(recorded[0], tmp_path / "x.epr", **{"replies__00000000.json": bomb})
    with pytest.raises(IntegrityError, match="larger than"):
        Recording(path).answer(0)


def test_damage_inside_is_found_before_any_work(recorded, tmp_path):
    assert origin_of(replay(recorded[0])) is not None
    content = bytearray(recorded[0].read_bytes())
    content[200:204] = b"\0\1\2\3"
    (tmp_path / "damaged.epr").write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        origin_of(replay(tmp_path / "damaged.epr"))


def test_what_is_no_recording_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot read the recording"):
        open_board("in-ci", replay(tmp_path / "none.epr"))
    (tmp_path / "text.epr").write_text("text")
    with pytest.raises(IntegrityError, match="no recording"):
        open_board("in-ci", replay(tmp_path / "text.epr"))


def test_frames_are_found_in_pieces_of_any_size():
    content = b"motd\n" + MAGIC + frame({"id": 1}, b"blob") + frame({"id": 2})
    for size in (1, 3, 7, 1000):
        stream = FrameStream(keeps_blobs=True, has_banner=True)
        found = [
            message
            for start in range(0, len(content), size)
            for message in stream.feed(content[start : start + size])
        ]
        assert [(m.header, m.blob) for m in found] == [({"id": 1}, b"blob"), ({"id": 2}, b"")]
        assert found[0].blob_sha256 != found[1].blob_sha256


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 20, b"\0\0\0\2[]" + bytes(8), b"\0\0\0\2x}" + bytes(8), b"\0\0\0\2{}" + b"\xff" * 8],
)
def test_what_is_no_frame_is_an_error(content):
    with pytest.raises(DeviceError):
        list(FrameStream(keeps_blobs=False, has_banner=False).feed(content))
