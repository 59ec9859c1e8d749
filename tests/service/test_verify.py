"""`afterclick verify`: what it accepts, what it finds, and that it says which."""

import json
from collections.abc import Iterator

import msgspec
import pytest
import redis

from afterclick.serving.cli import main
from afterclick.serving.reader import TopK
from afterclick.serving.records import TopList
from afterclick.streams.admin import check_topics
from afterclick.streams.events import Click, Item
from afterclick.streams.log import LogReader
from afterclick.streams.partition import PartitionFold
from afterclick.streams.record import Chunk, LogEdges
from afterclick.streams.refold import Releases
from tests.doubles import damaged
from tests.service.stage import Stage, fold_by_hand, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def folded(stage: Stage) -> Stage:
    """200 clicks of 40 users under a release, then some after a new item came, and a visit."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(200))
        stage.wait_folded()
        stage.send([Item(item_id="fresh", categories=["c1"])])
        stage.wait(lambda: "fresh" in _newest_items(stage), "the item is in force")
        stage.send([Click(user_id="visitor", event="visit")])
        stage.wait_folded()
    return stage


def _newest_items(stage: Stage) -> str:
    """`fresh` once a click was folded with it."""
    stage.send(some_clicks(16, users=16, start=1000))
    stage.wait_folded()
    store = stage.store()
    entries = [entry for p in (0, 1) for entry in store.inputs(p)]
    store.close()
    return "fresh" if sum(sum(e.items) > 0 for e in entries) == 2 else ""


def folder_on(stage: Stage, partition: int, releases: Releases) -> PartitionFold:
    """What a worker that holds the partition would fold with, under its newest inputs."""
    store = stage.store()
    serving = releases.serving(store.inputs(partition)[-1])
    reader = LogReader(stage.streams)
    edges = reader.edges(stage.streams.clicks_topic, partition)
    reader.close()
    topic_id = check_topics(stage.streams).clicks_id
    return fold_by_hand(stage, partition, store, serving, LogEdges(topic_id, *edges))


def test_short_lists_are_verified_rebuilt_and_read(stage: Stage, client: redis.Redis) -> None:
    """Compressed, and without scores from some click on: the replay follows both."""
    stage.publish("r1", seed=1)
    with stage.worker(AFTERCLICK_SERVING__LIST_COMPRESSION="zlib"):
        stage.send(some_clicks(100))
        stage.wait_folded()
    assert stage.verify().first_difference is None
    stage.serving = msgspec.structs.replace(
        stage.serving, list_scores=False, list_compression="zlib"
    )
    with stage.worker():
        stage.send(some_clicks(100, start=1000))
        stage.wait_folded()
        with TopK(stage.serving.redis, namespace=stage.serving.namespace) as top:
            answer = top.get("u7", k=10)
    assert (len(answer.items), answer.scores) == (10, [])
    assert not any(client.get(stage.keys.top_of(f"u{n}")).startswith(b"{") for n in range(40))
    found = stage.verify()
    assert (found.first_difference, found.lists) == (None, 40)


def test_every_kind_of_damage_is_found_and_named(folded: Stage, client: redis.Redis) -> None:
    """A check that misses a changed byte proves nothing."""
    keys, store = folded.keys, folded.store()
    (partition,) = (p for p in (0, 1) if "u7" in store.users(p))
    store.close()
    record, top = keys.user(partition, "u7"), keys.top(partition, "u7")
    head = keys.head(partition)
    assert folded.verify().first_difference is None

    def broken(name: str, change: object) -> str:
        """First difference while a key holds something else."""
        whole = client.get(name)
        assert whole is not None
        changed = change(whole)  # type: ignore[operator]
        if changed is None:
            client.delete(name)
        else:
            client.set(name, changed)
        found = folded.verify()
        client.set(name, whole)
        return f"{found.differences}: {found.first_difference}"

    def listed(**fields: object) -> object:
        return lambda data: msgspec.json.encode(
            msgspec.structs.replace(msgspec.json.decode(data, type=TopList), **fields)
        )

    assert "u7': record: state differs" in broken(record, lambda d: damaged(d[:41]) + d[41:])
    assert "u7': record: Redis has none" in broken(record, lambda d: None)
    assert "u7': list: Redis has none" in broken(top, lambda d: None)
    assert "u7': list: items[0] is ['x']" in broken(top, listed(items=["x"]))
    assert "u7': list: offset is 3 in Redis" in broken(top, listed(offset=3))
    assert "names publication 7" in broken(top, listed(publication=7))
    assert "names publication 1 with items offset [9]" in broken(top, listed(items_offset=[9]))
    counted = broken(head, lambda d: d.replace(b'"clicks":', b'"clicks":1'))
    assert "clicks counted in Redis" in counted
    assert folded.verify().first_difference is None


def test_lists_and_records_renewed_under_later_inputs_are_computed_under_those(
    folded: Stage, client: redis.Redis
) -> None:
    """A renewal by a worker is no difference, and damage to a renewed list still is one."""
    folded.publish("r2", seed=2)
    releases = Releases(folded.serving, folded.streams)
    with folded.worker():
        folded.send(some_clicks(8, users=8, start=2000))  # brings publication 2 into the inputs
        folded.wait_folded()
    users: list[str] = []
    for partition in (0, 1):
        fold = folder_on(folded, partition, releases)
        store = folded.store()
        users += sorted(store.users(partition))
        store.close()
        fold.renew(users)
    releases.close()

    report = folded.verify()
    assert report.first_difference is None
    assert report.renewed >= 20

    top = folded.keys.top(0, "u30")
    data = client.get(top)
    assert data is not None
    found = msgspec.json.decode(data, type=TopList)
    assert found.publication == 2
    swapped = msgspec.structs.replace(found, items=[found.items[1], *found.items[1:]])
    client.set(top, msgspec.json.encode(swapped))
    assert "'u30': list: items[0]" in (folded.verify().first_difference or "")


def test_lists_that_are_put_off_are_counted_and_their_records_compared(
    folded: Stage, client: redis.Redis
) -> None:
    """They are late, not wrong; the state has no such leave."""
    releases = Releases(folded.serving, folded.streams)
    folds = [folder_on(folded, partition, releases) for partition in (0, 1)]
    folded.send(some_clicks(30, users=10, start=3000))
    reader = LogReader(folded.streams)
    for partition, fold in enumerate(folds):
        end = reader.edges(folded.streams.clicks_topic, partition)[1]
        for records in reader.read(folded.streams.clicks_topic, partition, fold.position, end):
            fold.process(Chunk(fold.position, records[-1].offset + 1, records), put_off=True)
    reader.close()

    report = folded.verify()
    assert report.first_difference is None
    assert report.put_off == 10

    store = folded.store()
    (partition,) = (p for p in (0, 1) if "u7" in store.users(p))
    store.close()
    record = folded.keys.user(partition, "u7")
    whole = client.get(record)
    assert whole is not None
    client.set(record, damaged(whole[:41]) + whole[41:])
    assert "'u7': record: state differs" in (folded.verify().first_difference or "")
    client.set(record, whole)
    while any(fold.renew_due(100).lists for fold in folds):
        pass
    releases.close()
    settled = folded.verify()
    assert (settled.first_difference, settled.put_off) == (None, 0)


def test_one_user_and_an_earlier_offset_from_the_command_line(
    folded: Stage,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script goes by the exit code; a person looks at one user of a long log."""
    for name, value in folded.env.items():
        monkeypatch.setenv(name, value)

    def run(*argv: str) -> tuple[int, dict[str, object]]:
        code = main(["verify", "--json", *argv])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    code, one = run("--user", "u30")
    assert (code, one["users"], one["lists"]) == (0, 1, 1)
    assert int(str(one["clicks"])) < 20, "only the user's own clicks were folded"
    code, early = run("--to", "60")
    assert code == 0
    assert (early["skipped"], early["lists"]) == (36, 4), "of 40 in both partitions"
    client.delete(folded.keys.top(0, "u30"))
    assert run("--user", "u30")[0] == 1
    assert run("--user", "u31")[0] == 0
    assert main(["verify", "--to", "-1"]) == 2
