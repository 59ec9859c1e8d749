"""`afterclick verify`: Redis against an offline replay of topic and archive.

Every partition's clicks are folded again by the worker's own `PartitionFold`, under the releases,
items and rules
that the partition's inputs list names (refold.py), and compared byte by byte: records whole, lists
without
`written_ms`. A list may have been made later than at its click (contracts.md, "Lists made later"):
it is
computed under the inputs that it names itself, which must be those in force at its click or later
ones. It
may run beside live workers: each batch of users is read together with the head, and the replay is
taken
exactly as far as that head before the two are compared.
"""

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import onnxruntime

from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.keys import Keys, partition_of
from afterclick.serving.records import (
    Head,
    InputsEntry,
    TopList,
    decode_record,
    without_stamp,
)
from afterclick.serving.settings import ServingSettings, serving_settings
from afterclick.serving.store import Standing, Store
from afterclick.streams.admin import check_topics
from afterclick.streams.beginnings import Base, has_base
from afterclick.streams.joined import JoinedLog
from afterclick.streams.namespace import new_store, open_store
from afterclick.streams.refold import Answer, Refold, Releases, in_force
from afterclick.streams.settings import StreamsSettings, streams_settings

USERS_PER_READ = 200
PENDING_MAX = 20_000
"""Users read and not compared yet: they are compared release by release."""

log = logging.getLogger(__name__)


class Report(msgspec.Struct, kw_only=True):
    """What a verification found."""

    partitions: int = 0
    clicks: int = 0
    users: int = 0
    records: int = 0
    lists: int = 0
    renewed: int = 0
    """Lists made under later inputs than those of their click."""
    put_off: int = 0
    """Lists that are due: a worker has yet to make them."""
    skipped: int = 0
    """With `--to`: users touched since, who were not compared."""
    redacted: int = 0
    """Clicks of forgotten users that only the archive had: they were not folded again."""
    unsure: int = 0
    """Users not compared: a popularity list counts redacted clicks, a list rests on signals that
    their topic has dropped, or a record goes on from an epoch whose records are gone.
    """
    expired: int = 0
    behind: int = 0
    """Records of the log that no worker has folded yet."""
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
    to: int | None = None,
) -> Report:
    """Compare every partition, or one user's.

    Args:
        serving: where Redis and the releases are.
        streams: where Kafka and the archive are.
        user: compare only this user; the partition's counters are left out.
        to: fold up to this offset of each partition only, and compare the users whom no later
            record touches.

    Raises:
        ContractError: the log or a release that the inputs name is gone, so nothing can be said.
        UnavailableError: Kafka, Redis or the archive does not answer.
    """
    begun_s = time.monotonic()
    topics = check_topics(streams)
    store = open_store(serving, topics)
    reader = JoinedLog(streams)
    # Two, because lists are made under earlier entries than the one that the replay is at.
    replaying, making = Releases(serving, streams), Releases(serving, streams)
    report = Report(
        fingerprint={
            "onnxruntime": onnxruntime.__version__,
            "cpu": _cpu_level(),
            "provider": serving.provider,
        }
    )
    chosen = range(store.keys.partitions)
    if user is not None:
        partition = partition_of(user, store.keys.partitions)
        chosen = range(partition, partition + 1)
    old = None
    try:
        meta = store.read_meta()
        if meta is not None and has_base(meta):
            keys = Keys(
                serving.namespace,
                layout=serving.layout,
                partitions=meta.base_partitions,
                epoch=meta.epoch - 1,
            )
            old = new_store(serving, keys, Store)
        base = Base(old, store.keys.partitions) if old else None
        for partition in chosen:
            check = _Check(partition, store, reader, replaying, making, streams, report, base)
            check.run(user, to)
    finally:
        if old is not None:
            old.close()
        reader.close()
        replaying.close()
        making.close()
        store.close()
    report.seconds = round(time.monotonic() - begun_s, 3)
    return report


class _Pending(NamedTuple):
    """A user as Redis has it, to be compared with what entries of the inputs make of the replay."""

    user: str
    record: bytes
    list_body: bytes
    answer: Answer
    under: list[int]
    """Places of the other entries that the list may have been made under."""


class _Check:
    """One partition's comparison."""

    def __init__(
        self,
        partition: int,
        store: Store,
        reader: JoinedLog,
        replaying: Releases,
        making: Releases,
        streams: StreamsSettings,
        report: Report,
        base: Base | None,
    ) -> None:
        self._base = base
        self._before = base.entries if base else []
        self._partition = partition
        self._store = store
        self._reader = reader
        self._replaying = replaying
        self._making = making
        self._topic = streams.clicks_topic
        self._report = report
        self._entries: list[InputsEntry] = []
        self._pending: dict[tuple[int, int], list[_Pending]] = {}
        """By place of an entry and offset of the signals topic, both of which only go forward."""
        self._redacted = 0
        self._touched: set[str] = set()
        self._touched_to = 0

    def run(self, user: str | None, to: int | None) -> None:
        report, partition = self._report, self._partition
        report.partitions += 1
        start, end = self._reader.edges(self._topic, partition)
        stored = self._store.read(partition, []).head
        if not stored:
            report.behind += end - start
            return
        head = msgspec.json.decode(stored, type=Head)
        if head.hold:
            raise UnavailableError(f"verify: partition {partition} is held: {head.hold}")
        self._entries = self._store.inputs(partition)
        if not self._entries and head.last_offset < 0:
            report.behind += end - head.next  # an epoch began, and nobody has clicked yet
            return
        if not self._entries:
            report.differ(
                f"partition {partition}: there is a head at {head.next} and no inputs list"
            )
            return
        begin = self._entries[0].offset
        if start > begin:
            raise ContractError(
                f"verify: partition {partition}: its fold began at offset {begin}, the log now "
                f"starts at {start}: what was dropped cannot be folded again",
                reason="log-truncated",
            )
        self._redacted = self._reader.redacted(self._topic, partition, begin)
        report.redacted += self._redacted
        # Without a release a list depends on everybody's clicks.
        alone = user if all(entry.publication for entry in self._entries) else None
        replay = Refold(
            partition, self._entries, self._replaying, self._reader, self._topic, only=alone
        )
        if self._base is not None:
            first = self._entries[0]
            last_ms = self._base.seed(replay.replica, partition, first, self._store)
            replay.last_seen_ms.update(last_ms)
        stop = head.next if to is None else min(to, head.next)
        replay.run_to(stop, self._entries)
        report.behind += max(0, end - head.next)
        users = sorted({user} if user else {*replay.users, *self._store.users(partition)})
        self._touched_to = stop
        for at in range(0, len(users), USERS_PER_READ):
            head = self._read(users[at : at + USERS_PER_READ], replay, partly=to is not None)
        self._flush()
        report.users += len(users)
        report.clicks += replay.head.clicks
        if user is None and to is None:
            self._compare_clicks(head.clicks, replay.head.clicks)

    def _touch(self, upto: int) -> None:
        """Note the users of all records below an offset that the replay leaves out."""
        records = self._reader.read(self._topic, self._partition, self._touched_to, upto)
        for record in itertools.chain.from_iterable(records):
            self._touched.add((record.key or b"").decode(errors="replace"))
        self._touched_to = max(self._touched_to, upto)

    def _read(self, users: list[str], replay: Refold, *, partly: bool) -> Head:
        """Take some users' bytes, and note what they are to be compared with."""
        partition, report = self._partition, self._report
        stored, standing = self._store.read_standing(partition, users)
        if not stored:
            raise ContractError(f"verify: partition {partition}: its head vanished meanwhile")
        head = msgspec.json.decode(stored, type=Head)
        self._entries = self._store.inputs(partition)
        if head.next < replay.position:
            raise ContractError(
                f"verify: partition {partition}: its head went back from {replay.position} to "
                f"{head.next} meanwhile; run it again"
            )
        if partly:
            self._touch(head.next)
        else:
            replay.run_to(head.next, self._entries)
        for user, found in zip(users, standing, strict=True):
            if user in self._touched:
                report.skipped += 1
                continue
            self._note(user, found, replay)
        if sum(map(len, self._pending.values())) >= PENDING_MAX:
            self._flush()
        return head

    def _note(self, user: str, found: Standing, replay: Refold) -> None:
        """Compare one user, or put the comparison off until its release is loaded."""
        report, answer = self._report, replay.answer(user)
        record = found.record or b""
        body = without_stamp(found.list_data) if found.list_data else b""
        if self._unknown(record, answer):
            report.unsure += 1
            return
        if answer is None:
            if record or body or found.due:
                self._differ(user, "Redis has a record or a list, the replay has none")
            return
        if not record and not body and found.due is None and _is_expired(user, replay, self._store):
            report.expired += 1
            return
        report.records += bool(answer.record)
        report.lists += 1
        entries = [*self._before, *self._entries]
        # A list of the epoch before may name any inputs of that epoch.
        carried = answer.offset < 0
        at = 0 if carried else len(self._before) + in_force(self._entries, answer.offset)
        if found.due is not None:
            report.put_off += 1
            if found.due[:2] != answer[1:]:
                self._differ(user, f"its list is due for {found.due}, by replay for {answer}")
            self._compare_records(user, record, answer.record)
            return
        if not body:
            self._compare_records(user, record, answer.record)
            self._differ(user, "list: Redis has none, the replay has one")
            return
        top = msgspec.json.decode(body, type=TopList)
        if top.publication == entries[at].publication == 0:
            # Without a release a list is made inside the fold, from the popularity of that moment.
            self._compare_records(user, record, answer.record)
            if self._redacted:
                report.unsure += 1
            else:
                self._compare_lists(user, body, replay.replica.lists[user])
            return
        named = (top.publication, top.items_offset)
        under = [
            place
            for place, entry in enumerate(entries[at:], at)
            if (entry.publication, entry.items) == named
        ]
        if not under:
            self._differ(
                user,
                f"list: names publication {named[0]} with items offset {named[1]}, which the "
                f"inputs do not from offset {entries[at].offset} on",
            )
            return
        report.renewed += under[0] > at and under[0] >= len(self._before)
        if top.signals > self._making.signals_end(top.signals - 1):
            self._differ(
                user,
                f"list: names signals offset {top.signals}, the topic ends at "
                f"{self._making.signals_end()}",
            )
            return
        self._pending.setdefault((under[0], top.signals), []).append(
            _Pending(user, record, body, answer, under[1:])
        )

    def _unknown(self, record: bytes, answer: Answer | None) -> bool:
        """Whether a record has clicks of an epoch whose records are gone."""
        if self._base is not None or not self._store.keys.epoch or not record:
            return False
        expected = decode_record(answer.record).clicks if answer and answer.record else 0
        return decode_record(record).clicks > expected

    def _flush(self) -> None:
        """Compare what waits, entry after entry, so that releases and items only go forward."""
        while self._pending:
            place, signals = min(self._pending)
            waiting = self._pending.pop((place, signals))
            answers = {one.user: one.answer for one in waiting}
            entry = [*self._before, *self._entries][place]
            made = self._making.make(entry, self._partition, answers, signals=signals)
            for one in waiting:
                expected = made[one.user]
                if one.list_body != expected.list_body and one.under:
                    # Another entry names the same items and release, with other rules.
                    later = one._replace(under=one.under[1:])
                    self._pending.setdefault((one.under[0], signals), []).append(later)
                    continue
                self._compare_records(one.user, one.record, expected.record)
                if self._making.whole:
                    self._compare_lists(one.user, one.list_body, expected.list_body)
                else:
                    self._report.unsure += 1

    def _compare_records(self, user: str, found: bytes, expected: bytes) -> None:
        if found != expected:
            self._differ(user, f"record: {_record_words(found, expected)}")

    def _compare_lists(self, user: str, found: bytes, expected: bytes) -> None:
        if found != expected:
            self._differ(user, f"list: {_list_words(found, expected)}")

    def _compare_clicks(self, found: int, expected: int) -> None:
        report = self._report
        report.lost += max(0, expected - found)
        report.doubled += max(0, found - expected - self._redacted)
        if not expected <= found <= expected + self._redacted:
            report.differ(
                f"partition {self._partition}: {found} clicks counted in Redis, {expected} by "
                f"replay, {self._redacted} redacted"
            )

    def _differ(self, user: str, words: str) -> None:
        self._report.differ(f"partition {self._partition}, user {user!r}: {words}")


def _is_expired(user: str, replay: Refold, store: Store) -> bool:
    seen_ms = replay.last_seen_ms.get(user)
    return seen_ms is not None and time.time() - seen_ms / 1000 > store.record_ttl_s


def _record_words(found: bytes, expected: bytes) -> str:
    if not found or not expected:
        return f"Redis has {'one' if found else 'none'}, the replay {'one' if expected else 'none'}"
    left, right = decode_record(found), decode_record(expected)
    for name in left.__struct_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if a != b:
            if isinstance(a, bytes) and isinstance(b, bytes):
                at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
                return f"{name} differs at byte {at} of {len(a)}, the replay has {len(b)} bytes"
            return f"{name} is {a} in Redis, {b} by replay"
    return "differs in its header only"


def _list_words(found: bytes, expected: bytes) -> str:
    if not found or not expected:
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
    parser.add_argument(
        "--to",
        type=int,
        metavar="OFFSET",
        help="fold up to here only, and compare the users whom no later record touches",
    )
    options = parser.parse_args(argv)
    if options.to is not None and options.to < 0:
        raise ConfigError(f"--to: expected an offset, got {options.to}")
    report = verify(
        serving_settings(os.environ),
        streams_settings(os.environ),
        user=options.user,
        to=options.to,
    )
    if options.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        sys.stdout.write(_words(report))
    return 1 if report.differences else 0


def _words(report: Report) -> str:
    lines = [
        f"{report.records} records and {report.lists} lists of {report.users} users in "
        f"{report.partitions} partitions, {report.clicks} clicks: "
        f"{report.differences} differences; {report.behind} log records not folded yet"
    ]
    for num, words in (
        (report.renewed, "lists were renewed after their click"),
        (report.put_off, "lists are due: a worker makes them when it has time"),
        (report.skipped, "users were touched later and not compared"),
        (report.redacted, "clicks of forgotten users are redacted in the archive"),
        (report.unsure, "users not compared: redacted clicks, signals or the last epoch are gone"),
        (report.expired, "users have expired in Redis"),
    ):
        if num:
            lines.append(f"{num} {words}")
    if report.first_difference:
        lines.append(f"first difference: {report.first_difference}")
    return "\n".join(lines) + "\n"
