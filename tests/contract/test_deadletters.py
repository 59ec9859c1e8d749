"""Dead letters on a real broker, above all those that it will not take as they are."""

import hashlib

import pytest

from afterclick.streams.admin import dead_letters_topic
from afterclick.streams.deadletters import KEY_BYTES_MAX, DeadLetters
from afterclick.streams.log import LogReader
from afterclick.streams.record import DeadLetter, Record
from afterclick.streams.settings import StreamsSettings

pytestmark = pytest.mark.service

BROKER_BYTES = 1_048_588
"""Kafka's default `message.max.bytes`: a record of just this size could stand in clicks."""


def written(settings: StreamsSettings, record: Record) -> Record:
    """The letter that a bad record leads to."""
    letters, reader = DeadLetters(settings), LogReader(settings)
    letters.send(settings.clicks_topic, 1, [DeadLetter(record, "json", "not JSON")])
    letters.close()
    topic = dead_letters_topic(settings.clicks_topic)
    (found,) = [one for batch in reader.read(topic, 0, 0, 1) for one in batch]
    reader.close()
    return found


def test_a_letter_carries_the_record_unchanged(topics: StreamsSettings) -> None:
    """Whoever mends a producer looks at what it sent."""
    letter = written(topics, Record(7, 0, b"k", b"{", (("trace", b"\0\xff"), ("trace", b""))))

    assert (letter.key, letter.value) == (b"k", b"{")
    assert letter.headers[:2] == (("trace", b"\0\xff"), ("trace", b""))
    assert dict(letter.headers[2:]) == {
        "afterclick.reason": b"json",
        "afterclick.message": b"not JSON",
        "afterclick.topic": topics.clicks_topic.encode(),
        "afterclick.partition": b"1",
        "afterclick.offset": b"7",
        "afterclick.timestamp_ms": b"0",
        "afterclick.stage": b"decode",
    }


def test_a_record_of_nothing_leads_to_a_letter_too(topics: StreamsSettings) -> None:
    """kafka-python sends no record without key and value, and that error ended the worker."""
    letter = written(topics, Record(0, 0, None, None))

    assert (letter.key, letter.value) == (None, b"")


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(Record(0, 0, b"k", b"x" * (65 << 20)), id="value"),
        pytest.param(Record(0, 0, b"k", b"{", (("h", bytes(BROKER_BYTES - 100)),)), id="header"),
        pytest.param(
            Record(0, 0, b"k", b"{", tuple((f"h{n}", bytes(100)) for n in range(9_700))),
            id="headers",
        ),
        pytest.param(Record(0, 0, bytes(BROKER_BYTES - 100), b"{"), id="key"),
        pytest.param(Record(0, 0, None, None, (("h", bytes(BROKER_BYTES - 100)),)), id="nothing"),
    ],
)
def test_a_record_of_any_size_leads_to_a_letter(topics: StreamsSettings, record: Record) -> None:
    """A letter is larger than its record: one that stood in clicks would stop its partition for
    ever.
    """
    letter = written(topics, record)

    told = dict(letter.headers)
    assert told["afterclick.reason"] == b"json"
    if "afterclick.omitted_bytes" not in told:  # a broker that takes more than Kafka by default
        assert (letter.key, letter.value or None) == (record.key, record.value)
        assert letter.headers[: len(record.headers)] == record.headers
        return
    value = record.value or b""
    assert told["afterclick.omitted_bytes"] == str(len(value)).encode()
    assert told["afterclick.omitted_sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert not letter.value
    assert not any(name in ("h", "h0") for name in told)
    assert letter.key == (None if len(record.key or b"") > KEY_BYTES_MAX else record.key)
