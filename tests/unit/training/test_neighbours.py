"""VMIS-kNN with sorted arrays against its description, followed step by step."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.training import neighbours
from afterclick.training.data import UNKNOWN, Sequences, held_out
from afterclick.training.neighbours import Neighbourhood, SessionNeighbours

NUM_ITEMS = 8
session = st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=6)


def sequences(items: list[list[int]]) -> Sequences:
    flat = np.array([item for own in items for item in own], np.int64)
    start = np.cumsum([0, *(len(own) for own in items)])
    return Sequences(start, flat, np.zeros_like(flat), np.zeros_like(flat), None)


def slowly(train: list[list[int]], past: list[int], options: Neighbourhood) -> dict[int, float]:
    """Scores as the paper tells it: newest sessions, similarity, then items."""
    distinct = {number: sorted(set(own)) for number, own in enumerate(train)}
    longest = float(np.quantile([len(own) for own in distinct.values()], 0.995))
    distinct = {number: own for number, own in distinct.items() if len(own) <= longest}
    window = past[-options.last_items :]
    similar: dict[int, float] = {}
    nearest_place: dict[int, int] = {}
    looked_at = set()
    for place, item in enumerate(reversed(window)):
        if item in looked_at or item == UNKNOWN:
            continue
        looked_at.add(item)
        holding = sorted((n for n, own in distinct.items() if item in own), reverse=True)
        for number in holding[: options.recent]:
            similar[number] = similar.get(number, 0) + len(window) - place
            nearest_place.setdefault(number, place)
    newest = sorted(similar, reverse=True)[: options.recent]
    best = sorted(newest, key=lambda n: (-similar[n], -n))[: options.neighbours]
    scores: dict[int, float] = {}
    for number in best:
        weight = similar[number] * (1 - 0.1 * (nearest_place[number] + 1))
        for item in distinct[number]:
            scores[item] = scores.get(item, 0) + weight
    total = sum(len(own) for own in distinct.values())
    for item in scores:
        holders = sum(item in own for own in distinct.values())
        scores[item] *= 1 + options.idf_weight * math.log(total / holders)
    if options.drop_last == "yes":
        scores.pop(past[-1], None)
    return {item: score for item, score in scores.items() if score > 0}


@given(
    st.lists(session, min_size=1, max_size=12),
    st.lists(st.one_of(st.integers(0, NUM_ITEMS - 1), st.just(UNKNOWN)), min_size=1, max_size=6),
    st.builds(
        Neighbourhood,
        recent=st.integers(1, 6),
        neighbours=st.integers(1, 4),
        last_items=st.integers(1, 5),
        idf_weight=st.sampled_from([0.0, 1.0]),
        drop_last=st.sampled_from(["yes", "no"]),
    ),
)
@settings(max_examples=150, deadline=None)
def test_scores_are_those_of_the_paper(
    train: list[list[int]], past: list[int], options: Neighbourhood
) -> None:
    """Sorting whole numbers must give what heaps and maps give, whatever is cut off."""
    held = held_out(sequences([[*past, 0], [0, 0]]), None)

    found = SessionNeighbours(sequences(train), NUM_ITEMS, options).scores(
        held.sequences, np.array([len(past), len(past) + 2])
    )

    for row, own in zip(found, (past, [0]), strict=True):
        expected = slowly(train, own, options)
        assert set(np.flatnonzero(np.isfinite(row)).tolist()) == set(expected)
        for item, score in expected.items():
            assert row[item] == pytest.approx(score)


@pytest.mark.parametrize(("repeated", "drops"), [(0, True), (3, False)])
def test_the_last_item_stays_where_training_repeats_it(repeated: int, drops: bool) -> None:
    """yoochoose logs 16% immediate repeats: without the last item 13 points of HR@20 are gone."""
    train = sequences([[1, 2, 3], [2, *[4] * repeated, 3], [1, 3]])

    assert SessionNeighbours(train, NUM_ITEMS).drops_last is drops


def test_sessions_that_ended_last_are_the_newest() -> None:
    """With times, recency is the time of the last click, not the order of the starts."""
    early = sequences([[0, 1], [0, 2]])._replace(time_P=np.array([1, 9, 2, 3]))
    options = Neighbourhood(recent=1, drop_last="yes")

    scores = SessionNeighbours(early, NUM_ITEMS, options).scores(sequences([[0, 1]]), np.array([1]))

    assert np.flatnonzero(np.isfinite(scores[0])).tolist() == [1]


def test_long_sessions_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users with hundreds of items would need gigabytes at once; the scores are the same."""
    train, held = sequences([[0, 1, 2], [1, 2, 3], [3, 4]]), sequences([[1, 2, 3, 4]])
    at = np.array([1, 2, 3])
    whole = SessionNeighbours(train, NUM_ITEMS).scores(held, at)

    monkeypatch.setattr(neighbours, "ENTRIES_MAX", 1)

    assert np.array_equal(SessionNeighbours(train, NUM_ITEMS).scores(held, at), whole)
