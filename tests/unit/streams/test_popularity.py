"""Decayed popularity: integers, one clock, and a summary that another thread may take."""

import random
import threading

from afterclick.streams.popularity import BUCKET_MS, HALF_LIVES, WEIGHT_NOW, Popularity


def anything(_item: str) -> bool:
    return True


def test_counts_halve_with_every_half_life_and_ties_go_by_item_id() -> None:
    """One hour as half-life: a click of the hour before weighs half."""
    popularity = Popularity(half_life_s=3600, items_max=100)
    for item, hour in (("b", 0), ("b", 0), ("a", 1), ("c", 1)):
        popularity.add(item, hour * BUCKET_MS)
    assert popularity.top(3, available=anything) == [
        ("a", WEIGHT_NOW),
        ("b", WEIGHT_NOW),
        ("c", WEIGHT_NOW),
    ]
    assert popularity.top(9, available=lambda item: item != "a", drop={"c"}) == [("b", WEIGHT_NOW)]


def test_what_a_former_worker_counted_gives_the_same_scores() -> None:
    """A restart must not change the order: sums are integers, whatever the order of the hours."""
    rng = random.Random(1)
    first = Popularity(half_life_s=7200, items_max=50)
    hours: dict[int, dict[str, int]] = {}
    at_ms = 0
    for _ in range(3000):
        at_ms += rng.randrange(2 * BUCKET_MS // 100)
        item = f"i{rng.randrange(80)}"
        hour = first.add(item, at_ms - rng.choice([0, 0, BUCKET_MS, 40 * BUCKET_MS]))
        if hour is not None:
            counts = hours.setdefault(hour, {})
            counts[item] = counts.get(item, 0) + 1
    second = Popularity(half_life_s=7200, items_max=50)
    kept = second.buckets(first.watermark_ms)
    second.load(first.watermark_ms, {h: c for h, c in reversed(hours.items()) if h in kept})
    assert second.top(80, available=anything) == first.top(80, available=anything)
    assert len(kept) == 2 * HALF_LIVES


def test_a_summary_may_be_taken_while_clicks_are_counted() -> None:
    """The fallback list is renewed beside the fold; a walk over a growing dict ended the worker."""
    popularity = Popularity(half_life_s=3600, items_max=10**6)

    def count() -> None:
        for number in range(30_000):
            popularity.add(f"i{number}", 1000)

    counting = threading.Thread(target=count)
    counting.start()
    taken = 0
    while counting.is_alive() and taken < 10_000:
        assert len(popularity.summary(20, available=anything)) <= 20
        taken += 1
    counting.join()
    assert taken
