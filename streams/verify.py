"""`afterclick verify`: Redis against an offline replay of the topic; `Replay`: log → records.

Every partition's clicks are folded again by the worker's own `PartitionFold`, under the releases,
items and rules
that the partition's inputs list names, and compared byte by byte: records whole, lists without
`written_ms`. It
may run beside live workers: each batch of users is read together with the head, and the replay is
taken
exactly as far as that head before the two are compared. A list or record that was renewed since its
event is computed again under the later inputs that it names.
"""

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import onnxruntime

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError
from afterclick.serving.keys import partition_of
from afterclick.serving.manifest import Publication
from afterclick.serving.records import (
    Head,
    InputsEntry,
    TopList,
    UserRecord,
    decode_record,
    encode_record,
    without_stamp,
)
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings, serving_settings
from afterclick.serving.store import Store
from afterclick.streams.admin import check_topics
from afterclick.streams.app import open_store
from afterclick.streams.fold import Inputs, renew
from afterclick.streams.log import LogReader
from afterclick.streams.partition import Chunk, Limits, LogEdges, PartitionFold, Record, Serving
from afterclick.streams.replica import Replica
from afterclick.streams.runtime import read_items
from afterclick.streams.settings import StreamsSettings, streams_settings

USERS_PER_READ = 200
CHUNK_RECORDS = 1024

log = logging.getLogger(__name__)


class Releases:
    """Releases and catalogues that inputs entries name, the last one kept ready."""

    def __init__(self, settings: ServingSettings, streams: StreamsSettings) -> None:
        self._settings = settings
        # A connection of its own: items are read while clicks are being read.
        self._reader = LogReader(streams)
        self._items_topic = streams.items_topic
        self._store = ReleaseStore(settings.releases, settings.releases_cache)
        self._key: tuple[int, str] | None = None
        self._loaded: LoadedRelease | None = None
        self._catalog = Catalog.empty()

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()

    def serving(self, entry: InputsEntry) -> Serving:
        """Release and catalogue as of one entry.

        Raises:
            ContractError: the release is gone or is not the one that was published then.
        """
        key = (entry.publication, entry.sha256)
        if key != self._key or any(
            have > then for have, then in zip(self._catalog.offsets, entry.items, strict=False)
        ):
            self._load(entry)
            self._key = key
        items = read_items(self._reader, self._items_topic, self._catalog.offsets, entry.items)
        for record in items:
            try:
                self._catalog.apply(record.item, record.partition, record.offset)
            except ContractError as error:
                log.warning("%s", error)
        if self._loaded is not None:
            self._loaded.refresh()
        return Serving(entry.publication, entry.release, entry.sha256, self._loaded, self._catalog)

    def _load(self, entry: InputsEntry) -> None:
        self._loaded, self._catalog = None, Catalog.empty()
        if entry.publication == 0:
            return
        publication = Publication(
            number=entry.publication, release=entry.release, sha256=entry.sha256
        )
        self._loaded = LoadedRelease(publication, self._store.fetch(entry.release), self._settings)
        self._catalog = self._loaded.catalog
        self._catalog.offsets = list(self._loaded.manifest.items_offset)


class Replay:
    """Folds one partition's log again, as far as it is told."""

    def __init__(
        self,
        partition: int,
        entries: list[InputsEntry],
        releases: Releases,
        reader: LogReader,
        topic: str,
    ) -> None:
        self.partition = partition
        self.replica = Replica()
        self.position = entries[0].offset
        self.last_seen_ms: dict[str, int] = {}
        self._entries = entries
        self._at = -1
        self._releases = releases
        self._reader = reader
        self._topic = topic
        self._serving: Serving | None = None
        self._fold: PartitionFold | None = None

    @property
    def head(self) -> Head:
        """Where the replay stands."""
        stored = self.replica.heads.get(self.partition)
        return msgspec.json.decode(stored, type=Head) if stored else Head()

    @property
    def users(self) -> set[str]:
        """Everybody with a record or a list."""
        return {*(user for _, user in self.replica.records), *self.replica.lists}

    def run_to(self, stop: int, entries: list[InputsEntry]) -> None:
        """Fold up to offset `stop`, under the inputs known by now."""
        self._entries = entries
        for records in self._reader.read(self._topic, self.partition, self.position, stop):
            for piece in self._pieces(records):
                self._take(piece)
        self.position = stop

    def _pieces(self, records: list[Record]) -> Iterator[list[Record]]:
        """Records cut where other inputs came into force."""
        borders = [entry.offset for entry in self._entries]
        for _, group in itertools.groupby(
            records, key=lambda record: sum(border <= record.offset for border in borders)
        ):
            piece = list(group)
            for start in range(0, len(piece), CHUNK_RECORDS):
                yield piece[start : start + CHUNK_RECORDS]

    def _take(self, piece: list[Record]) -> None:
        first, end = piece[0].offset, piece[-1].offset + 1
        at = sum(entry.offset <= first for entry in self._entries) - 1
        if at != self._at:
            self._enter(self._entries[at])
            self._at = at
        fold = self._fold
        assert fold is not None
        fold.process(Chunk(fold.position, end, piece))
        for record in piece:
            if record.key is not None:
                self.last_seen_ms[record.key.decode(errors="replace")] = record.timestamp_ms

    def _enter(self, entry: InputsEntry) -> None:
        self._serving = self._releases.serving(entry)
        if self._fold is None or self._fold.rules != entry.rules:
            self._fold = PartitionFold(
                self.partition,
                self.replica,
                entry.rules,
                Limits(users_max=256, records_max=CHUNK_RECORDS, bytes_max=1 << 30),
                serving=lambda: self._serving or _no_serving(),
                dead_letters=lambda letters: None,
                log_start=lambda: 0,
                batch_ids=(f"replay-{n}" for n in itertools.count()),
            )
            self._fold.open(LogEdges("", entry.offset, sys.maxsize), lambda offset: None)


class _Later(NamedTuple):
    """A user whose list is not the one of the replay: it may have been renewed."""

    user_id: str
    record: bytes | None
    top: bytes
    expected: bytes | None
    expected_top: bytes

    @property
    def renewable(self) -> tuple[UserRecord | None, int, int]:
        """The replay's record, and the event that the list answers."""
        top = _decoded(self.expected_top)
        return decode_record(self.expected) if self.expected else None, top.offset, top.event_ms


class Report(msgspec.Struct, kw_only=True):
    """What a verification found."""

    partitions: int = 0
    clicks: int = 0
    users: int = 0
    records: int = 0
    lists: int = 0
    expired: int = 0
    behind: int = 0
    """Records of the log that no worker has folded yet."""
    put_off: int = 0
    """Lists that are due: their users' states went on under load."""
    renewed: int = 0
    """Users whose list or record was made anew under later inputs."""
    lost: int = 0
    doubled: int = 0
    differences: int = 0
    first_difference: str | None = None
    fingerprint: dict[str, str] = {}
    seconds: float = 0.0

    def differ(self, words: str) -> None:
        """Count a difference, and keep the first one's words."""
        self.differences += 1
        self.first_difference = self.first_difference or words


def verify(
    serving: ServingSettings,
    streams: StreamsSettings,
    *,
    user: str | None = None,
) -> Report:
    """Compare every partition, or one user's.

    Raises:
        ContractError: the log or a release that the inputs name is gone, so nothing can be said.
        UnavailableError: Kafka or Redis does not answer.
    """
    begun_s = time.monotonic()
    topics = check_topics(streams)
    store = open_store(serving, topics)
    reader = LogReader(streams)
    releases, renewals = Releases(serving, streams), Releases(serving, streams)
    report = Report(
        fingerprint={
            "onnxruntime": onnxruntime.__version__,
            "cpu": _cpu_level(),
            "provider": serving.provider,
        }
    )
    chosen = range(topics.clicks_partitions)
    if user is not None:
        partition = partition_of(user, topics.clicks_partitions)
        chosen = range(partition, partition + 1)
    try:
        for partition in chosen:
            _verify_partition(partition, store, reader, releases, renewals, streams, report, user)
    finally:
        reader.close()
        releases.close()
        renewals.close()
        store.close()
    report.seconds = round(time.monotonic() - begun_s, 3)
    return report


def _verify_partition(
    partition: int,
    store: Store,
    reader: LogReader,
    releases: Releases,
    renewals: Releases,
    streams: StreamsSettings,
    report: Report,
    user: str | None,
) -> None:
    report.partitions += 1
    topic = streams.clicks_topic
    start, end = reader.edges(topic, partition)
    stored = store.read(partition, []).head
    if not stored:
        report.behind += end - start
        return
    head = msgspec.json.decode(stored, type=Head)
    entries = store.inputs(partition)
    if not entries:
        report.differ(f"partition {partition}: there is a head at {head.next} and no inputs list")
        return
    if start > entries[0].offset:
        raise ContractError(
            f"verify: partition {partition}: its fold began at offset {entries[0].offset}, "
            f"the log now starts at {start}: what was dropped cannot be folded again",
            reason="log-truncated",
        )
    replay = Replay(partition, entries, releases, reader, topic)
    replay.run_to(head.next, entries)
    report.behind += max(0, end - head.next)
    users = sorted({user} if user else {*replay.users, *store.users(partition)})
    later: list[_Later] = []
    for at in range(0, len(users), USERS_PER_READ):
        batch = users[at : at + USERS_PER_READ]
        head = _compare(batch, partition, store, replay, report, later)
    _compare_renewed(partition, later, store.inputs(partition), renewals, report)
    report.users += len(users)
    report.clicks += replay.head.clicks
    report.lost += max(0, replay.head.clicks - head.clicks)
    report.doubled += max(0, head.clicks - replay.head.clicks)
    if replay.head.clicks != head.clicks:
        report.differ(
            f"partition {partition}: {head.clicks} clicks counted in Redis, "
            f"{replay.head.clicks} by replay"
        )


def _compare(
    users: list[str],
    partition: int,
    store: Store,
    replay: Replay,
    report: Report,
    later: list[_Later],
) -> Head:
    stored, standing = store.read_standing(partition, users)
    if not stored:
        raise ContractError(f"verify: partition {partition}: its head vanished meanwhile")
    head = msgspec.json.decode(stored, type=Head)
    if head.next < replay.position:
        raise ContractError(
            f"verify: partition {partition}: its head went back from {replay.position} to "
            f"{head.next} meanwhile; run it again"
        )
    replay.run_to(head.next, store.inputs(partition))
    replica = replay.replica
    for name, found in zip(users, standing, strict=True):
        where = f"partition {partition}, user {name!r}"
        record, due = found.record, found.due
        top = without_stamp(found.list_data) if found.list_data else None
        expected, expected_top = replica.records.get((partition, name)), replica.lists.get(name)
        if record is None and top is None and due is None and _is_expired(name, replay, store):
            report.expired += 1
            continue
        report.records += expected is not None
        report.lists += expected_top is not None
        if due is not None:
            report.put_off += 1
            answers = _decoded(expected_top).offset if expected_top else None
            if due.offset != answers:
                report.differ(f"{where}: due is a list for offset {due.offset}, not {answers}")
        elif top is not None and expected_top is not None and top != expected_top:
            later.append(_Later(name, record, top, expected, expected_top))
            continue
        elif top != expected_top:
            report.differ(f"{where}: list: {_list_words(top, expected_top)}")
        if record != expected:
            report.differ(f"{where}: record: {_record_words(record, expected)}")
    return head


def _compare_renewed(
    partition: int,
    later: list[_Later],
    entries: list[InputsEntry],
    releases: Releases,
    report: Report,
) -> None:
    """Compute lists and records under the inputs that they name, entry by entry."""
    left = {case.user_id: case for case in later}
    for at, entry in enumerate(entries):
        named = {
            user_id: case
            for user_id, case in left.items()
            if (top := _decoded(case.top)).publication == entry.publication
            and top.items_offset == entry.items
            # Not of inputs that its own event had already left behind.
            and sum(e.offset <= _decoded(case.expected_top).offset for e in entries) <= at + 1
        }
        if not named:
            continue
        serving = releases.serving(entry)
        if serving.release is None:
            continue
        folded = renew(
            {user_id: case.renewable for user_id, case in named.items()},
            partition=partition,
            inputs=Inputs(
                entry.publication,
                entry.release,
                entry.sha256,
                tuple(entry.publication_items),
                tuple(entry.items),
                entry.rules,
            ),
            release=serving.release,
        )
        for user_id, case in named.items():
            record = folded.records[user_id]
            packed = encode_record(record) if record else None
            if (packed, folded.lists[user_id]) == (case.record, case.top):
                report.renewed += 1
                del left[user_id]
            else:
                left[user_id] = case._replace(expected=packed, expected_top=folded.lists[user_id])
    for user_id, case in left.items():
        where = f"partition {partition}, user {user_id!r}"
        if case.record != case.expected:
            report.differ(f"{where}: record: {_record_words(case.record, case.expected)}")
        else:
            report.differ(f"{where}: list: {_list_words(case.top, case.expected_top)}")


def _decoded(top: bytes) -> TopList:
    return msgspec.json.decode(top, type=TopList)


def _is_expired(user: str, replay: Replay, store: Store) -> bool:
    seen_ms = replay.last_seen_ms.get(user)
    return seen_ms is not None and time.time() - seen_ms / 1000 > store.record_ttl_s


def _record_words(found: bytes | None, expected: bytes | None) -> str:
    if found is None or expected is None:
        return f"Redis has {'one' if found else 'none'}, the replay {'one' if expected else 'none'}"
    left, right = decode_record(found), decode_record(expected)
    for name, a, b in zip(left._fields, left, right, strict=True):
        if a != b:
            if isinstance(a, bytes) and isinstance(b, bytes):
                at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
                return f"{name} differs at byte {at} of {len(a)}, the replay has {len(b)} bytes"
            return f"{name} is {a} in Redis, {b} by replay"
    return "differs in its header only"


def _list_words(found: bytes | None, expected: bytes | None) -> str:
    if found is None or expected is None:
        return f"Redis has {'one' if found else 'none'}, the replay {'one' if expected else 'none'}"
    left: dict[str, Any] = msgspec.json.decode(found)
    right: dict[str, Any] = msgspec.json.decode(expected)
    for name in right:
        a, b = left.get(name), right[name]
        if a != b:
            if isinstance(a, list) and isinstance(b, list):
                at = next(
                    (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                    min(len(a), len(b)),
                )
                return f"{name}[{at}] is {a[at : at + 1]} in Redis, {b[at : at + 1]} by replay"
            return f"{name} is {a!r} in Redis, {b!r} by replay"
    return "differs in its form only"


def _no_serving() -> Serving:
    raise AssertionError("a replay enters an entry before it folds")


def _cpu_level() -> str:
    """Widest vector instructions, which decide float32 sums; AVX2 and AVX-512 gave equal bits."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - not a file of ours
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return "unknown"
    return next((level for level in ("avx512f", "avx2", "sse4_2") if level in flags), "unknown")


def main(argv: Sequence[str]) -> int:
    """Compare records and lists in Redis with an offline replay of the log."""
    parser = argparse.ArgumentParser(prog="afterclick verify", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--user", help="one user instead of all")
    options = parser.parse_args(argv)
    report = verify(serving_settings(os.environ), streams_settings(os.environ), user=options.user)
    if options.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        sys.stdout.write(
            f"{report.records} records and {report.lists} lists of {report.users} users in "
            f"{report.partitions} partitions, {report.clicks} clicks: "
            f"{report.differences} differences; {report.renewed} users renewed since, "
            f"{report.put_off} lists due, {report.behind} log records not folded yet\n"
        )
        if report.first_difference:
            sys.stdout.write(f"first difference: {report.first_difference}\n")
    return 1 if report.differences else 0
