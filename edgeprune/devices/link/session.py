"""A conversation with one board that outlives its connections: start the agent, keep the lease alive, come back after a broken link.

Every operation may be asked for twice: models are loaded again under their keys, a file that is there is not sent again, and a measurement
that was finished before the link broke is taken from the board's journal.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import platform
import random
import re
import secrets
import shlex
import site
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.devices.agent.validity import LIMITS
from edgeprune.devices.link import replies
from edgeprune.devices.link.agent_file import agent_bytes, agent_digest, agent_name
from edgeprune.devices.link.frames import Frames, Refusal, clean
from edgeprune.devices.link.pipe import Pipe, Transport
from edgeprune.devices.link.transports import open_transport
from edgeprune.devices.link.wait import take_in_turn
from edgeprune.errors import DeviceError, EdgepruneError, HungUp, LinkLost, NotReady, Unreachable
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes

LINK_S = 60.0  # for anything that mostly waits for the link
BEAT_S = 5.0  # or a third of what the lease allows, where that is less
NO_LIMIT = 1e6
# What a model may take over ten times the expected time before the board ends its process.
PATIENCE_S = 30.0
CHUNK_BYTES = 4 << 20
BACKOFF_S = (1.0, 2.0, 4.0, 8.0)
RETURN_S = 600.0  # who had the board and let it go for a while waits for it at least that long
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
DEFAULT_WORKDIR: str = Device.model_fields["workdir"].default
# Who asks, who owns the workdir, its mode, and the digest of the agent there, if all that exists. A fixed text: paths are its arguments.
_LOOK = """set -- "$1" "$2" "$(sha256sum "$2" 2>/dev/null)"
if [ -e "$1" ]; then f="$(stat -L -c '%u %a' "$1")"; else f="none none"; fi
printf '\\nedgeprune-workdir %s %s %s\\n' "$(id -u)" "$f" "${3%% *}"
"""


def allowed_load(foreign_cpu_ratio: float) -> float:
    """The load of the last minute for each core from which on a board is not timed; who lets others have the cores is not held up by it.

    >>> allowed_load(0.05), allowed_load(0.5), allowed_load(1.0)
    (0.3, 0.5, 1000000.0)
    """
    return NO_LIMIT if foreign_cpu_ratio >= 1 else max(LIMITS["load_per_core"], foreign_cpu_ratio)


@dataclass(frozen=True)
class LeaseTerms:
    """Whether a session holds the board alone, and how long it may wait for that. ``job`` tells others what it is for."""

    exclusive: bool = True
    wait_s: float = 0.0
    job: str = "edgeprune"


@dataclass
class _Link:
    """One connection with a running agent."""

    transport: Transport
    frames: Frames

    def close(self) -> None:
        """End the agent and the connection."""
        with contextlib.suppress(EdgepruneError, OSError):
            self.frames.close()
        self.transport.close()


class Session:
    """Requests to a board. Connects at the first one.

    Args:
        name: the device's name.
        device: how to reach it.
        lease: whether to hold the board.
        restore: called after a reconnect, before anything else: puts back what the board had loaded.
        say: told in one line when something was survived.
        backoff_s: how long to wait before each try to come back, give or take a quarter.
        tap: makes of each connection's pipe the one that is used: something that listens, say.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        lease: LeaseTerms,
        *,
        restore: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
        backoff_s: Sequence[float] = BACKOFF_S,
        tap: Callable[[Pipe], Pipe] = lambda pipe: pipe,
    ) -> None:
        self.name, self.device = name, device
        self._tap = tap
        self.notes: list[str] = []
        self.hello: replies.Hello | None = None
        self.bytes_sent = 0
        self._lease, self._restore, self._say = lease, restore, say
        self._backoff_s = tuple(backoff_s)
        self._token = secrets.token_hex(16)
        self._link: _Link | None = None
        self._operations = 0
        self._closed = threading.Event()
        self._beats: threading.Thread | None = None
        self._random = random.Random(self._token)  # jitter of the waits

    # Connecting

    def connect(self) -> replies.Hello:
        """Facts about the machine; connects, starts the agent and takes the lease when that is not done.

        Raises:
            Unreachable, HostKeyMismatch, AuthFailed: the device cannot be reached, is not the pinned one, or refuses the login.
            Busy: another client holds it.
            DeviceError: the agent failed; the message has the end of what the board said.
        """
        if self._link is None:
            self._link = self._open()
            try:
                self._greet(self._link.frames)
                self._take_lease(self._link.frames)
            except BaseException:
                self._drop()
                raise
            if self._beats is None:
                self._beats = threading.Thread(target=self._beat, daemon=True)
                self._beats.start()
        assert self.hello is not None
        return self.hello

    def _open(self) -> _Link:
        with contextlib.ExitStack() as opened:
            transport = open_transport(self.device)
            opened.callback(transport.close)
            pipe = self._tap(transport.start(_agent_command(transport, self.device)))
            frames = Frames(pipe, self.name)
            opened.callback(frames.close)
            frames.handshake(LINK_S)
            opened.pop_all()
        return _Link(transport, frames)

    def _greet(self, frames: Frames) -> None:
        device, thermal = self.device, self.device.thermal
        fields = {
            "workdir": _workdir(device),
            "session": self._token,
            "ttl_s": device.lease_ttl_s,
            "lease_file": _lease_file(device),
            "min_free_bytes": device.min_free_bytes,
            "quota_bytes": device.cache_quota_bytes,
            "limits": {
                "soft_limit_c": thermal.soft_limit_c,
                "start_below_c": thermal.start_below_c,
                "foreign_cpu_ratio": device.max_foreign_cpu_ratio,
                "load_per_core": allowed_load(device.max_foreign_cpu_ratio),
                "patience_s": PATIENCE_S,
            },
            "client": {"user": _user(), "host": platform.node(), "job": self._lease.job},
        }
        reply, _ = frames.request("hello", fields, work_s=LINK_S)
        found = replies.checked(replies.Hello, reply, self.name)
        before, self.hello = self.hello, found
        if before is not None and before.boot_id != found.boot_id:
            self._note("the board was started anew; what was being measured then is measured again")

    def _take_lease(self, frames: Frames) -> None:
        if not self._lease.exclusive:
            return
        wait_s = self._lease.wait_s if self._beats is None else max(self._lease.wait_s, RETURN_S)
        take_in_turn(
            self.name, lambda: frames.request("lease", {}, work_s=LINK_S), wait_s, self._say
        )
        if self.device.tuning.allow:
            frames.request("tune", {"governor": self.device.tuning.governor}, work_s=LINK_S)

    def _beat(self) -> None:
        """Keep the lease while this program lives; a broken link is noticed by the next request."""
        while not self._closed.wait(min(BEAT_S, self.device.lease_ttl_s / 3)):
            link = self._link
            if link is not None:
                with contextlib.suppress(EdgepruneError, OSError):
                    link.frames.beat()

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._say(f"{self.name}: {text}")

    # Requests

    def request(
        self,
        op: str,
        fields: dict[str, Any],
        blob: bytes = b"",
        *,
        work_s: float = LINK_S,
        journalled: bool = False,
    ) -> tuple[dict[str, Any], bytes]:
        """The reply to one request, over as many connections as it takes.

        Args:
            op: the operation; asking twice must do no harm.
            fields: its arguments.
            blob: bytes that go with it.
            work_s: how long the board's work may take.
            journalled: after a broken link, ask the board for the result before asking for the work again.

        Raises:
            Refusal: the board answered that it cannot.
            LinkLost, Unreachable: the link broke, and four tries to come back failed.
            DeviceError, DeadlineExceeded: see :meth:`Frames.request <edgeprune.devices.link.frames.Frames.request>`.
        """
        self._operations += 1
        op_id = f"{self._operations:08d}"
        if journalled:
            fields = {**fields, "op_id": op_id}
        for attempt in range(len(self._backoff_s) + 1):
            try:
                fresh = self._link is None
                self.connect()
                assert self._link is not None
                if fresh and self._operations > 1:
                    self._restore_models()
                if journalled and attempt:
                    known = self._finished(op_id)
                    if known is not None:
                        return known, b""
                return self._link.frames.request(op, fields, blob, work_s=work_s)
            except (LinkLost, Unreachable) as error:
                self._drop()
                # A first connection that fails is a wrong address more often than a bad moment.
                is_first = self.hello is None and not isinstance(error, LinkLost | HungUp)
                if attempt == len(self._backoff_s) or is_first:
                    raise
                wait_s = self._backoff_s[attempt] * self._random.uniform(0.75, 1.25)
                self._note(f"the link broke ({error.message}); trying again in {wait_s:.1f} s")
                time.sleep(wait_s)
            except BaseException:
                self._drop_unless_answered()
                raise
        raise AssertionError("every attempt returns or raises")

    def _drop_unless_answered(self) -> None:
        """After a refusal the link is fine; after anything else its state is unknown."""
        if not isinstance(sys.exc_info()[1], Refusal):
            self._drop()

    def _restore_models(self) -> None:
        restoring, self._restore = self._restore, lambda: None
        try:
            restoring()
        finally:
            self._restore = restoring

    def _finished(self, op_id: str) -> dict[str, Any] | None:
        assert self._link is not None
        try:
            return self._link.frames.request("result", {"op_id": op_id}, work_s=LINK_S)[0]
        except Refusal as error:
            if error.kind == "missing":
                return None
            raise

    def push(self, content: bytes) -> int:
        """Put a file into the board's cache; gives the bytes that had to be sent.

        A file that is there is not sent; one that was sent in part goes on where it stopped, when the board's part is right.

        Raises:
            Refusal: ``space`` when the board's disk cannot hold it; ``content`` when it arrived damaged twice.
            DeviceError: as :meth:`request`.
        """
        sha256, size, sent = sha256_bytes(content), len(content), 0
        again = False  # the board's part turned out to be lost or damaged, once
        while True:
            reply, _ = self.request("cache_state", {"sha256": sha256})
            state = replies.checked(replies.CacheState, reply, self.name)
            if state.have:
                self.bytes_sent += sent
                return sent
            offset = state.offset
            known = hashlib.sha256(content[:offset]).hexdigest() if 0 < offset <= size else ""
            if known != state.prefix_sha256:
                offset = 0
            while True:
                piece = content[offset : offset + CHUNK_BYTES]
                fields = {"sha256": sha256, "size": size, "offset": offset}
                try:
                    reply, _ = self.request("cache_write", fields, piece, work_s=LINK_S)
                except Refusal as error:
                    if error.kind != "content" or again:
                        raise
                    again = True
                    break
                sent += len(piece)
                offset += len(piece)
                if replies.checked(replies.CacheWritten, reply, self.name).done:
                    break

    def release(self) -> None:
        """Let others have the board until the next request; what was loaded is loaded again then."""
        self.close_link()

    def close_link(self) -> None:
        """Say goodbye, so that the board is free when this returns."""
        link = self._link
        if link is not None:
            with contextlib.suppress(EdgepruneError, OSError):
                link.frames.request("bye", {}, work_s=5.0)
        self._drop()

    def close(self) -> None:
        """End the agent and the connection."""
        self._closed.set()
        self.close_link()


def ready(session: Session, expected_bytes: int, wait_s: float) -> list[str]:
    """What still makes the board unfit to be measured, after waiting for up to ``wait_s``; empty when it is fit."""
    fields = {"wait_s": wait_s, "expected_bytes": expected_bytes}
    reply, _ = session.request("ready", fields, work_s=wait_s + LINK_S)
    return list(replies.checked(replies.Ready, reply, session.name).reasons)


def not_ready(name: str, reasons: Sequence[str], wait_s: float) -> NotReady:
    """The error for a board that stayed unfit."""
    return NotReady(
        f"device {name!r} was not fit to be measured within {wait_s:.0f} s: {'; '.join(reasons)}",
        hint="let it cool, end what else runs there, or set thermal of the device",
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _workdir(device: Device) -> str:
    """Where the board keeps things; on this machine the default follows ``XDG_DATA_HOME``."""
    if device.transport == "local" and device.workdir == DEFAULT_WORKDIR:
        root = os.environ.get("XDG_DATA_HOME", "")
        if Path(root).is_absolute():
            return str(Path(root) / "edgeprune")
    return device.workdir


def _lease_file(device: Device) -> str | None:
    """The lock; on this machine ``EDGEPRUNE_LEASE_FILE`` may name another, for containers and tests."""
    if device.transport == "local" and device.lease_file is None:
        return os.environ.get("EDGEPRUNE_LEASE_FILE")
    return device.lease_file


def _agent_command(transport: Transport, device: Device) -> list[str]:
    """Push the agent under the name of its content, unless it is there, and say how to start it in a clean environment."""
    if device.transport == "replay":
        return ["replay"]
    home = _ask(transport, ["sh", "-c", 'cd && printf "\\n%s\\n" "$PWD"'])
    workdir = _expanded(_workdir(device), home)
    path = f"{workdir}/{agent_name()}"
    if _digest_there(transport, workdir, path) != agent_digest():
        transport.put(agent_bytes(), path)
    environment = [f"PATH={PATH}", f"HOME={home}", "LANG=C.UTF-8", "ORT_DISABLE_TELEMETRY=1"]
    return ["env", "-i", *environment, *_python(device, home), path]


def _digest_there(transport: Transport, workdir: str, path: str) -> str:
    """Digest of the agent on the board, empty when it is not there.

    Raises:
        Refusal: ``workdir`` when others could change what lies there between this look and the start of the agent.
    """
    done = transport.run(["sh", "-c", _LOOK, "sh", workdir, path], timeout_s=LINK_S)
    text = done.stdout.decode(errors="replace")
    found = re.search(r"^edgeprune-workdir (\d+) (\d+|none) ([0-7]+|none) ?(\w*)$", text, re.M)
    if done.code != 0 or found is None:
        said = clean(done.stderr.decode(errors="replace"))
        raise DeviceError(f"the board did not say who owns {clean(workdir)}: {said or 'no reason'}")
    user, owner, mode, digest = found.groups()
    if owner == "none":
        return ""
    is_open = bool(int(mode, 8) & 0o022)
    if owner != user or is_open:
        why = "can be written by other users" if owner == user else f"belongs to user {owner}"
        raise Refusal(
            "workdir",
            f"the workdir {clean(workdir)} on the board {why} (mode {mode}), so nothing in it can be trusted",
            hint="set another workdir for the device, or there: chmod go-w on your own folder",
        )
    return digest


def _python(device: Device, home: str) -> list[str]:
    if device.transport == "local" and device.python == "python3":
        # Isolated mode hides the user's own site-packages: drop it where numpy was installed there.
        has_user_site = Path(np.__file__).is_relative_to(site.getusersitepackages())
        return [sys.executable, *([] if has_user_site else ["-I"]), "-B"]
    return [_expanded(device.python, home), "-B"]


def _expanded(path: str, home: str) -> str:
    if path == "~" or path.startswith("~/"):
        return home + path[1:]
    return path if path.startswith("/") or "/" not in path else f"{home}/{path}"


def _ask(transport: Transport, argv: Sequence[str]) -> str:
    """The last line that a command prints; a login shell may print before it."""
    done = transport.run(argv, timeout_s=LINK_S)
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.code != 0 or not lines or not lines[-1].startswith("/"):
        raise DeviceError(
            f"{shlex.join(argv)} failed on the board with code {done.code}:"
            f" {clean(done.stderr.decode(errors='replace'))}"
        )
    return lines[-1]
