"""Kafka that asks who is there: every way in, what a wrong one is told, and the rights needed."""

import asyncio
import re
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiokafka
import msgspec
import pytest
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from afterclick.serving.errors import ConfigError
from afterclick.streams.admin import check_topics, create_topics
from afterclick.streams.events import Item
from afterclick.streams.local import afterclick_argv, local_worker
from afterclick.streams.security import broker_credentials
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.verify import verify
from tests.conftest import ROOT
from tests.pki import write_pki
from tests.service.secured_kafka import USER, WORD, SecuredKafka, secured_kafka
from tests.service.stage import Stage, environment, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.kafka]

WRONG = "wrong-word-2342"
LOG_USER = "log"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


def page_rights(who: str) -> list[tuple[str, str, str]]:
    """The page's table: kind of resource, name, operation."""
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(rf"^\| {who} \| (topic|group) `(\S+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows
    return [
        # DescribeConfigs → describe_configs
        (kind, name, re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower())
        for kind, name, operations in rows
        for operation in operations.split(", ")
    ]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """Both users have the rights of the page, and no other."""
    folder = tmp_path_factory.mktemp("secured")
    pki = write_pki(folder, client=LOG_USER)
    with secured_kafka(folder / "kafka", pki) as server:
        create_topics(server.open, partitions=2, replication=1)
        server.allow(USER, page_rights("worker"))
        server.allow(LOG_USER, page_rights("log"))
        yield server


async def partitions_seen(settings: StreamsSettings) -> int:
    """What aiokafka, told what Faust tells it, learns of the clicks topic."""
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=settings.broker,
        **credentials_to_aiokafka_auth(broker_credentials(settings)),
    )
    await consumer.start()
    try:
        await consumer._client.add_topic(settings.clicks_topic)
        return len(consumer.partitions_for_topic(settings.clicks_topic) or ())
    finally:
        await consumer.stop()


@pytest.mark.parametrize(
    ("protocol", "mechanism"),
    [("SSL", None), *((p, m) for p in ("SASL_PLAINTEXT", "SASL_SSL") for m in MECHANISMS)],
)
def test_both_clients_come_in_every_way(
    secured: SecuredKafka, protocol: str, mechanism: str | None
) -> None:
    """kafka-python writes and reads the log, aiokafka is Faust's: one that fails stops a worker."""
    given = {"sasl_mechanism": mechanism} if mechanism else {}
    settings = secured.settings(protocol, **given)

    assert check_topics(settings).clicks_partitions == 2
    assert asyncio.run(partitions_seen(settings)) == 2


@pytest.mark.parametrize(
    ("protocol", "given", "says"),
    [
        ("SASL_SSL", {"sasl_password": WRONG}, "SASL_PASSWORD"),
        ("SASL_SSL", {"sasl_password": WRONG, "sasl_mechanism": "PLAIN"}, "SASL_PASSWORD"),
        ("SASL_PLAINTEXT", {"sasl_username": "nobody"}, "SASL_USERNAME"),
        ("SASL_SSL", {"ssl_cafile": ""}, "CERTIFICATE_VERIFY_FAILED.*SSL_CAFILE"),
        ("SSL", {"ssl_cafile": "STRANGER"}, "CERTIFICATE_VERIFY_FAILED.*SSL_CAFILE"),
        ("SSL", {"ssl_certfile": ""}, "SSL_CERTFILE"),
    ],
)
def test_a_wrong_way_in_is_named_at_once(
    secured: SecuredKafka, protocol: str, given: dict[str, Any], says: str
) -> None:
    """kafka-python writes the reason to its log and tries on until the time is up."""
    if given.get("ssl_cafile"):
        given = given | {"ssl_cafile": str(secured.pki.stranger)}
    with pytest.raises(ConfigError, match=says) as caught:
        check_topics(secured.settings(protocol, **given), timeout_s=60.0)

    said = "".join(traceback.format_exception(caught.value))
    assert WRONG not in said
    assert WORD not in said


def test_a_topic_without_rights_is_named(secured: SecuredKafka) -> None:
    """Not the same as a missing one: the remedy is another."""
    settings = msgspec.structs.replace(secured.settings("SASL_SSL"), clicks_topic="secret")

    with pytest.raises(ConfigError, match=r"'secret'.*TopicAuthorizationFailed"):
        check_topics(settings)


def test_a_wrong_password_ends_the_worker_with_2_and_stays_unsaid(
    secured: SecuredKafka, redis_url: str
) -> None:
    """Debug output included: kafka-python writes an admin client's arguments there."""
    settings = secured.settings("SASL_SSL", sasl_password=WRONG)
    done = subprocess.run(
        afterclick_argv("worker", "--log-level", "debug", "--port", "0"),
        env={
            "PATH": "/usr/bin:/bin",
            "AFTERCLICK_SERVING__REDIS": redis_url,
            **environment("STREAMS", settings),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "SASL_PASSWORD" in said
    assert "Traceback" not in said
    assert WRONG not in said


def test_a_worker_and_verify_need_no_more_rights_than_the_page_gives(
    secured: SecuredKafka, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """The least rights are a promise: a version that needs another one stops every worker. And
    PLAIN sends the password as it is, which both clients write into their debug logs.
    """
    stage = Stage(secured.open, redis_url, namespace, tmp_path)
    (tmp_path / "word").write_text(WORD)
    settings = msgspec.structs.replace(
        secured.settings("SASL_SSL", sasl_mechanism="PLAIN", sasl_password=""),
        session_timeout_s=6.0,
        rebalance_timeout_s=6.0,
    )
    env = environment("SERVING", stage.serving) | environment("STREAMS", settings)
    env["AFTERCLICK_STREAMS__SASL_PASSWORD_FILE"] = str(tmp_path / "word")
    stage.publish("r1", seed=1)
    with local_worker(env, tmp_path, arguments=["--log-level", "debug"]) as worker:
        stage.send([Item(item_id="i99999", categories=["c1"])])
        stage.send(some_clicks(100))
        stage.send_raw(b"u1", b"no JSON")
        stage.wait_folded()
    report = verify(stage.serving, secured.settings("SSL"))
    letters = stage.dead_letters()
    stage.close()

    assert report.first_difference is None
    assert report.clicks == 100
    assert len(letters) == 1
    told = worker.process.log.read_text()
    assert "DEBUG" in told
    assert WORD not in told
