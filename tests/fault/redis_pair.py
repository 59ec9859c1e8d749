"""Two Redis servers, primary and replica, both with an append-only file: what can be lost, and how.

The replica's link runs through a proxy, so that it can be kept behind on purpose: writes that the
primary acknowledged are then really gone when the replica takes over. Knows no key but what it is
handed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from afterclick.streams.local import Redis, local_redis
from tests.fault.proxy import HOST, TO_CLIENT, Proxy

SYNC_TIMEOUT_S = 60.0
"""A full copy of a few MB, on a machine that others use too."""


class RedisPair:
    """`primary` is the one to write to; after a failover the two have changed places."""

    def __init__(self, primary: Redis, replica: Redis, link: Proxy) -> None:
        self.primary, self.replica, self._link = primary, replica, link
        self._follow(replica)

    def keep_behind(self) -> None:
        """Let nothing more reach the replica, which does not notice; it was level before."""
        wait_until_level(self.replica)
        self._link.hold(TO_CLIENT)

    def promote(self) -> None:
        """The replica takes over as it stands; what was on its way to it is lost."""
        self._link.cut()
        with client(self.replica) as opened:
            opened.execute_command("REPLICAOF", "NO", "ONE")
        self.primary, self.replica = self.replica, self.primary

    def rejoin(self) -> None:
        """The old primary becomes the new one's replica; what it alone had is dropped."""
        if not self.replica.process.running:
            self.replica.start()
        self._link.lead_to(self.primary.port)
        self._link.restore()
        self._follow(self.replica)

    def lose_power(self, written: int) -> int:
        """Kill the primary and cut its file back to `written` bytes, as a machine without power
        would leave it.

        Returns:
            Bytes lost; 0 where the file was begun anew meanwhile.
        """
        self.primary.kill()
        file = self._file()
        size = file.stat().st_size
        if size < written:
            return 0
        with file.open("r+b") as opened:
            opened.truncate(written)
        return size - written

    def written(self) -> int:
        """Bytes in the primary's append-only file by now."""
        return self._file().stat().st_size

    def _file(self) -> Path:
        # appendonlydir/appendonly.aof.N.incr.aof since Redis 7, appendonly.aof before.
        folder = self.primary.process.cwd
        assert folder is not None
        files = [*folder.glob("appendonlydir/*.incr.aof"), *folder.glob("appendonly.aof")]
        return max(files, key=lambda file: [int(n) for n in file.name.split(".") if n.isdigit()])

    def _follow(self, server: Redis) -> None:
        with client(server) as opened:
            opened.execute_command("REPLICAOF", HOST, self._link.port)


@contextlib.contextmanager
def redis_pair(folder: Path) -> Iterator[RedisPair]:
    """Run both."""
    with contextlib.ExitStack() as stack:
        servers = []
        for name in ("redis-a", "redis-b"):
            servers.append(
                stack.enter_context(
                    local_redis(
                        folder / name,
                        appendonly=True,
                        # A primary waits 5 s for further replicas before it copies: none come.
                        arguments=("--repl-diskless-sync-delay", "0"),
                    )
                )
            )
        link = stack.enter_context(Proxy(servers[0].port))
        yield RedisPair(servers[0], servers[1], link)


def wait_until(done: Callable[[], Any], timeout_s: float) -> bool:
    """Poll until something is so; whether it was, in time."""
    until_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.01)
    return True


def wait_until_level(replica: Redis) -> None:
    """Return once a server follows its primary."""
    assert wait_until(lambda: _follows(replica), SYNC_TIMEOUT_S), "the replica never came level"


def _follows(server: Redis) -> bool:
    try:
        with client(server) as opened:
            return bool(opened.info("replication").get("master_link_status") == "up")
    except redis.ConnectionError:  # it has just been made a replica, which ends its connections
        return False


def client(server: Redis) -> Any:
    """A plain connection to one server."""
    return redis.Redis.from_url(server.url, socket_timeout=10)
