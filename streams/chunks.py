"""The Faust consumer that hands over all that was fetched as one event.

Faust makes four asyncio tasks a message, 50–70 µs of CPU; this consumer delivers what one fetch
brought, a chunk of each partition, as one message, at 2–4 µs a record, and keeps Faust's group
membership, rebalancing, commits and agents. What it changes, and the contract tests in
tests/contract/test_faust.py hold it to:

- Faust's acks are not used: what is committed is `progress`, which the app moves after each write.
- Seeks happen between two fetches only, so that no record fetched before a seek is taken for one
after it.
- Where nobody knows what preceded a chunk, its `begin` is its first record: the fold then skips or
seeks.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import aiokafka
from faust.serializers.schemas import Schema
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP

from afterclick.streams.record import Chunk, record_of

FETCH_WAIT_S = 0.5
"""Longest wait for records before pending seeks are looked at again."""

RESTS_A_FOLD = 2
"""Pause after a fetch that brought records, as a multiple of how long the last fold took, since
every fetch costs some: so a machine that is busy or slow is asked to fetch less often
(docs/performance.md, what was tried).
"""


class ChunkSchema(Schema[Any, Any]):
    """Hands a chunk's bytes through undecoded: Faust would acknowledge what fails to decode."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        """The message's key as it came."""
        return message.key

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        """The chunk."""
        return message.value


class CommittedConsumerThread(AIOKafkaConsumerThread):
    """Faust's consumer thread, reading committed records only."""

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Faust ties this to its own exactly-once mode, which we don't use; without it the events of
        # a producer's aborted transaction would be folded.
        consumer._isolation_level = "read_committed"
        consumer._fetch_max_wait_ms = ChunkConsumer.fetch_wait_ms  # Faust fixes it at 1.5 s
        return consumer

    async def on_start(self) -> None:
        """Connect, and give each node its rests."""
        await super().on_start()
        consumer = cast(ChunkConsumer, self.consumer)
        rest_between_fetches(self._ensure_consumer()._fetcher, consumer.next_rest_s)


def rest_between_fetches(fetcher: Any, rest_s: Callable[[], float]) -> None:
    """Let aiokafka's fetcher leave a broker alone for so long after it brought records.

    Else it asks again at once: under load for every single click, which costs both sides as much as
    a hundred; and without the partitions whose records were not taken yet, so that their next
    clicks wait until the others' request is answered.
    """
    fetch = fetcher._proc_fetch_request

    async def fetch_and_rest(*request: Any) -> Any:
        found = await fetch(*request)
        if found:
            for waiter in list(fetcher._fetch_waiters):
                fetcher._notify(waiter)
            with contextlib.suppress(asyncio.CancelledError):  # as in aiokafka's own
                await asyncio.sleep(rest_s())
        return found

    fetcher._proc_fetch_request = fetch_and_rest


class ChunkConsumer(Consumer):
    """Delivers lists of partition and chunk; see the module's docstring."""

    records_max = 1024
    """Records of one delivered chunk."""

    fetch_wait_ms = 20
    """Longest time the broker holds an empty fetch."""

    fetch_rest_ms = 20
    """Longest pause after a fetch that brought records."""

    fold_s = 0.0
    """How long the last fold took; whoever folds sets it."""

    prepared: asyncio.Event | None = None
    """Set once chunks can be folded: the group is joined no sooner, so that others keep the
    partitions until then. None: at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress: dict[TP, int] = {}
        """Offset that each partition's fold has reached: what Kafka is told for lag tools."""
        self._next: dict[TP, int] = {}
        self._seeks: dict[TP, int] = {}

    def next_rest_s(self) -> float:
        """How long to leave the broker alone now."""
        return min(self.fetch_rest_ms / 1000, RESTS_A_FOLD * self.fold_s)

    def ask_thread(self, answer: Callable[[], None]) -> None:
        """Have Faust's consumer thread call `answer`; it does not while it hangs, nor after it
        ended, which Faust would not notice.
        """
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._thread.thread_loop.call_soon_threadsafe(answer)

    def seek_soon(self, tp: TP, offset: int) -> None:
        """Go to `offset` before the next fetch of a partition."""
        self._seeks[tp] = offset

    def forget(self, tp: TP) -> None:
        """Drop what is known of a partition that was taken away."""
        for table in (self.progress, self._next, self._seeks):
            table.pop(tp, None)

    async def subscribe(self, topics: Iterable[str]) -> None:
        """Join the group, once there is something to fold with."""
        if self.prepared is not None:
            await self.prepared.wait()
        await super().subscribe(topics)

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """After a rebalance Faust goes back to committed offsets; ours are in Redis."""
        committed = await super().seek_to_committed()
        self._next.clear()
        self._seeks.update(self.progress)
        return committed

    def ack(self, message: Any) -> bool:
        """Faust's bookkeeping of single messages; unused."""
        message.acked = True
        return True

    def track_message(self, message: Any) -> None:
        """Faust would keep every message until its ack."""

    async def wait_empty(self) -> None:
        """Leaving with work in hand is safe: whoever comes next goes on from the head in Redis."""
        await self.commit_and_end_transactions()

    def on_buffer_drop(self, tp: TP) -> None:
        """A stream's queue has room again; Faust would fetch a paused partition again too."""
        super().on_buffer_drop(tp)
        self._get_active_partitions().difference_update(self._paused_partitions)

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return iter(list(self.progress))

    def _new_offset(self, tp: TP) -> int | None:
        return self.progress.get(tp)

    def _new_consumer_thread(self) -> CommittedConsumerThread:
        return CommittedConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def _drain_messages(self, fetcher: Any) -> None:
        while not (self.should_stop or fetcher.should_stop):
            try:
                await self._apply_seeks()
                records, _ = await self._wait_next_records(FETCH_WAIT_S)
                await self._deliver(records or {})
            except self.consumer_stopped_errors:
                if self.app.should_stop:
                    return
                raise
            except asyncio.CancelledError:
                if self.app.should_stop:
                    return
                raise
            # A fetch that has records ready returns without ever giving the loop to others.
            await asyncio.sleep(0)

    async def _apply_seeks(self) -> None:
        wanted, self._seeks = self._seeks, {}
        assigned = self.assignment()
        for tp, offset in wanted.items():
            if tp in assigned:
                await self.seek_wait({tp: offset})
                self._next[tp] = offset

    async def _deliver(self, records: Mapping[Any, list[Any]]) -> None:
        """All of a fetch at once, so that its partitions are folded together."""
        chunks: list[tuple[int, Chunk]] = []
        message: Any = None
        for raw_tp, found in records.items():
            tp = TP(*raw_tp)
            for start in range(0, len(found), self.records_max):
                piece = found[start : start + self.records_max]
                first, end = piece[0].offset, piece[-1].offset + 1
                asked = self._next.get(tp, first)
                # aiokafka goes to the log's start where the position is no longer in the log.
                begin, rewound = min(asked, first), first < asked
                self._next[tp] = end
                if not self.flow_active or tp in self._seeks or tp not in self.assignment():
                    # Dropped: the next chunk begins after it, which the fold takes as a hole.
                    continue
                taken = [record_of(record) for record in piece]
                chunks.append((tp.partition, Chunk(begin, end, taken, rewound)))
                message = message or self._to_message(tp, piece[-1])
        if chunks:
            message.value = chunks
            await self.callback(message)


class ChunkTransport(Transport):
    """Faust's aiokafka transport with `ChunkConsumer`."""

    Consumer = ChunkConsumer
