"""A TCP proxy in the tests' own process: one address whose server changes, and a network that can
be cut.

It moves bytes and knows no protocol. What it can do to a connection: hold what flows one way (the
bytes wait here, as in a network that stalls), reset it, refuse new ones, lead new ones elsewhere.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Self, cast

from afterclick.streams.processes import free_port

HOST = "127.0.0.1"

HELD_BYTES_MAX = 64 << 20
"""Bytes kept of one direction of one connection; past them the sender is made to wait."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: closing sends RST, as a router does that lost a connection."""

TO_SERVER, TO_CLIENT = "to server", "to client"


class _End(asyncio.Protocol):
    """One socket of a pair; what comes in leaves through the other."""

    def __init__(self, proxy: "Proxy", way: str) -> None:
        self.proxy, self.way = proxy, way
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self.held = bytearray()
        self.holding = way in proxy._holding
        self.ended = False
        self.full = False
        """The sender waits: too much is held here, or the other side reads too slowly."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.proxy._opened(self)

    def data_received(self, data: bytes) -> None:
        self.held += data
        self.pass_on()
        if len(self.held) >= HELD_BYTES_MAX and self.transport is not None:
            self.full = True
            self.transport.pause_reading()

    def pass_on(self) -> None:
        """Send what is held, unless the proxy holds this way or the other end is not there yet."""
        other = self.other
        if self.holding or other is None or other.transport is None:
            return
        if self.held:
            other.transport.write(bytes(self.held))
            self.held.clear()
        if self.full and self.transport is not None and not self.transport.is_closing():
            self.full = False
            self.transport.resume_reading()
        if self.ended:
            other.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self.pass_on()  # a stalled network still delivers, later, what a dead process had sent
        self.proxy._closed(self)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.full:
            with contextlib.suppress(RuntimeError):  # it closed meanwhile
                self.other.transport.resume_reading()

    def reset(self) -> None:
        """Drop what is held and close with RST."""
        self.held.clear()
        if self.transport is not None and not self.transport.is_closing():
            raw = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()


class Proxy:
    """Listens on `port` and leads to 127.0.0.1:`target`, from `start` to `stop`.

    Args:
        target: port of the server; it need not listen yet.
    """

    def __init__(self, target: int = 0) -> None:
        self.port = free_port()
        self.target = target
        self._holding: set[str] = set()
        self._refusing = False
        self._ends: set[_End] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._dials: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def address(self) -> str:
        """`host:port` for clients."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()

        async def listen() -> None:
            self._server = await self._loop.create_server(
                lambda: _End(self, TO_SERVER), HOST, self.port
            )

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            if self._server is not None:
                self._server.close()
            for end in list(self._ends):
                end.reset()
            for dial in self._dials:
                dial.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def lead_to(self, target: int, *, reset: bool = True) -> None:
        """Lead new connections to another port; those that are open are reset, or stay as they
        are.
        """
        self.target = target
        if reset:
            self.reset()

    def hold(self, *ways: str, new: bool = True) -> None:
        """Let nothing through any more, both ways or one; connections stay open.

        Args:
            ways: `TO_SERVER`, `TO_CLIENT`; both unless given.
            new: connections made from now on are held too.
        """
        chosen = set(ways or (TO_SERVER, TO_CLIENT))

        def work() -> None:
            if new:
                self._holding |= chosen
            for end in self._ends:
                end.holding |= end.way in chosen

        self._do(work)

    def held(self, way: str, having: bytes) -> bool:
        """Whether bytes with `having` in them wait here."""
        return bool(self._do(lambda: any(having in e.held for e in self._ends if e.way == way)))

    def release(self) -> None:
        """Deliver what was held, in order, and let everything through again."""

        def work() -> None:
            self._holding.clear()
            for end in list(self._ends):
                end.holding = False
                end.pass_on()

        self._do(work)

    def reset(self) -> None:
        """Break every connection with RST; what was held on the way is lost."""

        def work() -> None:
            for end in list(self._ends):
                end.reset()

        self._do(work)

    def cut(self) -> None:
        """Reset every connection, and every new one, until `restore`."""
        self._refusing = True
        self.reset()

    def restore(self) -> None:
        """Undo `cut` and `hold`; what was held is lost, and its connections with it."""
        self._refusing = False

        def work() -> None:
            self._holding.clear()
            for end in list(self._ends):
                end.holding = False
                if end.held:
                    end.reset()

        self._do(work)

    # Called in the loop's thread ------------------------------------------------------------------

    def _opened(self, end: _End) -> None:
        if end.way == TO_CLIENT:
            self._ends.add(end)
            return
        if self._refusing:
            end.reset()
            return
        self._ends.add(end)
        dial = self._loop.create_task(self._dial(end))
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)

    async def _dial(self, client: _End) -> None:
        try:
            _, server = await self._loop.create_connection(
                lambda: _End(self, TO_CLIENT), HOST, self.target
            )
        except OSError:
            client.reset()
            return
        client.other, server.other = server, client
        client.pass_on()
        if client.transport is None or (client.transport.is_closing() and not client.held):
            server.reset()

    def _closed(self, end: _End) -> None:
        # One that ended with bytes still held stays until they are delivered or dropped.
        if not end.held:
            self._ends.discard(end)
        if end.other is not None and not end.held and end.other.transport is not None:
            end.other.transport.close()

    def _do(self, work: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)
