"""Topics on a real broker: created once, left alone after, and checked before a worker starts."""

import socket
import threading
import time
import uuid
from contextlib import closing

import pytest
from kafka.admin import ConfigResource, KafkaAdminClient

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.streams.admin import (
    check_topics,
    client_config,
    create_topics,
    wait_for_broker,
)
from afterclick.streams.settings import StreamsSettings

pytestmark = pytest.mark.service


@pytest.fixture
def settings(broker_address: str) -> StreamsSettings:
    name = uuid.uuid4().hex[:8]
    return StreamsSettings(
        broker=broker_address,
        clicks_topic=f"clicks-{name}",
        items_topic=f"items-{name}",
        signals_topic=f"signals-{name}",
    )


def _configure(settings: StreamsSettings, topic: str, config: dict[str, str]) -> None:
    """Set a topic's configuration and wait until the broker tells it."""
    resource = ConfigResource("TOPIC", topic, config)
    with closing(KafkaAdminClient(**client_config(settings))) as admin:
        admin.alter_configs([resource])
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s:
            found = admin.describe_configs([ConfigResource("TOPIC", topic)], config_filter="all")
            told = found["topic"][topic]
            if all(told[name]["value"] == value for name, value in config.items()):
                return
    raise AssertionError(f"{topic}: {config} did not arrive")


def test_created_topics_pass_the_check(settings: StreamsSettings) -> None:
    """`afterclick topics create` is all that a fresh broker needs."""
    outcomes = create_topics(settings, partitions=3, replication=1, item_partitions=2)
    info = check_topics(settings)

    assert {outcome.name: outcome.partitions for outcome in outcomes} == {
        settings.clicks_topic: 3,
        settings.items_topic: 2,
        f"{settings.clicks_topic}.dlq": 1,
        f"{settings.items_topic}.dlq": 1,
        settings.signals_topic: 1,
    }
    assert all(outcome.created for outcome in outcomes)
    assert (info.clicks_partitions, info.items_partitions) == (3, 2)
    assert uuid.UUID(info.clicks_id) != uuid.UUID(info.items_id)


def test_a_second_create_changes_nothing_and_says_what_differs(settings: StreamsSettings) -> None:
    """More partitions would move users to other ones, away from their records."""
    create_topics(settings, partitions=3, replication=1)
    before = check_topics(settings)

    outcomes = create_topics(settings, partitions=5, replication=1)

    assert not any(outcome.created for outcome in outcomes)
    assert (outcomes[0].partitions, outcomes[0].partitions_wanted) == (3, 5)
    assert check_topics(settings) == before


def test_a_missing_topic_is_named_with_its_command(settings: StreamsSettings) -> None:
    """Brokers that create topics on first use would choose the partitions for us."""
    with pytest.raises(ConfigError, match=f"{settings.clicks_topic}.*afterclick topics create"):
        check_topics(settings)

    create_topics(settings, partitions=1, replication=1)
    with closing(KafkaAdminClient(**client_config(settings))) as admin:
        admin.delete_topics([f"{settings.clicks_topic}.dlq"])
        # Kafka answers before every broker has forgotten it.
        until_s = time.monotonic() + 10
        while f"{settings.clicks_topic}.dlq" in admin.list_topics():
            assert time.monotonic() < until_s, "a deleted topic stays"
            time.sleep(0.05)

    with pytest.raises(ConfigError, match=rf"no topic '{settings.clicks_topic}\.dlq'"):
        check_topics(settings)


def test_a_recreated_topic_has_another_id(settings: StreamsSettings) -> None:
    """A head that names the old id must not be taken for a place in the new log."""
    create_topics(settings, partitions=1, replication=1)
    before = check_topics(settings)
    with closing(KafkaAdminClient(**client_config(settings))) as admin:
        admin.delete_topics([settings.clicks_topic])
    create_topics(settings, partitions=1, replication=1)

    assert check_topics(settings).clicks_id != before.clicks_id


@pytest.mark.kafka
def test_a_compacted_log_is_refused_with_the_command_that_mends_it(
    settings: StreamsSettings,
) -> None:
    """Compaction removes records that a replay needs; tansu tells no configuration."""
    create_topics(settings, partitions=1, replication=1)
    for topic in (settings.clicks_topic, settings.items_topic, settings.signals_topic):
        _configure(settings, topic, {"cleanup.policy": "compact,delete"})
        with pytest.raises(ConfigError, match=f"{topic}.*compact,delete.*kafka-configs.sh"):
            check_topics(settings)
        _configure(settings, topic, {"cleanup.policy": "delete"})
    check_topics(settings)


@pytest.mark.kafka
def test_items_that_expire_are_a_note_and_no_refusal(settings: StreamsSettings) -> None:
    """A catalogue that lives in releases works all the same, but someone should know."""
    create_topics(settings, partitions=1, replication=1)
    assert check_topics(settings).notes == []

    _configure(settings, settings.items_topic, {"retention.ms": "3600000"})
    (note,) = check_topics(settings).notes

    assert f"topic '{settings.items_topic}' has retention.ms=3600000" in note


@pytest.mark.kafka
def test_more_copies_than_brokers_is_a_config_error(settings: StreamsSettings) -> None:
    """The broker's own words, with the address; no traceback."""
    with pytest.raises(ConfigError, match="InvalidReplicationFactorError"):
        create_topics(settings, partitions=1, replication=3)


def test_a_broker_that_is_away_is_named_in_time() -> None:
    """An operator must see which address was tried, not a client's retry log."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    began_s = time.monotonic()

    with pytest.raises(UnavailableError, match=f"{address} did not answer within 0.3 s"):
        wait_for_broker(StreamsSettings(broker=address), 0.3)

    assert 0.3 <= time.monotonic() - began_s < 2.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kafka-io")]


def test_any_one_of_several_brokers_is_enough(broker_address: str) -> None:
    """Bootstrap servers are a list because some of them may be down."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{probe.getsockname()[1]}"

    wait_for_broker(StreamsSettings(broker=f"{dead}, {broker_address}"), 10)


@pytest.mark.parametrize("address", ["", "host:port", "host:0", "host:9092,", ":9092", "h:99999"])
def test_a_malformed_address_is_a_config_error(address: str) -> None:
    """Waiting a minute for an address that cannot exist helps nobody."""
    with pytest.raises(ConfigError, match="AFTERCLICK_STREAMS__BROKER: expected host:port"):
        wait_for_broker(StreamsSettings(broker=address), 60)


def test_addresses_of_all_forms_are_understood() -> None:
    """Names, IPv4, IPv6, and Kafka's own port where none is given."""
    settings = StreamsSettings(broker="kafka, 10.0.0.1:1234, [::1]:5, [::1]")

    assert client_config(settings)["bootstrap_servers"] == [
        "kafka:9092",
        "10.0.0.1:1234",
        "[::1]:5",
        "[::1]:9092",
    ]


def test_a_broker_that_comes_back_is_seen_again_within_seconds(settings: StreamsSettings) -> None:
    """kafka-python pauses up to 30 s between two tries: a partition taken over after an outage
    would wait for it.
    """
    with closing(KafkaAdminClient(**client_config(settings))) as admin:
        assert admin.config["reconnect_backoff_max_ms"] <= 2000
