"""What Redis would hold of the partitions of one namespace, in memory.

Does what the scripts of serving/store.py do, expiry left out: `verify` and `rebuild` fold into it,
tests fold against it, and a contract test holds it to the real thing. For one thread.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from afterclick.serving.records import Head, InputsEntry
from afterclick.serving.store import (
    Commit,
    Due,
    PopularityWrite,
    Read,
    Reading,
    SignalsWrite,
    Standing,
    UserWrite,
)

K = TypeVar("K")


class Replica:
    """Heads, inputs, records, lists, popularity, due marks and moves.

    Args:
        signals_from: moves of chunks that end before this offset are not kept: of a long log they
            would be the largest part.
    """

    def __init__(self, signals_from: int = 0) -> None:
        self.heads: dict[int, bytes] = {}
        self.entries: dict[int, list[InputsEntry]] = {}
        self.records: dict[tuple[int, str], bytes] = {}
        self.lists: dict[str, bytes] = {}
        """Without `written_ms`."""
        self.due: dict[tuple[int, str], Due] = {}
        self.hours: dict[tuple[int, int], dict[str, int]] = {}
        self.signals: dict[int, list[SignalsWrite]] = {}
        self._signals_from = signals_from

    def read(self, partition: int, user_ids: Sequence[str]) -> Read:
        """As `Store.read`."""
        records = [self.records.get((partition, user)) for user in user_ids]
        return Read(self.heads.get(partition, b""), records)

    def read_all(self, asked: Sequence[Reading]) -> list[Read]:
        """As `Store.read_all`."""
        return [self.read(*one) for one in asked]

    def read_popularity(
        self, partition: int, buckets: Sequence[int]
    ) -> tuple[bytes, dict[int, dict[str, int]]]:
        """As `Store.read_popularity`."""
        found = {b: dict(self.hours[partition, b]) for b in buckets if (partition, b) in self.hours}
        return self.heads.get(partition, b""), found

    def commit(
        self,
        partition: int,
        expected: bytes,
        head: Head,
        entry: InputsEntry | None,
        users: Sequence[UserWrite],
        popularity: Sequence[PopularityWrite],
        signals: SignalsWrite | None = None,
    ) -> bytes | None:
        """As `Store.commit`."""
        new = msgspec.json.encode(head)
        stands = self.heads.get(partition, b"")
        if stands == new:
            return None
        if stands != expected:
            return stands
        self.heads[partition] = new
        if entry:
            self.entries.setdefault(partition, []).append(entry)
        for user in users:
            _put(self.records, (partition, user.user_id), user.record)
            if user.due is None:
                _put(self.lists, user.user_id, user.list_body)
                self.due.pop((partition, user.user_id), None)
            else:
                self.due[partition, user.user_id] = user.due
        for hour in popularity:
            counts = self.hours.setdefault((partition, hour.bucket), {})
            for item, count in hour.counts.items():
                counts[item] = counts.get(item, 0) + count
        if signals and signals.last >= self._signals_from:
            self.signals.setdefault(partition, []).append(signals)
        return None

    def commit_all(self, commits: Sequence[Commit]) -> list[bytes | None]:
        """As `Store.commit_all`."""
        return [self.commit(*one) for one in commits]

    def waiting_signals(self, partition: int, limit: int) -> list[SignalsWrite]:
        """As `Store.waiting_signals`."""
        return self.signals.get(partition, [])[:limit]

    def published_signals(self, partition: int, last: int) -> None:
        """As `Store.published_signals`."""
        waiting = self.signals.get(partition, [])
        self.signals[partition] = [one for one in waiting if one.last > last]

    def num_waiting_signals(self, partition: int) -> int:
        """As `Store.num_waiting_signals`."""
        return len(self.signals.get(partition, []))

    def due_users(self, partition: int, limit: int) -> list[str]:
        """As `Store.due_users`."""
        return [user for p, user in self.due if p == partition][:limit]

    def read_standing(
        self, partition: int, user_ids: Sequence[str]
    ) -> tuple[bytes, list[Standing]]:
        """As `Store.read_standing`."""
        standing = [
            Standing(
                self.records.get((partition, user)),
                self.lists.get(user),
                self.due.get((partition, user)),
            )
            for user in user_ids
        ]
        return self.heads.get(partition, b""), standing

    def renew(self, partition: int, expected: bytes, users: Sequence[UserWrite]) -> bytes | None:
        """As `Store.renew`."""
        stands = self.heads.get(partition, b"")
        if stands != expected:
            return stands
        for user in users:
            name = (partition, user.user_id)
            known = name in self.records or user.user_id in self.lists or name in self.due
            if known and user.record:
                self.records[name] = user.record
            if known:
                self.lists[user.user_id] = user.list_body
            self.due.pop(name, None)
        return None

    def snapshot(self) -> dict[str, object]:
        """Everything that must not depend on how the log was cut."""
        return {"records": dict(self.records), "lists": dict(self.lists), "hours": self.hours}


def _put(table: dict[K, bytes], key: K, value: bytes) -> None:
    if value:
        table[key] = value
    else:
        table.pop(key, None)
