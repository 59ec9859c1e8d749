"""A Redis primary with a replica and three Sentinels that watch them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from afterclick.streams.local import HOST, Redis, local_redis, redis_program
from afterclick.streams.processes import Process, free_port, listening
from tests.fault.redis_pair import client, wait_until, wait_until_level

SERVICE = "shop-lists"

DOWN_AFTER_MS = 2000
"""Silence after which a Sentinel takes a server for dead; its default of 30 s would only make tests
wait.
"""

TIMEOUT_S = 60.0
"""Longest wait for something that takes a second or two."""


class Watched:
    """The servers; `url` is what the setting `redis` takes."""

    def __init__(self, servers: list[Redis], sentinels: list[Redis]) -> None:
        self.servers, self.sentinels = servers, sentinels

    @property
    def url(self) -> str:
        """`redis+sentinel://host:port,…/service/0`."""
        return f"redis+sentinel://{','.join(s.address for s in self.sentinels)}/{SERVICE}/0"

    def wait_for_primary(self, server: Redis) -> None:
        """Return once two Sentinels of three name a server."""
        took_over = wait_until(
            lambda: [_asked(one).get("port") for one in self.sentinels].count(server.port) > 1,
            TIMEOUT_S,
        )
        assert took_over, "the replica never took over"


@contextlib.contextmanager
def redis_with_sentinels(folder: Path) -> Iterator[Watched]:
    """Run them; the first of `servers` is the primary."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                local_redis(
                    folder / name,
                    appendonly=True,
                    arguments=("--repl-diskless-sync-delay", "0"),
                )
            )
            for name in ("redis-a", "redis-b")
        ]
        with client(servers[1]) as opened:
            opened.execute_command("REPLICAOF", HOST, servers[0].port)
        sentinels = [_sentinel(folder / f"sentinel-{n}", servers[0], stack) for n in range(3)]
        wait_until_level(servers[1])
        known = wait_until(lambda: all(map(_knows_all, sentinels)), TIMEOUT_S)
        assert known, "the Sentinels never knew each other"
        yield Watched(servers, sentinels)


def _sentinel(folder: Path, primary: Redis, stack: contextlib.ExitStack) -> Redis:
    folder.mkdir(parents=True)
    port = free_port()
    conf = folder / "sentinel.conf"
    conf.write_text(
        f"port {port}\nbind {HOST}\nprotected-mode no\ndir {folder.resolve()}\n"
        f"sentinel monitor {SERVICE} {HOST} {primary.port} 2\n"
        f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
        f"sentinel failover-timeout {SERVICE} 10000\n"
    )
    argv = [redis_program(), str(conf.resolve()), "--sentinel"]
    process = Process("Sentinel", argv, log=folder / "sentinel.log", cwd=folder)
    server = Redis(process, port, lambda: listening(port), TIMEOUT_S)
    stack.callback(server.stop)
    server.start()
    return server


def _asked(sentinel: Redis) -> dict[str, Any]:
    """What a Sentinel knows of the service; nothing where it is dead or hangs."""
    try:
        with redis.Redis(host=HOST, port=sentinel.port, socket_timeout=0.2) as opened:
            return dict(opened.sentinel_master(SERVICE))
    except (redis.ConnectionError, redis.TimeoutError):
        return {}


def _knows_all(sentinel: Redis) -> bool:
    state = _asked(sentinel)
    return (state.get("num-other-sentinels"), state.get("num-slaves")) == (2, 1)
