"""The proxy that stands for the network does what its faults say; else they prove nothing."""

import socket
import threading
from collections.abc import Iterator

import pytest

from afterclick.streams.processes import free_port
from tests.fault.proxy import HOST, TO_CLIENT, TO_SERVER, Proxy


class Echo:
    """Answers every line with `name: line`; remembers the lines."""

    def __init__(self, name: str) -> None:
        self.name, self.port, self.lines = name, free_port(), [""]
        self.came = threading.Condition()
        self._socket = socket.create_server((HOST, self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb", buffering=0) as file:
            try:
                for line in file:
                    with self.came:
                        self.lines.append(line.decode().strip())
                        self.came.notify_all()
                    file.write(f"{self.name}: {line.decode()}".encode())
            except OSError:
                return

    def wait_for(self, line: str) -> bool:
        with self.came:
            return self.came.wait_for(lambda: line in self.lines, 10)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def is_reset(port: int) -> bool:
    """Whether a new connection is broken at once."""
    try:
        with socket.create_connection((HOST, port), 10) as client:
            return client.recv(1) == b""
    except ConnectionError:
        return True


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo("a")
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, proxy.port), 10) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"a: hello\n"
        yield client


def test_what_is_held_is_delivered_later_and_in_order(
    proxy: Proxy, echo: Echo, client: socket.socket
) -> None:
    """A stalled network loses nothing; the worker's patience is what is tried."""
    proxy.hold()
    client.sendall(b"one\n")
    client.sendall(b"two\n")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    assert echo.lines == ["", "hello"]
    client.settimeout(10)
    proxy.release()
    assert client.makefile().readline() == "a: one\n"
    assert echo.wait_for("two")


def test_answers_alone_can_be_held(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """The server did it, the client never hears: what a compare-and-set must bear."""
    proxy.hold(TO_CLIENT)
    client.sendall(b"one\n")
    assert echo.wait_for("one")
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_dead_clients_last_bytes_arrive_late(
    proxy: Proxy, echo: Echo, client: socket.socket
) -> None:
    """A zombie's write can come after its death; the fence is against this."""
    proxy.hold(TO_SERVER)
    client.sendall(b"late\n")
    while not proxy.held(TO_SERVER, b"late"):
        pass
    client.close()
    proxy.hold(TO_CLIENT)
    assert "late" not in echo.lines
    proxy.release()
    assert echo.wait_for("late")


def test_a_cut_resets_and_refuses_until_it_is_restored(proxy: Proxy, client: socket.socket) -> None:
    """Both kinds of network failure are wanted: this is the loud one."""
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert is_reset(proxy.port)
    proxy.restore()
    with socket.create_connection((HOST, proxy.port), 10) as again:
        again.sendall(b"back\n")
        assert again.recv(100) == b"a: back\n"


def test_it_leads_elsewhere_and_old_connections_may_stay(
    proxy: Proxy, client: socket.socket
) -> None:
    """A failover behind one address; a client may hang on to the server of before."""
    other = Echo("b")
    proxy.lead_to(other.port, reset=False)
    client.sendall(b"old\n")
    assert client.recv(100) == b"a: old\n"
    with socket.create_connection((HOST, proxy.port), 10) as new:
        new.sendall(b"new\n")
        assert new.recv(100) == b"b: new\n"
    proxy.lead_to(other.port)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    other.close()


def test_bytes_held_at_a_restore_are_lost(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """A blackhole that ends with dead connections, as after a firewall's restart."""
    proxy.hold()
    client.sendall(b"lost\n")
    while not proxy.held(TO_SERVER, b"lost"):
        pass
    proxy.restore()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert "lost" not in echo.lines
