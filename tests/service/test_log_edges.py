"""Logs that changed under a head, or hold more than records: refused or handled, each by name.

The rules themselves are in tests/unit/streams/test_log_edges.py; here real brokers make the edges.
A topic created anew while no worker runs is in test_outages.py, more partitions in test_migrate.py,
bad keys in test_worker.py.
"""

import contextlib
import json
import os
import re
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import kafka
import msgspec
import pytest
import redis
from kafka.admin import KafkaAdminClient

from afterclick.serving.reader import TopK
from afterclick.serving.records import Head
from afterclick.streams.admin import client_config, create_topics
from afterclick.streams.events import encode
from afterclick.streams.local import Worker, afterclick_argv, readiness
from afterclick.streams.log import LogReader
from afterclick.streams.processes import Process, free_port
from tests.service.stage import Stage, some_clicks
from tests.service.test_liveness import liveness

pytestmark = [pytest.mark.service, pytest.mark.parametrize("topics", [(1, 1)], indirect=True)]

STALL_S = 3.0


@contextlib.contextmanager
def admin(stage: Stage) -> Iterator[Any]:
    with closing(KafkaAdminClient(**client_config(stage.streams))) as client:
        yield client


def refusal(stage: Stage) -> str:
    """Why a fresh worker refuses partition 0."""
    port = free_port()
    process = Process(
        "refusing worker",
        afterclick_argv("worker"),
        log=stage.folder / f"refusing-{port}.log",
        env={**os.environ, **stage.env, "AFTERCLICK_STREAMS__PORT": str(port)},
    )
    worker = Worker(process, port, lambda: '"refused","why"' in readiness(port)[1], 90)
    try:
        worker.start()
        return str(json.loads(readiness(port)[1])["partitions"]["0"]["why"])
    finally:
        worker.kill()


def change_head(stage: Stage, **fields: Any) -> None:
    with redis.Redis.from_url(stage.serving.redis) as server:
        name = stage.keys.head(0)
        head = msgspec.json.decode(server.get(name), type=Head)
        server.set(name, msgspec.json.encode(msgspec.structs.replace(head, **fields)))


@pytest.fixture
def folded(stage: Stage) -> Stage:
    """Twenty clicks, folded; no worker runs."""
    stage.publish("r1", seed=1)
    stage.send(some_clicks(20))
    with stage.worker():
        stage.wait_folded()
    return stage


def test_a_head_past_the_log_s_end_is_refused(folded: Stage) -> None:
    """A leader elected uncleanly lost acknowledged records: what is folded is not in the log."""
    change_head(folded, next=25)
    assert "the head is at 25, the log ends at 20: the log lost records" in refusal(folded)
    assert folded.heads() == {0: 25}


def test_a_last_record_that_reads_otherwise_is_refused(folded: Stage) -> None:
    """The log was rewritten up to another record than the one folded."""
    change_head(folded, last_crc=1)
    assert "the record at offset 19 is not the one that was folded" in refusal(folded)


@pytest.mark.kafka
def test_a_topic_created_anew_under_a_running_worker_is_refused(stage: Stage) -> None:
    """The consumer starts over at 0 in silence, and every new click looks like an old one."""
    stage.publish("r1", seed=1)
    with stage.worker() as worker:
        stage.send(some_clicks(20))
        stage.wait_folded()
        with admin(stage) as client:
            client.delete_topics([stage.streams.clicks_topic])

            def created() -> bool:
                with contextlib.suppress(Exception):
                    create_topics(stage.streams, partitions=1, replication=1)
                    stage.send(some_clicks(5, start=100))
                    return True
                return False

            stage.wait(created, "the topic is there again")
        stage.wait(
            lambda: not worker.process.running or "created anew" in readiness(worker.port)[1],
            "the worker refuses the new log, or ends",
        )
        with TopK(stage.serving.redis, namespace=stage.serving.namespace) as top_k:
            assert top_k.folded_to(0) == 20  # not by `stage.heads()`, which refuses the topic too


@pytest.mark.kafka
def test_records_dropped_before_they_were_folded_are_refused_or_counted(folded: Stage) -> None:
    """Retention shorter than an outage: the operator decides, and the number is told."""
    folded.send(some_clicks(20, start=20))
    with admin(folded) as client:
        client.delete_records({kafka.TopicPartition(folded.streams.clicks_topic, 0): 30})
    assert "the log starts at 30: 10 records were dropped" in refusal(folded)
    assert folded.heads() == {0: 20}
    with folded.worker(AFTERCLICK_STREAMS__ACCEPT_LOSS="true") as worker:
        folded.wait_folded()
        assert metric(worker, "afterclick_lost_records_total") == 10
        assert metric(worker, "afterclick_clicks_total") == 10


def metric(worker: Worker, name: str) -> float:
    page = urllib.request.urlopen(f"{worker.url}/metrics").read().decode()  # noqa: S310
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert found, f"no {name}"
    return float(found[1])


@pytest.mark.kafka
def test_transactions_are_folded_once_committed_and_their_markers_are_no_stop(
    stage: Stage,
) -> None:
    """Markers leave gaps that no head can stand in, the last one for ever; an aborted click never
    was, and one of an open transaction is not yet.
    """
    stage.publish("r1", seed=1)
    clicks = some_clicks(40)
    with (
        stage.worker(AFTERCLICK_STREAMS__STALL_S=str(STALL_S)) as worker,
        closing(transactional(stage)) as producer,
        closing(LogReader(stage.streams)) as reader,
    ):
        for turn in range(4):
            producer.begin_transaction()
            for click in clicks[10 * turn : 10 * turn + 10]:
                key, value = encode(click)
                producer.send(stage.streams.clicks_topic, key=key, value=value)
            producer.flush()  # else an abort drops them before they are in the log
            if turn % 2:
                producer.abort_transaction()
            else:
                producer.commit_transaction()
        stage.wait(lambda: metric(worker, "afterclick_clicks_total") == 20, "both committed ones")
        # Ten records and a marker each: the last committed record is at 31, the log's end at 44.
        assert stage.ends() == {0: 44}
        assert stage.heads() == {0: 32}
        assert reader.waiting(stage.streams.clicks_topic, {0: 32}) == set()
        assert reader.waiting(stage.streams.clicks_topic, {0: 31}) == {0}
        producer.begin_transaction()
        producer.send(stage.streams.clicks_topic, key=b"u1", value=encode(clicks[0])[1])
        producer.flush()
        looks = [liveness(worker.port)[0] for _ in over(stage, 2 * STALL_S)]
        assert set(looks) == {200}
        assert readiness(worker.port)[0]
        producer.abort_transaction()
        stage.send(some_clicks(10, start=40))
        stage.wait(lambda: metric(worker, "afterclick_clicks_total") == 30, "those after the gap")
    report = stage.verify()
    assert report.first_difference is None
    assert report.clicks == 30


def over(stage: Stage, seconds: float) -> Iterator[int]:
    """Turns until the time is over."""
    until_s = time.monotonic() + seconds
    turn = 0
    while time.monotonic() < until_s:
        yield turn
        turn += 1
        time.sleep(0.2)


def transactional(stage: Stage) -> Any:
    producer = kafka.KafkaProducer(
        **client_config(stage.streams), transactional_id=uuid.uuid4().hex, acks="all"
    )
    producer.init_transactions()
    return producer
