"""Kafka or Redis away at start and in mid-run, and surroundings that a worker must refuse."""

import subprocess
import uuid
from pathlib import Path

import pytest
import redis

from afterclick.serving.errors import ConfigError
from afterclick.streams.admin import create_topics
from afterclick.streams.local import (
    afterclick_argv,
    local_broker,
    local_kafka,
    local_redis,
    readiness,
)
from afterclick.streams.processes import free_port
from afterclick.streams.settings import StreamsSettings
from tests.conftest import ROOT
from tests.service.stage import Stage, some_clicks

pytestmark = pytest.mark.service


def run_worker(env: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a worker that must end by itself."""
    done = subprocess.run(
        afterclick_argv("worker"),
        env={"AFTERCLICK_STREAMS__PORT": "0", "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_redis_away_in_mid_run_is_waited_for_and_nothing_is_lost(
    topics: StreamsSettings, namespace: str, tmp_path: Path
) -> None:
    """Clicks wait in the log; the worker says why it is not ready and goes on by itself."""
    (tmp_path / "redis").mkdir()
    with local_redis(tmp_path / "redis", appendonly=True) as server:
        stage = Stage(topics, server.url, namespace, tmp_path)
        stage.publish("r1", seed=1)
        with stage.worker() as worker:
            stage.send(some_clicks(100))
            stage.wait_folded()
            server.kill()
            stage.send(some_clicks(100, start=100))
            stage.wait(lambda: "redis" in readiness(worker.port)[1], "readyz names Redis")
            assert not readiness(worker.port)[0]
            server.start()
            stage.wait_folded()
            stage.wait(lambda: readiness(worker.port)[0], "ready again")
        report = stage.verify()
        stage.close()
    assert report.first_difference is None
    assert report.clicks == 200


def test_a_flushed_redis_is_filled_again_from_the_log(stage: Stage) -> None:
    """FLUSHALL by accident: the head is gone, so folding starts at the log's beginning."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(80))
        stage.wait_folded()
        with redis.Redis.from_url(stage.serving.redis) as server:
            keys = list(server.scan_iter(match=f"*{stage.serving.namespace}*"))
            server.delete(*keys)
        stage.wait_folded()
    report = stage.verify()
    assert report.first_difference is None
    assert (report.clicks, report.records) == (80, 40)


@pytest.mark.kafka
def test_a_broker_killed_and_restarted_loses_no_acknowledged_click(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """The log outlives the broker, and the worker outlives its absence."""
    with local_kafka(tmp_path / "kafka", cache=ROOT / ".cache" / "kafka") as broker:
        name = uuid.uuid4().hex[:8]
        streams = StreamsSettings(broker=broker.address, group=f"group-{name}")
        create_topics(streams, partitions=2, replication=1)
        stage = Stage(streams, redis_url, namespace, tmp_path)
        stage.publish("r1", seed=1)
        with stage.worker():
            stage.send(some_clicks(100))
            stage.wait_folded()
            broker.kill()
            broker.start()
            stage.send(some_clicks(100, start=100))
            stage.wait_folded()
        report = stage.verify()
        stage.close()
    assert report.first_difference is None
    assert report.clicks == 200


def test_kafka_away_at_start_ends_with_its_address_after_the_time_given(redis_url: str) -> None:
    """An orchestrator restarts it; the message must say what is missing."""
    address = f"127.0.0.1:{free_port()}"
    code, output = run_worker(
        {
            "AFTERCLICK_STREAMS__BROKER": address,
            "AFTERCLICK_STREAMS__START_TIMEOUT_S": "1.5",
            "AFTERCLICK_SERVING__REDIS": redis_url,
        }
    )
    assert code == 3
    assert address in output
    assert "Traceback" not in output


def test_redis_away_at_start_ends_with_its_address_but_no_password(
    topics: StreamsSettings, namespace: str
) -> None:
    """Secrets stay out of logs."""
    port = free_port()
    code, output = run_worker(
        {
            "AFTERCLICK_STREAMS__BROKER": topics.broker,
            "AFTERCLICK_STREAMS__CLICKS_TOPIC": topics.clicks_topic,
            "AFTERCLICK_STREAMS__ITEMS_TOPIC": topics.items_topic,
            "AFTERCLICK_STREAMS__SIGNALS_TOPIC": topics.signals_topic,
            "AFTERCLICK_STREAMS__START_TIMEOUT_S": "1.5",
            "AFTERCLICK_SERVING__REDIS": f"redis://:hidden-word@127.0.0.1:{port}/0",
        }
    )
    assert code == 3
    assert str(port) in output
    assert "hidden-word" not in output


def test_missing_topics_end_the_start_with_the_command_that_creates_them(
    broker_address: str, redis_url: str
) -> None:
    """Exit 2: an operator must act."""
    code, output = run_worker(
        {
            "AFTERCLICK_STREAMS__BROKER": broker_address,
            "AFTERCLICK_STREAMS__CLICKS_TOPIC": f"absent-{uuid.uuid4().hex[:8]}",
            "AFTERCLICK_SERVING__REDIS": redis_url,
        }
    )
    assert code == 2
    assert "afterclick topics create" in output


def test_a_redis_that_evicts_is_refused(topics: StreamsSettings, tmp_path: Path) -> None:
    """An evicted record is lost state."""
    with local_redis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        code, output = run_worker(
            {
                "AFTERCLICK_STREAMS__BROKER": topics.broker,
                "AFTERCLICK_STREAMS__CLICKS_TOPIC": topics.clicks_topic,
                "AFTERCLICK_STREAMS__ITEMS_TOPIC": topics.items_topic,
                "AFTERCLICK_STREAMS__SIGNALS_TOPIC": topics.signals_topic,
                "AFTERCLICK_SERVING__REDIS": server.url,
            }
        )
    assert code == 2
    assert "maxmemory-policy is 'allkeys-lru'" in output


def test_a_re_created_topic_is_refused_by_name(tmp_path: Path, redis_url: str) -> None:
    """Offsets of the old log mean nothing in the new one: never fold on silently."""
    namespace = f"t{uuid.uuid4().hex[:12]}"
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        with local_broker(folder) as broker:
            streams = StreamsSettings(broker=broker.address)
            create_topics(streams, partitions=1, replication=1)
            stage = Stage(streams, redis_url, namespace, folder)
            stage.send(some_clicks(10 + 10 * turn))
            if turn == 0:
                with stage.worker():
                    stage.wait_folded()
            else:
                code, output = run_worker(stage.env)
                assert code == 2
                assert "created anew" in output
                assert "afterclick migrate" in output
                with pytest.raises(ConfigError, match="created anew"):
                    stage.heads()
            stage.close()
