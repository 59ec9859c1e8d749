"""What an application imports to read lists: `TopK`, and `AsyncTopK` with `await`.

Needs the base install only (msgspec, redis), reads one key per user and writes nothing. Knows no
release, model or Kafka. A read is one MGET: the list, and once a second beside it the version of
the set of unavailable items; the set itself is read only when its version moved. On Redis Cluster
the keys of one MGET stand on several nodes, so it is sent as one a slot. What to ask Redis and what
to make of the answers is `lookup.py`; these two classes carry the commands.

    with TopK("redis://127.0.0.1:6379/0") as top:
        answer = top.get("user-17", k=10)
"""

import functools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from afterclick.serving.address import safe_url, with_password
from afterclick.serving.connection import (
    CLUSTER_ERRORS,
    cluster_client,
    cluster_error,
    refusal,
    single_client,
    url_errors,
)
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Layout
from afterclick.serving.lookup import Lookup, Place, Plan, Top

__all__ = ["AsyncTopK", "Place", "Top", "TopK", "safe_url"]

TIMEOUT_S = 0.9
"""Longest wait for a connection or an answer. A dead connection is tried a second time, so that
nobody waits longer than about 2 s for an `UnavailableError`; of a cluster, while one node answers.
"""

_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")


class TopK:
    """Reads lists; safe to share between threads.

    Args:
        redis_url: `redis://user@host:port/db`, `unix://` for a socket; behind Sentinel
            `redis+sentinel://user@host:port,host:port/service/db`; for Redis Cluster one node or
            several, `redis://host:port,host:port`; for TLS `rediss://…?ssl_ca_certs=FILE`, with
            `ssl_certfile` and `ssl_keyfile` where Redis asks for a certificate.
        namespace: first part of every key, as the workers' `AFTERCLICK_SERVING__NAMESPACE`.
        layout: `cluster` for Redis Cluster, as the workers' `AFTERCLICK_SERVING__LAYOUT`.
        password: of the URL's user, where the URL holds none.
        timeout_s: longest wait for a connection or an answer.
        monotonic: clock of the caches, seconds.
        now_s: wall clock, unix seconds; ages are told by it.

    Raises:
        ConfigError: from any method: the URL is wrong, or Redis refuses the password or a command.
        UnavailableError: from any method: Redis does not answer, after about 2 s at most.
        ContractError: from any method: a key holds something this version does not read.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        namespace: str = "afterclick",
        layout: Layout = "single",
        password: str = "",
        timeout_s: float = TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._url = safe_url(redis_url)
        if password:
            redis_url = with_password(redis_url, password)
        self._lookup = Lookup(namespace, monotonic, now_s, layout)
        options: dict[str, Any] = dict.fromkeys(_TIMEOUTS, timeout_s)
        options["retry"] = Retry(NoBackoff(), 0)
        self._redis: Any = None
        self._execute: Callable[..., Any]
        self._opening = threading.Lock()
        if layout == "cluster":
            # Its client asks for the nodes when it is made: not before the first read.
            self._open: Callable[[], Any] = lambda: cluster_client(
                redis.cluster.RedisCluster, redis_url, **options
            )
            self._execute = self._execute_by_slot
            return
        with url_errors(self._url):
            self._redis = single_client(redis, redis_url, **options)
        self._execute = self._redis.execute_command

    def get(self, user_id: str, k: int | None = None) -> Top:
        """The user's list; the fallback list for a user without one.

        Args:
            user_id: as in the clicks.
            k: items at most, ≥ 1; by default what the workers were told.
        """
        return self.get_many([user_id], k)[0]

    def get_many(self, user_ids: Sequence[str], k: int | None = None) -> list[Top]:
        """`get` for several users, in their order, in one round trip per 512."""
        answer: list[Top] = self._run(self._lookup.tops(user_ids, k))
        return answer

    def place(self, user_id: str) -> Place:
        """The user's partition and keys.

        Raises:
            ConfigError: no worker has written `<ns>:meta` yet, so the partitions are not known.
        """
        answer: Place = self._run(self._lookup.place(user_id))
        return answer

    def folded_to(self, partition: int) -> int:
        """Offset up to which a partition's clicks stand in lists, itself not included.

        A click that Kafka put at `offset` is in its user's list once this is greater. 0 before the
        partition's first click.
        """
        answer: int = self._run(self._lookup.folded_to(partition))
        return answer

    def close(self) -> None:
        """Give the connections back."""
        if self._redis is not None:
            self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _execute_by_slot(self, name: str, *keys: str) -> Any:
        if self._redis is None:
            with self._opening, url_errors(self._url):
                if self._redis is None:
                    self._redis = self._open()
        if name == "MGET" and len(keys) > 1:
            return self._redis.mget_nonatomic(keys)
        return self._redis.execute_command(name, *keys)

    def _run(self, plan: Plan) -> Any:
        step = functools.partial(plan.send, None)
        while True:
            try:
                command = step()
            except StopIteration as done:
                return done.value
            try:
                with _redis_errors(self._url):
                    try:
                        reply = self._execute(*command)
                    except redis.ConnectionError as error:
                        if not _worth_another(error):
                            raise
                        reply = self._execute(*command)
            except UnavailableError as error:
                step = functools.partial(plan.throw, error)
            else:
                step = functools.partial(plan.send, reply)


class AsyncTopK:
    """`TopK` for asyncio: same arguments, answers and errors, every method awaited."""

    def __init__(
        self,
        redis_url: str,
        *,
        namespace: str = "afterclick",
        layout: Layout = "single",
        password: str = "",
        timeout_s: float = TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._url = safe_url(redis_url)
        if password:
            redis_url = with_password(redis_url, password)
        self._lookup = Lookup(namespace, monotonic, now_s, layout)
        options: dict[str, Any] = dict.fromkeys(_TIMEOUTS, timeout_s)
        options["retry"] = AsyncRetry(NoBackoff(), 0)
        self._redis: Any
        self._execute: Callable[..., Any]
        with url_errors(self._url):
            if layout == "cluster":
                self._redis = cluster_client(redis.asyncio.RedisCluster, redis_url, **options)
                self._execute = self._execute_by_slot
            else:
                self._redis = single_client(redis.asyncio, redis_url, **options)
                self._execute = self._redis.execute_command

    async def get(self, user_id: str, k: int | None = None) -> Top:
        """The user's list; the fallback list for a user without one."""
        return (await self.get_many([user_id], k))[0]

    async def get_many(self, user_ids: Sequence[str], k: int | None = None) -> list[Top]:
        """`get` for several users, in their order, in one round trip per 512."""
        answer: list[Top] = await self._run(self._lookup.tops(user_ids, k))
        return answer

    async def place(self, user_id: str) -> Place:
        """The user's partition and keys."""
        answer: Place = await self._run(self._lookup.place(user_id))
        return answer

    async def folded_to(self, partition: int) -> int:
        """Offset up to which a partition's clicks stand in lists, itself not included."""
        answer: int = await self._run(self._lookup.folded_to(partition))
        return answer

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _execute_by_slot(self, name: str, *keys: str) -> Any:
        if name == "MGET" and len(keys) > 1:
            return await self._redis.mget_nonatomic(keys)
        return await self._redis.execute_command(name, *keys)

    async def _run(self, plan: Plan) -> Any:
        step = functools.partial(plan.send, None)
        while True:
            try:
                command = step()
            except StopIteration as done:
                return done.value
            try:
                with _redis_errors(self._url):
                    try:
                        reply = await self._execute(*command)
                    except redis.ConnectionError as error:
                        if not _worth_another(error):
                            raise
                        reply = await self._execute(*command)
            except UnavailableError as error:
                step = functools.partial(plan.throw, error)
            else:
                step = functools.partial(plan.send, reply)


def _worth_another(error: redis.ConnectionError) -> bool:
    """A connection that died while idle is worth a second try, a wrong password is not."""
    return not isinstance(error, redis.AuthenticationError)


@contextmanager
def _redis_errors(url: str) -> Generator[None, None, None]:
    try:
        yield
    except CLUSTER_ERRORS as error:
        raise cluster_error(error, f"Redis at {url}") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        away = UnavailableError(f"Redis at {url} does not answer: {error}")
        raise refusal(error, f"Redis at {url}") or away from error
    except redis.ResponseError as error:
        odd = ConfigError(f"Redis at {url} refuses a read: {error}")
        raise refusal(error, f"Redis at {url}") or odd from error
    except redis.RedisError as error:
        raise ConfigError(f"Redis at {url}: not an answer of Redis: {error}") from error
