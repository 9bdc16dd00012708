"""Commands on a board over SSH, with paramiko under deadlines of our own.

What paramiko leaves open and this module closes: its timeouts restart with every byte and run on the wall clock; a dead link reads like the
end of the output; unread stderr stalls stdout; it tries keys that nobody asked for; it offers CBC, 3DES and MD5. So every operation runs
under a total deadline on the monotonic clock that cuts the socket, success needs an exit code, stderr is always drained, exactly one login
method is tried, and that only after the host key was found to be the pinned one.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import paramiko

from edgeprune.devices.link.login import check_host_key, connect, handshake, login, within
from edgeprune.devices.link.pipe import MAX_OUTPUT_BYTES, MAX_TAIL_BYTES, Completed
from edgeprune.errors import DeviceError, LinkLost
from edgeprune.records.device import Device

START_S = 15.0
# Something must be in flight for a dead link to be noticed: with DEAD_LINK_MS, within 12 s.
KEEPALIVE_S = 3
STALL_S = 30.0  # a transfer may take long, but not stand still
SLOWEST_BITS_PER_S = 10_000  # the total deadline of a transfer, for a far end that drips
CHUNK_BYTES = 32 * 1024
LOST_S = 0.5
MAX_BANNER_BYTES = 64 * 1024
# The marker tells our command's output from what a login shell prints before it.
_MARKED = 'printf "%s" "$1"; shift; exec "$@"'
# Complete or not at all: a broken connection ends stdin early, so the size is compared before the rename. Noclobber opens with O_EXCL,
# so a planted link is not followed. C locale: the words of an error are compared.
_PUT = """umask 077; trap '' HUP PIPE; LC_ALL=C; export LC_ALL
part="$1.$3"; folder=$(dirname "$1")
if [ -d "$1" ]; then echo "is a folder" >&2; exit 1; fi
mkdir -p "$folder" || exit 1
set -C
cat >"$part" && [ "$(wc -c <"$part")" -eq "$2" ] && mv -f "$part" "$1" && exit 0
rm -f "$part"; df -Pk "$folder"; exit 1"""
_FULL = ("no space left", "quota exceeded")
_FORBIDDEN = ("read-only file system", "permission denied")


class SshPipe:
    """A running command on the board."""

    def __init__(self, owner: SshTransport, channel: paramiko.Channel) -> None:
        self._owner = owner
        self._channel = channel
        self._tail = b""
        self._drain = threading.Thread(target=self._drain_stderr, daemon=True)
        self._drain.start()

    def _drain_stderr(self) -> None:
        while piece := self._channel.recv_stderr(1 << 16):
            self._tail = (self._tail + piece)[-MAX_TAIL_BYTES:]

    def write(self, content: bytes, deadline: float) -> None:
        """As :meth:`Pipe.write <edgeprune.devices.link.pipe.Pipe.write>`."""
        with self._owner.within(deadline, "sending to the board"):
            self._channel.sendall(content)

    def read(self, n: int, deadline: float) -> bytes:
        """As :meth:`Pipe.read <edgeprune.devices.link.pipe.Pipe.read>`."""
        with self._owner.within(deadline, "waiting for the board"):
            piece: bytes = self._channel.recv(n)
        if not piece:
            self._owner.check_alive(self._channel)
        return piece

    def stderr_tail(self) -> str:
        """Last 16 KiB of stderr; waits a moment for a command that is just ending."""
        self._drain.join(0.5)
        return self._tail.decode(errors="replace")

    def close(self) -> None:
        """End of input for the command, which the agent takes as the order to stop; closing alone would not end it."""
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.shutdown_write()
            self._channel.close()


class SshTransport:
    """One logged-in connection. After :class:`DeadlineExceeded` it is cut and serves nothing more.

    Args:
        place: ``host:port``, for messages.
        sock: the connected socket.
        client: the authenticated paramiko transport over it.
    """

    def __init__(self, place: str, sock: socket.socket, client: paramiko.Transport) -> None:
        self._place = place
        self._sock = sock
        self._client = client

    @contextlib.contextmanager
    def within(
        self, deadline: float, doing: str, moved: Callable[[], int] | None = None
    ) -> Iterator[None]:
        """Cut the connection when the block outlasts ``deadline`` (monotonic seconds) or stands still, and map foreign errors."""
        try:
            with within(
                self._sock, deadline, f"{doing} ({self._place})", moved=moved, stall_s=STALL_S
            ):
                yield
        except DeviceError as error:
            foreign = error.__cause__ is not None
            # A refused channel leaves the connection as it is; everything else may be the first sign of its end.
            if foreign and not isinstance(error.__cause__, paramiko.ChannelException):
                self._raise_if_lost(error)
            raise

    def _raise_if_lost(self, cause: DeviceError | None = None) -> None:
        # The library wakes those who wait a moment before it says that the connection ended.
        self._client.join(LOST_S)
        if not self._client.is_active():
            raise LinkLost(f"the connection to {self._place} broke", hint="run again") from cause

    def check_alive(self, channel: paramiko.Channel) -> None:
        """Raise :class:`LinkLost` when the channel ended with the connection: an empty read alone does not tell."""
        if not channel.eof_received:
            self._raise_if_lost()

    def start(self, argv: Sequence[str]) -> SshPipe:
        """As :meth:`Transport.start <edgeprune.devices.link.pipe.Transport.start>`."""
        with self.within(time.monotonic() + START_S, "starting a command"):
            return SshPipe(self, self._execute(argv))

    def _execute(self, argv: Sequence[str]) -> paramiko.Channel:
        channel = self._client.open_session(timeout=START_S)
        # The one place where arguments become a shell line.
        channel.exec_command("exec " + shlex.join(argv))
        return channel

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """As :meth:`Transport.run <edgeprune.devices.link.pipe.Transport.run>`."""
        with self.within(time.monotonic() + timeout_s, f"running {argv[0]!r}"):
            return self._run(argv, stdin, _Flow())

    def _run(self, argv: Sequence[str], stdin: bytes, flow: _Flow) -> Completed:
        marker = secrets.token_hex(16).encode()
        channel = self._execute(["sh", "-c", _MARKED, "sh", marker.decode(), *argv])
        try:
            out, err = _communicate(channel, stdin, marker, flow)
            banner, found, out = out.partition(marker)
            is_flood = len(banner) > MAX_BANNER_BYTES  # which need not have an end
            code = 0 if is_flood else channel.recv_exit_status()
        finally:
            channel.close()
        if code < 0:
            self.check_alive(channel)
            raise DeviceError(f"{argv[0]!r} on {self._place} was ended by a signal")
        if is_flood or not found:
            raise DeviceError(
                f"the login shell of {self._place} printed {len(banner)} bytes or more instead of running {argv[0]!r}",
                hint="the account needs a POSIX shell that prints little",
            )
        return Completed(code, out, err)

    def _transfer(
        self, argv: Sequence[str], doing: str, size: int, stdin: bytes = b""
    ) -> Completed:
        """Run a command that moves up to ``size`` bytes: it may be slow, but not stand still."""
        flow = _Flow()
        deadline = time.monotonic() + 60 + size * 8 / SLOWEST_BITS_PER_S
        moved = lambda: flow.sent_bytes + flow.received_bytes - _unsent_bytes(self._sock)  # noqa: E731
        with self.within(deadline, doing, moved):
            return self._run(argv, stdin, flow)

    def put(self, content: bytes, remote_path: str) -> None:
        """As :meth:`Transport.put <edgeprune.devices.link.pipe.Transport.put>`."""
        suffix = f"part-{secrets.token_hex(6)}"
        argv = ["sh", "-c", _PUT, "sh", remote_path, str(len(content)), suffix]
        done = self._transfer(argv, f"writing {remote_path!r}", len(content), content)
        if done.code != 0:
            raise self._not_written(done, remote_path, len(content))

    def _not_written(self, done: Completed, path: str, size: int) -> DeviceError:
        reason = _last_line(done.stderr)
        if any(words in reason.lower() for words in _FULL):
            return DeviceError(
                f"the disk of {path!r} on {self._place} is full: {size} bytes needed, {_free_bytes(done.stdout)} bytes available",
                hint="free space there, or set workdir of the device to another disk",
            )
        is_forbidden = any(words in reason.lower() for words in _FORBIDDEN)
        return DeviceError(
            f"cannot write {path!r} on {self._place}: {reason}",
            hint="set workdir of the device to a folder that its user can write"
            if is_forbidden
            else None,
        )

    def get(self, remote_path: str) -> bytes:
        """As :meth:`Transport.get <edgeprune.devices.link.pipe.Transport.get>`."""
        done = self._transfer(["cat", remote_path], f"reading {remote_path!r}", MAX_OUTPUT_BYTES)
        if done.code != 0:
            raise DeviceError(
                f"cannot read {remote_path!r} on {self._place}: {_last_line(done.stderr)}"
            )
        return done.stdout

    def close(self) -> None:
        """End the connection."""
        self._client.close()
        self._sock.close()


@dataclass
class _Flow:
    """Bytes of one command that went through the channel so far."""

    sent_bytes: int = 0
    received_bytes: int = 0


def _communicate(
    channel: paramiko.Channel, stdin: bytes, marker: bytes, flow: _Flow
) -> tuple[bytes, bytes]:
    """Send all input while both outputs are read, to the end of all three. A flood before the marker ends it early."""
    errors = bytearray()

    def send() -> None:
        # A command may end without reading its input.
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while piece := stdin[flow.sent_bytes : flow.sent_bytes + CHUNK_BYTES]:
                if not (n := channel.send(piece)):
                    return  # closed
                flow.sent_bytes += n
            channel.shutdown_write()

    def drain() -> None:
        while piece := channel.recv_stderr(1 << 16):
            if len(errors) < MAX_OUTPUT_BYTES:
                errors.extend(piece)

    threads = [threading.Thread(target=work, daemon=True) for work in (send, drain)]
    for thread in threads:
        thread.start()
    output = bytearray()
    started = False
    while piece := channel.recv(1 << 18):
        output += piece
        flow.received_bytes += len(piece)
        started = started or marker in output
        if not started and len(output) > MAX_BANNER_BYTES + len(marker):
            return bytes(output), bytes(errors)
        if len(output) > MAX_OUTPUT_BYTES:
            raise DeviceError(f"a command printed more than {MAX_OUTPUT_BYTES} bytes")
    threads[1].join()
    return bytes(output), bytes(errors)


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes that the other side has not acknowledged yet (SIOCOUTQ, tcp(7)); 0 where the system does not tell."""
    try:
        import fcntl
        import termios

        answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4)
    except (ImportError, AttributeError, OSError, ValueError):
        return 0
    return int.from_bytes(answer, sys.byteorder)


def _free_bytes(df: bytes) -> int | str:
    """Room that ``df -Pk`` shows: the fourth field of its last line (POSIX), in KiB."""
    lines = df.decode(errors="replace").strip().splitlines()
    fields = lines[-1].split() if lines else []
    return (
        int(fields[3]) * 1024
        if len(fields) > 4 and fields[3].isdecimal()
        else "an unknown number of"
    )


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return "".join(c for c in lines[-1] if c.isprintable())[-300:] if lines else "no reason given"


def open_transport(device: Device) -> SshTransport:
    """A logged-in connection to the device.

    Raises:
        Unreachable: no address of the host answered in time.
        HostKeyMismatch: the host key is not the pinned one; nothing was sent to it.
        AuthFailed: the login was refused.
        LinkLost: the connection broke during the login.
        SpecError: the key file or the secret reference is unusable.
    """
    assert device.host is not None  # the record refuses an ssh device without them
    assert device.host_key is not None
    place = f"{device.host}:{device.port}"
    sock = connect(device.host, device.port, device.connect_timeout_s)
    try:
        client = handshake(sock, place, [device.host_key.key_type], device.connect_timeout_s)
        try:
            check_host_key(client, device.host_key, place)
            login(client, sock, device, place)
        except BaseException:
            client.close()
            raise
    except BaseException:
        sock.close()
        raise
    client.set_keepalive(KEEPALIVE_S)
    return SshTransport(place, sock, client)
