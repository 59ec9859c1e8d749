"""Sends on what commits left in Redis: the moves of this worker's partitions, to topic `signals`.

In batches, and never on a click's path. Entries are struck off only once the broker has them, so a
worker killed in between leaves them to the partition's next owner: they may come twice and are
never lost (signals.py tells how readers count them once). While the broker refuses them for long,
the oldest beyond a limit are given up: lists lose a little of what they would know, records
nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import aiokafka
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from afterclick.serving.errors import UnavailableError
from afterclick.serving.store import SignalsWrite
from afterclick.streams.admin import client_config
from afterclick.streams.metrics import Metrics
from afterclick.streams.partition import PartitionFold
from afterclick.streams.security import kafka_arguments
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.signals import Origin, encode_signal

PARCELS_MAX = 500
"""Entries of one message: what a partition commits in 250 ms, many times over."""

MESSAGE_BYTES_MAX = 512 << 10
"""Half of what Kafka takes by default; one entry alone may be larger."""

REQUEST_BYTES_MAX = 8 << 20
"""Of our client: the broker's own limit decides."""

ACK_TIMEOUT_S = 30.0
log = logging.getLogger(__name__)


class OutboxStore(Protocol):
    """What this module needs of `serving.store.Store`."""

    def waiting_signals(self, partition: int, limit: int) -> list[SignalsWrite]: ...  # noqa: D102
    def published_signals(self, partition: int, last: int) -> None: ...  # noqa: D102
    def num_waiting_signals(self, partition: int) -> int: ...  # noqa: D102


class Message(NamedTuple):
    """One record of topic `signals`."""

    partition: int
    """Of the clicks; the record's key."""
    value: bytes


class Published(NamedTuple):
    """What a round came to."""

    parcels: int
    left: list[int]
    """Partitions that had more than one message takes."""
    refused: int
    """Entries that the broker will never take, struck off."""


class TooLargeError(Exception):
    """The broker takes no record of this size."""


class Publisher:
    """One worker's way from outboxes to topic.

    Args:
        store: where the outboxes are.
        namespace: named in every message.
        send: writes a record and returns once the broker has it; raises UnavailableError, or
            `TooLargeError`.
        outbox_max: entries of one partition that may wait.
    """

    def __init__(
        self,
        store: OutboxStore,
        namespace: str,
        send: Callable[[Message], None],
        outbox_max: int,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._send = send
        self._outbox_max = outbox_max

    def publish(self, origins: Sequence[Origin]) -> Published:
        """One message per partition, in log order, then strike off what was in it.

        Raises:
            UnavailableError: Kafka or Redis does not answer; what was sent may be sent again.
        """
        parcels, refused, left = 0, 0, []
        for origin in origins:
            waiting = self._store.waiting_signals(origin.partition, PARCELS_MAX)
            batch = _fitting(waiting)
            if not batch:
                continue
            batch, taken = self._sent(origin, batch)
            parcels += len(batch) if taken else 0
            refused += 0 if taken else len(batch)
            self._store.published_signals(origin.partition, batch[-1].last)
            if len(batch) < len(waiting) or len(waiting) == PARCELS_MAX:
                left.append(origin.partition)
        return Published(parcels, left, refused)

    def _sent(self, origin: Origin, batch: list[SignalsWrite]) -> tuple[list[SignalsWrite], bool]:
        """What of a batch went off in one message; false where the broker will never take it."""
        while True:
            value = encode_signal(self._namespace, origin, [one.packed for one in batch])
            try:
                self._send(Message(origin.partition, value))
                return batch, True
            except TooLargeError as error:
                if len(batch) == 1:
                    log.warning(
                        "partition %d: moves of the clicks up to %d are left out: %s",
                        origin.partition, batch[0].last, error,
                    )  # fmt: skip
                    return batch, False
                batch = batch[:1]

    def trim(self, partition: int) -> tuple[int, int]:
        """Give the oldest entries up that are beyond the limit; how many, and how many wait."""
        num = self._store.num_waiting_signals(partition)
        over = num - self._outbox_max
        if over <= 0:
            return 0, num
        last = self._store.waiting_signals(partition, over)[-1].last
        self._store.published_signals(partition, last)
        return over, num - over


async def keep_publishing(
    publisher: Publisher,
    folds: Callable[[], list[PartitionFold]],
    *,
    epoch: int,
    every_s: float,
    metrics: Metrics,
) -> None:
    """Publish for ever what the folds of this worker's partitions leave.

    Args:
        publisher: used in a thread.
        folds: those that are open now.
        epoch: of the namespace.
        every_s: least time between two rounds.
        metrics: told what came of it.
    """
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(every_s)
        due = {fold.partition: fold for fold in folds() if fold.has_signals}
        if not due:
            continue
        for fold in due.values():
            fold.has_signals = False  # before the look: what comes after it says so again
        origins = [Origin(epoch, fold.topic_id, partition) for partition, fold in due.items()]
        try:
            done = await loop.run_in_executor(None, publisher.publish, origins)
        except UnavailableError as error:
            log.warning("%s; the moves wait in Redis", error)
            left, waiting = list(due), await _trimmed(publisher, list(due), metrics)
        else:
            metrics.signals_published.inc(done.parcels)
            metrics.signals_dropped.inc(done.refused)
            left, waiting = done.left, {p: PARCELS_MAX if p in done.left else 0 for p in due}
        for partition in left:
            due[partition].has_signals = True
        still = {fold.partition for fold in folds()}
        for partition, num in waiting.items():
            if partition in still:
                metrics.signals_waiting.labels(partition=str(partition)).set(num)


async def _trimmed(publisher: Publisher, partitions: list[int], metrics: Metrics) -> dict[int, int]:
    """Keep outboxes within their limit; how many entries wait in each, where Redis tells."""
    waiting: dict[int, int] = {}
    loop = asyncio.get_running_loop()
    for partition in partitions:
        try:
            dropped, waiting[partition] = await loop.run_in_executor(
                None, publisher.trim, partition
            )
        except UnavailableError:
            break  # whatever it was that failed, it is Redis now: nothing grows there either
        metrics.signals_dropped.inc(dropped)
        if dropped:
            log.warning("partition %d: moves of %d chunks are given up", partition, dropped)
    return waiting


class SignalsProducer:
    """Connection to topic `signals`, made at the first record; used by one thread at a time.

    aiokafka, whose checksum is C: kafka-python's cost 8 µs a click. Its event loop runs only while
    a record is sent.
    """

    def __init__(self, settings: StreamsSettings) -> None:
        self._settings = settings
        self._runner: asyncio.Runner | None = None
        self._producer: Any = None

    def send(self, message: Message) -> None:
        """Write one record and wait until the broker has it.

        Raises:
            UnavailableError: it did not take it in time.
            TooLargeError: it never will.
        """
        if self._runner is None:
            self._runner = asyncio.Runner()
        where = f"Kafka at {self._settings.broker}: {self._settings.signals_topic}"
        try:
            self._runner.run(asyncio.wait_for(self._send(message), ACK_TIMEOUT_S))
        except MessageSizeTooLargeError as error:
            raise TooLargeError(str(error)) from error
        except (KafkaError, TimeoutError) as error:
            raise UnavailableError(f"{where}: {error!r}") from error

    def close(self) -> None:
        """Close the connection."""
        if self._runner is not None:
            if self._producer is not None:
                self._runner.run(self._producer.stop())
            self._runner.close()
        self._runner = self._producer = None

    async def _send(self, message: Message) -> None:
        settings = self._settings
        if self._producer is None:
            # What comes twice is counted once, so no idempotence: a right less to give.
            producer = aiokafka.AIOKafkaProducer(
                bootstrap_servers=client_config(settings)["bootstrap_servers"],
                client_id="afterclick",
                **kafka_arguments(settings),
                acks="all",
                max_request_size=REQUEST_BYTES_MAX,
            )
            try:
                await producer.start()
            except BaseException:
                await producer.stop()
                raise
            self._producer = producer
        key = str(message.partition).encode()
        await self._producer.send_and_wait(settings.signals_topic, message.value, key)


def _fitting(waiting: Sequence[SignalsWrite]) -> list[SignalsWrite]:
    """As many from the front as one message should hold, at least one of any."""
    size = 0
    batch: list[SignalsWrite] = []
    for one in waiting:
        size += len(one.packed)
        if batch and size > MESSAGE_BYTES_MAX:
            break
        batch.append(one)
    return batch
