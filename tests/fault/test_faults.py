"""Everything broken on purpose under load, and then: state == replay(log), lists too.

The first runs in `make test`, on tansu; the others, on Kafka 4, in `make test-fault`.
"""

import sys
from pathlib import Path

import pytest

from tests.fault import faults
from tests.fault.chaos import Outcome, run
from tests.fault.schedule import schedule

QUICK = (
    faults.worker_killed_script_late,
    faults.worker_frozen,
    faults.worker_stopped,
    faults.broker_frozen,
    faults.redis_without_power,
    faults.redis_failed_over,
    faults.redis_split,
    faults.redis_cut,
)
"""One of each sort, within three minutes on two busy cores."""


def check(outcome: Outcome) -> None:
    assert outcome.first_difference is None
    assert (outcome.lost, outcome.doubled, outcome.mistold, outcome.letters_missing) == (0, 0, 0, 0)
    assert (outcome.differences, outcome.unsure) == (0, 0)
    assert outcome.lists > 0
    assert outcome.exits == [], "no fault may end a worker that it does not kill"
    assert outcome.unready == []
    assert outcome.redis_lost_writes > 0, "Redis lost nothing that it had acknowledged"


@pytest.mark.service
@pytest.mark.timeout(280)
def test_faults_of_each_sort_change_no_state_and_no_list(tmp_path: Path) -> None:
    """Two workers, releases swapped and rolled back meanwhile, items and bad records in between."""
    steps = schedule(QUICK, len(QUICK), seed=7)
    check(run(tmp_path, steps, seed=7, kafka=False, num_workers=2, tell=sys.stderr.write))


@pytest.mark.kafka
@pytest.mark.fault
@pytest.mark.timeout(420)
def test_every_kind_of_fault_on_kafka_changes_no_state_and_no_list(tmp_path: Path) -> None:
    """The broker's own death, and a network cut between one worker and Kafka, need a real Kafka."""
    kinds = faults.EVERYWHERE + faults.ON_KAFKA
    steps = schedule(kinds, len(kinds), seed=1)
    check(run(tmp_path, steps, seed=1, kafka=True, num_workers=2, tell=sys.stderr.write))


@pytest.mark.kafka
@pytest.mark.fault
@pytest.mark.timeout(300)
def test_failovers_in_a_row_that_lose_acknowledged_writes_change_nothing(tmp_path: Path) -> None:
    """Head and records go back together, whoever holds the partition; three workers, so that some
    keep what others must fold again.
    """
    steps = schedule(faults.LOSES_WRITES, 6, seed=2)
    outcome = run(tmp_path, steps, seed=2, kafka=True, num_workers=3, tell=sys.stderr.write)
    check(outcome)
    assert outcome.redis_lost_writes >= 4  # two failovers and two splits always lose some
