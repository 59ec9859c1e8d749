"""`afterclick rekey SOURCE`: a bridge for producers that cannot set keys.

Reads a topic, sets each key to the `user_id` of its value and sends it to the clicks topic. An
event without an id gets one from its place, `SOURCE/partition/offset`, so that a click sent twice,
because the bridge died between an acknowledgement and its bookmark, is recognised as a repeat.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from afterclick.serving.errors import BAD_JSON, ConfigError, ContractError, UnavailableError
from afterclick.streams.admin import client_config
from afterclick.streams.bookmark import Bookmark
from afterclick.streams.deadletters import ACK_TIMEOUT_S, DeadLetters
from afterclick.streams.events import decode_click
from afterclick.streams.log import LogReader
from afterclick.streams.record import DeadLetter, Record
from afterclick.streams.settings import StreamsSettings, streams_settings

FOLLOW_EVERY_S = 0.2
"""Pause between two looks at a source that had nothing new."""


class Rekeyed(msgspec.Struct, kw_only=True):
    """What the bridge carried."""

    sent: int = 0
    dead_letters: int = 0


class _IdOnly(msgspec.Struct):
    user_id: str = ""


def rekeyed(source: str, partition: int, record: Record) -> tuple[bytes, bytes]:
    """Key and value to send for a record of the source.

    Raises:
        ContractError: the value is not a click; as `decode_click`, never because of the key.
    """
    try:
        key = msgspec.json.decode(record.value or b"", type=_IdOnly).user_id.encode()
    except BAD_JSON:
        key = b""
    event = decode_click(key, record.value, offset=record.offset, record_ms=record.timestamp_ms)
    value = record.value or b""
    if event.event_id is None:
        # Field by field, so that what this version does not know goes on as it came.
        fields = msgspec.json.decode(value, type=dict[str, msgspec.Raw])
        fields["event_id"] = msgspec.Raw(
            msgspec.json.encode(f"{source}/{partition}/{record.offset}")
        )
        value = msgspec.json.encode(fields)
    return key, value


class Bridge:
    """Carries one source topic to the clicks topic; close it."""

    def __init__(self, settings: StreamsSettings, source: str) -> None:
        self.carried = Rekeyed()
        self._settings = settings
        self._source = source
        self._reader = LogReader(settings)
        self._bookmark = Bookmark(settings, f"{settings.group}-rekey", source)
        self._producer: Any = KafkaProducer(**client_config(settings), acks="all")
        self._dead_letters = DeadLetters(settings)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()
        self._bookmark.close()
        self._producer.close()
        self._dead_letters.close()

    def carry(self) -> int:
        """Send what is new since the bookmark; the number of records read.

        Raises:
            ConfigError: there is no such topic.
            UnavailableError: the broker does not answer; calling again goes on.
        """
        read = 0
        num = self._reader.num_partitions(self._source)
        if not num:
            raise ConfigError(f"Kafka at {self._settings.broker}: no topic {self._source!r}")
        for partition in range(num):
            start, end = self._reader.edges(self._source, partition)
            begin = max(start, self._bookmark.at(partition))
            for records in self._reader.read(self._source, partition, begin, end):
                self._send(partition, records)
                self._bookmark.move(partition, records[-1].offset + 1)
                read += len(records)
        return read

    def _send(self, partition: int, records: list[Record]) -> None:
        pending, letters = [], []
        try:
            for record in records:
                try:
                    key, value = rekeyed(self._source, partition, record)
                except ContractError as error:
                    letters.append(DeadLetter(record, error.reason, str(error)))
                    continue
                sent = self._producer.send(
                    self._settings.clicks_topic,
                    key=key,
                    value=value,
                    headers=list(record.headers),
                    timestamp_ms=max(record.timestamp_ms, 0),
                )
                pending.append(sent)
            for future in pending:
                future.get(timeout=ACK_TIMEOUT_S)
        except KafkaError as error:
            raise UnavailableError(
                f"Kafka at {self._settings.broker}: {self._settings.clicks_topic}: {error!r}"
            ) from error
        if letters:
            self._dead_letters.send(
                self._source, partition, letters, beside=self._settings.clicks_topic
            )
        self.carried.sent += len(pending)
        self.carried.dead_letters += len(letters)


def main(argv: Sequence[str]) -> int:
    """Give the events of a topic without keys their user's key, and send them to the clicks."""
    parser = argparse.ArgumentParser(prog="afterclick rekey", description=main.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="topic whose keys are not user ids")
    parser.add_argument("--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args(argv)
    settings = streams_settings(os.environ)
    if options.source == settings.clicks_topic:
        raise ConfigError(f"rekey: {options.source!r} is the clicks topic itself: it never ends")
    with closing(Bridge(settings, options.source)) as bridge:
        while True:
            try:
                read = bridge.carry()
            except UnavailableError as error:
                if not options.follow:
                    raise
                sys.stderr.write(f"{error}; trying again\n")
                read = 0
            if not options.follow:
                break
            if not read:
                time.sleep(FOLLOW_EVERY_S)
        carried = bridge.carried
    if options.json:
        sys.stdout.write(msgspec.json.encode(carried).decode() + "\n")
    else:
        sys.stdout.write(f"{carried.sent} sent, {carried.dead_letters} dead letters\n")
    return 0
