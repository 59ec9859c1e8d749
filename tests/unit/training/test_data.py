"""Clicks become the sequences that the worker's fold would step through."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import gap_bucket
from afterclick.serving.records import (
    Interaction,
    is_repeat,
    item_hash,
    pack_interaction,
    repeat_tag,
)
from afterclick.training.data import batches, build_log, gap_buckets, newest, split, windows
from tests.unit.training.worlds import columns, ring

GAPS = [0, 1, 999, 1000, 1999, 2000, 63_000, 64_000, 10**9, 10**13]


def ids_of(log: object) -> list[str]:
    return [log.item_ids[code] for code in log.sequences.item_P]  # type: ignore[attr-defined]


def test_gap_buckets_are_those_of_the_contract() -> None:
    """A worker computes them one by one, in whole numbers."""
    assert gap_buckets(np.array(GAPS)).tolist() == [gap_bucket(gap) for gap in GAPS]


clicks_of_two_users = st.lists(
    st.tuples(
        st.sampled_from(["u", "v"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
        st.sampled_from(["click", "view"]),
        st.sampled_from([None, "x", "y"]),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(clicks_of_two_users, st.integers(1, 4))
def test_repeats_are_those_that_the_records_know(clicks: list, history: int) -> None:
    """Trainer and worker must take the same clicks, whatever ids and times they carry."""
    kept: dict[str, bytes] = {"u": b"", "v": b""}
    taken: dict[str, list[str]] = {"u": [], "v": []}
    for user, item, time_ms, event, event_id in clicks:
        tag = repeat_tag(event, event_id, time_ms)
        packed = pack_interaction(Interaction(item_hash(item), tag, 0, 0, 0, False))
        if not is_repeat(kept[user], packed):
            kept[user] = (kept[user] + packed)[-history * len(packed) :]
            taken[user].append(item)

    log = build_log(columns(*clicks), history=history)

    found = sorted(
        tuple(ids_of(log)[begin:end])
        for begin, end in zip(log.sequences.start_S1, log.sequences.start_S1[1:], strict=False)
    )
    assert found == sorted(tuple(items) for items in taken.values() if items)


def test_forget_erases_what_was_before_and_visits_are_no_clicks() -> None:
    """A forgotten past must not come back through training."""
    log = build_log(
        columns(
            ("u", "a", 1),
            ("u", "", 2, "forget"),
            ("u", "b", 3),
            ("u", "", 4, "visit"),
            ("u", "c", 5),
            ("v", "a", 6),
        ),
        history=50,
    )

    assert ids_of(log) == ["b", "c", "a"]
    assert log.num_forgotten == 1


def test_gaps_count_from_the_latest_time_seen() -> None:
    """As in the fold: a click from the past does not make the next gap longer."""
    log = build_log(columns(("u", "a", 100_000), ("u", "b", 0), ("u", "c", 104_000)), history=50)

    assert log.sequences.gap_P.tolist() == [0, 0, gap_bucket(4000)]


def test_an_idle_user_starts_again() -> None:
    """The worker resets the state there."""
    clicks = columns(("u", "a", 0), ("u", "b", 1000), ("u", "c", 100_000))

    log = build_log(clicks, history=50, idle_ttl_s=10)

    assert log.sequences.start_S1.tolist() == [0, 2, 3]
    assert log.sequences.gap_P.tolist() == [0, 1, 0]


def test_without_times_the_order_of_the_file_counts_and_items_may_repeat() -> None:
    """Sessions without times repeat items legally."""
    log = build_log(columns(("v", "b", 0), ("u", "a", 0), ("v", "b", 0), timed=False), history=50)

    assert ids_of(log) == ["b", "b", "a"]
    assert log.sequences.time_P is None


def test_no_clicks_are_refused() -> None:
    """An empty topic must not become an empty release."""
    with pytest.raises(ContractError, match="no click is left"):
        build_log(columns(("u", "", 1, "forget")), history=50)


def test_the_newest_events_are_held_out_with_their_users_past() -> None:
    """Nothing that is predicted may have been learnt."""
    log = build_log(ring(num_users=10), history=50)

    train, held = split(log.sequences, 0.2, "events")

    assert held is not None
    assert train.time_P is not None
    assert held.sequences.time_P is not None
    assert held.sequences.time_P[held.target_P].min() > train.time_P.max()
    assert not held.target_P[held.sequences.start_S1[:-1]].any()


def test_whole_sequences_are_held_out_where_there_are_no_times() -> None:
    """The last ones of the file."""
    log = build_log(ring(num_users=20)._replace(time_ms=None), history=50)

    train, held = split(log.sequences, 0.1, "auto")

    assert held is not None
    assert (train.num_sequences, held.sequences.num_sequences) == (18, 2)
    assert newest(held, 11).target_P.sum() == 11


@pytest.mark.parametrize("length", [1, 3, 5, 50])
def test_every_transition_lies_in_exactly_one_window(length: int) -> None:
    """One left out is never learnt; one counted twice weighs double."""
    log = build_log(ring(num_users=7, length=11), history=50)

    begin_W, size_W = windows(log.sequences, length)

    seen = np.concatenate([np.arange(b, b + s - 1) for b, s in zip(begin_W, size_W, strict=True)])
    last = log.sequences.start_S1[1:] - 1
    assert sorted(seen) == sorted(set(range(log.sequences.num_events)) - set(last.tolist()))
    assert size_W.max() <= length + 1


def test_batches_hold_every_window_once() -> None:
    """And differ from epoch to epoch."""
    cost = np.random.default_rng(0).integers(1, 50, 500)

    groups = batches(cost, 200, np.random.default_rng(1))
    others = batches(cost, 200, np.random.default_rng(2))

    assert sorted(np.concatenate(groups)) == list(range(500))
    assert max(cost[group].sum() for group in groups) <= 200 + 50
    assert np.concatenate(groups).tolist() != np.concatenate(others).tolist()


def test_tails_are_the_newest_clicks_of_every_sequence() -> None:
    """Leave-one-out asks for everybody's next click: so must the validation part."""
    clicks = [(f"u{user}", f"i{at}", at) for user in range(3) for at in range((2, 5, 20)[user])]
    sequences = build_log(columns(*clicks), history=50).sequences
    train, held = split(sequences, 0.1, "tails")
    assert held is not None
    assert sorted(train.sizes().tolist()) == [2, 4, 18]
    assert sorted(held.sequences.sizes().tolist()) == [5, 20]
    assert held.target_P.sum() == 1 + 2
    ends = held.sequences.start_S1[1:] - 1
    assert held.target_P[ends].all()
