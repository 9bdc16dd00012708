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
import threading
import time
from collections.abc import Sequence

import paramiko

from edgeprune.devices.transports import MAX_OUTPUT_BYTES, MAX_TAIL_BYTES, Completed
from edgeprune.devices.transports._login import (
    check_host_key,
    connect,
    handshake,
    login,
    within,
)
from edgeprune.errors import DeviceError, Unreachable
from edgeprune.specs import Device

START_S = 15.0
KEEPALIVE_S = 5  # something must be in flight for a dead link to be noticed
MAX_BANNER_BYTES = 64 * 1024
# The marker tells our command's output from what a login shell prints before it.
_MARKED = 'printf "%s" "$1"; shift; exec "$@"'
# Complete or not at all: a broken connection ends stdin early, so the size is compared before the rename.
_PUT = """umask 077
[ ! -d "$1" ] && mkdir -p "$(dirname "$1")" && cat >"$1.$3" && [ "$(wc -c <"$1.$3")" -eq "$2" ] && mv -f "$1.$3" "$1" && exit 0
rm -f "$1.$3"; exit 1"""


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
        """As :meth:`Pipe.write <edgeprune.devices.transports.Pipe.write>`."""
        with self._owner.within(deadline, "sending to the board"):
            self._channel.sendall(content)

    def read(self, n: int, deadline: float) -> bytes:
        """As :meth:`Pipe.read <edgeprune.devices.transports.Pipe.read>`."""
        with self._owner.within(deadline, "waiting for the board"):
            piece: bytes = self._channel.recv(n)
        if not piece:
            self._owner.check_alive()
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

    def within(self, deadline: float, doing: str) -> contextlib.AbstractContextManager[None]:
        """Cut the connection when the block outlasts ``deadline`` (monotonic seconds), and map foreign errors."""
        return within(self._sock, deadline, f"{doing} ({self._place})")

    def check_alive(self) -> None:
        """Raise :class:`Unreachable` when the connection is gone: an empty read alone does not tell."""
        if not self._client.is_active():
            raise Unreachable(f"the connection to {self._place} broke", hint="run again")

    def start(self, argv: Sequence[str]) -> SshPipe:
        """As :meth:`Transport.start <edgeprune.devices.transports.Transport.start>`."""
        with self.within(time.monotonic() + START_S, "starting a command"):
            return SshPipe(self, self._execute(argv))

    def _execute(self, argv: Sequence[str]) -> paramiko.Channel:
        channel = self._client.open_session(timeout=START_S)
        # The one place where arguments become a shell line.
        channel.exec_command("exec " + shlex.join(argv))
        return channel

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """As :meth:`Transport.run <edgeprune.devices.transports.Transport.run>`."""
        marker = secrets.token_hex(16)
        marked = ["sh", "-c", _MARKED, "sh", marker, *argv]
        with self.within(time.monotonic() + timeout_s, f"running {argv[0]!r}"):
            channel = self._execute(marked)
            try:
                out, err = _communicate(channel, stdin)
                code = channel.recv_exit_status()
            finally:
                channel.close()
        if code < 0:
            self.check_alive()
            raise DeviceError(f"{argv[0]!r} on {self._place} was ended by a signal")
        banner, found, out = out.partition(marker.encode())
        if not found or len(banner) > MAX_BANNER_BYTES:
            raise DeviceError(
                f"the login shell of {self._place} printed {len(banner)} bytes instead of running {argv[0]!r}",
                hint="the account needs a POSIX shell that prints little",
            )
        return Completed(code, out, err)

    def put(self, content: bytes, remote_path: str) -> None:
        """As :meth:`Transport.put <edgeprune.devices.transports.Transport.put>`."""
        suffix = f"part-{secrets.token_hex(6)}"
        argv = ["sh", "-c", _PUT, "sh", remote_path, str(len(content)), suffix]
        done = self.run(argv, stdin=content, timeout_s=_transfer_s(len(content)))
        if done.code != 0:
            raise DeviceError(
                f"cannot write {remote_path!r} on {self._place}: {_last_line(done.stderr)}"
            )

    def get(self, remote_path: str) -> bytes:
        """As :meth:`Transport.get <edgeprune.devices.transports.Transport.get>`."""
        done = self.run(["cat", remote_path], timeout_s=_transfer_s(MAX_OUTPUT_BYTES // 16))
        if done.code != 0:
            raise DeviceError(
                f"cannot read {remote_path!r} on {self._place}: {_last_line(done.stderr)}"
            )
        return done.stdout

    def close(self) -> None:
        """End the connection."""
        self._client.close()
        self._sock.close()


def _communicate(channel: paramiko.Channel, stdin: bytes) -> tuple[bytes, bytes]:
    """Send all input while both outputs are read, to the end of all three."""
    errors = bytearray()

    def send() -> None:
        # A command may end without reading its input.
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.sendall(stdin)
            channel.shutdown_write()

    def drain() -> None:
        while piece := channel.recv_stderr(1 << 16):
            if len(errors) < MAX_OUTPUT_BYTES:
                errors.extend(piece)

    threads = [threading.Thread(target=work, daemon=True) for work in (send, drain)]
    for thread in threads:
        thread.start()
    output = bytearray()
    while piece := channel.recv(1 << 18):
        output += piece
        if len(output) > MAX_OUTPUT_BYTES:
            raise DeviceError(f"a command printed more than {MAX_OUTPUT_BYTES} bytes")
    threads[1].join()
    return bytes(output), bytes(errors)


def _transfer_s(size_bytes: int) -> float:
    """Patience for a link of 100 kbit/s."""
    return 60 + size_bytes * 8 / 100_000


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return "".join(c for c in lines[-1] if c.isprintable())[-300:] if lines else "no reason given"


def open_transport(device: Device) -> SshTransport:
    """A logged-in connection to the device.

    Raises:
        Unreachable: no address of the host answered in time.
        HostKeyMismatch: the host key is not the pinned one; nothing was sent to it.
        DeviceError: the login was refused.
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
