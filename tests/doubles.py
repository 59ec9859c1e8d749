"""Doubles of Redis and Kafka for unit tests; the contract tests check them against the real ones.

`MemoryStore` does in memory what the script of serving/store.py does.
"""

import msgspec

from afterclick.serving.records import Head, InputsEntry
from afterclick.serving.store import PopularityWrite, Read, UserWrite
from afterclick.streams.events import Click, encode
from afterclick.streams.partition import Chunk, Record


class MemoryStore:
    """One Redis: heads, inputs, records, lists and popularity of every partition."""

    def __init__(self) -> None:
        self.heads: dict[int, bytes] = {}
        self.entries: dict[int, list[InputsEntry]] = {}
        self.records: dict[tuple[int, str], bytes] = {}
        self.tops: dict[str, bytes] = {}
        self.hours: dict[tuple[int, int], dict[str, int]] = {}
        self.commits = 0

    def read(self, partition: int, user_ids: list[str]) -> Read:
        return Read(
            self.heads.get(partition, b""), [self.records.get((partition, u)) for u in user_ids]
        )

    def read_popularity(
        self, partition: int, buckets: range
    ) -> tuple[bytes, dict[int, dict[str, int]]]:
        found = {b: dict(self.hours[partition, b]) for b in buckets if (partition, b) in self.hours}
        return self.heads.get(partition, b""), found

    def commit(
        self,
        partition: int,
        expected: bytes,
        head: Head,
        entry: InputsEntry | None,
        users: list[UserWrite],
        popularity: list[PopularityWrite],
    ) -> bytes | None:
        new = msgspec.json.encode(head)
        stands = self.heads.get(partition, b"")
        if stands == new:
            return None
        if stands != expected:
            return stands
        self.commits += 1
        self.heads[partition] = new
        if entry:
            self.entries.setdefault(partition, []).append(entry)
        for user in users:
            _put(self.records, (partition, user.user_id), user.record)
            _put(self.tops, user.user_id, user.list_body)
        for hour in popularity:
            counts = self.hours.setdefault((partition, hour.bucket), {})
            for item, count in hour.counts.items():
                counts[item] = counts.get(item, 0) + count
        return None

    def snapshot(self) -> dict[str, object]:
        """Everything that must not depend on how the log was cut."""
        return {"records": dict(self.records), "lists": dict(self.tops), "hours": self.hours}


def _put(table: dict, key: object, value: bytes) -> None:
    if value:
        table[key] = value
    else:
        table.pop(key, None)


def log_of(
    clicks: list[Click], *, start: int = 0, record_ms: int = 1_700_000_000_000
) -> list[Record]:
    """Clicks as log records, one second apart."""
    records = []
    for at, click in enumerate(clicks):
        key, value = encode(click)
        records.append(Record(start + at, record_ms + 1000 * at, key, value))
    return records


def cut(records: list[Record], sizes: list[int]) -> list[Chunk]:
    """Chunks of the given sizes, the last size repeated until the log ends."""
    chunks: list[Chunk] = []
    at, turn = 0, 0
    begin = records[0].offset if records else 0
    while at < len(records):
        piece = records[at : at + sizes[min(turn, len(sizes) - 1)]]
        chunks.append(Chunk(begin, piece[-1].offset + 1, piece))
        begin, at, turn = piece[-1].offset + 1, at + len(piece), turn + 1
    return chunks
