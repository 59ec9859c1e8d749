"""Looks at the heads all the time: when what was sent is folded, and how long lists stood still."""

import threading
import time
from typing import Self

import msgspec

from afterclick.serving.errors import UnavailableError
from afterclick.serving.records import Head
from afterclick.serving.store import Store
from tests.fault.load import Load

LOOK_EVERY_S = 0.02

LEAD_S = 0.2
"""Clicks that come so soon after a mark belong to it: at the moment itself all may be folded, and a
worker that dies then is missed a moment later.
"""


class Mark:
    """A moment: what was sent by then, and just after, must be folded."""

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.reached = threading.Event()
        self.took_s = 0.0
        self.sent: dict[int, int] | None = None
        """Records sent to each partition, once `LEAD_S` is over."""
        self.goal: dict[int, int] = {}
        """Where the last of these stands in the log, for partitions whose log has it."""


class Watch:
    """A thread with a connection of its own, from `with` on.

    Args:
        store: to look at the heads through.
        load: what is sent.
        num_partitions: of the clicks topic.
    """

    def __init__(self, store: Store, load: Load, num_partitions: int) -> None:
        self.heads: dict[int, int] = {}
        self.stood_s = 0.0
        """Longest time that a partition's head did not move since `begin`."""
        self._store, self._load, self._num_partitions = store, load, num_partitions
        self._moved_s: dict[int, float] = {}
        self._marks: list[Mark] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._store.close()

    def mark(self) -> Mark:
        """From now on: when are lists fresh again?"""
        mark = Mark(time.monotonic())
        with self._lock:
            self._marks.append(mark)
        return mark

    def begin(self) -> None:
        """Measure the standstill anew."""
        self.stood_s = 0.0

    def _run(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            try:
                found = read_heads(self._store, self._num_partitions)
            except UnavailableError:
                found = {}
            now_s = time.monotonic()
            for partition, head in found.items():
                if self.heads.get(partition) != head:
                    self._moved_s[partition] = now_s
            self.heads |= found
            for moved_s in self._moved_s.values():
                self.stood_s = max(self.stood_s, now_s - moved_s)
            with self._lock:
                self._marks = [mark for mark in self._marks if not self._reached(mark, found)]

    def _reached(self, mark: Mark, heads: dict[int, int]) -> bool:
        now_s = time.monotonic()
        if mark.sent is None:
            if now_s < mark.began_s + LEAD_S:
                return False
            mark.sent = dict(self._load.sent)
        for partition, sent in mark.sent.items():
            if partition not in mark.goal and self._load.taken[partition] >= sent:
                mark.goal[partition] = self._load.ends[partition]
        if len(mark.goal) < len(mark.sent) or any(
            heads.get(partition, 0) < end for partition, end in mark.goal.items()
        ):
            return False
        mark.took_s = now_s - mark.began_s
        mark.reached.set()
        return True


def read_heads(store: Store, num_partitions: int) -> dict[int, int]:
    """Offset that each partition is folded to.

    Raises:
        UnavailableError: Redis does not answer.
    """
    heads = {}
    for partition in range(num_partitions):
        stored = store.read(partition, []).head
        heads[partition] = msgspec.json.decode(stored, type=Head).next if stored else 0
    return heads
