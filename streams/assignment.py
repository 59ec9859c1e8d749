"""The partitions that this worker holds: a task each that takes what waits, folds it and reports.

Knows Faust's consumer only through `Moves`, and the fold's rules not at all: `PartitionFold`
decides, this
module waits, retries and runs it in threads. A partition is in one of the states of `State`;
/readyz shows them.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

from afterclick.serving.errors import ContractError, UnavailableError
from afterclick.streams.lockstep import Steps
from afterclick.streams.metrics import Metrics
from afterclick.streams.partition import Applied, Moved, PartitionFold, Renewed
from afterclick.streams.record import Chunk, LogEdges
from afterclick.streams.renewal import BATCH_USERS, Basis, Renewal
from afterclick.streams.rounds import Rounds

IDLE_CHECK_S = 1.0
"""How often an idle partition looks whether its head is still the stored one."""

RETRY_MIN_S, RETRY_MAX_S = 0.1, 2.0
"""Pauses between two tries while Kafka or Redis is away, doubling."""

DUE_LOOK_S = 10.0
"""How often marks are looked for that a failover brought back: it may lose a renewal and no write
of clicks, and then the head says nothing.
"""

RENEWAL_REST = 2.0
"""Pause after a renewal, as a multiple of what it took: nobody waits for it, but other clicks may.
"""

RENEWAL_TURN_S = 0.02
"""How soon a partition asks again whether it may renew."""

log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a partition stands."""

    OPENING = "opening"
    READY = "ready"
    WAITING = "waiting"
    REFUSED = "refused"


class Moves(Protocol):
    """What a partition may ask of the consumer."""

    def seek(self, partition: int, offset: int) -> None: ...  # noqa: D102
    def pause(self, partition: int) -> None: ...  # noqa: D102
    def resume(self, partition: int) -> None: ...  # noqa: D102
    def applied(self, partition: int, position: int) -> None: ...  # noqa: D102
    def folded(self, took_s: float) -> None: ...  # noqa: D102


class Log(Protocol):
    """What opening a partition asks of the broker; blocking."""

    def edges(self, partition: int) -> LogEdges: ...  # noqa: D102
    def crc_at(self, partition: int, offset: int) -> int | None: ...  # noqa: D102


class Shared(NamedTuple):
    """What all partitions of a worker use together."""

    prepared: asyncio.Event
    """Set once the release is loaded and all items are read."""
    rounds: Rounds
    threads: ThreadPoolExecutor
    metrics: Metrics
    moves: Moves
    log: Log
    crash: Callable[[BaseException], Any]
    records_max: int
    backlog_max: int
    latency_budget_ms: int
    renewing: asyncio.Semaphore
    """One partition at a time, so that the others' clicks find a free slot."""
    renewal: Callable[[], Renewal]
    basis: Callable[[], Basis]


class Inbox:
    """Chunks that wait; consecutive ones are taken as one, so that load makes chunks larger."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self._filled = asyncio.Event()
        self.num_records = 0

    def put(self, chunk: Chunk) -> None:
        """Add a chunk at the end."""
        self._chunks.append(chunk)
        self.num_records += len(chunk.records)
        self._filled.set()

    def put_back(self, chunk: Chunk) -> None:
        """Add a chunk that was taken and could not be folded at the front."""
        self._chunks.appendleft(chunk)
        self.num_records += len(chunk.records)
        self._filled.set()

    def clear(self) -> None:
        """Drop everything: the consumer goes somewhere else."""
        self._chunks.clear()
        self.num_records = 0

    async def wait(self, timeout_s: float) -> bool:
        """Whether something waits, at the latest after `timeout_s`."""
        if not self._chunks and timeout_s > 0:
            self._filled.clear()
            try:
                # `wait_for` of Python 3.11 loses a cancellation that comes with the chunk.
                async with asyncio.timeout(timeout_s):
                    await self._filled.wait()
            except TimeoutError:
                return False
        return bool(self._chunks)

    def take(self, records_max: int) -> Chunk | None:
        """What waits, as one chunk of about `records_max` records at most."""
        if not self._chunks:
            return None
        first = self._chunks.popleft()
        records, end = list(first.records), first.end
        while (
            self._chunks
            and self._chunks[0].begin == end
            and len(records) + len(self._chunks[0].records) <= records_max
        ):
            following = self._chunks.popleft()
            records += following.records
            end = following.end
        self.num_records -= len(records)
        return Chunk(first.begin, end, records)


class HeldPartition:
    """One assigned partition."""

    def __init__(self, fold: PartitionFold, shared: Shared) -> None:
        self.partition = fold.partition
        self.state = State.OPENING
        self.why = "not opened yet"
        self.busy_since_s: float | None = None
        self._fold = fold
        self._shared = shared
        self._inbox = Inbox()
        self._taken: Chunk | None = None
        self._taken_s = 0.0
        self._paused = False
        self._renewal = shared.renewal()
        # The loop's clock, so that a simulated loop decides when lists are renewed.
        self._clock_s = asyncio.get_running_loop().time
        self._due_looked_s = self._clock_s()
        self._pause_s = RETRY_MIN_S
        self._lost_told = 0
        self._task = asyncio.create_task(self._run(), name=f"partition-{self.partition}")

    @property
    def fold(self) -> PartitionFold:
        """The fold behind this partition."""
        return self._fold

    def deliver(self, chunk: Chunk) -> None:
        """Take a chunk from the consumer; never blocks."""
        if self.state in (State.REFUSED, State.OPENING):
            return  # opening seeks to the head, so nothing is lost
        if chunk.rewound:
            log.warning("partition %d: the position is not in the log any more", self.partition)
            self.state, self.why = State.OPENING, "the position is not in the log any more"
            self._inbox.clear()
            return
        self._inbox.put(chunk)
        if not self._paused and self._inbox.num_records >= self._shared.backlog_max:
            self._paused = True
            self._shared.moves.pause(self.partition)

    async def stop(self) -> None:
        """Finish the write in hand and stop."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            self.why = "the release is loading and items are being read"
            await self._shared.prepared.wait()
            while self.state != State.REFUSED:
                if self.state == State.OPENING:
                    await self._open()
                elif self._inbox.num_records or not await self._renew_some():
                    if await self._inbox.wait(IDLE_CHECK_S):
                        await self._fold_what_waits()
                    else:
                        await self._look_at_head()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("partition %d: broken", self.partition)
            await self._shared.crash(error)

    async def _open(self) -> None:
        def work() -> int:
            edges = self._shared.log.edges(self.partition)
            return self._fold.open(
                edges, lambda offset: self._shared.log.crc_at(self.partition, offset)
            )

        position = await self._persist(work)
        if position is None:
            return
        self._tell_lost()
        self._inbox.clear()
        self._resume()
        self._shared.moves.seek(self.partition, position)
        self._shared.moves.applied(self.partition, position)
        self.state, self.why = State.READY, ""
        log.info("partition %d: goes on at offset %d", self.partition, position)

    @property
    def num_waiting(self) -> int:
        """Records that would be in the next chunk, at the least."""
        return min(self._inbox.num_records, self._shared.records_max)

    def take(self) -> Callable[[], Steps[Moved]] | None:
        """What waits by now, as one chunk about to be folded: while others compute, it grows."""
        chunk = self._taken = self._inbox.take(self._shared.records_max)
        if chunk is None:
            return None
        self._taken_s = self.busy_since_s = time.monotonic()
        return partial(self._fold.processing, chunk, put_off=self._is_late(chunk))

    async def _fold_what_waits(self) -> None:
        try:
            moved = await self._attempt(self._shared.rounds.fold(self))
        except UnavailableError:
            assert self._taken is not None
            self._inbox.put_back(self._taken)
            # Outside slot and gate: partitions on other masters and a swap go on meanwhile.
            await self._pause()
            return
        self._tell_lost()
        self._resume()
        if moved is None:
            return
        took_s = time.monotonic() - self._taken_s
        self._shared.metrics.chunk_seconds.observe(took_s)
        self._shared.moves.folded(took_s)
        for applied in moved.applied:
            self._observe(applied)
        if moved.applied:
            self._shared.moves.applied(self.partition, self._fold.position)
        self._shared.metrics.mismatches.inc(moved.mismatch)
        if moved.seek is not None:
            self._go_to(moved.seek)
        if moved.waiting_for is not None:
            self.state = State.WAITING
            self.why = f"the head is on publication {moved.waiting_for}, not loaded here"
            await asyncio.sleep(RETRY_MIN_S)
            self._go_to(self._fold.position)
        elif self.state == State.WAITING:
            self.state, self.why = State.READY, ""

    def _is_late(self, chunk: Chunk) -> bool:
        """Whether states must go on and lists wait: more is behind, and the budget is used up."""
        budget_ms = self._shared.latency_budget_ms
        if not budget_ms or not self._inbox.num_records or not chunk.records:
            return False
        return time.time() * 1000 - chunk.records[0].timestamp_ms > budget_ms

    async def _renew_some(self) -> bool:
        """Make a few lists that are due, or renew those of a few recent users; false: none."""
        fold, now_s = self._fold, self._clock_s()
        if now_s - self._due_looked_s >= DUE_LOOK_S:
            fold.has_due, self._due_looked_s = True, now_s  # maybe: a look costs one call
        if not fold.has_due and not self._renewal.pending(self._shared.basis(), now_s):
            return False
        if self._shared.renewing.locked():
            # Never queue behind another partition's renewal: clicks that come meanwhile would too.
            await self._inbox.wait(RENEWAL_TURN_S)
            return True
        async with self._shared.renewing:
            begun_s = self._clock_s()
            renewed, rest = await self._renewed_batch()
            if renewed is not None:
                await self._inbox.wait(rest * (self._clock_s() - begun_s))
        if renewed is None:
            await self._pause()
            return True
        # A look that found nothing due must not stand in the way of a pass over recent users.
        return bool(renewed.lists) or self._renewal.pending(self._shared.basis(), self._clock_s())

    async def _renewed_batch(self) -> tuple[Renewed | None, float]:
        """One batch, and how long to rest after it; None while Redis does not let it through."""
        fold, users, rest = self._fold, list[str](), 0.0
        try:
            async with self._shared.rounds.turn():
                if self._inbox.num_records:
                    return Renewed(), 0.0  # clicks came while this waited: they go first
                if fold.has_due:
                    work = partial(fold.renew_due, BATCH_USERS)
                else:
                    now_s = self._clock_s()
                    users = self._renewal.batch(self._shared.basis(), fold.recent_users, now_s)
                    work, rest = partial(fold.renew, users), RENEWAL_REST
                renewed = await self._attempt(self._in_thread(work)) or Renewed()
        except UnavailableError:
            self._renewal.put_back(users)
            return None, 0.0
        self._observe_renewed(renewed)
        if renewed.seek is not None:
            self._go_to(renewed.seek)
        return renewed, rest

    async def _look_at_head(self) -> None:
        elsewhere = await self._persist(self._fold.check)
        if elsewhere is not None:
            log.warning("partition %d: the stored head moved to %d", self.partition, elsewhere)
            self._go_to(elsewhere)

    def _go_to(self, offset: int) -> None:
        self._shared.metrics.seeks.inc()
        self._inbox.clear()
        self._shared.moves.seek(self.partition, offset)
        self._resume()  # nothing waits any more, and a paused partition would bring nothing

    def _resume(self) -> None:
        if self._paused and self._inbox.num_records <= self._shared.backlog_max // 2:
            self._paused = False
            self._shared.moves.resume(self.partition)

    def _tell_lost(self) -> None:
        lost = self._fold.lost_records - self._lost_told
        if lost:
            self._lost_told += lost
            self._shared.metrics.lost_records.inc(lost)
            log.warning("partition %d: %d records lost: the log dropped them", self.partition, lost)

    async def _persist(self, work: Callable[[], Any]) -> Any:
        """`_attempt` until Kafka and Redis let it through."""
        while True:
            try:
                return await self._attempt(self._in_thread(work))
            except UnavailableError:
                await self._pause()

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        self.busy_since_s = time.monotonic()
        running = loop.run_in_executor(self._shared.threads, work)
        try:
            # A cancelled task must not leave a thread writing behind its back.
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.gather(running, return_exceptions=True)
            raise

    async def _attempt(self, doing: Awaitable[Any]) -> Any:
        """What comes of work that is done elsewhere; None when the partition is refused.

        Raises:
            UnavailableError: Kafka or Redis does not let it through now; it is said why.
        """
        try:
            found = await doing
        except UnavailableError as error:
            if self.state == State.READY:
                log.warning("partition %d: %s; trying again", self.partition, error)
                self.state = State.WAITING
            self.why = str(error)
            raise
        except ContractError as error:
            log.error("partition %d: refused: %s", self.partition, error)
            self.state, self.why = State.REFUSED, str(error)
            return None
        finally:
            self.busy_since_s = None
        self._pause_s = RETRY_MIN_S
        if self.state == State.WAITING:
            self.state, self.why = State.READY, ""
        return found

    async def _pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, RETRY_MAX_S)
        await asyncio.sleep(pause_s)

    def _observe_renewed(self, renewed: Renewed) -> None:
        metrics = self._shared.metrics
        metrics.renewed_lists.inc(renewed.lists)
        metrics.rebuilt_records.inc(renewed.rebuilt)
        metrics.mismatches.inc(renewed.seek is not None)
        if renewed.oldest_due_ms is not None:
            late_s = max(0.0, time.time() - renewed.oldest_due_ms / 1000)
            metrics.click_to_list_seconds.observe(late_s)

    def _observe(self, applied: Applied) -> None:
        metrics, counts = self._shared.metrics, applied.counts
        metrics.chunks.inc()
        metrics.clicks.inc(counts.clicks)
        metrics.duplicates.inc(counts.duplicates)
        metrics.steps.inc(counts.steps)
        metrics.unknown_items.inc(counts.unknown_items)
        metrics.rebuilt_records.inc(counts.rebuilt)
        metrics.forgotten.inc(counts.forgotten)
        metrics.clock_replaced.inc(counts.clocks_replaced)
        metrics.lists.inc(applied.users - applied.put_off)
        metrics.put_off_lists.inc(applied.put_off)
        if applied.put_off:
            return  # seen when its lists are made
        metrics.click_to_list_seconds.observe(max(0.0, time.time() - applied.oldest_ms / 1000))
