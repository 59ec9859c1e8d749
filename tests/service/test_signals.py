"""What workers tell each other by topic `signals`, on the run's broker and Redis."""

import re
import urllib.request
from collections import Counter
from typing import Any

import msgspec
import pytest

from afterclick.serving.keys import partition_of
from afterclick.serving.records import TopList
from afterclick.streams.admin import create_topics
from afterclick.streams.events import Click
from afterclick.streams.log import LogReader
from afterclick.streams.migrate import migrate
from afterclick.streams.rebuild import rebuild
from tests.service.stage import Stage, some_clicks
from tests.service.told import absorbed, counted, num_waiting

pytestmark = pytest.mark.service


def list_of(stage: Stage, user: str) -> TopList:
    store = stage.store()
    client: Any = store._redis
    data = client.get(stage.keys.top(0, user))
    store.close()
    return msgspec.json.decode(data, type=TopList)


def fallback(stage: Stage) -> TopList:
    store = stage.store()
    client: Any = store._redis
    data = client.get(stage.keys.fallback)
    store.close()
    return msgspec.json.decode(data, type=TopList)


def signals_end(stage: Stage) -> int:
    reader = LogReader(stage.streams)
    end = reader.edges(stage.streams.signals_topic, 0)[1]
    reader.close()
    return end


def test_what_one_partition_clicks_moves_the_lists_of_the_other(stage: Stage) -> None:
    """Lists age while their users are away: what everybody clicks now, wherever, must reach them,
    and `verify` must be able to tell what they should be.
    """
    stage.publish("r1", seed=1, blend=True)
    users: dict[int, list[str]] = {0: [], 1: []}
    for user in (f"u{n}" for n in range(40)):
        users[partition_of(user, 2)].append(user)
    away = Click(user_id=users[1][0], item_id="i00001", timestamp_ms=1_700_000_000_000)
    quick = {
        "AFTERCLICK_STREAMS__SIGNALS_EVERY_MS": "20",
        "AFTERCLICK_STREAMS__RENEW_EVERY_S": "0.1",
    }
    with stage.worker(**quick) as worker:
        stage.send([away])
        stage.wait_folded()
        before = list_of(stage, away.user_id)
        follows = ["i00001", "i00077"] * 20  # what the others go on to
        stage.send(
            Click(user_id=users[0][n // 2 % 10], item_id=item, timestamp_ms=away.timestamp_ms + n)
            for n, item in enumerate(follows)
        )
        stage.wait_folded()
        stage.wait(lambda: num_waiting(stage) == 0, "all moves are published")
        end = signals_end(stage)
        stage.wait(lambda: list_of(stage, away.user_id).signals == end, "the list is made anew")
        after = list_of(stage, away.user_id)
        assert (after.offset, after.event_ms) == (before.offset, before.event_ms)
        assert after.signals > before.signals
        assert after.items != before.items
        stage.wait(lambda: fallback(stage).signals == end, "the newcomers' list follows")
        assert fallback(stage).source == "model"
        page = urllib.request.urlopen(f"{worker.url}/metrics").read().decode()  # noqa: S310
        assert f"afterclick_signals_absorbed_total {len(follows) + 1}.0" in page
        assert f"afterclick_signals_offset {end}.0" in page
        worker.process.kill()
    report = stage.verify()
    assert report.first_difference is None
    assert report.lists == 11
    with stage.worker(**quick):
        stage.send([Click(user_id="u39", item_id="i00005", timestamp_ms=away.timestamp_ms)])
        stage.wait_folded()
    assert stage.verify().first_difference is None

    store = stage.store()
    client: Any = store._redis
    name = stage.keys.top(1, away.user_id)
    for signals, says in ((after.signals - 1, "signals|items|scores"), (10**6, "the topic ends")):
        wrong = msgspec.structs.replace(after, signals=signals)
        client.set(name, msgspec.json.encode(wrong))
        assert re.search(says, stage.verify().first_difference or "")
    store.close()


def test_a_worker_killed_between_commit_and_publication_loses_and_doubles_nothing(
    stage: Stage,
) -> None:
    """The moves stand in Redis from the moment when the clicks count, whoever publishes them."""
    stage.publish("r1", seed=1, blend=True)
    stage.send(some_clicks(300))
    with stage.worker(AFTERCLICK_STREAMS__SIGNALS_EVERY_MS="60000") as worker:
        stage.wait_folded()
        worker.process.kill()
    assert num_waiting(stage) > 0
    assert absorbed(stage) == []
    stage.send(some_clicks(100, start=300))
    with stage.worker(AFTERCLICK_STREAMS__SIGNALS_EVERY_MS="10"):
        stage.wait_folded()
        stage.wait(lambda: num_waiting(stage) == 0, "all moves are published")
    assert Counter(absorbed(stage)) == Counter(counted(stage))
    assert len(counted(stage)) == 400
    assert stage.verify().first_difference is None


def test_what_a_rebuild_folds_first_is_told_by_the_workers_after_it(stage: Stage) -> None:
    """Clicks came while Redis was lost: nobody has told the others of them yet."""
    stage.send(some_clicks(100))
    with stage.worker():
        stage.wait_folded()
        stage.wait(lambda: num_waiting(stage) == 0, "all moves are published")
    stage.send(some_clicks(50, start=100))
    store = stage.store()
    client: Any = store._redis
    client.delete(*client.scan_iter(match=f"*{stage.serving.namespace}*"))
    store.close()
    rebuild(stage.serving, stage.streams)
    assert 0 < num_waiting(stage) < 10
    assert len(absorbed(stage)) == 100
    with stage.worker():
        stage.wait(lambda: num_waiting(stage) == 0, "all moves are published")
    assert Counter(absorbed(stage)) == Counter(counted(stage))
    assert len(counted(stage)) == 150


def test_moves_that_wait_are_told_before_users_move_to_other_partitions(stage: Stage) -> None:
    """They stand under the old epoch's keys, at which no worker looks again."""
    stage.send(some_clicks(60))
    with stage.worker(AFTERCLICK_STREAMS__SIGNALS_EVERY_MS="60000"):
        stage.wait_folded()
    assert num_waiting(stage) > 0
    expected = counted(stage)
    name = f"{stage.streams.clicks_topic}-next"
    moved = msgspec.structs.replace(stage.streams, clicks_topic=name)
    create_topics(moved, partitions=3, replication=1)
    assert migrate(stage.serving, moved).done
    assert Counter(absorbed(stage)) == Counter(expected)
