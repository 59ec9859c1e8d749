"""A held partition whose log is not the one it was."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from afterclick.serving.errors import ContractError
from afterclick.streams.assignment import HeldPartition, Shared, State
from afterclick.streams.fold import fold as folding
from afterclick.streams.gate import Gate
from afterclick.streams.lockstep import Steps
from afterclick.streams.metrics import Metrics
from afterclick.streams.partition import Moved
from afterclick.streams.record import Chunk, LogEdges, Record
from afterclick.streams.renewal import Basis, Renewal
from afterclick.streams.rounds import Rounds

WAIT_S = 20.0


class Consumer:
    """What a partition asked of the consumer and the log."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.topic_id = "t1"

    def seek(self, partition: int, offset: int) -> None:
        self.asked.append(f"seek {offset}")

    def pause(self, partition: int) -> None:
        self.asked.append("pause")

    def resume(self, partition: int) -> None:
        self.asked.append("resume")

    def applied(self, partition: int, position: int) -> None: ...

    def folded(self, took_s: float) -> None: ...

    def edges(self, partition: int) -> LogEdges:
        return LogEdges(self.topic_id, 0, 100)

    def crc_at(self, partition: int, offset: int) -> int | None:
        return None


class Fold:
    """A fold that does as it is told."""

    partition = 0
    position = 0
    popularity = None
    has_due = False
    lost_records = 0

    def __init__(self, moved: Callable[[Chunk], Moved]) -> None:
        self._moved = moved

    def open(self, edges: LogEdges, crc_at: Any) -> int:
        if edges.topic_id != "t1":
            raise ContractError("created anew", reason="topic-recreated")
        return self.position

    def check(self) -> int | None:
        return None

    def processing(self, chunk: Chunk, **_: Any) -> Steps[Moved]:
        yield from ()
        return self._moved(chunk)


@contextlib.asynccontextmanager
async def held_by(consumer: Consumer, moved: Callable[[Chunk], Moved]) -> AsyncIterator[Any]:
    """An open partition."""
    prepared = asyncio.Event()
    prepared.set()
    threads = ThreadPoolExecutor(1)

    async def crash(error: BaseException) -> None:
        consumer.asked.append(repr(error))

    fold: Any = Fold(moved)
    basis = Basis(0, ())
    held = HeldPartition(
        fold,
        Shared(
            prepared=prepared,
            rounds=Rounds(None, folding, Gate(), threads, 1),  # type: ignore[arg-type]
            threads=threads,
            metrics=Metrics(),
            moves=consumer,
            log=consumer,
            crash=crash,
            records_max=10,
            backlog_max=20,
            latency_budget_ms=0,
            renewing=asyncio.Semaphore(1),
            renewal=lambda: Renewal(0, 1.0, basis, 0.0),
            basis=lambda: basis,
        ),
    )
    try:
        await until(lambda: held.state == State.READY)
        yield held
    finally:
        await held.stop()
        threads.shutdown()


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not done():  # noqa: ASYNC110 - nothing here tells when
            await asyncio.sleep(0.01)


def chunk(begin: int, num: int = 10, *, rewound: bool = False) -> Chunk:
    records = [Record(begin + n, 0, b"u", b"{}") for n in range(num)]
    return Chunk(begin, begin + num, records, rewound)


def test_a_consumer_that_the_broker_sent_back_is_a_reason_to_look_at_the_log_again() -> None:
    """A topic created anew under a running worker starts at 0: every click would be skipped as
    old until the new log is as long as the old one was.
    """
    consumer = Consumer()
    folded: list[Chunk] = []

    def process(taken: Chunk) -> Moved:
        folded.append(taken)
        return Moved([])

    async def scene() -> None:
        async with held_by(consumer, process) as held:
            held.deliver(chunk(0, rewound=True))
            await until(lambda: consumer.asked == ["seek 0", "seek 0"])
            assert held.state == State.READY
            consumer.topic_id = "t2"
            held.deliver(chunk(0, rewound=True))
            await until(lambda: held.state == State.REFUSED)
            assert held.why == "created anew"
            held.deliver(chunk(0))

    asyncio.run(scene())
    assert folded == []
