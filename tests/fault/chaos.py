"""Break everything on a seeded schedule, under load, and compare with a replay of the log.

`make chaos FAULTS=20 [BROKER=kafka] [SEED=1] [WORKERS=2]` ends with one JSON line; the tests of
this folder run short schedules of the same.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tests.fault.deployment import Deployment, deployment
from tests.fault.faults import EVERYWHERE, ON_KAFKA, Fault
from tests.fault.schedule import Step, schedule
from tests.fault.watch import Mark
from tests.service.stage import Stage
from tests.service.told import absorbed, counted, num_waiting

RECOVERY_TIMEOUT_S = 180.0
"""Something that takes longer hangs; two cores may be busy with other things."""

READY_TIMEOUT_S = 60.0
"""When all is folded, workers may still be joining."""

Tell = Callable[[str], object]


class Outcome(msgspec.Struct, kw_only=True):
    """What a run came to."""

    faults: int
    by_kind: dict[str, int]
    seed: int
    broker: str
    workers: int
    clicks: int
    lost: int
    doubled: int
    differences: int
    first_difference: str | None
    lists: int
    """Compared with what the replay says."""
    unsure: int
    """Users not compared, which nothing here is a reason for."""
    mistold: int
    """Moves that topic `signals` lacks, or brings its readers more often than the log has them."""
    letters_missing: int
    """Bad records without a dead letter; below 0, good ones with one."""
    publications: int
    scripts_held: int
    """Workers that died with a script on its way, or its answer."""
    redis_lost_writes: int
    """Failovers and power cuts after which the heads had gone back."""
    records_taken_back: int
    """By these, altogether: folded, acknowledged by Redis, and folded again."""
    exits: list[str]
    """Workers that ended by themselves or failed liveness, and what they said. In a storm one may:
    Faust gives up where Kafka vanishes in the second after the worker's own checks.
    """
    unready: list[str]
    """What /readyz said of workers that were not ready at the end."""
    recovery_s_median: float
    recovery_s_max: float
    recovery_s: dict[str, list[float]]
    """By kind, without those that another fault struck into."""
    stood_s_max: float
    """Longest time that a partition's lists stood still, the fault itself included."""
    stood_s: dict[str, list[float]]
    """By kind, as `recovery_s`."""
    seconds: float

    @property
    def wrong(self) -> int:
        """0 where every promise held."""
        return (
            self.lost + self.doubled + self.differences
            + self.unsure + self.mistold + abs(self.letters_missing)
        )  # fmt: skip


def run(
    folder: Path,
    steps: Sequence[Step],
    *,
    seed: int,
    kafka: bool,
    num_workers: int,
    tell: Tell,
    session_timeout_s: float = 6.0,
) -> Outcome:
    """Go through a schedule; everything is real and runs in `folder`."""
    begun_s = time.monotonic()
    recovery_s: dict[str, list[float]] = {}
    stood_s: dict[str, list[float]] = {}
    stood_s_max = 0.0

    def settle(name: str, mark: Mark, struck: int) -> None:
        nonlocal stood_s_max
        took_s = _recovered(all_of, name, mark)
        stood = all_of.watch.stood_s
        stood_s_max = max(stood_s_max, stood)
        if struck == 1:
            recovery_s.setdefault(name, []).append(round(took_s, 1))
            stood_s.setdefault(name, []).append(round(stood, 1))
        tell(f"   recovered in {took_s:.1f} s, stood still for {stood:.1f} s\n")
        # The others may have taken over while one still starts: striking then is a storm's part.
        _unready(all_of)
        all_of.watch.begin()

    with deployment(
        folder, kafka=kafka, num_workers=num_workers, session_timeout_s=session_timeout_s
    ) as all_of:
        published = 1
        last: tuple[str, Mark] | None = None
        struck = 0  # faults since the last recovery
        for number, step in enumerate(steps):
            name = step.fault.__name__
            if last is not None and not step.storm:
                settle(*last, struck)
                struck = 0
            all_of.pass_time(step.pause_s)
            if step.publication:
                _publish(all_of, step.publication)
                published += 1
            tell(f"{number + 1}: {name}{' (storm)' * step.storm}\n")
            last = (name, step.fault(all_of, random.Random(step.seed)))
            struck += 1
        if last is not None:
            settle(*last, struck)
        all_of.load.stop()
        _recovered(all_of, "the last click", all_of.watch.mark())
        unready = _unready(all_of)
        all_of.stage.wait_folded()
        tell("verifying\n")
        report = all_of.stage.verify()
        sent = all_of.load.clicks
        named = {
            (letter["afterclick.partition"], letter["afterclick.offset"])
            for letter in all_of.stage.dead_letters()
        }
        flat = sorted(s for times in recovery_s.values() for s in times)
        return Outcome(
            faults=len(steps),
            by_kind=dict(Counter(step.fault.__name__ for step in steps)),
            seed=seed,
            broker="kafka" if kafka else "tansu",
            workers=num_workers,
            clicks=sent,
            lost=max(report.lost, sent - report.clicks),
            doubled=max(report.doubled, report.clicks - sent),
            differences=report.differences,
            first_difference=report.first_difference,
            lists=report.lists,
            unsure=report.unsure,
            mistold=_mistold(all_of.stage),
            letters_missing=all_of.load.bad - len(named),
            publications=published,
            scripts_held=all_of.scripts_held,
            redis_lost_writes=sum(lost > 0 for lost in all_of.lost_by_redis),
            records_taken_back=sum(all_of.lost_by_redis),
            exits=all_of.exits,
            unready=unready,
            recovery_s_median=round(statistics.median(flat), 1) if flat else 0.0,
            recovery_s_max=flat[-1] if flat else 0.0,
            recovery_s=recovery_s,
            stood_s_max=round(stood_s_max, 1),
            stood_s=stood_s,
            seconds=round(time.monotonic() - begun_s, 1),
        )


def _recovered(all_of: Deployment, name: str, mark: Mark) -> float:
    until_s = mark.began_s + RECOVERY_TIMEOUT_S
    while not mark.reached.is_set():
        all_of.pass_time(0.05)
        if time.monotonic() > until_s:
            raise AssertionError(
                f"{name}: not recovered after {RECOVERY_TIMEOUT_S:.0f} s: folded to "
                f"{all_of.watch.heads}, expected {mark.goal}; workers: {all_of.unready()}; "
                f"ended by themselves: {all_of.exits}"
            )
    return mark.took_s


def _publish(all_of: Deployment, number: int) -> None:
    if number > 0:
        all_of.stage.publish(f"r{number}", seed=number, blend=number % 2 == 1)
    else:
        all_of.stage.releases.publish(f"r{-number}")


def _mistold(stage: Stage) -> int:
    stage.wait(lambda: num_waiting(stage) == 0, "all moves are told")
    heard, in_log = Counter(absorbed(stage)), Counter(counted(stage))
    return (heard - in_log).total() + (in_log - heard).total()


def _unready(all_of: Deployment) -> list[str]:
    until_s = time.monotonic() + READY_TIMEOUT_S
    while (said := all_of.unready()) and time.monotonic() < until_s:
        all_of.pass_time(0.2)
    return said


def main() -> int:
    """Break everything on a seeded schedule and print one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broker", choices=("tansu", "kafka"), default="tansu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--session-timeout", type=float, default=6.0, help="seconds (6)")
    parser.add_argument("--kinds", help="only these, comma between them")
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept")
    options = parser.parse_args()
    kafka = options.broker == "kafka"
    kinds: tuple[Fault, ...] = EVERYWHERE + ON_KAFKA * kafka
    if options.kinds:
        wanted = options.kinds.split(",")
        by_name = {kind.__name__: kind for kind in kinds}
        if unknown := [name for name in wanted if name not in by_name]:
            parser.error(f"unknown kinds {unknown}; expected some of {sorted(by_name)}")
        kinds = tuple(by_name[name] for name in wanted)
    steps = schedule(kinds, options.faults, seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="afterclick-chaos-") as temporary:
        outcome = run(
            options.keep or Path(temporary),
            steps,
            seed=options.seed,
            kafka=kafka,
            num_workers=options.workers,
            tell=sys.stderr.write,
            session_timeout_s=options.session_timeout,
        )
    line = msgspec.to_builtins(outcome) | {"load_average": round(os.getloadavg()[0], 1)}
    sys.stdout.write(json.dumps(line) + "\n")
    return 1 if outcome.wrong or outcome.unready else 0


if __name__ == "__main__":
    sys.exit(main())
