"""Whether Redis holds the fold of the log: heads, inputs, records, lists, popularity, due marks;
and whether topic `signals` tells every click's move once.

The log is folded again by production's `PartitionFold` over an in-memory store, under what the
partition's inputs list names. A list or record may have been made anew under a later entry of
that list: then it must be what `renew` gives there.
"""

import itertools
from collections.abc import Iterator, Sequence

import msgspec

from afterclick.serving.errors import ContractError
from afterclick.serving.memory import Move
from afterclick.serving.records import (
    Head,
    InputsEntry,
    TopList,
    UserRecord,
    decode_record,
    encode_record,
    rules_digest,
    without_stamp,
)
from afterclick.streams.events import decode_click
from afterclick.streams.fold import Inputs, renew
from afterclick.streams.partition import PartitionFold
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges, Record
from afterclick.streams.replica import Replica
from afterclick.streams.signals import Absorber, decode_parcel, decode_signal
from tests.simulation.plan import PARTITIONS, Plan, offsets
from tests.simulation.redis_double import Server, Value
from tests.simulation.releases import Releases
from tests.simulation.worker import NAMESPACE


def judge(
    plan: Plan,
    server: Server,
    releases: Releases,
    letters: set[tuple[int, int]],
    signals: list[bytes],
) -> Iterator[str]:
    """Every difference, in words."""
    known: set[bytes] = set()
    # With other rules an earlier history may have counted otherwise: the first one sent stands.
    same_rules = all(change.kind != "rules" for change in plan.changes)
    for partition in range(PARTITIONS):
        log = [
            Record(offset, append.timestamp_ms, append.key, append.value)
            for offset, append in offsets(plan, partition)
        ]
        if log:
            one = _Partition(partition, log, server.data, releases, signals)
            for words in one.differences():
                yield f"partition {partition}: {words}"
            known |= one.known
            expected, found = one.moves(), absorbed(signals, partition)
            if same_rules and found != expected:
                yield f"partition {partition}: topic signals tells {found}, expected {expected}"
        for record in log:
            if _is_bad(record) and (partition, record.offset) not in letters:
                yield f"partition {partition}: no dead letter for offset {record.offset}"
    for key in sorted(set(server.data) - known):
        yield f"a key that nobody should have written: {key.decode()}"


class _Kept:
    """A memory that keeps everything."""

    def __init__(self) -> None:
        self.moves: list[Move] = []

    def absorb(self, moves: Sequence[Move]) -> None:
        self.moves += moves


def absorbed(signals: list[bytes], partition: int) -> list[Move]:
    """What a reader of the topic counts of one partition."""
    kept = _Kept()
    absorber = Absorber(kept, namespace=NAMESPACE, known={}, offset=0)
    own = [value for value in signals if decode_signal(value).partition == partition]
    absorber.take(absorber.sift(Record(at, 0, None, value) for at, value in enumerate(own)))
    return kept.moves


class _Partition:
    def __init__(
        self,
        partition: int,
        log: list[Record],
        data: dict[bytes, Value],
        releases: Releases,
        signals: list[bytes],
    ) -> None:
        self.known: set[bytes] = set()
        self._partition, self._log, self._data, self._releases = partition, log, data, releases
        self._signals = signals
        self._serving = releases.serving(0, 0)
        self._prefix = f"{{{NAMESPACE}:{partition}}}:"
        self._replica = Replica()

    def differences(self) -> Iterator[str]:
        stored = self._value("head")
        if not stored:
            yield "no head"
            return
        head = msgspec.json.decode(stored, type=Head)
        entries = [
            msgspec.json.decode(entry, type=InputsEntry) for entry in self._value("inputs") or []
        ]
        if head.next != self._log[-1].offset + 1:
            yield f"the head is at {head.next}, the log ends at {self._log[-1].offset + 1}"
            return
        yield from self._inputs(head, entries)
        if not entries:
            return
        replica = self._replica = self._replay(entries)
        expected = msgspec.json.decode(replica.heads[self._partition], type=Head)
        for name in Head.__struct_fields__:
            if name not in ("topic_id", "batch") and getattr(head, name) != getattr(expected, name):
                yield f"head: {name} is {getattr(head, name)}, expected {getattr(expected, name)}"
        if waiting := self._value("signals"):
            yield f"moves wait to be published: {waiting}"
        due = self._value("due")
        if due:
            yield f"lists are due: {sorted(due)}"
        for (_, hour), counts in replica.hours.items():
            found = self._value(f"pop:{hour}") or {}
            if {item.decode(): int(n) for item, n in found.items()} != counts:
                yield f"popularity of hour {hour} is {found}, expected {counts}"
        users = {record.key.decode() for record in self._log if record.key is not None}
        for user in sorted(users):
            yield from self._user(user, replica, entries)

    def moves(self) -> list[Move]:
        """What the offline fold counted."""
        written = self._replica.signals.get(self._partition, [])
        return [move for one in written for _, move in decode_parcel(one.packed).moves]

    def _inputs(self, head: Head, entries: list[InputsEntry]) -> Iterator[str]:
        places = [entry.offset for entry in entries]
        if not entries or places != sorted(places) or places[0] > self._log[0].offset:
            yield f"inputs: begin at {places}, the log at {self._log[0].offset}"
            return
        numbers = [entry.publication for entry in entries]
        if numbers != sorted(numbers):
            yield f"inputs: publications go back: {numbers}"
        last = entries[-1]
        named = (
            last.publication, last.release, last.sha256,
            last.publication_items, last.items, rules_digest(last.rules),
        )  # fmt: skip
        in_force = (
            head.publication, head.release, head.sha256,
            head.publication_items, head.items, head.settings,
        )  # fmt: skip
        if named != in_force:
            yield f"inputs: the last entry names {named}, the head {in_force}"

    def _replay(self, entries: list[InputsEntry]) -> Replica:
        replica, fold = Replica(), None
        ends = [entry.offset for entry in entries[1:]] + [self._log[-1].offset + 1]
        for entry, end in zip(entries, ends, strict=True):
            self._serving = self._releases.of_entry(entry)
            if fold is None or fold.rules != entry.rules:
                fold = PartitionFold(
                    self._partition,
                    replica,
                    entry.rules,
                    Limits(users_max=1000, records_max=1000, bytes_max=1 << 30, rebuilds_max=1000),
                    serving=lambda: self._serving,
                    dead_letters=lambda _: None,
                    log_start=lambda: 0,
                    batch_ids=(f"replay-{n}" for n in itertools.count()),
                )
                fold.open(LogEdges("", entry.offset, 1 << 60), lambda _: None)
            records = [record for record in self._log if entry.offset <= record.offset < end]
            if records:
                fold.process(Chunk(fold.position, records[-1].offset + 1, records))
            else:
                fold.enter()  # puts the entry in force: the next one may rest on it
        return replica

    def _user(self, user: str, replica: Replica, entries: list[InputsEntry]) -> Iterator[str]:
        packed = replica.records.get((self._partition, user))
        body = replica.lists.get(user)
        found = self._value(f"u:{user}")
        top = self._data.get(f"{NAMESPACE}:top:{user}".encode())
        self.known.add(f"{NAMESPACE}:top:{user}".encode())
        top = without_stamp(top) if top else None
        record = decode_record(packed) if packed else None
        if found != packed:
            later = self._rebuilt(user, record, found, entries)
            if found != later:
                yield f"{user}: record is {_shown(found)}, expected {_shown(packed)}"
        if top != body and not (
            top and body and self._is_renewed(user, record, top, body, entries)
        ):
            yield f"{user}: list is {top!r}, expected {body!r}"

    def _rebuilt(
        self,
        user: str,
        record: UserRecord | None,
        found: bytes | None,
        entries: list[InputsEntry],
    ) -> bytes | None:
        """The record under the publication that the one in Redis names."""
        if record is None or found is None:
            return None
        number = decode_record(found).publication
        if number <= record.publication:
            return None
        for entry in entries:
            if entry.publication == number:
                rebuilt = self._renewed(user, record, 0, 0, entry).records[user]
                return encode_record(rebuilt) if rebuilt else None
        return None

    def _is_renewed(
        self,
        user: str,
        record: UserRecord | None,
        top: bytes,
        body: bytes,
        entries: list[InputsEntry],
    ) -> bool:
        """Whether a list answers the right event, under an entry from that event on."""
        found, expected = (msgspec.json.decode(data, type=TopList) for data in (top, body))
        if (found.offset, found.event_ms) != (expected.offset, expected.event_ms):
            return False
        in_force = sum(entry.offset <= found.offset for entry in entries) - 1
        return any(
            top
            == self._renewed(
                user, record, found.offset, found.event_ms, entry, signals=found.signals
            ).lists[user]
            for entry in entries[in_force:]
            if entry.publication and entry.publication == found.publication
        )

    def _renewed(
        self,
        user: str,
        record: UserRecord | None,
        offset: int,
        event_ms: int,
        entry: InputsEntry,
        *,
        signals: int = 0,
    ):
        serving, _ = self._releases.hearing(
            self._releases.of_entry(entry), NAMESPACE, self._signals, signals
        )
        assert serving.release is not None
        inputs = Inputs(
            entry.publication,
            entry.release,
            entry.sha256,
            tuple(entry.publication_items),
            tuple(entry.items),
            entry.rules,
            serving.signals,
        )
        return renew(
            {user: (record, offset, event_ms)},
            partition=self._partition,
            inputs=inputs,
            release=serving.release,
        )

    def _value(self, name: str):
        key = (self._prefix + name).encode()
        self.known.add(key)
        return self._data.get(key)


def _is_bad(record: Record) -> bool:
    try:
        decode_click(record.key, record.value, offset=record.offset, record_ms=record.timestamp_ms)
    except ContractError:
        return True
    return False


def _shown(packed: bytes | None) -> str:
    if packed is None:
        return "none"
    record = decode_record(packed)
    return (
        f"(publication {record.publication}, steps {record.steps}, clicks {record.clicks}, "
        f"last_ms {record.last_ms}, state {hash(record.state) & 0xFFFF:04x}, "
        f"{record.num_interactions} interactions {record.interactions.hex()[:40]})"
    )
