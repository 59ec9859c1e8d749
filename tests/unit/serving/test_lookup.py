"""The reader's plans, driven by hand: which commands they ask for and when."""

import re
from typing import Any

import msgspec
import pytest

from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.keys import Keys, Meta, partition_of
from afterclick.serving.lookup import Lookup, Plan
from afterclick.serving.records import Head, TopList, compress_list


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Redis:
    """Values by key, and every command asked for."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.members: set[bytes] = set()
        self.asked: list[tuple[str, ...]] = []

    def answer(self, plan: Plan) -> Any:
        reply: Any = None
        while True:
            try:
                command = plan.send(reply)
            except StopIteration as done:
                return done.value
            self.asked.append(command)
            if command[0] == "SMEMBERS":
                reply = self.members
            elif command[0] == "GET":
                reply = self.values.get(command[1])
            else:
                reply = [self.values.get(key) for key in command[1:]]


def a_list(*items: str, written_ms: int = 0) -> bytes:
    return msgspec.json.encode(
        TopList(
            items=list(items),
            scores=[float(-n) for n in range(len(items))],
            source="model",
            release="r1",
            publication=3,
            items_offset=[7],
            partition=2,
            offset=41,
            event_ms=900,
            written_ms=written_ms,
        )
    )


@pytest.fixture
def redis() -> Redis:
    return Redis()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lookup(clock: Clock) -> Lookup:
    return Lookup("t", clock, lambda: clock.now_s)


def test_a_read_is_one_command(lookup: Lookup, redis: Redis) -> None:
    """A page that shows a list pays one round trip, the first read included."""
    redis.values = {"t:top:u": a_list("a"), "t:meta": msgspec.json.encode(Meta(partitions=4))}

    redis.answer(lookup.tops(["u"], None))
    redis.answer(lookup.tops(["u"], None))

    assert redis.asked == [
        ("MGET", "t:top:u", "t:meta", "{t}:unavailable:version"),
        ("MGET", "t:top:u"),
    ]


def test_the_version_is_asked_for_once_a_second(lookup: Lookup, redis: Redis, clock: Clock) -> None:
    """An item made unavailable disappears within a second, and no sooner does Redis pay for it."""
    redis.values = {"t:top:u": a_list("a")}

    redis.answer(lookup.tops(["u"], None))
    for now_s in (1000.9, 1001.0, 1001.5):
        clock.now_s = now_s
        redis.answer(lookup.tops(["u"], None))

    assert [len(command) for command in redis.asked] == [4, 2, 3, 2]


def test_the_set_is_read_only_when_its_version_moved(
    lookup: Lookup, redis: Redis, clock: Clock
) -> None:
    """The set may hold a hundred thousand ids; it travels when it changed."""
    redis.values = {"t:top:u": a_list("a", "b"), "{t}:unavailable:version": b"1"}
    redis.members = {b"a"}

    first = redis.answer(lookup.tops(["u"], None))[0]
    clock.now_s += 1
    redis.answer(lookup.tops(["u"], None))
    assert [command[0] for command in redis.asked] == ["MGET", "SMEMBERS", "MGET"]
    assert first.items == ["b"]
    assert first.scores == [-1.0]

    redis.values["{t}:unavailable:version"] = b"2"
    redis.members = {b"b"}
    clock.now_s += 1
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]


def test_a_list_longer_than_k_fills_up_after_dropping(lookup: Lookup, redis: Redis) -> None:
    """Lists keep a margin beyond k for exactly this."""
    redis.values = {
        "t:top:u": a_list("a", "b", "c", "d"),
        "t:meta": msgspec.json.encode(Meta(k=2)),
        "{t}:unavailable:version": b"1",
    }
    redis.members = {b"a"}

    assert redis.answer(lookup.tops(["u"], None))[0].items == ["b", "c"]
    assert redis.answer(lookup.tops(["u"], 3))[0].items == ["b", "c", "d"]


def test_users_without_a_list_share_the_fallback_for_a_second(
    lookup: Lookup, redis: Redis, clock: Clock
) -> None:
    """A crawler with a million unknown ids costs one read each, and the fallback stays fresh."""
    redis.values = {"t:top:": a_list("p")}

    first = redis.answer(lookup.tops(["nobody"], None))[0]
    asked = len(redis.asked)
    redis.values["t:top:"] = a_list("q")
    second = redis.answer(lookup.tops(["nobody either"], None))[0]
    clock.now_s += 1
    third = redis.answer(lookup.tops(["nobody"], None))[0]

    assert (first.source, first.items, second.items, third.items) == (
        "fallback",
        ["p"],
        ["p"],
        ["q"],
    )
    assert asked == 2
    assert redis.asked[2] == ("MGET", "t:top:nobody either")


def test_a_forgotten_user_gets_the_fallback(lookup: Lookup, redis: Redis) -> None:
    """`forget` leaves an empty list behind, which would be an empty page."""
    redis.values = {"t:top:u": a_list(), "t:top:": a_list("p")}

    assert redis.answer(lookup.tops(["u"], None))[0].source == "fallback"


def test_before_any_list_the_answer_is_empty_and_says_so(lookup: Lookup, redis: Redis) -> None:
    """An application started before the worker must not fail."""
    top = redis.answer(lookup.tops(["u"], None))[0]

    assert (top.items, top.scores, top.source) == ([], [], "none")


def test_a_changed_layout_is_noticed_at_the_first_miss(lookup: Lookup, redis: Redis) -> None:
    """A deployment moved to the cluster layout must not need a restart of its readers."""
    redis.values = {"t:top:u": a_list("old"), "t:meta": msgspec.json.encode(Meta(partitions=4))}
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["old"]

    slot = f"{{t:{partition_of('u', 4)}}}:top:u"
    redis.values = {
        slot: a_list("new"),
        "t:meta": msgspec.json.encode(Meta(partitions=4, layout="cluster")),
    }

    assert redis.answer(lookup.tops(["u"], None))[0].items == ["new"]
    assert redis.asked[-1] == ("MGET", slot)


def test_the_first_read_finds_a_cluster_layout(lookup: Lookup, redis: Redis) -> None:
    """Before meta is read, a reader can only guess; the guess must not be the answer."""
    slot = f"{{t:{partition_of('u', 4)}}}:top:u"
    redis.values = {
        slot: a_list("a"),
        "t:top:": a_list("p"),
        "t:meta": msgspec.json.encode(Meta(partitions=4, layout="cluster")),
    }

    tops = redis.answer(lookup.tops(["u", "stranger"], None))

    assert [top.source for top in tops] == ["model", "fallback"]


def test_meta_is_read_again_after_a_minute(lookup: Lookup, redis: Redis, clock: Clock) -> None:
    """A new k reaches readers that never miss."""
    redis.values = {"t:top:u": a_list("a", "b"), "t:meta": msgspec.json.encode(Meta(k=1))}
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]

    redis.values["t:meta"] = msgspec.json.encode(Meta(k=2))
    clock.now_s += 59.9
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]
    clock.now_s += 0.1
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a", "b"]


def test_many_users_are_asked_for_in_bounded_commands(lookup: Lookup, redis: Redis) -> None:
    """One MGET over everybody would block Redis for everybody else."""
    users = [f"u{n}" for n in range(1100)]
    redis.values = {f"t:top:{user}": a_list(f"i{user}") for user in users}

    tops = redis.answer(lookup.tops(users, None))

    assert [top.items for top in tops] == [[f"i{user}"] for user in users]
    assert [command[0] for command in redis.asked] == ["MGET"] * 3
    assert max(len(command) for command in redis.asked) <= 512 + 3


def test_age_is_told_by_the_wall_clock_and_never_negative(
    lookup: Lookup, redis: Redis, clock: Clock
) -> None:
    """Two machines' clocks differ; a list from the future is simply new."""
    redis.values = {"t:top:u": a_list("a", written_ms=999_500)}
    assert redis.answer(lookup.tops(["u"], None))[0].age_ms == 500

    redis.values = {"t:top:u": a_list("a", written_ms=1_000_500)}
    assert redis.answer(lookup.tops(["u"], None))[0].age_ms == 0


def test_k_below_one_is_refused(lookup: Lookup) -> None:
    """A negative k would silently cut the list from its end."""
    with pytest.raises(ValueError, match="at least 1, got -1"):
        Redis().answer(lookup.tops(["u"], -1))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"not json", "t:top:u: "),
        (b'{"v":1}', "missing required field"),
        (a_list("a").replace(b'"v":1', b'"v":2'), "version 2, this reader reads 1"),
        (a_list("a", "b").replace(b'["a","b"]', b'["a"]'), "1 items but 2 scores"),
    ],
)
def test_a_list_of_another_shape_is_named(
    lookup: Lookup, redis: Redis, value: bytes, says: str
) -> None:
    """Half-read lists are worse than none: the key and what is wrong with it must be said."""
    redis.values = {"t:top:u": value}

    with pytest.raises(ContractError, match=says):
        redis.answer(lookup.tops(["u"], None))


def test_unknown_fields_of_a_list_are_ignored(lookup: Lookup, redis: Redis) -> None:
    """Workers are upgraded before readers."""
    redis.values = {"t:top:u": a_list("a").replace(b'{"v":1', b'{"v":1,"later":[{}]')}

    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]


def test_a_place_needs_the_partitions(lookup: Lookup, redis: Redis) -> None:
    """A key computed from a guessed partition count would be a wrong key."""
    with pytest.raises(ConfigError, match="t:meta: no worker has written it yet"):
        redis.answer(lookup.place("u"))

    redis.values["t:meta"] = msgspec.json.encode(Meta(partitions=4))
    place = redis.answer(lookup.place("u"))

    assert place.partition == partition_of("u", 4)
    assert place.list_key == "t:top:u"
    assert place.record_key == f"{{t:{place.partition}}}:u:u"


def test_folded_to_is_the_next_offset_of_the_head(lookup: Lookup, redis: Redis) -> None:
    """Who sent a click can wait for the list that answers it."""
    assert redis.answer(lookup.folded_to(3)) == 0

    redis.values["{t:3}:head"] = msgspec.json.encode(Head(next=42))

    assert redis.answer(lookup.folded_to(3)) == 42


class Node(Redis):
    """Redis, of which some keys stand on a node that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.away: set[str] = set()

    def answer(self, plan: Plan) -> Any:
        reply: Any = None
        command = plan.send(None)
        try:
            while True:
                self.asked.append(command)
                if self.away & set(command[1:]):
                    command = plan.throw(UnavailableError("a node is away"))
                    continue
                if command[0] == "SMEMBERS":
                    reply = self.members
                elif command[0] == "GET":
                    reply = self.values.get(command[1])
                else:
                    reply = [self.values.get(key) for key in command[1:]]
                command = plan.send(reply)
        except StopIteration as done:
            return done.value


def meta(**fields: Any) -> bytes:
    return msgspec.json.encode(Meta(**{"layout": "cluster", "partitions": 4, **fields}))


def test_on_a_cluster_what_was_read_serves_while_its_node_is_away(clock: Clock) -> None:
    """One master of three holds the unavailable set: its death must not stop the other two."""
    keys, redis = Keys("t", layout="cluster", partitions=4), Node()
    lookup = Lookup("t", clock, lambda: clock.now_s, "cluster")
    redis.away = {"t:meta"}
    with pytest.raises(UnavailableError):
        redis.answer(lookup.tops(["u"], None))  # nothing is known yet
    redis.away = set()
    redis.values = {
        "t:meta": meta(),
        keys.top_of("u"): a_list("gone", "a"),
        keys.unavailable_version: b"1",
    }
    redis.members = {b"gone"}
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]
    clock.now_s += 1000
    redis.away = {"t:meta", keys.unavailable_version}
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]
    asked = len(redis.asked)
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["a"]
    assert len(redis.asked) == asked + 1, "a node that is away is left alone for a while"


def test_a_moved_epoch_is_seen_where_the_old_one_is_held(lookup: Lookup, redis: Redis) -> None:
    """Who waits for a click's list must not wait on a head that never moves again."""
    old, new = Keys("t", partitions=4), Keys("t", partitions=4, epoch=1)
    redis.values = {
        "t:meta": meta(layout="single"),
        old.head(3): msgspec.json.encode(Head(next=42)),
    }
    assert redis.answer(lookup.folded_to(3)) == 42
    redis.values[old.head(3)] = msgspec.json.encode(Head(next=42, hold="moved to epoch 1"))
    assert redis.answer(lookup.folded_to(3)) == 42, "held, and not moved yet"
    redis.values["t:meta"] = meta(layout="single", epoch=1)
    redis.values[new.head(3)] = msgspec.json.encode(Head(next=7))
    assert redis.answer(lookup.folded_to(3)) == 7


def test_a_moved_epoch_is_seen_where_a_list_is_missing(clock: Clock) -> None:
    """On a cluster lists have other keys in the new epoch."""
    old = Keys("t", layout="cluster", partitions=4)
    new = Keys("t", layout="cluster", partitions=8, epoch=1)
    redis, lookup = Node(), Lookup("t", clock, lambda: clock.now_s, "cluster")
    redis.values = {"t:meta": meta(), old.top_of("u"): a_list("old")}
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["old"]
    redis.values = {"t:meta": meta(partitions=8, epoch=1), new.top_of("u"): a_list("new")}
    assert redis.answer(lookup.tops(["u"], None))[0].items == ["new"]


def test_an_epochs_keys_are_nobody_elses() -> None:
    """A namespace may end in anything that looks like an epoch; it holds no colon."""
    one, other = Keys("t", epoch=1), Keys("t.e1")
    assert one.head(0) != other.head(0)
    assert Keys("t").head(0) == "{t:0}:head"
    assert one.head(0) == "{t:e1:0}:head"
    assert re.fullmatch(Keys("t").partition_key(), one.head(0).encode()) is None
    found = re.fullmatch(one.partition_key(), one.user(12, "a}:u:b").encode(), re.DOTALL)
    assert found is not None
    assert found.groups() == (b"12", b"u:a}:u:b")


def test_a_list_without_scores_is_answered_without_them(lookup: Lookup, redis: Redis) -> None:
    """`list_scores=false`; what became unavailable is dropped all the same."""
    bare = msgspec.structs.replace(
        msgspec.json.decode(a_list("a", "b", "c"), type=TopList), scores=[]
    )
    redis.values = {
        "t:top:u": compress_list(msgspec.json.encode(bare)), "{t}:unavailable:version": b"1"
    }  # fmt: skip
    redis.members = {b"a"}
    (top,) = redis.answer(lookup.tops(["u"], 1))
    assert (top.items, top.scores) == (["b"], [])
