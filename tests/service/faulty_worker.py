"""A worker with one fault in it: `python -m tests.service.faulty_worker FAULT`, then SIGUSR1.

What these faults stand for happened to Faust's users: fetching that stops while heartbeats go on,
threads and tasks that end or hang.
"""

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from afterclick.serving.settings import serving_settings
from afterclick.streams import app
from afterclick.streams.settings import streams_settings


def paused(worker: Any) -> None:
    """The consumer fetches no more, stays in its group and answers heartbeats."""
    worker._consumer.pause_partitions(worker._consumer.assignment())


def fetch_fails(worker: Any) -> None:
    """An exception in the task that fetches."""

    async def broken(_timeout_s: float) -> Any:
        raise RuntimeError("injected: fetching failed")

    worker._consumer._wait_next_records = broken


def thread_ends(worker: Any) -> None:
    """The event loop of Faust's consumer thread stops."""
    thread = worker._consumer._thread
    thread.thread_loop.call_soon_threadsafe(thread.thread_loop.stop)


def agent_fails(worker: Any) -> None:
    """An exception in the agent."""

    def broken(_chunk: Any) -> None:
        raise RuntimeError("injected: the agent failed")

    for held in worker.held.values():
        held.deliver = broken


def partition_ends(worker: Any) -> None:
    """The task of a partition is cancelled by something else than us."""
    for held in worker.held.values():
        held._task.cancel()


FAULTS: dict[str, Callable[[Any], None]] = {
    fault.__name__: fault
    for fault in (paused, fetch_fails, thread_ends, agent_fails, partition_ends)
}

STUCK_S = 3.0
"""Instead of a minute."""


def main() -> NoReturn:
    """Run until the fault ends it, or a signal."""
    fault = FAULTS[sys.argv[1]]
    prepare = app.Worker.prepare

    @functools.wraps(prepare)
    async def armed(worker: Any) -> None:
        await prepare(worker)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, fault, worker)

    app.Worker.prepare = armed  # type: ignore[method-assign]
    app.STUCK_S = STUCK_S
    app.run_worker(serving_settings(os.environ), streams_settings(os.environ))


if __name__ == "__main__":
    main()
