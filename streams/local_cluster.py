"""A Redis Cluster on one machine, for the tests and for trying the layout `cluster`.

Some masters that share the 16,384 slots, each with its replicas or with none. The nodes are
`local.py`'s Redis, each with its append-only file, so that one which is killed and started again
comes back with its data, its name and its slots. Knows nothing of Afterclick's keys.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
import redis.crc

from afterclick.serving.errors import UnavailableError
from afterclick.streams.local import HOST, Redis, local_redis

SLOTS = 16384

NODE_TIMEOUT_MS = 2000
"""Silence after which nodes take another for dead and, where it has one, let its replica take over;
Redis's own default of 15 s would only make tests wait.
"""

FORM_TIMEOUT_S = 30.0
"""Longest wait until all nodes agree: gossip takes about 2 s on idle cores."""

_POLL_S = 0.05


class LocalCluster:
    """A running Redis Cluster; `url` is what the setting `redis` takes beside `layout=cluster`."""

    def __init__(self, masters: list[Redis], replicas: list[Redis]) -> None:
        self.masters = masters
        self.replicas = replicas

    @property
    def nodes(self) -> list[Redis]:
        """All servers, those that began as masters first."""
        return [*self.masters, *self.replicas]

    @property
    def url(self) -> str:
        """`redis://host:port,host:port,…`: any of them leads to the others."""
        return f"redis://{','.join(node.address for node in self.nodes)}/0"

    def master_of(self, key: str) -> Redis:
        """The running server that answers for a key now.

        Raises:
            UnavailableError: no node that answers knows one.
        """
        slot = key_slot(key)
        for begin, end, port in self._slots():
            if begin <= slot <= end:
                return next(node for node in self.nodes if node.port == port)
        raise UnavailableError(f"Redis Cluster: no node answers for slot {slot}")

    def cut_off_replica(self, master: Redis) -> Redis:
        """A master's first replica, which from now on hears no write of it; clients notice nothing.

        When the master dies this one takes over, without what was written since.
        """
        cut_off_replicas(master)
        return self.replicas[self.masters.index(master)]

    def wait_until_whole(self, timeout_s: float = FORM_TIMEOUT_S) -> None:
        """Return once every node says that all slots are served.

        Raises:
            UnavailableError: they do not say so in time.
        """
        until_s = time.monotonic() + timeout_s
        while not all(self._is_whole(node) for node in self.nodes):
            if time.monotonic() > until_s:
                said = {n.address: _ask(n, "CLUSTER INFO") for n in self.nodes}
                raise UnavailableError(f"Redis Cluster: not whole after {timeout_s:g} s: {said}")
            time.sleep(_POLL_S)

    def _is_whole(self, node: Redis) -> bool:
        info = _ask(node, "CLUSTER INFO")
        return (
            info is not None
            and info["cluster_state"] == "ok"
            and int(info["cluster_slots_ok"]) == SLOTS
            and int(info["cluster_known_nodes"]) == len(self.nodes)
        )

    def _slots(self) -> list[tuple[int, int, int]]:
        """First slot, last slot and port of its master, by the first node that answers."""
        for node in self.nodes:
            if (found := _ask(node, "CLUSTER SLOTS")) is not None:
                return [(begin, end, master[1]) for begin, end, master, *_ in found]
        return []


@contextlib.contextmanager
def local_redis_cluster(
    folder: Path, *, masters: int = 3, replicas: int = 0
) -> Iterator[LocalCluster]:
    """Run a Redis Cluster whose slots the masters share evenly.

    One master without a replica that is down takes only its own slots away
    (`cluster-require-full-coverage no`), as production does it too.

    Args:
        folder: each node's working folder is in it.
        masters: at least 3, else Redis cannot agree that one is dead.
        replicas: of each master; 0 for none.

    Raises:
        ConfigError: there is no redis-server; names the commands that install one.
        UnavailableError: the nodes do not start, or do not find each other.
    """
    with contextlib.ExitStack() as stack:

        def node(name: str) -> Redis:
            arguments = ["--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"]
            arguments += ["--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
            arguments += ["--repl-diskless-sync-delay", "0"]
            return stack.enter_context(
                local_redis(folder / name, appendonly=True, arguments=arguments)
            )

        leaders = [node(f"master-{n}") for n in range(masters)]
        followers = [node(f"replica-{n}") for n in range(masters * replicas)]
        cluster = LocalCluster(leaders, followers)
        _form(cluster)
        yield cluster


def cut_off_replicas(master: Redis) -> None:
    """Let a server's replicas hear no write of it from now on; clients notice nothing."""
    with _client(master) as client:
        client.execute_command("ACL SETUSER", "default", "-psync", "-sync")
        client.execute_command("CLIENT KILL", "TYPE", "replica")


def key_slot(key: str) -> int:
    """The slot of a key: of what stands between its first braces, where there is something."""
    return int(redis.crc.key_slot(key.encode()))


def _form(cluster: LocalCluster) -> None:
    """Give out the slots, introduce the nodes to each other, and make replicas follow."""
    for number, node in enumerate(cluster.masters):
        begin, end = (SLOTS * n // len(cluster.masters) for n in (number, number + 1))
        with _client(node) as client:
            client.execute_command("CLUSTER ADDSLOTS", *range(begin, end))
            # Two nodes that both believe to be of epoch 0 settle it by their names, which takes
            # longer than saying who is who.
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
    first = cluster.masters[0]
    for node in cluster.nodes[1:]:
        with _client(node) as client:
            client.execute_command("CLUSTER MEET", HOST, first.port)
    if cluster.replicas:
        _wait_for_all(cluster)
    for number, node in enumerate(cluster.replicas):
        with _client(cluster.masters[number % len(cluster.masters)]) as client:
            leader = client.execute_command("CLUSTER MYID").decode()
        with _client(node) as client:
            client.execute_command("CLUSTER REPLICATE", leader)
    cluster.wait_until_whole()
    _wait_for_replicas(cluster)


def _wait_for_all(cluster: LocalCluster) -> None:
    """A node follows only a master that it has heard of."""
    until_s = time.monotonic() + FORM_TIMEOUT_S
    while not all(
        int((_ask(node, "CLUSTER INFO") or {}).get("cluster_known_nodes", 0)) == len(cluster.nodes)
        for node in cluster.nodes
    ):
        if time.monotonic() > until_s:
            raise UnavailableError("Redis Cluster: its nodes did not find each other")
        time.sleep(_POLL_S)


def _wait_for_replicas(cluster: LocalCluster) -> None:
    until_s = time.monotonic() + FORM_TIMEOUT_S
    while not all(
        (_ask(node, "INFO") or {}).get("master_link_status") == "up" for node in cluster.replicas
    ):
        if time.monotonic() > until_s:
            raise UnavailableError("Redis Cluster: a replica did not copy its master")
        time.sleep(_POLL_S)


def _ask(node: Redis, command: str) -> Any:
    """What a node answers, None while it does not."""
    try:
        with _client(node) as client:
            return client.execute_command(command)
    except (redis.ConnectionError, redis.TimeoutError):
        return None


def _client(node: Redis) -> Any:
    return redis.Redis(host=HOST, port=node.port, socket_timeout=2.0, socket_connect_timeout=2.0)
