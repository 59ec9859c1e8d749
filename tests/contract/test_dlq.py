"""`afterclick dlq` and `afterclick rekey` on a real broker."""

from contextlib import closing
from typing import Any

import kafka
import msgspec
import pytest

from afterclick.serving.cli import main
from afterclick.serving.errors import UnavailableError
from afterclick.serving.keys import partition_of
from afterclick.streams import dlq, rekey
from afterclick.streams.admin import client_config
from afterclick.streams.deadletters import DeadLetters
from afterclick.streams.events import decode_click
from afterclick.streams.log import LogReader
from afterclick.streams.record import DeadLetter, Record
from afterclick.streams.settings import StreamsSettings

pytestmark = pytest.mark.service

CLICK = b'{"user_id": "u1", "item_id": "i1", "extra": [1]}'


@pytest.fixture
def streams(topics: StreamsSettings, monkeypatch: pytest.MonkeyPatch) -> StreamsSettings:
    for name in ("broker", "clicks_topic", "items_topic", "group"):
        monkeypatch.setenv(f"AFTERCLICK_STREAMS__{name.upper()}", getattr(topics, name))
    return topics


def write_letters(settings: StreamsSettings, *letters: tuple[Record, str]) -> None:
    dead = DeadLetters(settings)
    found = [DeadLetter(record, reason, f"it was {reason}") for record, reason in letters]
    dead.send(settings.clicks_topic, 0, found)
    dead.close()


def everything(settings: StreamsSettings, topic: str) -> list[tuple[int, Record]]:
    """Partition and record of all of a topic."""
    with closing(LogReader(settings)) as reader:
        return [
            (partition, record)
            for partition in range(reader.num_partitions(topic))
            for records in reader.read(topic, partition, 0, reader.edges(topic, partition)[1])
            for record in records
        ]


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[Any]:
    assert main([*argv, "--json"]) == 0
    return [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]


def test_letters_are_shown_with_where_and_why(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record itself is in the source topic: its place must be exact."""
    write_letters(
        streams,
        (Record(7, 1000, b"\xff", b"{"), "json"),
        (Record(9, 1000, None, CLICK), "null-key"),
    )

    both = as_json(capsys, "dlq", "list")
    (one,) = as_json(capsys, "dlq", "list", "--reason", "null-key")
    assert len(as_json(capsys, "dlq", "list", "--limit", "1")) == 1
    assert main(["dlq", "list"]) == 0

    assert [(letter["reason"], letter["offset"]) for letter in both] == [
        ("json", 7),
        ("null-key", 9),
    ]
    assert (one["topic"], one["key"], one["value"]) == (streams.clicks_topic, None, CLICK.decode())
    assert "json  " in capsys.readouterr().out


def test_a_replayed_letter_is_its_record_and_goes_once(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our headers would mislead whoever reads the record next; its own timestamp makes a second
    replay a repeat. What was replayed is not replayed again by the next run.
    """
    record = Record(7, 1_700_000_000_123, b"u1", CLICK, (("trace", b"\x00t"),))
    write_letters(streams, (record, "schema"))

    would = as_json(capsys, "dlq", "replay", "--dry-run")
    first = as_json(capsys, "dlq", "replay")
    second = as_json(capsys, "dlq", "replay")

    assert [found[0]["sent"] for found in (would, first, second)] == [1, 1, 0]
    ((partition, sent),) = everything(streams, streams.clicks_topic)
    assert partition == partition_of("u1", 2)
    assert (sent.key, sent.value, sent.timestamp_ms) == (b"u1", CLICK, record.timestamp_ms)
    assert sent.headers == (("trace", b"\x00t"), ("afterclick.replays", b"1"))


def test_a_letter_that_fails_again_and_again_is_left(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes do not get better; without a count, a timer that replays would go round for ever."""
    headers = (("afterclick.replays", b"3"),)
    write_letters(
        streams, (Record(1, 0, b"u1", b"{", headers), "json"), (Record(2, 0, b"u1", b"{"), "json")
    )

    (found,) = as_json(capsys, "dlq", "replay")

    assert (found["sent"], found["left"]) == (1, {"replayed 3 times already": 1})


def test_keys_are_mended_where_the_value_names_the_user(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A producer that forgot its keys: its clicks are good otherwise."""
    write_letters(
        streams,
        (Record(1, 5, None, CLICK), "null-key"),
        (Record(2, 5, b"session-9", CLICK), "wrong-key"),
        (Record(3, 5, None, b"{"), "null-key"),
    )

    (plain,) = as_json(capsys, "dlq", "replay", "--reason", "null-key", "--dry-run")
    (mended,) = as_json(capsys, "dlq", "replay", "--rekey")

    assert (plain["sent"], mended["sent"]) == (0, 2)
    assert "--rekey" in next(iter(plain["left"]))
    for _, record in everything(streams, streams.clicks_topic):
        decode_click(record.key, record.value, offset=0, record_ms=record.timestamp_ms)


def test_a_value_that_was_left_out_is_not_replayed_as_none(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The letter holds its size and digest; a null value would be a record that never was."""
    headers = (("afterclick.omitted_sha256", b"99"),)
    write_letters(streams, (Record(1, 0, b"u1", None, headers), "too-large"))

    (found,) = as_json(capsys, "dlq", "replay")

    assert found["sent"] == 0
    assert "omitted" in next(iter(found["left"]))
    assert everything(streams, streams.clicks_topic) == []


def test_an_interrupted_replay_goes_on_and_a_part_leaves_the_bookmark(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: acknowledged first, then the bookmark moves; offsets given by hand are an
    operator's own affair.
    """
    write_letters(streams, *[(Record(n, n, b"u1", CLICK), "schema") for n in range(6)])
    as_json(capsys, "dlq", "replay", "--from", "4", "--to", "5")
    assert len(everything(streams, streams.clicks_topic)) == 1
    monkeypatch.setattr(dlq, "BATCH", 2)
    settle, turns = dlq._settle, []

    def cut_off(settings: StreamsSettings, pending: list[Any]) -> None:
        turns.append(len(pending))
        settle(settings, pending)
        if len(turns) == 2:
            raise UnavailableError("the broker went away")

    monkeypatch.setattr(dlq, "_settle", cut_off)
    assert main(["dlq", "replay"]) == 3
    monkeypatch.undo()
    for name in ("broker", "clicks_topic", "items_topic", "group"):
        monkeypatch.setenv(f"AFTERCLICK_STREAMS__{name.upper()}", getattr(streams, name))

    (rest,) = as_json(capsys, "dlq", "replay")

    assert rest["sent"] == 4, "the first two were settled and marked; the cut-off two come again"


def produce(settings: StreamsSettings, topic: str, *values: bytes) -> None:
    with closing(kafka.KafkaProducer(**client_config(settings), acks="all")) as producer:
        for value in values:
            producer.send(topic, value=value, partition=0, timestamp_ms=1_700_000_000_000)
        producer.flush(timeout=20)


def test_the_bridge_sets_keys_and_ids_and_carries_each_event_once(
    streams: StreamsSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source's place names an event for ever, so one carried twice is a repeat."""
    source = streams.items_topic  # any topic will do
    own = b'{"user_id": "u2", "item_id": "i2", "event_id": "mine"}'
    produce(streams, source, CLICK, b"not JSON", own)

    (first,) = as_json(capsys, "rekey", source)
    (second,) = as_json(capsys, "rekey", source)

    assert (first, second) == (
        {"sent": 2, "dead_letters": 1},
        {"sent": 0, "dead_letters": 0},
    )
    found = {record.key: record for _, record in everything(streams, streams.clicks_topic)}
    assert msgspec.json.decode(found[b"u1"].value or b"") == {
        **msgspec.json.decode(CLICK),
        "event_id": f"{source}/0/0",
    }
    assert found[b"u2"].value == own
    for partition, record in everything(streams, streams.clicks_topic):
        assert partition == partition_of((record.key or b"").decode(), 2)
        decode_click(record.key, record.value, offset=0, record_ms=record.timestamp_ms)
    (letter,) = as_json(capsys, "dlq", "list")
    assert (letter["topic"], letter["offset"], letter["reason"]) == (source, 1, "json")


def test_a_bridge_that_died_before_its_bookmark_carries_the_same_events(
    streams: StreamsSettings,
) -> None:
    """Twice in the log, once in the state: their ids are equal."""
    produce(streams, streams.items_topic, CLICK)
    bridge = rekey.Bridge(streams, streams.items_topic)
    bridge._bookmark.move = lambda *_: None  # type: ignore[method-assign]
    bridge.carry()
    bridge.close()
    with closing(rekey.Bridge(streams, streams.items_topic)) as again:
        assert again.carry() == 1

    one, two = (record for _, record in everything(streams, streams.clicks_topic))
    assert one.value == two.value


def test_the_clicks_topic_itself_is_refused_as_a_source(streams: StreamsSettings) -> None:
    """What the bridge sends would be what it reads."""
    assert main(["rekey", streams.clicks_topic]) == 2
    assert main(["rekey", "no-such-topic"]) == 2
