"""`afterclick worker --processes N`: several workers on one machine, kept running.

One interpreter runs its Python in one thread at a time, so a worker computes on some 1.5 cores; a
machine is filled by several. Each is a worker like any other, with a port of its own: a member of
the group, which gives it its share of the partitions. They know nothing of each other, and this
process knows nothing of what they do: it starts them, starts those again that end by themselves,
and ends them all when it is told to.

Members are static ones: Kafka keeps the place of one that was killed until its session is over. Who
comes back by then goes on, and the others do not notice; a new member would have made all of them
stand until then (others' partitions stood for 13 s of a session of 20 s). But a static member does
not leave the group when it ends in order, so all are taken out of it here.
"""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.streams.admin import leave_group
from afterclick.streams.processes import Process
from afterclick.streams.settings import StreamsSettings, fold_threads

LOOK_EVERY_S = 0.2
RESTART_S, RESTART_MAX_S = 1.0, 30.0
"""Pause before a worker is started again: doubled each time, so that what ends it at once does not
keep a core and the group busy.
"""
STEADY_S = 60.0
"""Who ran for so long is started again after the shortest pause."""
GRACE_S = 5.0
"""Beyond the worker's own `stop_timeout_s`, after which it ends itself."""
LEAVE_S = 3.0
"""Longest wait for Kafka when the group is left."""

log = logging.getLogger(__name__)


def supervise(
    streams: StreamsSettings,
    argv: Sequence[str],
    *,
    leave: Callable[[StreamsSettings, Sequence[str], float], None] = leave_group,
) -> int:
    """Run `streams.processes` workers until SIGTERM or SIGINT; 0, or 2 where one of them ended so
    soon after its first start.

    Args:
        streams: of which port, instance and `fold_threads` are made for each.
        argv: starts one worker, which listens on `AFTERCLICK_STREAMS__PORT`.
        leave: takes static members of these names out of the group; not those that `instance`
            named, whose places may be wanted after a restart.
    """
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [%(process)s] %(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    name = streams.instance or secrets.token_hex(6)
    members = [_Member(streams, at, f"{name}-{at}", argv) for at in range(streams.processes)]
    try:
        for member in members:
            member.start()
        while not stop.wait(LOOK_EVERY_S):
            for member in members:
                if not member.look():
                    return ConfigError.exit_code
        return 0
    finally:
        log.info("stopping %d workers", len(members))
        with ThreadPoolExecutor(len(members)) as threads:  # all at the same time
            list(threads.map(_Member.stop, members))
        if not streams.instance:
            try:
                leave(streams, [member.instance for member in members], LEAVE_S)
            except (ConfigError, UnavailableError) as error:
                log.warning("%s; their partitions stand until their sessions are over", error)


class _Member:
    """One of the workers."""

    def __init__(
        self, streams: StreamsSettings, at: int, instance: str, argv: Sequence[str]
    ) -> None:
        self.instance = instance
        port = streams.port and streams.port + at
        env = {
            "AFTERCLICK_STREAMS__PROCESSES": "1",
            "AFTERCLICK_STREAMS__PORT": str(port),
            "AFTERCLICK_STREAMS__FOLD_THREADS": str(fold_threads(streams, os.cpu_count() or 1)),
            "AFTERCLICK_STREAMS__INSTANCE": instance,
        }
        where = f"port {port}" if port else "a free port"
        name = f"worker {at + 1} of {streams.processes}, {where}"
        self._process = Process(name, argv, env={**os.environ, **env})
        self._stop_timeout_s = streams.stop_timeout_s + GRACE_S
        self._pause_s = RESTART_S
        self._begun_s = 0.0
        self._due_s: float | None = None
        self._is_first = True

    def start(self) -> None:
        self._process.start()
        self._begun_s, self._due_s = time.monotonic(), None
        log.info("%s: started as process %d", self._process.name, self._process.pid)

    def look(self) -> bool:
        """Start it again if that is due; False if no new start can help."""
        code = self._process.exit_code
        if code is None:
            return True
        now_s = time.monotonic()
        if self._due_s is None:
            self._process.kill()  # what it may have left of its group
            was_first, self._is_first = self._is_first, False
            if now_s - self._begun_s >= STEADY_S:
                self._pause_s = RESTART_S
            elif was_first and code == ConfigError.exit_code:
                log.error("%s: ended with %d, which no new start helps", self._process.name, code)
                return False
            self._due_s = now_s + self._pause_s
            log.error(
                "%s: ended by itself with %d; started again in %g s",
                self._process.name, code, self._pause_s,
            )  # fmt: skip
            self._pause_s = min(2 * self._pause_s, RESTART_MAX_S)
        elif now_s >= self._due_s:
            self.start()
        return True

    def stop(self) -> None:
        self._process.terminate(self._stop_timeout_s)
