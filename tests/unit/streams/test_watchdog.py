"""When standing still is a stop, and when it is not."""

import pytest

from afterclick.streams.watchdog import Look, Watchdog

STALL_S = 60.0


def after(looks: list[Look], *, every_s: float = 5.0) -> dict[int, float]:
    """What is stalled once partition 0 was seen like this, one look after the other."""
    watchdog = Watchdog(STALL_S)
    stalled: dict[int, float] = {}
    for number, look in enumerate(looks):
        stalled = watchdog.observe(1000.0 + number * every_s, {0: look})
    return stalled


def test_records_that_wait_while_nothing_moves_are_a_stop() -> None:
    """Exactly at the limit, not a look earlier: the setting is a promise to operators."""
    standing = Look(position=7, waiting=True, foldable=True)

    assert after([standing] * 12) == {}
    assert after([standing] * 13) == {0: 60.0}


@pytest.mark.parametrize(
    "between",
    [
        Look(position=8, waiting=True, foldable=True),
        Look(position=6, waiting=True, foldable=True),
        Look(position=7, waiting=False, foldable=True),
        Look(position=7, waiting=True, foldable=False),
    ],
    ids=["moved on", "read again", "nothing waits", "Redis away"],
)
def test_anything_that_explains_it_starts_the_time_anew(between: Look) -> None:
    """A slow partition, an idle one and one that waits for Redis must not restart the process."""
    standing = Look(position=7, waiting=True, foldable=True)

    assert after([standing] * 12 + [between] + [standing] * 12) == {}


def test_an_idle_partition_is_never_a_stop() -> None:
    """Neither is one whose log ends in transaction markers, which no head can pass."""
    assert after([Look(position=7, waiting=False, foldable=True)] * 100) == {}


def test_a_partition_that_left_and_came_back_starts_anew() -> None:
    """Elsewhere it was folded by another worker, whatever this one saw before."""
    watchdog = Watchdog(STALL_S)
    standing = Look(position=7, waiting=True, foldable=True)

    watchdog.observe(0.0, {0: standing, 1: standing})
    watchdog.observe(30.0, {1: standing})
    watchdog.observe(40.0, {0: standing, 1: standing})

    assert watchdog.observe(61.0, {0: standing, 1: standing}) == {1: 61.0}
    assert watchdog.stalled == {1: 61.0}


def test_only_partitions_that_did_not_move_need_the_log_asked() -> None:
    """Asking costs a fetch; under load nobody stands still."""
    watchdog = Watchdog(STALL_S)

    assert watchdog.unmoved({0: 7, 1: 9}) == {}
    watchdog.observe(0.0, {0: Look(7, False, True), 1: Look(8, False, True)})
    assert watchdog.unmoved({0: 7, 1: 9}) == {0: 7}
