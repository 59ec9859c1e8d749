"""The store on a real Redis, and the tests' in-memory double held to the same promises."""

import os
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from afterclick.serving.connection import connect
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Keys, Layout
from afterclick.serving.reader import TopK
from afterclick.serving.records import (
    Head,
    InputsEntry,
    Interaction,
    TopList,
    UserRecord,
    encode_list,
    encode_record,
    pack_interaction,
    without_stamp,
)
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.serving.store import (
    Commit,
    Due,
    PopularityWrite,
    Read,
    Reading,
    SignalsWrite,
    Standing,
    Store,
    UserWrite,
)
from afterclick.streams.local_cluster import LocalCluster
from afterclick.streams.replica import Replica

pytestmark = pytest.mark.service

RULES = ListRules.of(ServingSettings())


def head(number: int, batch: str = "b") -> Head:
    return Head(next=number, batch=f"{batch}{number}")


def entry(offset: int) -> InputsEntry:
    return InputsEntry(
        offset=offset,
        publication=0,
        release="",
        sha256="",
        publication_items=[],
        items=[],
        rules=RULES,
    )


def encoded(value: Head) -> bytes:
    return msgspec.json.encode(value)


@pytest.fixture
def real(place: str, layout: Layout, namespace: str) -> Iterator[Store]:
    keys = Keys(namespace, layout=layout)
    store = Store(place, keys, record_ttl_s=1000, popularity_ttl_s=500)
    yield store
    store.close()


@pytest.fixture
def client(place: str, layout: Layout) -> Iterator[Any]:
    with connect(place, layout) as client:
        yield client


@pytest.fixture
def store(request: pytest.FixtureRequest, layout: Layout | None) -> Store | Replica:
    return request.getfixturevalue("real") if layout else Replica()


everywhere = pytest.mark.parametrize(
    "layout", ["single", "cluster", None], ids=["redis", "cluster", "memory"], indirect=True
)
on_both = pytest.mark.parametrize("layout", ["single", "cluster"], indirect=True)


LIST = encode_list(
    TopList(
        items=["i1"],
        scores=[1.0],
        source="model",
        release="r",
        publication=1,
        items_offset=[0],
        partition=0,
        offset=1,
        event_ms=1,
    )
)


@everywhere
def test_a_write_goes_through_only_on_the_head_that_was_read(store: Store | Replica) -> None:
    """The fence: a zombie's write changes nothing, and it is told where things stand."""
    first, second = head(5), head(9)
    write = [UserWrite("u1", b"one", LIST)]
    hours = [PopularityWrite(7, {"i1": 2})]
    assert store.commit(0, b"", first, entry(0), write, hours) is None
    zombie = [UserWrite("u1", b"zombie", LIST), UserWrite("u2", b"zombie", b"")]
    assert store.commit(0, b"", head(6, "z"), entry(1), zombie, hours) == encoded(first)
    read = store.read(0, ["u1", "u2"])
    assert (read.head, read.records) == (encoded(first), [b"one", None])
    assert (
        store.commit(0, encoded(first), second, None, [UserWrite("u1", b"two", LIST)], hours)
        is None
    )
    assert store.read(0, ["u1"]).records == [b"two"]
    assert store.read_popularity(0, range(6, 9)) == (encoded(second), {7: {"i1": 4}})


@everywhere
def test_a_write_sent_twice_by_the_client_is_applied_once(store: Store | Replica) -> None:
    """redis-py re-sends a script whose answer was lost; its own batch tells it."""
    hours = [PopularityWrite(7, {"i1": 1})]
    for _ in range(2):
        assert store.commit(0, b"", head(5), entry(0), [UserWrite("u1", b"x", LIST)], hours) is None
    assert store.read_popularity(0, range(7, 8))[1] == {7: {"i1": 1}}


@everywhere
def test_empty_bytes_delete_the_record_and_the_list(store: Store | Replica) -> None:
    """`forget` must leave nothing."""
    assert store.commit(0, b"", head(1), None, [UserWrite("u1", b"x", LIST)], []) is None
    assert store.commit(0, encoded(head(1)), head(2), None, [UserWrite("u1", b"", b"")], []) is None
    assert store.read(0, ["u1"]).records == [None]


@on_both
def test_lists_stand_at_their_key_with_the_moment_of_writing(
    real: Store, client: Any, namespace: str
) -> None:
    """What an application reads, and what a comparison leaves out."""
    real.commit(3, b"", head(1), entry(0), [UserWrite("u1", b"x", LIST)], [])
    stored = client.get(real.keys.top(3, "u1"))
    assert 0 < client.ttl(f"{{{namespace}:3}}:u:u1") <= 1000
    assert client.ttl(f"{{{namespace}:3}}:head") == -1, "a head never expires"
    assert without_stamp(stored) == LIST
    assert msgspec.json.decode(stored, type=TopList).written_ms > 1_700_000_000_000
    assert [e.offset for e in real.inputs(3)] == [0]
    assert real.users(3) == {"u1"}


def test_a_full_record_needs_at_most_2_kb_of_redis(
    real: Store, client: Any, namespace: str
) -> None:
    """H 128, L 50, key and overhead included: `MEMORY USAGE`."""
    packed = pack_interaction(Interaction(1, 2, 3, 4, 5, False)) * 50
    record = UserRecord(1, 2, 3, 4, os.urandom(4 * 256), packed)
    user = "user-0123456789abcdef"
    real.commit(12, b"", head(1), None, [UserWrite(user, encode_record(record), LIST)], [])
    assert client.memory_usage(f"{{{namespace}:12}}:u:{user}") <= 2048


@on_both
def test_compressed_lists_are_read_as_if_they_were_not(
    place: str, layout: Layout, namespace: str, real: Store, client: Any
) -> None:
    """Workers with and without the setting share a namespace while one after the other restarts."""
    store = Store(
        place,
        Keys(namespace, layout=layout),
        record_ttl_s=1000,
        popularity_ttl_s=500,
        compress_lists=True,
    )
    store.commit(3, b"", head(1), entry(0), [UserWrite("u1", b"one", LIST)], [])
    real.commit(3, encoded(head(1)), head(2), None, [UserWrite("u2", b"two", LIST)], [])
    one, two = (client.get(store.keys.top(3, user)) for user in ("u1", "u2"))
    assert without_stamp(zlib.decompress(one)) == without_stamp(two) == LIST
    for each in (store, real):
        _, standing = each.read_standing(3, ["u1", "u2"])
        assert [without_stamp(user.list_data or b"") for user in standing] == [LIST, LIST]
    assert store.renew(3, encoded(head(2)), [UserWrite("u2", b"", LIST)]) is None
    assert without_stamp(zlib.decompress(client.get(store.keys.top(3, "u2")))) == LIST
    store.write_fallback(LIST)
    with TopK(place, namespace=namespace, layout=layout) as top:
        assert top.get("nobody").items == msgspec.json.decode(LIST)["items"]
    store.close()


@on_both
def test_the_unavailable_set_follows_the_newest_worker(
    real: Store, client: Any, namespace: str
) -> None:
    """A worker that is behind must not bring an item back; one on another history writes it all."""
    name = f"{{{namespace}}}:unavailable"
    assert real.write_unavailable(-2, 3, [], ["a", "b"])
    assert client.smembers(name) == {b"a", b"b"}
    assert real.write_unavailable(3, 5, ["-c", "+a"], ["b", "c"])
    assert client.smembers(name) == {b"b", b"c"}
    assert not real.write_unavailable(3, 4, ["-x"], ["x"])
    assert client.smembers(name) == {b"b", b"c"}
    assert real.write_unavailable(7, 9, ["-d"], ["d"])
    assert client.smembers(name) == {b"d"}
    assert client.get(f"{name}:version") == b"9"


@everywhere
def test_a_list_put_off_stays_as_it_is_until_it_is_made(store: Store | Replica) -> None:
    """A mark says what the list must answer; the write that makes the list takes the mark away."""
    due = Due(7, 1_700_000_000_123, 1_700_000_000_456)
    late = [UserWrite("u1", b"two", b"", due), UserWrite("u2", b"new", b"", due)]
    store.commit(0, b"", head(1), entry(0), [UserWrite("u1", b"one", LIST)], [])
    assert store.commit(0, encoded(head(1)), head(2), None, late, []) is None
    assert sorted(store.due_users(0, 10)) == ["u1", "u2"]
    assert len(store.due_users(0, 1)) == 1
    stands, (one, two, nobody) = store.read_standing(0, ["u1", "u2", "u3"])
    assert stands == encoded(head(2))
    assert (one.record, without_stamp(one.list_data or b""), one.due) == (b"two", LIST, due)
    assert two == Standing(b"new", None, due)
    assert nobody == Standing(None, None, None)
    assert store.renew(0, encoded(head(2)), [UserWrite("u2", b"", LIST)]) is None
    assert (
        store.commit(0, encoded(head(2)), head(3), None, [UserWrite("u1", b"x", LIST)], []) is None
    )
    assert store.due_users(0, 10) == []
    _, (two,) = store.read_standing(0, ["u2"])
    assert (two.record, without_stamp(two.list_data or b"")) == (b"new", LIST)


@everywhere
def test_commits_sent_together_are_fenced_one_by_one(
    request: pytest.FixtureRequest, store: Store | Replica, layout: Layout | None
) -> None:
    """Chunks of several partitions share a way to Redis, not a fate; the server may be a new one
    that does not know the script yet.
    """
    assert store.commit(1, b"", head(7), entry(0), [UserWrite("u1", b"stands", LIST)], []) is None
    if layout:
        request.getfixturevalue("client").script_flush()
    write = [UserWrite("u0", b"new", LIST)]
    commits = [
        Commit(partition, b"", head(3), entry(0), write, [PopularityWrite(7, {"i1": 1})])
        for partition in range(3)
    ]
    assert store.commit_all(commits) == [None, encoded(head(7)), None]
    assert store.commit_all(commits) == [None, encoded(head(7)), None], "sent again"
    asked = [Reading(0, ["u0"]), Reading(1, ["u0", "u1"]), Reading(2, []), Reading(0, ["u1"])]
    assert store.read_all(asked) == [
        Read(encoded(head(3)), [b"new"]),
        Read(encoded(head(7)), [None, b"stands"]),
        Read(encoded(head(3)), []),
        Read(encoded(head(3)), [None]),
    ]
    assert store.read_popularity(2, [7]) == (encoded(head(3)), {7: {"i1": 1}})


@everywhere
def test_a_renewal_goes_through_only_on_the_head_that_was_read(store: Store | Replica) -> None:
    """Records may have moved since: the list would be an older one's."""
    store.commit(0, b"", head(1), entry(0), [UserWrite("u1", b"one", LIST)], [])
    renewal = [UserWrite("u1", b"other", LIST)]
    assert store.renew(0, encoded(head(9)), renewal) == encoded(head(1))
    assert store.read(0, ["u1"]).records == [b"one"]
    for _ in range(2):  # the client may send it twice
        assert store.renew(0, encoded(head(1)), renewal) is None
    assert store.read(0, ["u1"]).records == [b"other"]


@everywhere
def test_moves_wait_from_their_write_until_the_topic_has_them(store: Store | Replica) -> None:
    """A worker killed right after the write has published nothing: the next owner finds them, in
    log order, whatever bytes they are.
    """
    first, second = SignalsWrite(4, b"\x00\xff one"), SignalsWrite(11, b"two")
    assert store.waiting_signals(0, 10) == []
    assert store.commit(0, b"", head(5), entry(0), [], [], first) is None
    assert store.commit(0, b"", head(6, "z"), None, [], [], SignalsWrite(5, b"zombie")) is not None
    assert store.commit(0, encoded(head(5)), head(9), None, [], []) is None, "visits move nothing"
    for _ in range(2):  # the client may send it twice
        assert store.commit(0, encoded(head(9)), head(12), None, [], [], second) is None
    assert store.waiting_signals(0, 10) == [first, second]
    assert store.waiting_signals(0, 1) == [first]
    assert store.num_waiting_signals(0) == 2
    store.published_signals(0, 4)
    assert store.waiting_signals(0, 10) == [second]
    store.published_signals(0, 11)
    assert (store.waiting_signals(0, 10), store.num_waiting_signals(0)) == ([], 0)


@on_both
def test_a_rebuild_s_clearing_leaves_the_moves_that_wait(real: Store) -> None:
    """They are of this log, and the rebuild publishes none of the clicks that it folds again."""
    waiting = SignalsWrite(0, b"one")
    real.keys = Keys(real.keys.namespace, layout=real.keys.layout, partitions=1)
    users = [UserWrite("u1", b"x", LIST)]
    assert real.commit(0, b"", head(1), entry(0), users, [], waiting) is None
    assert real.clear(0, encoded(head(1)), inputs=True)
    assert real.read(0, ["u1"]).records == [None]
    assert real.waiting_signals(0, 10) == [waiting]


@on_both
def test_a_renewal_neither_prolongs_nor_revives(real: Store, client: Any, namespace: str) -> None:
    """A record goes some time after its user's last event, whatever we do meanwhile."""
    real.commit(0, b"", head(1), entry(0), [UserWrite("u1", b"one", LIST)], [])
    record, top = real.keys.user(0, "u1"), real.keys.top(0, "u1")
    client.expire(record, 50)
    client.expire(top, 50)
    real.renew(0, encoded(head(1)), [UserWrite("u1", b"two", LIST)])
    assert 0 < client.ttl(record) <= 50
    assert 0 < client.ttl(top) <= 50
    client.delete(record, top)
    real.renew(0, encoded(head(1)), [UserWrite("u1", b"two", LIST)])
    assert not client.exists(record)
    assert not client.exists(top)
    real.commit(0, encoded(head(1)), head(2), None, [UserWrite("u2", b"", b"", Due(1, 2, 3))], [])
    real.renew(0, encoded(head(2)), [UserWrite("u2", b"", LIST)])
    assert 0 < client.ttl(real.keys.top(0, "u2")) <= 1000, "a visitor's first list"


def opened(url: str, layout: Layout) -> None:
    """What a worker does with its Redis at start."""
    store = Store(url, Keys("t", layout=layout), record_ttl_s=1000, popularity_ttl_s=500)
    try:
        store.check_server()
    finally:
        store.close()


def test_the_wrong_layout_is_named_at_start(
    redis_url: str, redis_cluster: LocalCluster, namespace: str
) -> None:
    """Else a worker would run into MOVED or CROSSSLOT at its first click of another node."""
    opened(redis_url, "single")
    opened(redis_cluster.url, "cluster")
    node = redis_cluster.masters[1].url
    opened(node, "cluster")
    with pytest.raises(ConfigError, match="AFTERCLICK_SERVING__LAYOUT=cluster"):
        opened(node, "single")
    with pytest.raises(ConfigError, match="AFTERCLICK_SERVING__LAYOUT=single"):
        opened(redis_url, "cluster")
    with pytest.raises(ConfigError, match="AFTERCLICK_SERVING__LAYOUT=single"):
        opened("redis+sentinel://127.0.0.1:26379/shop/0", "cluster")


@pytest.mark.parametrize("layout", ["single", "cluster"])
@pytest.mark.parametrize("url", ["cache:6379", "redis+sentinel:/me:hunter2@a/shop"])
def test_a_malformed_url_is_a_config_error(url: str, layout: Layout) -> None:
    """Of every verb that writes, as of the reader: no traceback, and no password in it."""
    with pytest.raises(ConfigError, match="expected redis://") as caught:
        opened(url, layout)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "layout"),
    [
        ("redis+sentinel://a:1,:2/shop", "single"),
        ("redis+sentinel://,/shop", "single"),
        ("redis://127.0.0.1:1,:2", "cluster"),
        ("redis://127.0.0.1:1,b:port", "cluster"),
    ],
)
def test_every_host_of_a_url_is_one(url: str, layout: Layout) -> None:
    """A name left empty by a template."""
    with pytest.raises(ConfigError, match="expected redis://"):
        opened(url, layout)


def test_a_cluster_that_is_away_is_waited_for() -> None:
    """An orchestrator starts workers and Redis side by side."""
    with pytest.raises(UnavailableError, match="does not answer"):
        opened("redis://127.0.0.1:1,127.0.0.1:2/0", "cluster")


def test_every_master_of_a_cluster_is_checked(redis_cluster: LocalCluster) -> None:
    """One node that evicts loses a third of all users."""
    master = redis_cluster.masters[2]
    with connect(master.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigError, match=f"node .*:{master.port}.*allkeys-lru"):
                opened(redis_cluster.url, "cluster")
        finally:
            client.config_set("maxmemory-policy", "noeviction")


def test_the_users_of_a_partition_are_found_on_its_node_alone(
    redis_cluster: LocalCluster, namespace: str
) -> None:
    """SCAN knows one node; asking the others too would cost their whole key space."""
    keys = Keys(namespace, layout="cluster")
    store = Store(redis_cluster.url, keys, record_ttl_s=1000, popularity_ttl_s=500)
    partitions = range(6)
    homes = {redis_cluster.master_of(keys.head(p)).port for p in partitions}
    assert len(homes) == 3, "the test needs partitions on every master"
    for p in partitions:
        write = [UserWrite(f"u{p}", b"x", LIST)]
        assert store.commit(p, b"", head(1), entry(0), write, []) is None
    assert [store.users(p) for p in partitions] == [{f"u{p}"} for p in partitions]
    standing = [store.read_standing(p, [f"u{p}"])[1] for p in partitions]
    assert [own.record for (own,) in standing] == [b"x"] * 6
    store.close()
