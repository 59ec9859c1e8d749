"""What a held partition asks of the consumer."""

import asyncio
from typing import Any

import pytest

from afterclick.streams.assignment import HeldPartition, Shared
from afterclick.streams.fold import fold
from afterclick.streams.gate import Gate
from afterclick.streams.lockstep import Steps
from afterclick.streams.metrics import Metrics
from afterclick.streams.partition import Moved, Renewed
from afterclick.streams.record import Chunk, LogEdges, Record
from afterclick.streams.renewal import Basis, Renewal
from afterclick.streams.rounds import Rounds

BACKLOG_MAX = 4
NOTHING = Basis(0, ())


class Consumer:
    """Moves and log of one partition that is read from 0 on."""

    def __init__(self) -> None:
        self.seeks: list[int] = []
        self.folds_s: list[float] = []
        self.paused = False
        self.sought = asyncio.Event()

    def seek(self, partition: int, offset: int) -> None:
        self.seeks.append(offset)
        self.sought.set()

    def pause(self, partition: int) -> None:
        self.paused = True

    def resume(self, partition: int) -> None:
        self.paused = False

    def applied(self, partition: int, position: int) -> None: ...

    def folded(self, took_s: float) -> None:
        self.folds_s.append(took_s)

    def edges(self, partition: int) -> LogEdges:
        return LogEdges("t", 0, 100)

    def crc_at(self, partition: int, offset: int) -> None: ...


class OvertakenFold:
    """A fold whose first chunk finds another writer's head."""

    partition = 0
    position = 0
    has_due = False
    lost_records = 0

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def open(self, edges: LogEdges, crc_at: Any) -> int:
        return 0

    def check(self) -> None: ...

    def processing(self, chunk: Chunk, *, put_off: bool) -> Steps[Moved]:
        self.chunks.append(chunk)
        yield from ()
        return Moved([], seek=3, mismatch=True)


def shared_with(consumer: Consumer) -> Any:
    prepared = asyncio.Event()
    prepared.set()
    return Shared(
        prepared=prepared,
        rounds=Rounds(None, fold, Gate(), None, 1),  # type: ignore[arg-type]
        threads=None,  # type: ignore[arg-type]
        metrics=Metrics(),
        moves=consumer,
        log=consumer,
        crash=lambda error: None,
        records_max=2,
        backlog_max=BACKLOG_MAX,
        latency_budget_ms=0,
        renewing=asyncio.Semaphore(1),
        renewal=lambda: Renewal(0, 0.0, NOTHING, 0.0),
        basis=lambda: NOTHING,
    )


def test_a_partition_that_seeks_away_from_its_backlog_is_fetched_again() -> None:
    """Its backlog was dropped, so nothing but the seek itself would ever resume it."""

    async def scenario() -> Consumer:
        consumer, fold = Consumer(), OvertakenFold()
        shared = shared_with(consumer)
        held: Any = HeldPartition(fold, shared)  # type: ignore[arg-type]
        await consumer.sought.wait()
        records = [Record(n, 0, b"u", b"{}") for n in range(2 * BACKLOG_MAX)]
        for at in range(0, len(records), 2):
            held.deliver(Chunk(at, at + 2, records[at : at + 2]))
        assert consumer.paused
        consumer.sought.clear()
        await consumer.sought.wait()
        await held.stop()
        return consumer

    consumer = asyncio.run(scenario())
    assert consumer.seeks == [0, 3]
    assert not consumer.paused
    assert consumer.folds_s, "how long to rest after a fetch follows from it"


class LostRenewalFold(OvertakenFold):
    """A fold that stands where it stood, with marks in Redis that it does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = asyncio.Event()

    def renew_due(self, limit: int) -> Renewed:
        self.has_due = False
        self.looked.set()
        return Renewed()


def test_marks_are_looked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failover that lost a renewal only leaves the head as it was: nothing else would tell."""
    monkeypatch.setattr("afterclick.streams.assignment.DUE_LOOK_S", 0.0)

    async def scenario() -> None:
        fold: Any = LostRenewalFold()
        held = HeldPartition(fold, shared_with(Consumer()))
        await asyncio.wait_for(fold.looked.wait(), 10)
        await held.stop()

    asyncio.run(scenario())
