"""`afterclick train --topic`: what stands in Kafka, up to its present end, becomes a release."""

import json
from pathlib import Path

import kafka
import pytest

from afterclick.serving.manifest import MANIFEST_NAME
from afterclick.streams.admin import client_config
from afterclick.streams.events import Click, Item, encode
from afterclick.streams.settings import StreamsSettings
from afterclick.training.cli import train
from afterclick.training.sources import read_topic
from tests.unit.training.worlds import ring

pytestmark = pytest.mark.service


def fill(topics: StreamsSettings) -> int:
    """Clicks of a ring, a repeat, a forgotten user, two bad records, two items; clicks sent."""
    producer = kafka.KafkaProducer(**client_config(topics), acks="all")
    world = ring(num_users=30)
    assert world.time_ms is not None
    clicks = [
        Click(user_id=user, item_id=item, timestamp_ms=time_ms)
        for user, item, time_ms in zip(world.user, world.item, world.time_ms.tolist(), strict=True)
    ]
    gone = [Click(user_id="gone", item_id="i001"), Click(user_id="gone", event="forget")]
    for click in (*clicks, clicks[-1], *gone):
        key, value = encode(click)
        producer.send(topics.clicks_topic, key=key, value=value)
    producer.send(topics.clicks_topic, key=b"u1", value=b"no JSON")
    producer.send(topics.items_topic, key=b"x", value=b"{}")
    producer.send(topics.signals_topic, key=b"0", value=b"what was told before the training")
    for item in (Item(item_id="i001", title="一"), Item(item_id="new", title="新")):
        key, value = encode(item)
        producer.send(topics.items_topic, key=key, value=value)
    producer.flush()
    producer.close()
    return len(clicks)


def test_a_topic_becomes_a_release_that_names_its_offsets(
    topics: StreamsSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad records are counted, repeats dropped, a forgotten past is not learnt."""
    sent = fill(topics)
    monkeypatch.setenv("AFTERCLICK_STREAMS__BROKER", topics.broker)
    monkeypatch.setenv("AFTERCLICK_STREAMS__CLICKS_TOPIC", topics.clicks_topic)
    monkeypatch.setenv("AFTERCLICK_STREAMS__ITEMS_TOPIC", topics.items_topic)
    monkeypatch.setenv("AFTERCLICK_STREAMS__SIGNALS_TOPIC", topics.signals_topic)
    monkeypatch.setenv("AFTERCLICK_SERVING__RELEASES", str(tmp_path))

    code = train(
        [
            *("--topic", "--json", "--progress", "none", "--epochs", "1", "--units", "16"),
            *("--dim", "16", "--threads", "1", "--device", "cpu"),
        ]
    )

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = json.loads((tmp_path / result["release"] / MANIFEST_NAME).read_text())
    assert code == 0
    assert (result["num_events"], result["num_duplicates"], result["num_bad"]) == (sent, 1, 2)
    assert manifest["snapshot"]["source"] == f"kafka:{topics.clicks_topic}"
    assert sum(manifest["snapshot"]["offsets"].values()) == sent + 4
    assert (manifest["items_offset"], manifest["signals_offset"]) == ([3], 1)
    rows = json.loads((tmp_path / result["release"] / "items.json").read_text())["items"]
    titles = {row["item_id"]: row.get("title", "") for row in rows}
    assert (titles["i001"], titles["new"]) == ("一", "新")


def test_records_keep_their_order_within_a_user(topics: StreamsSettings) -> None:
    """The log's order is the order."""
    fill(topics)

    columns = read_topic(topics).columns

    assert columns.time_ms is not None
    own = columns.time_ms[columns.user == "u7"]
    assert len(own) >= 12
    assert (own[1:] >= own[:-1]).all()
