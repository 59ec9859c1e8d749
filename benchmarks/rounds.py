"""What a round costs by its size: `python -m benchmarks.rounds`.

Chunks of four partitions, folded into a Redis of their own by production's code, without Kafka:
all together as a worker folds what waits, and each on its own as it would without rounds. CPU of
this process, all threads; caches are as warm as a worker's under load. Prints a table and one JSON
line.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from afterclick.serving.keys import Keys, partition_of
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.serving.store import Store
from afterclick.streams.events import Click, encode
from afterclick.streams.fold import fold
from afterclick.streams.local import local_redis
from afterclick.streams.lockstep import in_step
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges, Record
from benchmarks.report import machine
from tests.tiny_release import write_tiny_release

PARTITIONS, USERS, ITEMS, UNITS = 4, 20_000, 20_000, 128
SIZES = (1, 4, 16, 64, 256)
WARM_UP = 100
"""Rounds of the largest size before anything is timed: most users have a record then."""
CLICKS_TIMED = 2_000
"""Of each size; at least 20 rounds, at most 200."""


class Clicks:
    """An endless log of all partitions, cut into chunks."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._next = [0] * PARTITIONS
        self._now_ms = 1_700_000_000_000

    def chunks(self, num: int) -> list[tuple[int, Chunk]]:
        """The next clicks, by partition."""
        found: dict[int, list[Record]] = {}
        for _ in range(num):
            self._now_ms += 1
            user = f"u{self._rng.randrange(USERS)}"
            item = f"i{int(self._rng.paretovariate(0.4)) % ITEMS:05d}"
            click = Click(
                user_id=user, item_id=item, timestamp_ms=self._now_ms, event_id=f"e{self._now_ms}"
            )
            at = partition_of(user, PARTITIONS)
            found.setdefault(at, []).append(Record(self._next[at], self._now_ms, *encode(click)))
            self._next[at] += 1
        return [
            (at, Chunk(own[0].offset, own[-1].offset + 1, own)) for at, own in sorted(found.items())
        ]


def folds(serving: Serving, settings: ServingSettings, store: Store) -> list[PartitionFold]:
    """One a partition, open."""

    def batches(partition: int) -> Iterator[str]:
        return (f"b{partition}-{n}" for n in itertools.count())

    made = [
        PartitionFold(
            partition,
            store,
            ListRules.of(settings),
            Limits(users_max=256, records_max=1024, bytes_max=1 << 20),
            serving=lambda: serving,
            dead_letters=lambda letters: None,
            log_start=lambda: 0,
            batch_ids=batches(partition),
        )
        for partition in range(PARTITIONS)
    ]
    for own in made:
        own.open(LogEdges("t", 0, 1 << 60), lambda offset: None)
    return made


def cpu_us(work: Callable[[], Any]) -> float:
    """Of all threads of this process."""
    begun_s = time.process_time()
    work()
    return (time.process_time() - begun_s) * 1e6


def measure(folder: Path, *, threads: int, seed: int) -> dict[str, Any]:
    """Median CPU µs of a round, by clicks: together and apart."""
    with local_redis(folder / "redis") as server:
        settings = ServingSettings(
            redis=server.url, releases=str(folder / "releases"), provider="cpu", threads=threads
        )
        releases = ReleaseStore(settings.releases)
        staged = releases.staging("random")
        write_tiny_release(staged, num_items=ITEMS, units=UNITS, seed=seed)
        releases.add(staged)
        publication = releases.publish("random")
        loaded = LoadedRelease(publication, releases.fetch("random"), settings)
        serving = Serving(
            publication.number, publication.release, publication.sha256, loaded, loaded.catalog
        )
        store = Store(server.url, Keys("rounds"), record_ttl_s=86_400, popularity_ttl_s=86_400)
        own, clicks = folds(serving, settings, store), Clicks(seed)

        def run(chunks: Sequence[tuple[int, Chunk]]) -> None:
            steps = [own[at].processing(chunk) for at, chunk in chunks]
            for moved in in_step(steps, store, fold):
                if isinstance(moved, Exception):
                    raise moved

        for _ in range(WARM_UP):
            run(clicks.chunks(SIZES[-1]))
        together, apart = {}, {}
        for size in SIZES:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(max(20, min(200, CLICKS_TIMED // size))):
                chunks = clicks.chunks(size)
                times[0].append(cpu_us(lambda chunks=chunks: run(chunks)))
                chunks = clicks.chunks(size)
                times[1].append(cpu_us(lambda chunks=chunks: [run([one]) for one in chunks]))
            together[size], apart[size] = (round(statistics.median(own)) for own in times)
        store.close()
    return {"together_us": together, "apart_us": apart}


def main(argv: Sequence[str] | None = None) -> int:
    """CPU µs of a round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounds", description=main.__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of one call of a graph")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args(argv)
    name, words = machine("")
    print(f"machine: {words}")
    with tempfile.TemporaryDirectory(prefix="afterclick-rounds-") as folder:
        result = measure(Path(folder), threads=given.threads, seed=given.seed)
    print("| clicks | CPU µs, one round | a click | chunks apart | a click |")
    print("|---|---|---|---|---|")
    for size in SIZES:
        one, other = result["together_us"][size], result["apart_us"][size]
        print(f"| {size} | {one} | {one / size:.0f} | {other} | {other / size:.0f} |")
    print(msgspec.json.encode({"machine": name, **result}).decode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
