"""A worker whose ingestion stops: either its process ends or /livez says so."""

import contextlib
import http.client
import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest
import redis

from afterclick.serving.records import Head
from afterclick.streams.local import Worker, readiness
from afterclick.streams.processes import Process, free_port
from tests.conftest import ROOT
from tests.service.stage import Stage, some_clicks

pytestmark = pytest.mark.service

STALL_S = 3.0


def liveness(port: int) -> tuple[int, dict[str, object]]:
    """Status and detail of /livez; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        return answer.status, msgspec.json.decode(answer.read())
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        connection.close()


@contextlib.contextmanager
def faulty(stage: Stage, fault: str) -> Iterator[Worker]:
    """A ready worker in which `fault` happens at SIGUSR1."""
    port = free_port()
    process = Process(
        f"worker with {fault}",
        [sys.executable, "-m", "tests.service.faulty_worker", fault],
        log=stage.folder / f"{fault}.log",
        env={
            **os.environ,
            **stage.env,
            "AFTERCLICK_STREAMS__PORT": str(port),
            "AFTERCLICK_STREAMS__HOST": "127.0.0.1",
            "AFTERCLICK_STREAMS__STALL_S": str(STALL_S),
            "AFTERCLICK_STREAMS__STOP_TIMEOUT_S": "5",
        },
        cwd=ROOT,
    )
    worker = Worker(process, port, lambda: readiness(port)[0], 90)
    try:
        worker.start()
        yield worker
    finally:
        worker.kill()


def noticed(worker: Worker) -> str:
    """How a stop shows from outside; empty while it doesn't."""
    if not worker.process.running:
        return f"ended with {worker.process.exit_code}"
    status, detail = liveness(worker.port)
    return "/livez: " + msgspec.json.encode(detail).decode() if status == 503 else ""


@pytest.mark.parametrize(
    ("fault", "shows"),
    [
        ("paused", r"\"standing_still_for_s\":{\"0\":[3-9]"),
        ("partition_ends", r"\"standing_still_for_s\":{\"0\":[3-9]"),
        ("thread_ends", r"\"consumer_thread_silent_s\":[3-9]"),
        ("fetch_fails", "ended with 1"),
        ("agent_fails", "ended with 1"),
    ],
    ids=["paused", "partition_ends", "thread_ends", "fetch_fails", "agent_fails"],
)
def test_ingestion_that_stops_is_noticed(stage: Stage, fault: str, shows: str) -> None:
    """Faust's own watchdog cannot fire, and a consumer that stopped still sends heartbeats: without
    ours the partitions would stand still until a person looks. What Faust does notice ends the
    process (`CrashingSupervisor`), and the next start goes on from the heads.
    """
    with faulty(stage, fault) as worker:
        stage.send(some_clicks(20))
        stage.wait_folded()
        assert liveness(worker.port)[0] == 200
        worker.process.signal(signal.SIGUSR1)
        sent = [20]

        def stopped() -> bool:
            # A fetch that was under way may still bring some.
            stage.send(some_clicks(2, start=sent[0]))
            sent[0] += 2
            return re.search(shows, noticed(worker)) is not None

        stage.wait(stopped, f"{fault} is noticed as {shows}", timeout_s=30)


def test_what_a_restart_cannot_mend_does_not_fail_liveness(stage: Stage) -> None:
    """A held partition stands still while records wait; restarting would only hide why."""
    stage.send(some_clicks(20))
    with faulty(stage, "paused") as worker:
        stage.wait_folded()
        ends = stage.ends()
        with redis.Redis.from_url(stage.serving.redis) as server:
            for partition in ends:
                head = msgspec.json.decode(server.get(stage.keys.head(partition)), type=Head)
                held = msgspec.structs.replace(head, hold="a test")
                server.set(stage.keys.head(partition), msgspec.json.encode(held))
        stage.send(some_clicks(20, start=20))
        stage.wait(lambda: "held: a test" in readiness(worker.port)[1], "the hold shows")
        until_s = time.monotonic() + 2 * STALL_S
        stage.wait(lambda: time.monotonic() > until_s, "twice the time that makes a stop")
        assert liveness(worker.port)[0] == 200
        assert stage.heads() == ends
