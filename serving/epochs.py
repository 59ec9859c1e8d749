"""What a migration does in Redis beside a worker's own writes: walk one epoch's keys, carry users
into the next one, keep the old ones for a while, drop them.

Knows no topic and no rule; streams/migrate.py says who goes where. An epoch that is left is held
(`Head.hold`), so that nobody writes under these hands.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from afterclick.serving.keys import Keys
from afterclick.serving.records import TopList, encode_list
from afterclick.serving.scripts import CARRY
from afterclick.serving.store import Standing, Store

BATCH_USERS = 256
"""Users of one script, as many as a worker writes at once."""

BATCH_KEYS = 1000


class Carried(NamedTuple):
    """One user on the way to another partition."""

    user_id: str
    found: Standing
    keep_ms: int
    """Milliseconds until Redis may drop the user; 0: no end."""


class EpochStore(Store):
    """A store for a migration."""

    def __init__(self, url: str, keys: Keys, **options: Any) -> None:
        super().__init__(url, keys, **options)
        self._carry = self._redis.register_script(CARRY)

    def walk(self) -> Iterator[tuple[int, list[str]]]:
        """Every user with a record or a due list, and on a cluster with a list, partition by
        partition as they come; some may come twice.
        """
        waiting: dict[int, dict[str, None]] = {}
        for partition, name, key in self._scan():
            users = [name[2:]] if name.startswith("u:") else []
            if name.startswith("top:"):
                users = [name[4:]]
            elif name == "due":
                fields = self._call(lambda key=key: self._redis.hkeys(key))  # type: ignore[misc]
                prefix = len(self.keys.user(partition, "").encode())
                users = [field[prefix:].decode() for field in fields]
            for user in users:
                batch = waiting.setdefault(partition, {})
                batch[user] = None
                if len(batch) >= BATCH_USERS:
                    yield partition, list(waiting.pop(partition))
        for partition, batch in waiting.items():
            yield partition, list(batch)

    def take(self, partition: int, user_ids: Sequence[str]) -> tuple[bytes, list[Carried]]:
        """Head and users of one moment, with the time that they have left in Redis."""

        def left() -> list[int]:
            pipe = self._redis.pipeline(transaction=False)
            for user in user_ids:
                pipe.pttl(self.keys.user(partition, user))
                pipe.pttl(self.keys.top(partition, user))
            found: list[int] = pipe.execute()
            return found

        stored, standing = self.read_standing(partition, user_ids)
        ttl_ms = self._call(left)
        keep_ms = [max(pair) for pair in zip(ttl_ms[::2], ttl_ms[1::2], strict=True)]
        return stored, [
            Carried(user, found, _keep(ms, self.record_ttl_s * 1000))
            for user, found, ms in zip(user_ids, standing, keep_ms, strict=True)
        ]

    def carry(self, partition: int, users: Sequence[Carried]) -> bool:
        """Put users into a partition of this epoch; false where its head stands already.

        Their lists answer an event of an earlier epoch from now on, which has offset −1.
        """
        names = [self.keys.head(partition), self.keys.due(partition)]
        args: list[bytes | int] = []
        for user_id, found, keep_ms in users:
            names.append(self.keys.user(partition, user_id))
            names.append(self.keys.top(partition, user_id))
            due = b"%d %d %d" % (-1, *found.due[1:]) if found.due else b""
            args += [keep_ms, found.record or b"", self._moved(found.list_data, partition), due]
        return bool(self._call(lambda: self._carry(keys=names, args=args)))

    def _moved(self, data: bytes | None, partition: int) -> bytes:
        if not data:
            return b""
        top = msgspec.json.decode(data, type=TopList)
        moved = msgspec.structs.replace(top, partition=partition, offset=-1)
        return self.packed(encode_list(moved), top.written_ms)

    def keep_until(self, unix_ms: int) -> int:
        """Let everything but the heads go at a moment; the number of keys."""
        return self._each_of_base(lambda pipe, key: pipe.pexpireat(key, unix_ms))

    def drop(self) -> int:
        """Delete everything but the heads, which hold off workers of that epoch for ever."""
        return self._each_of_base(lambda pipe, key: pipe.unlink(key))

    def _each_of_base(self, command: Any) -> int:
        num = 0
        names: list[bytes] = []

        def flush() -> None:
            pipe = self._redis.pipeline(transaction=False)
            for name in names:
                command(pipe, name)
            pipe.execute()

        for _, name, key in self._scan():
            if name == "head":
                continue
            names.append(key)
            num += 1
            if len(names) >= BATCH_KEYS:
                self._call(flush)
                names.clear()
        if names:
            self._call(flush)
        return num

    def _scan(self) -> Iterator[tuple[int, str, bytes]]:
        """Partition, what follows the slot's name, and key, of all keys of this epoch."""
        pattern, named = self.keys.partitions_pattern(), self.keys.partition_key()
        keys = self._call(lambda: self._redis.scan_iter(match=pattern, count=BATCH_KEYS))
        while (key := self._call(lambda: next(keys, None))) is not None:
            # The glob takes other epochs too; the expression does not.
            if (match := re.fullmatch(named, key, re.DOTALL)) is not None:
                yield int(match[1]), match[2].decode(), key


def _keep(left_ms: int, else_ms: int) -> int:
    """As CARRY takes it, of PTTL: −1 has no end; −2 is gone, which a due mark alone outlives."""
    return {-1: 0, -2: else_ms}.get(left_ms, max(left_ms, 1))
