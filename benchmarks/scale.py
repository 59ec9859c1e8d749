"""One worker and two: `python -m benchmarks.scale`.

Three things that a machine with few cores can tell about many. What a click costs each process, in
CPU, when one worker drains a backlog and when two share its partitions: whoever adds a worker pays
what this table says, whatever the wall clock of two cores does. How long a partition stands still
while a worker joins, leaves and is killed, under a live load. And what follows from both for other
deployments (`benchmarks.sizing`). Prints the machine, tables, one JSON line.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from afterclick.serving.keys import partition_of
from afterclick.streams.events import encode
from afterclick.streams.local import Worker, local_worker, readiness
from afterclick.streams.log import LogReader
from afterclick.streams.verify import verify
from benchmarks import latency, sizing
from benchmarks.footprint import Size, footprint
from benchmarks.ground import Ground, Options, backlog, cpu_s, fill, ground
from benchmarks.report import machine, tell
from benchmarks.stages import limits

RECORD_FRAME_BYTES = 12
"""Of a record in a Kafka batch beside key and value: lengths, deltas, attributes; headers none."""
SETTLE_S = 2.0
"""After workers hold their shares: the first chunks have cold caches."""
IDLE_S = 5.0
BEGIN_S = 4.0
"""Of live load in peace before something happens to the group."""
EVERY_S = 0.005
"""Between two looks at the heads."""
DEPLOYMENTS = ((100, 1e5), (1_000, 1e6), (10_000, 1e7), (100_000, 5e7), (1_000_000, 3e8))
"""Clicks a second, and users: the table's rows."""


def main(argv: Sequence[str] | None = None) -> int:
    """CPU a click with one worker and two, standstill in rebalances, and a sizing table."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = _parser().parse_args(arguments)
    options = Options(
        items=given.items,
        users=given.users,
        clicks=given.clicks,
        partitions=given.partitions,
        seed=given.seed,
        broker=given.broker,
        latency_warm_up_s=5.0,
    )
    name, words = machine("")
    print(f"machine: {words}")
    failures: list[str] = []
    costs = {}
    for num in (1, 2):
        with tempfile.TemporaryDirectory(prefix="afterclick-scale-") as folder:
            costs[f"{num}"] = drained(options, Path(folder), num, given.seconds, failures)
        _say(costs[f"{num}"])
    with tempfile.TemporaryDirectory(prefix="afterclick-scale-") as folder:
        events = rebalances(options, Path(folder), given.rate, given.event_seconds, failures)
    with tempfile.TemporaryDirectory(prefix="afterclick-scale-") as folder:
        user = footprint(Size(), Path(folder), users=2000)
    cost = cost_of(costs["2"], user["all_bytes"])
    scans = {options.items: cost.scan_us, **dict(given.scan)}
    needs = [
        sizing.need(cost, clicks_per_s=rate, users=users, items=items, scan_us=us)
        for items, us in scans.items()
        for rate, users in DEPLOYMENTS
    ]
    result = {
        "machine": name,
        "broker": given.broker,
        "items": options.items,
        "partitions": options.partitions,
        "drains": costs,
        "rate": given.rate,
        "rebalances": events,
        "user": user,
        "cost": cost,
        "needs": [one._asdict() for one in needs],
        "failures": failures,
    }
    lines = [*table(result), "", *sizing.table(needs)]
    tell("scale", "scale", arguments, (name, words), result, lines, report=given.report)
    return 1 if failures else 0


def drained(
    options: Options, folder: Path, num: int, seconds: float, failures: list[str]
) -> dict[str, Any]:
    """CPU and bytes a click while so many workers drain one backlog."""
    with ground(options, folder) as stage, contextlib.ExitStack() as stack:
        clicks = backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000)
        per_partition = Counter(partition_of(one.user_id, options.partitions) for one in clicks)
        fill(stage, clicks)
        with ThreadPoolExecutor(num) as starters:  # at once: who is first drains alone meanwhile
            started = [
                starters.submit(stack.enter_context, local_worker(stage.worker_env, folder))
                for _ in range(num)
            ]
            workers = [one.result() for one in started]
        _shared(workers, options.partitions)
        time.sleep(SETTLE_S)
        found = _rates(stage, workers, seconds)
        heads = stage.heads()
        ended = [p for p, head in enumerate(heads) if head.next >= per_partition[p]]
        if ended:
            failures.append(f"{num} workers: the backlog ended meanwhile: raise --clicks")
        while stage.applied() < len(clicks):
            time.sleep(0.1)
        standing = _rates(stage, workers, IDLE_S)
        scan_us = limits(stage)["scan, top-K"]
        found["signal_bytes"] = round(_signal_bytes(stage) / len(clicks), 1)
        report = verify(stage.serving, stage.streams)
        if report.differences or report.clicks != len(clicks):
            failures.append(f"{num} workers: verify: {msgspec.json.encode(report).decode()}")
    sample = [encode(one) for one in clicks[:1000]]
    size = sum(len(key) + len(value) for key, value in sample) / len(sample)
    return {
        **found,
        "click_bytes": round(size + RECORD_FRAME_BYTES, 1),
        "scan_us": round(scan_us, 1),
        "standing_cores": {who: standing["cores"][who] for who in ("worker", "redis", "broker")},
    }


def _rates(stage: Ground, workers: list[Worker], seconds: float) -> dict[str, Any]:
    """What each process takes in a stretch of time, and a click where there are some."""
    pids = {"broker": [stage.servers["broker"].pid], "redis": [stage.servers["redis"].pid]}
    pids["worker"] = [worker.process.pid for worker in workers]

    def look() -> tuple[float, dict[str, float], int, dict[str, Any]]:
        taken = {who: sum(map(cpu_s, own)) for who, own in pids.items()}
        return time.perf_counter(), taken, stage.applied(), stage.redis.info("stats")

    begun_s, before, first, net = look()
    time.sleep(seconds)
    ended_s, after, last, net_after = look()
    clicks, took_s = last - first, ended_s - begun_s
    found: dict[str, Any] = {
        "workers": len(workers),
        "clicks_per_s": round(clicks / took_s, 1),
        "cores": {who: round((after[who] - before[who]) / took_s, 3) for who in pids},
    }
    if clicks:
        found["cpu_us_a_click"] = {
            who: round((after[who] - before[who]) / clicks * 1e6, 1) for who in pids
        }
        for name, key in (("in", "total_net_input_bytes"), ("out", "total_net_output_bytes")):
            found[f"redis_{name}_bytes"] = round((net_after[key] - net[key]) / clicks, 1)
    return found


def cost_of(drain: dict[str, Any], user_bytes: float) -> sizing.Cost:
    """What the sizing starts from: a drain by one worker a core."""
    us = drain["cpu_us_a_click"]
    return sizing.Cost(
        worker_us=us["worker"],
        redis_us=us["redis"],
        broker_us=us["broker"],
        scan_us=drain["scan_us"],
        user_bytes=user_bytes,
        redis_in_bytes=drain["redis_in_bytes"],
        redis_out_bytes=drain["redis_out_bytes"],
        click_bytes=drain["click_bytes"],
        signal_bytes=drain["signal_bytes"],
    )


class Heads(threading.Thread):
    """Watches the heads: the longest time that each partition did not move."""

    def __init__(self, stage: Ground) -> None:
        super().__init__(daemon=True)
        self._stage = stage
        self._done = threading.Event()
        self._moved_s: dict[int, float] = {}
        self._next: dict[int, int] = {}
        self.still_s: dict[int, float] = {}

    def run(self) -> None:
        while not self._done.wait(EVERY_S):
            self.look(time.perf_counter(), [head.next for head in self._stage.heads()])

    def look(self, now_s: float, nexts: Sequence[int]) -> None:
        """Take in how far every partition is at a moment."""
        for partition, next_ in enumerate(nexts):
            if next_ != self._next.get(partition):
                self._next[partition], self._moved_s[partition] = next_, now_s
            stood_s = now_s - self._moved_s[partition]
            self.still_s[partition] = max(stood_s, self.still_s.get(partition, 0.0))

    def stop(self) -> dict[int, float]:
        """Seconds, by partition."""
        self._done.set()
        self.join()
        return self.still_s


def rebalances(
    options: Options, folder: Path, rate: float, seconds: float, failures: list[str]
) -> dict[str, Any]:
    """Under live load: in peace, a second worker joins, is stopped, joins again, is killed."""
    found: dict[str, Any] = {}
    with ground(options, folder) as stage, contextlib.ExitStack() as stack:
        first = stack.enter_context(local_worker(stage.worker_env, folder))
        second = contextlib.ExitStack()
        stack.callback(second.close)
        others: list[Worker] = []

        def join() -> None:
            others[:] = [second.enter_context(local_worker(stage.worker_env, folder))]
            _shared([first, *others], options.partitions)

        def leave() -> None:
            second.close()

        def kill() -> None:
            others[0].kill()

        for name, event in (
            ("in peace", lambda: None), ("joins", join), ("is stopped", leave),
            ("joins again", join), ("is killed", kill),
        ):  # fmt: skip
            found[name] = _during(stage, name, rate, seconds, event)
            _say({name: found[name]})
            if found[name]["event_s"] > seconds - BEGIN_S - 1:
                failures.append(f"{name}: the load ended first: raise --event-seconds")
            if found[name]["unseen"] or found[name]["wrong_offset"]:
                failures.append(f"{name}: {found[name]['unseen']} lists unseen")
        report = verify(stage.serving, stage.streams)
        if report.differences or report.lost or report.doubled:
            failures.append(f"rebalances: verify: {msgspec.json.encode(report).decode()}")
    return found


def _during(
    stage: Ground, name: str, rate: float, seconds: float, event: Callable[[], None]
) -> dict[str, Any]:
    """Latencies, and how long partitions stood still, of a live load in which something happens."""
    measured: dict[str, Any] = {}
    task = name.replace(" ", "-")

    def measure() -> None:
        measured.update(latency.measure(stage, task, rate=rate, seconds=seconds))

    load = threading.Thread(target=measure)
    load.start()
    time.sleep(latency.START_IN_S + stage.options.latency_warm_up_s + BEGIN_S)
    heads = Heads(stage)
    heads.start()
    begun_s = time.perf_counter()
    event()
    took_s = time.perf_counter() - begun_s
    while load.is_alive() and time.perf_counter() - begun_s < seconds - BEGIN_S - 1:
        time.sleep(0.05)
    still_s = sorted(heads.stop().values())
    load.join()
    if not measured:
        raise RuntimeError(f"{name}: the load failed")
    return {
        **{key: measured[key] for key in ("p50", "p99", "max", "clicks", "unseen")},
        "wrong_offset": measured["wrong_offset"],
        "event_s": round(took_s, 2),
        "still_s": [round(one, 2) for one in still_s],
    }


def _shared(workers: list[Worker], partitions: int) -> None:
    """Return once every worker holds its share, and all of it is ready."""
    until_s = time.monotonic() + 60
    share = partitions // len(workers)
    while time.monotonic() < until_s:
        pages = [readiness(worker.port) for worker in workers]
        held = [len(_partitions(page)) for _, page in pages]
        if all(ready for ready, _ in pages) and all(num >= share for num in held):
            return
        time.sleep(0.1)
    raise RuntimeError(f"scale: partitions are not shared: {pages}")


def _partitions(page: str) -> dict[str, Any]:
    with contextlib.suppress(msgspec.DecodeError):
        found: dict[str, Any] = msgspec.json.decode(page).get("partitions", {})
        return found
    return {}


def _signal_bytes(stage: Ground) -> int:
    topic = stage.streams.signals_topic
    with contextlib.closing(LogReader(stage.streams)) as log:
        begin, end = log.edges(topic, 0)
        return sum(
            len(record.key or b"") + len(record.value or b"") + RECORD_FRAME_BYTES
            for records in log.read(topic, 0, begin, end)
            for record in records
        )


def table(result: dict[str, Any]) -> list[str]:
    """Costs and rebalances as Markdown."""
    lines = [
        "| drained by | clicks/s | CPU µs a click: workers | Redis | broker | all "
        "| Redis, bytes in a click | out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num, one in result["drains"].items():
        us = one["cpu_us_a_click"]
        lines.append(
            f"| {num} worker{'s' * (num != '1')} | {one['clicks_per_s']:,.0f} | {us['worker']} "
            f"| {us['redis']} | {us['broker']} | {sum(us.values()):.1f} "
            f"| {one['redis_in_bytes']:,.0f} | {one['redis_out_bytes']:,.0f} |"
        )
    standing = result["drains"]["2"]["standing_cores"]
    lines += [
        "",
        f"Cores taken without a click: two workers {standing['worker']}, "
        f"Redis {standing['redis']}, broker {standing['broker']}.",
        "",
        f"| a second worker, {result['rate']:,.0f} clicks/s live | click → list, ms: p50 | p99 "
        "| max | it took, s | longest stand of a partition, s: median | most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in result["rebalances"].items():
        still = one["still_s"]
        lines.append(
            f"| {name} | {one['p50']} | {one['p99']} | {one['max']} | {one['event_s']} "
            f"| {still[len(still) // 2]} | {still[-1]} |"
        )
    return [*lines, *(f"- {words}" for words in result["failures"])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=main.__doc__)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--clicks", type=int, default=200_000, help="backlog of each drain")
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each drain that count")
    parser.add_argument("--rate", type=float, default=200.0, help="live clicks/s of a rebalance")
    parser.add_argument("--event-seconds", type=float, default=40.0, help="of each rebalance")
    parser.add_argument(
        "--scan", action="append", default=[], type=_scan, metavar="ITEMS=US",
        help="another catalogue's scan, µs a user, from benchmarks.catalogues",
    )  # fmt: skip
    parser.add_argument("--broker", choices=("kafka", "tansu"), default="kafka")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    return parser


def _scan(text: str) -> tuple[int, float]:
    items, _, us = text.partition("=")
    return int(items), float(us)


def _say(found: dict[str, Any]) -> None:
    print(msgspec.json.encode(found).decode(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
