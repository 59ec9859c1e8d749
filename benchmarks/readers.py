"""One process that reads lists on schedule: `python -m benchmarks.readers redis|http`.

Its task stands in the environment variable READS. It says when it is ready and begins when it is
told to, because importing takes seconds on a machine that is busy. A read's latency runs from the
moment it was *due* to the moment its answer was there, so a reader, an API or a Redis that stalls
shows in every read behind it (no coordinated omission). Imports little: what a reader loads takes
memory bandwidth from the worker beside it.
"""

import asyncio
import contextlib
import os
import selectors
import sys
import time
import urllib.parse
from collections import Counter, deque
from pathlib import Path
from typing import Any

import httptools
import msgspec
import numpy as np

from afterclick.serving.reader import Top, TopK

CONNECTIONS_MAX = 256
"""HTTP connections of one process; reads that are due beyond them wait, and their wait counts."""
DRAIN_S = 10.0
"""An answer that has not come so long after the last read was due is lost."""
BEGIN_TIMEOUT_S = 120.0
POLL_S = 0.005


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one reading process is told."""

    how: str
    at: int
    rate: float
    """Reads a second of this process."""
    warm_up_s: float
    """Reads due so long after the start are made and not counted."""
    seconds: float
    users: int
    k: int
    seed: int
    redis: str
    namespace: str
    host: str
    port: int
    folder: str

    def file(self, suffix: str) -> Path:
        """Where this process and the one that started it leave each other word."""
        return Path(self.folder, f"reads-{self.how}-{self.at}.{suffix}")


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one reading process found."""

    due_ns: list[int]
    begun_ns: list[int]
    done_ns: list[int]
    """0: no answer came."""
    wrong: dict[str, int]
    """Answers that are no full list of k, by what they were instead."""
    cpu_ms_a_read: float
    """CPU of the reading process, its own pacing included."""


def schedule(task: Task) -> tuple[list[int], list[str]]:
    """How long after the start (ns) whose list is read: Poisson, users drawn uniformly."""
    rng = np.random.default_rng([task.seed, task.at])
    num = max(2, int(task.rate * (task.warm_up_s + task.seconds)))
    due_ns = (np.cumsum(rng.exponential(1 / task.rate, num)) * 1e9).astype(np.int64).tolist()
    return due_ns, [f"u{user}" for user in rng.integers(0, task.users, num).tolist()]


def read_redis(task: Task) -> Seen:
    """`TopK.get` when due, one after the other."""
    after_ns, users = schedule(task)
    begun_ns, done_ns, wrong = [], [], Counter[str]()
    with TopK(task.redis, namespace=task.namespace) as top:
        top.get("")
        start_ns = _start(task)
        due_ns = [start_ns + ns for ns in after_ns]
        cpu_s = time.process_time()
        for due, user in zip(due_ns, users, strict=True):
            wait_ns = due - time.monotonic_ns()
            if wait_ns > 0:
                time.sleep(wait_ns / 1e9)
            begun_ns.append(time.monotonic_ns())
            answer = top.get(user, task.k)
            done_ns.append(time.monotonic_ns())
            if len(answer.items) != task.k:
                wrong[f"{answer.source} of {len(answer.items)}"] += 1
        cpu_s = time.process_time() - cpu_s
    return Seen(
        due_ns=due_ns,
        begun_ns=begun_ns,
        done_ns=done_ns,
        wrong=dict(wrong),
        cpu_ms_a_read=1000 * cpu_s / len(due_ns),
    )


def read_http(task: Task) -> Seen:
    """One GET when due, on whichever connection is free."""
    # select() waits by the microsecond, epoll by the millisecond: the pace would lag by half of it.
    selector = selectors.SelectSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(_Requests(task).run())


class _Requests:
    """Paces requests over a pool of keep-alive connections."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.due_ns, users = schedule(task)
        self.paths = [f"/v1/top/{urllib.parse.quote(user)}?k={task.k}".encode() for user in users]
        self.begun_ns = [0] * len(users)
        self.done_ns = [0] * len(users)
        self.wrong = Counter[str]()
        self.left = len(users)
        self.free: list[_Connection] = []
        self.waiting: deque[int] = deque()
        self.connections = 0
        self.finished = asyncio.Event()

    async def run(self) -> Seen:
        await self.connect()
        start_ns = _start(self.task)
        self.due_ns = [start_ns + ns for ns in self.due_ns]
        cpu_s = time.process_time()
        for at, due in enumerate(self.due_ns):
            wait_ns = due - time.monotonic_ns()
            await asyncio.sleep(max(0.0, wait_ns / 1e9))
            self.begun_ns[at] = time.monotonic_ns()
            if self.free:
                self.free.pop().send(at, self.paths[at])
                continue
            self.waiting.append(at)
            if self.connections < CONNECTIONS_MAX:
                await self.connect()
        with contextlib.suppress(TimeoutError):  # what has no answer then counts as lost
            async with asyncio.timeout(DRAIN_S):
                await self.finished.wait()
        cpu_s = time.process_time() - cpu_s
        return Seen(
            due_ns=self.due_ns,
            begun_ns=self.begun_ns,
            done_ns=self.done_ns,
            wrong=dict(self.wrong),
            cpu_ms_a_read=1000 * cpu_s / len(self.due_ns),
        )

    async def connect(self) -> None:
        self.connections += 1
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self), self.task.host, self.task.port
        )
        self.release(connection)

    def release(self, connection: "_Connection") -> None:
        if self.waiting:
            at = self.waiting.popleft()
            connection.send(at, self.paths[at])
        else:
            self.free.append(connection)

    def answered(self, at: int, status: int, body: bytes) -> None:
        self.done_ns[at] = time.monotonic_ns()
        # Decoded for every answer: the client of an application does that too.
        if status != 200:
            self.wrong[f"status {status}: {body[:80].decode(errors='replace')}"] += 1
        elif len(answer := msgspec.json.decode(body, type=Top).items) != self.task.k:
            self.wrong[f"list of {len(answer)}"] += 1
        self.left -= 1
        if not self.left:
            self.finished.set()


class _Connection(asyncio.Protocol):
    """One request at a time; `httptools` calls the methods that begin with on_."""

    def __init__(self, requests: _Requests) -> None:
        self.requests = requests
        self.at = -1

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.requests.connections -= 1
        if self in self.requests.free:
            self.requests.free.remove(self)

    def send(self, at: int, path: bytes) -> None:
        self.at, self.body = at, bytearray()
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(b"GET %b HTTP/1.1\r\nHost: afterclick\r\n\r\n" % path)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.requests.answered(self.at, self.parser.get_status_code(), bytes(self.body))
        self.requests.release(self)


def _start(task: Task) -> int:
    """Say that all is ready, and wait for the common start: ns of the monotonic clock."""
    task.file("ready").touch()
    until_s = time.monotonic() + BEGIN_TIMEOUT_S
    while not task.file("begin").exists():
        if time.monotonic() > until_s:
            raise TimeoutError("nobody said when to begin")
        time.sleep(POLL_S)
    return int(task.file("begin").read_text())


def main(how: str) -> None:
    """Read, and write what was seen."""
    task = msgspec.json.decode(os.environ["READS"], type=Task)
    seen = {"redis": read_redis, "http": read_http}[how](task)
    task.file("json").write_bytes(msgspec.json.encode(seen))


if __name__ == "__main__":
    main(sys.argv[1])
