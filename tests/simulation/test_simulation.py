"""Whatever goes wrong in between, what stands in Redis at the end is the fold of the log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.plan import FAULTS, make_plan
from tests.simulation.releases import Releases
from tests.simulation.run import report, run_seeds
from tests.simulation.shrink import shrink
from tests.simulation.test_mutations import MUTATIONS
from tests.simulation.world import simulate

SEEDS = 250
BLEND_SEEDS = 40


def test_every_record_and_list_is_the_fold_of_the_log(exported_releases: Releases) -> None:
    """Exactly once in effect, with the graphs of the trainer's own export."""
    tally = run_seeds(1, SEEDS, exported_releases)
    assert tally.seeds == SEEDS
    assert not tally.wrong, report(min(tally.wrong), exported_releases)


def test_every_list_of_a_blend_is_what_its_signals_offset_says(blend_releases: Releases) -> None:
    """Each worker hears the others in its own time; what a list rests on, it names."""
    tally = run_seeds(1, BLEND_SEEDS, blend_releases)
    assert not tally.wrong, report(min(tally.wrong), blend_releases)


def test_every_kind_of_fault_strikes() -> None:
    """A kind that no seed draws proves nothing."""
    struck = {fault.kind for seed in range(1, SEEDS) for fault in make_plan(seed).faults}
    assert struck == set(FAULTS)


def test_a_seed_is_the_same_run_in_every_process(tiny_releases: Releases) -> None:
    """A failing seed is of use only where it fails again; hashing of strings must not matter."""
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-m", "tests.simulation.run", "--seeds", "1", "--first", "3", "--trace"]
    traces = [
        subprocess.run(
            argv,
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[:-1]
        for salt in ("1", "2")
    ]
    assert traces[0] == traces[1]
    assert len(traces[0]) > 50


def test_a_failing_plan_is_made_shorter_and_fails_still(
    tiny_releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads a trace of a dozen faults and forty clicks."""
    MUTATIONS["compare-and-set"][0](monkeypatch)
    (seed,) = run_seeds(1, 100, tiny_releases, stop_at=1).wrong
    plan = make_plan(seed)
    short = shrink(plan, lambda shorter: bool(simulate(shorter, tiny_releases).wrong))
    assert simulate(short, tiny_releases).wrong
    assert len(short.faults) <= 3
    assert len(short.appends) < len(plan.appends)
