"""Metrics against definitions written as loops, and laws that hold whatever the lists are."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.training.metrics import (
    CUTOFFS,
    MISS,
    NOTHING,
    coverage,
    diversity,
    figures,
    gini,
    intervals,
    novelty,
    rates,
)

ranks = st.lists(st.one_of(st.integers(1, 40), st.just(MISS)), min_size=1, max_size=30)
NUM_ITEMS = 12
lists_of_items = st.lists(
    st.lists(st.integers(0, NUM_ITEMS - 1), min_size=0, max_size=5, unique=True),
    min_size=1,
    max_size=8,
)


def padded(lists: list[list[int]]) -> Any:
    return np.array([own + [NOTHING] * (5 - len(own)) for own in lists], np.int64)


@given(ranks)
@settings(max_examples=40, deadline=None)
def test_rates_are_what_their_definitions_say(rank: list[int]) -> None:
    """One relevant item: every metric follows from its textbook formula."""
    found = rates(np.array(rank))

    for k in CUTOFFS:
        relevant = [[place == own for place in range(1, k + 1)] for own in rank]
        hits = [sum(own) for own in relevant]
        dcg = [
            sum(rel / math.log2(place + 1) for place, rel in enumerate(own, 1)) for own in relevant
        ]
        precision = [hit / k for hit in hits]
        f1 = [2 * p * hit / (p + hit) if hit else 0 for p, hit in zip(precision, hits, strict=True)]
        reciprocal = [1 / own if own <= k else 0 for own in rank]
        for name, values in (
            ("hit_rate", hits),
            ("mrr", reciprocal),
            ("ndcg", dcg),
            ("precision", precision),
            ("f1", f1),
        ):
            assert found[f"{name}_{k}"] == pytest.approx(sum(values) / len(values)), (name, k)


@given(ranks)
@settings(max_examples=40, deadline=None)
def test_hit_rate_bounds_ndcg_and_ndcg_bounds_mrr(rank: list[int]) -> None:
    """1 ≥ 1 / log2(1 + rank) ≥ 1 / rank: a table that breaks this was added up wrongly."""
    found = rates(np.array(rank))

    for k in CUTOFFS:
        assert 1 >= found[f"hit_rate_{k}"] >= found[f"ndcg_{k}"] >= found[f"mrr_{k}"] >= 0
    for name in ("hit_rate", "mrr", "ndcg"):
        values = [found[f"{name}_{k}"] for k in CUTOFFS]
        assert values == sorted(values), "a longer list never has less"


def test_perfect_lists_have_one_everywhere() -> None:
    """The target on top of every list."""
    found = rates(np.ones(7, np.int64))

    assert {found[f"{name}_{k}"] for name in ("hit_rate", "mrr", "ndcg") for k in CUTOFFS} == {1.0}
    assert found["precision_20"] == pytest.approx(1 / 20)


def test_no_prediction_gives_zeros() -> None:
    """A validation part of single clicks is empty, not an error."""
    nothing = np.zeros(0, np.int64)

    assert set(rates(nothing).values()) == {0.0}
    assert intervals(nothing, nothing, seed=0)["mrr_20"] == (0.0, 0.0)


@given(lists_of_items)
@settings(max_examples=40, deadline=None)
def test_coverage_and_novelty_are_counts(lists: list[list[int]]) -> None:
    """Items shown at all, and their mean surprise in bits."""
    clicks = np.arange(NUM_ITEMS, dtype=np.float64)
    shown = [item for own in lists for item in own]

    assert coverage(padded(lists), NUM_ITEMS) == len(set(shown)) / NUM_ITEMS
    bits = [-math.log2((item + 1) / (clicks.sum() + NUM_ITEMS)) for item in shown]
    mean = sum(bits) / len(bits) if bits else 0.0
    assert novelty(padded(lists), clicks) == pytest.approx(mean)


@given(lists_of_items)
@settings(max_examples=40, deadline=None)
def test_gini_is_half_the_relative_mean_difference(lists: list[list[int]]) -> None:
    """Its definition over all pairs of items."""
    count = np.bincount([item for own in lists for item in own], minlength=NUM_ITEMS)
    differences = sum(abs(int(a) - int(b)) for a in count for b in count)
    expected = differences / (2 * NUM_ITEMS * count.sum()) if count.sum() else 0.0

    assert gini(padded(lists), NUM_ITEMS) == pytest.approx(expected)


def test_gini_of_uniform_lists_is_zero_and_of_one_item_is_nearly_one() -> None:
    """Both ends of its range."""
    assert gini(np.arange(10)[:, None], 10) == 0
    assert gini(np.zeros((50, 1), np.int64), 10) == pytest.approx(0.9)


@given(lists_of_items, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_diversity_is_one_less_the_mean_cosine_of_pairs(lists: list[list[int]], seed: int) -> None:
    """The sum over pairs is computed from the sum of vectors: check it pair by pair."""
    vectors = np.random.default_rng(seed).standard_normal((NUM_ITEMS, 3))
    vectors[0] = 0  # an item without a vector is like no other
    length = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    values = []
    for own in lists:
        cosines = [
            float(vectors[a] @ vectors[b]) / (length[a] * length[b])
            for a, b in combinations(own, 2)
        ]
        if cosines:
            values.append(1 - sum(cosines) / len(cosines))
    expected = sum(values) / len(values) if values else 0.0

    assert diversity(padded(lists), vectors) == pytest.approx(expected, abs=1e-9)


def test_lists_of_one_thing_have_no_diversity() -> None:
    """Equal vectors: cosine 1."""
    assert diversity(np.array([[0, 1, 2]]), np.ones((3, 4))) == pytest.approx(0, abs=1e-12)


@given(ranks, st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_an_interval_holds_the_rate_and_repeats_with_its_seed(
    rank: list[int], num_groups: int, seed: int
) -> None:
    """The whole sample is the middle of its resamples, up to their noise; seeds decide it."""
    rank_X = np.array(rank)
    group_X = np.arange(len(rank)) % num_groups
    found = intervals(rank_X, group_X, seed=seed, resamples=50)

    assert found == intervals(rank_X, group_X, seed=seed, resamples=50)
    for name, (low, high) in found.items():
        assert 0 <= low <= high <= 1
        values = figures(rank_X)[name]
        group_means = [values[group_X == group].mean() for group in np.unique(group_X)]
        assert min(group_means) - 1e-12 <= low
        assert high <= max(group_means) + 1e-12


def test_intervals_resample_groups_not_predictions() -> None:
    """Ten equal predictions of one user say no more than one: the interval must not shrink."""
    rng = np.random.default_rng(0)
    rank_X = np.where(rng.random(100) < 0.5, 1, MISS)
    once = intervals(rank_X, np.arange(100), seed=1)["hit_rate_20"]
    tenfold = intervals(np.repeat(rank_X, 10), np.repeat(np.arange(100), 10), seed=1)["hit_rate_20"]

    assert tenfold == pytest.approx(once)
    # Half the width of a 95% interval of a share near one half: 1.96 * sqrt(0.25 / 100) = 0.098.
    assert once[1] - once[0] == pytest.approx(2 * 0.098, rel=0.15)
