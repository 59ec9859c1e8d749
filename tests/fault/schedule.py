"""Which fault comes when: a pure function of a seed.

Every kind comes about equally often, in random order, whole decks of them shuffled one after the
other. Some faults strike into the recovery from the one before; releases are published and rolled
back in between.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from tests.fault.faults import Fault

STORM_SHARE = 0.25
"""Share of faults that do not wait until the one before is recovered from."""

STEPS_PER_PUBLICATION = 3


class Step(NamedTuple):
    """One fault of a schedule."""

    fault: Fault
    pause_s: float
    """Time before it strikes."""
    storm: bool
    """It strikes into the recovery from the one before."""
    publication: int
    """0: none. Else a new release of this number is published just before; negative: the one before
    that is published again.
    """
    seed: int
    """Of the fault's own draws, so that they don't depend on what other faults drew."""


def schedule(kinds: Sequence[Fault], num_faults: int, *, seed: int) -> list[Step]:
    """The faults of a run."""
    rng = random.Random(seed)
    deck: list[Fault] = []
    steps: list[Step] = []
    releases = 1
    for number in range(num_faults):
        if not deck:
            deck = list(kinds)
            rng.shuffle(deck)
        publication = 0
        if number % STEPS_PER_PUBLICATION == STEPS_PER_PUBLICATION - 1:
            roll_back = releases > 1 and rng.random() < 0.5
            releases += not roll_back
            publication = 1 - releases if roll_back else releases
        storm = number > 0 and rng.random() < STORM_SHARE
        pause_s = rng.uniform(0.0, 3.0) if storm else rng.uniform(0.5, 1.5)
        steps.append(Step(deck.pop(), pause_s, storm, publication, rng.randrange(1 << 30)))
    return steps
