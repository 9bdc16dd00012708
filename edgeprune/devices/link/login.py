"""From an address to a logged-in SSH connection: resolve, connect, compare the host key, log in once, each under a total deadline."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from edgeprune.devices.link.secrets import Secret, read_private, resolve
from edgeprune.errors import (
    AuthFailed,
    DeadlineExceeded,
    DeviceError,
    EdgepruneError,
    HostKeyMismatch,
    HungUp,
    LinkLost,
    SpecError,
    Unreachable,
)
from edgeprune.records.device import AgentAuth, Device, HostKey, PasswordAuth

LOGIN_S = 15.0
HANDSHAKE_RATIO = 2.0  # time for the key exchange, against the time to connect
DEAD_LINK_MS = 8_000
CIPHERS = (
    "aes256-gcm@openssh.com",
    "aes128-gcm@openssh.com",
    "aes256-ctr",
    "aes192-ctr",
    "aes128-ctr",
)
KEY_TYPES = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
)
MACS = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
)

_log_name = "edgeprune.ssh"
# paramiko reports broken connections on stderr unless its logger has a handler; we raise instead.
logging.getLogger(_log_name).addHandler(logging.NullHandler())


@contextlib.contextmanager
def within(
    sock: socket.socket,
    deadline: float,
    doing: str,
    *,
    moved: Callable[[], int] | None = None,
    stall_s: float = float("inf"),
) -> Iterator[None]:
    """The total deadline: a watch that shuts the socket, which ends whatever waits on it.

    Args:
        sock: the connected socket.
        deadline: in seconds of :func:`time.monotonic`.
        doing: what the block does, for messages.
        moved: a count that grows as long as there is progress.
        stall_s: how long ``moved`` may stand still.

    Raises:
        DeadlineExceeded: the block outlasted the deadline, or stood still.
        DeviceError: anything foreign that went wrong in it, as its cause.
    """
    done = threading.Event()
    verdict: list[str] = []

    def watch() -> None:
        if problem := _overdue(done, deadline, moved, stall_s):
            verdict.append(problem)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        # What the other side sends can break the SSH library in any way: a flipped bit is an InvalidTag of its crypto library.
        if not verdict:
            if isinstance(error, EdgepruneError):
                raise
            raise DeviceError(f"{doing} failed: {error or type(error).__name__}") from error
    finally:
        done.set()
    if verdict:
        raise DeadlineExceeded(f"{doing} {verdict[0]}")


def _overdue(
    done: threading.Event, deadline: float, moved: Callable[[], int] | None, stall_s: float
) -> str:
    """Wait for the end of the work; gives what is wrong when it has to be cut, or nothing."""
    most, since = -1, time.monotonic()
    while True:
        now = time.monotonic()
        if now >= deadline:
            return "outlasted its deadline"
        pause = min(deadline - now, threading.TIMEOUT_MAX)
        if moved is not None:
            if (count := moved()) > most:
                most, since = count, now
            elif now - since >= stall_s:
                return f"stood still for {stall_s:g} s"
            pause = min(pause, stall_s / 20)
        if done.wait(pause):
            return ""


def seen_host_key(host: str, port: int, timeout_s: float, *, prefer: str | None = None) -> HostKey:
    """The host key that a server shows now, for a person to compare with the one on its console. No login is tried.

    Args:
        host: a name or an address.
        port: of the SSH server.
        timeout_s: for each address; twice that for the key exchange.
        prefer: the type to ask for first. The rest follows in the order Ed25519, ECDSA, RSA; the server gives the first that it has,
            since the client's order decides (RFC 4253, section 7.1).

    Raises:
        Unreachable: no address of the host answered in time.
        HostKeyMismatch: the server has a key of none of these types.
    """
    wanted = KEY_TYPES if prefer is None else (prefer, *(k for k in KEY_TYPES if k != prefer))
    sock = connect(host, port, timeout_s)
    try:
        client = handshake(sock, f"{host}:{port}", wanted, timeout_s)
        try:
            key = client.get_remote_server_key()
            return HostKey(sha256=_fingerprint(key), key_type=key.get_name())
        finally:
            client.close()
    finally:
        sock.close()


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """A TCP connection to the first address that answers; each gets its own time, so that a dead IPv6 address costs only its share."""
    problem = "it has no address"
    for family, kind, protocol, _, address in _addresses(host, port, timeout_s):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_LINK_MS)
            return sock
        except OSError as error:
            sock.close()
            problem = f"no answer in {timeout_s:g} s" if isinstance(error, TimeoutError) else ""
            problem = problem or (error.strerror or type(error).__name__).lower()
    raise Unreachable(
        f"{host}:{port} cannot be reached: {problem}",
        hint="check that the board is on and that its host and port are right",
    )


def _addresses(host: str, port: int, timeout_s: float) -> list[Any]:
    """All addresses of a host. The resolver has no timeout, so it runs aside and is left behind when it takes too long."""
    found: list[Any] = []

    def look() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return list(found)


def handshake(
    sock: socket.socket, place: str, key_types: Sequence[str], timeout_s: float
) -> paramiko.Transport:
    """Exchange keys, in twice the time allowed to connect. Only these types of host key are asked for: another would look changed."""
    client = paramiko.Transport(sock)
    client.set_log_channel(_log_name)
    client.daemon = True
    limit_s = HANDSHAKE_RATIO * timeout_s
    client.banner_timeout = client.handshake_timeout = limit_s
    client.auth_timeout = client.channel_timeout = LOGIN_S
    options = client.get_security_options()
    options.ciphers, options.digests = CIPHERS, MACS
    # An RSA key is asked for by its signatures, so that SHA-1 is never one of them.
    rsa = ("rsa-sha2-512", "rsa-sha2-256")
    try:
        options.key_types = [n for k in key_types for n in (rsa if k == "ssh-rsa" else (k,))]
    except ValueError:
        raise SpecError(f"host_key.key_type {key_types[0]!r} is not a known type") from None
    try:
        with within(sock, time.monotonic() + limit_s, f"the SSH handshake ({place})"):
            client.start_client(timeout=limit_s)
    except DeadlineExceeded as error:
        client.close()
        raise Unreachable(f"{place} accepts connections but does not speak SSH") from error
    except DeviceError as error:
        client.close()
        if isinstance(error.__cause__, IncompatiblePeer):
            raise HostKeyMismatch(
                f"{place} shares no {' or '.join(key_types)} host key, cipher or key exchange with this program"
            ) from error
        raise HungUp(
            error.message,
            hint="is this the SSH port? a server with too many logins under way (MaxStartups) hangs up like this: try again",
        ) from error
    return client


def _fingerprint(key: paramiko.PKey) -> str:
    digest = hashlib.sha256(key.asbytes()).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check_host_key(client: paramiko.Transport, pinned: HostKey, place: str) -> None:
    """Raise :class:`HostKeyMismatch`, which shows both fingerprints, unless the server's key is the pinned one."""
    key = client.get_remote_server_key()
    seen = _fingerprint(key)
    if (key.get_name(), seen) != (pinned.key_type, pinned.sha256):
        raise HostKeyMismatch(
            f"{place} shows the host key {key.get_name()} {seen}, but {pinned.sha256} is pinned",
            hint="compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on its console;"
            " only when that shows the new one: edgeprune devices rekey",
        )


def login(client: paramiko.Transport, sock: socket.socket, device: Device, place: str) -> None:
    """One attempt with the one method of the device.

    Raises:
        AuthFailed: refused.
        LinkLost: the connection broke before the answer.
    """
    auth = device.auth
    assert auth is not None
    secret = resolve(auth.password_ref) if isinstance(auth, PasswordAuth) else None
    key = None if secret is not None else _private_key(device)
    problem: DeviceError | None = None
    try:
        with within(sock, time.monotonic() + LOGIN_S, f"the login ({place})"):
            accepted = _accepted(client, device.user, secret, key)
    except DeadlineExceeded as error:
        problem = DeadlineExceeded(error.message)
    except DeviceError as error:
        problem = LinkLost(error.message, hint="run again")
    # What failed inside is not kept as a cause: frames of the SSH library in its traceback hold the password.
    if problem is not None:
        raise problem from None
    if not accepted:
        raise AuthFailed(
            f"login refused: {place} does not let {device.user!r} in by {auth.method}",
            hint="check user and auth of the device; nothing else was tried",
        )


def _accepted(
    client: paramiko.Transport, user: str | None, secret: Secret | None, key: paramiko.PKey | None
) -> bool:
    assert user is not None
    try:
        if secret is not None:
            client.auth_password(user, secret.reveal(), fallback=False)
        else:
            assert key is not None
            client.auth_publickey(user, key)
    except paramiko.AuthenticationException:
        return False
    return bool(client.is_authenticated())


def _private_key(device: Device) -> paramiko.PKey:
    auth = device.auth
    if isinstance(auth, AgentAuth):
        for key in paramiko.Agent().get_keys():
            if _fingerprint(key) == auth.key_fingerprint:
                return key
        raise SpecError(
            f"the running ssh-agent has no key {auth.key_fingerprint}", hint="run: ssh-add"
        )
    assert auth is not None
    assert auth.method == "key"
    return _load_key(auth.key_file, resolve(auth.passphrase_ref) if auth.passphrase_ref else None)


def _load_key(path: str, passphrase: Secret | None) -> paramiko.PKey:
    key = _parsed_key(read_private(Path(path), "key file"), passphrase)
    if key is None:
        raise SpecError(
            f"the key file {path} must hold an Ed25519, ECDSA or RSA private key that auth.passphrase_ref opens, if it is locked"
        )
    return key


def _parsed_key(content: bytes, passphrase: Secret | None) -> paramiko.PKey | None:
    text = content.decode(errors="replace")
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        # The crypto library tells another kind of key, a wrong passphrase and damage apart in words only, and those may quote the file.
        with contextlib.suppress(ValueError, TypeError, paramiko.SSHException):
            key: paramiko.PKey = kind.from_private_key(
                io.StringIO(text), passphrase.reveal() if passphrase else None
            )
            return key
    return None
