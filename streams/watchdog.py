"""Whether ingestion has stopped: records wait in the log and a partition does not move.

Faust's own watchdog compares a monotonic clock with wall-clock time and can never fire. This one
is told what the log holds by a connection of its own, because a consumer that has stopped fetching
also stops learning how long the log is. Pure: knows no clock, no Kafka and no Faust.

Only a stop that a restart may mend counts. A partition that is refused, opening, or waiting for
Redis, Kafka, a release or a hold is not foldable; records of an open or aborted transaction and
markers at the log's end do not wait.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Look(NamedTuple):
    """One partition as it stands at one moment."""

    position: int
    """Offset of the first record not yet folded."""
    waiting: bool
    """A committed record at or past `position` can be read from the log."""
    foldable: bool
    """Nothing outside this process keeps it from being folded."""


class Watchdog:
    """Remembers since when each partition has not moved although records wait.

    Args:
        stall_s: standing still for so long is a stop.
    """

    def __init__(self, stall_s: float) -> None:
        self.stalled: dict[int, float] = {}
        """Partitions that were stalled at the last look, and for how many seconds."""
        self._stall_s = stall_s
        self._positions: dict[int, int] = {}
        self._since_s: dict[int, float] = {}

    def unmoved(self, positions: Mapping[int, int]) -> dict[int, int]:
        """Those that stand where they stood at the last look: only these need the log asked."""
        return {
            partition: position
            for partition, position in positions.items()
            if self._positions.get(partition) == position
        }

    def observe(self, now_s: float, looks: Mapping[int, Look]) -> dict[int, float]:
        """Take one look at every partition held; the partitions that are stalled, with seconds.

        Args:
            now_s: monotonic clock.
            looks: partitions that are not in it are forgotten.
        """
        for partition in self._positions.keys() - looks.keys():
            self._since_s.pop(partition, None)
        for partition, look in looks.items():
            moved = self._positions.get(partition) != look.position
            if moved or not look.waiting or not look.foldable:
                self._since_s.pop(partition, None)
            if look.waiting and look.foldable:
                self._since_s.setdefault(partition, now_s)
        self._positions = {partition: look.position for partition, look in looks.items()}
        self.stalled = {
            partition: round(now_s - since_s, 1)
            for partition, since_s in self._since_s.items()
            if now_s - since_s >= self._stall_s
        }
        return self.stalled
