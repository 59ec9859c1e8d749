"""What a seed decides before its run: the log, releases and items that come, and the faults.

A plan is made of short lists, so that a failing one can be made shorter (shrink.py). Everything
else that is random, such as latencies, is drawn by each process from a generator of its own, so
that taking a fault out leaves the rest as it was.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.events import Click, encode

PARTITIONS = 2
NUM_ITEMS = 12
ITEM_EVENTS = 6
"""Records of the items topic, always the same; the plan decides when each comes."""
START_MS = 1_700_000_000_000
LOAD_S = 4.0
"""The log is written and faults strike within so many simulated seconds."""

RULES = (
    ListRules.of(
        ServingSettings(
            k=3, margin=1, history=4, popularity_half_life_s=1800, popularity_items_max=4
        )
    ),
    ListRules.of(
        ServingSettings(
            k=2, margin=2, history=3, filter_seen=True, idle_ttl_s=900, popularity_half_life_s=900
        )
    ),
)
"""What workers are told; a deployment changes it while others still run under the former."""


class Append(NamedTuple):
    """One record of the clicks topic, and what stands before it."""

    at_s: float
    partition: int
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    gap: int
    """Offsets before it that no consumer ever sees: markers, compaction."""


class Fault(NamedTuple):
    """Something that goes wrong."""

    at_s: float
    kind: str
    who: int
    """Worker or partition, by number modulo how many there are."""
    size: float
    """Of 0–1: how long, how much; each kind scales it."""

    def __str__(self) -> str:
        return f"{self.kind}(who={self.who}, size={self.size:.2f})"


class Change(NamedTuple):
    """A publication, an item or new settings, for those who look."""

    at_s: float
    kind: str
    number: int


class Plan(NamedTuple):
    """One run."""

    seed: int
    num_workers: int
    log_starts: tuple[int, ...]
    appends: list[Append]
    changes: list[Change]
    faults: list[Fault]
    storms: bool
    """Whether single calls and messages may take long."""


FAULTS = {
    "crash": 5,
    "freeze": 5,
    "rebalance": 4,
    "zombie": 6,
    "failover": 6,
    "resend": 4,
    "lost": 4,
    "late": 4,
    "slow": 4,
    "redis-away": 2,
    "broker-away": 1,
    "jump": 3,
    "drop": 3,
    "hint": 2,
    "join": 1,
}
"""Kinds with their weights; world.py has what each does."""


def make_plan(seed: int, kinds_wanted: Sequence[str] = ()) -> Plan:
    """The plan of a seed; with kinds wanted, the most faults, and of these only."""
    rng = random.Random(f"{seed}/plan")
    count = rng.choice((2, 4, 6, 8, 12))
    kinds, weights = list(FAULTS), list(FAULTS.values())
    if rng.random() < 0.5:  # few kinds at once meet each other more often
        kinds = rng.sample(kinds, 3)
        weights = [FAULTS[kind] for kind in kinds]
    if kinds_wanted:
        count, kinds, weights = 12, list(kinds_wanted), [1] * len(kinds_wanted)
    faults = [
        Fault(rng.uniform(0.1, LOAD_S + 1), kind, rng.randrange(6), rng.random())
        for kind in rng.choices(kinds, weights, k=count)
    ]
    changes = [Change(0.0, "publish", 1)] if rng.random() < 0.7 else []
    for number in range(len(changes) + 1, rng.choice((1, 2, 3, 4)) + 1):
        changes.append(Change(rng.uniform(0.3, LOAD_S), "publish", number))
    for number in range(1, ITEM_EVENTS + 1):
        early = rng.random() < 0.2
        changes.append(Change(0.0 if early else rng.uniform(0.2, LOAD_S), "item", number))
    if rng.random() < 0.3:
        changes.append(Change(rng.uniform(0.5, LOAD_S), "rules", 1))
    return Plan(
        seed=seed,
        num_workers=rng.choice((2, 2, 3)),
        log_starts=tuple(rng.choice((0, 0, 7)) for _ in range(PARTITIONS)),
        appends=_clicks(rng, rng.choice((12, 24, 40))),
        changes=sorted(changes),
        faults=sorted(faults),
        storms=rng.random() < 0.7,
    )


def _clicks(rng: random.Random, num: int) -> list[Append]:
    """Clicks, repeats, visits, forgets, unknown items, bad bytes: everything a log may hold."""
    times = sorted(rng.uniform(0.0, LOAD_S) for _ in range(num))
    users = rng.choice((2, 3, 5))
    step_ms = rng.choice((500, 60_000, 400_000))
    appends: list[Append] = []
    for n, at_s in enumerate(times):
        partition = rng.randrange(PARTITIONS)
        user = f"p{partition}u{rng.randrange(users)}"
        record_ms = START_MS + n * step_ms
        click = _click(rng, user, n, record_ms)
        key, value = encode(click)
        kind = rng.random()
        gap = rng.choice((1, 3)) if rng.random() < 0.08 else 0
        earlier = [one for one in appends if one.partition == partition]
        append = Append(at_s, partition, key, value, record_ms, gap)
        if kind < 0.06:
            bad = rng.choice(((key, b"{"), (key, None), (b"other", value), (None, value)))
            append = append._replace(key=bad[0], value=bad[1])
        elif kind < 0.15 and earlier:
            again = rng.choice(earlier)
            append = append._replace(key=again.key, value=again.value)
        appends.append(append)
    return appends


def _click(rng: random.Random, user: str, n: int, record_ms: int) -> Click:
    kind = rng.random()
    if kind < 0.05:
        return Click(user_id=user, event="forget")
    if kind < 0.12:
        return Click(user_id=user, event="visit")
    item = f"i{rng.randrange(NUM_ITEMS):05d}"
    if kind < 0.4:
        item = rng.choice(("n0", "n1", "n2", "nobody-knows"))
    return Click(
        user_id=user,
        item_id=item,
        event=rng.choice(("click", "view", "scroll")),
        timestamp_ms=record_ms - rng.choice((0, 0, 0, 4_000_000)) if rng.random() < 0.7 else None,
        event_id=f"e{n}" if rng.random() < 0.4 else None,
    )


def offsets(plan: Plan, partition: int) -> list[tuple[int, Append]]:
    """A partition's records with the offsets they get."""
    found, at = [], plan.log_starts[partition]
    for append in plan.appends:
        if append.partition == partition:
            at += append.gap
            found.append((at, append))
            at += 1
    return found


def to_json(plan: Plan) -> str:
    """For people: a plan's size and faults."""
    return msgspec.json.encode(plan._replace(appends=[])).decode()
