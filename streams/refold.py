"""Folds a partition's log again, as its inputs list tells: log → records, and lists where asked.

The worker's own `PartitionFold` does it, in large pieces and into memory, with the lists put off: a
list
is a function of the record and of the inputs that it names, so it is made once, under whichever
entry
the caller says. `verify` compares what comes out, `rebuild` writes it.
"""

import itertools
import logging
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import Publication
from afterclick.serving.records import Head, InputsEntry, TopList, decode_record, encode_record
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.streams.feed import ReadAhead, absorber_of, catch_up
from afterclick.streams.fold import Inputs, renew
from afterclick.streams.joined import JoinedLog
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges, Record
from afterclick.streams.replica import Replica
from afterclick.streams.runtime import read_items
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.signals import Absorber

PIECE_RECORDS = 16_384
"""Folded at once: fewer, larger calls of the step graph. At H 128 its tensors take some 100 MB."""

REBUILDS_MAX = 2048
"""Users rebuilt from 50 interactions in one call: about as much memory."""

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a user's list is made of: the record, and the event that it answers."""

    record: bytes
    """Packed; empty for a visitor without a past."""
    offset: int
    event_ms: int


class Made(NamedTuple):
    """A user's bytes under some entry of the inputs."""

    record: bytes
    """Rebuilt where it was of another publication."""
    list_body: bytes


class Releases:
    """Releases and catalogues that inputs entries name, the last one kept ready."""

    def __init__(self, settings: ServingSettings, streams: StreamsSettings) -> None:
        self._settings = settings
        # A connection of its own: items are read while clicks are being read.
        self._reader = JoinedLog(streams)
        self._ahead = ReadAhead(self._reader)
        self._items_topic = streams.items_topic
        self._signals_topic = streams.signals_topic
        self._namespace = settings.namespace
        self._absorber: Absorber | None = None
        self._signals_end = 0
        self._store = ReleaseStore(settings.releases, settings.releases_cache)
        self._key: tuple[int, str, str] | None = None
        self._loaded: LoadedRelease | None = None
        self._catalog = Catalog.empty()
        self.whole = True
        """Whether the signals topic still had all that the last `make` rests on."""

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def serving(self, entry: InputsEntry) -> Serving:
        """Release and catalogue as of one entry.

        Raises:
            ContractError: the release is gone or is not the one that was published then.
        """
        key = (entry.publication, entry.sha256, entry.rules.scan)
        if key != self._key or any(
            have > then
            for have, then in itertools.zip_longest(self._catalog.offsets, entry.items, fillvalue=0)
        ):
            self._key = None
            self._load(entry)
            self._key = key
        items = read_items(self._ahead, self._items_topic, self._catalog.offsets, entry.items)
        for record in items:
            try:
                self._catalog.apply(record.item, record.partition, record.offset)
            except ContractError as error:
                log.warning("%s", error)
        if self._loaded is not None:
            self._loaded.refresh()
        return Serving(entry.publication, entry.release, entry.sha256, self._loaded, self._catalog)

    def make(
        self,
        entry: InputsEntry,
        partition: int,
        answers: Mapping[str, Answer],
        *,
        signals: int = 0,
    ) -> dict[str, Made]:
        """Users' lists, and their records, as they are under one entry.

        Args:
            entry: of a publication: without a release, lists are made inside the fold only.
            partition: whose users these are.
            answers: per user, as of the event in question.
            signals: how much of the signals topic the lists know, where the release has a memory;
                cheap if it is not below that of the last call.
        """
        serving = self._hearing(entry, signals)
        assert serving.release is not None
        made: dict[str, Made] = {}
        users = iter(answers.items())
        while some := dict(itertools.islice(users, REBUILDS_MAX)):
            folded = renew(
                {
                    user: (decode_record(one.record) if one.record else None, *one[1:])
                    for user, one in some.items()
                },
                partition=partition,
                inputs=inputs_of(entry)._replace(signals=serving.signals),
                release=serving.release,
            )
            for user, record in folded.records.items():
                made[user] = Made(encode_record(record) if record else b"", folded.lists[user])
        return made

    def signals_end(self, at_least: int = 0) -> int:
        """End of the signals topic, as of the last look that found it short of `at_least`."""
        if self._signals_end <= at_least:
            self._signals_end = self._reader.edges(self._signals_topic, 0)[1]
        return self._signals_end

    def _hearing(self, entry: InputsEntry, signals: int) -> Serving:
        """As `serving`, the release's memory at an offset of the signals topic."""
        serving = self.serving(entry)
        self.whole = True
        if self._absorber is None:
            return serving
        if self._absorber.offset > signals:  # a memory cannot go back
            self._key = None
            serving = self.serving(entry)
        self.whole = catch_up(self._ahead, self._signals_topic, self._absorber, signals)
        return serving._replace(signals=signals)

    def _load(self, entry: InputsEntry) -> None:
        self._loaded, self._catalog, self._absorber = None, Catalog.empty(), None
        if entry.publication == 0:
            return
        publication = Publication(
            number=entry.publication, release=entry.release, sha256=entry.sha256
        )
        # Lists are those of the scan that made them, whatever this process was told.
        settings = msgspec.structs.replace(self._settings, scan=entry.rules.scan)
        self._loaded = LoadedRelease(publication, self._store.fetch(entry.release), settings)
        self._catalog = self._loaded.catalog
        self._catalog.offsets = list(self._loaded.manifest.items_offset)
        self._absorber = absorber_of(self._loaded, self._namespace)


class Refold:
    """One partition's log folded again, as far as it is told.

    Args:
        partition: whose log.
        entries: its inputs list, at least one; folding starts at the first one's offset.
        releases: gives what the entries name.
        reader: gives the log.
        topic: of clicks.
        topic_id: Kafka's id of it, for the head.
        only: fold this user's records alone; the head's counters mean nothing then.
        signals_from: keep the moves of clicks from this offset on; of none unless given.
    """

    def __init__(
        self,
        partition: int,
        entries: Sequence[InputsEntry],
        releases: Releases,
        reader: JoinedLog,
        topic: str,
        *,
        topic_id: str = "",
        only: str | None = None,
        signals_from: int = sys.maxsize,
    ) -> None:
        self.partition = partition
        self.replica = Replica(signals_from)
        self.position = entries[0].offset
        self.last_seen_ms: dict[str, int] = {}
        self._entries = list(entries)
        self._at = -1
        self._releases = releases
        self._reader = reader
        self._topic = topic
        self._topic_id = topic_id
        self._only = only.encode() if only is not None else None
        self._serving: Serving | None = None
        self._fold: PartitionFold | None = None
        self._batches = (f"refold-{n}" for n in itertools.count())

    @property
    def head(self) -> Head:
        """Where it stands."""
        stored = self.replica.heads.get(self.partition)
        return msgspec.json.decode(stored, type=Head) if stored else Head()

    @property
    def users(self) -> set[str]:
        """Everybody with a record or a list."""
        replica = self.replica
        return {*(u for _, u in replica.records), *replica.lists, *(u for _, u in replica.due)}

    def run_to(self, stop: int, entries: Sequence[InputsEntry]) -> None:
        """Fold up to offset `stop`, under the inputs known by now.

        Raises:
            ContractError: a part of the log is gone, or a release that the entries name.
            UnavailableError: Kafka or the archive does not answer.
        """
        self._entries = list(entries)
        waiting: list[Record] = []
        for records in self._reader.read(self._topic, self.partition, self.position, stop):
            for record in records:
                if record.key is not None:
                    name = record.key.decode(errors="replace")
                    self.last_seen_ms[name] = record.timestamp_ms
            if self._only is not None:
                records = [record for record in records if record.key == self._only]
            waiting += records
            while len(waiting) >= PIECE_RECORDS:
                self._take(waiting[:PIECE_RECORDS])
                waiting = waiting[PIECE_RECORDS:]
        self._take(waiting)
        self.position = stop
        self._enter(in_force(self._entries, stop))  # what came after the last record

    def answer(self, user: str) -> Answer | None:
        """Record and event of a user's list, None for a user without a list."""
        record = self.replica.records.get((self.partition, user), b"")
        due = self.replica.due.get((self.partition, user))
        if due is not None:
            return Answer(record, due.offset, due.event_ms)
        body = self.replica.lists.get(user)
        if body is None:
            return None
        top = msgspec.json.decode(body, type=TopList)
        return Answer(record, top.offset, top.event_ms)

    def _take(self, records: list[Record]) -> None:
        for at, piece in self._pieces(records):
            self._enter(at)
            fold = self._fold
            assert fold is not None
            moved = fold.process(Chunk(fold.position, piece[-1].offset + 1, piece), put_off=True)
            assert moved.seek is None, "nobody else writes here"
            assert moved.waiting_for is None, "entries only go forward"

    def _pieces(self, records: list[Record]) -> Iterator[tuple[int, list[Record]]]:
        """Records cut where other inputs came into force, with the entry's place."""
        borders = [entry.offset for entry in self._entries]
        for at, piece in itertools.groupby(
            records, key=lambda record: bisect_right(borders, record.offset) - 1
        ):
            yield at, list(piece)

    def _enter(self, at: int) -> None:
        """Put the entries up to this one in force, in order, each as the worker did."""
        while self._at < at:
            self._at += 1
            entry = self._entries[self._at]
            self._serving = self._releases.serving(entry)
            if self._fold is None or self._fold.rules != entry.rules:
                self._fold = self._new_fold(entry)
            entered = self._fold.enter()
            assert entered, "nobody else writes here"

    def _new_fold(self, entry: InputsEntry) -> PartitionFold:
        fold = PartitionFold(
            self.partition,
            self.replica,
            entry.rules,
            Limits(
                users_max=PIECE_RECORDS,
                records_max=PIECE_RECORDS,
                bytes_max=1 << 30,
                cache_users_max=sys.maxsize,
                rebuilds_max=REBUILDS_MAX,
            ),
            serving=lambda: self._serving or _no_serving(),
            dead_letters=lambda letters: None,
            log_start=lambda: 0,
            batch_ids=self._batches,
        )
        edges = LogEdges(self._topic_id, self._entries[0].offset, sys.maxsize)
        fold.open(edges, lambda offset: None)
        return fold


def in_force(entries: Sequence[InputsEntry], offset: int) -> int:
    """Place of the entry under which the record at an offset is folded."""
    return bisect_right([entry.offset for entry in entries], offset) - 1


def inputs_of(entry: InputsEntry) -> Inputs:
    """An entry as the fold takes it."""
    return Inputs(
        entry.publication,
        entry.release,
        entry.sha256,
        tuple(entry.publication_items),
        tuple(entry.items),
        entry.rules,
    )


def _no_serving() -> Serving:
    raise AssertionError("an entry is entered before anything is folded")
