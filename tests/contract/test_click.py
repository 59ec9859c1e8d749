"""`afterclick click` on a real broker and Redis; a written head stands for the worker."""

import uuid
from contextlib import closing
from typing import Any

import kafka
import msgspec
import pytest
import redis

from afterclick.serving.cli import main
from afterclick.serving.keys import Keys, partition_of
from afterclick.serving.records import Head, TopList
from afterclick.streams.admin import client_config, create_topics
from afterclick.streams.events import decode_click
from afterclick.streams.settings import StreamsSettings

pytestmark = pytest.mark.service


@pytest.fixture
def place(
    broker_address: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[StreamsSettings, Keys]:
    name = f"t{uuid.uuid4().hex[:8]}"
    streams = StreamsSettings(
        broker=broker_address,
        clicks_topic=f"{name}-clicks",
        items_topic=f"{name}-items",
        signals_topic=f"{name}-signals",
    )
    create_topics(streams, partitions=3, replication=1)
    monkeypatch.setenv("AFTERCLICK_STREAMS__BROKER", broker_address)
    monkeypatch.setenv("AFTERCLICK_STREAMS__CLICKS_TOPIC", streams.clicks_topic)
    monkeypatch.setenv("AFTERCLICK_STREAMS__ITEMS_TOPIC", streams.items_topic)
    monkeypatch.setenv("AFTERCLICK_STREAMS__SIGNALS_TOPIC", streams.signals_topic)
    monkeypatch.setenv("AFTERCLICK_SERVING__REDIS", redis_url)
    monkeypatch.setenv("AFTERCLICK_SERVING__NAMESPACE", name)
    return streams, Keys(name)


def read(streams: StreamsSettings, num_records: int) -> list[Any]:
    consumer = kafka.KafkaConsumer(
        streams.clicks_topic,
        **client_config(streams),
        auto_offset_reset="earliest",
        group_id=None,
        consumer_timeout_ms=10_000,
    )
    with closing(consumer):
        return [next(consumer) for _ in range(num_records)]


def test_a_sent_click_is_one_that_a_worker_takes_from_its_partition(
    place: tuple[StreamsSettings, Keys], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another hash than murmur2 would send a user's clicks to two workers."""
    streams, _ = place
    users = ["u", "用户", "user-17"]

    for user in users:
        assert main(["click", user, "i1", "--event", "cart", "--event-id", "e", "--no-wait"]) == 0

    records = read(streams, len(users))
    for record in records:
        event = decode_click(
            record.key, record.value, offset=record.offset, record_ms=record.timestamp
        )
        assert record.partition == partition_of(event.user_id, 3)
        assert (event.item_id, event.event, event.event_id) == ("i1", "cart", "e")
        assert not event.clock_replaced
    assert {record.key.decode() for record in records} == set(users)
    assert "sent to partition" in capsys.readouterr().out


def test_the_list_is_shown_once_the_head_is_past_the_click(
    place: tuple[StreamsSettings, Keys], redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Head and list change together, so the head tells when the list is the new one."""
    _, keys = place
    partition = partition_of("u", 3)
    stored = TopList(
        items=["a", "b", "c", "d", "e", "f"],
        scores=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        source="popularity",
        release="",
        publication=0,
        items_offset=[],
        partition=partition,
        offset=0,
        event_ms=0,
    )
    with redis.Redis.from_url(redis_url) as server:
        server.set(keys.top(partition, "u"), msgspec.json.encode(stored))
        server.set(keys.head(partition), msgspec.json.encode(Head(next=1)))

        assert main(["click", "u", "i1"]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert main(["click", "u", "i1", "--timeout", "0.05"]) == 3

    assert "ms after the click was sent" in shown[0]
    assert shown[1].startswith("u: popularity, no release")
    assert [line.split()[1] for line in shown[2:]] == ["a", "b", "c", "d", "e"]
    assert f"partition {partition}: no worker took offset 1" in capsys.readouterr().err


def test_a_click_without_an_item_is_refused_before_it_is_sent(
    place: tuple[StreamsSettings, Keys], capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise it would be found in the dead letters."""
    assert main(["click", "u"]) == 2
    assert "ITEM is missing" in capsys.readouterr().err
    assert main(["click", "u", "--event", "visit", "--no-wait"]) == 0
