"""Reading a topic outside the consumer group: a range of one partition, its edges, or its tail.

kafka-python, by hand-assigned partitions, used from threads: the worker reads items and one record
again at
an assignment, `verify` and the trainer read clicks. Only committed records are seen.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from afterclick.serving.errors import UnavailableError
from afterclick.streams.admin import client_config
from afterclick.streams.record import Record, record_of
from afterclick.streams.settings import StreamsSettings

STALL_S = 30.0
"""A read that gets nothing for so long gives up."""

POLL_MS = 200

LOOK_S = 1.0
"""How long `waiting` looks for records before it says that there are none."""

WATERMARK_MS = 500
"""Longest wait for the high watermark; it comes at once unless the log ends in a marker."""


class LogReader:
    """One connection to the log; its calls exclude each other."""

    def __init__(self, settings: StreamsSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._opened: dict[str, Any] = {}

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            for consumer in self._opened.values():
                consumer.close()
            self._opened.clear()

    def num_partitions(self, topic: str) -> int:
        """Partitions of a topic, 0 where it does not exist."""
        with self._lock:
            return len(self._guard(lambda: self._consumer().partitions_for_topic(topic)) or ())

    def edges(self, topic: str, partition: int) -> tuple[int, int]:
        """First offset that is still there, and the offset after the last record.

        The end is the high watermark that comes with the last record: asked for the latest offset,
        tansu gives that of its last batch's first record, plus one. On Kafka an open transaction
        may lie below it.
        """
        tp = TopicPartition(topic, partition)
        with self._lock:
            consumer = self._guard(lambda: self._consumer("read_uncommitted"))
            start = self._guard(lambda: consumer.beginning_offsets([tp]))[tp]
            end = self._guard(lambda: consumer.end_offsets([tp]))[tp]
            if end > start:
                self._guard(lambda: consumer.assign([tp]))
                self._guard(lambda: consumer.seek(tp, end - 1))
                self._guard(lambda: consumer.poll(WATERMARK_MS, max_records=1))
                end = max(end, consumer.highwater(tp) or 0)
        return int(start), int(end)

    def start(self, topic: str, partition: int) -> int:
        """First offset that is still there; one request."""
        tp = TopicPartition(topic, partition)
        with self._lock:
            consumer = self._guard(lambda: self._consumer("read_uncommitted"))
            return int(self._guard(lambda: consumer.beginning_offsets([tp]))[tp])

    def waiting(self, topic: str, positions: Mapping[int, int]) -> set[int]:
        """Partitions with a committed record at or past these offsets.

        Neither the log's end nor a high watermark tells: markers and aborted records may lie below
        it for ever. Cost: one fetch, which an idle log answers after `LOOK_S`.
        """
        tps = {TopicPartition(topic, partition): at for partition, at in positions.items()}
        found: set[int] = set()
        if not tps:
            return found
        with self._lock:
            consumer = self._guard(self._consumer)
            self._guard(lambda: consumer.assign(list(tps)))
            for tp, at in tps.items():
                self._guard(lambda tp=tp, at=at: consumer.seek(tp, at))
            until_s = time.monotonic() + LOOK_S
            while len(found) < len(tps) and time.monotonic() < until_s:
                for tp, records in self._guard(lambda: consumer.poll(POLL_MS)).items():
                    # A log shorter than the position is read from its start: that does not count.
                    if records[-1].offset >= tps[tp]:
                        found.add(tp.partition)
                        consumer.pause(tp)
            consumer.resume(*tps)
        return found

    def ends(self, topic: str, partitions: Iterable[int]) -> dict[int, int]:
        """Offsets after the last record, at least, in one request; see `edges`."""
        tps = [TopicPartition(topic, partition) for partition in partitions]
        with self._lock:
            consumer = self._guard(lambda: self._consumer("read_uncommitted"))
            found = self._guard(lambda: consumer.end_offsets(tps)) if tps else {}
        return {tp.partition: int(end) for tp, end in found.items()}

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[list[Record]]:
        """Records with start ≤ offset < stop, in batches as they come; gaps are passed over.

        Raises:
            UnavailableError: nothing came for `STALL_S`.
        """
        if start >= stop:
            return
        tp = TopicPartition(topic, partition)
        with self._lock:
            consumer = self._guard(self._consumer)
            self._guard(lambda: consumer.assign([tp]))
            self._guard(lambda: consumer.seek(tp, start))
            until_s = time.monotonic() + STALL_S
            while self._guard(lambda: consumer.position(tp)) < stop:
                found = self._guard(lambda: consumer.poll(POLL_MS, max_records=5000)).get(tp, [])
                records = [record_of(record) for record in found if record.offset < stop]
                if records:
                    until_s = time.monotonic() + STALL_S
                    yield records
                elif time.monotonic() > until_s:
                    raise UnavailableError(
                        f"Kafka at {self._settings.broker}: {topic}/{partition}: no record below "
                        f"{stop} came for {STALL_S:.0f} s, read up to {consumer.position(tp)}"
                    )
                if found and found[-1].offset >= stop:
                    return

    def at(self, topic: str, partition: int, offset: int) -> Record | None:
        """One record, None where it is gone."""
        for records in self.read(topic, partition, offset, offset + 1):
            return records[0] if records[0].offset == offset else None
        return None

    def _consumer(self, isolation: str = "read_committed") -> Any:
        if isolation not in self._opened:
            self._opened[isolation] = new_consumer(self._settings, isolation)
        return self._opened[isolation]

    def _guard(self, action: Any) -> Any:
        return guarded(self._settings, action)


class Tail:
    """Everything of one topic, from given offsets on, as it comes."""

    def __init__(
        self,
        settings: StreamsSettings,
        topic: str,
        positions: list[int],
        *,
        check_crcs: bool = True,
    ) -> None:
        self._settings = settings
        self._consumer = guarded(settings, lambda: new_consumer(settings, check_crcs=check_crcs))
        tps = [TopicPartition(topic, partition) for partition in range(len(positions))]
        self._consumer.assign(tps)
        for tp, offset in zip(tps, positions, strict=True):
            self._consumer.seek(tp, offset)

    def poll(self) -> list[tuple[int, Record]]:
        """Partition and record of what came within `POLL_MS`."""
        found = guarded(self._settings, lambda: self._consumer.poll(POLL_MS))
        return [(tp.partition, record_of(r)) for tp, records in found.items() for r in records]

    def behind(self) -> int:
        """Offsets that the broker had, when it last answered, beyond what was polled."""
        consumer = self._consumer
        return sum(
            max(
                0,
                (consumer.highwater(tp) or 0)
                - guarded(self._settings, lambda tp=tp: consumer.position(tp)),
            )
            for tp in consumer.assignment()
        )

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


def new_consumer(
    settings: StreamsSettings,
    isolation: str = "read_committed",
    group: str | None = None,
    *,
    check_crcs: bool = True,
) -> Any:
    """A kafka-python consumer that joins no group and commits nothing by itself."""
    return KafkaConsumer(
        **client_config(settings),
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level=isolation,
        check_crcs=check_crcs,
        max_partition_fetch_bytes=8 << 20,
    )


def guarded(settings: StreamsSettings, action: Any) -> Any:
    """What `action` returns; a broker that fails is an UnavailableError."""
    try:
        return action()
    except KafkaError as error:
        raise UnavailableError(f"Kafka at {settings.broker}: {error}") from error
