"""What kind of redis-py client a URL and a layout ask for, and what its cluster errors mean.

The one writer's timeouts and retries stand here; readers bring theirs (reader.py): they would
rather fail than wait. Knows no key.
"""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
import redis.cluster
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ClusterCrossSlotError, MovedError, RedisClusterException
from redis.retry import Retry

from afterclick.serving import sentinel
from afterclick.serving.address import places_of, safe_url
from afterclick.serving.errors import AfterclickError, ConfigError, UnavailableError
from afterclick.serving.keys import Layout

PORT = 6379

TIMEOUT_S = 5.0
"""Longest wait for one answer; a script over 256 users takes about 2 ms."""

RETRIES = 2
"""Re-sends by the client; a script sent twice recognises its own batch."""

URL_FORM = f"redis://[[user]:password@]host[:port][/database] or {sentinel.URL_FORM}"

CLUSTER_TIMEOUT_S = 2.0
"""The same for a node of a cluster, without a second try: who waits for one that hangs keeps a fold
thread from partitions of the others. The worker tries again by itself.
"""

CLUSTER_ERRORS = (
    RedisClusterException,
    redis.exceptions.ClusterError,
    redis.exceptions.TryAgainError,
    MovedError,
    ClusterCrossSlotError,
)
"""What `cluster_error` explains."""

_HOSTS = re.compile(r"(\w+://(?:.*@)?)([^/?@]*)(.*)", re.DOTALL)
_NO_CLUSTER = "Cluster mode is not enabled"
"""What redis-py says when it asked a single server for its slots."""


def connect(url: str, layout: Layout = "single") -> Any:
    """A redis-py client for `serving.store.Store`.

    One server, or Sentinel for one, is asked at the first command, a cluster at once: for its nodes
    and slots.

    Raises:
        ConfigError: the URL is none, or leads to a single server under the layout `cluster`.
        UnavailableError: no node of the cluster answers.
    """
    with url_errors(safe_url(url)):
        if layout == "single":
            # A primary that was made a replica keeps its connections: only a new one leads to the
            # server that took over behind the address.
            return single_client(
                redis,
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES),
                retry_on_error=[redis.exceptions.ReadOnlyError],
            )
        try:
            return cluster_client(
                redis.cluster.RedisCluster,
                url,
                socket_timeout=CLUSTER_TIMEOUT_S,
                socket_connect_timeout=CLUSTER_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except CLUSTER_ERRORS as error:
            raise cluster_error(error, f"redis {safe_url(url)}") from error


@contextmanager
def url_errors(shown: str) -> Iterator[None]:
    """Turn what redis-py says of a malformed URL into a ConfigError.

    Args:
        shown: the URL, as messages may name it.
    """
    try:
        yield
    except ValueError:
        # The cause is left out: redis-py quotes parts of the URL, and a part may be the password.
        raise ConfigError(f"redis URL {shown}: expected {URL_FORM}") from None


def single_client(package: Any, url: str, **options: Any) -> Any:
    """A client of one server, or of the one that Sentinel names as the primary.

    Args:
        package: `redis` or `redis.asyncio`.
        url: of the server, or a `redis+sentinel://` one.
        options: of the class `Redis`.

    Raises:
        ValueError: the URL is none.
    """
    if sentinel.names_sentinel(url):
        return sentinel.sentinel_client(package, url, **options)
    return package.Redis.from_url(url, **options)


def cluster_client(kind: Any, url: str, **options: Any) -> Any:
    """A client of the class `kind` for a whole Redis Cluster.

    Args:
        kind: `redis.cluster.RedisCluster` or `redis.asyncio.RedisCluster`.
        url: may name several hosts with commas between them; any one leads to all nodes.
        options: of the class.

    Raises:
        ConfigError: the URL is Sentinel's.
        ValueError: the URL is none.
        RedisClusterException: no node answers (the asyncio client says so at its first command).
    """
    if sentinel.names_sentinel(url):
        raise ConfigError(
            f"redis {safe_url(url)}: Sentinel watches single servers, but the layout is 'cluster'; "
            "set AFTERCLICK_SERVING__LAYOUT=single (in an application: TopK(…, layout='single'))"
        )
    matched = _HOSTS.fullmatch(url)
    if matched is None:
        raise ValueError("no URL")
    before, hosts, after = matched.groups()
    first, comma, others = hosts.partition(",")
    node = (
        redis.asyncio.cluster.ClusterNode
        if kind is redis.asyncio.RedisCluster
        else redis.cluster.ClusterNode
    )
    places = places_of(others, PORT) if comma else []
    return kind.from_url(
        f"{before}{first}{after}",
        startup_nodes=[node(host, port) for host, port in places],
        # Users whose partitions stand on living masters are served while another master is down.
        require_full_coverage=False,
        **options,
    )


def cluster_error(error: Exception, where: str) -> AfterclickError:
    """What one of `CLUSTER_ERRORS` asks of the operator.

    Args:
        error: as redis-py raised it.
        where: the server, as messages name it.
    """
    if isinstance(error, MovedError | ClusterCrossSlotError):
        return ConfigError(
            f"{where}: it is a node of a Redis Cluster, but the layout is 'single'; set "
            "AFTERCLICK_SERVING__LAYOUT=cluster (in an application: TopK(…, layout='cluster'))"
        )
    if refused := refusal(error, where):
        return refused
    if _NO_CLUSTER in str(error):
        return ConfigError(
            f"{where}: it is a single server, but the layout is 'cluster'; set "
            "AFTERCLICK_SERVING__LAYOUT=single (in an application: TopK(…, layout='single'))"
        )
    if type(error) is RedisClusterException and error.__cause__ is None:
        return ConfigError(f"{where}: {error}")  # a database, a socket: not in a cluster
    return UnavailableError(f"{where}: the cluster does not answer: {error}")


def refusal(error: Exception, where: str) -> ConfigError | None:
    """What the operator must change where Redis or TLS says no; None where waiting may help.

    Args:
        error: as redis-py raised it.
        where: the server, as messages name it.
    """
    for cause in _causes(error):
        if isinstance(cause, redis.AuthenticationError):
            return ConfigError(
                f"{where}: {cause}; check user and password in AFTERCLICK_SERVING__REDIS and "
                "AFTERCLICK_SERVING__REDIS_PASSWORD (in an application: TopK's arguments)"
            )
        if sentinel.refuses_password(cause):
            return ConfigError(
                f"{where}: a Sentinel refuses the password; check sentinel_username and "
                "sentinel_password among the URL's options"
            )
        if isinstance(cause, redis.exceptions.NoPermissionError) or "NOPERM" in str(cause):
            return ConfigError(
                f"{where}: {cause}; give the user the rights that docs/operations.md lists"
            )
        of_tls = isinstance(cause, ssl.SSLError) and "CERTIFICATE" in str(cause)
        of_file = isinstance(cause, FileNotFoundError | PermissionError) and "rediss://" in where
        if of_tls or of_file:
            return ConfigError(
                f"{where}: {cause}; check ssl_ca_certs, ssl_certfile, ssl_keyfile and the host's "
                "name in AFTERCLICK_SERVING__REDIS (in an application: in TopK's URL)"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
