"""`TopK` and `AsyncTopK` against a real Redis, through one list of promises for both."""

import asyncio
import functools
import inspect
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from afterclick.serving.connection import connect
from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.keys import Keys, Layout, Meta
from afterclick.serving.reader import AsyncTopK, Top, TopK, safe_url
from afterclick.streams.local import Redis, local_redis
from afterclick.streams.local_cluster import LocalCluster, local_redis_cluster
from tests.lists import a_list

pytestmark = pytest.mark.service

Ask = Callable[..., Any]


def ask_sync(url: str, method: str, *args: Any, **options: Any) -> Any:
    with TopK(url, **options) as top:
        return getattr(top, method)(*args)


def ask_async(url: str, method: str, *args: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncTopK(url, **options) as top:
            return await getattr(top, method)(*args)

    return asyncio.run(run())


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest, layout: Layout) -> Ask:
    return functools.partial(request.param, layout=layout)


@pytest.fixture
def redis_url(place: str) -> str:
    """As `layout` says: by itself one server."""
    return place


@pytest.fixture
def server(redis_url: str, layout: Layout) -> Iterator[Any]:
    with connect(redis_url, layout) as client:
        yield client


on_both = pytest.mark.parametrize("layout", ["single", "cluster"], indirect=True)


@on_both
def test_a_list_is_read_as_it_was_written(
    ask: Ask, redis_url: str, namespace: str, server: Any
) -> None:
    """What an application shows is what the worker wrote, with where it came from."""
    server.set(f"{namespace}:top:用户 1", a_list("新闻", "b", written_ms=1_000))

    top = ask(redis_url, "get", "用户 1", namespace=namespace, now_s=lambda: 1.25)

    assert top == Top(
        items=["新闻", "b"],
        scores=[1.0, 0.5],
        source="model",
        release="r1",
        publication=3,
        age_ms=250,
        event_ms=900,
        written_ms=1_000,
        partition=2,
        offset=41,
    )


@on_both
def test_get_many_keeps_the_order_and_falls_back_one_by_one(
    ask: Ask, redis_url: str, namespace: str, server: Any
) -> None:
    """A page of ten users costs one read, whoever of them is new."""
    for user, item in (("a", "x"), ("c", "z"), ("", "p")):
        server.set(f"{namespace}:top:{user}", a_list(item))

    tops = ask(redis_url, "get_many", ["c", "b", "a"], namespace=namespace)

    assert [(top.items, top.source) for top in tops] == [
        (["z"], "model"),
        (["p"], "fallback"),
        (["x"], "model"),
    ]
    assert ask(redis_url, "get_many", [], namespace=namespace) == []


@on_both
def test_unavailable_items_never_come_back(
    ask: Ask, redis_url: str, namespace: str, server: Any
) -> None:
    """Stored lists are older than the set; the reader is the last gate."""
    server.set(f"{namespace}:top:u", a_list("a", "新闻", "c"))
    server.sadd(Keys(namespace).unavailable, "新闻", "a")
    server.set(Keys(namespace).unavailable_version, "5")

    top = ask(redis_url, "get", "u", namespace=namespace)

    assert (top.items, top.scores) == (["c"], [1.0 / 3])


@on_both
def test_the_cluster_layout_is_read_by_its_own_keys(
    ask: Ask, redis_url: str, namespace: str, server: Any
) -> None:
    """`TopK` hides where lists stand; workers say it in meta."""
    keys = Keys(namespace, layout="cluster", partitions=4)
    server.set(keys.meta, msgspec.json.encode(Meta(layout="cluster", partitions=4, k=1)))
    server.set(keys.top_of("u"), a_list("a", "b"))

    assert ask(redis_url, "get", "u", namespace=namespace).items == ["a"]
    assert ask(redis_url, "place", "u", namespace=namespace).list_key == keys.top_of("u")


def test_the_wrong_layout_is_named(
    ask: Ask, redis_server: Redis, redis_cluster: LocalCluster
) -> None:
    """Else an application would see MOVED for two users of three, and lists for the third."""
    with pytest.raises(ConfigError, match="layout='cluster'"):
        ask(redis_cluster.url.partition(",")[0], "get_many", [f"u{n}" for n in range(9)])
    with pytest.raises(ConfigError, match="layout='single'"):
        ask.func(redis_server.url, "get", "u", layout="cluster")  # type: ignore[attr-defined]


def test_a_dead_master_takes_only_its_own_users_away(tmp_path: Path, namespace: str) -> None:
    """Not even the master that holds the unavailable set, which every reader asks for."""
    keys = Keys(namespace, layout="cluster", partitions=12)
    with local_redis_cluster(tmp_path) as cluster:
        with connect(cluster.url, "cluster") as client:
            meta = Meta(layout="cluster", partitions=12)
            client.set(keys.meta, msgspec.json.encode(meta))
            client.set(keys.unavailable_version, "1")
            client.sadd(keys.unavailable, "gone")
            for n in range(30):
                client.set(keys.top_of(f"u{n}"), a_list("gone", f"i{n}"))
        dead = cluster.master_of(keys.unavailable)
        away = {n for n in range(30) if cluster.master_of(keys.top_of(f"u{n}")) == dead}
        assert 0 < len(away) < 30
        clock_s = itertools.count(0, 100)
        options: dict[str, Any] = {"layout": "cluster", "monotonic": lambda: next(clock_s)}
        with TopK(cluster.url, namespace=namespace, **options) as top:
            top.get("u0")
            dead.kill()
            for n in range(30):
                if n in away:
                    with pytest.raises(UnavailableError):
                        top.get(f"u{n}")
                else:
                    assert top.get(f"u{n}").items == [f"i{n}"]
            dead.start()
            cluster.wait_until_whole()
            assert [top.get(f"u{n}").items for n in range(30)] == [[f"i{n}"] for n in range(30)]


def test_a_reader_sees_a_new_list_at_once(redis_url: str, namespace: str, server: Any) -> None:
    """Only the fallback, the set and meta are remembered, never a user's list."""
    with TopK(redis_url, namespace=namespace) as top:
        server.set(f"{namespace}:top:u", a_list("a"))
        assert top.get("u").items == ["a"]
        server.set(f"{namespace}:top:u", a_list("b"))
        assert top.get("u").items == ["b"]


def test_a_cut_connection_is_opened_again(redis_url: str, namespace: str, server: Any) -> None:
    """Redis restarts and firewalls cut idle connections; the next page must not see it."""
    with TopK(redis_url, namespace=namespace) as top:
        server.set(f"{namespace}:top:u", a_list("a"))
        top.get("u")
        server.client_kill_filter(_type="normal", skipme=True)

        assert top.get("u").items == ["a"]


def test_redis_refusing_is_unavailable_at_once(ask: Ask) -> None:
    """redis-py's ten retries would hold a page for seconds."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began_s = time.monotonic()

    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.* does not answer"):
        ask(f"redis://:secret@127.0.0.1:{port}/0", "get", "u")

    assert time.monotonic() - began_s < 2.0


def test_redis_hanging_is_unavailable_within_two_seconds(ask: Ask) -> None:
    """A stopped Redis process accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began_s = time.monotonic()

        with pytest.raises(UnavailableError, match="does not answer"):
            ask(f"redis://127.0.0.1:{port}/0", "get", "u")

    assert time.monotonic() - began_s < 2.0


def test_a_reader_lives_through_an_outage(tmp_path: Path) -> None:
    """Applications keep one reader for days; Redis restarts and hangs in that time."""
    key = Keys("afterclick").top(0, "u")
    with local_redis(tmp_path) as server, TopK(server.url) as top:
        write = redis.Redis.from_url(server.url)
        write.set(key, a_list("a"))
        assert top.get("u").items == ["a"]

        server.pause()
        began_s = time.monotonic()
        with pytest.raises(UnavailableError):
            top.get("u")
        assert time.monotonic() - began_s < 2.0
        server.resume()
        assert top.get("u").items == ["a"]

        server.kill()
        with pytest.raises(UnavailableError):
            top.get("u")
        server.start()
        assert top.get("u").source == "none"
        write.set(key, a_list("b"))
        assert top.get("u").items == ["b"]
        write.close()


def test_a_wrong_password_is_a_config_error_without_the_password(ask: Ask, redis_url: str) -> None:
    """Retrying does not mend a password, and logs must not hold one."""
    host = redis_url.removeprefix("redis://")

    with pytest.raises(ConfigError, match="check user and password") as caught:
        ask(f"redis://nobody:hunter2@{host}", "get", "u")

    assert "hunter2" not in str(caught.value)


def test_a_user_without_rights_is_a_config_error(
    ask: Ask, redis_url: str, namespace: str, server: Any
) -> None:
    """The operator must hear which command to allow, not an endless retry."""
    server.acl_setuser(namespace, enabled=True, passwords=["+pw"], commands=["+get"], keys=["*"])
    try:
        with pytest.raises(ConfigError, match="mget"):
            ask(f"redis://{namespace}:pw@{redis_url.removeprefix('redis://')}", "get", "u")
    finally:
        server.acl_deluser(namespace)


@on_both
def test_a_foreign_value_under_the_key_is_named(
    ask: Ask, redis_url: str, namespace: str, server: Any
) -> None:
    """Two applications on one Redis: say which key, do not show half a list."""
    server.set(f"{namespace}:top:u", b"\xff\x00")

    with pytest.raises(ContractError, match=f"{namespace}:top:u"):
        ask(redis_url, "get", "u", namespace=namespace)


def test_the_documented_example_runs(redis_url: str, server: Any) -> None:
    """The first thing anyone does is copy it."""
    page = Path(__file__).parents[2] / "docs" / "contracts.md"
    example = page.read_text().partition("```python\n")[2].partition("```")[0]
    assert '"redis://127.0.0.1:6379/0"' in example
    server.set("afterclick:top:u17", a_list("a"))
    try:
        names: dict[str, Any] = {}
        exec(example.replace("redis://127.0.0.1:6379/0", redis_url), names)  # noqa: S102
    finally:
        server.delete("afterclick:top:u17")

    assert names["answer"].items == ["a"]


def test_the_async_reader_has_the_methods_of_the_sync_one() -> None:
    """One page of documentation covers both."""
    names = {name for name in vars(TopK) if not name.startswith("_")}
    assert names == {name for name in vars(AsyncTopK) if not name.startswith("_")}
    for name in names:
        assert inspect.signature(getattr(TopK, name)).parameters.keys() == (
            inspect.signature(getattr(AsyncTopK, name)).parameters.keys()
        )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://cache:6379/0", "redis://cache:6379/0"),
        ("redis://:hunter2@a:1,b:2/0", "redis://***@a:1,b:2/0"),
        ("redis://:hun,ter2@a:1,b:2/0", "redis://***@a:1,b:2/0"),
        ("rediss://[::1]:6379/2", "rediss://[::1]:6379/2"),
        ("redis://:hunter2@cache:6379/0", "redis://***@cache:6379/0"),
        ("redis://me:hunter2@cache", "redis://***@cache"),
        ("redis://:hun/ter2@cache:1/0", "redis://***@cache:1/0"),
        ("redis://:hun@ter2@cache:1/0", "redis://***@cache:1/0"),
        ("redis://:hun?ter2#@cache:1/0", "redis://***@cache:1/0"),
        ("redis://cache:6379/0?password=hunter2", "redis://***"),
        ("redis://cache:6379/0?db=1", "redis://cache:6379/0"),
        ("redis://:hunter2", "redis://***"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("unix://me:hunter2@/run/redis.sock", "unix://***@/run/redis.sock"),
        ("redis+sentinel://a:1,[::1]:2/my.shop/0", "redis+sentinel://a:1,[::1]:2/my.shop/0"),
        ("rediss+sentinel://me:hunter2@a/shop", "rediss+sentinel://***@a/shop"),
        ("redis+sentinel://a/shop?sentinel_password=hunter2", "redis+sentinel://***"),
        ("redis+sentinel://a,b:hunter2", "redis+sentinel://***"),
        ("hunter2", "***"),
    ],
)
def test_a_url_is_shown_without_its_secret(url: str, shown: str) -> None:
    """Addresses go into logs and bug reports."""
    assert safe_url(url) == shown
    assert "hunter2" not in safe_url(url)
    assert "ter2" not in safe_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "cache:6379",
        "redis://:hunter2",
        "http://x:y@z",
        "redis+sentinel://a:1,b:2",
        "redis+sentinel://a:hunter2/shop",
        "redis+sentinel://a/shop/zero",
    ],
)
def test_a_malformed_url_is_a_config_error(url: str) -> None:
    """redis-py's own message quotes the part it could not read, which may be the password."""
    with pytest.raises(ConfigError, match="expected redis://") as caught:
        TopK(url)

    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__
