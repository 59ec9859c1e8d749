"""A seed is a run: what it found can be looked for again."""

from collections import Counter

from tests.fault.faults import EVERYWHERE, ON_KAFKA
from tests.fault.schedule import schedule

KINDS = EVERYWHERE + ON_KAFKA


def test_a_seed_gives_the_same_schedule_and_another_one_another() -> None:
    """Else a failure could not be repeated."""
    assert schedule(KINDS, 50, seed=1) == schedule(KINDS, 50, seed=1)
    assert schedule(KINDS, 50, seed=1) != schedule(KINDS, 50, seed=2)


def test_every_kind_comes_equally_often() -> None:
    """A kind that chance leaves out is a promise that nobody checked."""
    counts = Counter(step.fault for step in schedule(KINDS, 3 * len(KINDS), seed=3))
    assert set(counts) == set(KINDS)
    assert set(counts.values()) == {3}


def test_releases_are_published_and_rolled_back_in_between() -> None:
    """A swap in the middle of a fault is the hard case."""
    published = [s.publication for s in schedule(KINDS, 60, seed=4) if s.publication]
    assert any(number > 0 for number in published)
    assert any(number < 0 for number in published)
