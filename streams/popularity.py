"""Decayed popularity of one partition: integer counts per hour of event time, summed with integer
weights.

Pure: a function of the partition's clicks in log order. Integers, because a sum of floats would
depend on the
order in which a restarted worker reads its hours back. The clock is the latest event time seen, so
a log
replayed tomorrow gives the same lists.
"""

import heapq
from collections.abc import Callable, Container, Iterable

BUCKET_MS = 3600 * 1000
WEIGHT_NOW = 1 << 20
"""Weight of a click of the running hour."""
HALF_LIVES = 8
"""Hours older than this many half-lives weigh under 0.4% and are dropped."""


class Popularity:
    """Counts and their weighted sums; changed by `add` only."""

    def __init__(self, *, half_life_s: int, items_max: int) -> None:
        self.watermark_ms = 0
        self._items_max = items_max
        window = max(1, -(-half_life_s * HALF_LIVES * 1000 // BUCKET_MS))
        self._weights = [
            round(WEIGHT_NOW * 0.5 ** (age * BUCKET_MS / 1000 / half_life_s))
            for age in range(window)
        ]
        self._hours: dict[int, dict[str, int]] = {}
        self._scores: dict[str, int] = {}

    @property
    def window_s(self) -> int:
        """How far back an hour still counts."""
        return len(self._weights) * BUCKET_MS // 1000

    def buckets(self, watermark_ms: int) -> range:
        """Hours that count when the clock shows `watermark_ms`."""
        last = watermark_ms // BUCKET_MS
        return range(max(0, last - len(self._weights) + 1), last + 1)

    def load(self, watermark_ms: int, hours: dict[int, dict[str, int]]) -> None:
        """Take what a former worker counted."""
        self.watermark_ms = watermark_ms
        self._hours = {hour: dict(counts) for hour, counts in hours.items()}
        self._weigh()

    def add(self, item_id: str, event_ms: int) -> int | None:
        """Count one click.

        Returns:
            The hour it was counted in; None when it is too old, or the hour is full of other items.
        """
        if event_ms > self.watermark_ms:
            turned = event_ms // BUCKET_MS != self.watermark_ms // BUCKET_MS
            self.watermark_ms = event_ms
            if turned:
                self._weigh()
        hour = event_ms // BUCKET_MS
        age = self.watermark_ms // BUCKET_MS - hour
        if age >= len(self._weights):
            return None
        counts = self._hours.setdefault(hour, {})
        if item_id not in counts and len(counts) >= self._items_max:
            return None
        counts[item_id] = counts.get(item_id, 0) + 1
        self._scores[item_id] = self._scores.get(item_id, 0) + self._weights[age]
        return hour

    def top(
        self, num: int, *, available: Callable[[str], bool], drop: Container[str] = ()
    ) -> list[tuple[str, int]]:
        """Best items with their scores, ties by item id."""
        return _best(self._scores, num, available, drop)

    def summary(self, num: int, *, available: Callable[[str], bool]) -> list[tuple[str, int]]:
        """`top` for another thread than the one that counts.

        Copying a dict of strings is one step of the interpreter; walking one that grows raises.
        """
        return _best(self._scores.copy(), num, available, ())

    def _weigh(self) -> None:
        kept = self.buckets(self.watermark_ms)
        self._hours = {hour: counts for hour, counts in self._hours.items() if hour in kept}
        scores: dict[str, int] = {}
        for hour, counts in self._hours.items():
            weight = self._weights[kept[-1] - hour]
            for item, count in counts.items():
                scores[item] = scores.get(item, 0) + weight * count
        self._scores = scores


def _floor(scores: Iterable[int], num: int) -> int:
    """A score that at least `num` items reach, 0 where there are not that many."""
    largest = heapq.nlargest(num, scores)
    return largest[-1] if len(largest) == num else 0


def _best(
    scores: dict[str, int], num: int, available: Callable[[str], bool], drop: Container[str]
) -> list[tuple[str, int]]:
    # Only a few hundred of many thousand items can reach the list: sort those, not all.
    floor = _floor(scores.values(), num + 256)
    while True:
        ranked = sorted((-score, item) for item, score in scores.items() if score >= floor)
        best = [
            (item, -negative) for negative, item in ranked if item not in drop and available(item)
        ]
        if len(best) >= num or floor == 0:
            return best[:num]
        floor = 0
