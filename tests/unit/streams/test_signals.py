"""Laws of what workers tell each other: each click's move once, however it was sent."""

import random
from collections import Counter

import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError
from afterclick.serving.memory import BEFORE, Move
from afterclick.serving.records import item_hash
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.events import Click
from afterclick.streams.partition import Serving
from afterclick.streams.record import Record
from afterclick.streams.replica import Replica
from afterclick.streams.signals import (
    Absorber,
    Origin,
    decode_parcel,
    encode_parcel,
    encode_signal,
)
from tests.doubles import log_of
from tests.unit.streams.test_fold_laws import run, some_clicks

NOTHING = Serving(0, "", "", None, Catalog.empty())


class Kept:
    """A memory that keeps everything."""

    def __init__(self) -> None:
        self.moves: list[Move] = []

    def absorb(self, moves: list[Move]) -> None:
        self.moves += moves


def moves_of(store: Replica) -> list[tuple[int, Move]]:
    return [move for one in store.signals.get(0, []) for move in decode_parcel(one.packed).moves]


def absorbed(values: list[bytes], *, known: dict[str, int] | None = None) -> list[Move]:
    """What a worker that reads these records has in the end, read in pieces."""
    kept, rng = Kept(), random.Random(len(values))
    absorber = Absorber(kept, namespace="n", known=known or {}, offset=0)
    records = [Record(at, 0, b"0", value) for at, value in enumerate(values)]
    while records:
        size = rng.randrange(1, 4)
        absorber.take(absorber.sift(records[:size]))
        records = records[size:]
    assert absorber.offset == len(values)
    return kept.moves


def test_moves_do_not_depend_on_where_the_log_was_cut() -> None:
    """Another worker folds the same clicks in other chunks after a crash."""
    records = log_of(some_clicks(400, seed=3))
    rules = ListRules.of(ServingSettings(history=8, idle_ttl_s=300))
    expected = moves_of(run(records, NOTHING, [1], rules))
    assert len(expected) > 250
    for sizes in ([2], [256], [7, 90, 1]):
        assert moves_of(run(records, NOTHING, sizes, rules)) == expected


def test_a_move_names_the_items_just_before_it_and_none_beyond_a_reset() -> None:
    """What transitions are counted from; a pause of hours begins another session."""
    hour = 3_600_000
    times = [0, 1000, 2000, 3000, 4000, 4 * hour, 4 * hour + 1000]
    clicks = [
        Click(user_id="u", item_id=f"i{n}", event="view", timestamp_ms=at)
        for n, at in enumerate(times)
    ]
    clicks.append(clicks[-1])  # a repeat is no move
    clicks.append(Click(user_id="other", item_id="i9", timestamp_ms=5 * hour))
    rules = ListRules.of(ServingSettings(history=8, idle_ttl_s=3600))
    moves = moves_of(run(log_of(clicks), NOTHING, [3], rules))
    assert [offset for offset, _ in moves] == [0, 1, 2, 3, 4, 5, 6, 8]
    before = [move.before for _, move in moves]
    names = [[f"i{n}" for n in own] for own in ([], [0], [1, 0], [2, 1, 0], [3, 2, 1], [], [5], [])]
    assert before == [tuple(map(item_hash, own)) for own in names]
    assert max(map(len, before)) == BEFORE
    assert moves[1][1] == Move("i1", 1, 1000, (item_hash("i0"),))


def test_a_parcel_has_the_bytes_that_outboxes_hold_already() -> None:
    """Redis and topic `signals` have some from before any change of this code."""
    moves = [(1, Move("i1", 2, 1000, (1, 2**63 + 5))), (2, Move("é", 2, 1000, ()))]
    stored = "93010992920194a2693102cd03e89201cf8000000000000005920294a2c3a902cd03e890"
    assert encode_parcel(1, 9, moves).hex() == stored
    assert decode_parcel(bytes.fromhex(stored)).moves == moves
    for three_or_five in ("93a2693102cd03e8", "95a2693102cd03e89005"):
        with pytest.raises(ContractError, match="length 4"):
            decode_parcel(bytes.fromhex("930109919201" + three_or_five))


def parcels(rng: random.Random, num: int) -> list[bytes]:
    """An outbox's entries: chunks of one partition that follow each other."""
    found, at = [], 0
    for _ in range(num):
        end = at + rng.randrange(1, 6)
        moves = [
            (offset, Move(f"i{offset}", 2, offset, ()))
            for offset in range(at, end)
            if rng.random() < 0.8  # visits and repeats move nothing
        ]
        found.append(encode_parcel(at, end, moves))
        at = end
    return found


@pytest.mark.parametrize("seed", range(20))
def test_what_is_published_again_counts_once(seed: int) -> None:
    """An owner that died before it could strike entries off leaves them to the next, who sends them
    again, in other messages; a zombie's come late.
    """
    rng = random.Random(seed)
    once: dict[Origin, list[bytes]] = {Origin(0, "t", p): parcels(rng, 12) for p in (0, 1)}
    values: list[bytes] = []
    sent = dict.fromkeys(once, 0)
    while any(sent[origin] < len(own) for origin, own in once.items()):
        origin = rng.choice(list(once))
        # Whoever sends begins at or before what was sent, never after.
        begin = rng.randrange(min(sent[origin] + 1, 12))
        stop = rng.randrange(begin, len(once[origin])) + 1
        values.append(encode_signal("n", origin, once[origin][begin:stop]))
        sent[origin] = max(sent[origin], stop)
    expected = [move for own in once.values() for p in own for _, move in decode_parcel(p).moves]
    assert Counter(absorbed(values)) == Counter(expected)


def test_what_the_release_has_learnt_is_not_absorbed_again() -> None:
    """Its memory holds the clicks below its snapshot; the topic holds them, too."""
    own = [encode_parcel(0, 9, [(n, Move(f"i{n}", 2, n, ())) for n in range(9)])]
    values = [encode_signal("n", Origin(0, "t", p), own) for p in (0, 1)]
    found = absorbed(values, known={"0": 5})
    assert [move.event_ms for move in found] == [5, 6, 7, 8, *range(9)]


def test_other_namespaces_and_what_is_no_message_are_passed_over() -> None:
    """The topic may be shared; a record that nobody can read must not stop everybody."""
    own = [encode_parcel(0, 1, [(0, Move("i", 2, 7, ()))])]
    values = [
        b"\xc1 not msgpack",
        encode_signal("another", Origin(0, "t", 0), own),
        encode_signal("n", Origin(0, "t", 0), [b"\x01"]),
        encode_signal("n", Origin(0, "t", 0), own),
        encode_signal("n", Origin(1, "t", 0), own),  # another epoch's offsets are others
    ]
    assert [move.event_ms for move in absorbed(values)] == [7, 7]


def test_a_move_takes_some_sixty_bytes_of_the_topic() -> None:
    """What docs/operations.md sizes the topic by."""
    moves = [
        (10_000_000 + n, Move(f"i{n:05d}", 2, 1_700_000_000_000, (2**63 + n,) * 3))
        for n in range(100)
    ]
    assert len(encode_parcel(10_000_000, 10_000_100, moves)) / 100 < 65
