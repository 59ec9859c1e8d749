"""kill -9 in mid-stream: state == replay(log)."""

import pytest

from tests.fault.kills import kill_under_load
from tests.service.stage import Stage

pytestmark = pytest.mark.service


@pytest.mark.timeout(240)
def test_killed_workers_lose_nothing_and_apply_nothing_twice(stage: Stage) -> None:
    """Two workers, three kills, one with a script in flight, a release swapped meanwhile."""
    outcome = kill_under_load(stage, 3, seed=7)
    assert outcome.first_difference is None
    assert (outcome.lost, outcome.doubled, outcome.differences) == (0, 0, 0)
    assert outcome.clicks > 0
