"""One log record, a chunk of them, and what is said about a log; plain values.

Knows no client: `record_of` takes what either Kafka client gives.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec


class Record(msgspec.Struct, frozen=True, gc=False):
    """One log record as Kafka gave it."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


def record_of(raw: Any) -> Record:
    """A record of aiokafka or kafka-python, which name its parts alike."""
    return Record(raw.offset, raw.timestamp, raw.key, raw.value, tuple(raw.headers or ()))


class Chunk(NamedTuple):
    """Records of one partition, in order; transaction markers and compaction leave gaps between
    them.
    """

    begin: int
    """Where the fetch was asked, or the previous chunk's end."""
    end: int
    """Offset after the last record."""
    records: Sequence[Record]
    rewound: bool = False
    """The broker sent the consumer back before `begin`, unasked: this may be another log now."""


class DeadLetter(NamedTuple):
    """A record that broke the contract, and why."""

    record: Record
    reason: str
    message: str


class LogEdges(NamedTuple):
    """What the broker says of a partition."""

    topic_id: str
    """Empty where the broker has none."""
    start: int
    end: int


def record_crc(key: bytes | None, value: bytes | None) -> int:
    """What the head keeps of the last record folded, to recognise the log."""
    return zlib.crc32(value or b"", zlib.crc32(key or b""))
