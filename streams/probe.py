"""From click to list, seen from outside: when a reader finds the list that answers a click.

A thread of its own asks Redis for the lists of all users who wait, again and again. Knows nothing
of workers; what it sees is what an application would see.
"""

import threading
import time
from collections import deque
from typing import NamedTuple, Self

from afterclick.serving.errors import AfterclickError
from afterclick.serving.reader import TopK

POLL_S = 0.002
"""Pause between two looks: what a measured latency may be too long by, with the look's own time."""

GIVE_UP_S = 30.0
"""A click without an answer for so long is counted as unseen; a rebalance takes less."""

USERS_AT_ONCE = 512
"""Waiting users asked for in one look, the longest waiting first."""

LATENCIES_MAX = 200_000
"""Newest measurements kept: over an hour of the demo."""


class _Waiting:
    """One user's clicks that have no list yet."""

    __slots__ = ("clicks", "seen")

    def __init__(self) -> None:
        self.clicks: list[Sent] = []
        self.seen: list[tuple[int, float]] = []
        """Offsets of the user's lists and when each was first seen, ascending."""


class Sent:
    """A click on its way; `placed` is told its offset by the producer's thread."""

    __slots__ = ("offset", "sent_s", "user")

    def __init__(self, user: str, sent_s: float) -> None:
        self.user = user
        self.sent_s = sent_s
        self.offset: int | None = None

    def placed(self, partition: int, offset: int) -> None:
        """The broker's acknowledgement; the partition is that of the user anyway."""
        del partition
        self.offset = offset


class Seen(NamedTuple):
    """What the probe found so far."""

    lists: int
    """Clicks whose list was seen."""
    unseen: int
    """Clicks given up after `GIVE_UP_S`."""
    waiting: int
    latency_ms_p50: float | None
    latency_ms_p99: float | None
    publication: int
    """Highest one in any list seen."""
    release: str
    swaps: int
    """Times a higher publication than any before was seen in a list, after the first."""


class Probe:
    """Watches lists from a thread; use as a context manager.

    Args:
        redis_url: where lists stand.
        namespace: of their keys.
    """

    def __init__(self, redis_url: str, namespace: str) -> None:
        self._reader = TopK(redis_url, namespace=namespace)
        self._lock = threading.Lock()
        self._waiting: dict[str, _Waiting] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._latencies_ms: deque[float] = deque(maxlen=LATENCIES_MAX)
        self._unseen = 0
        self._lists = 0
        self._publication = 0
        self._release = ""
        self._swaps = 0
        self.error: AfterclickError | None = None
        """What went wrong at the last look; None when it went well."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._reader.close()

    def sending(self, user: str) -> Sent:
        """Begin to watch for a click that is about to be sent; the clock starts here."""
        sent = Sent(user, time.monotonic())
        with self._lock:
            self._waiting.setdefault(user, _Waiting()).clicks.append(sent)
        return sent

    def seen(self) -> Seen:
        """Everything so far."""
        with self._lock:
            ordered = sorted(self._latencies_ms)
            waiting = sum(len(user.clicks) for user in self._waiting.values())
            return Seen(
                self._lists,
                self._unseen,
                waiting,
                percentile(ordered, 0.5),
                percentile(ordered, 0.99),
                self._publication,
                self._release,
                self._swaps,
            )

    def wait_settled(self, timeout_s: float) -> bool:
        """Return once no click waits; False where some still do after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            with self._lock:
                if not self._waiting:
                    return True
            self._stop.wait(0.01)
        return False

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                users = list(self._waiting)[:USERS_AT_ONCE]
            if users:
                try:
                    self._look(users)
                    self.error = None
                except AfterclickError as error:  # an outage: the lists may come later
                    self.error = error
            self._stop.wait(POLL_S)

    def _look(self, users: list[str]) -> None:
        tops = self._reader.get_many(users, 1)
        now_s = time.monotonic()
        with self._lock:
            for user, top in zip(users, tops, strict=True):
                waiting = self._waiting[user]
                if top.source in ("model", "popularity"):
                    self._notice(top.publication, top.release)
                    if not waiting.seen or top.offset > waiting.seen[-1][0]:
                        waiting.seen.append((top.offset, now_s))
                waiting.clicks = [
                    click for click in waiting.clicks if not self._answered(click, waiting, now_s)
                ]
                if not waiting.clicks:
                    del self._waiting[user]

    def _answered(self, click: Sent, waiting: _Waiting, now_s: float) -> bool:
        if click.offset is not None:
            for offset, at_s in waiting.seen:
                # A list can be there before the acknowledgement: then it was seen before it.
                if offset >= click.offset:
                    self._latencies_ms.append((at_s - click.sent_s) * 1000)
                    self._lists += 1
                    return True
        if now_s - click.sent_s > GIVE_UP_S:
            self._unseen += 1
            return True
        return False

    def _notice(self, publication: int, release: str) -> None:
        if publication > self._publication:
            self._swaps += self._publication > 0
            self._publication, self._release = publication, release


def percentile(ordered: list[float], share: float) -> float | None:
    """Nearest-rank percentile of an ascending list; None of an empty one."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
