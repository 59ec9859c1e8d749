"""A migration's own writes, on one server and on a cluster."""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from afterclick.serving.connection import connect
from afterclick.serving.epochs import EpochStore
from afterclick.serving.keys import Keys, Layout, Meta
from afterclick.serving.records import Head, TopList, encode_list, without_stamp
from afterclick.serving.store import Due, PopularityWrite, Store, UserWrite

pytestmark = pytest.mark.service

on_both = pytest.mark.parametrize("layout", ["single", "cluster"], indirect=True)

TOP = TopList(
    items=["i1"],
    scores=[1.5],
    source="model",
    release="r",
    publication=1,
    items_offset=[0],
    partition=0,
    offset=17,
    event_ms=99,
)


def opened(place: str, layout: Layout, namespace: str, partitions: int, epoch: int) -> EpochStore:
    keys = Keys(namespace, layout=layout, partitions=partitions, epoch=epoch)
    return EpochStore(place, keys, record_ttl_s=1000, popularity_ttl_s=500)


@pytest.fixture
def old(place: str, layout: Layout, namespace: str) -> Iterator[EpochStore]:
    """Two partitions with 300 users each, one list due, one popular item."""
    store = opened(place, layout, namespace, 2, 0)
    for partition in range(2):
        users = [
            UserWrite(f"p{partition}-u{n}", b"record %d" % n, encode_list(TOP)) for n in range(300)
        ]
        hours = [PopularityWrite(7, {"i1": 3})]
        assert store.commit(partition, b"", Head(next=300, batch="a"), None, users, hours) is None
    late = [UserWrite("p0-late", b"", b"", Due(18, 100, 101))]
    stored = store.read(0, []).head
    assert store.commit(0, stored, Head(next=301, batch="b"), None, late, []) is None
    yield store
    store.close()


@pytest.fixture
def new(place: str, layout: Layout, namespace: str) -> Iterator[EpochStore]:
    store = opened(place, layout, namespace, 4, 1)
    yield store
    store.close()


@pytest.fixture
def client(place: str, layout: Layout) -> Iterator[Any]:
    with connect(place, layout) as client:
        yield client


@on_both
def test_a_walk_finds_every_user_of_its_epoch_and_nobody_else(
    old: EpochStore, new: EpochStore
) -> None:
    """Epochs stand side by side until the old one is dropped; a glob alone would mix them."""
    assert new.carry(3, new.take(3, ["stranger"])[1])
    new.commit(2, b"", Head(next=1), None, [UserWrite("newcomer", b"x", encode_list(TOP))], [])
    found: dict[int, set[str]] = {}
    for partition, users in old.walk():
        found.setdefault(partition, set()).update(users)
    everybody = {p: {f"p{p}-u{n}" for n in range(300)} for p in range(2)}
    assert found == {0: everybody[0] | {"p0-late"}, 1: everybody[1]}
    assert {user for _, users in new.walk() for user in users} == {"newcomer"}


@on_both
def test_users_are_carried_with_their_lists_marks_and_time_left(
    old: EpochStore, new: EpochStore, client: Any
) -> None:
    """What expires soon must expire soon in its new place, too."""
    client.pexpire(old.keys.user(0, "p0-u1"), 50_000)
    client.pexpire(old.keys.top(0, "p0-u1"), 50_000)
    for _ in range(2):  # a run that was cut off is repeated
        stored, some = old.take(0, ["p0-u1", "p0-late"])
        assert stored == old.read(0, []).head
        assert new.carry(3, some)
    _, (one, late) = new.read_standing(3, ["p0-u1", "p0-late"])
    moved = msgspec.structs.replace(TOP, partition=3, offset=-1)
    assert one.record == b"record 1"
    assert without_stamp(one.list_data or b"") == encode_list(moved)
    assert late.due == Due(-1, 100, 101)
    assert 0 < client.pttl(new.keys.user(3, "p0-u1")) <= 50_000
    assert 0 < client.pttl(new.keys.top(3, "p0-u1")) <= 50_000


@on_both
def test_nobody_is_carried_into_a_partition_that_is_folded_already(
    old: EpochStore, new: EpochStore
) -> None:
    """A second migration that slept would put old states over new ones."""
    _, some = old.take(0, ["p0-u1"])
    assert new.carry(3, some)
    newer = [UserWrite("p0-u1", b"newer", encode_list(TOP))]
    assert new.commit(3, b"", Head(next=1), None, newer, []) is None
    assert not new.carry(3, some)
    assert new.read(3, ["p0-u1"]).records == [b"newer"]


@on_both
def test_an_epoch_is_kept_for_a_while_or_dropped_and_its_heads_stay(
    old: EpochStore, new: EpochStore, client: Any
) -> None:
    """Without the held head a worker that wakes up late would begin the epoch again."""
    _, some = old.take(0, ["p0-u1"])
    new.carry(3, some)
    heads = [old.read(p, []).head for p in range(2)]
    old.keep_until(int(time.time() * 1000) + 60_000)
    for key in (old.keys.user(1, "p1-u7"), old.keys.popularity(1, 7), old.keys.due(0)):
        assert 0 < client.pttl(key) <= 60_000
    assert client.pttl(old.keys.head(0)) == -1
    assert client.pttl(new.keys.user(3, "p0-u1")) > 60_000
    assert client.pttl(new.keys.top(3, "p0-u1")) > 60_000, "in the layout single, the same key"
    assert old.drop() >= 603
    assert not any(users for _, users in old.walk())
    assert [old.read(p, []).head for p in range(2)] == heads
    _, (one,) = new.read_standing(3, ["p0-u1"])
    assert one.record == b"record 1"
    assert one.list_data is not None


@on_both
def test_meta_moves_only_from_what_was_read(place: str, layout: Layout, namespace: str) -> None:
    """A worker that starts during a migration must not move everybody back."""
    store = Store(place, Keys(namespace, layout=layout), record_ttl_s=100, popularity_ttl_s=100)
    first, second = Meta(partitions=2), Meta(partitions=4, epoch=1)
    assert store.write_meta(b"", first)
    before = store.stored_meta()
    assert store.write_meta(before, second)
    assert store.write_meta(before, second), "sent twice by the client"
    assert not store.write_meta(before, Meta(partitions=2, k=7))
    assert store.read_meta() == second
    store.close()
