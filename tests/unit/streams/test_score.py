"""Online ranks equal what sorting everything anew would give."""

import random
from collections import Counter

import pytest

from afterclick.streams.score import MISS, K, Markov, Popularity, Score, Tally

WINDOW_MS = 100


def stream(seed: int, num: int) -> list[tuple[str, str, int]]:
    """Users, items and times, skewed so that ties and expiries abound."""
    rng = random.Random(seed)
    times = sorted(rng.randrange(600) for _ in range(num))
    return [
        (f"u{rng.randrange(5)}", f"i{int(30 * rng.random() ** 3)}", time_ms) for time_ms in times
    ]


@pytest.mark.parametrize("seed", range(5))
def test_popularity_ranks_as_a_full_count_of_the_window(seed):
    """The sorted counts are moved by one at each click; a slip would show as a wrong rank."""
    popularity, clicks = Popularity(WINDOW_MS), stream(seed, 400)
    for n, (_, item, time_ms) in enumerate(clicks):
        latest = clicks[n - 1][2] if n else 0
        counts = Counter(i for _, i, t in clicks[:n] if t > latest - WINDOW_MS)
        expected = sum(c >= counts[item] for c in counts.values()) if item in counts else MISS

        assert popularity.rank(item) == expected
        popularity.learn(item, time_ms)


@pytest.mark.parametrize("seed", range(5))
def test_markov_ranks_as_a_full_sort(seed):
    """Followers by (count, popularity), then all others by popularity; ties against us."""
    popularity = Popularity(10**9)
    markov, after, last, counts = Markov(popularity), {}, {}, Counter()
    for user, item, time_ms in stream(seed, 400):
        followers = after.get(last.get(user), Counter())
        keys = {other: (followers[other], counts[other]) for other in {*counts, *followers}}
        known = item in keys
        expected = sum(key >= keys[item] for key in keys.values()) if known else MISS

        assert markov.rank(user, item) == expected
        markov.learn(user, item)
        popularity.learn(item, time_ms)
        after.setdefault(last.get(user), Counter())[item] += user in last
        last[user] = item
        counts[item] += 1
        after = {name: Counter({k: c for k, c in f.items() if c}) for name, f in after.items()}


def test_rates_are_means_over_all_clicks():
    """A rank of 1, one of 4 and two misses: hits 2 of 4, reciprocals (1 + 1/4) / 4."""
    tally = Tally()
    for rank in (1, 4, K + 1, MISS):
        tally.add(rank)

    rates = tally.rates()

    assert (rates.clicks, rates.hit_rate_20, rates.mrr_20) == (4, 0.5, 0.3125)


def test_a_click_is_ranked_before_it_is_learnt():
    """Otherwise every first click on an item would be a hit of the popularity."""
    score = Score()

    assert score.observe("u", "a", 1, []) == MISS
    assert score.observe("u", "a", 2, ["b", "a"]) == 2

    rates = score.rates()
    assert rates["popularity"].hit_rate_20 == 0.5
    assert rates["lists"].mrr_20 == 0.25


def test_the_standing_list_counts_to_place_20_only():
    """A reader asked for more shows no more hits."""
    score = Score()

    assert score.observe("u", "last", 1, [f"i{n}" for n in range(K - 1)] + ["last"]) == K
    assert score.observe("u", "last", 2, [f"i{n}" for n in range(K)] + ["last"]) == MISS


def test_learning_the_past_scores_nothing():
    """The past fills the counters; only live clicks are judged."""
    score = Score()
    for time_ms in range(3):
        score.learn("u", "a", time_ms)

    assert score.rates()["markov"].clicks == 0
    score.observe("u", "a", 4, [])
    assert score.rates()["markov"].hit_rate_20 == 1.0
