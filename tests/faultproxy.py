"""A TCP proxy on loopback that misbehaves on command: what a bad link does to a connection, in user space and without root.

::

    with FaultProxy(server.port) as proxy:
        transport = open_transport(server.device(port=proxy.port))
        proxy.hole()

Every command works at once, or when ``after`` more bytes went ``way``: ``"up"`` to the server, ``"down"`` to the client. Offsets
count from the command on, over all connections. One thread owns all sockets; it sleeps until a socket or a command wakes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal

Way = Literal["up", "down"]
HOST = "127.0.0.1"
BUFFER_BYTES = 32 * 1024  # small, so that a slow link is felt by the sender
TICK_S = 0.02  # a slow link moves its bytes in portions of this length
COMMAND_S = 5.0
# socket(7): SO_ATTACH_FILTER and SO_DETACH_FILTER of Linux, which Python does not name.
ATTACH_FILTER, DETACH_FILTER = 26, 27


class Link:
    """One client's connection; ``server`` is missing when it was accepted into a hole."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client, self.server = client, server
        self.lost = False  # bytes were swallowed: the stream can never be whole again
        self.waiting: dict[Way, bytearray] = {"up": bytearray(), "down": bytearray()}
        self.ended: dict[Way, bool] = {"up": False, "down": server is None}
        self.closed: dict[Way, bool] = {"up": False, "down": server is None}
        self.next_at: dict[Way, float] = {"up": 0.0, "down": 0.0}
        self.blocked: dict[Way, bool] = {"up": False, "down": False}

    def source(self, way: Way) -> socket.socket | None:
        return self.client if way == "up" else self.server

    def sink(self, way: Way) -> socket.socket | None:
        return self.server if way == "up" else self.client

    def sockets(self) -> list[socket.socket]:
        return [self.client] if self.server is None else [self.client, self.server]


class FaultProxy:
    """A proxy in front of ``target_port`` on loopback; clients connect to ``port``. Use as a context manager."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.port = 0
        self.connections = 0
        self.bytes: dict[Way, int] = {"up": 0, "down": 0}
        self.swallowed_bytes = 0
        self._rate: float | None = None
        self._hole: Literal["", "silent", "swallow"] = ""
        self._flips: dict[Way, set[int]] = {"up": set(), "down": set()}
        self._armed: dict[Way, list[tuple[int, Callable[[], None]]]] = {"up": [], "down": []}
        self._links: list[Link] = []
        self._commands: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._open = True

    def __enter__(self) -> FaultProxy:
        self._listen()
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._command(self._stop)
        self._thread.join(COMMAND_S)
        assert not self._thread.is_alive()
        self._waker.close()

    # Commands

    def hole(
        self,
        *,
        acknowledge: bool = False,
        refuse: bool = False,
        after: int = 0,
        way: Way = "up",
    ) -> None:
        """Nothing passes any more, in both directions.

        Args:
            acknowledge: ``False`` is a radio that lost its network: on Linux not even TCP is answered, and what was held comes
                through after :meth:`heal`. ``True`` is a far end that hangs: bytes are taken, answered by TCP, and dropped.
            refuse: refuse new connections; otherwise they end in the hole as well.
            after: bytes that still pass ``way`` before.
            way: what ``after`` counts.
        """

        def act() -> None:
            self._hole = "swallow" if acknowledge else "silent"
            if refuse:
                self._drop_listener()
            if not acknowledge:
                listeners = [] if self._listener is None else [self._listener]
                for sock in [s for link in self._links for s in link.sockets()] + listeners:
                    _deafen(sock)

        self._arm(act, after, way)

    def reset(self, *, after: int = 0, way: Way = "up") -> None:
        """End all connections with RST; new ones are served."""
        self._arm(lambda: self._end_all(reset=True), after, way)

    def cut(self, after: int = 0, way: Way = "up") -> None:
        """End all connections with FIN; new ones are served."""
        self._arm(lambda: self._end_all(reset=False), after, way)

    def slow(self, bytes_per_s: float, *, after: int = 0, way: Way = "up") -> None:
        """Let every connection pass so many bytes a second in each direction."""

        def act() -> None:
            self._rate = bytes_per_s

        self._arm(act, after, way)

    def flip(self, offset: int, way: Way = "down") -> None:
        """Flip the lowest bit of the byte ``offset``."""
        self._command(lambda: self._flips[way].add(self.bytes[way] + offset))

    def heal(self) -> None:
        """A good link again. Connections that lost bytes are reset; all other faults, also those still to come, are forgotten."""

        def act() -> None:
            self._hole, self._rate = "", None
            for way in self._armed:
                self._armed[way].clear()
                self._flips[way].clear()
            for link in [link for link in self._links if link.lost]:
                self._end(link, reset=True)
            for sock in [s for link in self._links for s in link.sockets()]:
                _undeafen(sock)
            if self._listener is None:
                self._listen()
            else:
                _undeafen(self._listener)

        self._command(act)

    # All below runs in the thread of the proxy

    def _command(self, act: Callable[[], None]) -> None:
        done = threading.Event()
        self._commands.append((act, done))
        self._waker.send(b"x")
        assert done.wait(COMMAND_S), "the proxy hangs"

    def _arm(self, act: Callable[[], None], after: int, way: Way) -> None:
        if after <= 0:
            self._command(act)
        else:
            self._command(lambda: self._armed[way].append((self.bytes[way] + after, act)))

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        listener.bind((HOST, self.port))
        listener.listen()
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener: socket.socket | None = listener

    def _drop_listener(self) -> None:
        if self._listener is not None:
            self._forget(self._listener)
            self._listener.close()
            self._listener = None

    def _stop(self) -> None:
        self._end_all(reset=True)
        self._drop_listener()
        self._open = False

    def _serve(self) -> None:
        while self._open:
            self._watch_sockets()
            ready = {key.fileobj: mask for key, mask in self._selector.select(self._pause_s())}
            if self._woken in ready:
                self._woken.recv(4096)
                # Who is connected for the kernel must be a link here before a command says what becomes of links.
                while self._hole != "silent" and self._accept():
                    pass
                while self._commands:
                    act, done = self._commands.popleft()
                    act()
                    done.set()
            if self._listener in ready:
                self._accept()
            for link in list(self._links):
                with self._broken_ends(link):
                    for way in ("up", "down"):
                        self._move(link, way, ready)
        self._selector.close()
        self._woken.close()

    @contextlib.contextmanager
    def _broken_ends(self, link: Link) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._end(link, reset=True)  # what one side did, the other side feels

    def _pause_s(self) -> float | None:
        now = time.monotonic()
        pauses = [
            link.next_at[way] - now
            for link in self._links
            for way in link.waiting
            if link.waiting[way] and not self._hole and not link.blocked[way]
        ]
        return max(0.0, min(pauses)) if pauses else None

    def _watch_sockets(self) -> None:
        """Register what is worth waiting for, and nothing else: a socket that is ready and not served would be a busy loop."""
        wanted: dict[socket.socket, int] = {}
        if self._listener is not None and self._hole != "silent":
            wanted[self._listener] = selectors.EVENT_READ
        for link in self._links if self._hole != "silent" else []:
            for way in link.waiting:
                source, sink = link.source(way), link.sink(way)
                room = len(link.waiting[way]) < BUFFER_BYTES
                if source is not None and room and not link.ended[way]:
                    wanted[source] = wanted.get(source, 0) | selectors.EVENT_READ
                if sink is not None and link.blocked[way]:
                    wanted[sink] = wanted.get(sink, 0) | selectors.EVENT_WRITE
        known = {key.fileobj: key.events for key in self._selector.get_map().values()}
        for sock in known.keys() - wanted.keys() - {self._woken}:
            self._selector.unregister(sock)
        for sock, events in wanted.items():
            if sock not in known:
                self._selector.register(sock, events)
            elif known[sock] != events:
                self._selector.modify(sock, events)

    def _accept(self) -> bool:
        """Take one new client; false when there is none."""
        if self._listener is None:
            return False
        try:
            client, _ = self._listener.accept()
        except OSError:
            return False  # none, or gone before it was taken
        self.connections += 1
        server = None
        if self._hole != "swallow":
            try:
                server = socket.create_connection((HOST, self._target_port), COMMAND_S)
            except OSError:
                _abort(client)
                return True
        link = Link(client, server)
        for sock in link.sockets():
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
        self._links.append(link)
        return True

    def _move(self, link: Link, way: Way, ready: dict[object, int]) -> None:
        source, waiting = link.source(way), link.waiting[way]
        if link not in self._links or source is None or link.closed[way]:
            return
        if ready.get(source, 0) & selectors.EVENT_READ and not link.ended[way]:
            with contextlib.suppress(BlockingIOError):
                piece = source.recv(BUFFER_BYTES)
                link.ended[way] = not piece
                waiting += piece
        if self._hole == "swallow" and waiting:
            self.swallowed_bytes += len(waiting)
            link.lost = True
            waiting.clear()
        self._forward(link, way)
        if link in self._links and link.ended[way] and not waiting and not self._hole:
            self._half_close(link, way)

    def _forward(self, link: Link, way: Way) -> None:
        waiting, sink = link.waiting[way], link.sink(way)
        while waiting and not self._hole and link in self._links:
            if time.monotonic() < link.next_at[way]:
                return
            assert sink is not None
            sent = self._send(sink, bytes(waiting[: self._portion(way)]), way)
            link.blocked[way] = not sent
            if not sent:
                return
            del waiting[:sent]
            if self._rate is not None:
                link.next_at[way] = time.monotonic() + sent / self._rate
            self.bytes[way] += sent
            self._fire(way)

    def _portion(self, way: Way) -> int:
        """How many bytes may pass before something must happen."""
        most = BUFFER_BYTES if self._rate is None else max(1, int(self._rate * TICK_S))
        return min([most, *(position - self.bytes[way] for position, _ in self._armed[way])])

    def _send(self, sink: socket.socket, piece: bytes, way: Way) -> int:
        damaged = bytearray(piece)
        for position in self._flips[way]:
            place = position - self.bytes[way]
            if 0 <= place < len(damaged):
                damaged[place] ^= 1
        try:
            return sink.send(damaged)
        except BlockingIOError:
            return 0

    def _fire(self, way: Way) -> None:
        due = [act for position, act in self._armed[way] if position <= self.bytes[way]]
        self._armed[way] = [a for a in self._armed[way] if a[0] > self.bytes[way]]
        for act in due:
            act()

    def _half_close(self, link: Link, way: Way) -> None:
        sink = link.sink(way)
        link.closed[way] = True
        if sink is not None:
            sink.shutdown(socket.SHUT_WR)
        if all(link.closed.values()):
            self._end(link, reset=False)

    def _end_all(self, *, reset: bool) -> None:
        for link in list(self._links):
            self._end(link, reset=reset)

    def _end(self, link: Link, *, reset: bool) -> None:
        if link not in self._links:
            return
        self._links.remove(link)
        for sock in link.sockets():
            self._forget(sock)
            if reset:
                _abort(sock)
            else:
                # Closing with unread bytes would send RST: drain what is there first.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(BUFFER_BYTES):
                        pass
                sock.close()

    def _forget(self, sock: socket.socket) -> None:
        if sock in {key.fileobj for key in self._selector.get_map().values()}:
            self._selector.unregister(sock)


def _abort(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _deafen(sock: socket.socket) -> None:
    """Drop every packet that comes for the socket before TCP sees it: a filter program of one instruction, "keep 0 bytes"."""
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
        head = struct.pack("HL", 1, ctypes.addressof(program))
        sock.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, head)


def _undeafen(sock: socket.socket) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it had none
            sock.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)
