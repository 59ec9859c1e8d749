"""The worker: what one process holds and shares, wired; nothing happens at import.

The path of a chunk: Faust (`faust_app`) → `Worker.deliver` → `HeldPartition` → a thread that runs
`PartitionFold` → Redis.
"""

import asyncio
import gc
import itertools
import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, cast

from faust.types import TP

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError, UnavailableError
from afterclick.serving.keys import partition_of
from afterclick.serving.records import TopList, encode_list
from afterclick.serving.sessions import choose_provider
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.serving.store import Store
from afterclick.serving.texts import Ranked, ranked_of
from afterclick.streams.admin import TopicsInfo, check_topics, wait_for_broker
from afterclick.streams.assignment import HeldPartition, Shared, State
from afterclick.streams.chunks import ChunkConsumer
from afterclick.streams.deadletters import DeadLetters
from afterclick.streams.events import FoldEvent
from afterclick.streams.faust_app import Runner, build_app
from afterclick.streams.fold import Folded, Part, fold
from afterclick.streams.health import HealthServer
from afterclick.streams.inference import Release
from afterclick.streams.log import LogReader
from afterclick.streams.metrics import Metrics
from afterclick.streams.namespace import claim_namespace, grown_words, wait_for_redis
from afterclick.streams.outbox import Publisher, SignalsProducer, keep_publishing
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.popularity import Popularity
from afterclick.streams.record import Chunk, DeadLetter, LogEdges, record_crc
from afterclick.streams.renewal import Basis, Renewal
from afterclick.streams.repeats import keep_back_repeats
from afterclick.streams.rounds import Rounds
from afterclick.streams.runtime import Runtime, UnavailableChange, settle
from afterclick.streams.settings import StreamsSettings, fold_threads
from afterclick.streams.watchdog import Look, Watchdog

SUMMARY_ITEMS = 500
"""Items of a partition's popularity that enter the fallback list."""

STUCK_S = 60.0
"""A fold that runs for so long, or an event loop (the app's, the consumer thread's) that is silent
for so long, fails liveness.
"""

LOOKS_PER_STALL = 12
"""Looks at the log within `stall_s`: every 5 s by default."""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that waits for the interpreter lets another run on. With Python's 5 ms a chunk
of
two clicks, which takes the lock some ten times, needed 12 ms beside others instead of 2.
"""

COLLECT_AFTER = 20_000
"""Objects made and not gone before the garbage collector looks at the young ones. A round of 256
clicks has made some thousand when it ends, and nearly all go by themselves then: with Python's 700
the collector looked at them in vain, for 1 µs a click.
"""

log = logging.getLogger(__name__)


class Worker:
    """Everything of one worker process, wired; `app` is what Faust runs."""

    def __init__(
        self, serving: ServingSettings, streams: StreamsSettings, topics: TopicsInfo, store: Store
    ) -> None:
        self.serving, self.streams, self.topics, self.store = serving, streams, topics, store
        self.metrics = Metrics()
        store.observe_s = self.metrics.redis_seconds.observe
        self.held: dict[int, HeldPartition] = {}
        self.dead_letters = DeadLetters(streams)
        self._astray: set[int] = set()
        """Partitions of which it was said that clicks belong elsewhere."""
        self.runtime = Runtime(
            serving,
            streams,
            self.metrics,
            on_unavailable=self._write_unavailable,
            on_bad_item=self._bad_item,
        )
        self._publisher = Publisher(
            store, serving.namespace, SignalsProducer(streams).send, streams.signals_outbox_max
        )
        self._log = LogReader(streams)
        self._watched_log = LogReader(streams)  # of its own: openings must not wait for looks
        self._watchdog = Watchdog(streams.stall_s)
        self._ends: dict[int, int] = {}
        self._beat_s = self._thread_beat_s = time.monotonic()
        self._joined = False
        self.prepared = asyncio.Event()
        self.app = build_app(
            streams,
            self,
            prepared=self.prepared,
            first=(self.prepare, self.heartbeat),
            tasks=(
                self.watch_ingestion,
                self.renew_fallback,
                self.watch_releases,
                self.follow_items,
                self.follow_signals,
                self.publish_signals,
            ),
        )
        num_threads = fold_threads(streams, os.cpu_count() or 1)
        # One more for idle checks and openings, which must not wait behind long folds.
        threads = ThreadPoolExecutor(num_threads + 1, thread_name_prefix="fold")
        self._shared = Shared(
            prepared=self.prepared,
            rounds=Rounds(store, self._timed_fold, self.runtime.gate, threads, num_threads),
            threads=threads,
            metrics=self.metrics,
            moves=self,
            log=self,
            crash=self.app.crash,
            records_max=streams.chunk_records_max,
            backlog_max=streams.backlog_records_max,
            latency_budget_ms=streams.latency_budget_ms,
            renewing=asyncio.Semaphore(1),
            renewal=self._new_renewal,
            basis=self._basis,
        )

    # Life-cycle, called by Faust's signals ------------------------------------------------------

    async def prepare(self) -> None:
        """Get ready to fold; the group is joined then."""
        await self.runtime.start()
        settle()  # what start-up made lives for ever
        self.prepared.set()

    async def watch_releases(self) -> None:
        """Swap new publications in."""
        await self.prepared.wait()
        await self.runtime.watch_releases()

    async def follow_items(self) -> None:
        """Take new items."""
        await self.prepared.wait()
        await self.runtime.follow_items()

    async def follow_signals(self) -> None:
        """Hear what was clicked, in all partitions."""
        await self.prepared.wait()
        await self.runtime.signals.follow()

    async def publish_signals(self) -> None:
        """Tell everybody what was clicked in the partitions held here."""
        await self.prepared.wait()
        await keep_publishing(
            self._publisher,
            lambda: [
                held.fold
                for held in self.held.values()
                if held.state in (State.READY, State.WAITING)
            ],
            epoch=self.store.keys.epoch,
            every_s=self.streams.signals_every_ms / 1000,
            metrics=self.metrics,
        )

    async def assigned(self, tps: set[TP]) -> None:
        """Take partitions over."""
        self._joined = True
        for tp in sorted(tps):
            if tp.partition not in self.held:
                self.held[tp.partition] = HeldPartition(self._new_fold(tp.partition), self._shared)
        if not self.held:
            log.warning(
                "no partition of %s is left for this worker: it has %d, and as many others of "
                "group %s hold them; it stands by",
                self.streams.clicks_topic, self.topics.clicks_partitions, self.streams.group,
            )  # fmt: skip

    async def revoked(self, tps: set[TP]) -> None:
        """Give partitions back: the write in hand ends, what waits is left to others."""
        leaving = [self.held.pop(tp.partition) for tp in tps if tp.partition in self.held]
        await asyncio.gather(*(held.stop() for held in leaving))
        for tp in tps:
            self._consumer.forget(tp)
        for held in leaving:
            self.metrics.forget_partition(held.partition)

    def deliver(self, partition: int, chunk: Chunk) -> None:
        """Hand a chunk to its partition; a partition that was taken away needs none."""
        held = self.held.get(partition)
        if held is not None:
            held.deliver(chunk)

    async def heartbeat(self) -> None:
        """Show that the event loop runs, and how far behind the log each partition is."""
        while True:
            self._beat_s = time.monotonic()
            self._consumer.ask_thread(self._thread_beat)
            for partition, held in list(self.held.items()):
                position = held.fold.position
                self.metrics.head_offset.labels(partition=str(partition)).set(position)
                tp = self._tp(partition)
                assigned = tp in self._consumer.assignment()  # not so for a moment of a rebalance
                end = (self._consumer.highwater(tp) or 0) if assigned else 0
                end = max(end, self._ends.get(partition, 0))
                self.metrics.lag.labels(partition=str(partition)).set(max(0, end - position))
            await asyncio.sleep(1.0)

    async def watch_ingestion(self) -> None:
        """Look at the log by a connection of our own: a consumer that stopped does not know it."""
        while True:
            await asyncio.sleep(self.streams.stall_s / LOOKS_PER_STALL)
            held = dict(self.held)
            positions = {partition: one.fold.position for partition, one in held.items()}
            try:
                self._ends, waiting = await asyncio.to_thread(self._look_at_log, positions)
            except UnavailableError as error:
                log.warning("watchdog: %s", error)
                waiting = set()  # no restart brings Kafka back
            looks = {
                partition: Look(
                    positions[partition], partition in waiting, one.state == State.READY
                )
                for partition, one in held.items()
            }
            for partition, still_s in self._watchdog.observe(time.monotonic(), looks).items():
                log.error(
                    "partition %d: stands at %d for %.0f s while records wait; /livez says no",
                    partition, positions[partition], still_s,
                )  # fmt: skip

    async def renew_fallback(self) -> None:
        """Summaries of our partitions, and from all summaries the list of users without one."""
        while True:
            await asyncio.sleep(self.serving.fallback_every_s)
            tops = {
                partition: dict(self._most_popular(held.fold.popularity))
                for partition, held in self.held.items()
                if held.state == State.READY
            }
            try:
                first, serving = ranked_of([], []), self.runtime.serving()
                if 0 in tops:
                    want = self.serving.k + self.serving.margin
                    async with self.runtime.gate.shared():
                        serving = self.runtime.serving()
                        first = await asyncio.to_thread(self.runtime.first_list, want)
                await asyncio.to_thread(self._write_fallback, tops, first, serving)
            except (UnavailableError, ContractError) as error:
                log.warning("fallback list: %s; trying again", error)

    # What partitions ask of the consumer and the log --------------------------------------------

    def seek(self, partition: int, offset: int) -> None:
        """Read a partition from `offset` on."""
        self._consumer.seek_soon(self._tp(partition), offset)

    def pause(self, partition: int) -> None:
        """Fetch no more of a partition."""
        self._consumer.pause_partitions({self._tp(partition)})

    def resume(self, partition: int) -> None:
        """Fetch a partition again."""
        self._consumer.resume_partitions({self._tp(partition)})

    def applied(self, partition: int, position: int) -> None:
        """A partition's head stands at `position`."""
        self._consumer.progress[self._tp(partition)] = position

    def folded(self, took_s: float) -> None:
        """A chunk was folded in so long."""
        self._consumer.fold_s = took_s

    def edges(self, partition: int) -> LogEdges:
        """First and last offset of a partition, and whose log it is."""
        known = self.store.keys.partitions
        topics = check_topics(self.streams)
        if partition >= known:
            raise ContractError(
                grown_words(self.streams, topics.clicks_partitions, known),
                reason="partitions-changed",
            )
        start, end = self._log.edges(self.streams.clicks_topic, partition)
        return LogEdges(topics.clicks_id, start, end)

    def crc_at(self, partition: int, offset: int) -> int | None:
        """crc of one record, read again."""
        record = self._log.at(self.streams.clicks_topic, partition, offset)
        return record_crc(record.key, record.value) if record else None

    # Health -------------------------------------------------------------------------------------

    def live(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process works at all."""
        now_s = time.monotonic()
        silent_s, thread_silent_s = now_s - self._beat_s, now_s - self._thread_beat_s
        stuck = {
            str(partition): round(now_s - held.busy_since_s, 1)
            for partition, held in list(self.held.items())
            if held.busy_since_s is not None and now_s - held.busy_since_s > STUCK_S
        }
        stalled = {str(partition): s for partition, s in self._watchdog.stalled.items()}
        ok = max(silent_s, thread_silent_s) < STUCK_S and not stuck and not stalled
        return ok, {
            "event_loop_silent_s": round(silent_s, 1),
            "consumer_thread_silent_s": round(thread_silent_s, 1),
            "folding_for_s": stuck,
            "standing_still_for_s": stalled,
        }

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether every partition we hold is folded, and why not."""
        partitions = {
            str(p): {"state": held.state.value, "why": held.why}
            for p, held in sorted(dict(self.held).items())
        }
        loaded = self.runtime.loaded
        ok = (
            self._joined
            and self.runtime.ready
            and all(held.state == State.READY for held in self.held.values())
        )
        ok = ok and not self.app.rebalancing
        return ok, {
            "partitions": partitions,
            "publication": loaded.publication.number if loaded else 0,
            "release": loaded.publication.release if loaded else "",
            "provider": loaded.engine.provider if loaded else "",
            "refused_publications": {str(n): why for n, why in self.runtime.refused.items()},
            "items_read": self.runtime.ready,
            "joined": self._joined,
            "rebalancing": bool(self.app.rebalancing),
        }

    # Private ------------------------------------------------------------------------------------

    def _thread_beat(self) -> None:
        self._thread_beat_s = time.monotonic()

    def _look_at_log(self, positions: dict[int, int]) -> tuple[dict[int, int], set[int]]:
        topic, unmoved = self.streams.clicks_topic, self._watchdog.unmoved(positions)
        ends = self._watched_log.ends(topic, positions)
        return ends, self._watched_log.waiting(topic, unmoved)

    @property
    def _consumer(self) -> ChunkConsumer:
        return cast(ChunkConsumer, self.app.consumer)

    def _tp(self, partition: int) -> TP:
        return TP(self.streams.clicks_topic, partition)

    def _new_fold(self, partition: int) -> PartitionFold:
        topic, streams = self.streams.clicks_topic, self.streams

        def send(letters: list[DeadLetter]) -> None:
            self.dead_letters.send(topic, partition, letters)
            for letter in letters:
                self.metrics.dead_letters.labels(reason=letter.reason).inc()

        return PartitionFold(
            partition,
            self.store,
            ListRules.of(self.serving),
            Limits(streams.chunk_users_max, streams.chunk_records_max, streams.chunk_bytes_max),
            serving=self.runtime.serving,
            dead_letters=send,
            log_start=lambda: self._log.start(topic, partition),
            batch_ids=self._batches_of(),
            accept_loss=streams.accept_loss,
        )

    def _basis(self) -> Basis:
        serving = self.runtime.serving()
        return Basis(serving.publication, tuple(serving.catalog.offsets), serving.signals)

    def _new_renewal(self) -> Renewal:
        return Renewal(
            self.streams.renew_users_max,
            self.streams.renew_every_s,
            self._basis(),
            time.monotonic(),
        )

    def _timed_fold(
        self, parts: Sequence[Part], *, release: Release | None, catalog: Catalog
    ) -> list[Folded]:
        for part in parts:
            self._look_for_strays(part.partition, part.events)
        with self.metrics.engine_seconds.time():
            return fold(parts, release=release, catalog=catalog)

    def _look_for_strays(self, partition: int, events: Sequence[FoldEvent]) -> None:
        users, num = [event.user_id for event in events], self.store.keys.partitions
        astray = [user for user in users if partition_of(user, num) != partition]
        if not astray:
            return
        self.metrics.misplaced.inc(len(astray))
        if partition not in self._astray:
            self._astray.add(partition)  # once: a wrong partitioner is in every chunk
            log.warning(
                "partition %d: clicks of %d users, %r among them, belong to other partitions: a "
                "producer has another partitioner than Kafka's default, or an old partition count; "
                "readers and other clicks of these users do not meet them here",
                partition,
                len(set(astray)),
                astray[0],
            )

    def _batches_of(self) -> Any:
        name = uuid.uuid4().hex[:12]
        return (f"{name}-{n}" for n in itertools.count())

    def _most_popular(self, popularity: Popularity) -> list[tuple[str, int]]:
        return popularity.summary(SUMMARY_ITEMS, available=self.runtime.catalog.is_available)

    def _write_fallback(
        self, tops: dict[int, dict[str, int]], first: Ranked, serving: Serving
    ) -> None:
        """Summaries of our partitions, and the list.

        Args:
            tops: most popular items of our partitions.
            first: what the release gives a newcomer.
            serving: the release, and what it was asked with.
        """
        for partition, scores in tops.items():
            self.store.write_summary(partition, scores)
        if 0 not in tops:
            return  # the worker that holds partition 0 writes the list
        blended = serving.release is not None and serving.release.blend is not None
        ranked = first if blended else self._popular_first(first)
        body = encode_list(
            TopList(
                items=ranked.items,
                scores=ranked.scores if self.serving.list_scores else [],
                source="model" if blended else "popularity",
                release=serving.name,
                publication=serving.publication,
                items_offset=list(serving.catalog.offsets),
                partition=-1,
                offset=-1,
                event_ms=0,
                signals=serving.signals,
            )
        )
        self.store.write_fallback(body)

    def _popular_first(self, first: Ranked) -> Ranked:
        """What is popular in all partitions; a young stream knows few items: `first` follows."""
        total: dict[str, int] = {}
        for scores in self.store.read_summaries(self.store.keys.partitions):
            for item, score in scores.items():
                total[item] = total.get(item, 0) + score
        want = self.serving.k + self.serving.margin
        available = self.runtime.catalog.is_available
        ranked = sorted((-score, item) for item, score in total.items() if available(item))
        items = [item for _, item in ranked[:want]]
        scores_f = [float(-score) for score, _ in ranked[:want]]
        more = [item for item in first.items if item not in total][: max(0, want - len(items))]
        return ranked_of(items + more, scores_f + [0.0] * len(more))

    def _write_unavailable(self, change: UnavailableChange) -> None:
        self.store.write_unavailable(change.before, change.after, change.changes, change.whole)

    def _bad_item(self, partition: int, letter: DeadLetter) -> None:
        self.metrics.dead_letters.labels(reason=f"item-{letter.reason}").inc()
        if 0 in self.held:  # every worker reads all items: one of them writes the letter
            self.dead_letters.send(self.streams.items_topic, partition, [letter])


def run_worker(
    serving: ServingSettings, streams: StreamsSettings, *, log_level: str = "INFO"
) -> NoReturn:
    """Check the surroundings, then run until a signal ends it.

    Raises:
        ConfigError: topics, Redis or the namespace's partition count are not as needed.
        UnavailableError: Kafka or Redis did not answer within `start_timeout_s`.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(COLLECT_AFTER)
    choose_provider(serving.provider)
    for library in ("kafka", "aiokafka", "mode", "faust"):
        # Their INFO is a line per connection. Both Kafka clients' DEBUG is every request they send,
        # the one with the password included: that is never shown.
        loudest = logging.INFO if "kafka" in library else logging.DEBUG
        quiet = loudest if log_level.upper() == "DEBUG" else logging.WARNING
        logging.getLogger(library).setLevel(quiet)
    if log_level.upper() != "DEBUG":
        keep_back_repeats(("kafka", "aiokafka"))
    wait_for_broker(streams, streams.start_timeout_s)
    topics = check_topics(streams, streams.start_timeout_s)
    for note in topics.notes:
        log.warning("%s", note)
    store = wait_for_redis(serving, topics, streams.start_timeout_s)
    claim_namespace(store, serving, streams, topics)
    if topics.clicks_partitions > store.keys.partitions:
        log.error("%s", grown_words(streams, topics.clicks_partitions, store.keys.partitions))
    worker = Worker(serving, streams, topics, store)
    health = HealthServer(
        streams.host, streams.port, worker.live, worker.ready, worker.metrics.registry
    )
    health.start()
    log.info("health and metrics on port %d", health.port)
    runner = Runner(worker.app, stop_timeout_s=streams.stop_timeout_s, loglevel=log_level)
    runner.execute_from_commandline()
