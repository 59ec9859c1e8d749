"""What a URL of Sentinel says to Sentinel, and what to Redis."""

from typing import Any

import pytest
import redis
import redis.asyncio

from afterclick.serving.sentinel import sentinel_client

URL = "rediss+sentinel://me:p%40w@a,b:7/shop/3?ssl_ca_certs=/a@b/ca.pem&sentinel_username=you"


@pytest.mark.parametrize("package", [redis, redis.asyncio])
def test_everybody_is_told_what_is_meant_for_him(package: Any) -> None:
    """A Sentinel must not hear Redis's password; TLS is for both."""
    pool = sentinel_client(package, URL, socket_timeout=9.0).connection_pool

    assert pool.service_name == "shop"
    kept = pool.connection_kwargs
    assert (kept["username"], kept["password"], kept["db"]) == ("me", "p@w", 3)
    assert (kept["socket_timeout"], kept["ssl_ca_certs"]) == (9.0, "/a@b/ca.pem")
    assert "sentinel_username" not in kept
    assert issubclass(pool.connection_class, package.connection.SSLConnection)
    for sentinel, place in zip(
        pool.sentinel_manager.sentinels, [("a", 26379), ("b", 7)], strict=True
    ):
        told = sentinel.connection_pool.connection_kwargs
        assert (told["host"], told["port"]) == place
        assert (told["username"], told.get("password"), told["db"]) == ("you", None, 0)
        assert (told["ssl_ca_certs"], told["socket_timeout"]) == ("/a@b/ca.pem", 0.5)
        assert issubclass(
            sentinel.connection_pool.connection_class, package.connection.SSLConnection
        )


@pytest.mark.parametrize("package", [redis, redis.asyncio])
def test_without_tls_none_is_spoken(package: Any) -> None:
    """And without a database it is the first one."""
    pool = sentinel_client(package, "redis+sentinel://a/shop").connection_pool

    assert not issubclass(pool.connection_class, package.connection.SSLConnection)
    assert pool.connection_kwargs.get("db", 0) == 0
    assert pool.connection_kwargs.get("password") is None
