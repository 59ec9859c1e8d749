"""Kafka for the simulation: partitions that grow, and committed offsets that are only hints.

On top stands production's `ChunkConsumer` with what Faust keeps underneath; `Fetcher` is the
consumer thread.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from faust.types import TP

from afterclick.serving.errors import UnavailableError
from afterclick.streams.chunks import ChunkConsumer
from afterclick.streams.record import LogEdges, record_crc
from tests.simulation.clock import Process, VirtualLoop
from tests.simulation.plan import PARTITIONS, Plan, offsets

TOPIC = "clicks"


class Raw(NamedTuple):
    """A record as a Kafka client gives it."""

    at_s: float
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Broker:
    """The clicks topic and what the group committed."""

    def __init__(self, loop: VirtualLoop, plan: Plan) -> None:
        self.loop = loop
        self.committed: dict[int, int] = {}
        self.away_until_s = 0.0
        self.starts = plan.log_starts
        self.signals: list[bytes] = []
        """Values of topic `signals`, in order."""
        self._logs = [
            [
                Raw(append.at_s, offset, append.timestamp_ms, append.key, append.value)
                for offset, append in offsets(plan, partition)
            ]
            for partition in range(PARTITIONS)
        ]

    @property
    def away(self) -> bool:
        """Whether nobody answers."""
        return self.loop.now_s < self.away_until_s

    def records(self, partition: int, begin: int = 0) -> list[Raw]:
        """What is there by now from an offset on."""
        now_s = self.loop.now_s
        return [raw for raw in self._logs[partition] if raw.offset >= begin and raw.at_s <= now_s]

    def next_s(self, tps: Iterable[TP]) -> float:
        """When the next record comes to one of some partitions."""
        now_s = self.loop.now_s
        times = [raw.at_s for tp in tps for raw in self._logs[tp.partition] if raw.at_s > now_s]
        return min(times, default=math.inf)

    def last(self, partition: int) -> int:
        """Offset after the last record that will ever come."""
        return self._logs[partition][-1].offset + 1

    def end(self, partition: int) -> int:
        """Offset of the next record."""
        found = self.records(partition)
        return found[-1].offset + 1 if found else self.starts[partition]


class BrokerClient:
    """What opening a partition asks, from a thread of a process."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self._broker, self._process = broker, process

    def edges(self, partition: int) -> LogEdges:
        """First and last offset."""
        self._wait()
        return LogEdges("topic-id", self._broker.starts[partition], self._broker.end(partition))

    def crc_at(self, partition: int, offset: int) -> int | None:
        """crc of one record."""
        self._wait()
        for raw in self._broker.records(partition, offset):
            if raw.offset == offset:
                return record_crc(raw.key, raw.value)
        return None

    def _wait(self) -> None:
        self._process.wait(0.002)
        if self._broker.away:
            raise UnavailableError("simulated: the broker does not answer")


class Fetcher:
    """The consumer thread below Faust: assignment, positions, committed offsets."""

    def __init__(self, broker: Broker) -> None:
        self.positions: dict[TP, int] = {}
        self._broker = broker

    def assignment(self) -> set[TP]:
        """Partitions the group gave us, as far as we know."""
        return set(self.positions)

    def assign(self, partitions: list[int]) -> None:
        """Take what the group gives; positions start at what is committed."""
        self.positions = {TP(TOPIC, p): self._committed(p) for p in partitions}

    async def seek_wait(self, positions: dict[TP, int]) -> None:
        """Go somewhere else."""
        await asyncio.sleep(0.001)
        for tp, offset in positions.items():
            if tp in self.positions:
                self.positions[tp] = max(offset, self._broker.starts[tp.partition])

    async def seek_to_committed(self) -> dict[TP, int]:
        """Where Faust goes after a rebalance."""
        for tp in self.positions:
            self.positions[tp] = self._committed(tp.partition)
        return dict(self.positions)

    def _committed(self, partition: int) -> int:
        start = self._broker.starts[partition]
        return max(self._broker.committed.get(partition, start), start)


class SimulatedConsumer(ChunkConsumer):
    """Production's consumer on simulated fetches."""

    def __init__(
        self,
        broker: Broker,
        process: Process,
        rng: random.Random,
        deliver: Callable[[Any], Any],
    ) -> None:
        # Faust's own __init__ needs a running app; this is what the methods used here touch.
        self.progress, self._next, self._seeks = {}, {}, {}
        self._thread = Fetcher(broker)
        self._active_partitions = None
        self._paused_partitions = set()
        self.app = SimpleNamespace(should_stop=False)
        self.flow_active = False
        self.callback = deliver
        self.records_max = rng.choice((1, 3, 100))
        self._broker, self._process, self._rng = broker, process, rng

    should_stop = False

    def give(self, partitions: list[int]) -> None:
        """Take an assignment, as Faust does before it tells the app."""
        self._thread.assign(partitions)
        tps = self._thread.assignment()
        self._paused_partitions.intersection_update(tps)
        self._set_active_tps(tps)

    def take(self) -> None:
        """Give everything back, as Faust does before it tells the app."""
        tps = self._thread.assignment()
        self._get_active_partitions().difference_update(tps)
        self._paused_partitions.difference_update(tps)
        self._thread.positions = {}

    async def drain(self) -> None:
        """Fetch for ever."""
        await self._drain_messages(SimpleNamespace(should_stop=False))

    async def _wait_next_records(self, timeout: float) -> Any:  # noqa: ASYNC109 - Faust's
        found = self._fetched()
        if not found:
            next_s = self._broker.next_s(self._thread.positions)
            await asyncio.sleep(min(timeout, max(0.0, next_s - self._broker.loop.now_s) + 0.001))
            await self._process.thawed()
            found = self._fetched()
        if found:
            # The answer is on its way while others may ask for a seek.
            await asyncio.sleep(self._rng.choice((0.0, 0.001, 0.003, 0.02)))
            await self._process.thawed()
        return found, self._get_active_partitions()

    def _fetched(self) -> dict[TP, list[Raw]]:
        found: dict[TP, list[Raw]] = {}
        if self._broker.away or not self.flow_active:
            return found
        for tp in sorted(self._get_active_partitions()):
            if tp not in self._thread.positions:
                continue
            records = self._broker.records(tp.partition, self._thread.positions[tp])
            records = records[: self._rng.choice((1, 2, 5, 100))]
            if records:
                found[tp] = records
                self._thread.positions[tp] = records[-1].offset + 1
        return found

    def _to_message(self, tp: TP, record: Any) -> Any:
        return SimpleNamespace(partition=tp.partition, value=None)
