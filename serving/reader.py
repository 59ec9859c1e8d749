"""What an application imports to read lists: `TopK`, and `AsyncTopK` with `await`.

Needs the base install only (msgspec, redis), reads one key per user and writes nothing. Knows no
release, model or Kafka. A read is one MGET: the list, and once a second beside it the version of
the set of unavailable items; the set itself is read only when its version moved. What to ask Redis
and what to make of the answers is `lookup.py`; these two classes carry the commands.

    with TopK("redis://127.0.0.1:6379/0") as top:
        answer = top.get("user-17", k=10)
"""

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.lookup import Lookup, Place, Plan, Top

__all__ = ["AsyncTopK", "Place", "Top", "TopK", "safe_url"]

TIMEOUT_S = 0.9
"""Longest wait for a connection or an answer. A dead connection is tried a second time, so that
nobody waits longer than about 2 s for an `UnavailableError`.
"""


class TopK:
    """Reads lists; safe to share between threads.

    Args:
        redis_url: `redis://host:port/db`, `rediss://` for TLS, `unix://` for a socket.
        namespace: first part of every key, as the workers' `AFTERCLICK_SERVING__NAMESPACE`.
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
        timeout_s: float = TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._url = safe_url(redis_url)
        self._lookup = Lookup(namespace, monotonic, now_s)
        with _url_errors(self._url):
            self._redis = redis.Redis.from_url(
                redis_url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        self._execute: Callable[..., Any] = self._redis.execute_command

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
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, plan: Plan) -> Any:
        reply: Any = None
        while True:
            try:
                command = plan.send(reply)
            except StopIteration as done:
                return done.value
            with _redis_errors(self._url):
                try:
                    reply = self._execute(*command)
                except redis.ConnectionError as error:
                    if not _worth_another(error):
                        raise
                    reply = self._execute(*command)


class AsyncTopK:
    """`TopK` for asyncio: same arguments, answers and errors, every method awaited."""

    def __init__(
        self,
        redis_url: str,
        *,
        namespace: str = "afterclick",
        timeout_s: float = TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._url = safe_url(redis_url)
        self._lookup = Lookup(namespace, monotonic, now_s)
        with _url_errors(self._url):
            self._redis = redis.asyncio.Redis.from_url(
                redis_url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=AsyncRetry(NoBackoff(), 0),
            )
        self._execute: Callable[..., Any] = self._redis.execute_command

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

    async def _run(self, plan: Plan) -> Any:
        reply: Any = None
        while True:
            try:
                command = plan.send(reply)
            except StopIteration as done:
                return done.value
            with _redis_errors(self._url):
                try:
                    reply = await self._execute(*command)
                except redis.ConnectionError as error:
                    if not _worth_another(error):
                        raise
                    reply = await self._execute(*command)


_SAFE_REST = re.compile(r"(?:[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/\d*)?")
_SAFE_PATH = re.compile(r"/[A-Za-z0-9._/-]*")


def safe_url(url: str) -> str:
    """A Redis URL fit for messages and logs: without user, password and options.

    Shows less rather than more: what is not plainly host, port and database becomes `***`.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("redis", "rediss", "unix"):
        return "***"
    _, at, place = rest.rpartition("@")
    place = place.partition("?")[0]
    safe = _SAFE_PATH if scheme == "unix" else _SAFE_REST
    shown = place if safe.fullmatch(place) and "password=" not in rest.lower() else "***"
    return f"{scheme}://{'***@' if at else ''}{shown}"


def _worth_another(error: redis.ConnectionError) -> bool:
    """A connection that died while idle is worth a second try, a wrong password is not."""
    return not isinstance(error, redis.AuthenticationError)


@contextmanager
def _url_errors(url: str) -> Generator[None, None, None]:
    try:
        yield
    except ValueError:
        # The cause is left out: redis-py quotes parts of the URL, and a part may be the password.
        raise ConfigError(
            f"redis URL {url}: expected redis://[[user]:password@]host[:port][/database]"
        ) from None


@contextmanager
def _redis_errors(url: str) -> Generator[None, None, None]:
    try:
        yield
    except redis.AuthenticationError as error:
        raise ConfigError(f"Redis at {url}: {error}; check user and password") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise UnavailableError(f"Redis at {url} does not answer: {error}") from error
    except redis.ResponseError as error:
        raise ConfigError(f"Redis at {url} refuses a read: {error}") from error
    except redis.RedisError as error:
        raise ConfigError(f"Redis at {url}: not an answer of Redis: {error}") from error
