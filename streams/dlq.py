"""`afterclick dlq list|replay`: what stands in a dead-letter topic, and sending it again.

A replayed letter is its record as it came: value and headers, our own `afterclick.*` headers left
out, with the record's own timestamp, so that the same click sent twice is recognised as a repeat.
At least once: acknowledged first, then the bookmark moves. A letter that fails again becomes a new
one behind the end of this run and carries how often it was replayed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from afterclick.serving.errors import BAD_JSON, ConfigError, UnavailableError
from afterclick.streams.admin import client_config, dead_letters_topic
from afterclick.streams.bookmark import Bookmark
from afterclick.streams.deadletters import ACK_TIMEOUT_S, OURS, REPLAYS
from afterclick.streams.log import LogReader
from afterclick.streams.record import Record
from afterclick.streams.settings import StreamsSettings, streams_settings

REPLAYS_MAX = 3
"""A letter replayed so often is left: its bytes do not get better."""

BATCH = 500
"""Letters sent before their acknowledgements are waited for and the bookmark moves."""


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter."""

    at: str
    """Where it stands: partition and offset of the dead-letter topic."""
    reason: str
    message: str
    topic: str
    partition: int
    offset: int
    """Where its record stood."""
    replays: int
    key: str | None
    value: str
    """The first characters, for people."""
    omitted: bool = False
    """The broker would not take the record: it stands whole in the source topic only."""


class Replayed(msgspec.Struct, kw_only=True):
    """What a replay came to."""

    sent: int = 0
    left: dict[str, int] = {}
    """Why letters were not sent, and how many."""


class _IdsOnly(msgspec.Struct):
    user_id: str = ""
    item_id: str = ""


def letter_of(partition: int, record: Record) -> Letter:
    """A record of a dead-letter topic, read."""
    headers = {name: value.decode(errors="replace") for name, value in record.headers}
    value = (record.value or b"").decode(errors="replace")
    return Letter(
        at=f"{partition}/{record.offset}",
        reason=headers.get("afterclick.reason", ""),
        message=headers.get("afterclick.message", ""),
        topic=headers.get("afterclick.topic", ""),
        partition=_number(headers.get("afterclick.partition", "")),
        offset=_number(headers.get("afterclick.offset", "")),
        replays=max(0, _number(headers.get(REPLAYS, "0"))),
        key=None if record.key is None else record.key.decode(errors="replace"),
        value=value[:200],
        omitted="afterclick.omitted_sha256" in headers,
    )


def letters(
    reader: LogReader, topic: str, partition: int, begin: int, end: int
) -> Iterator[tuple[Letter, Record]]:
    """Letters of one partition of a dead-letter topic, oldest first."""
    start, stop = reader.edges(topic, partition)
    for records in reader.read(topic, partition, max(begin, start), min(end, stop)):
        for record in records:
            yield letter_of(partition, record), record


def new_key(letter: Letter, record: Record, items_topic: str) -> bytes | None:
    """The key that a record should have had; None where its value names none."""
    try:
        ids = msgspec.json.decode(record.value or b"", type=_IdsOnly)
        return (ids.item_id if letter.topic == items_topic else ids.user_id).encode() or None
    except BAD_JSON:
        return None


def replay(
    settings: StreamsSettings,
    topic: str,
    *,
    reason: str = "",
    begin: int | None = None,
    end: int | None = None,
    rekey: bool = False,
    dry_run: bool = False,
) -> Replayed:
    """Send letters to where their records stood.

    Args:
        settings: broker, topics and group.
        topic: the source topic.
        reason: only letters of this one; it has a bookmark of its own.
        begin: first offset in the dead-letter topic; None goes on where the last replay ended.
            With `begin` or `end` the bookmark is neither read nor moved.
        end: offset to stop before; None is the end as of now.
        rekey: set each key to the id that its value names.
        dry_run: send nothing, move nothing.

    Raises:
        UnavailableError: the broker does not take them; the next replay goes on from there.
    """
    done = Replayed()
    dlq = dead_letters_topic(topic)
    group = "-".join(filter(None, (settings.group, "dlq", reason)))
    with (
        closing(LogReader(settings)) as reader,
        closing(Bookmark(settings, group, dlq)) as bookmark,
        closing(KafkaProducer(**client_config(settings), acks="all")) as producer,
    ):
        for partition in range(reader.num_partitions(dlq)):
            explicit = begin is not None or end is not None
            first = (begin or 0) if explicit else bookmark.at(partition)
            stop = min(reader.edges(dlq, partition)[1], sys.maxsize if end is None else end)
            pending: list[Any] = []
            read_to = first
            for letter, record in letters(reader, dlq, partition, first, stop):
                key = new_key(letter, record, settings.items_topic) if rekey else record.key
                why = _why_not(letter, key, reason)
                if why:
                    done.left[why] = done.left.get(why, 0) + 1
                else:
                    done.sent += 1
                    if not dry_run:
                        pending.append(_send(settings, producer, letter, record, key))
                read_to = record.offset + 1
                if len(pending) >= BATCH:
                    _settle(settings, pending)
                    if not explicit:
                        bookmark.move(partition, read_to)
            _settle(settings, pending)
            if not explicit and not dry_run and read_to > first:
                bookmark.move(partition, read_to)
    return done


def _why_not(letter: Letter, key: bytes | None, reason: str) -> str:
    if reason and letter.reason != reason:
        return "of another reason"
    if letter.omitted:
        return "value omitted: too large for the broker, it stands in the source topic only"
    if letter.replays >= REPLAYS_MAX:
        return f"replayed {REPLAYS_MAX} times already"
    if not letter.topic:
        return "no afterclick.topic header: not a letter of ours"
    if key is None:
        return "no key to send it under (--rekey takes it from the value, where there is one)"
    return ""


def _send(
    settings: StreamsSettings, producer: Any, letter: Letter, record: Record, key: bytes | None
) -> Any:
    headers = [(name, value) for name, value in record.headers if not name.startswith(OURS)]
    headers.append((REPLAYS, str(letter.replays + 1).encode()))
    stamps = [value for name, value in record.headers if name == "afterclick.timestamp_ms"]
    at_ms = _number(stamps[-1].decode(errors="replace")) if stamps else record.timestamp_ms
    try:
        return producer.send(
            letter.topic,
            key=key,
            value=record.value,
            headers=headers,
            timestamp_ms=max(at_ms, 0),
        )
    except KafkaError as error:
        raise UnavailableError(f"Kafka at {settings.broker}: {letter.topic}: {error}") from error


def _settle(settings: StreamsSettings, pending: list[Any]) -> None:
    try:
        for future in pending:
            future.get(timeout=ACK_TIMEOUT_S)
    except KafkaError as error:
        raise UnavailableError(
            f"Kafka at {settings.broker}: a replayed letter was not acknowledged: {error!r}; "
            "run it again: it goes on from there"
        ) from error
    pending.clear()


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return -1


def main(argv: Sequence[str]) -> int:
    """Show dead letters, or send them again."""
    parser = argparse.ArgumentParser(prog="afterclick dlq", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shown = actions.add_parser("list", help="show letters, oldest first")
    shown.add_argument("--limit", type=int, default=50, help="letters at most (50)")
    again = actions.add_parser("replay", help="send letters to where their records stood")
    again.add_argument("--from", type=int, dest="begin", metavar="OFFSET", help="first letter")
    again.add_argument("--to", type=int, dest="end", metavar="OFFSET", help="stop before it")
    again.add_argument("--rekey", action="store_true", help="take keys from the values")
    again.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    for action in (shown, again):
        action.add_argument("--topic", choices=("clicks", "items"), default="clicks")
        action.add_argument("--reason", default="", help="only letters of this reason")
        action.add_argument("--json", action="store_true", help="JSON, one object a line")
    options = parser.parse_args(argv)
    settings = streams_settings(os.environ)
    topic = settings.clicks_topic if options.topic == "clicks" else settings.items_topic
    if options.action == "list":
        _list(settings, topic, options.reason, options.limit, as_json=options.json)
        return 0
    if min(options.begin or 0, options.end or 0) < 0:
        raise ConfigError("dlq replay: --from and --to are offsets, got a negative one")
    done = replay(
        settings,
        topic,
        reason=options.reason,
        begin=options.begin,
        end=options.end,
        rekey=options.rekey,
        dry_run=options.dry_run,
    )
    if options.json:
        sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
    else:
        verb = "would be sent" if options.dry_run else "sent"
        sys.stdout.write(f"{done.sent} letters {verb} to {topic}\n")
        for why, num in done.left.items():
            sys.stdout.write(f"{num} left: {why}\n")
    return 0


def _list(settings: StreamsSettings, topic: str, reason: str, limit: int, *, as_json: bool) -> None:
    shown = 0
    dlq = dead_letters_topic(topic)
    with closing(LogReader(settings)) as reader:
        for partition in range(reader.num_partitions(dlq)):
            for letter, _ in letters(reader, dlq, partition, 0, sys.maxsize):
                if reason and letter.reason != reason:
                    continue
                if shown >= limit:
                    return
                shown += 1
                if as_json:
                    sys.stdout.write(msgspec.json.encode(letter).decode() + "\n")
                else:
                    sys.stdout.write(
                        f"{letter.at}  {letter.reason}  {letter.topic}/{letter.partition} at "
                        f"{letter.offset}: {letter.message}\n"
                    )
