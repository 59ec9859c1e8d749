"""Laws of lists made later: put off under load, or renewed for a user who is away."""

from pathlib import Path

import msgspec
import pytest

from afterclick.serving.records import Head, TopList
from afterclick.serving.releases import LoadedRelease
from afterclick.streams.events import Click, Item
from afterclick.streams.partition import PartitionFold
from afterclick.streams.record import Chunk
from afterclick.streams.replica import Replica
from tests.doubles import cut, log_of
from tests.unit.streams.test_fold_laws import (
    LIMITS,
    RULES,
    click,
    folder_of,
    load,
    release,
    run,
    serving_of,
    some_clicks,
)

__all__ = ["release"]


def settle(fold: PartitionFold, limit: int = 3) -> int:
    lists = 0
    while fold.has_due:
        lists += fold.renew_due(limit).lists
    return lists


@pytest.mark.parametrize("sizes", [[1], [7], [400]])
def test_lists_put_off_end_as_if_they_had_been_made_at_once(
    release: LoadedRelease, sizes: list[int]
) -> None:
    """Under load the state goes on and the scan waits: once nothing is due, no byte may differ."""
    records = log_of(some_clicks(400, seed=3))
    store = Replica()
    fold = folder_of(store, serving_of(release))
    for number, chunk in enumerate(cut(records, sizes)):
        fold.process(chunk, put_off=number % 4 != 1)
    assert store.due
    settle(fold)
    assert not store.due
    assert store.snapshot() == run(records, serving_of(release), [1]).snapshot()


def test_putting_off_costs_one_scan_per_user_however_many_clicks(release: LoadedRelease) -> None:
    """That is what makes room: a user's clicks share the one list made at the end."""
    store = Replica()
    fold = folder_of(store, serving_of(release))
    for chunk in cut(log_of([click(f"u{n % 3}", n) for n in range(30)]), [1]):
        moved = fold.process(chunk, put_off=True)
        assert moved.applied[0].put_off == 1
        assert store.lists == {}
    assert settle(fold) == 3


def test_a_later_click_answers_what_was_due(release: LoadedRelease) -> None:
    """A list made at the next click leaves nothing to make: the older event must not come back."""
    store = Replica()
    fold = folder_of(store, serving_of(release))
    first, second = cut(log_of([click("u1", 1), click("u1", 2)]), [1])
    fold.process(first, put_off=True)
    fold.process(second)
    assert settle(fold) == 0
    assert msgspec.json.decode(store.lists["u1"], type=TopList).offset == 1


def test_a_forgotten_user_has_nothing_due(release: LoadedRelease) -> None:
    """A list made after `forget` would bring the user back."""
    store = Replica()
    fold = folder_of(store, serving_of(release))
    log = log_of([click("u1", 1), Click(user_id="u1", event="forget", timestamp_ms=9)])
    for chunk in cut(log, [1]):
        fold.process(chunk, put_off=True)
    assert settle(fold) == 0
    assert (store.records, store.lists, store.due) == ({}, {}, {})


def test_a_renewed_user_stands_as_if_the_release_had_been_there_at_the_click(
    release: LoadedRelease, tmp_path: Path
) -> None:
    """Record and list, without a click; and the click after it finds what it would have made."""
    newer = load(tmp_path / "r2", number=2, seed=2)
    rules = msgspec.structs.replace(RULES, history=100)  # a rebuild sees the whole past
    records = log_of(some_clicks(60, seed=1, users=5))
    more = log_of(some_clicks(40, seed=2, users=5), start=60)
    renewed, only_clicked = Replica(), Replica()
    for store in (renewed, only_clicked):
        fold = folder_of(store, serving_of(release), rules)
        for chunk in cut(records, [9]):
            fold.process(chunk)
    later = folder_of(renewed, serving_of(newer), rules)
    users = sorted(renewed.lists)
    assert later.renew(users).lists == len(users)
    at_once = run(records, serving_of(newer), [1], rules)
    assert renewed.lists == at_once.lists
    assert renewed.records == at_once.records
    assert later.renew(users).lists == 0, "what is up to date stays"
    for fold in (later, folder_of(only_clicked, serving_of(newer), rules)):
        for chunk in cut(more, [6]):
            fold.process(chunk)
    for user in {record.key.decode() for record in more if record.key}:
        assert renewed.lists.get(user) == only_clicked.lists.get(user)
        assert renewed.records.get((0, user)) == only_clicked.records.get((0, user))


def test_a_renewal_names_its_inputs_before_it_writes_lists(
    release: LoadedRelease, tmp_path: Path
) -> None:
    """A list may name no state of releases and items that the inputs list does not name."""
    items = load(tmp_path / "r1", number=1, seed=1)
    store = Replica()
    fold = folder_of(store, serving_of(items))
    fold.process(cut(log_of([click("u1", 1)]), [1])[0])
    items.catalog.apply(Item(item_id="fresh", categories=["c1"]), 0, 0)
    items.refresh()
    assert fold.renew(["u1"]).lists == 1
    top = msgspec.json.decode(store.lists["u1"], type=TopList)
    assert (top.items_offset, top.offset) == ([1], 0)
    entries = [(entry.offset, entry.items) for entry in store.entries[0]]
    assert entries == [(0, []), (1, [1])]
    assert msgspec.json.decode(store.heads[0], type=Head).items == [1]


def test_a_renewal_by_a_zombie_writes_nothing(release: LoadedRelease) -> None:
    """The heir has folded further: a list made from older records would stand over a newer one."""
    records = log_of(some_clicks(40, seed=6))
    store = Replica()
    zombie, heir = (folder_of(store, serving_of(release)) for _ in range(2))
    for fold in (zombie, heir):
        fold.process(Chunk(0, 20, records[:20]), put_off=True)
    heir.process(Chunk(20, 40, records[20:]), put_off=True)
    due = dict(store.due)
    assert zombie.renew_due(10).seek == 40
    assert store.due == due
    settle(heir)
    assert store.snapshot() == run(records, serving_of(release), [1]).snapshot()


def test_one_write_rebuilds_a_bounded_number_of_users(
    release: LoadedRelease, tmp_path: Path
) -> None:
    """Right after a swap everybody is stale: nobody may wait behind 256 times 50 steps."""
    newer = load(tmp_path / "r2", number=2, seed=2)
    first = log_of([click(f"u{n}", n) for n in range(30)])
    later = log_of([click(f"u{n}", n + 1) for n in range(30)], start=30)
    store = Replica()
    folder_of(store, serving_of(release)).process(cut(first, [30])[0])
    fold = folder_of(store, serving_of(newer), limits=LIMITS._replace(rebuilds_max=8))
    moved = fold.process(cut(later, [30])[0])
    assert [applied.counts.rebuilt for applied in moved.applied] == [8, 8, 8, 6]
