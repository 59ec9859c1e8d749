"""From the event of a new item to its row in the catalogue: `python -m benchmarks.new_items`.

One process sends items on schedule and watches the worker's gauge `catalog_items`, in peace and
while the worker drains a backlog. Prints the machine, a table, one JSON line.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaProducer

from afterclick.streams.admin import client_config
from afterclick.streams.events import Item, encode
from afterclick.streams.local import local_worker
from benchmarks.ground import Ground, Options, backlog, fill, ground, metrics_of
from benchmarks.report import machine, tell

LIMIT_S = 30.0
"""An item that has no row so long after the last one was sent is lost."""
POLL_S = 0.005
EVERY_S = 0.3
"""Mean time between two items."""


def measure(stage: Ground, port: int, words: str, num: int) -> dict[str, Any]:
    """Milliseconds from when an item was due to the moment the gauge counted it."""
    rng = np.random.default_rng(stage.options.seed)
    due_s = time.monotonic() + 0.5 + np.cumsum(rng.exponential(EVERY_S, num))
    known, seen_s = _items_of(port), np.full(num, np.inf)
    producer = KafkaProducer(**client_config(stage.streams), acks=1)

    def send() -> None:
        for at, due in enumerate(due_s.tolist()):
            time.sleep(max(0.0, due - time.monotonic()))
            # Its category is all that is known of it, and is what its vector is made of.
            item = Item(item_id=f"{words}-{at}", categories=["c1"])
            key, value = encode(item)
            producer.send(stage.streams.items_topic, key=key, value=value)

    sender = threading.Thread(target=send)
    sender.start()
    while np.isinf(seen_s[-1]) and time.monotonic() < due_s[-1] + LIMIT_S:
        time.sleep(POLL_S)
        new, now_s = _items_of(port) - known, time.monotonic()
        seen_s[:new] = np.minimum(seen_s[:new], now_s)
    sender.join()
    producer.close()
    ms = 1000 * (seen_s - due_s)
    shares = (("p50", 50), ("p90", 90), ("max", 100))
    found = {name: float(np.percentile(ms, q, method="higher")) for name, q in shares}
    return {
        **{name: round(value, 1) if np.isfinite(value) else None for name, value in found.items()},
        "items": num,
        "lost": int(np.isinf(seen_s).sum()),
    }


def run(options: Options, folder: Path, *, num: int) -> dict[str, Any]:
    """Beside a draining worker, then in peace, on fresh servers."""
    failures: list[str] = []
    result: dict[str, Any] = {}
    with ground(options, folder) as stage:
        fill(stage, backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000))
        with local_worker(stage.worker_env, folder) as worker:
            result["beside_writes"] = measure(stage, worker.port, "beside", num)
            if stage.applied() >= options.clicks:
                failures.append("the backlog ended before the items: raise --clicks")
            while stage.applied() < options.clicks:
                time.sleep(0.1)
            result["in_peace"] = measure(stage, worker.port, "peace", num)
    failures += [f"{load}: {one['lost']} items lost" for load, one in result.items() if one["lost"]]
    return {**result, "failures": failures}


def table(result: dict[str, Any]) -> list[str]:
    """One row for each load, as Markdown."""
    lines = ["| item's event → its row, ms | p50 | p90 | max | items |", "|---|---|---|---|---|"]
    for load, words in (("beside_writes", "beside a drain"), ("in_peace", "in peace")):
        cells = " | ".join(str(result[load][name]) for name in ("p50", "p90", "max", "items"))
        lines.append(f"| {words} | {cells} |")
    return [*lines, "", *(f"- {words}" for words in result["failures"])]


def _items_of(port: int) -> int:
    return int(metrics_of(port)["afterclick_catalog_items"])


def main(argv: Sequence[str] | None = None) -> int:
    """Time until a new item is scorable, beside a draining worker and in peace."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.new_items", description=main.__doc__
    )
    parser.add_argument("--num", type=int, default=60, help="new items of each measurement")
    parser.add_argument("--items", type=int, default=20_000, help="there before")
    parser.add_argument("--clicks", type=int, default=300_000, help="backlog drained beside")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    options = Options(items=given.items, clicks=given.clicks, seed=given.seed)
    name, words = machine("")
    print(f"machine: {words}")
    with tempfile.TemporaryDirectory(prefix="afterclick-items-") as folder:
        result = {"machine": name, **run(options, Path(folder), num=given.num)}
    result["load_after"] = round(os.getloadavg()[0], 1)
    tell("new-items", "new_items", arguments, (name, words), result, table(result),
         report=given.report)  # fmt: skip
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
