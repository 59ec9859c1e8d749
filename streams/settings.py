"""What the stream processes are told once, at start: broker, topics, group, limits.

Read from `AFTERCLICK_STREAMS__*` by a process's `main`; nothing below reads the environment.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta

from afterclick.serving.settings import Settings, from_environment


class StreamsSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of everything that talks to Kafka."""

    broker: str = "127.0.0.1:9092"
    """Kafka bootstrap servers, `host:port,host:port`."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How to speak with Kafka: with TLS (`…SSL`), with user and password (`SASL_…`)."""

    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """How the password is proven; `PLAIN` sends it, so only over TLS."""

    sasl_username: str = ""
    """User at Kafka; needed by the `SASL_` protocols."""

    sasl_password: str = ""
    """The user's password; `SASL_PASSWORD_FILE` names a file that holds it instead."""

    ssl_cafile: str = ""
    """PEM file of the authorities that Kafka's certificate is checked against; empty takes the
    system's.
    """

    ssl_certfile: str = ""
    """PEM file of this client's certificate, where Kafka asks for one; may hold the key too."""

    ssl_keyfile: str = ""
    """PEM file of that certificate's key, unencrypted; empty where the certificate's file has it.
    """

    ssl_check_hostname: bool = True
    """Whether the certificate must name the host that was asked for. It is always checked against
    the authorities.
    """

    clicks_topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "clicks"
    """Topic of user events; must not be compacted."""

    items_topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "items"
    """Topic of catalogue items; kept whole."""

    signals_topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "signals"
    """Topic by which workers tell each other what was clicked; one partition. Namespaces may share
    it.
    """

    signals_retention_h: Annotated[int, Meta(ge=1)] = 168
    """Hours that `topics create` lets the signals topic keep: longer than any release stays in
    force. A worker that starts reads it from the release's training on.
    """

    signals_every_ms: Annotated[int, Meta(ge=10, le=60_000)] = 250
    """Least time between two messages of one partition to the signals topic, and between two
    changes of the memory that lists are made with.
    """

    signals_outbox_max: Annotated[int, Meta(ge=1)] = 4096
    """Chunks of one partition whose clicks may wait in Redis for the signals topic; beyond it the
    oldest are given up, which lists feel and records do not.
    """

    group: str = "afterclick"
    """Consumer group of the workers."""

    instance: str = ""
    """Static membership name of this worker (`group.instance.id`); empty for dynamic membership."""

    chunk_users_max: Annotated[int, Meta(ge=1, le=4096)] = 256
    """Users one write may touch; longer scripts block Redis."""

    chunk_records_max: Annotated[int, Meta(ge=1, le=65536)] = 1024
    """Log records one write may cover."""

    chunk_bytes_max: Annotated[int, Meta(ge=1024)] = 1 << 20
    """Bytes of record values one write may cover."""

    backlog_records_max: Annotated[int, Meta(ge=1)] = 8192
    """Records of one partition held in memory before fetching pauses."""

    fetch_wait_ms: Annotated[int, Meta(ge=1, le=5000)] = 20
    """Longest time the broker holds an empty fetch. Kafka answers a click at once whatever this
    says; the local broker `tansu` looks for new records about four times within it.
    """

    fetch_rest_ms: Annotated[int, Meta(ge=0, le=1000)] = 20
    """Longest pause after a fetch that brought clicks; it lasts twice as long as the last fold
    took. Clicks that come within it are fetched and folded together. One after a longer silence
    waits for nobody.
    """

    processes: Annotated[int, Meta(ge=1, le=256)] = 1
    """Workers that `afterclick worker` runs on this machine, on as many ports from `port` on; one a
    core drains most. Each loads the release for itself, and more than partitions have nothing to
    do.
    """

    fold_threads: Annotated[int, Meta(ge=0, le=256)] = 0
    """Rounds that a process folds at the same time, of what waits in its partitions by then; 0
    means two, or three where it has as many cores: more would wait for its interpreter.
    """

    latency_budget_ms: Annotated[int, Meta(ge=0)] = 1000
    """Clicks that have waited longer than this, with more waiting behind them, advance their users'
    states only: the lists are made as soon as nothing waits. 0 makes every list at its click.
    """

    renew_users_max: Annotated[int, Meta(ge=0)] = 1000
    """Recently active users per partition whose lists are made anew when release, catalogue or
    signals have moved; 0 leaves lists until their users' next click.
    """

    renew_every_s: Annotated[float, Meta(gt=0)] = 60.0
    """Least time between two such renewals when only catalogue or signals moved: signals always do
    while anybody clicks.
    """

    port: Annotated[int, Meta(ge=0, le=65535)] = 6066
    """Port of /livez, /readyz and /metrics; 0 takes a free one."""

    host: str = "0.0.0.0"  # noqa: S104 - a probe must reach it from outside the container
    """Address that port listens on."""

    start_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    """How long a worker waits for Kafka and Redis at start before it gives up."""

    stop_timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    """Longest graceful stop, after a crash, too; leaving without a commit is safe."""

    session_timeout_s: Annotated[float, Meta(ge=6)] = 10.0
    """Silence after which Kafka takes a worker's partitions away; brokers refuse less than 6."""

    rebalance_timeout_s: Annotated[float, Meta(ge=1)] = 20.0
    """Time that workers have to join a rebalance."""

    stall_s: Annotated[float, Meta(gt=0)] = 60.0
    """A partition that stands still for so long while records wait in the log fails /livez."""
    archive: str = ""
    """Folder, or fsspec URL (s3://…, gs://…), of the archive that `afterclick archive` fills and
    that verify, rebuild and the trainer read together with the topic; empty for none.
    """

    accept_loss: bool = False
    """Go on where the log starts after the head: the lost range is counted, and the records miss
    it.
    """


ROUNDS_MIN, ROUNDS_MAX = 2, 3
"""At the same time in a process: one can wait for Redis while another computes, and somewhat less
than half of a round holds the interpreter.
"""


def fold_threads(streams: StreamsSettings, cores: int) -> int:
    """`fold_threads`, or what 0 stands for on a machine of so many cores."""
    share = cores // streams.processes
    return streams.fold_threads or min(ROUNDS_MAX, max(ROUNDS_MIN, share))


def streams_settings(environ: Mapping[str, str]) -> StreamsSettings:
    """Read `AFTERCLICK_STREAMS__*`."""
    return from_environment(StreamsSettings, "STREAMS", environ)
