"""Brings the memory of a release abreast of topic `signals`, and keeps it there.

Everything a worker's lists know of other partitions' clicks comes this way. Applied between two
chunks, so that a list can name the offset that it was made with; a release that is swapped in has
caught up before. Knows what a message means (signals.py), not what a memory does with it.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Protocol

from afterclick.serving.errors import ContractError, UnavailableError
from afterclick.serving.releases import LoadedRelease
from afterclick.streams.gate import Gate
from afterclick.streams.log import Tail
from afterclick.streams.metrics import Metrics
from afterclick.streams.record import Record
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.signals import (
    Absorber,
    Origin,
    decode_parcel,
    decode_signal,
    origin_of,
)

MOVES_MAX = 1000
"""Moves absorbed while chunks wait: some milliseconds."""

LOOK_BACK = 1000
"""Records looked at first: minutes of a busy topic."""

AHEAD_RECORDS = 10_000
"""Read at once by `ReadAhead`: some megabytes."""

RETRY_S = 1.0
"""Pause while Kafka is away, and between two looks for a release that has a memory."""

log = logging.getLogger(__name__)


class SignalsLog(Protocol):
    """What catching up asks of the log."""

    def edges(self, topic: str, partition: int) -> tuple[int, int]: ...  # noqa: D102
    def read(  # noqa: D102
        self, topic: str, partition: int, start: int, stop: int
    ) -> Iterator[list[Record]]: ...


class _Stretch:
    """Between these two offsets all records of a partition are held."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.begin = self.end = 0


class ReadAhead:
    """Partitions that are read in small steps forward, fetched in large ones.

    Else every step waits for the fetch that the one before it left with the broker, half a second:
    whoever follows a catalogue from input to input, or a memory from list to list, takes thousands.
    """

    def __init__(self, log: SignalsLog) -> None:
        self._log = log
        self._held: defaultdict[tuple[str, int], _Stretch] = defaultdict(_Stretch)

    def edges(self, topic: str, partition: int) -> tuple[int, int]:
        """As the log's."""
        return self._log.edges(topic, partition)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[list[Record]]:
        """As the log's."""
        held = self._held[topic, partition]
        if not held.begin <= start <= held.end:
            held.records.clear()
            held.begin = held.end = start
        while held.records and held.records[0].offset < start:
            held.records.popleft()
        held.begin = start
        while start < stop:
            if held.end <= start:
                end = max(stop, self.edges(topic, partition)[1])
                end = min(end, start + AHEAD_RECORDS)
                # Whole or not at all: else what a broken read brought is held twice after the next.
                fresh = list(self._log.read(topic, partition, start, end))
                held.records.extend(itertools.chain.from_iterable(fresh))
                held.end = end
            start = min(stop, held.end)
            found = []
            while held.records and held.records[0].offset < start:
                found.append(held.records.popleft())
            held.begin = start
            if found:
                yield found


def absorber_of(loaded: LoadedRelease, namespace: str) -> Absorber | None:
    """A release's memory as it came, ready to hear; None where it has none."""
    if loaded.memory is None:
        return None
    return Absorber(
        loaded.memory,
        namespace=namespace,
        known=loaded.manifest.snapshot.offsets,
        offset=loaded.manifest.signals_offset,
    )


def catch_up(reader: SignalsLog, topic: str, absorber: Absorber, end: int | None = None) -> bool:
    """Absorb everything below an offset, the topic's end if none is given; nobody may be reading
    the memory.

    Returns:
        Whether the topic still had all of it: if not, the memory lacks what retention dropped.
    """
    start, last = reader.edges(topic, 0)
    end = last if end is None else min(end, last)
    whole = start <= absorber.offset or end <= absorber.offset
    for records in reader.read(topic, 0, max(start, absorber.offset), end):
        absorber.take(absorber.sift(records))
    return whole


def told_up_to(reader: SignalsLog, topic: str, namespace: str, origin: Origin) -> int:
    """Clicks of a partition below this offset are in the topic, or were given up; 0 if it has none.

    Looks back from the topic's end as far as it must. What comes out may be too low, after a
    message that was sent late: to tell again from there does no harm.
    """
    start, end = reader.edges(topic, 0)
    back, told = LOOK_BACK, 0
    while not told and start < end:
        begin = max(start, end - back)
        for record in itertools.chain.from_iterable(reader.read(topic, 0, begin, end)):
            with contextlib.suppress(ContractError):
                signal = decode_signal(record.value)
                if signal.namespace == namespace and origin_of(signal) == origin:
                    ends = [decode_parcel(bytes(raw)).end for raw in signal.parcels]
                    told = max([told, *ends])
        back, end = 8 * back, begin
    return told


class SignalsFeed:
    """The memory in force, and how it follows the topic."""

    def __init__(
        self, streams: StreamsSettings, namespace: str, gate: Gate, metrics: Metrics
    ) -> None:
        self._streams = streams
        self._namespace = namespace
        self._gate = gate
        self._metrics = metrics
        self._absorber: Absorber | None = None

    @property
    def offset(self) -> int:
        """What a list made now names; 0 without a memory."""
        return self._absorber.offset if self._absorber else 0

    def prepared(self, loaded: LoadedRelease, reader: SignalsLog) -> Absorber | None:
        """A release's memory as of the topic's end; blocking, beside the one in force."""
        absorber = absorber_of(loaded, self._namespace)
        if absorber is not None and not catch_up(reader, self._streams.signals_topic, absorber):
            log.warning(
                "release %s: topic %r no longer holds the clicks since its training: its memory "
                "lacks them, and verify cannot tell what its lists should be; keep the topic "
                "longer (AFTERCLICK_STREAMS__SIGNALS_RETENTION_H), or train a release",
                loaded.publication.release,
                self._streams.signals_topic,
            )
        return absorber

    def put_in_force(self, absorber: Absorber | None) -> None:
        """Follow the topic with another memory; the caller holds the gate alone."""
        self._absorber = absorber
        self._metrics.signals_offset.set(self.offset)

    async def follow(self) -> None:
        """Absorb what comes, for ever."""
        tail: Tail | None = None
        followed: Absorber | None = None
        pending: list[Record] = []
        applied_s = 0.0
        while True:
            try:
                if self._absorber is None:
                    await asyncio.sleep(RETRY_S)
                    continue
                if tail is None or followed is not self._absorber:
                    if tail is not None:
                        await asyncio.to_thread(tail.close)
                    followed, pending = self._absorber, []
                    # The broker checks what it takes; kafka-python's own checksum is Python.
                    tail = await asyncio.to_thread(
                        Tail,
                        self._streams,
                        self._streams.signals_topic,
                        [followed.offset],
                        check_crcs=False,
                    )
                pending += [record for _, record in await asyncio.to_thread(tail.poll)]
                behind = await asyncio.to_thread(tail.behind)
                self._metrics.signals_lag.set(behind + len(pending))
                if pending and time.monotonic() - applied_s >= self._streams.signals_every_ms / 1e3:
                    applied_s = time.monotonic()
                    await self.absorb(followed, pending)
                    pending = []
            except UnavailableError as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(RETRY_S)

    async def absorb(self, absorber: Absorber, records: list[Record]) -> None:
        """Take records in, a few at a time, between chunks."""
        loop = asyncio.get_running_loop()
        while records:
            sifted = await loop.run_in_executor(None, absorber.sift, records, MOVES_MAX)
            records = [record for record in records if record.offset >= sifted.offset]
            async with self._gate.alone():
                if self._absorber is not absorber:
                    return  # another release has come, which reads the topic for itself
                await loop.run_in_executor(None, absorber.take, sifted)
            self._metrics.signals_absorbed.inc(len(sifted.moves))
            self._metrics.signals_offset.set(absorber.offset)
