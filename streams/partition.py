"""One partition's way from log to Redis: what is applied, skipped, refused or read again.

Knows neither Faust, threads nor a clock: the app feeds it chunks and moves the consumer as told;
the simulation drives it the same way. What a chunk needs of Redis and the model is asked of whoever
runs its steps, for several partitions at once (lockstep.py). It holds the exactly-once rules of
docs/architecture.md:

- the stored head says where the log goes on; Kafka's committed offset is only a hint;
- a chunk below the head is skipped, one that overlaps is cut, one beyond it is a hole: seek back;
- everything is read in one MGET and written by one script, which fences on the whole head;
- on any mismatch every cache is dropped and the stored head is where things go on.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError, UnavailableError
from afterclick.serving.records import (
    Head,
    InputsEntry,
    UserRecord,
    decode_record,
    decode_stored,
    encode_record,
    rules_digest,
)
from afterclick.serving.settings import ListRules
from afterclick.serving.store import (
    Commit,
    PopularityWrite,
    Read,
    Reading,
    SignalsWrite,
    Standing,
    UserWrite,
)
from afterclick.streams.events import FoldEvent
from afterclick.streams.fold import Counts, Folded, Inputs, Part, fold, renew
from afterclick.streams.inference import Release
from afterclick.streams.lockstep import Folding, Steps, in_step
from afterclick.streams.piece import Limits, Piece, answers, take, user_writes, within_rebuilds
from afterclick.streams.popularity import Popularity
from afterclick.streams.record import Chunk, DeadLetter, LogEdges, Record, record_crc
from afterclick.streams.signals import encode_parcel


class Serving(NamedTuple):
    """What a worker serves at a chunk boundary."""

    publication: int
    name: str
    sha256: str
    release: Release | None
    catalog: Catalog
    signals: int = 0
    """Offset of the signals topic that the release's memory stands at."""


class PartitionStore(Protocol):
    """What this module needs of `serving.store.Store`."""

    def read(self, partition: int, user_ids: Sequence[str]) -> Read: ...  # noqa: D102
    def read_popularity(  # noqa: D102
        self, partition: int, buckets: Sequence[int]
    ) -> tuple[bytes, dict[int, dict[str, int]]]: ...
    def commit(  # noqa: D102
        self,
        partition: int,
        expected: bytes,
        head: Head,
        entry: InputsEntry | None,
        users: Sequence[UserWrite],
        popularity: Sequence[PopularityWrite],
        signals: SignalsWrite | None = None,
    ) -> bytes | None: ...
    def read_all(self, asked: Sequence[Reading]) -> list[Read]: ...  # noqa: D102
    def commit_all(self, commits: Sequence[Commit]) -> list[bytes | None]: ...  # noqa: D102
    def due_users(self, partition: int, limit: int) -> list[str]: ...  # noqa: D102
    def read_standing(  # noqa: D102
        self, partition: int, user_ids: Sequence[str]
    ) -> tuple[bytes, list[Standing]]: ...
    def renew(  # noqa: D102
        self, partition: int, expected: bytes, users: Sequence[UserWrite]
    ) -> bytes | None: ...


class Applied(NamedTuple):
    """One write that went through."""

    records: int
    bytes: int
    users: int
    counts: Counts
    dead_letters: int
    oldest_ms: int
    """Smallest record timestamp in it: how long its first click waited."""
    put_off: int = 0
    """Lists that are due since."""


class Renewed(NamedTuple):
    """What a renewal came to."""

    lists: int = 0
    rebuilt: int = 0
    oldest_due_ms: int | None = None
    """Smallest record timestamp that a due list waited for."""
    seek: int | None = None
    """Another writer was seen: the consumer must go here."""


class Moved(NamedTuple):
    """What processing a chunk came to."""

    applied: list[Applied]
    seek: int | None = None
    """The consumer must go here: a hole, or another writer was seen."""
    mismatch: bool = False
    """Another writer was seen."""
    waiting_for: int | None = None
    """Publication that the head is on and this worker has not loaded: try the chunk again later."""


class PartitionFold:
    """Folds one partition; used by one thread at a time."""

    def __init__(
        self,
        partition: int,
        store: PartitionStore,
        rules: ListRules,
        limits: Limits,
        *,
        serving: Callable[[], Serving],
        dead_letters: Callable[[list[DeadLetter]], None],
        log_start: Callable[[], int],
        batch_ids: Iterator[str],
        accept_loss: bool = False,
    ) -> None:
        self.partition = partition
        self.lost_records = 0
        """Records that the log dropped before they were folded, under `accept_loss`."""
        self._store = store
        self._rules = rules
        self._digest = rules_digest(rules)
        self._limits = limits
        self._serving = serving
        self._dead_letters = dead_letters
        self._log_start = log_start
        self._batch_ids = batch_ids
        self._accept_loss = accept_loss
        self._stored = b""
        self._head = Head()
        self._opened = False
        self._torn = False  # an exception left this object between two states
        self.has_due = True  # unknown yet
        """Whether lists may be due; false once a look found none."""
        self.has_signals = True  # unknown yet: a former owner may have left some
        """Whether moves may wait to be published; whoever publishes them says so."""
        self._cache: dict[str, UserRecord | None] = {}
        self._popularity = self._new_popularity()

    @property
    def position(self) -> int:
        """Offset of the first record not yet folded."""
        return self._head.next

    @property
    def topic_id(self) -> str:
        """Kafka's id of the topic whose log it folds."""
        return self._head.topic_id

    @property
    def rules(self) -> ListRules:
        """The rules it folds by."""
        return self._rules

    @property
    def popularity(self) -> Popularity:
        """This partition's popularity as of the head."""
        return self._popularity

    def open(self, edges: LogEdges, crc_at: Callable[[int], int | None]) -> int:
        """Take the partition over from whoever had it.

        Args:
            edges: the log as the broker has it now.
            crc_at: reads one record again and gives its `record_crc`, None where it is gone.

        Returns:
            The offset to read from.

        Raises:
            ContractError: the head does not belong to this log; the message names the remedy.
            UnavailableError: Redis does not answer, or somebody holds the partition.
        """
        self._reload()
        head, where = self._head, f"partition {self.partition}"
        if not self._stored:
            self._head = Head(topic_id=edges.topic_id, next=edges.start)
        elif head.topic_id and edges.topic_id and head.topic_id != edges.topic_id:
            raise ContractError(
                f"{where}: the head belongs to topic id {head.topic_id}, the topic now has "
                f"{edges.topic_id}: it was created anew; set another AFTERCLICK_SERVING__NAMESPACE "
                "to start over",
                reason="topic-recreated",
            )
        elif head.next > edges.end:
            raise ContractError(
                f"{where}: the head is at {head.next}, the log ends at {edges.end}: the log lost "
                "records; set another AFTERCLICK_SERVING__NAMESPACE to start over",
                reason="head-past-end",
            )
        elif head.next < edges.start:
            if not self._accept_loss:
                raise self._dropped(edges.start, edges.start - head.next)
            self.lost_records += edges.start - head.next
            self._head = msgspec.structs.replace(head, next=edges.start)
        elif head.last_offset >= edges.start:
            found = crc_at(head.last_offset)
            if found is not None and found != head.last_crc:
                raise ContractError(
                    f"{where}: the record at offset {head.last_offset} is not the one that was "
                    f"folded (crc {found:08x}, head says {head.last_crc:08x}); set another "
                    "AFTERCLICK_SERVING__NAMESPACE to start over",
                    reason="log-changed",
                )
        self._opened = True
        return self._head.next

    def check(self) -> int | None:
        """Look whether the stored head is still ours; None or the offset to go to.

        An idle worker would otherwise not notice that Redis came back from a failover with an older
        head.
        """
        if self._store.read(self.partition, []).head == self._stored:
            # Renewals and striking moves off leave the head: a failover that lost one brought due
            # marks, or moves that are published, back unseen.
            self.has_due = self.has_signals = True
            return None
        self._reload()
        return self._head.next

    def process(self, chunk: Chunk, *, put_off: bool = False) -> Moved:
        """`processing` from begin to end, alone."""
        (moved,) = in_step([self.processing(chunk, put_off=put_off)], self._store, fold)
        if isinstance(moved, Exception):
            raise moved
        return moved

    def processing(self, chunk: Chunk, *, put_off: bool = False) -> Steps[Moved]:
        """Fold what of a chunk is new, in writes within the limits.

        Args:
            chunk: records as they came.
            put_off: advance states only; the lists are due, and `renew_due` makes them.
        """
        self._mend()
        applied: list[Applied] = []
        if chunk.end <= self._head.next:
            return Moved(applied)
        if chunk.begin > self._head.next:
            return Moved(applied, seek=self._head.next)
        records = [record for record in chunk.records if record.offset >= self._head.next]
        self._check_gaps(records)
        self._torn = True
        while records:
            serving = self._serving()
            if self._is_ahead_of(serving):
                self._torn = False
                return Moved(applied, waiting_for=self._head.publication)
            piece = take(records, self._limits)
            written = yield from self._write(piece, serving, put_off=put_off)
            if written is None:
                self._reload()
                return Moved(applied, seek=self._head.next, mismatch=True)
            applied.append(written)
            records = records[written.records :]
        self._torn = False
        return Moved(applied)

    def renew_due(self, limit: int) -> Renewed:
        """Make up to `limit` of the lists that were put off."""
        if self._torn:
            return self._overtaken()
        users = self._store.due_users(self.partition, limit)
        if not users:
            self.has_due = False
            return Renewed()
        return self.renew(users)

    def renew(self, user_ids: Sequence[str]) -> Renewed:
        """Make lists anew, under the release and the items in force; up-to-date ones stay.

        A list keeps the event that it answers. Records of another publication are rebuilt, so that
        the next click finds them ready.
        """
        if self._torn:
            return self._overtaken()
        serving = self._serving()
        release = serving.release
        if not user_ids or not self._stored or release is None or self._is_ahead_of(serving):
            return Renewed()
        self._torn = True
        inputs, entry = self._inputs(serving)
        if entry is not None and not self._enter(inputs, entry):
            return self._overtaken()
        stored, standing = self._store.read_standing(self.partition, user_ids)
        if stored != self._stored:
            return self._overtaken()
        wanted: dict[str, tuple[UserRecord | None, int, int]] = {}
        for user_id, user in zip(user_ids, standing, strict=True):
            if (event := answers(user, inputs)) is not None:
                record = decode_record(user.record) if user.record else None
                wanted[user_id] = (record, *event)
        folded = renew(wanted, partition=self.partition, inputs=inputs, release=release)
        rebuilt = {
            user_id: record
            for user_id, record in folded.records.items()
            if record is not None and record != wanted[user_id][0]
        }
        writes = [
            UserWrite(user, encode_record(rebuilt[user]) if user in rebuilt else b"", body)
            for user, body in folded.lists.items()
        ]
        if writes and self._store.renew(self.partition, self._stored, writes) is not None:
            return self._overtaken()
        self._cache.update(
            (user, record) for user, record in rebuilt.items() if user in self._cache
        )
        self._torn = False
        return Renewed(
            lists=len(writes),
            rebuilt=len(rebuilt),
            oldest_due_ms=min((user.due.record_ms for user in standing if user.due), default=None),
        )

    def enter(self) -> bool:
        """Put what is served now in force without a record, as `renew` does before it makes lists.

        Returns:
            False when another writer was seen.
        """
        self._mend()
        inputs, entry = self._inputs(self._serving())
        # Where nothing stands yet, the first record brings its inputs.
        return not self._stored or entry is None or self._enter(inputs, entry)

    def recent_users(self, limit: int) -> list[str]:
        """Users written last by this worker, newest first."""
        return list(itertools.islice(reversed(self._cache), limit))

    def _mend(self) -> None:
        assert self._opened, "open() decides whether this log may be folded at all"
        if self._torn:
            # A write may or may not have gone through before the exception: Redis knows.
            self._reload()

    def _overtaken(self) -> Renewed:
        """Go on from Redis, which may stand before where the consumer reads."""
        self._reload()
        return Renewed(seek=self._head.next)

    def _is_ahead_of(self, serving: Serving) -> bool:
        """Whether the stored head rests on a release or on items that this worker does not have
        yet.
        """
        head = self._head
        if head.publication != serving.publication:
            return head.publication > serving.publication
        have = serving.catalog.offsets
        return any(
            needed > (have[at] if at < len(have) else 0)
            for at, needed in enumerate(head.publication_items)
        )

    def _check_gaps(self, records: Sequence[Record]) -> None:
        """Tell gaps that markers or compaction left from records that the log dropped unread."""
        ends = [self._head.next, *(record.offset + 1 for record in records)]
        gaps = [
            (end, record.offset)
            for end, record in zip(ends, records, strict=False)
            if record.offset > end
        ]
        if not gaps:
            return
        start = self._log_start()
        lost = sum(max(0, min(start, first) - end) for end, first in gaps)
        if lost and not self._accept_loss:
            raise self._dropped(start, lost)
        self.lost_records += lost

    def _dropped(self, start: int, lost: int) -> ContractError:
        return ContractError(
            f"partition {self.partition}: the head is at {self._head.next}, the log starts at "
            f"{start}: {lost} records were dropped before they were folded; set "
            "AFTERCLICK_STREAMS__ACCEPT_LOSS=true to go on without them",
            reason="head-before-start",
        )

    def _write(
        self,
        piece: Piece,
        serving: Serving,
        *,
        put_off: bool,
    ) -> Steps[Applied | None]:
        """Fold and write; None when another writer was seen."""
        user_ids = dict.fromkeys(e.user_id for _, e in piece if isinstance(e, FoldEvent))
        records = yield from self._records_of(list(user_ids))
        if records is None:
            return None
        inputs, entry = self._inputs(serving)
        piece = within_rebuilds(piece, records, inputs.publication, self._limits.rebuilds_max)
        events = [event for _, event in piece if isinstance(event, FoldEvent)]
        letters = [letter for _, letter in piece if isinstance(letter, DeadLetter)]
        if letters:
            # Their acknowledgement comes before the offset moves, so none is ever lost.
            self._dead_letters(letters)
        part = Part(self.partition, events, records, inputs, self._popularity, put_off)
        folded: Folded = yield Folding(part, serving.release, serving.catalog)
        last = piece[-1][0]
        head = msgspec.structs.replace(
            self._head_under(inputs),
            next=last.offset + 1,
            last_offset=last.offset,
            last_crc=record_crc(last.key, last.value),
            clicks=self._head.clicks + folded.counts.clicks,
            watermark_ms=self._popularity.watermark_ms,
        )
        came_ms = {record.offset: record.timestamp_ms for record, _ in piece}
        users = user_writes(folded, came_ms)
        hours = [PopularityWrite(hour, counts) for hour, counts in folded.popularity.items()]
        signals = None
        if folded.moves:
            packed = encode_parcel(self._head.next, head.next, folded.moves)
            signals = SignalsWrite(last.offset, packed)
        stands = yield Commit(self.partition, self._stored, head, entry, users, hours, signals)
        if stands is not None:
            return None
        self.has_signals = self.has_signals or signals is not None
        self._head, self._stored = head, msgspec.json.encode(head)
        self._remember(folded.records)
        self.has_due = self.has_due or bool(folded.due)
        return Applied(
            records=len(piece),
            bytes=sum(len(record.value or b"") for record, _ in piece),
            users=len(users),
            counts=folded.counts,
            dead_letters=len(letters),
            oldest_ms=min(came_ms.values()),
            put_off=len(folded.due),
        )

    def _head_under(self, inputs: Inputs) -> Head:
        """The head in hand under the inputs given, with a batch id of its own."""
        return msgspec.structs.replace(
            self._head,
            publication=inputs.publication,
            release=inputs.release,
            sha256=inputs.sha256,
            publication_items=list(inputs.publication_items),
            items=list(inputs.items),
            settings=self._digest,
            batch=next(self._batch_ids),
        )

    def _enter(self, inputs: Inputs, entry: InputsEntry) -> bool:
        """Put other inputs in force without a record; false when another writer was seen."""
        head = self._head_under(inputs)
        if self._store.commit(self.partition, self._stored, head, entry, [], []) is not None:
            return False
        self._head, self._stored = head, msgspec.json.encode(head)
        return True

    def _records_of(self, user_ids: list[str]) -> Steps[dict[str, UserRecord | None] | None]:
        """Records as of the head in hand; None when Redis has another head."""
        missing = [user for user in user_ids if user not in self._cache]
        if missing:
            read: Read = yield Reading(self.partition, missing)
            if read.head != self._stored:
                return None
            for user, data in zip(missing, read.records, strict=True):
                self._cache[user] = self._decoded(user, data) if data else None
        return {user: self._cache[user] for user in user_ids}

    def _decoded(self, user: str, data: bytes) -> UserRecord:
        try:
            record = decode_record(data)
            serving = self._serving()
            if record.publication == serving.publication and serving.release and record.state:
                wanted = serving.release.engine.manifest.state_bytes
                if len(record.state) != wanted:
                    raise ContractError(
                        f"user record: state of {len(record.state)} bytes, release "
                        f"{serving.name} has {wanted}",
                        reason="record",
                    )
            return record
        except ContractError as error:
            raise ContractError(
                f"partition {self.partition}, user {user!r}: {error}", reason=error.reason
            ) from error

    def _inputs(self, serving: Serving) -> tuple[Inputs, InputsEntry | None]:
        """What is in force for the next write, and the entry that says so where it is new."""
        head = self._head
        items = tuple(serving.catalog.offsets)
        came = serving.publication != head.publication
        publication_items = items if came else tuple(head.publication_items)
        inputs = Inputs(
            serving.publication,
            serving.name,
            serving.sha256,
            publication_items,
            items,
            self._rules,
            serving.signals,
        )
        before = (head.publication, tuple(head.items), head.settings)
        if self._stored and before == (inputs.publication, items, self._digest):
            return inputs, None
        return inputs, InputsEntry(
            offset=head.next,
            publication=inputs.publication,
            release=inputs.release,
            sha256=inputs.sha256,
            publication_items=list(publication_items),
            items=list(items),
            rules=self._rules,
        )

    def _remember(self, records: dict[str, UserRecord | None]) -> None:
        for user, record in records.items():
            self._cache.pop(user, None)
            self._cache[user] = record
        while len(self._cache) > self._limits.cache_users_max:
            del self._cache[next(iter(self._cache))]

    def _reload(self) -> None:
        """Forget everything and take head and popularity from Redis, of one moment."""
        self._torn, self.has_due, self.has_signals = True, True, True
        self._cache.clear()
        stored = self._store.read(self.partition, []).head
        while True:
            where = f"partition {self.partition}: head"
            head = decode_stored(stored, Head, where) if stored else Head()
            popularity = self._new_popularity()
            buckets = popularity.buckets(head.watermark_ms) if stored else range(0)
            again, hours = self._store.read_popularity(self.partition, buckets)
            if again == stored:
                break
            stored = again
        if head.hold:
            raise UnavailableError(f"partition {self.partition}: held: {head.hold}")
        if not stored:
            # A fresh or flushed Redis: folding begins where the log does.
            head = Head(topic_id=self._head.topic_id, next=self._log_start())
        popularity.load(head.watermark_ms, hours)
        # All at once and last: whoever fails above must find the same difference again.
        self._stored, self._head, self._popularity = stored, head, popularity
        self._torn = False

    def _new_popularity(self) -> Popularity:
        return Popularity(
            half_life_s=self._rules.popularity_half_life_s,
            items_max=self._rules.popularity_items_max,
        )
