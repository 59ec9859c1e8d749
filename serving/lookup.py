"""Which Redis commands answer a reader's question, and what their replies mean. Does no I/O.

A plan is a generator that yields commands and is sent their replies, or thrown an
`UnavailableError`; `reader.py` carries them, once for threads and once for asyncio. Knows no
connection, only names of keys and the bytes of lists.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.keys import Keys, Layout, Meta, partition_of
from afterclick.serving.records import Head, TopList, plain_list

META_EVERY_S = 60.0
"""Seconds between two looks at `<ns>:meta`; a user without a list looks sooner."""

UNAVAILABLE_EVERY_S = 1.0
"""Seconds between two looks at the version of the set of unavailable items."""

FALLBACK_EVERY_S = 1.0
"""Seconds that users without a list share one copy of the fallback list."""

AWAY_S = 5.0
"""Seconds until something is asked for again whose node of the cluster does not answer."""

USERS_MAX = 512
"""Users of one MGET; more are asked for in several, so that no answer blocks Redis for long."""

Command = tuple[str, ...]
T = TypeVar("T", TopList, Meta, Head)
Plan = Generator[Command, Any, Any]


class Top(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one user."""

    items: list[str]
    """Item ids, best first, at most k."""
    scores: list[float]
    """One per item; comparable within a list, not between lists. Empty where the workers are told
    `list_scores=false`.
    """
    source: Literal["model", "popularity", "fallback", "none"]
    """`model` and `popularity`: the user's own list; `fallback`: the list for users without one;
    `none`: there is no list at all yet.
    """
    release: str = ""
    publication: int = 0
    age_ms: int = 0
    """Milliseconds since a worker wrote the list, by this machine's clock."""
    event_ms: int = 0
    """Event time of the click that the list answers."""
    written_ms: int = 0
    partition: int = -1
    offset: int = -1
    """Place of that click in the log."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a user stands in Kafka and Redis."""

    partition: int
    list_key: str
    record_key: str
    head_key: str


class Lookup:
    """Plans of one reader, and what it remembers between them.

    Shared by threads: each thing remembered is one reference, replaced whole.
    """

    def __init__(
        self,
        namespace: str,
        monotonic: Callable[[], float],
        now_s: Callable[[], float],
        layout: Layout = "single",
    ) -> None:
        self._on_nodes = layout == "cluster"
        self._monotonic = monotonic
        self._now_s = now_s
        self._keys = Keys(namespace)
        self._meta: Meta | None = None
        self._meta_until_s = float("-inf")
        self._unavailable: tuple[bytes | None, frozenset[str]] = (None, frozenset())
        self._unavailable_until_s = float("-inf")
        self._fallback: TopList | None = None
        self._fallback_until_s = float("-inf")

    def tops(self, user_ids: Sequence[str], k: int | None) -> Plan:
        """Plan that returns one `Top` per user, in order."""
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        tops: list[Top] = []
        for start in range(0, len(user_ids), USERS_MAX):
            tops += yield from self._tops_at_once(user_ids[start : start + USERS_MAX], k)
        return tops

    def place(self, user_id: str) -> Plan:
        """Plan that returns a user's `Place`.

        Raises:
            ConfigError: no worker has written `<ns>:meta` yet.
        """
        self._take_meta((yield ("GET", self._keys.meta)))
        if self._meta is None or self._meta.partitions < 1:
            raise ConfigError(
                f"{self._keys.meta}: no worker has written it yet, so the number of partitions is "
                f"not known; start one with `afterclick worker`, or check the namespace "
                f"{self._keys.namespace!r}"
            )
        partition = partition_of(user_id, self._meta.partitions)
        return Place(
            partition=partition,
            list_key=self._keys.top(partition, user_id),
            record_key=self._keys.user(partition, user_id),
            head_key=self._keys.head(partition),
        )

    def folded_to(self, partition: int) -> Plan:
        """Plan that returns the offset up to which a partition's clicks stand in lists."""
        if self._meta is None:
            self._take_meta((yield ("GET", self._keys.meta)))
        while True:
            name = self._keys.head(partition)
            value = yield ("GET", name)
            head = None if value is None else _decode(name, value, Head)
            if head is not None and not head.hold:
                return head.next
            # Not begun, or held: perhaps for ever, because another epoch began.
            self._take_meta((yield ("GET", self._keys.meta)))
            if self._keys.head(partition) == name:
                return 0 if head is None else head.next

    def _tops_at_once(self, user_ids: Sequence[str], k: int | None) -> Plan:
        now_s = self._monotonic()
        if self._on_nodes:
            yield from self._look_around(now_s)
        names = [self._keys.top_of(user_id) for user_id in user_ids]
        extra = []
        if now_s >= self._meta_until_s:
            extra.append(self._keys.meta)
        if now_s >= self._unavailable_until_s:
            extra.append(self._keys.unavailable_version)
        replies = yield ("MGET", *names, *extra)
        lists, beside = replies[: len(names)], dict(zip(extra, replies[len(names) :], strict=True))
        moved = self._keys.meta in beside and self._take_meta(beside[self._keys.meta])
        if self._keys.unavailable_version in beside:
            yield from self._take_version(beside[self._keys.unavailable_version])
        found = _decode_lists(names, lists)
        if None in found and not moved and now_s >= self._fallback_until_s:
            moved = yield from self._renew_fallback(now_s)
        if moved:
            names = [self._keys.top_of(user_id) for user_id in user_ids]
            found = _decode_lists(names, (yield ("MGET", *names)))
            if None in found:
                yield from self._renew_fallback(now_s)
        return [self._top(stored, k) for stored in found]

    def _look_around(self, now_s: float) -> Generator[Command, Any, None]:
        """On a cluster: meta and the unavailable set, which stand on nodes of their own.

        While such a node is away, users of the others are served by what was read before.
        """
        if now_s >= self._meta_until_s:
            try:
                self._take_meta((yield ("GET", self._keys.meta)))
            except UnavailableError:
                if self._meta is None:
                    raise
                self._meta_until_s = now_s + AWAY_S
        if now_s >= self._unavailable_until_s:
            first = self._unavailable_until_s == float("-inf")
            try:
                yield from self._take_version((yield ("GET", self._keys.unavailable_version)))
            except UnavailableError:
                if first:
                    raise
                self._unavailable_until_s = now_s + AWAY_S

    def _renew_fallback(self, now_s: float) -> Generator[Command, Any, bool]:
        try:
            meta, value = yield ("MGET", self._keys.meta, self._keys.fallback)
        except UnavailableError:
            if self._fallback is None:
                raise
            self._fallback_until_s = now_s + AWAY_S
            return False
        self._fallback = None if value is None else _decode_list(self._keys.fallback, value)
        self._fallback_until_s = now_s + FALLBACK_EVERY_S
        return self._take_meta(meta)

    def _take_meta(self, value: bytes | None) -> bool:
        """Learn the layout; true if lists stand under other keys than believed."""
        old = self._keys
        if value is not None:
            meta = _decode(self._keys.meta, value, Meta)
            self._meta = meta
            self._keys = Keys(
                old.namespace, layout=meta.layout, partitions=meta.partitions, epoch=meta.epoch
            )
        self._meta_until_s = self._monotonic() + META_EVERY_S
        new = self._keys
        return new.layout != old.layout or (
            new.layout == "cluster" and (new.partitions, new.epoch) != (old.partitions, old.epoch)
        )

    def _take_version(self, version: bytes | None) -> Generator[Command, Any, None]:
        if version is None:
            self._unavailable = (None, frozenset())
        elif version != self._unavailable[0]:
            # Read after the version: a set newer than its version is read once more, never missed.
            members = yield ("SMEMBERS", self._keys.unavailable)
            self._unavailable = (version, frozenset(member.decode() for member in members))
        self._unavailable_until_s = self._monotonic() + UNAVAILABLE_EVERY_S

    def _top(self, own: TopList | None, k: int | None) -> Top:
        stored = own or self._fallback
        if stored is None:
            return Top(items=[], scores=[], source="none")
        if k is None:
            k = Meta().k if self._meta is None else self._meta.k
        items, scores, unavailable = stored.items, stored.scores, self._unavailable[1]
        if not unavailable.isdisjoint(items):
            kept = [at for at, item in enumerate(items) if item not in unavailable][:k]
            items, scores = [items[at] for at in kept], [scores[at] for at in kept if scores]
        return Top(
            items=items[:k],
            scores=scores[:k],
            source="fallback" if own is None else own.source,
            release=stored.release,
            publication=stored.publication,
            age_ms=max(int(self._now_s() * 1000) - stored.written_ms, 0),
            event_ms=stored.event_ms,
            written_ms=stored.written_ms,
            partition=stored.partition,
            offset=stored.offset,
        )


def _decode_lists(keys: list[str], values: list[bytes | None]) -> list[TopList | None]:
    """None for a user without a list, and for a forgotten one, whose list is empty."""
    found: list[TopList | None] = []
    for key, value in zip(keys, values, strict=True):
        stored = None if value is None else _decode_list(key, value)
        found.append(stored if stored is not None and stored.items else None)
    return found


def _decode_list(key: str, value: bytes) -> TopList:
    stored = _decode(key, plain_list(value, key), TopList)
    if stored.scores and len(stored.items) != len(stored.scores):
        raise ContractError(
            f"{key}: {len(stored.items)} items but {len(stored.scores)} scores", reason="list"
        )
    return stored


def _decode(key: str, value: bytes, kind: type[T]) -> T:
    try:
        decoded = msgspec.json.decode(value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ContractError(f"{key}: {error}", reason="list") from error
    if decoded.v != 1:
        raise ContractError(
            f"{key}: version {decoded.v}, this reader reads 1; upgrade afterclick", reason="list"
        )
    return decoded
