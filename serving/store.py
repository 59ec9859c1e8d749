"""Redis: atomic read, compare-and-set script; the only file that writes Redis.

Everything of one partition changes by one script, `COMMIT`, and only while the stored head is,
whole, the
one that was read. Lists written outside it ended wrong in 349 of 400 simulated failovers
(design.md). The
client is the synchronous one, used from worker threads: one MGET and one script a chunk.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from afterclick.serving.connection import connect
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Keys, Meta
from afterclick.serving.reader import safe_url
from afterclick.serving.records import Head, InputsEntry, stamp_list

COMMIT = """
local head = redis.call('GET', KEYS[1]) or ''
if head == ARGV[2] then return 'OK' end
if head ~= ARGV[1] then return head end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('RPUSH', KEYS[2], ARGV[3]) end
local ttl = ARGV[4]
local key, arg = 3, 7
for _ = 1, tonumber(ARGV[5]) do
  for _ = 1, 2 do
    if ARGV[arg] == '' then redis.call('DEL', KEYS[key])
    else redis.call('SET', KEYS[key], ARGV[arg], 'EX', ttl) end
    key, arg = key + 1, arg + 1
  end
end
while KEYS[key] do
  for _ = 1, tonumber(ARGV[arg]) do
    redis.call('HINCRBY', KEYS[key], ARGV[arg + 1], ARGV[arg + 2])
    arg = arg + 2
  end
  redis.call('EXPIRE', KEYS[key], ARGV[6])
  key, arg = key + 1, arg + 1
end
return 'OK'
"""
"""KEYS: head, inputs, then record and list of each user, then popularity hashes.
ARGV: head expected, head new, inputs entry or '', seconds to keep users, number of users, seconds
to keep
popularity, then record and list of each user ('' deletes), then per hash: count, item, increment, …
Answers OK, or the head that stands there. A head holds its write's batch id, so finding the new
head
means that this very script ran before and the client sent it again.
"""

_UNAVAILABLE = """
local total = tonumber(redis.call('GET', KEYS[2]) or '-1')
if total > tonumber(ARGV[2]) then return 0 end
if total ~= tonumber(ARGV[1]) then
  redis.call('DEL', KEYS[1])
  for i = tonumber(ARGV[3]) + 4, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
else
  for i = 4, tonumber(ARGV[3]) + 3 do
    local id = string.sub(ARGV[i], 2)
    if string.sub(ARGV[i], 1, 1) == '-' then redis.call('SADD', KEYS[1], id)
    else redis.call('SREM', KEYS[1], id) end
  end
end
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""
"""Keep `<ns>:unavailable`. A worker that is behind writes nothing; one that finds another history
than its
own writes the whole set. KEYS: set, version. ARGV: version expected, new, number of changes,
changes
('-id' gone, '+id' back), then the whole set.
"""


class UserWrite(NamedTuple):
    """What one write does to one user; empty bytes delete."""

    user_id: str
    record: bytes
    list_body: bytes
    """`encode_list`'s bytes; the store adds the moment."""


class PopularityWrite(NamedTuple):
    """Clicks to add to one hour of a partition."""

    bucket: int
    counts: dict[str, int]


class Read(NamedTuple):
    """Head and records as they stood at one moment."""

    head: bytes
    """Empty where the partition has none."""
    records: list[bytes | None]


class Store:
    """Redis of one namespace.

    Args:
        url: of the server; messages show it without its secrets.
        keys: names of the namespace.
        record_ttl_s: seconds after its last write when a user's record and list may go.
        popularity_ttl_s: the same for an hour's popularity.
        clock_ms: what lists are stamped with.
        client: instead of a connection to `url`: the simulation brings its own.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        record_ttl_s: int,
        popularity_ttl_s: int,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        client: Any = None,
    ) -> None:
        self.keys = keys
        self._url = url
        self.record_ttl_s = record_ttl_s
        self._popularity_ttl_s = popularity_ttl_s
        self._clock_ms = clock_ms
        self.observe_s: Callable[[float], None] = lambda _: None
        """Told how long each call took, answer included."""
        self._redis: Any = connect(url) if client is None else client
        self._commit = self._redis.register_script(COMMIT)
        self._unavailable = self._redis.register_script(_UNAVAILABLE)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def read(self, partition: int, user_ids: Sequence[str]) -> Read:
        """Head and users' records in one MGET; one by one they would be of different moments."""
        names = [self.keys.head(partition)]
        names += [self.keys.user(partition, user) for user in user_ids]
        found = self._call(lambda: self._redis.mget(names))
        return Read(found[0] or b"", found[1:])

    def read_popularity(
        self, partition: int, buckets: Sequence[int]
    ) -> tuple[bytes, dict[int, dict[str, int]]]:
        """Head and hourly counts of one moment."""

        def transaction() -> list[Any]:
            pipe = self._redis.pipeline(transaction=True)
            pipe.get(self.keys.head(partition))
            for bucket in buckets:
                pipe.hgetall(self.keys.popularity(partition, bucket))
            found: list[Any] = pipe.execute()
            return found

        head, *hashes = self._call(transaction)
        counts = {
            bucket: {item.decode(): int(count) for item, count in found.items()}
            for bucket, found in zip(buckets, hashes, strict=True)
            if found
        }
        return head or b"", counts

    def commit(
        self,
        partition: int,
        expected: bytes,
        head: Head,
        entry: InputsEntry | None,
        users: Sequence[UserWrite],
        popularity: Sequence[PopularityWrite],
    ) -> bytes | None:
        """Write a folded chunk if the stored head is the one expected.

        Returns:
            None when it was written; else the head that stands there, empty for none.
        """
        new = msgspec.json.encode(head)
        written_ms = self._clock_ms()
        names = [self.keys.head(partition), self.keys.inputs(partition)]
        args: list[bytes | int | str] = [
            expected,
            new,
            msgspec.json.encode(entry) if entry else b"",
            self.record_ttl_s,
            len(users),
            self._popularity_ttl_s,
        ]
        for user in users:
            names.append(self.keys.user(partition, user.user_id))
            names.append(self.keys.top(partition, user.user_id))
            args.append(user.record)
            args.append(stamp_list(user.list_body, written_ms) if user.list_body else b"")
        for hour in popularity:
            names.append(self.keys.popularity(partition, hour.bucket))
            args.append(len(hour.counts))
            for item, count in hour.counts.items():
                args += [item, count]
        answer: bytes = self._call(lambda: self._commit(keys=names, args=args))
        return None if answer == b"OK" else answer

    def inputs(self, partition: int) -> list[InputsEntry]:
        """Everything that entered the partition's fold besides its clicks, oldest first."""
        found = self._call(lambda: self._redis.lrange(self.keys.inputs(partition), 0, -1))
        return [msgspec.json.decode(entry, type=InputsEntry) for entry in found]

    def lists(self, partition: int, user_ids: Sequence[str]) -> tuple[Read, list[bytes | None]]:
        """Head, records and lists of one moment, for comparison (one server or one slot)."""
        names = [self.keys.head(partition)]
        names += [self.keys.user(partition, user) for user in user_ids]
        names += [self.keys.top(partition, user) for user in user_ids]
        found = self._call(lambda: self._redis.mget(names))
        middle = 1 + len(user_ids)
        return Read(found[0] or b"", found[1:middle]), found[middle:]

    def users(self, partition: int) -> set[str]:
        """Every user with a record in a partition; scans, so for verification only."""
        prefix = self.keys.user(partition, "").encode()

        def scan() -> set[str]:
            pattern = self.keys.users_pattern(partition)
            return {
                key.removeprefix(prefix).decode()
                for key in self._redis.scan_iter(match=pattern, count=1000)
            }

        found: set[str] = self._call(scan)
        return found

    def write_meta(self, meta: Meta) -> None:
        """Tell readers where lists stand."""
        self._call(lambda: self._redis.set(self.keys.meta, msgspec.json.encode(meta)))

    def read_meta(self) -> Meta | None:
        """What a worker wrote for readers, None in a fresh namespace."""
        data = self._call(lambda: self._redis.get(self.keys.meta))
        return msgspec.json.decode(data, type=Meta) if data else None

    def write_summary(self, partition: int, scores: Mapping[str, int]) -> None:
        """A partition's most popular items, for the fallback list; a hint outside the fold."""
        name = self.keys.popularity_summary(partition)
        data = msgspec.json.encode(scores)
        self._call(lambda: self._redis.set(name, data, ex=self._popularity_ttl_s))

    def read_summaries(self, num_partitions: int) -> list[dict[str, int]]:
        """All partitions' summaries."""
        names = [self.keys.popularity_summary(p) for p in range(num_partitions)]
        found = self._call(lambda: [self._redis.get(name) for name in names])
        return [msgspec.json.decode(data, type=dict[str, int]) for data in found if data]

    def write_fallback(self, list_body: bytes) -> None:
        """The list of users without one."""
        data = stamp_list(list_body, self._clock_ms())
        self._call(lambda: self._redis.set(self.keys.fallback, data))

    def write_unavailable(
        self, before: int, after: int, changes: Sequence[str], whole: Sequence[str]
    ) -> bool:
        """Bring the set of unavailable items forward.

        Args:
            before: version these changes start from: items offsets summed over partitions.
            after: version they lead to.
            changes: `-id` for an item gone, `+id` for one that is back.
            whole: the whole set after them, for a Redis that has another history.
        """
        names = [self.keys.unavailable, self.keys.unavailable_version]
        args: list[str | int] = [before, after, len(changes), *changes, *whole]
        return bool(self._call(lambda: self._unavailable(keys=names, args=args)))

    def check_server(self) -> None:
        """Refuse a Redis that would drop state.

        Raises:
            ConfigError: older than 6.2, or it evicts keys.
            UnavailableError: it does not answer.
        """
        info: dict[str, Any] = self._call(lambda: self._redis.info())
        where = f"redis {safe_url(self._url)}"
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
            raise ConfigError(f"{where}: version {version}, expected at least 6.2")
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if policy != "noeviction":
            raise ConfigError(
                f"{where}: maxmemory-policy is {policy!r}, expected 'noeviction', because an "
                "evicted record is lost state; "
                "run: redis-cli CONFIG SET maxmemory-policy noeviction"
            )

    def _call(self, action: Callable[[], Any]) -> Any:
        begun_s = time.perf_counter()
        try:
            answer = action()
            self.observe_s(time.perf_counter() - begun_s)
            return answer
        except redis.exceptions.AuthenticationError as error:
            raise ConfigError(f"redis {safe_url(self._url)}: {error}") from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise UnavailableError(f"redis {safe_url(self._url)}: {error}") from error
        except redis.exceptions.ReadOnlyError as error:
            raise UnavailableError(
                f"redis {safe_url(self._url)}: it is a replica: {error}"
            ) from error
        except redis.exceptions.ResponseError as error:
            if str(error).startswith(("OOM", "LOADING", "BUSY", "MASTERDOWN", "MISCONF")):
                raise UnavailableError(f"redis {safe_url(self._url)}: {error}") from error
            raise
