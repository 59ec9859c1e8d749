"""A simulated worker: production's `Worker` with Faust, servers and release loading taken away.

Its partitions, their folds, the store and the consumer are production's. What stands here is what
Faust does (the agent, joining and leaving the group, committing) and a runtime that only hands
out releases that are loaded already.
"""

import asyncio
import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from faust.types import TP

from afterclick.serving.errors import UnavailableError
from afterclick.serving.keys import Keys
from afterclick.serving.store import Store
from afterclick.streams.app import Worker
from afterclick.streams.assignment import Shared
from afterclick.streams.feed import SignalsFeed
from afterclick.streams.fold import fold
from afterclick.streams.gate import Gate
from afterclick.streams.lockstep import Steps
from afterclick.streams.metrics import Metrics
from afterclick.streams.outbox import Message, Publisher
from afterclick.streams.partition import Moved, PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, DeadLetter, Record
from afterclick.streams.rounds import Rounds
from tests.simulation.clock import Process, VirtualLoop
from tests.simulation.kafka_double import TOPIC, Broker, BrokerClient, SimulatedConsumer
from tests.simulation.plan import PARTITIONS, RULES, START_MS
from tests.simulation.redis_double import Client, Network
from tests.simulation.releases import Releases

NAMESPACE = "n"
RECORD_TTL_S, POPULARITY_TTL_S = 10_000, 10_000

_metrics = Metrics()  # counts nothing that is looked at; making one takes longer than a whole run


class Surroundings:
    """What the workers of a run share."""

    def __init__(
        self,
        loop: VirtualLoop,
        broker: Broker,
        network: Network,
        releases: Releases,
        note: Callable[..., None],
    ) -> None:
        self.loop, self.broker, self.network, self.releases = loop, broker, network, releases
        self.note = note
        self.published = 0
        self.items = 0
        self.rules = RULES[0]
        self.storms = True
        self.letters: set[tuple[int, int]] = set()
        """Partition and offset of every dead letter."""


class SimulatedRuntime:
    """Release and catalogue in force, each worker hearing of news in its own time."""

    def __init__(self, around: Surroundings, rng: random.Random, name: str) -> None:
        self.gate = Gate()
        self.publication = 0
        self.items = 0
        self._around, self._rng, self._name = around, rng, name
        self.signals = SignalsFeed(None, NAMESPACE, self.gate, _metrics)  # type: ignore[arg-type]
        self._own: Any = None
        """The release with a memory of this worker's, where it has one."""

    def serving(self) -> Serving:
        """What is in force."""
        serving = self._around.releases.serving(self.publication, self.items)
        if self._own is None:
            return serving
        loaded = serving.release
        own = self._own._replace(catalog=loaded.catalog, scanner=loaded.scanner)
        return serving._replace(release=own, signals=self.signals.offset)

    def _hear(self) -> None:
        """Take the memory of the release in force, caught up."""
        around = self._around
        serving = around.releases.serving(self.publication, self.items)
        told = around.broker.signals
        heard, absorber = around.releases.hearing(serving, NAMESPACE, told, len(told))
        self._own = heard.release if absorber else None
        self.signals.put_in_force(absorber)

    async def follow_signals(self) -> None:
        """Hear what is told, for ever, each worker in its own time."""
        while True:
            await asyncio.sleep(self._rng.choice((0.02, 0.2, 1.0)))
            absorber, told = self.signals._absorber, self._around.broker.signals
            if absorber is not None and absorber.offset < len(told):
                upto = self._rng.randint(absorber.offset + 1, len(told))
                records = [Record(at, 0, b"", told[at]) for at in range(absorber.offset, upto)]
                await self.signals.absorb(absorber, records)

    async def start(self) -> None:
        """Load what is published, read all items."""
        self.publication, items = self._around.published, self._around.items
        await asyncio.sleep(self._rng.uniform(0.01, 0.3))
        self.items = items
        self._hear()

    async def watch(self) -> None:
        """Follow publications and items for ever."""
        around = self._around
        while True:
            await asyncio.sleep(self._rng.choice((0.05, 0.2, 0.5, 2.0)))
            if around.published > self.publication:
                number = around.published
                await asyncio.sleep(self._rng.uniform(0.0, 0.3))  # loads beside the running one
                async with self.gate.alone():
                    self.publication, self.items = number, max(self.items, around.items)
                    self._hear()
                around.note("{}: serves publication {}, items {}", self._name, number, self.items)
            elif around.items > self.items:
                number = self._rng.randint(self.items + 1, around.items)
                async with self.gate.alone():
                    self.items = number
                around.note("{}: has items {}", self._name, number)


class SimulatedFold(PartitionFold):
    """Puts lists off at random too: production does so only for clicks that waited long."""

    rng: random.Random

    def processing(self, chunk: Chunk, *, put_off: bool = False) -> Steps[Moved]:
        return super().processing(chunk, put_off=put_off or self.rng.random() < 0.2)


class SimulatedWorker(Worker):
    """One worker process."""

    def __init__(self, name: str, around: Surroundings, seed: object) -> None:
        # Worker's own __init__ makes Faust's app and connects.
        rng = self.rng = random.Random(f"{seed}/{name}")
        self.name, self.around = name, around
        self.process = process = Process(around.loop, name)
        self.client = Client(around.network, process, rng, around.note)
        self.client.latency_s = self._latency_s
        self.store = Store(
            "redis://simulated",
            Keys(NAMESPACE, partitions=PARTITIONS),
            record_ttl_s=RECORD_TTL_S,
            popularity_ttl_s=POPULARITY_TTL_S,
            clock_ms=lambda: START_MS + int(around.loop.now_s * 1000),
            client=self.client,
        )
        self.runtime = SimulatedRuntime(around, rng, name)
        self.metrics = _metrics
        # Time between renewals is real time, so that only none at all is the same in every run.
        self.streams = SimpleNamespace(
            renew_users_max=rng.choice((0, 2, 100)),
            renew_every_s=0.0,
            signals_every_ms=rng.choice((20, 250, 1000)),
        )
        self._publisher = Publisher(self.store, NAMESPACE, self._publish, outbox_max=1000)
        self.held = {}
        self.broken: list[BaseException] = []
        self.crashing: Callable[[], None] = lambda: None
        self.drops = 0
        self.deaf_until_s = 0.0
        """It does not notice a rebalance before."""
        self._joined = False
        self._rules = around.rules
        self._log = BrokerClient(around.broker, process)
        self._batches = itertools.count()
        self._buffer: asyncio.Queue[Any] = asyncio.Queue(64)
        self._simulated = SimulatedConsumer(around.broker, process, rng, self._buffer.put)
        self._left: asyncio.Task[Any] | None = None
        self.prepared = asyncio.Event()
        self._shared = Shared(
            prepared=self.prepared,
            rounds=Rounds(self.store, fold, self.runtime.gate, None, 2, start=process.start),
            threads=None,
            metrics=_metrics,
            moves=self,
            log=self,
            crash=self._crash,
            records_max=rng.choice((2, 6, 100)),
            backlog_max=rng.choice((3, 100)),
            latency_budget_ms=rng.choice((0, 1)),
            renewing=asyncio.Semaphore(1),
            renewal=self._new_renewal,
            basis=self._basis,
        )
        for work in (
            self._prepare(),
            self._fold_clicks(),
            self._commit(),
            self._simulated.drain(),
            self.publish_signals(),
        ):
            process.start(work)

    # What Faust does ----------------------------------------------------------------------------

    async def leave(self) -> None:
        """Notice a rebalance, at last, and give everything back."""
        if self._left is None:
            self._left = self.process.start(self._leave())
        await asyncio.shield(self._left)

    async def _leave(self) -> None:
        late = self.around.storms and self.rng.random() < 0.1
        await asyncio.sleep(self.rng.uniform(1.0, 8.0) if late else self.rng.uniform(0.0, 0.1))
        await asyncio.sleep(max(0.0, self.deaf_until_s - self.around.loop.now_s))
        await self.process.thawed()
        self.around.note("{}: notices the rebalance, leaves {}", self.name, sorted(self.held))
        self._simulated.flow_active = False
        tps = sorted(self._simulated.assignment())
        self._simulated.take()
        await self.revoked(tps)
        self.around.note("{}: left", self.name)

    async def join(self, partitions: list[int]) -> None:
        """Take what the group gives."""
        self._left = None
        await asyncio.sleep(self.rng.uniform(0.0, 0.05))
        self._simulated.give(partitions)
        self.around.note("{}: holds {}", self.name, partitions)
        await self.assigned(self._simulated.assignment())
        await self._simulated.seek_to_committed()
        self._simulated.flow_active = True

    async def _fold_clicks(self) -> None:
        while True:
            message = await self._buffer.get()
            for partition, chunk in message.value:
                held = self.held.get(partition)
                if self.drops and chunk.end < self.around.broker.last(partition):
                    self.drops -= 1
                    self.around.note("{}: chunk lost {}", self.name, _words(chunk))
                elif held is not None:
                    held.deliver(chunk)
            if self.rng.random() < 0.1:
                await asyncio.sleep(self.rng.uniform(0.0, 0.05))

    async def _commit(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self.process.thawed()
            for tp in sorted(self._simulated.progress):
                self.around.broker.committed[tp.partition] = self._simulated._new_offset(tp)

    # What the base class leaves to Faust and the servers -----------------------------------------

    @property
    def _consumer(self) -> Any:
        return self._simulated

    def _tp(self, partition: int) -> TP:
        return TP(TOPIC, partition)

    def edges(self, partition: int) -> Any:
        return self._log.edges(partition)

    def crc_at(self, partition: int, offset: int) -> int | None:
        return self._log.crc_at(partition, offset)

    def seek(self, partition: int, offset: int) -> None:
        self.around.note("{}: partition {} seeks to {}", self.name, partition, offset)
        super().seek(partition, offset)

    def jump(self, partition: int, back: int) -> None:
        """A consumer that stands somewhere earlier all at once."""
        positions = self._simulated._thread.positions
        tp = self._tp(partition)
        if tp in positions:
            positions[tp] = max(self.around.broker.starts[partition], positions[tp] - back)

    async def _prepare(self) -> None:
        await self.runtime.start()
        self.prepared.set()
        await asyncio.gather(self.runtime.watch(), self.runtime.follow_signals())

    def _new_fold(self, partition: int) -> PartitionFold:
        def send(letters: list[DeadLetter]) -> None:
            self.process.wait(self._latency_s())
            if self.around.broker.away:
                raise UnavailableError("simulated: the broker does not answer")
            self.around.letters |= {(partition, letter.record.offset) for letter in letters}

        rng = self.rng
        fold = SimulatedFold(
            partition,
            self.store,
            self._rules,
            Limits(
                users_max=rng.choice((1, 2, 100)),
                records_max=rng.choice((1, 3, 100)),
                bytes_max=1 << 20,
                cache_users_max=rng.choice((1, 2, 100)),
                rebuilds_max=rng.choice((1, 100)),
            ),
            serving=self.runtime.serving,
            dead_letters=send,
            log_start=lambda: self._log.edges(partition).start,
            batch_ids=self._batches_of(),
        )
        fold.rng = rng
        return fold

    def _publish(self, message: Message) -> None:
        """The broker has it before or after the answer is lost, or never hears of it."""
        self.process.wait(self._latency_s())
        if self.around.broker.away:
            raise UnavailableError("simulated: the broker does not answer")
        self.around.broker.signals.append(message.value)
        self.process.wait(self._latency_s())
        if self.around.broker.away:
            raise UnavailableError("simulated: the broker's answer was lost")

    def _batches_of(self) -> Any:
        return (f"{self.name}-{n}" for n in self._batches)

    async def _crash(self, error: BaseException) -> None:
        self.broken.append(error)

    def _latency_s(self) -> float:
        if self.around.storms and self.rng.random() < 0.03:
            return self.rng.uniform(0.05, 1.5)
        return self.rng.uniform(0.0005, 0.01)


def _words(chunk: Chunk) -> str:
    return f"[{chunk.begin}, {chunk.end}) with {[record.offset for record in chunk.records]}"
