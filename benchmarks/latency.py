"""Click to list under open load: a process that sends on schedule, one that watches lists in Redis.

Beside it the floor: how long a click takes to a consumer that does nothing (`hop`).

`python -m benchmarks.latency send|watch|hear` reads its task as JSON from the environment variable
LATENCY; all make the same schedule from its seed. A click's latency runs from the moment it was
*due*, not from when it was sent, to the moment the watcher had read a list that answers it: a
sender or a worker that stalls therefore shows in every click behind it (no coordinated omission).
"""

import asyncio
import contextlib
import gc
import itertools
import os
import re
import socket
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiokafka
import hiredis
import msgspec
import numpy as np
from kafka import KafkaProducer

from afterclick.serving.keys import Keys, partition_of
from afterclick.streams.admin import client_config, create_topics
from afterclick.streams.events import Click, encode
from afterclick.streams.processes import Process
from afterclick.streams.settings import StreamsSettings
from benchmarks.ground import ROOT, Ground, Options, cpu_s, item_ids

START_IN_S = 3.0
"""Both processes have imported everything by then; the sender says so if it is late."""
DRAIN_S = 20.0
"""A list that has not come so long after the last click counts as unseen."""
POLL_S, POLL_ALONE_S = 0.001, 0.0002
"""Between two looks of the watcher, and where there is seldom anything to look for (`ALONE_RATE`):
half of it counts in every latency.
"""
ALONE_RATE = 50.0
LINGER_MS = 2
"""How long the sender gathers clicks before it sends them (Kafka 4's own clients take 5). It counts
in every latency, which runs from when a click was due. One request a click would load the cores
that are measured more than a deployment's producers do, which are many and elsewhere.
"""
TICK_NS = 1_000_000
"""The sender wakes no oftener than that and sends what is due by then."""
WATCHED_A_S = 1_000
"""Clicks a second whose lists are looked for, at most; at higher rates those of some of the users,
drawn by their names. To look at all of them at 6,000 clicks/s took as much CPU as to fold them.
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
    watched: float = 1.0
    """Share of the users whose lists are looked for."""

    def is_watched(self, user_id: str) -> bool:
        """Whether the user's lists are."""
        return zlib.crc32(user_id.encode()) < self.watched * 2**32


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
    woke_ns = 0
    for due_ns, (key, value) in zip(schedule.due_ns, encoded, strict=True):
        now_ns = time.monotonic_ns()
        if due_ns > now_ns:
            time.sleep((max(due_ns, woke_ns + TICK_NS) - now_ns) / 1e9)
            woke_ns = time.monotonic_ns()
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
    poll_s = POLL_S if task.rate > ALONE_RATE else POLL_ALONE_S
    cpu_before_s = time.process_time()
    while upcoming < num or pending:
        now_ns = time.monotonic_ns()
        if now_ns > until_ns:
            break
        new = set()
        while upcoming < num and schedule.due_ns[upcoming] <= now_ns:
            user = schedule.clicks[upcoming].user_id
            if task.is_watched(user):
                new.add(user)
                pending.setdefault(user, deque()).append(upcoming)
            upcoming += 1
        if not pending:
            next_ns = schedule.due_ns[upcoming] if upcoming < num else now_ns
            time.sleep(min(poll_s, max(0.0, (next_ns - now_ns) / 1e9)))
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
        time.sleep(poll_s)
    result = {
        "cpu_s": time.process_time() - cpu_before_s,
        "seen_ns": seen_ns,
        "offset": offset,
        "written_ms": written_ms,
        "polls": polls,
    }
    Path(task.out, f"{task.name}-watch.json").write_bytes(msgspec.json.encode(result))


async def hear(task: Task) -> dict[str, int]:
    """Read the clicks as a worker's consumer does, by the same client with the same wait; when each
    was there, by `partition-offset`.
    """
    topic, schedule = task.streams.clicks_topic, Schedule(task)
    heard_ns: dict[str, int] = {}
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=task.streams.broker,
        fetch_max_wait_ms=task.streams.fetch_wait_ms,
        isolation_level="read_committed",
    )
    await consumer.start()
    try:
        tps = [aiokafka.TopicPartition(topic, at) for at in range(task.options.partitions)]
        consumer.assign(tps)
        await consumer.seek_to_beginning(*tps)  # a topic of its own: who is late hears all
        until_ns = schedule.due_ns[-1] + int(DRAIN_S * 1e9)
        while len(heard_ns) < len(schedule.clicks) and time.monotonic_ns() < until_ns:
            found = await consumer.getmany(timeout_ms=500)
            now_ns = time.monotonic_ns()
            for record in itertools.chain.from_iterable(found.values()):
                heard_ns.setdefault(f"{record.partition}-{record.offset}", now_ns)
    finally:
        await consumer.stop()
    return heard_ns


def hop(stage: Ground, name: str, *, rate: float, seconds: float) -> dict[str, Any]:
    """Milliseconds from when a click was due to when a consumer that does nothing has it: what no
    worker can be below. In a topic of its own.
    """
    streams = msgspec.structs.replace(stage.streams, clicks_topic=f"clicks-{name}")
    create_topics(streams, partitions=stage.options.partitions, replication=1)
    stage = stage._replace(streams=streams)
    task = _task(stage, name, rate=rate, seconds=seconds, linger_ms=0)
    with _running(stage, task, ("hear", "send")) as processes:
        _wait_for(processes, task)
    sent, heard_ns = _told(task, "send", "hear")
    places = zip(sent["partition"], sent["offset"], strict=True)
    seen_ns = [heard_ns.get(f"{partition}-{offset}", 0) for partition, offset in places]
    due_ns = np.array(Schedule(task).due_ns)
    counted = due_ns >= task.start_ns + int(task.warm_up_s * 1e9)
    if not all(seen_ns):
        raise RuntimeError(f"{name}: {seen_ns.count(0)} of {len(seen_ns)} clicks were not heard")
    return {
        "clicks": int(counted.sum()),
        **_percentiles((np.array(seen_ns) - due_ns)[counted] / 1e6),
    }


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
    task = _task(stage, name, rate=rate, seconds=seconds, linger_ms=linger_ms)
    others = {**stage.servers, **({"worker": worker} if worker else {})}
    counted_from_ns = task.start_ns + int(task.warm_up_s * 1e9)
    with _running(stage, task, ("watch", "send")) as processes:
        _wait_until(counted_from_ns)
        before_s = {role: cpu_s(process.pid) for role, process in others.items()}
        _wait_until(counted_from_ns + int(seconds * 1e9))
        took_us = {
            role: (cpu_s(process.pid) - before_s[role]) * 1e6 for role, process in others.items()
        }
        _wait_for(processes, task)
    sent, seen = _told(task, "send", "watch")
    schedule = Schedule(task)
    found = summary(
        schedule.due_ns, sent, seen, rate=rate, counted_from_ns=counted_from_ns,
        watched=[task.is_watched(click.user_id) for click in schedule.clicks],
    )  # fmt: skip
    for role, us in took_us.items():
        found["cpu_us_a_click"][role] = round(us / (rate * seconds), 1)
    return found


def _task(stage: Ground, name: str, *, rate: float, seconds: float, linger_ms: int) -> Task:
    return Task(
        options=stage.options,
        name=name,
        rate=rate,
        warm_up_s=stage.options.latency_warm_up_s,
        seconds=seconds,
        linger_ms=linger_ms,
        start_ns=time.monotonic_ns() + int(START_IN_S * 1e9),
        start_ms=time.time_ns() // 1_000_000 + int(START_IN_S * 1000),
        streams=stage.streams,
        redis=stage.serving.redis,
        namespace=stage.serving.namespace,
        out=str(stage.folder),
        watched=min(1.0, WATCHED_A_S / rate),
    )


@contextlib.contextmanager
def _running(stage: Ground, task: Task, roles: Sequence[str]) -> Iterator[list[Process]]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LATENCY": msgspec.json.encode(task).decode()}
    processes = [
        Process(
            f"latency {role}",
            [sys.executable, "-m", "benchmarks.latency", role],
            log=stage.folder / f"{task.name}-{role}.log",
            env=env,
        ).start()
        for role in roles
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def _wait_for(processes: Sequence[Process], task: Task) -> None:
    for process in processes:
        if process.wait(START_IN_S + task.warm_up_s + task.seconds + DRAIN_S + 60) != 0:
            raise RuntimeError(f"{process.name}: failed; it said:\n{process.tail()}")


def _told(task: Task, *roles: str) -> Iterator[dict[str, Any]]:
    """What each of a task's processes wrote at its end."""
    for role in roles:
        yield msgspec.json.decode(Path(task.out, f"{task.name}-{role}.json").read_bytes())


def _wait_until(at_ns: int) -> None:
    time.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))


def summary(
    due: list[int],
    sent: dict[str, Any],
    seen: dict[str, Any],
    *,
    rate: float,
    counted_from_ns: int = 0,
    watched: list[bool] | None = None,
) -> dict[str, Any]:
    """Percentiles over every click due from `counted_from_ns` on whose list was looked for; one
    never seen is infinite.
    """
    due_ns, seen_ns = np.array(due), np.array(seen["seen_ns"])
    looked_for = np.ones(len(due_ns), np.bool_) if watched is None else np.array(watched)
    counted = (due_ns >= counted_from_ns) & looked_for
    ms = np.where(seen_ns > 0, (seen_ns - due_ns) / 1e6, np.inf)[counted]
    lag_ms = ((np.array(sent["sent_ns"]) - due_ns) / 1e6)[due_ns >= counted_from_ns]
    # A list's offset must not be below its click's: else it did not answer it.
    wrong = int(((seen_ns > 0) & (np.array(seen["offset"]) < np.array(sent["offset"]))).sum())
    return {
        **_percentiles(ms),
        "clicks": len(ms),
        "sent": len(due_ns),
        "rate": round(rate, 1),
        "unseen": int((looked_for & (seen_ns == 0)).sum()),
        "watched": int(looked_for.sum()),
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


def _percentiles(ms: np.ndarray) -> dict[str, float | None]:
    # `higher`: never a value between two measurements, nor below the share it names.
    found = {
        name: float(np.percentile(ms, q, method="higher"))
        for name, q in (("p50", 50), ("p90", 90), ("p99", 99), ("p99_9", 99.9), ("max", 100))
    }
    return {name: round(value, 2) if np.isfinite(value) else None for name, value in found.items()}


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
    """Run one of the processes."""
    gc.disable()  # a collection of all that a schedule holds stalls a process for some 50 ms
    task = msgspec.json.decode(os.environ["LATENCY"], type=Task)
    if role == "hear":
        heard_ns = asyncio.run(hear(task))
        Path(task.out, f"{task.name}-hear.json").write_bytes(msgspec.json.encode(heard_ns))
    else:
        {"send": send, "watch": watch}[role](task)


if __name__ == "__main__":
    main(sys.argv[1])
