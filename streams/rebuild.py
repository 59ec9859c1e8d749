"""`afterclick rebuild`: fills Redis from topic and archive, many clicks at once.

What a worker would have written click by click is folded in large pieces in memory (refold.py), one
list is
made per user at the end, and all of it is written in bulk. It comes out as the stream would have
left it,
but for lists renewed since. Every write goes through the store's scripts, fenced on a head that
says who holds
the partition: workers wait and go on by themselves once the real head stands there, and of two
rebuilds the
later one wins.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import msgspec

from afterclick.serving.errors import AfterclickError, ConfigError, ContractError, UnavailableError
from afterclick.serving.manifest import Publication
from afterclick.serving.records import Head, InputsEntry
from afterclick.serving.releases import ReleaseStore
from afterclick.serving.settings import ListRules, ServingSettings, serving_settings
from afterclick.serving.store import PopularityWrite, SignalsWrite, Store, UserWrite
from afterclick.streams.admin import TopicsInfo, check_topics
from afterclick.streams.feed import told_up_to
from afterclick.streams.joined import JoinedLog
from afterclick.streams.local import afterclick_argv
from afterclick.streams.namespace import claim_namespace, open_store
from afterclick.streams.popularity import BUCKET_MS
from afterclick.streams.refold import PIECE_RECORDS, Answer, Refold, Releases, in_force
from afterclick.streams.settings import StreamsSettings, streams_settings
from afterclick.streams.signals import Origin, pieces_of

WRITE_USERS = 256
"""Users a script: longer ones block Redis."""

WRITE_ITEMS = 2000
"""Items of an hour's popularity a script."""

HOLD = "rebuild"
HOLD_KEPT = f"{HOLD}, its inputs list kept"
HOLD_ANEW = f"{HOLD}, its inputs list written anew"
"""Told in the head, for whoever takes over: an inputs list written by a rebuild may be half."""

T = TypeVar("T")


class Rebuilt(msgspec.Struct, kw_only=True):
    """What a rebuild did."""

    partitions: int = 0
    skipped: int = 0
    """Partitions that have a head of a worker: they were left alone."""
    clicks: int = 0
    users: int = 0
    lists: int = 0
    expired: int = 0
    """Users left out, because their last click is older than records are kept."""
    new_start: dict[int, str] = {}
    """Partitions whose retained log was folded under the newest release, and why: there is no
    inputs list, or the log is gone where it begins.
    """
    seconds: float = 0.0
    clicks_per_s: float = 0.0


def rebuild(
    serving: ServingSettings,
    streams: StreamsSettings,
    *,
    partitions: Sequence[int] = (),
    replace: bool = False,
    jobs: int = 1,
) -> Rebuilt:
    """Fill the partitions that have no head.

    Args:
        serving: where Redis and the releases are.
        streams: where Kafka and the archive are.
        partitions: only these; empty for all.
        replace: take partitions over from workers, too; in this process alone.
        jobs: processes; each takes partitions that this one holds, and reads the environment, which
            must say what `serving` and `streams` say.

    Raises:
        ConfigError: there is nothing to rebuild, or somebody else holds a partition.
        ContractError: a part of the log, or a release that the inputs name, is gone.
        UnavailableError: Kafka, Redis or the archive does not answer, or another rebuild took over.
    """
    begun_s = time.monotonic()
    topics = check_topics(streams)
    store = open_store(serving, topics)
    num = store.keys.partitions
    done = Rebuilt()
    reader, releases = JoinedLog(streams), Releases(serving, streams)
    try:
        if not set(partitions) <= set(range(num)):
            raise ConfigError(f"rebuild: {streams.clicks_topic!r} has partitions 0 to {num - 1}")
        moved = reader.archive and reader.archive.epochs(serving.namespace)
        if store.keys.epoch or moved:
            raise ConfigError(
                f"rebuild: namespace {serving.namespace!r} is in an epoch after the first: its "
                "records go on from those of an epoch before, which this log does not hold; "
                "restore Redis from its own files, or set another AFTERCLICK_SERVING__NAMESPACE, "
                "where the retained log is a new start"
            )
        store.check_server()
        claim_namespace(store, serving, streams, topics)
        chosen = partitions or range(num)
        work = [_Partition(p, store, reader, releases, serving, streams, topics) for p in chosen]
        # All at once: a worker that finds an empty partition starts to fold it.
        held = [one for one in work if one.hold(replace=replace)]
        if not held:
            named = ", ".join(map(str, chosen))
            raise ConfigError(
                f"rebuild: each of the partitions {named} has a head, nothing to rebuild; "
                "--replace takes them from the workers"
            )
        done.skipped = len(work) - len(held)
        try:
            if jobs > 1 and len(held) > 1 and not replace:
                _run_in_processes([one.partition for one in held], jobs, done)
            else:
                for one in held:
                    one.run(done)
        except AfterclickError:
            for one in held:
                one.give_back()
            raise
        _tell_unavailable(store, releases, [one.partition for one in held])
    finally:
        reader.close()
        releases.close()
        store.close()
    done.seconds = round(time.monotonic() - begun_s, 3)
    done.clicks_per_s = round(done.clicks / done.seconds, 1)
    return done


class _Held(NamedTuple):
    """The head that stands in Redis, ours."""

    head: Head
    stored: bytes


class _Partition:
    """One partition's way from nothing to a real head."""

    def __init__(
        self,
        partition: int,
        store: Store,
        reader: JoinedLog,
        releases: Releases,
        serving: ServingSettings,
        streams: StreamsSettings,
        topics: TopicsInfo,
    ) -> None:
        self.partition = partition
        self.entries: list[InputsEntry] = []
        self._store = store
        self._reader = reader
        self._releases = releases
        self._serving = serving
        self._streams = streams
        self._topics = topics
        self._before = b""
        self._held = _Held(Head(), b"")
        name = uuid.uuid4().hex[:12]
        self._batches = (f"rebuild-{name}-{n}" for n in itertools.count())

    def hold(self, *, replace: bool) -> bool:
        """Take the partition; false where a worker's head stands and is left alone."""
        stored = self._store.read(self.partition, []).head
        head = msgspec.json.decode(stored, type=Head) if stored else Head()
        if head.hold and not head.hold.startswith(HOLD):
            raise ConfigError(f"rebuild: partition {self.partition} is held: {head.hold}")
        if stored and not head.hold and not replace:
            return False
        if head.hold != HOLD_ANEW:
            self.entries = self._store.inputs(self.partition)
        hold = HOLD_KEPT if self.entries else HOLD_ANEW
        self._before = b"" if head.hold else stored
        self._held = _Held(head, stored)
        self._move(msgspec.structs.replace(head, hold=hold))
        return True

    def run(self, done: Rebuilt) -> None:
        """Fold, write, let go."""
        refold, why = self._fold()
        self._before = b""
        self._write(refold, done, new_start=bool(why))
        done.partitions += 1
        done.clicks += refold.head.clicks
        if why:
            done.new_start[self.partition] = why

    def give_back(self) -> None:
        """Leave a partition that was taken from workers as it was, unless its keys were touched.

        Any other stays held: folding half a rebuild would be worse than waiting for the next one.
        """
        if self._before:
            self._move(msgspec.json.decode(self._before, type=Head))

    def _fold(self) -> tuple[Refold, str]:
        """Everything but Redis' users, in memory; and why this is a new start, if it is one."""
        topic, partition = self._streams.clicks_topic, self.partition
        start, end = self._reader.edges(topic, partition)
        archive = self._reader.archive
        if not self.entries and archive is not None:
            self.entries = archive.inputs(self._serving.namespace, partition)
        why = ""
        if not self.entries:
            why = "there is no inputs list, in Redis or in an archive"
        elif start > self.entries[0].offset:
            why = f"the log begins at {start}, its fold began at {self.entries[0].offset}"
        if why and self._before:
            raise ConfigError(
                f"rebuild: partition {partition}: {why}; to replace what the workers wrote would "
                "lose it: left as it was"
            )
        if why:
            self.entries = [self._newest(start)]
        refold = Refold(
            partition,
            self.entries,
            self._releases,
            self._reader,
            topic,
            topic_id=self._topics.clicks_id,
            signals_from=self._told(),
        )
        refold.run_to(end, self.entries)
        return refold, why

    def _newest(self, offset: int) -> InputsEntry:
        """What a worker would fold with now."""
        serving, topic = self._serving, self._streams.items_topic
        releases = ReleaseStore(serving.releases, serving.releases_cache)
        current = releases.current() or Publication(number=0, release="", sha256="")
        ends = [
            self._reader.edges(topic, partition)[1]
            for partition in range(self._topics.items_partitions)
        ]
        entry = InputsEntry(
            offset=offset,
            publication=current.number,
            release=current.release,
            sha256=current.sha256,
            publication_items=ends,
            items=ends,
            rules=ListRules.of(serving),
        )
        items = list(self._releases.serving(entry).catalog.offsets)
        return msgspec.structs.replace(entry, items=items, publication_items=items)

    def _write(self, refold: Refold, done: Rebuilt, *, new_start: bool) -> None:
        anew = self._held.head.hold == HOLD_ANEW or new_start
        if anew and self._held.head.hold != HOLD_ANEW:
            self._move(msgspec.structs.replace(self._held.head, hold=HOLD_ANEW))
        if not self._store.clear(self.partition, self._held.stored, inputs=anew):
            raise self._overtaken()
        for entry in self.entries if anew else []:
            self._move(self._held.head, entry=entry)
        for users in _batched(self._users(refold, done), WRITE_USERS):
            self._move(self._held.head, users=users)
        for hour in self._hours(refold):
            self._move(self._held.head, hours=[hour])
        for written in refold.replica.signals.get(self.partition, []):
            for piece in pieces_of(written.packed, WRITE_ITEMS):
                self._move(self._held.head, signals=SignalsWrite(*piece))
        head = msgspec.structs.replace(refold.head, topic_id=self._topics.clicks_id)
        if not refold.replica.heads:  # not one record
            head = msgspec.structs.replace(head, next=self.entries[0].offset)
        self._move(head)

    def _users(self, refold: Refold, done: Rebuilt) -> Iterator[UserWrite]:
        """Every user's record and list, entry after entry, so that items only go forward."""
        now_s, replica = time.time(), refold.replica
        under: dict[int, dict[str, Answer]] = {}
        for user in sorted(refold.users):
            if now_s - refold.last_seen_ms[user] / 1000 > self._store.record_ttl_s:
                done.expired += 1
                continue
            answer = refold.answer(user)
            assert answer is not None, "a record comes with a list"
            done.users += bool(answer.record)
            done.lists += 1
            if (self.partition, user) in replica.due:
                under.setdefault(in_force(self.entries, answer.offset), {})[user] = answer
            else:
                yield UserWrite(user, answer.record, replica.lists[user])
        for place, answers in sorted(under.items()):
            for some in _batched(answers.items(), PIECE_RECORDS):
                made = self._releases.make(
                    self.entries[place],
                    self.partition,
                    dict(some),
                    signals=self._releases.signals_end(),
                )
                for user, one in made.items():
                    yield UserWrite(user, one.record, one.list_body)

    def _told(self) -> int:
        """Where clicks begin that no worker has told the others."""
        origin = Origin(self._store.keys.epoch, self._topics.clicks_id, self.partition)
        topic = self._streams.signals_topic
        return told_up_to(self._reader, topic, self._serving.namespace, origin)

    def _hours(self, refold: Refold) -> Iterator[PopularityWrite]:
        """Popularity as far back as Redis would still have it."""
        since_ms = refold.head.watermark_ms - 1000 * self._store.popularity_ttl_s
        for (_, bucket), counts in sorted(refold.replica.hours.items()):
            if bucket * BUCKET_MS >= since_ms:
                for some in _batched(counts.items(), WRITE_ITEMS):
                    yield PopularityWrite(bucket, dict(some))

    def _move(
        self,
        head: Head,
        *,
        entry: InputsEntry | None = None,
        users: Sequence[UserWrite] = (),
        hours: Sequence[PopularityWrite] = (),
        signals: SignalsWrite | None = None,
    ) -> None:
        """One write, from our head to the next one."""
        head = msgspec.structs.replace(head, batch=next(self._batches))
        stands = self._store.commit(
            self.partition, self._held.stored, head, entry, users, hours, signals
        )
        if stands is not None:
            raise self._overtaken()
        self._held = _Held(head, msgspec.json.encode(head))

    def _overtaken(self) -> UnavailableError:
        return UnavailableError(
            f"rebuild: partition {self.partition}: another head stands in Redis than the one this "
            "rebuild wrote: another rebuild took over, or Redis lost its last writes; run it again"
        )


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    values = iter(values)
    while some := list(itertools.islice(values, size)):
        yield some


def _run_in_processes(partitions: Sequence[int], jobs: int, done: Rebuilt) -> None:
    """`jobs` processes share the partitions; they take them over from this one."""

    def one(share: Sequence[int]) -> Rebuilt:
        chosen = [argument for number in share for argument in ("--partition", str(number))]
        argv = [*afterclick_argv("rebuild"), *chosen, "--jobs", "1", "--json"]
        ran = subprocess.run(argv, capture_output=True, text=True, check=False)
        if ran.returncode:
            kind = {2: ConfigError, 3: UnavailableError}.get(ran.returncode, ContractError)
            raise kind(ran.stderr.strip().removeprefix("afterclick rebuild: "))
        return msgspec.json.decode(ran.stdout.splitlines()[-1], type=Rebuilt)

    shares = [partitions[at::jobs] for at in range(min(jobs, len(partitions)))]
    with ThreadPoolExecutor(jobs) as threads:
        for part in threads.map(one, shares):
            for name in ("partitions", "clicks", "users", "lists", "expired"):
                setattr(done, name, getattr(done, name) + getattr(part, name))
            done.new_start |= part.new_start


def _tell_unavailable(store: Store, releases: Releases, partitions: Sequence[int]) -> None:
    """Readers' set of items not to show, as of the newest items that any partition saw."""
    entries = [entry for partition in partitions for entry in store.inputs(partition)]
    newest = max(entries, key=lambda entry: (sum(entry.items), entry.publication))
    catalog = releases.serving(newest).catalog
    store.write_unavailable(-2, sum(catalog.offsets), [], sorted(catalog.unavailable))


def main(argv: Sequence[str]) -> int:
    """Fill an empty Redis from topic and archive, as the workers would have left it."""
    parser = argparse.ArgumentParser(prog="afterclick rebuild", description=main.__doc__)
    parser.add_argument(
        "--partition", type=int, action="append", metavar="P", help="this one; may be repeated"
    )
    parser.add_argument(
        "--replace", action="store_true", help="take partitions over from workers, too"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args(argv)
    done = rebuild(
        serving_settings(os.environ),
        streams_settings(os.environ),
        partitions=options.partition or (),
        replace=options.replace,
        jobs=options.jobs,
    )
    for number, why in done.new_start.items():
        sys.stderr.write(
            f"rebuild: partition {number}: {why}: the retained log was folded under the newest "
            "release; this is a new start\n"
        )
    if options.json:
        sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
        return 0
    sys.stdout.write(
        f"{done.clicks} clicks, {done.users} records and {done.lists} lists in {done.partitions} "
        f"partitions, {done.clicks_per_s:.0f} clicks/s\n"
    )
    return 0
