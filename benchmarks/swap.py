"""What a swap of the release costs the clicks that come meanwhile: `python -m benchmarks.swap`.

The same live load twice on one worker, whose users all have a past: once in peace, once with
another release published every few seconds. Each swap loads and warms beside the running release,
rebuilds the users who click from their history, and renews the lists of those who do not. Prints
both histograms, and one JSON object as the last line.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afterclick.serving.releases import ReleaseStore
from afterclick.streams.local import Worker, local_worker
from afterclick.streams.verify import verify
from benchmarks import latency
from benchmarks.ground import Ground, Options, backlog, fill, ground, metrics_of
from benchmarks.report import machine, tell
from tests.tiny_release import write_tiny_release

BAR = 30
"""Signs of the longest bar."""
COUNTERS = ("swaps_total", "renewed_lists_total", "rebuilt_records_total", "put_off_lists_total")


def main(argv: Sequence[str] | None = None) -> int:
    """Latencies with and without swaps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=main.__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="clicks a second")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each measurement")
    parser.add_argument("--every", type=float, default=8.0, help="seconds between publications")
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    name_words = machine("")
    print(f"machine: {name_words[1]}")
    options = Options(users=given.users, items=given.items, clicks=given.users * 10)
    with (
        tempfile.TemporaryDirectory(prefix="afterclick-swap-") as name,
        ground(options, Path(name)) as stage,
    ):
        fill(stage, backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000))
        with local_worker(stage.worker_env, Path(name)) as worker:
            while stage.applied() < options.clicks:
                time.sleep(0.1)
            peace = latency.measure(stage, "peace", rate=given.rate, seconds=given.seconds)
            swapped = with_swaps(
                stage, worker, rate=given.rate, seconds=given.seconds, every_s=given.every
            )
        report = verify(stage.serving, stage.streams)
    result = {
        "machine": name_words[0],
        "rate": given.rate,
        "users": options.users,
        "items": options.items,
        "peace": peace,
        "swapped": swapped,
        "differences": report.differences,
        "first_difference": report.first_difference,
    }
    lines = table(peace, swapped)
    tell("swap", "swap", arguments, name_words, result, lines, report=given.report)
    return 1 if report.differences or peace["unseen"] or swapped["unseen"] else 0


def with_swaps(
    stage: Ground, worker: Worker, *, rate: float, seconds: float, every_s: float
) -> dict[str, Any]:
    """Latencies as `latency.measure` gives them, while two releases are put in force in turn; what
    the worker counted meanwhile is beside them.
    """
    _add_release(stage, "second", seed=stage.options.seed + 1)
    before = _counters(worker)
    publisher = _Publisher(stage, every_s)
    publisher.start()
    try:
        found = latency.measure(stage, "swapped", rate=rate, seconds=seconds)
    finally:
        publisher.stop()
    after = _counters(worker)
    return {**found, **{counter: int(after[counter] - before[counter]) for counter in COUNTERS}}


def table(peace: dict[str, Any], swapped: dict[str, Any]) -> list[str]:
    """Percentiles, and how many clicks waited how long, as Markdown."""
    lines = [
        "| click → list, ms | clicks/s | p50 | p90 | p99 | p99.9 | max | clicks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for words, found in (("in peace", peace), (f"with {swapped['swaps_total']} swaps", swapped)):
        names = ("rate", "p50", "p90", "p99", "p99_9", "max", "clicks")
        lines.append(f"| {words} | {' | '.join(str(found[name]) for name in names)} |")
    lines += [
        "",
        f"Meanwhile {swapped['rebuilt_records_total']:,} records were rebuilt, "
        f"{swapped['renewed_lists_total']:,} lists renewed, "
        f"{swapped['put_off_lists_total']:,} put off.",
        "",
        "| up to, ms | in peace | with swaps |",
        "|---|---|---|",
    ]
    edges = [*(str(edge) for edge in latency.EDGES_MS), "more"]
    rows = list(zip(edges, peace["histogram"], swapped["histogram"], strict=True))
    last = max(at for at, (_, one, other) in enumerate(rows) if one or other)
    most = max(*peace["histogram"], *swapped["histogram"])
    for edge, *counts in rows[: last + 1]:
        bars = (f"{count} {'█' * -(-count * BAR // most)}".rstrip() for count in counts)
        lines.append(f"| {edge} | {' | '.join(bars)} |")
    return lines


class _Publisher(threading.Thread):
    """Puts the two releases in force in turn."""

    def __init__(self, stage: Ground, every_s: float) -> None:
        super().__init__(daemon=True)
        self._store = ReleaseStore(stage.serving.releases)
        self._every_s = every_s
        self._done = threading.Event()

    def run(self) -> None:
        turn = 0
        while not self._done.wait(self._every_s):
            self._store.publish(("second", "random")[turn % 2])
            turn += 1

    def stop(self) -> None:
        self._done.set()
        self.join()


def _add_release(stage: Ground, name: str, *, seed: int) -> None:
    store = ReleaseStore(stage.serving.releases)
    folder = store.staging(name)
    options = stage.options
    write_tiny_release(folder, num_items=options.items, units=options.units, seed=seed)
    store.add(folder)


def _counters(worker: Worker) -> dict[str, float]:
    """Of all processes together; but a release that all swap in is one swap."""
    told = [metrics_of(port) for port in worker.ports]
    sums = {name: sum(one[f"afterclick_{name}"] for one in told) for name in COUNTERS}
    return {**sums, "swaps_total": told[0]["afterclick_swaps_total"]}


if __name__ == "__main__":
    sys.exit(main())
