"""`afterclick replay` against a real broker."""

import time
from contextlib import closing
from pathlib import Path

import kafka
import msgspec
import pytest

from afterclick.serving.cli import main
from afterclick.serving.keys import partition_of
from afterclick.streams.admin import client_config
from afterclick.streams.events import Item, decode_click, decode_item
from afterclick.streams.settings import StreamsSettings

pytestmark = pytest.mark.service


@pytest.fixture
def streams(topics: StreamsSettings, monkeypatch: pytest.MonkeyPatch) -> StreamsSettings:
    monkeypatch.setenv("AFTERCLICK_STREAMS__BROKER", topics.broker)
    monkeypatch.setenv("AFTERCLICK_STREAMS__CLICKS_TOPIC", topics.clicks_topic)
    monkeypatch.setenv("AFTERCLICK_STREAMS__ITEMS_TOPIC", topics.items_topic)
    monkeypatch.setenv("AFTERCLICK_STREAMS__SIGNALS_TOPIC", topics.signals_topic)
    return topics


def read(streams: StreamsSettings, topic: str, num_records: int) -> list:
    consumer = kafka.KafkaConsumer(
        topic,
        **client_config(streams),
        auto_offset_reset="earliest",
        group_id=None,
        consumer_timeout_ms=10_000,
    )
    with closing(consumer):
        return [next(consumer) for _ in range(num_records)]


def test_a_file_arrives_in_time_order_under_the_right_keys(
    streams: StreamsSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every click in its user's partition, in event order, with its own old time in the value."""
    rows = [f"u{n % 17},i{n % 5},{1_400_000_000 + (n * 7919) % 1000}" for n in range(300)]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\ni0,新闻\ni1,News\n")
    before_ms = time.time_ns() // 1_000_000

    assert main(["replay", str(log), "--items", str(items), "--json"]) == 0

    summary = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1])
    assert (summary["delivered"], summary["failed"], summary["items_delivered"]) == (300, 0, 2)
    records = read(streams, streams.clicks_topic, 300)
    num_partitions = len({record.partition for record in records})
    last_ms: dict[int, int] = {}
    for record in sorted(records, key=lambda r: (r.partition, r.offset)):
        event = decode_click(
            record.key, record.value, offset=record.offset, record_ms=record.timestamp
        )
        assert partition_of(event.user_id, num_partitions) == record.partition
        assert last_ms.get(record.partition, 0) <= event.event_ms < 1_400_001_000_000
        assert record.timestamp >= before_ms
        last_ms[record.partition] = event.event_ms
    sent = [decode_item(r.key, r.value) for r in read(streams, streams.items_topic, 2)]
    assert sent == [Item(item_id="i0", title="新闻"), Item(item_id="i1", title="News")]


def test_a_part_of_the_file_at_a_rate(
    streams: StreamsSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--from and --to choose by event time; 40 clicks at 100 a second take no less than 0.39 s."""
    log = tmp_path / "log.csv"
    rows = [f"u,i{n},{1000 + n}" for n in range(100)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    part = ["--from", "1010", "--to", "1050", "--rate", "100"]

    assert main(["replay", str(log), *part, "--json"]) == 0

    summary = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1])
    assert summary["delivered"] == 40
    assert summary["seconds"] >= 0.39
    records = read(streams, streams.clicks_topic, 40)
    assert [msgspec.json.decode(r.value)["item_id"] for r in records] == [
        f"i{n}" for n in range(10, 50)
    ]
