"""Kafka's topics: wait for the broker, create what Afterclick needs, check what is there.

Uses kafka-python's admin client and is done before a worker starts; knows no consumer, Redis or
release. `client_config` is the one place where settings become arguments of kafka-python clients.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import kafka.errors
import msgspec
from kafka.admin import ConfigResource, KafkaAdminClient, MemberToRemove
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.streams.security import kafka_arguments
from afterclick.streams.settings import StreamsSettings

BROKER_TIMEOUT_S = 10.0
"""How long a command waits for the broker; a worker is told its own limit by a setting."""

DEFAULT_PORT = 9092

DEAD_LETTERS_SUFFIX = ".dlq"

_CONNECT_TIMEOUT_S = 2.0
_RETRY_EVERY_S = 0.1
_BACKOFF_MAX_MS = 500
"""Longest pause between two tries to connect. kafka-python's own grows to 30 s: after an outage of
45 s a broker that was back went unseen for 25 s more, and with it every partition to be opened.
"""
_HANG_UPS_MAX = 3
"""Kafka 4 sends its answer to a wrong password late, and often hangs up before it is out."""
_MISSING = 3
"""UNKNOWN_TOPIC_OR_PARTITION."""
_EXISTS = 36
"""TOPIC_ALREADY_EXISTS."""
_SASL_REFUSALS = (
    kafka.errors.SaslAuthenticationFailedError,
    kafka.errors.UnsupportedSaslMechanismError,
    kafka.errors.IllegalSaslStateError,
)
_TLS_REFUSALS = ("CERTIFICATE", "WRONG_VERSION_NUMBER", "UNKNOWN_CA")
"""Reasons in OpenSSL's errors that no waiting heals."""
_FOR_EVER = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}


class TopicOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `create_topics` found or did for one topic."""

    name: str
    created: bool
    partitions: int
    """Partitions it has now."""
    partitions_wanted: int
    """Differs where the topic was there before; its partitions are never changed, because that
    would move users to other partitions.
    """


class TopicsInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The topics as they stand."""

    clicks_id: str
    """Kafka's id of the clicks topic; a re-created topic has another one and is another log."""
    clicks_partitions: int
    items_id: str
    items_partitions: int
    notes: list[str] = []
    """What works, but an operator should know."""


def dead_letters_topic(topic: str) -> str:
    """Where a topic's bad records go."""
    return topic + DEAD_LETTERS_SUFFIX


def client_config(settings: StreamsSettings) -> dict[str, Any]:
    """Arguments that every kafka-python client takes: where the broker is and who asks.

    Raises:
        ConfigError: the setting `broker` is not `host:port,host:port`, or those of security
            contradict each other.
    """
    return {
        "bootstrap_servers": [_joined(address) for address in _addresses(settings)],
        "client_id": "afterclick",
        "reconnect_backoff_max_ms": _BACKOFF_MAX_MS,
        **kafka_arguments(settings),
    }


def wait_for_broker(settings: StreamsSettings, timeout_s: float) -> None:
    """Return once the broker answers a metadata request.

    Raises:
        ConfigError: the setting `broker` is malformed.
        UnavailableError: it did not answer within `timeout_s`; names the address.
    """
    with _admin(settings, timeout_s):
        pass


def leave_group(settings: StreamsSettings, instances: Sequence[str], timeout_s: float) -> None:
    """Take static members that have ended out of the workers' group: their partitions would stand
    until their sessions are over.

    Raises:
        ConfigError: the broker refuses, or the setting `broker` is malformed.
        UnavailableError: the broker does not answer.
    """
    members = [MemberToRemove(group_instance_id=instance) for instance in instances]
    with _admin(settings, timeout_s) as admin:
        admin.remove_group_members(settings.group, members)


def create_topics(
    settings: StreamsSettings, *, partitions: int, replication: int, item_partitions: int = 1
) -> list[TopicOutcome]:
    """Create clicks, items, their dead-letter topics and signals; what exists is left as it is.

    Args:
        settings: topics' names and the broker.
        partitions: of the clicks topic: the most workers that can share the load, ever.
        replication: copies of each partition, at most the number of brokers.
        item_partitions: of the items topic; every worker reads all of them.

    Raises:
        ConfigError: the broker refuses a topic, for example more copies than brokers.
        UnavailableError: the broker does not answer.
    """
    clicks, items = settings.clicks_topic, settings.items_topic
    kept_ms = settings.signals_retention_h * 3600 * 1000
    wanted = {
        clicks: (partitions, {"cleanup.policy": "delete"}),
        items: (item_partitions, _FOR_EVER),
        dead_letters_topic(clicks): (1, {"cleanup.policy": "delete"}),
        dead_letters_topic(items): (1, {"cleanup.policy": "delete"}),
        settings.signals_topic: (
            1,
            {"cleanup.policy": "delete", "retention.ms": str(kept_ms), "retention.bytes": "-1"},
        ),
    }
    request = {
        name: {"num_partitions": count, "replication_factor": replication, "configs": configs}
        for name, (count, configs) in wanted.items()
    }
    with _admin(settings, BROKER_TIMEOUT_S) as admin:
        answers = admin.create_topics(request, raise_errors=False)["topics"]
        codes = {answer["name"]: int(answer["error_code"]) for answer in answers}
        for answer in answers:
            if answer["error_code"] not in (0, _EXISTS):
                raise _broker_refused(
                    settings,
                    f"create topic {answer['name']!r}",
                    answer["error_code"],
                    answer.get("error_message") or "",
                )
        # On a cluster the answer comes before all brokers know the topic.
        admin.wait_for_topics(list(wanted), timeout_ms=int(BROKER_TIMEOUT_S * 1000))
        found = {topic["name"]: topic for topic in admin.describe_topics(list(wanted))}
    return [
        TopicOutcome(
            name=name,
            created=codes[name] == 0,
            partitions=len(found[name]["partitions"]),
            partitions_wanted=count,
        )
        for name, (count, _) in wanted.items()
    ]


def check_topics(settings: StreamsSettings, timeout_s: float = BROKER_TIMEOUT_S) -> TopicsInfo:
    """Refuse to start on topics that would lose or rewrite the log.

    Raises:
        ConfigError: a topic is missing (with the command that creates it), or clicks or items are
            compacted.
        UnavailableError: the broker does not answer, or a topic has no leader.
    """
    clicks, items, signals = settings.clicks_topic, settings.items_topic, settings.signals_topic
    names = [clicks, items, dead_letters_topic(clicks), dead_letters_topic(items), signals]
    with _admin(settings, timeout_s) as admin:
        found = {topic["name"]: topic for topic in admin.describe_topics(names)}
        missing = [name for name in names if found[name]["error_code"] == _MISSING]
        if missing:
            raise ConfigError(
                f"Kafka at {settings.broker}: no topic {', '.join(map(repr, missing))}; "
                "run: afterclick topics create"
            )
        for name in names:
            if found[name]["error_code"]:
                raise _broker_refused(
                    settings, f"describe topic {name!r}", found[name]["error_code"]
                )
        if len(found[signals]["partitions"]) != 1:
            raise ConfigError(
                f"Kafka at {settings.broker}: topic {signals!r} has "
                f"{len(found[signals]['partitions'])} partitions, expected 1, because lists name "
                "one offset of it; delete it and run: afterclick topics create"
            )
        configs = _configs(admin, [clicks, items, signals])
    for name in (clicks, items, signals):
        policy = configs[name].get("cleanup.policy", "delete")
        if "compact" in policy:
            raise ConfigError(
                f"Kafka at {settings.broker}: topic {name!r} has cleanup.policy={policy}, expected "
                "delete, because compaction removes records that a replay needs; run: "
                f"kafka-configs.sh --bootstrap-server {settings.broker} --alter --topic {name} "
                "--add-config cleanup.policy=delete"
            )
    return TopicsInfo(
        clicks_id=str(found[clicks]["topic_id"]),
        clicks_partitions=len(found[clicks]["partitions"]),
        items_id=str(found[items]["topic_id"]),
        items_partitions=len(found[items]["partitions"]),
        notes=_retention_notes(items, configs[items]),
    )


def topic_id(settings: StreamsSettings, name: str) -> str | None:
    """Kafka's id of any topic, None where there is none."""
    with _admin(settings, BROKER_TIMEOUT_S) as admin:
        (found,) = admin.describe_topics([name])
    if found["error_code"] == _MISSING:
        return None
    if found["error_code"]:
        raise _broker_refused(settings, f"describe topic {name!r}", found["error_code"])
    return str(found["topic_id"])


def _retention_notes(items: str, config: dict[str, str]) -> list[str]:
    limits = [
        f"{name}={config[name]}"
        for name in ("retention.ms", "retention.bytes")
        if config.get(name, "-1") != "-1"
    ]
    if not limits:
        return []
    return [
        f"topic {items!r} has {', '.join(limits)}: items older than that vanish from the log, and "
        "workers that start later know them only if a release holds them; "
        "retention.ms=-1 and retention.bytes=-1 keep it whole"
    ]


def _configs(admin: Any, names: list[str]) -> dict[str, dict[str, str]]:
    """Configuration of topics; empty where the broker tells none (tansu, or no right to ask)."""
    asked = [ConfigResource("TOPIC", name) for name in names]
    found = admin.describe_configs(asked, config_filter="all").get("topic", {})
    return {
        name: {
            key: str(entry["value"])
            for key, entry in found.get(name, {}).items()
            if entry["value"] is not None
        }
        for name in names
    }


class _Manager(KafkaConnectionManager):  # type: ignore[misc]
    """Stops at a refusal, and keeps why a connection failed: kafka-python writes that to its log
    only, goes on until the time is up, and says that.
    """

    why: Exception | None = None
    hang_ups = 0

    def get_connection(self, *args: Any, **kwargs: Any) -> Any:
        if self.why is not None and _refused(self.why):
            raise self.why
        connection = super().get_connection(*args, **kwargs)
        authenticate = connection._sasl_authenticate

        async def counted(*args: Any) -> None:
            try:
                await authenticate(*args)
            except kafka.errors.KafkaConnectionError:
                self.hang_ups += 1
                if self.hang_ups >= _HANG_UPS_MAX:
                    self._note(
                        kafka.errors.SaslAuthenticationFailedError(
                            f"{self.hang_ups} times the broker hung up while the password was "
                            "checked, as it does when it is wrong"
                        )
                    )
                raise

        connection._sasl_authenticate = counted
        connection.init_future.add_errback(self._note)
        return connection

    def _note(self, error: Exception) -> None:
        if self.why is None or not _refused(self.why):
            self.why = error


@contextmanager
def _admin(settings: StreamsSettings, timeout_s: float) -> Iterator[Any]:
    until_s = time.monotonic() + timeout_s
    config = client_config(settings)
    answering = _wait_for_port(settings, timeout_s, until_s)
    left_ms = max(int((until_s - time.monotonic()) * 1000), 1000)
    clients = []

    def new_client(**config: Any) -> Any:
        net = NetworkSelector(**config)
        clients.append(KafkaNetClient(net, _Manager(net, **config)))
        return clients[-1]

    try:
        admin = KafkaAdminClient(
            **config | {"bootstrap_servers": [_joined(answering)]},
            bootstrap_timeout_ms=left_ms,
            kafka_client=new_client,
        )
        yield admin
    except kafka.errors.KafkaError as error:
        raise _explained(settings, error, clients[0]._manager.why if clients else None) from error
    finally:
        for client in clients:  # not `admin.close()`: there is no admin after a refusal
            client.close()
            client._net.stop()


def _refused(error: Exception) -> str:
    """The settings to look at where trying again is no use until somebody changes something."""
    if isinstance(error, _SASL_REFUSALS):
        return "SASL_MECHANISM, SASL_USERNAME and SASL_PASSWORD"
    if "SSL" in str(error) and any(sign in str(error) for sign in _TLS_REFUSALS):
        return "SSL_CAFILE, SSL_CERTFILE and SSL_CHECK_HOSTNAME"
    return ""


def _explained(
    settings: StreamsSettings, error: kafka.errors.KafkaError, why: Exception | None
) -> ConfigError | UnavailableError:
    where = f"Kafka at {settings.broker}"
    if why is not None and (names := _refused(why)):
        return ConfigError(
            f"{where}: {why}; check AFTERCLICK_STREAMS__SECURITY_PROTOCOL, which is "
            f"{settings.security_protocol}, and beside it {names}"
        )
    if isinstance(error, kafka.errors.AuthorizationError) or not error.retriable:
        return ConfigError(f"{where}: {error}")
    last = "" if why is None else f"; the last connection ended with: {why}"
    return UnavailableError(
        f"{where} does not answer: {error}{last}; is AFTERCLICK_STREAMS__SECURITY_PROTOCOL="
        f"{settings.security_protocol} what it speaks?"
    )


def _wait_for_port(settings: StreamsSettings, timeout_s: float, until_s: float) -> tuple[str, int]:
    """Try plain connections first, which tell at once whether anybody listens."""
    addresses = _addresses(settings)
    while True:
        for address in addresses:
            try:
                left_s = max(until_s - time.monotonic(), _RETRY_EVERY_S)
                socket.create_connection(address, min(left_s, _CONNECT_TIMEOUT_S)).close()
            except OSError as error:
                why = error
            else:
                return address
        if time.monotonic() >= until_s:
            raise UnavailableError(
                f"Kafka at {settings.broker} did not answer within {timeout_s:g} s: {why}; is it "
                "running, and is AFTERCLICK_STREAMS__BROKER right?"
            ) from why
        time.sleep(_RETRY_EVERY_S)


def _addresses(settings: StreamsSettings) -> list[tuple[str, int]]:
    addresses = []
    for part in settings.broker.split(","):
        host, colon, port = part.strip().rpartition(":")
        if not colon or port.endswith("]"):  # no port: a bare name or [::1]
            host, port = part.strip(), str(DEFAULT_PORT)
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"AFTERCLICK_STREAMS__BROKER: expected host:port,host:port, got {settings.broker!r}"
            )
        addresses.append((host.strip("[]"), int(port)))
    return addresses


def _joined(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _broker_refused(
    settings: StreamsSettings, what: str, code: int, message: str = ""
) -> ConfigError | UnavailableError:
    kind = kafka.errors.for_code(code)
    text = f"Kafka at {settings.broker}: {what}: {kind.__name__} {message}".rstrip()
    return UnavailableError(text) if kind.retriable else ConfigError(text)
