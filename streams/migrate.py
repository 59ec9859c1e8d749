"""`afterclick migrate`: users move to other partitions, and no state is lost or doubled.

More partitions of the clicks topic, another topic, or one created anew: each begins an epoch, under
keys of its own. The old epoch's heads are held, so that none of its workers can write any more;
every user's record is copied to the partition that the user's next click will come from; heads that
say where folding begins are written; and at last one key, `<ns>:meta`, moves everybody over. Each
step may be repeated, and until the last one readers and workers see nothing of it (decision 0003).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from afterclick.serving.epochs import Carried, EpochStore
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Keys, Meta, partition_of
from afterclick.serving.records import Head
from afterclick.serving.settings import ServingSettings, serving_settings
from afterclick.serving.store import Store
from afterclick.streams.admin import TopicsInfo, check_topics, topic_id
from afterclick.streams.beginnings import (
    Left,
    first_head,
    first_hours,
    newest_inputs,
    read_left,
)
from afterclick.streams.log import LogReader
from afterclick.streams.namespace import new_store
from afterclick.streams.outbox import Publisher, SignalsProducer
from afterclick.streams.settings import StreamsSettings, streams_settings
from afterclick.streams.signals import Origin

BASE_KEPT_S = 7 * 86400
"""How long the old epoch's records stay, for `verify`: a forgotten user's among them, so not long.
"""

HOLD_TRIES = 100
"""A worker that folds may write between our look at a head and our hold; so often in a row, never.
"""

Kind = Literal["nothing", "partitions", "topic", "recreated"]


class Report(msgspec.Struct, kw_only=True):
    """What a migration did, or would do."""

    kind: Kind = "nothing"
    """`partitions`: more of the same topic; `topic`: another name; `recreated`: the same name."""
    done: bool = False
    epoch: int = 0
    """In force when this was said."""
    partitions_before: int = 0
    partitions: int = 0
    users: int = 0
    """Carried by this run; 0 where an earlier one had come to the heads."""
    unfolded: dict[int, int] = {}
    """Records per old partition that no worker has folded yet."""
    starts: dict[int, int] = {}
    """Offset where each new partition begins."""


def migrate(
    serving: ServingSettings,
    streams: StreamsSettings,
    *,
    dry_run: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Move a namespace to the clicks topic as it is now.

    Args:
        serving: where Redis is.
        streams: the topic to move to.
        dry_run: say what would be done.
        on_step: told of each step, for people who wait.

    Raises:
        ConfigError: there is nothing in the namespace, or somebody holds a partition.
        UnavailableError: clicks of the old partitions are not folded yet, or Kafka or Redis does
            not answer.
    """
    topics = check_topics(streams)
    first = new_store(serving, Keys(serving.namespace, layout=serving.layout), Store)
    stored = first.stored_meta()
    first.close()
    meta = msgspec.json.decode(stored, type=Meta) if stored else None
    if meta is None or not meta.partitions:
        raise ConfigError(
            f"namespace {serving.namespace!r}: no worker has used it yet, so there is nobody to "
            "move; start one with `afterclick worker`, or check the namespace"
        )
    if meta.layout != serving.layout:
        raise ConfigError(
            f"namespace {serving.namespace!r}: its layout is {meta.layout!r}, "
            f"AFTERCLICK_SERVING__LAYOUT is {serving.layout!r}"
        )
    old = _store(serving, meta.partitions, meta.epoch)
    new = _store(serving, topics.clicks_partitions, meta.epoch + 1)
    reader = LogReader(streams)
    try:
        return _Migration(meta, stored, topics, streams, old, new, reader, on_step).run(
            dry_run=dry_run
        )
    finally:
        reader.close()
        old.close()
        new.close()


def drop_old(serving: ServingSettings) -> int:
    """Delete what the epoch before left for `verify`; the number of keys.

    Raises:
        ConfigError: nothing was migrated, or it was dropped before.
    """
    first = new_store(serving, Keys(serving.namespace, layout=serving.layout), Store)
    stored = first.stored_meta()
    meta = msgspec.json.decode(stored, type=Meta) if stored else Meta()
    if not meta.base_partitions:
        first.close()
        raise ConfigError(
            f"namespace {serving.namespace!r}: no earlier epoch's records are kept, so there is "
            "nothing to drop"
        )
    # `verify` looks at meta first: it must not fold on ground that is half gone.
    after = msgspec.structs.replace(meta, base_partitions=0, base_until_ms=0)
    if not first.write_meta(stored, after):
        first.close()
        raise UnavailableError(f"namespace {serving.namespace!r}: its meta moved; try again")
    first.close()
    old = _store(serving, meta.base_partitions, meta.epoch - 1)
    try:
        return old.drop()
    finally:
        old.close()


class _Migration:
    """One run, from what stands there to the switch."""

    def __init__(
        self,
        meta: Meta,
        stored_meta: bytes,
        topics: TopicsInfo,
        streams: StreamsSettings,
        old: EpochStore,
        new: EpochStore,
        reader: LogReader,
        on_step: Callable[[str], None],
    ) -> None:
        self._meta, self._stored_meta, self._topics = meta, stored_meta, topics
        self._streams, self._old, self._new, self._log = streams, old, new, reader
        self._on_step = on_step
        self._epoch = meta.epoch + 1
        self._hold = f"moved to epoch {self._epoch}: restart the workers"
        self._report = Report(
            kind=self._kind(),
            epoch=meta.epoch,
            partitions_before=meta.partitions,
            partitions=topics.clicks_partitions,
        )

    def run(self, *, dry_run: bool) -> Report:
        report = self._report
        if report.kind == "nothing":
            return report
        left = read_left(self._old)
        report.unfolded = self._unfolded(left)
        if dry_run:
            return report
        if report.unfolded:
            raise UnavailableError(f"nobody was moved: {_unfolded_words(report.unfolded)}")
        left = [self._held(partition) for partition in range(len(left))]
        self._on_step("the old epoch is held")
        self._tell(left)
        if not any(self._new.read(p, []).head for p in range(report.partitions)):
            # Heads come when all users are there: where one stands, an earlier run was through.
            report.users = self._carry(left)
            self._on_step("users are carried over")
        report.starts = self._begin(left)
        self._on_step("the new epoch has its heads")
        until_ms = (time.time_ns() // 1_000_000) + BASE_KEPT_S * 1000
        self._old.keep_until(until_ms)
        switched = msgspec.structs.replace(
            self._meta,
            partitions=report.partitions,
            topic=self._streams.clicks_topic,
            topic_id=self._topics.clicks_id,
            epoch=self._epoch,
            base_partitions=report.partitions_before,
            base_until_ms=until_ms,
        )
        if not self._new.write_meta(self._stored_meta, switched):
            raise UnavailableError("meta moved meanwhile: another migration runs; try again")
        self._on_step("switched")
        report.done, report.epoch = True, self._epoch
        return report

    def _kind(self) -> Kind:
        meta, topics = self._meta, self._topics
        same_name = meta.topic == self._streams.clicks_topic
        known = meta.topic_id or next(
            (one.head.topic_id for one in read_left(self._old) if one.head), ""
        )
        if known != topics.clicks_id and ((known and topics.clicks_id) or not same_name):
            return "recreated" if same_name else "topic"
        return "nothing" if meta.partitions == topics.clicks_partitions else "partitions"

    def _unfolded(self, left: Sequence[Left]) -> dict[int, int]:
        """Records of the old log after each head; none where that log is gone."""
        topic = self._meta.topic
        known = self._meta.topic_id
        if self._report.kind == "recreated":
            return {}
        if self._report.kind == "topic" and topic_id(self._streams, topic) not in (known, None):
            return {}  # created anew under its name: the log that was folded is gone
        if not self._log.num_partitions(topic):
            return {}
        found: dict[int, int] = {}
        for partition, one in enumerate(left):
            if one.head is not None and one.head.hold == self._hold:
                continue  # an earlier run stopped behind this check
            start, end = self._log.edges(topic, partition)
            begin = max(start, one.head.next) if one.head else start
            # Markers of transactions may follow the last record: only records count.
            num = sum(map(len, self._log.read(topic, partition, begin, end)))
            if num:
                found[partition] = num
        return found

    def _held(self, partition: int) -> Left:
        """Hold a partition where it stands: from then on no worker of the old epoch can write."""
        for _ in range(HOLD_TRIES):
            stored = self._old.read(partition, []).head
            head = msgspec.json.decode(stored, type=Head) if stored else Head()
            if head.hold == self._hold:
                return Left(stored, head)
            if head.hold:
                raise ConfigError(f"partition {partition}: it is held: {head.hold}")
            held = msgspec.structs.replace(head, hold=self._hold, batch=f"hold-{self._epoch}")
            if self._old.commit(partition, stored, held, None, [], []) is None:
                return Left(msgspec.json.encode(held), held)
        raise UnavailableError(f"partition {partition}: its head moves all the time; try again")

    def _tell(self, left: Sequence[Left]) -> None:
        """Publish moves that wait under the old epoch's keys, which no worker will look at."""
        producer, epoch = SignalsProducer(self._streams), self._meta.epoch
        publisher = Publisher(self._old, self._old.keys.namespace, producer.send, outbox_max=1)
        origins = [
            Origin(epoch, one.head.topic_id, partition)
            for partition, one in enumerate(left)
            if one.head
        ]
        try:
            while publisher.publish(origins).left:
                pass
        except UnavailableError as error:
            self._on_step(f"moves that waited are given up: {error}")  # lists know a little less
        finally:
            producer.close()

    def _carry(self, left: Sequence[Left]) -> int:
        users: set[str] = set()
        num_partitions = self._report.partitions
        for partition, user_ids in self._old.walk():
            if partition >= len(left):
                continue  # of an epoch that had more partitions
            stored, carried = self._old.take(partition, user_ids)
            if stored != left[partition].stored:
                raise UnavailableError(
                    f"partition {partition}: the hold is gone: Redis lost its last writes; run it "
                    "again"
                )
            by_partition: dict[int, list[Carried]] = {}
            for user in carried:
                to = partition_of(user.user_id, num_partitions)
                by_partition.setdefault(to, []).append(user)
            for to, some in by_partition.items():
                if not self._new.carry(to, some):
                    raise UnavailableError("another migration came to its end; run it again")
            users.update(user_ids)
        return len(users)

    def _begin(self, left: Sequence[Left]) -> dict[int, int]:
        """Write inputs, popularity and head of each new partition; where each begins."""
        starts: dict[int, int] = {}
        topic, inputs = self._streams.clicks_topic, newest_inputs(self._old, left)
        for partition in range(self._report.partitions):
            standing = self._new.read(partition, []).head
            if standing:
                starts[partition] = msgspec.json.decode(standing, type=Head).next
                continue
            start = self._log.edges(topic, partition)[0]
            if self._report.kind == "partitions" and partition < len(left):
                before = left[partition].head
                start = max(start, before.next) if before else start
            starts[partition] = start
            if inputs is None:  # nobody clicked anywhere
                head = Head(topic_id=self._topics.clicks_id, next=start, batch="epoch")
                self._new.commit(partition, b"", head, None, [], [])
                continue
            entry = msgspec.structs.replace(inputs, offset=start)
            head = first_head(self._epoch, self._topics.clicks_id, entry, left)
            hours = first_hours(self._old, entry, left, partition, self._report.partitions)
            self._new.commit(partition, b"", head, entry, [], hours)
        return starts


def _store(serving: ServingSettings, partitions: int, epoch: int) -> EpochStore:
    keys = Keys(serving.namespace, layout=serving.layout, partitions=partitions, epoch=epoch)
    return new_store(serving, keys, EpochStore)


def _unfolded_words(unfolded: dict[int, int]) -> str:
    words = ", ".join(f"{num} of partition {p}" for p, num in sorted(unfolded.items()))
    return (
        f"records of the old log are not folded yet: {words}; let the workers go on (they start "
        "with the old partitions alone), then run it again"
    )


def main(argv: Sequence[str]) -> int:
    """Move users to the partitions that the clicks topic has now."""
    parser = argparse.ArgumentParser(prog="afterclick migrate", description=main.__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument(
        "--drop-old",
        action="store_true",
        help="delete the epoch before, which `afterclick verify` folds on",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args(argv)
    serving, streams = serving_settings(os.environ), streams_settings(os.environ)
    if options.drop_old:
        num = drop_old(serving)
        sys.stdout.write(f'{{"dropped": {num}}}\n' if options.json else f"{num} keys dropped\n")
        return 0

    def say(step: str) -> None:
        sys.stderr.write(f"{step}\n")

    report = migrate(serving, streams, dry_run=options.dry_run, on_step=say)
    if options.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        sys.stdout.write(_words(report, streams.clicks_topic))
    return 0


def _words(report: Report, topic: str) -> str:
    what = {
        "nothing": "records and topic agree",
        "partitions": "the topic has more partitions",
        "topic": "the topic is another one",
        "recreated": "the topic was created anew",
    }[report.kind]
    lines = [f"{topic}: {what}: {report.partitions_before} → {report.partitions} partitions"]
    if report.kind == "nothing":
        lines = [f"{topic}: {what}: nothing to do in epoch {report.epoch}"]
    elif report.done:
        lines.append(f"epoch {report.epoch} began; {report.users} users carried")
        lines.append(
            "restart the workers; then `afterclick verify`, `afterclick migrate --drop-old`"
        )
    elif report.unfolded:
        lines.append(_unfolded_words(report.unfolded))
    else:
        lines.append("ready: run it without --dry-run")
    return "\n".join(lines) + "\n"
