"""Faust, as a worker needs it: the app with its one topic and agent, and a process that ends.

The path of a chunk: `ChunkConsumer` → Faust's conductor → the agent below → whoever `Clicks` says.
Faust brings group membership, rebalancing, commits and the process's life-cycle. Knows nothing of
what becomes of a chunk.
"""

import asyncio
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, cast

import faust
import mode
from faust.types import TP

from afterclick.streams.chunks import ChunkConsumer, ChunkSchema, ChunkTransport
from afterclick.streams.record import Chunk
from afterclick.streams.security import broker_credentials
from afterclick.streams.settings import StreamsSettings

METADATA_AGE_MS = 10_000
"""How soon a topic that got more partitions is noticed: until then they are read by nobody."""

HEARTBEAT_S = 0.5
"""How soon a worker hears that another one joined or left: until then partitions stand still. With
a fifth of the session, 2 s, those of a worker that was stopped stood for 1.9 s.
"""

log = logging.getLogger(__name__)


class Clicks(Protocol):
    """Who takes what Faust brings."""

    def deliver(self, partition: int, chunk: Chunk) -> None:
        """A chunk of a partition; of one that was taken away meanwhile, too."""

    async def assigned(self, tps: set[TP]) -> None: ...  # noqa: D102
    async def revoked(self, tps: set[TP]) -> None: ...  # noqa: D102


class _App(faust.App):
    """A Faust app whose consumer delivers chunks, and whose stop has a hard end."""

    stop_timeout_s = 10.0
    first: tuple[Callable[[], Awaitable[None]], ...] = ()
    """Run from the start on; Faust begins its tasks only once the group was joined."""

    async def on_start(self) -> None:
        """Begin what does not wait for partitions."""
        await super().on_start()
        for task in self.first:
            self.add_future(task())

    async def stop(self) -> None:
        """Stop, or end the process: after a crash Faust now and then waits for its own consumer
        for ever.
        """
        end = _end_after(self.stop_timeout_s, lambda: int(self.crashed))
        try:
            await super().stop()
        finally:
            end.cancel()

    def _new_transport(self) -> Any:
        return ChunkTransport(self.conf.broker_consumer, self, loop=self.loop)


def build_app(
    streams: StreamsSettings,
    clicks: Clicks,
    *,
    prepared: asyncio.Event,
    first: tuple[Callable[[], Awaitable[None]], ...],
    tasks: tuple[Callable[[], Awaitable[None]], ...],
) -> faust.App:
    """A Faust app whose one agent hands chunks on.

    Args:
        streams: where Kafka is, and how it is read.
        clicks: who takes them.
        prepared: the group is joined once it is set.
        first: run from the start on.
        tasks: run from then on.
    """
    app = _App(
        streams.group,
        broker=";".join(f"kafka://{address}" for address in streams.broker.split(",")),
        broker_credentials=broker_credentials(streams),
        store="memory://",
        # Faust makes this folder and keeps nothing in it: not where the worker was started.
        datadir=str(Path(tempfile.gettempdir()) / "afterclick-faust"),
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=streams.instance or None,
        broker_session_timeout=streams.session_timeout_s,
        broker_heartbeat_interval=HEARTBEAT_S,
        broker_rebalance_timeout=streams.rebalance_timeout_s,
        broker_request_timeout=max(30.0, streams.session_timeout_s * 2),
        broker_max_poll_records=streams.backlog_records_max,
        broker_commit_interval=1.0,
        broker_max_poll_interval=600.0,
        stream_wait_empty=False,
        stream_buffer_maxsize=64,
        agent_supervisor=mode.CrashingSupervisor,
        worker_redirect_stdouts=False,
        consumer_max_fetch_size=8 << 20,
        consumer_metadata_max_age_ms=METADATA_AGE_MS,
    )
    ChunkConsumer.records_max = streams.chunk_records_max
    ChunkConsumer.fetch_wait_ms = streams.fetch_wait_ms
    ChunkConsumer.fetch_rest_ms = streams.fetch_rest_ms
    ChunkConsumer.prepared = prepared
    topic = app.topic(streams.clicks_topic, schema=ChunkSchema())

    async def fold_clicks(stream: Any) -> None:
        async for event in stream.events():
            for partition, chunk in event.value:
                clicks.deliver(partition, chunk)

    app.agent(topic, name="fold_clicks", concurrency=1)(fold_clicks)

    async def on_assigned(_app: Any, *args: Any, **_: Any) -> None:
        await clicks.assigned({tp for tp in args[0] if tp.topic == streams.clicks_topic})

    async def on_revoked(_app: Any, *args: Any, **_: Any) -> None:
        await clicks.revoked({tp for tp in args[0] if tp.topic == streams.clicks_topic})

    app.on_partitions_assigned.connect(cast(Any, on_assigned), weak=False)
    app.on_partitions_revoked.connect(cast(Any, on_revoked), weak=False)
    app.first = first
    app.stop_timeout_s = streams.stop_timeout_s
    for task in tasks:
        app.task(task)
    return app


class Runner(faust.Worker):
    """Faust's worker with a hard end: leaving without a commit is safe, hanging is not."""

    def __init__(self, app: faust.App, *, stop_timeout_s: float, loglevel: str) -> None:
        super().__init__(app, loglevel=loglevel, redirect_stdouts=False, quiet=False)
        self._stop_timeout_s = stop_timeout_s

    def _schedule_shutdown(self, signal: Any) -> None:
        _end_after(self._stop_timeout_s, lambda: 0)
        super()._schedule_shutdown(signal)


def _end_after(timeout_s: float, exit_code: Callable[[], int]) -> threading.Timer:
    """End the process in a while, unless the timer is cancelled."""

    def give_up() -> None:
        log.warning(
            "not stopped after %.0f s; ending: the heads in Redis say how far we came", timeout_s
        )
        sys.stderr.flush()
        os._exit(exit_code())

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    return timer
