"""The verbs that talk to Kafka: worker, topics, click, replay, verify, archive, rebuild, migrate,
dlq, rekey, demo, up.

Only parses and hands over. Everything that an extra brings is imported inside the verb that needs
it, so that this module loads in the base install and `afterclick --help` can list its verbs.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from afterclick.serving.cli import describe, titles
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.reader import TopK
from afterclick.serving.settings import ServingSettings, serving_settings
from afterclick.streams.events import NO_ITEM_EVENTS, Click, decode_click, encode
from afterclick.streams.settings import StreamsSettings, streams_settings

LOG_LEVELS = ("debug", "info", "warning", "error")

CLICK_TIMEOUT_S = 10.0
"""How long `afterclick click` waits for its list; a fresh worker needs some seconds to join."""

CLICK_POLL_S = 0.001
"""Pause between two looks at the head, so that the figure shown is right to about 1 ms."""


def worker(argv: Sequence[str]) -> int:
    """Turn clicks into lists until stopped: the Faust worker."""
    parser = argparse.ArgumentParser(prog="afterclick worker", description=worker.__doc__)
    parser.add_argument("--port", type=int, help="port of /livez, /readyz, /metrics; 0 takes any")
    parser.add_argument(
        "--processes", type=_positive, help="workers to run here, as many as cores at most (1)"
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info")
    options = parser.parse_args(argv)
    serving, streams = _settings()
    if options.processes is not None:
        streams = msgspec.structs.replace(streams, processes=options.processes)
    if options.port is not None:
        streams = msgspec.structs.replace(streams, port=options.port)
    if not 0 <= streams.port <= 65536 - streams.processes:
        raise ConfigError(
            f"AFTERCLICK_STREAMS__PORT, --port: expected 0 to {65536 - streams.processes}, so that "
            f"each of {streams.processes} processes has one, got {streams.port}"
        )
    if streams.processes > 1:
        from afterclick.streams.local import afterclick_argv
        from afterclick.streams.supervisor import supervise

        return supervise(streams, afterclick_argv("worker", "--log-level", options.log_level))

    from afterclick.streams.app import run_worker

    return run_worker(serving, streams, log_level=options.log_level)


def topics(argv: Sequence[str]) -> int:
    """Create Kafka's topics, or check what is there."""
    parser = argparse.ArgumentParser(prog="afterclick topics", description=topics.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="create what is missing; leave what is there")
    create.add_argument(
        "--partitions",
        type=_positive,
        default=4,
        help="of the clicks topic: the most workers that can ever share the load (4)",
    )
    create.add_argument(
        "--replication", type=_positive, default=1, help="copies; 3 on a real cluster (1)"
    )
    create.add_argument(
        "--item-partitions", type=_positive, default=1, help="of the items topic (1)"
    )
    check = actions.add_parser("check", help="say what is there, fail where a worker would")
    check.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(argv)

    from afterclick.streams.admin import check_topics, create_topics

    _, streams = _settings()
    if options.action == "create":
        for topic in create_topics(
            streams,
            partitions=options.partitions,
            replication=options.replication,
            item_partitions=options.item_partitions,
        ):
            what = "created" if topic.created else "was there"
            differs = ""
            if topic.partitions != topic.partitions_wanted:
                differs = (
                    f", not {topic.partitions_wanted}: left so, because other partitions would "
                    "part users from their records"
                )
            sys.stdout.write(f"{topic.name}: {what}, partitions {topic.partitions}{differs}\n")
        return 0
    info = check_topics(streams)
    if options.json:
        sys.stdout.write(msgspec.json.encode(info).decode() + "\n")
        return 0
    sys.stdout.write(
        f"{streams.clicks_topic}: partitions {info.clicks_partitions}, id {info.clicks_id}\n"
        f"{streams.items_topic}: partitions {info.items_partitions}, id {info.items_id}\n"
    )
    for note in info.notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


def click(argv: Sequence[str]) -> int:
    """Send one click and show the list it leads to."""
    parser = argparse.ArgumentParser(prog="afterclick click", description=click.__doc__)
    parser.add_argument("user", metavar="USER")
    parser.add_argument("item", metavar="ITEM", nargs="?", default="")
    parser.add_argument("--event", default="click", help="view, cart, purchase, visit, forget, …")
    parser.add_argument("--event-id", help="the same id again is the same click")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the list")
    parser.add_argument(
        "--timeout", type=float, default=CLICK_TIMEOUT_S, help="seconds to wait (10)"
    )
    options = parser.parse_args(argv)
    if not options.item and options.event not in NO_ITEM_EVENTS:
        parser.error(f"ITEM is missing; only {' and '.join(sorted(NO_ITEM_EVENTS))} have none")
    event = Click(
        user_id=options.user,
        item_id=options.item,
        event=options.event,
        timestamp_ms=time.time_ns() // 1_000_000,
        event_id=options.event_id,
    )
    serving, streams = _settings()
    with _sent(streams, event) as sent:
        if options.no_wait:
            sys.stdout.write(f"sent to partition {sent.partition}, offset {sent.offset}\n")
            return 0
        with TopK(serving.redis, namespace=serving.namespace, layout=serving.layout) as reader:
            _wait_for_list(reader, sent, options.timeout, serving.namespace)
            took_ms = (time.monotonic() - sent.at_s) * 1000
            answer = reader.get(options.user, 5)
    sys.stdout.write(f"new list {took_ms:.1f} ms after the click was sent\n")
    sys.stdout.write(describe(options.user, answer, titles(serving, answer.release)))
    return 0


def replay(argv: Sequence[str]) -> int:
    """Send a CSV, Parquet or JSON-lines log to Kafka in time order."""
    from afterclick.streams.replay import main

    return main(argv)


def verify(argv: Sequence[str]) -> int:
    """Compare Redis with an offline replay of the log."""
    from afterclick.streams.verify import main

    return main(argv)


def archive(argv: Sequence[str]) -> int:
    """Copy topics and inputs lists to Parquet files that outlive Kafka's retention."""
    from afterclick.streams.archiver import main

    return main(argv)


def rebuild(argv: Sequence[str]) -> int:
    """Fill an empty Redis from topic and archive, as the workers would have left it."""
    from afterclick.streams.rebuild import main

    return main(argv)


def migrate(argv: Sequence[str]) -> int:
    """Move users to the partitions that the clicks topic has now."""
    from afterclick.streams.migrate import main

    return main(argv)


def dlq(argv: Sequence[str]) -> int:
    """Show dead letters, or send them again."""
    from afterclick.streams.dlq import main

    return main(argv)


def rekey(argv: Sequence[str]) -> int:
    """Give the events of a topic without keys their user's key, and send them to the clicks."""
    from afterclick.streams.rekey import main

    return main(argv)


def demo(argv: Sequence[str]) -> int:
    """Show all of it on this machine: broker, Redis, training, worker, live clicks."""
    from afterclick.streams.demo import main

    return main(argv)


def up(argv: Sequence[str]) -> int:
    """Start a broker and Redis on this machine and keep them running."""
    from afterclick.streams.local import main_up

    return main_up(argv)


def _settings() -> tuple[ServingSettings, StreamsSettings]:
    return serving_settings(os.environ), streams_settings(os.environ)


class _Sent(NamedTuple):
    partition: int
    offset: int
    at_s: float
    """Monotonic clock just before the click left, the connection being up."""


@contextmanager
def _sent(streams: StreamsSettings, event: Click) -> Iterator[_Sent]:
    """Produce one click and wait for its acknowledgement; the producer closes at the end.

    Raises:
        ContractError: a worker would dead-letter it.
        ConfigError: there is no such topic.
        UnavailableError: no acknowledgement in time.
    """
    import kafka
    import kafka.errors

    from afterclick.streams.admin import BROKER_TIMEOUT_S, check_topics, client_config

    name, value = encode(event)
    decode_click(name, value, offset=0, record_ms=event.timestamp_ms or 0)
    check_topics(streams)
    producer = kafka.KafkaProducer(**client_config(streams), acks="all")
    try:
        producer.partitions_for(streams.clicks_topic)  # connects, so that sending is timed alone
        at_s = time.monotonic()
        future = producer.send(streams.clicks_topic, key=name, value=value)
        placed = future.get(timeout=BROKER_TIMEOUT_S)
        yield _Sent(int(placed.partition), int(placed.offset), at_s)
    except kafka.errors.KafkaError as error:
        raise UnavailableError(
            f"Kafka at {streams.broker}: the click was not acknowledged: {error}"
        ) from error
    finally:
        producer.close(timeout=BROKER_TIMEOUT_S)


def _wait_for_list(reader: TopK, sent: _Sent, timeout_s: float, namespace: str) -> None:
    until_s = time.monotonic() + timeout_s
    while reader.folded_to(sent.partition) <= sent.offset:
        if time.monotonic() >= until_s:
            raise UnavailableError(
                f"partition {sent.partition}: no worker took offset {sent.offset} within "
                f"{timeout_s:g} s; the click stays in Kafka; is `afterclick worker` running, with "
                f"namespace {namespace!r}?"
            )
        time.sleep(CLICK_POLL_S)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
