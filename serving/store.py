"""Redis: atomic read, compare-and-set scripts (scripts.py); the only file that writes Redis.

The client is the synchronous one, used from worker threads: one MGET and one script a chunk.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import redis

from afterclick.serving.address import safe_url
from afterclick.serving.connection import CLUSTER_ERRORS, cluster_error, connect, refusal
from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.keys import Keys, Meta
from afterclick.serving.records import (
    Head,
    InputsEntry,
    compress_list,
    decode_stored,
    plain_list,
    stamp_list,
)
from afterclick.serving.scripts import CLEAR, COMMIT, RENEW, SWITCH, UNAVAILABLE


class Due(NamedTuple):
    """The event that a list which was put off must answer."""

    offset: int
    event_ms: int
    record_ms: int
    """Timestamp of its log record: how long the list is late."""


class UserWrite(NamedTuple):
    """What one write does to one user; empty bytes delete."""

    user_id: str
    record: bytes
    list_body: bytes
    """`encode_list`'s bytes; the store adds the moment."""
    due: Due | None = None
    """Leaves the list as it stands and marks it as due."""


class Standing(NamedTuple):
    """One user as read for a renewal."""

    record: bytes | None
    list_data: bytes | None
    """Its JSON, however it is stored."""
    due: Due | None


class PopularityWrite(NamedTuple):
    """Clicks to add to one hour of a partition."""

    bucket: int
    counts: dict[str, int]


class SignalsWrite(NamedTuple):
    """Moves of one chunk, for topic `signals`."""

    last: int
    """Offset of the chunk's last click; the outbox is in this order."""
    packed: bytes


class Commit(NamedTuple):
    """A folded chunk, written if the stored head is the one expected."""

    partition: int
    expected: bytes
    head: Head
    entry: InputsEntry | None
    users: Sequence[UserWrite]
    popularity: Sequence[PopularityWrite]
    signals: SignalsWrite | None = None


class Reading(NamedTuple):
    """What is read of one partition at one moment: the head, and some users' records."""

    partition: int
    user_ids: Sequence[str]


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
        compress_lists: write lists under zlib; both kinds are read.
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
        compress_lists: bool = False,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        client: Any = None,
    ) -> None:
        self.keys = keys
        self._url = url
        self.record_ttl_s = record_ttl_s
        self.popularity_ttl_s = popularity_ttl_s
        self._clock_ms = clock_ms
        self._compress_lists = compress_lists
        self.observe_s: Callable[[float], None] = lambda _: None
        """Told how long each call took, answer included."""
        self._redis: Any = connect(url, keys.layout) if client is None else client
        self._commit = self._redis.register_script(COMMIT)
        self._renew = self._redis.register_script(RENEW)
        self._clear = self._redis.register_script(CLEAR)
        self._switch = self._redis.register_script(SWITCH)
        self._unavailable = self._redis.register_script(UNAVAILABLE)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def packed(self, list_body: bytes, written_ms: int) -> bytes:
        """A list as it is stored; empty stays empty."""
        if not list_body:
            return b""
        stamped = stamp_list(list_body, written_ms)
        return compress_list(stamped) if self._compress_lists else stamped

    def read(self, partition: int, user_ids: Sequence[str]) -> Read:
        """Head and users' records in one MGET; one by one they would be of different moments."""
        return self.read_all([Reading(partition, user_ids)])[0]

    def read_all(self, asked: Sequence[Reading]) -> list[Read]:
        """The same of several partitions, each of one moment."""
        if self.keys.layout == "cluster" and len(asked) > 1:
            return [self.read(*one) for one in asked]
        names = [
            name
            for partition, user_ids in asked
            for name in (
                self.keys.head(partition),
                *(self.keys.user(partition, user) for user in user_ids),
            )
        ]
        found = iter(self._call(lambda: self._redis.mget(names)))
        return [
            Read(next(found) or b"", list(itertools.islice(found, len(one.user_ids))))
            for one in asked
        ]

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
        signals: SignalsWrite | None = None,
    ) -> bytes | None:
        """Write a folded chunk if the stored head is the one expected.

        Returns:
            None when it was written; else the head that stands there, empty for none.
        """
        commit = Commit(partition, expected, head, entry, users, popularity, signals)
        return self.commit_all([commit])[0]

    def commit_all(self, commits: Sequence[Commit]) -> list[bytes | None]:
        """The same of several partitions: a script each, sent together where one server has all.

        Raises:
            AfterclickError: one was refused or not answered; the others may have gone through.
        """
        written_ms = self._clock_ms()
        calls = [self._commit_call(commit, written_ms) for commit in commits]
        if len(calls) == 1 or self.keys.layout == "cluster":
            answers = [self._call(partial(self._commit, *call)) for call in calls]
        else:
            answers = self._call(lambda: self._pipelined(calls))
        return [None if answer == b"OK" else answer for answer in answers]

    def _commit_call(
        self, commit: Commit, written_ms: int
    ) -> tuple[list[str], list[bytes | int | str]]:
        """Keys and arguments of the script."""
        keys, partition = self.keys, commit.partition
        names = [
            keys.head(partition), keys.inputs(partition), keys.due(partition),
            keys.signals(partition),
        ]  # fmt: skip
        args: list[bytes | int | str] = [
            commit.expected,
            msgspec.json.encode(commit.head),
            msgspec.json.encode(commit.entry) if commit.entry else b"",
            self.record_ttl_s,
            len(commit.users),
            self.popularity_ttl_s,
            *(commit.signals or (0, b"")),
        ]
        for user_id, record, list_body, due in commit.users:
            names.append(keys.user(partition, user_id))
            names.append(keys.top(partition, user_id))
            args.append(record)
            args.append(self.packed(list_body, written_ms))
            args.append(b"%d %d %d" % due if due else b"")
        for hour in commit.popularity:
            names.append(keys.popularity(partition, hour.bucket))
            args.append(len(hour.counts))
            for item, count in hour.counts.items():
                args += [item, count]
        return names, args

    def _pipelined(self, calls: Sequence[tuple[list[str], list[bytes | int | str]]]) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        for names, args in calls:
            # Not `Script` itself, which asks before each pipeline whether the server knows it.
            pipe.execute_command("EVALSHA", self._commit.sha, len(names), *names, *args)
        answers: list[Any] = pipe.execute(raise_on_error=False)
        for at, answer in enumerate(answers):
            if isinstance(answer, redis.exceptions.NoScriptError):
                names, args = calls[at]
                answers[at] = self._commit(names, args)  # loads it
            elif isinstance(answer, Exception):
                raise answer
        return answers

    def waiting_signals(self, partition: int, limit: int) -> list[SignalsWrite]:
        """The oldest moves that are not known to be in topic `signals` yet, in log order."""
        name = self.keys.signals(partition)
        found = self._call(lambda: self._redis.zrange(name, 0, limit - 1, withscores=True))
        return [SignalsWrite(int(last), packed) for packed, last in found]

    def published_signals(self, partition: int, last: int) -> None:
        """Let go of the moves up to one, which the topic has, or which are given up.

        Not fenced: what the topic has once, it has whoever folds the partition now.
        """
        name = self.keys.signals(partition)
        self._call(lambda: self._redis.zremrangebyscore(name, "-inf", last))

    def num_waiting_signals(self, partition: int) -> int:
        """Chunks whose moves wait."""
        return int(self._call(lambda: self._redis.zcard(self.keys.signals(partition))))

    def due_users(self, partition: int, limit: int) -> list[str]:
        """Some of the users whose lists are due, at most `limit`; none only if there are none."""
        prefix = len(self.keys.user(partition, ""))
        name = self.keys.due(partition)

        def scan() -> list[str]:
            fields = itertools.islice(self._redis.hscan_iter(name, count=limit), limit)
            return [field.decode()[prefix:] for field, _ in fields]

        found: list[str] = self._call(scan)
        return found

    def read_standing(
        self, partition: int, user_ids: Sequence[str]
    ) -> tuple[bytes, list[Standing]]:
        """Head, and records, lists and due marks of users, of one moment."""
        records = [self.keys.user(partition, user) for user in user_ids]
        lists = [self.keys.top(partition, user) for user in user_ids]

        def transaction() -> list[Any]:
            pipe = self._redis.pipeline(transaction=True)
            # Not .mget(), which a cluster's pipeline refuses, though all stands in one slot.
            pipe.execute_command("MGET", self.keys.head(partition), *records, *lists)
            pipe.hmget(self.keys.due(partition), records)
            found: list[Any] = pipe.execute()
            return found

        (head, *found), marks = self._call(transaction)
        dues = [Due(*map(int, mark.split())) if mark else None for mark in marks]
        middle = len(user_ids)
        plain = [
            data and plain_list(data, name)
            for name, data in zip(lists, found[middle:], strict=True)
        ]
        return head or b"", list(map(Standing, found[:middle], plain, dues))

    def renew(self, partition: int, expected: bytes, users: Sequence[UserWrite]) -> bytes | None:
        """Write lists, and records rebuilt for them, if the stored head is the one expected.

        Args:
            partition: whose users these are.
            expected: the head that they were read with.
            users: an empty record is left as it stands.

        Returns:
            None when it was written; else the head that stands there.
        """
        written_ms = self._clock_ms()
        names = [self.keys.head(partition), self.keys.due(partition)]
        args: list[bytes | int] = [expected, self.record_ttl_s * 1000]
        for user in users:
            names.append(self.keys.user(partition, user.user_id))
            names.append(self.keys.top(partition, user.user_id))
            args += [user.record, self.packed(user.list_body, written_ms)]
        answer: bytes = self._call(lambda: self._renew(keys=names, args=args))
        return None if answer == b"OK" else answer

    def clear(self, partition: int, expected: bytes, *, inputs: bool, head: bool = False) -> bool:
        """Delete everything of a partition while its head stands as expected, but for moves that
        wait to be published; scans, so for a rebuild only.

        Args:
            partition: whose.
            expected: the head in Redis.
            inputs: the inputs list, too.

        Returns:
            Whether the head stood as expected to the end.
        """
        kept = {self.keys.head(partition), self.keys.signals(partition)}
        if not inputs:
            kept.add(self.keys.inputs(partition))

        def left() -> Iterator[str]:
            for pattern in self.keys.patterns(partition):
                for key in self._redis.scan_iter(match=pattern, count=1000):
                    name = key.decode()
                    if name not in kept and self.keys.is_of(partition, name):
                        yield name

        def clear() -> bool:
            names = left()
            while some := list(itertools.islice(names, 500)):
                if self._clear(keys=[self.keys.head(partition), *some], args=[expected]) != b"OK":
                    return False
            return True

        return bool(self._call(clear))

    def inputs(self, partition: int) -> list[InputsEntry]:
        """Everything that entered the partition's fold besides its clicks, oldest first."""
        found = self._call(lambda: self._redis.lrange(self.keys.inputs(partition), 0, -1))
        name = self.keys.inputs(partition)
        return [decode_stored(entry, InputsEntry, name) for entry in found]

    def all_inputs(self) -> list[bytes]:
        """The entries of every inputs list on this Redis, of any namespace; scans."""

        def scan() -> list[bytes]:
            names = self._redis.scan_iter(match="{*}:inputs", count=1000)
            return [entry for name in names for entry in self._redis.lrange(name, 0, -1)]

        found: list[bytes] = self._call(scan)
        return found

    def users(self, partition: int) -> set[str]:
        """Every user with a record in a partition; scans, so for verification only."""
        prefix = self.keys.user(partition, "").encode()

        def scan() -> set[str]:
            # In a cluster only the node that has the partition's slot.
            where: dict[str, Any] = {}
            if self.keys.layout == "cluster":
                where["target_nodes"] = self._redis.get_node_from_key(prefix)
            pattern = self.keys.users_pattern(partition)
            return {
                key.removeprefix(prefix).decode()
                for key in self._redis.scan_iter(match=pattern, count=1000, **where)
            }

        found: set[str] = self._call(scan)
        return found

    def write_meta(self, expected: bytes, meta: Meta) -> bool:
        """Tell readers where lists stand, if `stored_meta` is as expected; whether it was."""
        args = [expected, msgspec.json.encode(meta)]
        return bool(self._call(lambda: self._switch(keys=[self.keys.meta], args=args)))

    def stored_meta(self) -> bytes:
        """What a worker wrote for readers, empty in a fresh namespace."""
        return self._call(lambda: self._redis.get(self.keys.meta)) or b""

    def read_meta(self) -> Meta | None:
        """The same, decoded."""
        stored = self.stored_meta()
        return decode_stored(stored, Meta, self.keys.meta) if stored else None

    def write_summary(self, partition: int, scores: Mapping[str, int]) -> None:
        """A partition's most popular items, for the fallback list; a hint outside the fold."""
        name = self.keys.popularity_summary(partition)
        data = msgspec.json.encode(scores)
        self._call(lambda: self._redis.set(name, data, ex=self.popularity_ttl_s))

    def read_summaries(self, num_partitions: int) -> list[dict[str, int]]:
        """All partitions' summaries."""
        names = [self.keys.popularity_summary(p) for p in range(num_partitions)]
        found = self._call(lambda: [self._redis.get(name) for name in names])
        return [
            decode_stored(data, dict[str, int], name)
            for name, data in zip(names, found, strict=True)
            if data
        ]

    def write_fallback(self, list_body: bytes) -> None:
        """The list of users without one."""
        data = self.packed(list_body, self._clock_ms())
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
        """Refuse a Redis that would drop state, or that is not of the layout; asks every master.

        Raises:
            ConfigError: older than 6.2, it evicts keys, or it is a cluster under the layout
                `single`.
            UnavailableError: one does not answer.
        """
        if self.keys.layout == "cluster":
            infos = self._call(lambda: self._redis.info(target_nodes="primaries"))
            for node, info in infos.items():
                _check_info(info, f"redis {safe_url(self._url)}, node {node}")
            return
        info = self._call(lambda: self._redis.info())
        where = f"redis {safe_url(self._url)}"
        if info.get("cluster_enabled"):
            raise ConfigError(
                f"{where}: it is a node of a Redis Cluster, but the layout is 'single'; set "
                "AFTERCLICK_SERVING__LAYOUT=cluster"
            )
        _check_info(info, where)

    def _call(self, action: Callable[[], Any]) -> Any:
        begun_s = time.perf_counter()
        try:
            answer = action()
            self.observe_s(time.perf_counter() - begun_s)
            return answer
        except CLUSTER_ERRORS as error:
            raise cluster_error(error, f"redis {safe_url(self._url)}") from error
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            where = f"redis {safe_url(self._url)}"
            raise refusal(error, where) or UnavailableError(f"{where}: {error}") from error
        except redis.exceptions.ReadOnlyError as error:
            raise UnavailableError(
                f"redis {safe_url(self._url)}: it is a replica: {error}"
            ) from error
        except redis.exceptions.NoScriptError as error:
            # redis-py loads a script and runs it; between the two another server took over.
            raise UnavailableError(f"redis {safe_url(self._url)}: {error}") from error
        except redis.exceptions.ResponseError as error:
            if str(error).startswith(("OOM", "LOADING", "BUSY", "MASTERDOWN", "MISCONF")):
                raise UnavailableError(f"redis {safe_url(self._url)}: {error}") from error
            if refused := refusal(error, f"redis {safe_url(self._url)}"):
                raise refused from error
            if "WRONGTYPE" in str(error) or "not an integer" in str(error):
                raise ContractError(
                    f"redis {safe_url(self._url)}: {error}; something else writes our keys",
                    reason="stored",
                ) from error
            raise


def _check_info(info: Mapping[str, Any], where: str) -> None:
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
