"""Kill workers with SIGKILL under load, some while a script is in flight, and compare with a
replay.

Run as a script (`make chaos FAULTS=20`) it ends with one JSON line; tests/fault/test_kill.py runs a
few.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import redis

from afterclick.streams.admin import create_topics
from afterclick.streams.local import local_broker, local_kafka, local_redis
from afterclick.streams.settings import StreamsSettings
from tests.service.stage import Stage, some_clicks

CLICKS_PER_BURST = 25
BURST_EVERY_S = 0.05
"""500 clicks a second: the worker folds all the time, and two cores still run broker and Redis."""

PAUSE_MS = 1500
"""Redis holds all writes for so long, so that a script is in flight when the worker dies."""


class Outcome(NamedTuple):
    """What a run came to."""

    faults: int
    with_script_in_flight: int
    clicks: int
    lost: int
    doubled: int
    differences: int
    first_difference: str | None
    recovery_s: list[float]


def kill_under_load(stage: Stage, kills: int, *, seed: int, num_workers: int = 2) -> Outcome:
    """Kill a worker `kills` times while clicks keep coming; each is replaced at once.

    The recovery time of a kill ends when everything that was in the log at the kill is folded.
    """
    rng = random.Random(seed)
    stage.publish("r1", seed=1)
    server = redis.Redis.from_url(stage.serving.redis)
    done = threading.Event()
    sent = [0]

    def load() -> None:
        while not done.is_set():
            stage.send(some_clicks(CLICKS_PER_BURST, users=200, start=sent[0]))
            sent[0] += CLICKS_PER_BURST
            done.wait(BURST_EVERY_S)

    recovery_s: list[float] = []
    in_flight = 0
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(stage.worker()) for _ in range(num_workers)]
        sender = threading.Thread(target=load)
        sender.start()
        try:
            for number in range(kills):
                if number == kills // 2:
                    stage.publish("r2", seed=2)
                time.sleep(rng.uniform(0.2, 1.5))
                if number % 2:
                    # Reads go on, writes wait: each worker comes to stand before its script.
                    server.client_pause(PAUSE_MS, all=False)
                    time.sleep(rng.uniform(0.2, 0.6))
                    in_flight += server.info("clients")["blocked_clients"] > 0
                victim = rng.randrange(len(workers))
                killed_s = time.monotonic()
                workers[victim].process.kill()
                ends = stage.ends()
                workers[victim] = stack.enter_context(stage.worker())
                stage.wait(
                    lambda goal=ends: all(stage.heads()[p] >= end for p, end in goal.items()),
                    "the log as of the kill is folded",
                    timeout_s=120,
                )
                recovery_s.append(round(time.monotonic() - killed_s, 2))
        finally:
            done.set()
            sender.join()
        stage.wait_folded()
    report = stage.verify()
    server.close()
    return Outcome(
        kills,
        in_flight,
        sent[0],
        max(report.lost, sent[0] - report.clicks),
        report.doubled,
        report.differences,
        report.first_difference,
        recovery_s,
    )


def main() -> int:
    """Run on servers of its own and print one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broker", choices=("tansu", "kafka"), default="tansu")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="afterclick-chaos-")))
        run_broker = local_kafka if options.broker == "kafka" else local_broker
        broker = stack.enter_context(run_broker(folder / "broker"))
        server = stack.enter_context(local_redis(folder / "redis"))
        name = uuid.uuid4().hex[:8]
        streams = StreamsSettings(
            broker=broker.address,
            clicks_topic=f"clicks-{name}",
            items_topic=f"items-{name}",
            group=f"group-{name}",
        )
        create_topics(streams, partitions=4, replication=1)
        stage = Stage(streams, server.url, f"chaos-{name}", folder)
        outcome = kill_under_load(stage, options.faults, seed=options.seed)
        stage.close()
    sys.stdout.write(
        json.dumps(
            {
                "faults": outcome.faults,
                "with_script_in_flight": outcome.with_script_in_flight,
                "clicks": outcome.clicks,
                "lost": outcome.lost,
                "doubled": outcome.doubled,
                "differences": outcome.differences,
                "first_difference": outcome.first_difference,
                "recovery_s_median": sorted(outcome.recovery_s)[len(outcome.recovery_s) // 2],
                "recovery_s_max": max(outcome.recovery_s),
            }
        )
        + "\n"
    )
    return 1 if outcome.lost or outcome.doubled or outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
