"""Clients of whichever server Redis Sentinel names as the primary, from one URL:

    redis+sentinel://user@a:26379,b:26379,c:26379/mymaster/0

They are redis-py's own: Sentinel is asked at every new connection, and a connection to a primary
that was made a replica is left at its first refusal. Knows no key.
"""

import re
from typing import Any

import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff

from afterclick.serving.address import places_of

URL_FORM = "redis+sentinel://[[user]:password@]host[:port],…/service[/database]"

PORT = 26379

TIMEOUT_S = 0.5
"""Longest wait for one Sentinel before the next one is asked."""

_URL = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?P<user>[^/?]*@)?(?P<hosts>[^/?@]+)"
    r"/(?P<service>[^/?@]+)(?:/(?P<database>\d*))?(?P<options>\?.*)?"
)
_OF_SENTINEL = "sentinel_"
"""How options of the URL begin that are meant for Sentinel itself."""


def names_sentinel(url: str) -> bool:
    """Whether a URL asks for such a client."""
    return url.partition("://")[0].endswith("+sentinel")


def sentinel_client(package: Any, url: str, **options: Any) -> Any:
    """A redis-py client of the primary of a service.

    Args:
        package: `redis` or `redis.asyncio`.
        url: `rediss+sentinel` speaks TLS to Sentinel and to Redis. User, password, database and
            options are Redis's; `sentinel_username` and `sentinel_password` among the options are
            for Sentinel.
        options: of the class `Redis`; what the URL says goes first, as in redis-py.

    Raises:
        ValueError: the URL is none.
    """
    matched = _URL.fullmatch(url)
    if matched is None:
        raise ValueError("no URL of a service")
    scheme, user, hosts, service, database, asked = matched.groups("")
    parse = package.connection.parse_url
    of_redis = {**options, **parse(f"{scheme}://{user}primary/{database}{asked}")}
    del of_redis["host"]
    of_sentinel = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "retry": package.retry.Retry(NoBackoff(), 0),
    }
    if of_redis.pop("connection_class", None) is not None:  # a class of one server's, for TLS
        of_redis["ssl"] = True
    for name in list(of_redis):
        if name.startswith(_OF_SENTINEL):
            of_sentinel[name.removeprefix(_OF_SENTINEL)] = of_redis.pop(name)
        elif name.startswith("ssl"):
            of_sentinel[name] = of_redis[name]
    sentinel = package.sentinel.Sentinel(
        places_of(hosts, PORT),
        sentinel_kwargs=of_sentinel,
        **of_redis,
    )
    pool = _AsyncPool if package is redis.asyncio else _Pool
    return sentinel.master_for(service, redis_class=package.Redis, connection_pool_class=pool)


def refuses_password(error: BaseException) -> bool:
    """Whether no Sentinel could be asked, and one of them because of its password."""
    kinds = redis.sentinel.MasterNotFoundError | redis.asyncio.sentinel.MasterNotFoundError
    return isinstance(error, kinds) and "AuthenticationError" in str(error)


class _Pool(redis.sentinel.SentinelConnectionPool):
    """Closes the connections to Sentinel with its own."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:  # else only the primary is another one now
            for one in self.sentinel_manager.sentinels:
                one.close()


class _AsyncPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """The same for asyncio."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for one in self.sentinel_manager.sentinels:
                await one.aclose()
