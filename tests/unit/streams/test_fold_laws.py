"""Laws of the fold: it does not matter how the log was cut, and a repeat changes nothing."""

import itertools
import random
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import UnavailableError
from afterclick.serving.manifest import Publication
from afterclick.serving.records import Head, TopList, decode_record, item_hash, unpack_interactions
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.events import Click, Item
from afterclick.streams.inference import PADDING_MAX, about_as_long
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges, Record
from afterclick.streams.replica import Replica
from tests.doubles import cut, log_of
from tests.tiny_release import digest_of, write_tiny_release

RULES = ListRules.of(ServingSettings(k=10, margin=5, history=8, popularity_items_max=50))
LIMITS = Limits(users_max=256, records_max=1024, bytes_max=1 << 20)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LoadedRelease:
    folder = tmp_path_factory.mktemp("releases") / "r1"
    return load(folder, number=1, seed=1, state_dtype=request.param)


def load(
    folder: Path, *, number: int, seed: int, state_dtype: Literal["fp32", "fp16"] = "fp32"
) -> LoadedRelease:
    write_tiny_release(folder, num_items=300, seed=seed, state_dtype=state_dtype)
    publication = Publication(number=number, release=folder.name, sha256=digest_of(folder))
    return LoadedRelease(publication, folder, ServingSettings(provider="cpu", threads=1))


def serving_of(release: LoadedRelease | None) -> Serving:
    if release is None:
        return Serving(0, "", "", None, Catalog.empty())
    p = release.publication
    return Serving(p.number, p.release, p.sha256, release, release.catalog)


def folder_of(
    store: Replica,
    serving: Serving,
    rules: ListRules = RULES,
    limits: Limits = LIMITS,
    letters: list | None = None,
) -> PartitionFold:
    batches = (f"b{n}-{id(store)}" for n in itertools.count())
    fold = PartitionFold(
        0,
        store,
        rules,
        limits,
        serving=lambda: serving,
        dead_letters=(letters if letters is not None else []).extend,
        log_start=lambda: 0,
        batch_ids=batches,
    )
    fold.open(LogEdges("t", 0, 10**9), lambda offset: None)
    return fold


def run(
    records: list[Record],
    serving: Serving,
    sizes: list[int],
    rules: ListRules = RULES,
    limits: Limits = LIMITS,
) -> Replica:
    store = Replica()
    fold = folder_of(store, serving, rules, limits)
    for chunk in cut(records, sizes):
        moved = fold.process(chunk)
        assert moved.seek is None
        assert moved.waiting_for is None
    return store


def some_clicks(num: int, *, seed: int, users: int = 12) -> list[Click]:
    """Repeats, visits, forgets, unknown items, ids given and not: everything a log may hold."""
    rng = random.Random(seed)
    clicks: list[Click] = []
    for n in range(num):
        user = f"u{rng.randrange(users)}"
        kind = rng.random()
        known = f"i{int(rng.paretovariate(0.4)) % 300:05d}"
        item = known if kind > 0.1 else f"new{rng.randrange(9)}"
        at = 1_700_000_000_000 + n * rng.choice([0, 900, 61_000])
        if kind > 0.97:
            clicks.append(Click(user_id=user, event="forget", timestamp_ms=at))
        elif kind > 0.9:
            clicks.append(Click(user_id=user, event="visit", timestamp_ms=at))
        elif kind > 0.8 and clicks:
            clicks.append(rng.choice(clicks))
        else:
            event_id = f"e{n}" if rng.random() < 0.5 else None
            event = rng.choice(["click", "view", "purchase", "scroll"])
            clicks.append(
                Click(user_id=user, item_id=item, event=event, timestamp_ms=at, event_id=event_id)
            )
    return clicks


@pytest.mark.parametrize("with_release", [True, False])
@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("idle_ttl_s", [0, 300])
def test_any_cut_of_the_log_gives_the_same_bytes(
    release: LoadedRelease, with_release: bool, filter_seen: bool, idle_ttl_s: int
) -> None:
    """A chunk's borders are an accident of load; records and lists must not show it."""
    serving = serving_of(release if with_release else None)
    rules = msgspec.structs.replace(RULES, filter_seen=filter_seen, idle_ttl_s=idle_ttl_s)
    records = log_of(some_clicks(400, seed=3))
    expected = run(records, serving, [1], rules).snapshot()
    rng = random.Random(5)
    for sizes in ([2], [256], [1000], [rng.randrange(1, 40) for _ in range(400)]):
        assert run(records, serving, sizes, rules).snapshot() == expected
    small = Limits(users_max=3, records_max=7, bytes_max=600)
    assert run(records, serving, [100], rules, small).snapshot() == expected


def test_users_share_a_call_of_steps_only_with_those_about_as_long() -> None:
    """One user with 50 steps among 255 with one made the whole call 54 times slower."""
    assert about_as_long([]) == []
    assert about_as_long([1, 1, 1]) == [[0, 1, 2]]
    assert about_as_long([3, 50, 20, 10]) == [[1, 2], [3, 0]]
    lens = [50] + [1] * 255
    assert [len(group) for group in about_as_long(lens)] == [1, 255]
    rng = random.Random(1)
    lens = [rng.randrange(1, 51) for _ in range(500)]
    groups = about_as_long(lens)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(500))
    assert all(
        max(lens[at] for at in own) * len(own) - sum(lens[at] for at in own) <= PADDING_MAX
        for own in groups
    )


def test_a_worker_that_reads_every_record_again_goes_on_with_the_same_bits(
    release: LoadedRelease,
) -> None:
    """A state in memory is what the record holds of it: a failover must not show."""
    records = log_of(some_clicks(200, seed=11))
    serving = serving_of(release)
    store = Replica()
    for chunk in cut(records, [7]):
        folder_of(store, serving).process(chunk)
    assert store.snapshot() == run(records, serving, [7]).snapshot()


def test_a_release_of_halves_keeps_half_the_bytes_of_a_state(
    release: LoadedRelease, tmp_path: Path
) -> None:
    """And a swap from the one kind to the other, and back, is a swap like any other."""
    records = [log_of(some_clicks(50, seed=n), start=50 * n) for n in range(3)]
    folder = tmp_path / "halves"
    halves = load(folder, number=2, seed=1, state_dtype="fp16")
    back = load(tmp_path / "r3", number=3, seed=1)
    results = []
    for sizes in ([1], [50]):
        store = Replica()
        for loaded, part, floats in (
            (release, records[0], None),
            (halves, records[1], 2),
            (back, records[2], 4),
        ):
            fold = folder_of(store, serving_of(loaded))
            for chunk in cut(part, sizes):
                assert fold.process(chunk).seek is None
            kept = [decode_record(data) for data in store.records.values()]
            sizes_now = {
                len(one.state)
                for one in kept
                if one.publication == loaded.publication.number and one.state
            }
            if floats is not None:
                assert sizes_now == {floats * loaded.manifest.state_floats}
        results.append(store.snapshot())
    assert results[0] == results[1]


def test_a_repeated_event_changes_nothing(release: LoadedRelease) -> None:
    """Producers retry; the second copy must leave every byte as it was."""
    clicks = [
        Click(user_id="u1", item_id="i00001", event_id="a", timestamp_ms=5),
        Click(user_id="u1", item_id="i00002", timestamp_ms=6),
    ]
    once = run(log_of(clicks), serving_of(release), [1]).snapshot()
    twice = run(log_of([*clicks, *clicks]), serving_of(release), [1]).snapshot()
    assert twice == once


def test_a_click_moves_the_list_of_its_user_only(release: LoadedRelease) -> None:
    """The point of it all."""
    before = run(log_of([click("u1", 1), click("u2", 2)]), serving_of(release), [1])
    after = run(log_of([click("u1", 1), click("u2", 2), click("u1", 7)]), serving_of(release), [1])
    assert before.lists["u2"] == after.lists["u2"]
    old, new = (msgspec.json.decode(s.lists["u1"], type=TopList) for s in (before, after))
    assert (old.offset, new.offset) == (0, 2)
    assert old.items != new.items


def test_an_unknown_item_is_remembered_and_skipped_by_the_step(release: LoadedRelease) -> None:
    """A later release may know it; until then it must not move the state."""
    known = run(log_of([click("u1", 1)]), serving_of(release), [1])
    strange = Click(user_id="u1", item_id="never-seen", timestamp_ms=1_700_000_001_000)
    both = run(log_of([click("u1", 1), strange]), serving_of(release), [1])
    one, two = (decode_record(s.records[0, "u1"]) for s in (known, both))
    assert one.state == two.state
    assert (one.num_interactions, two.num_interactions) == (1, 2)


def test_filtered_items_never_return(release: LoadedRelease) -> None:
    """`filter_seen` promises it for the whole kept history."""
    rules = msgspec.structs.replace(RULES, filter_seen=True)
    for serving in (serving_of(release), serving_of(None)):
        store = run(log_of(some_clicks(300, seed=9)), serving, [17], rules)
        for user, body in store.lists.items():
            if (0, user) not in store.records:
                continue
            record = decode_record(store.records[0, user])
            seen = {
                name
                for name in (f"i{n:05d}" for n in range(300))
                if item_hash(name) in _history(record.interactions)
            }
            assert not seen & set(msgspec.json.decode(body, type=TopList).items)


def test_lists_without_scores_are_the_same_lists(release: LoadedRelease) -> None:
    """With a release and by popularity; records and order know nothing of it."""
    rules = msgspec.structs.replace(RULES, list_scores=False)
    for serving in (serving_of(release), serving_of(None)):
        full, bare = (
            run(log_of(some_clicks(60, seed=3)), serving, [17], told) for told in (RULES, rules)
        )
        assert full.records == bare.records
        for user, body in full.lists.items():
            whole = msgspec.json.decode(body, type=TopList)
            expected = msgspec.structs.replace(whole, scores=[])
            assert whole.scores
            assert msgspec.json.decode(bare.lists[user], type=TopList) == expected


def test_a_new_publication_rebuilds_the_state_whenever_the_user_comes_back(
    release: LoadedRelease, tmp_path: Path
) -> None:
    """Rebuilt at once or a day later, within a chunk or alone: the same state."""
    newer = load(tmp_path / "r2", number=2, seed=2)
    first = log_of(some_clicks(60, seed=1, users=4))
    later = log_of(some_clicks(40, seed=2, users=4), start=60)
    results = []
    for sizes in ([1], [40], [3]):
        store = Replica()
        for serving, records in ((release, first), (newer, later)):
            fold = folder_of(store, serving_of(serving))
            for chunk in cut(records, sizes):
                assert fold.process(chunk).seek is None
        results.append(store.snapshot())
        assert [e.publication for e in store.entries[0]] == [1, 2]
    assert results[0] == results[1] == results[2]
    state = decode_record(store.records[0, "u1"]).state
    assert state != decode_record(run(first, serving_of(release), [1]).records[0, "u1"]).state


def test_the_first_release_builds_states_from_histories_kept_without_one(
    release: LoadedRelease,
) -> None:
    """A worker without a release keeps histories, so that no early click is lost to the model."""
    early, late = log_of([click("u1", 1), click("u1", 2)]), log_of([click("u1", 3)], start=2)
    store = Replica()
    folder_of(store, serving_of(None)).process(cut(early, [2])[0])
    assert msgspec.json.decode(store.lists["u1"], type=TopList).source == "popularity"
    folder_of(store, serving_of(release)).process(cut(late, [1])[0])
    streamed = run([*early, *late], serving_of(release), [1])
    assert (
        decode_record(store.records[0, "u1"]).state
        == decode_record(streamed.records[0, "u1"]).state
    )


def test_a_new_item_enters_lists_and_an_unavailable_one_leaves(tmp_path: Path) -> None:
    """Items come and go while the worker runs."""
    release = load(tmp_path / "r1", number=1, seed=1)
    release.catalog.apply(Item(item_id="fresh", categories=["c1", "c2"]), 0, 0)
    gone = "i00007"
    release.catalog.apply(Item(item_id=gone, available=False), 1, 0)
    release.refresh()
    rules = msgspec.structs.replace(RULES, k=1000, margin=0)
    store = run(log_of([click("u1", 1)]), serving_of(release), [1], rules)
    listed = msgspec.json.decode(store.lists["u1"], type=TopList)
    assert "fresh" in listed.items
    assert gone not in listed.items
    assert len(listed.items) == 300
    assert listed.items_offset == [1, 1]


def test_chunks_below_the_head_are_skipped_overlaps_cut_and_holes_sought(
    release: LoadedRelease,
) -> None:
    """Kafka may deliver again, overlapping or too far: only what is new is folded."""
    records = log_of(some_clicks(30, seed=4))
    store = Replica()
    fold = folder_of(store, serving_of(release))
    fold.process(Chunk(0, 10, records[:10]))
    assert fold.process(Chunk(0, 10, records[:10])).applied == []
    assert fold.process(Chunk(20, 30, records[20:])).seek == 10
    fold.process(Chunk(5, 20, records[5:20]))
    fold.process(Chunk(20, 30, records[20:]))
    assert store.snapshot() == run(records, serving_of(release), [1]).snapshot()


def test_another_writer_makes_the_worker_drop_its_cache_and_go_on_from_redis(
    release: LoadedRelease,
) -> None:
    """A zombie and its successor fold the same log: one of them wins each write, nobody twice."""
    records = log_of(some_clicks(40, seed=6))
    store = Replica()
    zombie, heir = (folder_of(store, serving_of(release)) for _ in range(2))
    zombie.process(Chunk(0, 10, records[:10]))
    heir.process(Chunk(0, 20, records[:20]))
    heir.process(Chunk(10, 20, records[10:20]))
    moved = zombie.process(Chunk(10, 20, records[10:20]))
    assert moved.seek == 20
    zombie.process(Chunk(20, 40, records[20:]))
    assert store.snapshot() == run(records, serving_of(release), [1]).snapshot()


def test_bad_records_become_dead_letters_and_the_rest_is_folded(release: LoadedRelease) -> None:
    """One poison record costs itself only."""
    good = log_of([click("u1", 1), click("u1", 2)])
    key, value = good[0].key, good[0].value
    bad = [
        (key, b"\xff\xfe", "json"),
        (key, b'{"user_id": 5}', "schema"),
        (key, b'{"item_id": "i00001"}', "schema"),
        (key, None, "null-value"),
        (None, value, "null-key"),
        (b"other", value, "wrong-key"),
        (key, b'{"user_id": "u1"}', "missing-item"),
        (key, b'"' + b"x" * (1 << 20) + b'"', "too-large"),
        (key, b'{"context":' + b'{"a":' * 50_000, "json"),
    ]
    records = [Record(n, 1_700_000_000_000, k, v) for n, (k, v, _) in enumerate(bad)]
    shifted = [msgspec.structs.replace(r, offset=r.offset + len(bad)) for r in good]
    letters: list = []
    store = Replica()
    fold = folder_of(store, serving_of(release), letters=letters)
    fold.process(Chunk(0, len(bad) + 2, [*records, *shifted]))
    assert [letter.reason for letter in letters] == [reason for *_, reason in bad]
    clean = run(good, serving_of(release), [1])
    assert store.records == clean.records


def click(user: str, item: int) -> Click:
    return Click(user_id=user, item_id=f"i{item:05d}", timestamp_ms=1_700_000_000_000 + item)


def _history(interactions: bytes) -> set[int]:
    return {kept.item_hash for kept in unpack_interactions(interactions)}


def test_a_held_partition_waits_with_the_words_of_whoever_holds_it(
    release: LoadedRelease,
) -> None:
    """A worker that folds beside a rebuild or a migration would mix two states."""
    store = Replica()
    fold = folder_of(store, serving_of(release))
    chunk, following = cut(log_of([click("u1", 1), click("u1", 2)]), [1])
    fold.process(chunk)
    free = msgspec.json.decode(store.heads[0], type=Head)
    store.heads[0] = msgspec.json.encode(msgspec.structs.replace(free, hold="rebuild 7"))
    with pytest.raises(UnavailableError, match="rebuild 7"):
        fold.process(following)
    with pytest.raises(UnavailableError, match="rebuild 7"):
        folder_of(store, serving_of(release))
    store.heads[0] = msgspec.json.encode(free)
    assert fold.process(following).applied


def test_a_redis_that_lost_everything_under_a_worker_is_filled_from_the_log_s_start(
    release: LoadedRelease,
) -> None:
    """A worker that starts then begins there too; offset 0 may have left the log long ago."""
    records = log_of(some_clicks(20, seed=8), start=7)
    once, emptied = Replica(), Replica()
    for store in (once, emptied):
        fold = PartitionFold(
            0,
            store,
            RULES,
            LIMITS,
            serving=lambda: serving_of(release),
            dead_letters=lambda _: None,
            log_start=lambda: 7,
            batch_ids=(f"b{n}" for n in itertools.count()),
        )
        fold.open(LogEdges("t", 7, 27), lambda _: None)
        if store is emptied:
            fold.process(Chunk(7, 17, records[:10]))
            for table in (store.heads, store.records, store.lists, store.due, store.hours):
                table.clear()
            assert fold.check() == 7
        fold.process(Chunk(7, 27, records))
    assert emptied.snapshot() == once.snapshot()
