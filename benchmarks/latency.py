"""Click to list under open load: a process that sends on schedule, one that watches lists in Redis.

`python -m benchmarks.latency send|watch` reads its task as JSON from the environment variable
LATENCY; both make the same schedule from its seed. A click's latency runs from the moment it was
*due*, not from when it was sent, to the moment the watcher had read a list that answers it: a
sender or a worker that stalls therefore shows in every click behind it (no coordinated omission).
"""

import os
import re
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import hiredis
import msgspec
import numpy as np
from kafka import KafkaProducer

from afterclick.serving.keys import Keys, partition_of
from afterclick.streams.admin import client_config
from afterclick.streams.events import Click, encode
from afterclick.streams.processes import Process
from afterclick.streams.settings import StreamsSettings
from benchmarks.ground import ROOT, Ground, Options, cpu_s, item_ids

START_IN_S = 3.0
"""Both processes have imported everything by then; the sender says so if it is late."""
DRAIN_S = 20.0
"""A list that has not come so long after the last click counts as unseen."""
POLL_S = 0.001
LINGER_MS = 2
"""How long the sender gathers clicks before it sends them (Kafka 4's own clients take 5). It counts
in every latency, which runs from when a click was due. One request a click would load the cores
that are measured more than a deployment's producers do, which are many and elsewhere.
"""
LOOKS_AT_HEADS = 20
"""One look in so many reads every list that is waited for."""
TAIL_BYTES = 160
"""End of a list's JSON that holds offset and event time: reading 3 KB lists whole a thousand times
a second would load the Redis under test more than the worker does.
"""
_TAIL = re.compile(rb'"offset":(\d+),"event_ms":(\d+)(?:,"signals":\d+)?,"written_ms":(\d+)')


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What sender and watcher are told."""

    options: Options
    name: str
    rate: float
    warm_up_s: float
    """Clicks due so long after the start are sent and awaited, and not counted."""
    seconds: float
    linger_ms: int
    start_ns: int
    """Of the monotonic clock, which all processes of a machine share."""
    start_ms: int
    """The same moment of the wall clock."""
    streams: StreamsSettings
    redis: str
    namespace: str
    out: str


class Schedule:
    """When which click is due: Poisson arrivals, the same for the same task."""

    def __init__(self, task: Task) -> None:
        rng = np.random.default_rng(task.options.seed + 1)
        num = max(2, int(task.rate * (task.warm_up_s + task.seconds)))
        gaps_s = rng.exponential(1 / task.rate, num)
        self.due_ns = (task.start_ns + np.cumsum(gaps_s) * 1e9).astype(np.int64).tolist()
        users = rng.integers(0, task.options.users, num).tolist()
        items = item_ids(task.options, rng, num)
        self.clicks: list[Click] = []
        last_ms: dict[int, int] = {}
        for at, (due_ns, user, item) in enumerate(zip(self.due_ns, users, items, strict=True)):
            due_ms = task.start_ms + (due_ns - task.start_ns) // 1_000_000
            # Rising for every user, so that a list's event time says which click it answers.
            last_ms[user] = max(due_ms, last_ms.get(user, 0) + 1)
            self.clicks.append(
                Click(
                    user_id=f"u{user}",
                    item_id=item,
                    timestamp_ms=last_ms[user],
                    event_id=f"{task.name}{at}",
                )
            )


def send(task: Task) -> None:
    """Send every click when it is due; writes when it was sent and where it stands in the log."""
    schedule = Schedule(task)
    producer = KafkaProducer(**client_config(task.streams), acks=1, linger_ms=task.linger_ms)
    topic = task.streams.clicks_topic
    producer.partitions_for(topic)
    encoded = [encode(click) for click in schedule.clicks]
    sent_ns, futures = [], []
    late_start_ns = time.monotonic_ns() - task.start_ns
    cpu_before_s = time.process_time()
    for due_ns, (key, value) in zip(schedule.due_ns, encoded, strict=True):
        wait_ns = due_ns - time.monotonic_ns()
        if wait_ns > 0:
            time.sleep(wait_ns / 1e9)
        sent_ns.append(time.monotonic_ns())
        futures.append(producer.send(topic, key=key, value=value))
    producer.flush(timeout=60)
    cpu_s = time.process_time() - cpu_before_s
    found = [future.get(timeout=30) for future in futures]
    producer.close()
    result = {
        "cpu_s": cpu_s,
        "late_start_ns": late_start_ns,
        "sent_ns": sent_ns,
        "partition": [record.partition for record in found],
        "offset": [record.offset for record in found],
    }
    Path(task.out, f"{task.name}-send.json").write_bytes(msgspec.json.encode(result))


def watch(task: Task) -> None:
    """Read the lists of users who wait for one until all have theirs.

    A list and its partition's head change together, so lists are read where a head has moved since
    the last look, or a click is new; all of them only now and then, for lists that were put off.
    Reading all at every look would load Redis more than the worker does.
    """
    schedule = Schedule(task)
    keys = Keys(task.namespace)
    address = urlparse(task.redis)
    connection = socket.create_connection((address.hostname, address.port or 6379))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answers = hiredis.Reader()
    pending: dict[str, deque[int]] = {}
    num = len(schedule.clicks)
    seen_ns, offset, written_ms = [0] * num, [-1] * num, [0] * num
    partitions = range(task.options.partitions)
    look = _command("MGET", *(keys.head(partition) for partition in partitions))
    heads: list[Any] = [None] * len(partitions)
    upcoming, polls = 0, 0
    until_ns = schedule.due_ns[-1] + int(DRAIN_S * 1e9)
    cpu_before_s = time.process_time()
    while upcoming < num or pending:
        now_ns = time.monotonic_ns()
        if now_ns > until_ns:
            break
        new = set()
        while upcoming < num and schedule.due_ns[upcoming] <= now_ns:
            new.add(schedule.clicks[upcoming].user_id)
            pending.setdefault(schedule.clicks[upcoming].user_id, deque()).append(upcoming)
            upcoming += 1
        if not pending:
            time.sleep(min(POLL_S, max(0.0, (schedule.due_ns[upcoming] - now_ns) / 1e9)))
            continue
        polls += 1
        connection.sendall(look)
        before, (heads,) = heads, _take(connection, answers, 1)
        all_of_them = polls % LOOKS_AT_HEADS == 0
        moved = {at for at in partitions if all_of_them or heads[at] != before[at]}
        users = [
            user for user in pending if user in new or partition_of(user, len(partitions)) in moved
        ]
        reads = [_command("GETRANGE", keys.top_of(user), f"-{TAIL_BYTES}", "-1") for user in users]
        connection.sendall(b"".join(reads))
        tails = _take(connection, answers, len(users))
        now_ns = time.monotonic_ns()
        for user, tail in zip(users, tails, strict=True):
            found = _TAIL.search(tail)
            if found is None:
                continue
            at_offset, event_ms, at_ms = map(int, found.groups())
            waiting = pending[user]
            while waiting and (schedule.clicks[waiting[0]].timestamp_ms or 0) <= event_ms:
                at = waiting.popleft()
                seen_ns[at], offset[at], written_ms[at] = now_ns, at_offset, at_ms
            if not waiting:
                del pending[user]
        time.sleep(POLL_S)
    result = {
        "cpu_s": time.process_time() - cpu_before_s,
        "seen_ns": seen_ns,
        "offset": offset,
        "written_ms": written_ms,
        "polls": polls,
    }
    Path(task.out, f"{task.name}-watch.json").write_bytes(msgspec.json.encode(result))


def measure(
    stage: Ground,
    name: str,
    *,
    rate: float,
    seconds: float,
    linger_ms: int = LINGER_MS,
    worker: Process | None = None,
) -> dict[str, Any]:
    """Latencies in milliseconds at a rate, what shows that they can be trusted, and what a click
    cost in CPU: of the two processes here, of the servers, and of the worker where it is given.
    """
    start_ns = time.monotonic_ns() + int(START_IN_S * 1e9)
    task = Task(
        options=stage.options,
        name=name,
        rate=rate,
        warm_up_s=stage.options.latency_warm_up_s,
        seconds=seconds,
        linger_ms=linger_ms,
        start_ns=start_ns,
        start_ms=time.time_ns() // 1_000_000 + int(START_IN_S * 1000),
        streams=stage.streams,
        redis=stage.serving.redis,
        namespace=stage.serving.namespace,
        out=str(stage.folder),
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LATENCY": msgspec.json.encode(task).decode()}
    processes = [
        Process(
            f"latency {role}",
            [sys.executable, "-m", "benchmarks.latency", role],
            log=stage.folder / f"{name}-{role}.log",
            env=env,
        ).start()
        for role in ("watch", "send")
    ]
    others = {**stage.servers, **({"worker": worker} if worker else {})}
    try:
        _wait_until(start_ns + int(task.warm_up_s * 1e9))
        before_s = {role: cpu_s(process.pid) for role, process in others.items()}
        _wait_until(start_ns + int((task.warm_up_s + seconds) * 1e9))
        took_us = {
            role: (cpu_s(process.pid) - before_s[role]) * 1e6 for role, process in others.items()
        }
        for process in processes:
            if process.wait(START_IN_S + task.warm_up_s + seconds + DRAIN_S + 60) != 0:
                raise RuntimeError(f"{process.name}: failed; it said:\n{process.tail()}")
    finally:
        for process in processes:
            process.kill()
    sent, seen = (
        msgspec.json.decode((stage.folder / f"{name}-{role}.json").read_bytes())
        for role in ("send", "watch")
    )
    counted_from_ns = start_ns + int(task.warm_up_s * 1e9)
    found = summary(Schedule(task).due_ns, sent, seen, rate=rate, counted_from_ns=counted_from_ns)
    for role, us in took_us.items():
        found["cpu_us_a_click"][role] = round(us / (rate * seconds), 1)
    return found


def _wait_until(at_ns: int) -> None:
    time.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))


def summary(
    due: list[int],
    sent: dict[str, Any],
    seen: dict[str, Any],
    *,
    rate: float,
    counted_from_ns: int = 0,
) -> dict[str, Any]:
    """Percentiles over every click due from `counted_from_ns` on; one never seen is infinite."""
    due_ns, seen_ns = np.array(due), np.array(seen["seen_ns"])
    counted = due_ns >= counted_from_ns
    ms = np.where(seen_ns > 0, (seen_ns - due_ns) / 1e6, np.inf)[counted]
    lag_ms = ((np.array(sent["sent_ns"]) - due_ns) / 1e6)[counted]
    # A list's offset must not be below its click's: else it did not answer it.
    wrong = int(((seen_ns > 0) & (np.array(seen["offset"]) < np.array(sent["offset"]))).sum())
    # `higher`: never a value between two measurements, nor below the share it names.
    found = {
        name: float(np.percentile(ms, q, method="higher"))
        for name, q in (("p50", 50), ("p90", 90), ("p99", 99), ("p99_9", 99.9), ("max", 100))
    }
    return {
        **{name: round(value, 2) if np.isfinite(value) else None for name, value in found.items()},
        "clicks": len(ms),
        "sent": len(due_ns),
        "rate": round(rate, 1),
        "unseen": int((seen_ns == 0).sum()),
        "wrong_offset": wrong,
        "sender_lag_p99": round(float(np.percentile(lag_ms, 99)), 2),
        "sender_late_start": sent["late_start_ns"] > 0,
        "polls": seen["polls"],
        "cpu_us_a_click": {
            name: round(told["cpu_s"] / len(due_ns) * 1e6, 1)
            for name, told in (("sender", sent), ("watcher", seen))
        },
        "histogram": histogram(ms),
    }


EDGES_MS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 2000, 5000)


def histogram(ms: np.ndarray) -> list[int]:
    """Clicks up to each of `EDGES_MS`, and those beyond the last one."""
    return np.bincount(np.searchsorted(EDGES_MS, ms), minlength=len(EDGES_MS) + 1).tolist()


def _command(*parts: str) -> bytes:
    encoded = [part.encode() for part in parts]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in encoded)


def _take(connection: socket.socket, answers: hiredis.Reader, num: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < num:
        answer = answers.gets()
        if answer is False:
            answers.feed(connection.recv(1 << 16))
        else:
            found.append(answer)
    return found


def main(role: str) -> None:
    """Run one of the two processes."""
    task = msgspec.json.decode(os.environ["LATENCY"], type=Task)
    {"send": send, "watch": watch}[role](task)


if __name__ == "__main__":
    main(sys.argv[1])
