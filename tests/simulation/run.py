"""Run seeds of the simulation; the last line is one JSON object.

    python -m tests.simulation.run --seeds 1000 --first 1 --jobs 2
    python -m tests.simulation.run --seeds 1 --first 4711 --trace

A seed that fails is run again with fewer and fewer faults, clicks and changes; the shortest plan
that still fails is shown with its trace, one line a step.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tests.simulation.plan import Plan, make_plan
from tests.simulation.releases import Releases
from tests.simulation.shrink import shrink
from tests.simulation.world import simulate

BATCH_SEEDS = 200
SHOWN_MAX = 3
"""Failing seeds that are made shorter and shown; the others are only named."""


class Tally(NamedTuple):
    """What some seeds came to."""

    seeds: int
    faults: int
    wrong: dict[int, list[str]]
    """Failing seeds, and what was wrong."""


def run_seeds(
    first: int,
    num: int,
    releases: Releases,
    *,
    stop_at: int | None = None,
    kinds: Sequence[str] = (),
) -> Tally:
    """Run seeds one after the other, at most until `stop_at` of them failed.

    Args:
        first: seed.
        num: of seeds.
        releases: to fold with.
        stop_at: so many failures are enough.
        kinds: of faults; all where empty.
    """
    faults, wrong, seed = 0, {}, first
    for seed in range(first, first + num):
        outcome = simulate(make_plan(seed, kinds), releases)
        faults += outcome.faults
        if outcome.wrong:
            wrong[seed] = outcome.wrong
            if len(wrong) == stop_at:
                break
    return Tally(seed + 1 - first, faults, wrong)


def report(seed: int, releases: Releases) -> str:
    """The shortest plan of a failing seed, and its trace."""
    plan = make_plan(seed)
    short = shrink(plan, lambda shorter: bool(simulate(shorter, releases).wrong))
    outcome = simulate(short, releases, tracing=True)
    return "\n".join(
        [
            f"seed {seed}: {len(short.faults)} of {len(plan.faults)} faults and "
            f"{len(short.appends)} of {len(plan.appends)} clicks are enough:",
            *(
                f"  {append.at_s:.3f} p{append.partition} {append.value!r}"
                for append in short.appends
            ),
            *outcome.trace,
            *(f"WRONG {words}" for words in outcome.wrong),
        ]
    )


def _batch(first: int, num: int, blend: bool) -> Tally:
    """One job's share, in a process of its own."""
    global _releases
    if _releases is None:
        folder = Path(tempfile.mkdtemp(prefix="afterclick-simulation-"))
        _releases = Releases(folder, blend=blend)
    return run_seeds(first, num, _releases)


_releases: Releases | None = None


def _tallies(first: int, num: int, jobs: int, blend: bool) -> Iterator[Tally]:
    ranges = [
        (at, min(BATCH_SEEDS, first + num - at), blend)
        for at in range(first, first + num, BATCH_SEEDS)
    ]
    if jobs == 1:
        for share in ranges:
            yield _batch(*share)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(_batch, *share) for share in ranges]):
            yield done.result()


def main() -> int:
    """Run seeds; exit code 1 when one ended wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="show what the first seed does")
    parser.add_argument("--blend", action="store_true", help="releases have a blend")
    options = parser.parse_args()
    say: Callable[[str], object] = lambda text: sys.stdout.write(text + "\n")  # noqa: E731
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="afterclick-simulation-") as folder:
        if options.trace:
            plan: Plan = make_plan(options.first)
            outcome = simulate(plan, Releases(Path(folder), blend=options.blend), tracing=True)
            say("\n".join(outcome.trace))
        seeds = faults = 0
        wrong: dict[int, list[str]] = {}
        for tally in _tallies(options.first, options.seeds, options.jobs, options.blend):
            seeds, faults = seeds + tally.seeds, faults + tally.faults
            wrong |= tally.wrong
            for seed, words in tally.wrong.items():
                say(f"seed {seed}: {words[0]}")
            if seeds % 10_000 < BATCH_SEEDS:
                sys.stderr.write(f"{seeds} seeds, {len(wrong)} wrong\n")
        seconds = round(time.monotonic() - begun_s, 1)
        if wrong:
            releases = Releases(Path(folder) / "again", blend=options.blend)
            for seed in sorted(wrong)[:SHOWN_MAX]:
                say(report(seed, releases))
    say(json.dumps({"seeds": seeds, "faults": faults, "wrong": len(wrong), "seconds": seconds}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
