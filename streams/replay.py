"""Files to topics: send a log in time order, as fast as it goes or at the pace of its own times.

A click keeps its own time (`timestamp_ms`); its record in Kafka is stamped with the moment of
sending, so that the topic's retention does not delete a log from years ago at once.
Knows no lists; `verify.py` is the way from the log to records.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from kafka import KafkaProducer
from kafka.errors import KafkaError

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.streams.admin import check_topics, client_config
from afterclick.streams.columns import (
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.streams.events import Click, Item, encode
from afterclick.streams.files import read_clicks, read_items
from afterclick.streams.settings import StreamsSettings, streams_settings

SEND_TIMEOUT_S = 10.0
"""Longest wait for the broker to name a topic's partitions."""

FLUSH_TIMEOUT_S = 60.0
"""Longest wait for what is on its way when everything was handed over."""

IN_FLIGHT_MAX = 20_000
"""Records on their way at most: some 5 MB, and the most that a dead broker can fail."""

BULK_LINGER_MS = 5
"""Waiting so long for company makes batches; a lone click must not wait."""

BATCH_BYTES = 64 << 10

ROWS_AT_ONCE = 4096

OnAck = Callable[[int, int], None]
"""Called with partition and offset, in the producer's own thread."""


class Sender:
    """A producer that counts: every event becomes `delivered` or `failed`, each once.

    Keys are user and item ids; kafka-python hashes them with murmur2, as Java's clients do. With
    idempotence (its default) retries keep a user's clicks in order.

    Args:
        settings: broker and topics.
        bulk: batches for throughput; otherwise every event leaves at once.
    """

    def __init__(self, settings: StreamsSettings, *, bulk: bool = True) -> None:
        self._settings = settings
        self._room = threading.Semaphore(IN_FLIGHT_MAX)
        self.delivered = 0
        self.failed = 0
        self.last_error = ""
        try:
            self._producer: Any = KafkaProducer(
                **client_config(settings),
                acks="all",
                linger_ms=BULK_LINGER_MS if bulk else 0,
                batch_size=BATCH_BYTES,
                max_block_ms=int(SEND_TIMEOUT_S * 1000),
                delivery_timeout_ms=int(FLUSH_TIMEOUT_S * 1000),
                request_timeout_ms=int(FLUSH_TIMEOUT_S * 500),
            )
        except KafkaError as error:
            raise _unavailable(settings, error) from error

    def send(self, event: Click | Item, on_ack: OnAck | None = None) -> None:
        """Hand over one event; returns before it is acknowledged.

        Raises:
            UnavailableError: the broker does not answer and nothing more fits.
        """
        topic = self._settings.clicks_topic
        if isinstance(event, Item):
            topic = self._settings.items_topic
        key, value = encode(event)
        if not self._room.acquire(timeout=FLUSH_TIMEOUT_S):
            raise UnavailableError(
                f"Kafka at {self._settings.broker}: {IN_FLIGHT_MAX} events wait and none was "
                f"acknowledged for {FLUSH_TIMEOUT_S:.0f} s"
            )
        try:
            future = self._producer.send(topic, key=key, value=value)
        except KafkaError as error:
            self._fail(error)
            raise _unavailable(self._settings, error) from error
        future.add_callback(self._deliver, on_ack)
        future.add_errback(self._fail)

    def flush(self) -> None:
        """Return once every event handed over was delivered or failed.

        Raises:
            UnavailableError: some are still on their way after `FLUSH_TIMEOUT_S`.
        """
        try:
            self._producer.flush(timeout=FLUSH_TIMEOUT_S)
        except KafkaError as error:
            raise _unavailable(self._settings, error) from error

    def close(self) -> None:
        """Wait for what is on its way, then close the connections."""
        self._producer.close(timeout=SEND_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Both run in the producer's one thread, but for a send that fails in the caller's.
    def _deliver(self, on_ack: OnAck | None, placed: Any) -> None:
        self.delivered += 1
        self._room.release()
        if on_ack is not None:
            on_ack(placed.partition, placed.offset)

    def _fail(self, error: Any) -> None:
        self.failed += 1
        self.last_error = str(error)
        self._room.release()


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """When the events of a log are due; with neither given, at once."""

    speed: float | None = None
    """Multiples of event time: 60 sends an hour's clicks in a minute."""
    rate: float | None = None
    """Events per second, evenly."""

    def due_s(self, row: int, time_ms: int | None, first_ms: int | None) -> float:
        """Seconds after the start when this row is due; a row without a time is due at once."""
        if self.rate is not None:
            return row / self.rate
        if self.speed is None or time_ms is None or first_ms is None:
            return 0.0
        return (time_ms - first_ms) / 1000.0 / self.speed


def clicks_of(clicks: pa.Table) -> Iterator[Click]:
    """Events of a table as `files.read_clicks` makes it, in its order."""
    for batch in clicks.to_batches(max_chunksize=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield Click(**row)


def between(clicks: pa.Table, from_s: float | None, to_s: float | None) -> pa.Table:
    """The part of a log with from ≤ event time < to, unix seconds; None leaves a side open.

    Raises:
        ConfigError: a limit is given and rows have no time.
    """
    if from_s is None and to_s is None:
        return clicks
    time_N = clicks.column("timestamp_ms")
    _need_times(clicks, "--from and --to")
    if from_s is not None:
        clicks = clicks.filter(pc.greater_equal(time_N, round(from_s * 1000)))
        time_N = clicks.column("timestamp_ms")
    if to_s is not None:
        clicks = clicks.filter(pc.less(time_N, round(to_s * 1000)))
    return clicks


def paced(
    clicks: Iterable[Click],
    pace: Pace,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Click]:
    """The same clicks, each given out when it is due; a late one at once, none is left out."""
    began_s = monotonic()
    first_ms: int | None = None
    for row, click in enumerate(clicks):
        if first_ms is None:
            first_ms = click.timestamp_ms
        wait_s = began_s + pace.due_s(row, click.timestamp_ms, first_ms) - monotonic()
        if wait_s > 0:
            sleep(wait_s)
        yield click


def send_log(
    clicks: pa.Table,
    sender: Sender,
    pace: Pace | None = None,
    on_sent: Callable[[], object] = lambda: None,
) -> None:
    """Send a log in its order, at its pace, and wait until the broker has answered for all of it.

    Args:
        clicks: as `files.read_clicks` makes it.
        sender: counts what was delivered and what failed.
        pace: at once unless given.
        on_sent: called for every click handed over.

    Raises:
        ConfigError: `pace.speed` is given and rows have no time.
        UnavailableError: the broker does not answer.
    """
    pace = pace or Pace()
    if pace.speed is not None:
        _need_times(clicks, "--speed")
    for click in paced(clicks_of(clicks), pace):
        sender.send(click)
        on_sent()
    sender.flush()


def main(argv: Sequence[str]) -> int:
    """Send a CSV, Parquet or JSON-lines log to Kafka in time order."""
    options = _parser().parse_args(argv)
    settings = streams_settings(os.environ)
    clicks = between(
        read_clicks(options.file, click_columns(options)), options.from_s, options.to_s
    )
    items = read_items(options.items, item_columns(options)) if options.items else []
    pace = Pace(speed=options.speed, rate=options.rate)
    check_topics(settings)
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    bar = Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    )
    with Sender(settings, bulk=pace == Pace()) as sender, bar:
        if items:
            task = bar.add_task(f"items to {settings.items_topic}", total=len(items))
            for item in items:
                sender.send(item)
                bar.advance(task)
            sender.flush()
        items_delivered, items_failed = sender.delivered, sender.failed
        task = bar.add_task(f"clicks to {settings.clicks_topic}", total=clicks.num_rows)
        began_s = time.monotonic()
        send_log(clicks, sender, pace, lambda: bar.advance(task))
        took_s = time.monotonic() - began_s
        summary = {
            "clicks": clicks.num_rows,
            "delivered": sender.delivered - items_delivered,
            "failed": sender.failed - items_failed,
            "items_delivered": items_delivered,
            "items_failed": items_failed,
            "seconds": round(took_s, 3),
            "clicks_per_s": round((sender.delivered - items_delivered) / max(took_s, 1e-9), 1),
        }
    if options.json:
        sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
    else:
        sys.stdout.write(
            f"{summary['delivered']} of {summary['clicks']} clicks and {items_delivered} of "
            f"{len(items)} items delivered in {took_s:.1f} s ({summary['clicks_per_s']} clicks/s)\n"
        )
    if sender.failed:
        raise UnavailableError(
            f"Kafka at {settings.broker}: {sender.failed} events were not acknowledged, the last "
            f"because: {sender.last_error}"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="afterclick replay",
        description="Send a CSV, Parquet or JSON-lines log to Kafka in time order. Clicks keep "
        "their own times; their records are stamped with the moment of sending, so that the "
        "topic's retention does not delete an old log at once.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the log of clicks")
    parser.add_argument("--items", type=Path, metavar="FILE", help="a catalogue, sent first")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--speed", type=positive, metavar="X", help="in event time, X times as fast as it happened"
    )
    pace.add_argument("--rate", type=positive, metavar="N", help="N clicks per second")
    parser.add_argument(
        "--from", dest="from_s", type=float, metavar="UNIX_S", help="leave out earlier clicks"
    )
    parser.add_argument(
        "--to", dest="to_s", type=float, metavar="UNIX_S", help="leave out this and later times"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    add_click_columns(parser)
    add_item_columns(parser)
    return parser


def positive(text: str) -> float:
    """Parse an option that must be a number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def _need_times(clicks: pa.Table, option: str) -> None:
    missing = clicks.column("timestamp_ms").null_count
    if missing:
        raise ConfigError(
            f"{option}: needs the time of every click, and {missing} of {clicks.num_rows} have "
            "none; name their column with --time-column, or use --rate"
        )


def _unavailable(settings: StreamsSettings, error: Exception) -> UnavailableError:
    return UnavailableError(f"Kafka at {settings.broker}: {error}")
