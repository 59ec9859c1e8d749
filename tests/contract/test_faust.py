"""What Faust, mode, aiokafka, kafka-python, redis-py and tansu do that we lean on or work around.

Each test shows the behaviour itself. One that fails after an upgrade says that a workaround may go,
or that what we lean on is gone: its docstring names the place in our code.
"""

import asyncio
import gc
import inspect
import json
import logging
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from types import SimpleNamespace
from typing import Any

import aiokafka
import faust
import kafka
import kafka.errors
import mode
import pytest
import redis
from aiokafka.consumer.fetcher import READ_COMMITTED, Fetcher
from faust.transport.conductor import Conductor
from faust.transport.consumer import Consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from intervaltree import IntervalTree
from kafka.admin import KafkaAdminClient, NewTopic

from afterclick.serving.connection import connect
from afterclick.streams.admin import client_config
from afterclick.streams.bulk import BulkReader
from afterclick.streams.chunks import (
    ChunkConsumer,
    ChunkTransport,
    CommittedConsumerThread,
    rest_between_fetches,
)
from afterclick.streams.local import Redis
from afterclick.streams.log import LogReader, new_consumer
from afterclick.streams.processes import free_port
from afterclick.streams.record import record_of
from afterclick.streams.settings import StreamsSettings
from tests.conftest import ROOT

pytestmark = pytest.mark.service

AT = TP("clicks", 0)


# Names that we override or set -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_drain_messages", ["self", "fetcher"]),
        ("_wait_next_records", ["self", "timeout"]),
        ("_new_offset", ["self", "tp"]),
        ("_filter_tps_with_pending_acks", ["self", "topics"]),
        ("_new_consumer_thread", ["self"]),
        ("_to_message", ["self", "tp", "record"]),
        ("seek_to_committed", ["self"]),
        ("seek_wait", ["self", "partitions"]),
        ("track_message", ["self", "message"]),
        ("ack", ["self", "message"]),
        ("wait_empty", ["self"]),
        ("commit_and_end_transactions", ["self"]),
        ("on_buffer_drop", ["self", "tp"]),
        ("subscribe", ["self", "topics"]),
        ("_get_active_partitions", ["self"]),
        ("pause_partitions", ["self", "tps"]),
        ("resume_partitions", ["self", "tps"]),
        ("assignment", ["self"]),
        ("highwater", ["self", "tp"]),
    ],
)
def test_the_consumer_still_has_what_we_override_or_call(name: str, parameters: list[str]) -> None:
    """streams/chunks.py: an override of a method that nobody calls any more changes nothing."""
    assert list(inspect.signature(getattr(driver.Consumer, name)).parameters) == parameters


@pytest.mark.parametrize(
    ("caller", "called"),
    [
        (driver.Consumer._commit_tps, "_filter_committable_offsets"),
        (driver.Consumer._filter_committable_offsets, "_new_offset"),
        (driver.Consumer.force_commit, "_filter_tps_with_pending_acks"),
        (driver.Consumer.perform_seek, "seek_to_committed"),
        (driver.ThreadDelegateConsumer.__init__, "_new_consumer_thread"),
        (driver.AIOKafkaConsumerThread._create_consumer, "_create_worker_consumer"),
        (driver.AIOKafkaConsumerThread.on_start, "_create_consumer"),
        (Fetcher._fetch_requests_routine, "_proc_fetch_request"),
        (Conductor._subscriber.fun, "self.app.consumer.subscribe"),
        (faust.App._new_consumer, "transport"),
        (faust.App.transport.fget, "_new_transport"),
    ],
)
def test_the_methods_that_we_override_are_still_called(caller: Any, called: str) -> None:
    """streams/chunks.py and app.py: the other half of the same promise."""
    assert called in inspect.getsource(caller)


@asynccontextmanager
async def connected_to_nothing() -> AsyncIterator[Any]:
    """A consumer of ours, as Faust makes it."""
    app = faust.App("contract", broker="kafka://127.0.0.1:1", store="memory://", autodiscover=False)
    app.finalize()
    consumer = ChunkConsumer(
        ChunkTransport(app.conf.broker_consumer, app, loop=app.loop),
        callback=lambda message: None,
        on_partitions_revoked=lambda tps: None,
        on_partitions_assigned=lambda tps: None,
        loop=app.loop,
    )
    try:
        yield consumer
    finally:
        consumer._thread.thread_loop.close()


def test_our_isolation_and_fetch_wait_reach_aiokafka_s_fetcher(topics: StreamsSettings) -> None:
    """`CommittedConsumerThread` sets private names after construction: they must be read at start,
    and Faust must still not have them as settings.
    """

    async def scene() -> tuple[Any, int]:
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=topics.broker)
        consumer._isolation_level = "read_committed"
        consumer._fetch_max_wait_ms = 21
        await consumer.start()
        fetcher = consumer._fetcher
        await asyncio.sleep(0)  # a task that has not begun cannot be stopped by aiokafka
        await consumer.stop()
        return fetcher._isolation_level, fetcher._fetch_max_wait_ms

    assert asyncio.run(scene()) == (READ_COMMITTED, 21)
    source = inspect.getsource(driver.AIOKafkaConsumerThread._create_worker_consumer)
    assert "fetch_max_wait_ms=1500" in source
    assert 'isolation_level: str = "read_uncommitted"' in source
    assert issubclass(CommittedConsumerThread, driver.AIOKafkaConsumerThread)


def test_what_one_fetch_brought_is_one_message() -> None:
    """Each message costs Faust four tasks, and partitions that come apart are folded apart."""

    async def scene() -> list[Any]:
        messages: list[Any] = []
        async with connected_to_nothing() as consumer:
            consumer.flow_active = True
            tps = [TP("clicks", partition) for partition in range(3)]
            consumer.assignment = lambda: set(tps)
            consumer._to_message = lambda tp, record: SimpleNamespace(partition=tp.partition)
            consumer.records_max = 2
            consumer.seek_soon(tps[2], 7)

            async def take(message: Any) -> None:
                messages.append(message)

            consumer.callback = take
            raw = [
                SimpleNamespace(offset=at, timestamp=0, key=b"k", value=b"v", headers=())
                for at in range(3)
            ]
            await consumer._deliver({tps[0]: raw, tps[1]: raw[:1], tps[2]: raw})
            await consumer._deliver({tps[2]: raw})
        return messages

    (message,) = asyncio.run(scene())
    told = [(partition, chunk.begin, chunk.end) for partition, chunk in message.value]
    assert told == [(0, 0, 2), (0, 2, 3), (1, 0, 1)]


def test_the_broker_is_left_alone_for_longer_where_folds_take_longer() -> None:
    """Up to what the setting allows."""

    async def scene() -> list[float]:
        async with connected_to_nothing() as consumer:
            rests = [consumer.next_rest_s()]
            for took_s in (0.002, 0.5, 0.003):
                consumer.fold_s = took_s
                rests.append(consumer.next_rest_s())
            return rests

    assert asyncio.run(scene()) == [0.0, 0.004, 0.02, 0.006]


# What Faust loses by default ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(broker: Any) -> dict[str, Any]:
    """A plain app, run once: a batch whose agent fails, and a value that does not decode."""
    name = uuid.uuid4().hex[:8]
    taken, decoded = f"taken-{name}", f"decoded-{name}"
    with closing(KafkaAdminClient(bootstrap_servers=broker.address)) as admin:
        admin.create_topics([NewTopic(t, 1, 1) for t in (taken, decoded)])
    with closing(kafka.KafkaProducer(bootstrap_servers=broker.address)) as producer:
        for number in range(5):
            producer.send(taken, key=b"k", value=b"%d" % number)
        producer.send(decoded, key=b"k", value=b"not JSON")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.contract.faust_probe",
            broker.address,
            f"group-{name}",
            taken,
            decoded,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_take_acknowledges_what_its_agent_failed_on(seen: dict[str, Any]) -> None:
    """Why `ChunkConsumer` ignores acks: all five records are committed, none was processed."""
    assert "took 5" in seen["order"]
    assert seen["committed"]["taken"] == 5


def test_a_value_that_does_not_decode_is_committed_unseen(seen: dict[str, Any]) -> None:
    """Why `ChunkSchema` hands bytes through and streams/events.py decodes."""
    assert seen["processed"] == []
    assert seen["committed"]["decoded"] == 1


def test_partitions_are_announced_before_the_consumer_goes_to_committed_offsets(
    seen: dict[str, Any],
) -> None:
    """Why a seek asked for in on_partitions_assigned would be undone, and `seek_to_committed` is
    overridden to go to `progress` after it.
    """
    order = seen["order"]
    assert order.index("on_partitions_assigned") < order.index("seek_to_committed")


def test_a_new_offset_passes_a_message_in_flight() -> None:
    """Why `_new_offset` is overridden: 2585 was committed and is the next record, still being
    worked on; 2586 to 2589 are acknowledged, and Faust commits 2590. faust#606.
    """
    consumer = SimpleNamespace(
        _acked={AT: [2586, 2587, 2588, 2589]},
        _acked_index=defaultdict(set),
        _gap=defaultdict(IntervalTree),
        _committed_offset={AT: 2585},
    )
    assert Consumer._new_offset(consumer, AT) == 2590

    async def ours() -> tuple[list[TP], int | None]:
        async with connected_to_nothing() as consumer:
            consumer.progress[AT] = 2585
            consumer._acked[AT] = [2586, 2587]
            return list(consumer._filter_tps_with_pending_acks()), consumer._new_offset(AT)

    assert asyncio.run(ours()) == ([AT], 2585)


def test_a_failed_commit_is_remembered_as_done() -> None:
    """Why committed offsets are a hint for lag tools only. faust#316."""

    async def scene() -> tuple[bool, Any]:
        async def refused(_offsets: Any) -> bool:
            return False

        async def flush() -> None: ...

        ignore = SimpleNamespace(
            dev=lambda *_: None, info=lambda *_: None, isEnabledFor=lambda _: False
        )
        consumer = SimpleNamespace(
            log=ignore,
            assignment=lambda: {AT},
            in_transaction=False,
            app=SimpleNamespace(
                producer=SimpleNamespace(flush=flush),
                monitor=SimpleNamespace(on_tp_commit=lambda _: None),
                tables=None,
            ),
            _commit=refused,
            _committed_offset={AT: 1},
        )
        return await Consumer._commit_offsets(consumer, {AT: 9}), consumer._committed_offset[AT]

    assert asyncio.run(scene()) == (False, 9)


def test_waiting_for_acks_has_no_deadline() -> None:
    """Why `wait_empty` is overridden and a stop has a hard end: a lost ack hangs the process.
    faust#527.
    """

    class EnoughError(Exception):
        pass

    class Message:
        acked, refcount = False, 1

    turns = 0

    async def no_ack(**_: Any) -> None:
        nonlocal turns
        turns += 1
        if turns == 20:
            raise EnoughError

    async def scene() -> None:
        async with connected_to_nothing() as ours:
            ours._unacked_messages = {Message()}
            ours._wait_for_ack, ours.commit = no_ack, no_commit
            with pytest.raises(EnoughError):
                await driver.Consumer.wait_empty(ours)
            ours.commit_and_end_transactions = no_commit
            await ours.wait_empty()  # ours returns

    async def no_commit(*_: Any, **__: Any) -> None: ...

    asyncio.run(scene())
    assert turns == 20


def test_faust_s_own_watchdog_cannot_fire() -> None:
    """Why streams/watchdog.py exists: seconds since boot minus seconds since 1970 is never large,
    here for a fetch that was an hour ago.
    """
    logged: list[str] = []
    hour_ago_ms = int((time.time() - 3600) * 1000)
    assignment = SimpleNamespace(
        active=True, state_value=lambda _: SimpleNamespace(timestamp=hour_ago_ms)
    )
    thread = SimpleNamespace(
        _ensure_consumer=lambda: SimpleNamespace(
            _fetcher=SimpleNamespace(
                _subscriptions=SimpleNamespace(subscription=SimpleNamespace(assignment=assignment))
            )
        ),
        time_started=0.0,
        tp_fetch_request_timeout_secs=60.0,
        log=SimpleNamespace(error=lambda message, *_: logged.append(message)),
    )
    now_s = time.monotonic()

    fired = driver.AIOKafkaConsumerThread._verify_aiokafka_event_path(thread, now_s, AT)

    assert (fired, logged) == (False, [])


def test_the_group_is_joined_once_there_is_something_to_fold_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Partitions of a worker that still loads its release would stand still meanwhile: 3.7 s of
    them on Kafka, before.
    """

    async def scene() -> list[list[str]]:
        seen: list[list[str]] = []
        prepared = asyncio.Event()
        monkeypatch.setattr(ChunkConsumer, "prepared", prepared)
        async with connected_to_nothing() as consumer:

            async def subscribe(topics: list[str]) -> None:
                seen.append(list(topics))

            consumer._thread.subscribe = subscribe
            joining = asyncio.create_task(consumer.subscribe(["clicks"]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert seen == []
            prepared.set()
            await joining
        return seen

    assert asyncio.run(scene()) == [["clicks"]]


def test_a_queue_with_room_again_fetches_a_paused_partition() -> None:
    """Why `on_buffer_drop` is overridden: a partition paused at `backlog_records_max` would be
    fetched on, and its backlog grow for as long as Redis is away.
    """

    async def scene(drop: Any) -> set[TP]:
        async with connected_to_nothing() as consumer:
            consumer._active_partitions = {AT}
            consumer.app.in_recovery = False
            consumer.on_buffer_full(AT)
            consumer.pause_partitions([AT])
            drop(consumer, AT)
            return set(consumer._active_partitions)

    assert asyncio.run(scene(Consumer.on_buffer_drop)) == {AT}
    assert asyncio.run(scene(ChunkConsumer.on_buffer_drop)) == set()


def test_a_crashing_supervisor_ends_the_app_on_an_agent_s_exception() -> None:
    """`agent_supervisor`: the default restarts the agent, which has lost its place. That the
    process ends is in tests/service/test_liveness.py.
    """
    assert (
        faust.App("contract", autodiscover=False).conf.agent_supervisor is mode.OneForOneSupervisor
    )
    assert issubclass(mode.CrashingSupervisor, mode.SupervisorStrategy)


# aiokafka and kafka-python -----------------------------------------------------------------------


@pytest.fixture
def ten(topics: StreamsSettings) -> StreamsSettings:
    """Ten records in partition 0, sent as one batch."""
    with closing(
        kafka.KafkaProducer(**client_config(topics), linger_ms=1000, acks="all")
    ) as producer:
        for number in range(10):
            producer.send(
                topics.clicks_topic,
                key=b"k",
                value=b"%d" % number,
                headers=[("h", b"1")],
                partition=0,
                timestamp_ms=1000 + number,
            )
        producer.flush(timeout=20)
    return topics


async def _offsets(settings: StreamsSettings, *steps: Any) -> list[list[int]]:
    """What getmany gives after each seek; None goes on."""
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=settings.broker, auto_offset_reset="earliest", enable_auto_commit=False
    )
    tp = aiokafka.TopicPartition(settings.clicks_topic, 0)
    await consumer.start()
    try:
        consumer.assign([tp])
        found = []
        for step in steps:
            if step is not None:
                consumer.seek(tp, step)
            records: list[Any] = []
            async with asyncio.timeout(20):
                while not records:
                    records = (await consumer.getmany(tp, timeout_ms=500, max_records=3)).get(
                        tp, []
                    )
            found.append([record.offset for record in records])
        return found
    finally:
        await consumer.stop()


def test_a_seek_drops_what_aiokafka_had_fetched_before_it(ten: StreamsSettings) -> None:
    """`ChunkConsumer._apply_seeks`: a chunk that begins where was sought holds nothing older."""
    assert asyncio.run(_offsets(ten, 0, None, 7)) == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]


def test_a_fetch_that_brought_records_is_followed_by_a_rest(topics: StreamsSettings) -> None:
    """`rest_between_fetches` wraps a private method: what it brought must be had at once, what
    comes meanwhile in one piece, and a consumer that rests must still stop.
    """
    rest_s, tp = 2.0, aiokafka.TopicPartition(topics.clicks_topic, 0)

    async def scene() -> tuple[int, float, int, float]:
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=topics.broker)
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=topics.broker, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await producer.start()
        await consumer.start()
        rest_between_fetches(consumer._fetcher, lambda: rest_s)
        loop = asyncio.get_running_loop()
        try:
            consumer.assign([tp])
            await producer.send_and_wait(tp.topic, b"0", partition=0)
            first = await consumer.getmany(tp, timeout_ms=20_000)
            begun_s = loop.time()
            for number in range(1, 6):
                await producer.send_and_wait(tp.topic, b"%d" % number, partition=0)
            sent_s = loop.time() - begun_s
            more = await consumer.getmany(tp, timeout_ms=20_000)
            return len(first[tp]), sent_s, len(more[tp]), loop.time() - begun_s
        finally:
            async with asyncio.timeout(rest_s / 2):
                await consumer.stop()
            await producer.stop()

    first, sent_s, more, after_s = asyncio.run(scene())
    assert first == 1
    assert more == 5 or sent_s > rest_s, "this machine was too busy to tell"
    assert after_s > rest_s / 2


@pytest.mark.kafka
def test_a_position_past_the_log_s_end_starts_over_at_its_beginning_in_silence(
    ten: StreamsSettings,
) -> None:
    """Why `Chunk.rewound` exists: without it all clicks would be taken for old until the new log
    is as long as the lost one was.
    """
    assert asyncio.run(_offsets(ten, 5_000)) == [[0, 1, 2]]


def test_a_record_is_the_same_through_both_clients(ten: StreamsSettings) -> None:
    """`record_of`: the worker reads with one, `verify` with the other, and crcs must agree."""

    async def through_aiokafka() -> Any:
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=ten.broker, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await consumer.start()
        try:
            consumer.assign([aiokafka.TopicPartition(ten.clicks_topic, 0)])
            return record_of(await asyncio.wait_for(consumer.getone(), 20))
        finally:
            await consumer.stop()

    with closing(LogReader(ten)) as reader:
        assert reader.at(ten.clicks_topic, 0, 0) == asyncio.run(through_aiokafka())


def test_the_latest_offset_is_the_log_s_end_except_on_tansu(
    ten: StreamsSettings, request: pytest.FixtureRequest
) -> None:
    """Why `LogReader.edges` reads the high watermark: tansu answers with its last batch's first
    record, plus one.
    """
    tp = kafka.TopicPartition(ten.clicks_topic, 0)
    with closing(new_consumer(ten)) as consumer, closing(LogReader(ten)) as reader:
        told = consumer.end_offsets([tp])[tp]
        assert reader.edges(ten.clicks_topic, 0) == (0, 10)
    assert told == (10 if request.config.getoption("broker") == "kafka" else 1)


def test_assigning_the_same_partitions_again_keeps_them_paused(ten: StreamsSettings) -> None:
    """Why `LogReader.waiting` resumes what it paused: the next read would get nothing."""
    tp = kafka.TopicPartition(ten.clicks_topic, 0)
    with closing(new_consumer(ten)) as consumer:
        consumer.assign([tp])
        consumer.pause(tp)
        consumer.assign([tp])
        assert consumer.paused() == {tp}


def test_kafka_python_leaves_the_socket_of_a_refused_connection_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Why `_wait_for_port` tries plain connections first, and tests that kill a Kafka forgive
    unclosed sockets (tests/conftest.py).
    """
    caplog.set_level(logging.CRITICAL, "kafka")  # log records hold the sockets by their tracebacks
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not connects(f"127.0.0.1:{free_port()}")
        gc.collect()
    assert [w for w in caught if "unclosed <socket" in str(w.message)]


def connects(address: str) -> bool:
    """Whether a consumer finds its broker; keeps no exception."""
    try:
        kafka.KafkaConsumer(bootstrap_servers=address, bootstrap_timeout_ms=300).close()
    except kafka.errors.KafkaError:
        return False
    return True


# redis-py ----------------------------------------------------------------------------------------


@pytest.fixture
def deaf_once(redis_server: Redis) -> Iterator[int]:
    """Port of a way to Redis that swallows the answer to the first script, connection and all."""
    listener = socket.create_server(("127.0.0.1", 0))
    swallowed = threading.Event()

    def pipe(source: socket.socket, sink: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(65536):
                if answers and not swallowed.is_set() and data.startswith(b":"):
                    swallowed.set()
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    threads = []
    sockets = []

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", redis_server.port))
            sockets.extend([near, far])
            for arguments in ((near, far, False), (far, near, True)):
                thread = threading.Thread(target=pipe, args=arguments)
                thread.start()
                threads.append(thread)

    server = threading.Thread(target=serve)
    server.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    server.join()
    for end in sockets:
        end.close()
    for thread in threads:
        thread.join()


def test_a_script_whose_answer_is_lost_is_sent_again(
    deaf_once: int, redis_url: str, namespace: str
) -> None:
    """Why a head holds the id of its write: `COMMIT` runs twice and must find itself."""
    with closing(connect(f"redis://127.0.0.1:{deaf_once}/0")) as client:
        count = client.register_script("return redis.call('INCR', KEYS[1])")
        assert count(keys=[f"{namespace}:count"]) == 2
    with redis.Redis.from_url(redis_url) as server:
        assert server.get(f"{namespace}:count") == b"2"


def test_a_fetcher_that_is_closed_in_its_pause_after_an_error_raises(
    topics: StreamsSettings,
) -> None:
    """Why `BulkReader.close` goes on by itself: a fetch that timed out while its caller computed
    would end `afterclick verify` after all was well, and leave its connections open.
    """
    topic = topics.clicks_topic
    with closing(kafka.KafkaProducer(bootstrap_servers=topics.broker)) as producer:
        producer.send(topic, b"v", partition=0).get(20)
    reader = BulkReader(topics)
    batches = reader.read(topic, 0, 0, 2)
    assert len(next(batches)) == 1
    consumer = reader._consumer

    async def fail() -> None:
        consumer._fetcher._retry_backoff = 60.0
        for connection in consumer._client._conns.values():
            connection._request_timeout = 0.001
        await asyncio.sleep(1.0)

    reader._run(fail())
    reader.close()
    assert not any(connection.connected() for connection in consumer._client._conns.values())
