"""`afterclick archive`: copies what the topics hold beyond the archive into it, once or for ever.

Where to go on is what the files' names say, so that a process killed at any moment leaves nothing
half
and nothing twice. One archiver works at a time in a folder; an object store has no lock, and two
there
at once write ranges that overlap, which readers sort out.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

import msgspec

from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.settings import ServingSettings, serving_settings
from afterclick.streams.admin import TopicsInfo, check_topics
from afterclick.streams.archive import Archive, cut
from afterclick.streams.joined import JoinedLog
from afterclick.streams.namespace import open_store
from afterclick.streams.settings import StreamsSettings, streams_settings

EVERY_S = 600.0
"""Between two rounds of `--follow`: 144 small files a day and partition at most."""

LOCK_NAME = ".archive.lock"

log = logging.getLogger(__name__)


class Round(msgspec.Struct, kw_only=True):
    """What one round did."""

    archive: str
    files: int = 0
    records: int = 0
    redacted: int = 0
    """Clicks of forgotten users that were emptied."""
    ends: dict[str, list[int]] = {}
    """Per topic and partition: the offset after what the archive holds."""
    inputs: int = 0
    """Inputs entries of which there is a copy."""
    seconds: float = 0.0


def archive_once(serving: ServingSettings, streams: StreamsSettings, archive: Archive) -> Round:
    """Archive up to the topics' present ends, apply `forget`, copy the inputs lists.

    Raises:
        ContractError: the topic was created anew, or dropped records that were not archived.
        UnavailableError: Kafka, Redis or the archive does not answer, or another archiver works
            there.
    """
    begun_s = time.monotonic()
    done = Round(archive=archive.place.root)
    clicks = streams.clicks_topic
    with archive.place.lock(LOCK_NAME, wait=False) as ours:
        if not ours:
            raise UnavailableError(
                f"archive {archive.place.root}: another archiver is at work there"
            )
        topics = check_topics(streams)
        reader = JoinedLog(msgspec.structs.replace(streams, archive=""))
        try:
            for topic, topic_id, num_partitions in (
                (clicks, topics.clicks_id, topics.clicks_partitions),
                (streams.items_topic, topics.items_id, topics.items_partitions),
            ):
                archive.place.remove_halves(f"{topic}/*/.*")
                for partition in range(num_partitions):
                    begin, end = _archive_partition(
                        archive, reader, topic, topic_id, partition, done
                    )
                    done.ends.setdefault(topic, []).append(end)
                    if topic == clicks:
                        done.redacted += archive.redact(topic, partition, begin)
        finally:
            reader.close()
        # After the clicks: an entry copied too early would be missed, one too late does no harm.
        done.inputs = _copy_inputs(archive, serving, topics)
    done.seconds = round(time.monotonic() - begun_s, 3)
    return done


def _archive_partition(
    archive: Archive, reader: JoinedLog, topic: str, topic_id: str, partition: int, done: Round
) -> tuple[int, int]:
    """Write what is new; from which offset on, and up to which."""
    start, end = reader.edges(topic, partition)
    files = archive.files(topic, partition)
    if files:
        archive.check_topic(archive.info(files[-1]), topic_id)
    held = archive.edges(topic, partition)
    begin = held[1] if held else start
    if begin < start:
        raise ContractError(
            f"archive {archive.place.root}: {topic}/{partition} is archived up to {begin}, the "
            f"topic starts at {start}: {start - begin} records were dropped in between; take "
            "another folder, and keep the topic's retention longer than the archiver may rest",
            reason="archive-hole",
        )
    at = begin
    for piece in cut(reader.read(topic, partition, begin, end), begin):
        at = archive.write(topic, topic_id, partition, piece.begin, piece.records).end
        done.files += 1
        done.records += len(piece.records)
        log.info("%s/%d: archived %d to %d", topic, partition, piece.begin, at)
    return begin, at


def _copy_inputs(archive: Archive, serving: ServingSettings, topics: TopicsInfo) -> int:
    """Copy every partition's inputs list; entries of which there is a copy then."""
    store = open_store(serving, topics)
    num = 0
    try:
        # Another epoch's partitions have other users, and inputs lists of their own.
        epoch = store.keys.epoch
        name = f"{serving.namespace}/e{epoch}" if epoch else serving.namespace
        for partition in range(store.keys.partitions):
            archive.keep_inputs(name, partition, store.inputs(partition))
            num += len(archive.inputs(name, partition))
    finally:
        store.close()
    return num


def main(argv: Sequence[str]) -> int:
    """Copy topics and inputs lists to Parquet files that outlive Kafka's retention."""
    parser = argparse.ArgumentParser(prog="afterclick archive", description=main.__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="up to the present end (the default)")
    how.add_argument("--follow", action="store_true", help="again and again until a signal")
    parser.add_argument("--to", help="folder or fsspec URL; else AFTERCLICK_STREAMS__ARCHIVE")
    parser.add_argument(
        "--every", type=float, default=EVERY_S, help=f"seconds between rounds ({EVERY_S:.0f})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a round")
    options = parser.parse_args(argv)
    serving, streams = serving_settings(os.environ), streams_settings(os.environ)
    root = options.to or streams.archive
    if not root:
        raise ConfigError(
            "archive: no place given; pass --to FOLDER or set AFTERCLICK_STREAMS__ARCHIVE"
        )
    if options.follow:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    archive = Archive(root)
    while True:
        try:
            _tell(archive_once(serving, streams, archive), as_json=options.json)
        except UnavailableError as error:
            if not options.follow:
                raise
            log.warning("%s; trying again in %.0f s", error, options.every)
        if not options.follow:
            return 0
        time.sleep(options.every)


def _tell(done: Round, *, as_json: bool) -> None:
    words = msgspec.json.encode(done).decode()
    if not as_json:
        words = (
            f"{done.archive}: {done.records} records in {done.files} new files, "
            f"{done.redacted} clicks of forgotten users emptied, {done.inputs} inputs entries"
        )
    sys.stdout.write(words + "\n")
    sys.stdout.flush()
