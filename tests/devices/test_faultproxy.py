"""The proxy that the failure tests stand on does what it says, between a client and a plain echo server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from faultproxy import FaultProxy


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while piece := sock.recv(65536):
                sock.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(echo: int) -> Iterator[FaultProxy]:
    with FaultProxy(echo) as running:
        yield running


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as sock:
        yield sock


def receive(sock: socket.socket, n: int) -> bytes:
    """Up to ``n`` bytes: fewer only at the end of the stream."""
    content = b""
    while len(content) < n and (piece := sock.recv(n - len(content))):
        content += piece
    return content


def say(sock: socket.socket, content: bytes) -> bytes:
    sock.sendall(content)
    return receive(sock, len(content))


def wait_until(holds, seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.01)


def is_silent(sock: socket.socket, seconds: float = 0.3) -> bool:
    sock.settimeout(seconds)
    try:
        return sock.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        sock.settimeout(2)


def test_without_a_fault_all_bytes_pass_and_are_counted(proxy, client):
    content = bytes(range(256)) * 2000
    sender = threading.Thread(target=client.sendall, args=(content,), daemon=True)
    sender.start()
    assert receive(client, len(content)) == content
    # The last piece may arrive here before the proxy's thread has counted it.
    wait_until(lambda: proxy.bytes == {"up": len(content), "down": len(content)})
    assert proxy.connections == 1


def test_the_end_of_one_direction_is_passed_on(proxy, client):
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert receive(client, 100) == b"last words"


def test_in_a_hole_nothing_passes_and_after_it_all_that_was_held_comes(proxy, client):
    assert say(client, b"a") == b"a"
    proxy.hole()
    client.sendall(b"held")
    assert is_silent(client)
    assert proxy.bytes["up"] == 1
    proxy.heal()
    assert receive(client, 4) == b"held"


def test_tcp_itself_notices_a_hole(proxy, client):
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
    client.settimeout(5)
    proxy.hole()
    client.sendall(b"x")
    with pytest.raises(TimeoutError) as caught:
        client.recv(1)
    assert caught.value.errno is not None  # ETIMEDOUT of the kernel, not the timer of Python


def test_a_new_connection_ends_in_the_hole(proxy):
    proxy.hole()
    with pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", proxy.port), 0.3)
    proxy.heal()
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as sock:
        assert say(sock, b"back") == b"back"


def test_a_hole_can_refuse_new_connections(proxy):
    proxy.hole(refuse=True)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), 2)
    proxy.heal()
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as sock:
        assert say(sock, b"back") == b"back"


def test_a_hole_that_acknowledges_takes_bytes_and_new_connections(proxy, client):
    proxy.hole(acknowledge=True)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 200)
    client.sendall(b"swallowed")
    assert is_silent(client, 0.6)
    assert proxy.swallowed_bytes == 9
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as late:
        late.sendall(b"more")
        assert is_silent(late)
    proxy.heal()
    with pytest.raises(ConnectionResetError):  # its stream has a gap now
        client.recv(1)


def test_a_hole_opens_after_some_bytes(proxy, client):
    proxy.hole(after=3)
    client.sendall(b"abcdef")
    assert is_silent(client)
    assert proxy.bytes == {"up": 3, "down": 0}
    proxy.heal()
    assert receive(client, 6) == b"abcdef"


def test_a_reset_is_felt_as_one(proxy, client):
    assert say(client, b"a") == b"a"
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection(("127.0.0.1", proxy.port), 2) as sock:
        assert say(sock, b"again") == b"again"


def test_a_reset_comes_after_some_bytes_down(proxy, client):
    proxy.reset(after=2, way="down")
    client.sendall(b"abcdef")
    with pytest.raises(ConnectionResetError):
        receive(client, 6)
    assert proxy.bytes["down"] == 2


def test_a_cut_is_a_clean_end_after_exactly_so_many_bytes(proxy, client):
    assert say(client, b"before") == b"before"
    proxy.cut(4, "down")
    client.sendall(b"abcdefgh")
    assert receive(client, 8) == b"abcd"


def test_one_bit_of_one_byte_is_flipped_in_the_direction_asked_for(proxy, client):
    assert say(client, b"a") == b"a"
    proxy.flip(1, "up")
    assert say(client, b"@@@@") == b"@A@@"
    proxy.flip(2, "down")
    assert say(client, b"@@@@") == b"@@A@"
    assert say(client, b"@@@@") == b"@@@@"


def test_a_slow_link_takes_its_time_and_loses_nothing(proxy, client):
    proxy.slow(100_000)
    content = b"x" * 50_000
    client.settimeout(10)
    start = time.monotonic()
    assert say(client, content) == content
    assert 0.4 < time.monotonic() - start < 3


def test_a_slow_link_pushes_back(proxy, client):
    proxy.slow(10_000)
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.sendall(b"x" * 8_000_000)


def test_an_idle_proxy_uses_no_time(proxy, client):
    assert say(client, b"a") == b"a"
    for fault in (lambda: None, proxy.hole, lambda: proxy.slow(1000)):
        fault()
        client.sendall(b"b")
        start = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - start < 0.15


def test_a_dead_target_is_a_reset_and_not_a_hang():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with (
        FaultProxy(port) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), 2) as sock,
    ):
        sock.recv(1)


def test_leaving_closes_every_socket(echo):
    with FaultProxy(echo) as proxy:
        sock = socket.create_connection(("127.0.0.1", proxy.port), 2)
        assert say(sock, b"a") == b"a"
    with sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), 2)
