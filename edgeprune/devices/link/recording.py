"""Recordings: what a board answered, in one file that can stand in for it.

A recording is a zip with ``recording.json`` (the :class:`Index`), ``replies/<number>.json`` and ``blobs/<number>``. What was sent to the
board is kept only as a digest: a recording holds no model, no weights and no data, and neither the user's name nor the boot of the board.
It is read like any file from outside: sizes are limited, every part must have its digest, and no name in it is used as a path.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from edgeprune.devices.link import replies
from edgeprune.devices.link.agent_file import agent_digest
from edgeprune.devices.link.exchanges import FrameStream, Message, Request, Requests
from edgeprune.devices.link.frames import MAX_BLOB_BYTES, MAX_HEADER_BYTES, clean
from edgeprune.devices.link.pipe import Pipe
from edgeprune.errors import IntegrityError, SpecError, reason_of
from edgeprune.records.base import Record
from edgeprune.records.device import Device, ReportTier
from edgeprune.records.files import atomic_path, sha256_bytes, to_json
from edgeprune.records.names import Name, Sha256, Stamp
from edgeprune.records.paths import located

MAX_FILE_BYTES = 4 << 30
MAX_INDEX_BYTES = 256 << 20
MAX_EXCHANGES = 1_000_000
INDEX = "recording.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_VOLATILE = {"boot_id", "wall_clock_ns", "user", "governor"}  # of the same board on another day


class Part(Record):
    """A reply or a blob inside the file."""

    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]


class Exchange(Record):
    """One request and where its reply lies. Its place in the index is the number in the names of its parts."""

    op: str
    request: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    text: Annotated[str, Field(max_length=300)]
    reply: Part
    blob: Part | None = None


class Origin(Record):
    """The board that was recorded. ``at`` is UTC, ISO 8601."""

    device: Name
    transport: Literal["local", "ssh"]
    stamp: Stamp
    agent_sha256: Sha256
    at: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
    hello: replies.Hello
    report: ReportTier = ReportTier()

    def is_same_board(self, other: Origin) -> bool:
        """Whether both are of one board in one state, spoken to by one agent."""
        mine, others = (
            o.model_dump(exclude={"at": True, "hello": _VOLATILE}) for o in (self, other)
        )
        return mine == others


class Index(Record):
    """``recording.json``."""

    schema_version: Literal[1] = 1
    origin: Origin
    exchanges: Annotated[tuple[Exchange, ...], Field(max_length=MAX_EXCHANGES)]


class Recording:
    """A recording on disk, opened for reading.

    Args:
        path: the file.

    Raises:
        SpecError: there is none, or it is larger than 4 GiB.
        IntegrityError: it is damaged, or no recording.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise SpecError(f"the recording {path} must be at most {MAX_FILE_BYTES} bytes")
            self._archive = zipfile.ZipFile(path)
        except SpecError:
            raise
        except OSError as error:
            raise SpecError(f"cannot read the recording {path}: {reason_of(error)}") from error
        except Exception as error:  # zipfile has errors of many types for damage
            raise IntegrityError(f"{path} is no recording, or a damaged one") from error
        try:
            self.index = Index.model_validate_json(self._read(INDEX, MAX_INDEX_BYTES))
        except IntegrityError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise IntegrityError(f"{path} is no recording, or a damaged one: {INDEX}") from error
        self.answers: dict[str, list[int]] = {}
        for number, exchange in enumerate(self.index.exchanges):
            self.answers.setdefault(exchange.request, []).append(number)

    @property
    def origin(self) -> Origin:
        """The board that was recorded."""
        return self.index.origin

    def check(self) -> None:
        """Compare every part with its digest.

        Raises:
            IntegrityError: the file is damaged.
        """
        for number in range(len(self.index.exchanges)):
            self.answer(number)

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def answer(self, number: int) -> tuple[dict[str, Any], bytes]:
        """The reply of an exchange and its blob.

        Raises:
            IntegrityError: the file is damaged there.
        """
        exchange = self.index.exchanges[number]
        text = self._part(f"replies/{number:08d}.json", exchange.reply, MAX_HEADER_BYTES)
        blob = b""
        if exchange.blob is not None:
            blob = self._part(f"blobs/{number:08d}", exchange.blob, MAX_BLOB_BYTES)
        try:
            header: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{self.path} is damaged: reply {number} is not JSON") from error
        if not isinstance(header, dict):
            raise IntegrityError(f"{self.path} is damaged: reply {number} is no JSON object")
        return header, blob

    def _part(self, name: str, part: Part, limit: int) -> bytes:
        content = self._read(name, min(limit, part.size_bytes))
        if sha256_bytes(content) != part.sha256:
            raise IntegrityError(f"{self.path} is damaged: {name} is not what its digest says")
        return content

    def _read(self, name: str, limit: int) -> bytes:
        """A member, read no further than its limit: what a zip says of sizes is only its word."""
        try:
            with self._archive.open(name) as stream:
                content = stream.read(limit + 1)
        except Exception as error:  # zipfile and zlib have errors of many types for damage
            raise IntegrityError(f"{self.path} is damaged: {name} cannot be read") from error
        if len(content) > limit:
            raise IntegrityError(f"{self.path} is damaged: {name} is larger than its {limit} bytes")
        return content


class Recorder:
    """Writes a recording of one board over any number of connections. The file appears, complete, at :meth:`close`.

    A recording that exists is gone on with: a plan and the deployment that follows it make one recording.

    Args:
        path: the file.
        name: the device's name.
        device: how it is reached.

    Raises:
        SpecError, NoSpace: the file cannot be written; it is not a ``.epr`` file; the device is itself a replay.
        IntegrityError: the file exists and is no recording.
    """

    def __init__(self, path: Path, name: str, device: Device) -> None:
        check_recordable(path)
        if device.transport == "replay":
            raise SpecError(f"the device {name!r} is a replay and cannot be recorded again")
        self.path = path
        self._name, self._device = name, device
        self._origin: Origin | None = None
        self._previous: Origin | None = None
        self._exchanges: list[Exchange] = []
        self._journalled: dict[str, Request] = {}
        self._stack = contextlib.ExitStack()
        earlier = Recording(path) if path.exists() else None
        temporary = self._stack.enter_context(atomic_path(path))
        self._archive = zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED)
        if earlier is not None:
            with contextlib.closing(earlier):
                self._previous = earlier.origin
                for number, exchange in enumerate(earlier.index.exchanges):
                    request = Request(exchange.op, exchange.request, exchange.text)
                    self._add(request, *earlier.answer(number))

    def tap(self, pipe: Pipe) -> Pipe:
        """The same pipe, listened to."""
        return _Tapped(pipe, self)

    def greeted(self, reply: dict[str, Any]) -> None:
        """Take down which board it is.

        Raises:
            SpecError: the file holds a recording of another board, or of one in another state.
        """
        if self._origin is not None:
            return
        facts = {k: v for k, v in reply.items() if k not in ("id", "ok")}
        hello = replies.checked(replies.Hello, facts, self._name)
        stamp: Stamp = "stand-in" if self._device.stand_in else "measured"
        origin = Origin(
            device=self._name,
            transport="local" if self._device.transport == "local" else "ssh",
            stamp="emulated" if hello.emulated else stamp,
            agent_sha256=agent_digest(),
            at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            hello=hello.model_copy(update={"user": "", "boot_id": ""}),
            report=self._device.report,
        )
        if self._previous is not None and not origin.is_same_board(self._previous):
            raise SpecError(
                f"{self.path} is a recording of {self._previous.device!r} that cannot be gone on with:"
                " the board, its state or the agent is another",
                hint="record into another file",
            )
        self._origin = origin

    def answered(
        self, request: Request, op_id: str | None, header: dict[str, Any], blob: bytes
    ) -> None:
        """Take down a reply; ``op_id`` is the number under which the board remembers it, if it does."""
        if op_id:
            self._journalled.pop(op_id, None)
        self._add(request, header, blob)

    def asked(self, request: Request, op_id: str | None) -> None:
        """Remember a request whose reply may come over another connection, out of the board's journal."""
        if op_id:
            self._journalled[op_id] = request

    def recovered(self, op_id: str, header: dict[str, Any]) -> None:
        """Take down a reply that came out of the board's journal."""
        request = self._journalled.pop(op_id, None)
        if request is not None and header.get("ok") is True:
            self._add(request, header, b"")

    def _add(self, request: Request, header: dict[str, Any], blob: bytes) -> None:
        number = len(self._exchanges)
        text = json.dumps({k: v for k, v in header.items() if k != "id"}).encode()
        self._write(f"replies/{number:08d}.json", text)
        if blob:
            self._write(f"blobs/{number:08d}", blob)
        self._exchanges.append(
            Exchange(
                op=request.op,
                request=request.digest,
                text=clean(request.text, 300),
                reply=_part(text),
                blob=_part(blob) if blob else None,
            )
        )

    def _write(self, name: str, content: bytes) -> None:
        entry = zipfile.ZipInfo(name, date_time=_EPOCH)
        entry.compress_type = zipfile.ZIP_DEFLATED
        try:
            self._archive.writestr(entry, content)
        except OSError as error:
            raise SpecError(
                f"cannot write the recording {self.path}: {error.strerror or error}",
                hint="free some space, or record into another file",
            ) from error

    def close(self) -> None:
        """Finish the file; harmless when done. A recording of a board that never answered leaves no file and no change."""
        stack, self._stack = self._stack.pop_all(), contextlib.ExitStack()
        if self._origin is None:
            with contextlib.suppress(_NothingRecorded), stack:
                self._archive.close()
                raise _NothingRecorded
            return
        origin, self._origin = self._origin, None
        with stack:
            index = Index(origin=origin, exchanges=tuple(self._exchanges))
            self._write(INDEX, to_json(index))
            self._archive.close()


class _NothingRecorded(Exception):
    """Makes the temporary file go."""


def _part(content: bytes) -> Part:
    return Part(sha256=sha256_bytes(content), size_bytes=len(content))


class _Tapped:
    """A pipe that tells a recorder what passes."""

    def __init__(self, pipe: Pipe, recorder: Recorder) -> None:
        self._pipe, self._recorder = pipe, recorder
        self._sent = FrameStream(keeps_blobs=False, has_banner=False)
        self._received = FrameStream(keeps_blobs=True, has_banner=True)
        self._requests = Requests()
        self._pending: dict[int, Callable[[Message], None]] = {}

    def write(self, content: bytes, deadline: float) -> None:
        """As :meth:`Pipe.write <edgeprune.devices.link.pipe.Pipe.write>`."""
        for message in self._sent.feed(content):
            self._asked(message)
        self._pipe.write(content, deadline)

    def _asked(self, message: Message) -> None:
        header = message.header
        op, number, op_id = header.get("op"), header.get("id"), header.get("op_id")
        request = self._requests.seen(message)
        if not isinstance(number, int):
            return
        recorder = self._recorder
        if request is not None:
            recorder.asked(request, op_id)
            self._pending[number] = lambda m: recorder.answered(request, op_id, m.header, m.blob)
        elif op == "hello":
            self._pending[number] = lambda m: (
                recorder.greeted(m.header) if m.header.get("ok") is True else None
            )
        elif op == "result":
            self._pending[number] = lambda m: recorder.recovered(str(op_id), m.header)

    def read(self, n: int, deadline: float) -> bytes:
        """As :meth:`Pipe.read <edgeprune.devices.link.pipe.Pipe.read>`."""
        content = self._pipe.read(n, deadline)
        for message in self._received.feed(content):
            number = message.header.get("id")
            if isinstance(number, int) and "event" not in message.header:
                taken = self._pending.pop(number, None)
                if taken is not None:
                    taken(message)
        return content

    def stderr_tail(self) -> str:
        """As :meth:`Pipe.stderr_tail <edgeprune.devices.link.pipe.Pipe.stderr_tail>`."""
        return self._pipe.stderr_tail()

    def close(self) -> None:
        """As :meth:`Pipe.close <edgeprune.devices.link.pipe.Pipe.close>`."""
        self._pipe.close()


def check_recordable(path: Path) -> None:
    """Fail before any work on a place where no recording can be written, or gone on with.

    Raises:
        SpecError: it is no ``.epr`` file, or the folder cannot be written.
        IntegrityError: the file exists and is no recording.
    """
    if path.suffix != ".epr":
        raise SpecError(f"a recording must be named *.epr, but got {path.name!r}")
    folder = next(f for f in path.absolute().parents if f.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(
            f"cannot write the recording {path}: {folder} is no folder that can be written",
            hint="record into another folder",
        )
    if path.exists():
        Recording(path).close()


def recording_path(device: Device) -> Path:
    """The file of a ``replay`` device; relative to the current folder."""
    assert device.recording is not None
    return located(device.recording, what="recording")


def origin_of(device: Device) -> Origin | None:
    """The board behind a ``replay`` device; ``None`` for all others.

    Raises:
        SpecError, IntegrityError: as :class:`Recording`.
    """
    if device.transport != "replay":
        return None
    with contextlib.closing(Recording(recording_path(device))) as recording:
        recording.check()
        return recording.origin


def as_recorded(device: Device) -> Device:
    """The device, saying of itself what the recorded one did: stand-in or real, and how long reports look. Raises as :func:`origin_of`."""
    origin = origin_of(device)
    if origin is None:
        return device
    is_stand_in = origin.stamp == "stand-in"
    return device.model_copy(update={"stand_in": is_stand_in, "report": origin.report})


def uncovered(recording: Recording, request: Request) -> str:
    """Why a recording has no answer, as far as one can tell."""
    asked = any(e.op == request.op for e in recording.index.exchanges)
    why = "it has no such work"
    if asked:
        why = (
            "it was made by another command, or with another budget, other files or other versions"
        )
    if recording.origin.agent_sha256 != agent_digest():
        why += ", and by another version of the agent"
    name = clean(recording.path.name, 100)
    return f"the recording {name} does not cover {request.text}: {why}"
