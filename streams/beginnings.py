"""What an epoch begins with: heads, inputs and popularity of its partitions, from the epoch before.

Only reads, through the old epoch's store. `migrate` writes it, and `verify` takes it again (`Base`)
as the ground that it folds the log on.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from afterclick.serving.keys import Meta, partition_of
from afterclick.serving.records import (
    Head,
    InputsEntry,
    TopList,
    decode_record,
    rules_digest,
    without_stamp,
)
from afterclick.serving.store import Due, PopularityWrite, Store
from afterclick.streams.popularity import Popularity
from afterclick.streams.replica import Replica

USERS_PER_READ = 200


class Left(NamedTuple):
    """One partition of the epoch that is left."""

    stored: bytes
    head: Head | None
    """None where nobody clicked."""


def read_left(old: Store) -> list[Left]:
    """All partitions of an epoch as they stand."""
    found = [old.read(partition, []).head for partition in range(old.keys.partitions)]
    return [Left(data, msgspec.json.decode(data, type=Head) if data else None) for data in found]


def newest_inputs(old: Store, left: Sequence[Left]) -> InputsEntry | None:
    """The inputs that every partition of the next epoch begins with: the newest in force.

    None where no partition has any.
    """
    entries = [
        listed[-1]
        for partition, one in enumerate(left)
        if one.head is not None and (listed := old.inputs(partition))
    ]
    return max(entries, key=lambda entry: (entry.publication, sum(entry.items)), default=None)


def first_head(epoch: int, topic_id: str, entry: InputsEntry, left: Sequence[Left]) -> Head:
    """The head that a partition begins with; a later write moves it as any other.

    Args:
        epoch: the one that begins.
        topic_id: whose log it is.
        entry: the partition's first inputs entry; its offset is where folding begins.
        left: the epoch before: popularity goes on by the latest of its clocks.
    """
    return Head(
        topic_id=topic_id,
        next=entry.offset,
        publication=entry.publication,
        release=entry.release,
        sha256=entry.sha256,
        publication_items=entry.publication_items,
        items=entry.items,
        settings=rules_digest(entry.rules),
        watermark_ms=max((one.head.watermark_ms for one in left if one.head), default=0),
        batch=f"epoch-{epoch}",
    )


def first_hours(
    old: Store, entry: InputsEntry, left: Sequence[Left], partition: int, num_partitions: int
) -> list[PopularityWrite]:
    """Hourly counts that a partition begins with: of the old partitions p with
    p mod `num_partitions` equal to it, summed.
    """
    rules = entry.rules
    popularity = Popularity(
        half_life_s=rules.popularity_half_life_s, items_max=rules.popularity_items_max
    )
    total: dict[int, dict[str, int]] = {}
    for before in range(partition, len(left), num_partitions):
        head = left[before].head
        if head is None:
            continue
        _, hours = old.read_popularity(before, popularity.buckets(head.watermark_ms))
        for hour, counts in hours.items():
            sums = total.setdefault(hour, {})
            for item, count in counts.items():
                sums[item] = sums.get(item, 0) + count
    return [PopularityWrite(hour, counts) for hour, counts in sorted(total.items())]


class Base:
    """The records that the epoch in force began with, while its predecessor's keys are there.

    Args:
        old: the epoch before.
        num_partitions: of the epoch in force.
    """

    def __init__(self, old: Store, num_partitions: int) -> None:
        self._old = old
        self._left = read_left(old)
        self._num_partitions = num_partitions
        self._users: dict[int, list[tuple[int, str]]] = {}
        for before in range(old.keys.partitions):
            for user in sorted(old.users(before)):
                to = partition_of(user, num_partitions)
                self._users.setdefault(to, []).append((before, user))
        entries = [e for before in range(old.keys.partitions) for e in old.inputs(before)]
        entries.sort(key=lambda entry: (entry.publication, sum(entry.items)))
        self.entries = list({msgspec.json.encode(e): e for e in entries}.values())
        """Inputs that a list may name which nobody touched since."""

    def seed(
        self, replica: Replica, partition: int, entry: InputsEntry, store: Store
    ) -> dict[str, int]:
        """Fill a partition as the migration did; latest event time of each user in it.

        Args:
            replica: empty.
            partition: of the epoch in force.
            entry: the first of its inputs list.
            store: of the epoch in force: a list that answers an event of the epoch before has no
                other copy, so its event is taken from there, and what it holds is computed.
        """
        head = first_head(self._old.keys.epoch + 1, "", entry, self._left)
        hours = first_hours(self._old, entry, self._left, partition, self._num_partitions)
        replica.commit(partition, b"", head, entry, [], hours)
        last_ms: dict[str, int] = {}
        for before in range(self._old.keys.partitions):
            users = [user for p, user in self._users.get(partition, ()) if p == before]
            for at in range(0, len(users), USERS_PER_READ):
                batch = users[at : at + USERS_PER_READ]
                _, standing = self._old.read_standing(before, batch)
                _, now = store.read_standing(partition, batch)
                for user, found, live in zip(batch, standing, now, strict=True):
                    if found.record:
                        replica.records[partition, user] = found.record
                        last_ms[user] = decode_record(found.record).last_ms
                    if live.list_data and _is_carried(live.list_data):
                        replica.lists[user] = without_stamp(live.list_data)
                    elif not found.due:
                        # Newer, and then the log says more; or gone, and then it must be missed.
                        replica.due[partition, user] = Due(-1, last_ms.get(user, 0), 0)
                    if found.due:
                        replica.due[partition, user] = found.due._replace(offset=-1)
        return last_ms


def has_base(meta: Meta | None) -> bool:
    """Whether the records that the epoch in force began with are still there."""
    return bool(meta and meta.base_partitions and time.time() * 1000 < meta.base_until_ms)


def _is_carried(data: bytes) -> bool:
    return msgspec.json.decode(data, type=TopList).offset < 0
