"""Live accuracy: the list that stood before each click, beside popularity and a Markov chain.

Prequential: every click is ranked first and learnt from then. Ties count against us, nothing is
filtered, and the mean is over all clicks that name an item. Pure: no I/O, no clock but event time.
"""

import bisect
from collections import deque
from collections.abc import Sequence

import msgspec

K = 20
DAY_MS = 24 * 3600 * 1000

RECENT = 500
"""Clicks of the moving rate."""

MISS = 1 << 60
"""Rank of an item that is not ranked at all."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Fractions over all clicks so far."""

    clicks: int
    hit_rate_20: float
    mrr_20: float
    recent_hit_rate_20: float
    """Over the last `RECENT` clicks."""


class Tally:
    """Hits and reciprocal ranks of one method."""

    def __init__(self) -> None:
        self._clicks = 0
        self._hits = 0
        self._reciprocal = 0.0
        self._recent: deque[bool] = deque(maxlen=RECENT)

    def add(self, rank: int) -> None:
        """Count one click; rank 1 is best."""
        hit = rank <= K
        self._clicks += 1
        self._hits += hit
        self._reciprocal += 1.0 / rank if hit else 0.0
        self._recent.append(hit)

    def rates(self) -> Rates:
        """Where it stands; zeros before the first click."""
        clicks = max(self._clicks, 1)
        return Rates(
            clicks=self._clicks,
            hit_rate_20=self._hits / clicks,
            mrr_20=self._reciprocal / clicks,
            recent_hit_rate_20=sum(self._recent) / max(len(self._recent), 1),
        )


class Popularity:
    """Clicks per item within a window of event time; ranks in O(log items)."""

    def __init__(self, window_ms: int = DAY_MS) -> None:
        self._window_ms = window_ms
        self._counts: dict[str, int] = {}
        self._sorted: list[int] = []
        """All counts, ascending: the last entry equal to c may become c + 1 where it stands."""
        self._clicks: deque[tuple[int, str]] = deque()

    def count(self, item: str) -> int:
        """Clicks of an item within the window."""
        return self._counts.get(item, 0)

    def rank(self, item: str) -> int:
        """Items with as many clicks or more, itself among them; `MISS` for one without a click."""
        count = self._counts.get(item, 0)
        if not count:
            return MISS
        return len(self._sorted) - bisect.bisect_left(self._sorted, count)

    def learn(self, item: str, time_ms: int) -> None:
        """Count a click; clicks that fell out of the window are taken back."""
        self._clicks.append((time_ms, item))
        self._move(item, 1)
        while self._clicks[0][0] <= time_ms - self._window_ms:
            self._move(self._clicks.popleft()[1], -1)

    def _move(self, item: str, change: int) -> None:
        count = self._counts.get(item, 0)
        if not count:
            self._sorted.insert(0, 0)
        if change > 0:
            self._sorted[bisect.bisect_right(self._sorted, count) - 1] += 1
        else:
            self._sorted[bisect.bisect_left(self._sorted, count)] -= 1
        self._counts[item] = count + change
        if not self._counts[item]:
            del self._counts[item]
            self._sorted.pop(0)


class Markov:
    """What came right after a user's last item, most often first; then popularity."""

    def __init__(self, popularity: Popularity) -> None:
        self._popularity = popularity
        self._after: dict[str, dict[str, int]] = {}
        self._last: dict[str, str] = {}

    def rank(self, user: str, item: str) -> int:
        """Place of an item for a user; equal counts stand by popularity."""
        popularity = self._popularity
        after = self._after.get(self._last.get(user, ""), {})
        popular = popularity.count(item)
        if item in after:
            own = (after[item], popular)
            return sum(
                count > own[0] or (count == own[0] and popularity.count(other) >= popular)
                for other, count in after.items()
            )
        rank = popularity.rank(item)
        if rank == MISS:
            return MISS
        ahead = sum(popularity.count(other) >= popular for other in after)
        return len(after) + rank - ahead

    def learn(self, user: str, item: str) -> None:
        """Count the step from the user's last item to this one."""
        last = self._last.get(user)
        if last is not None:
            after = self._after.setdefault(last, {})
            after[item] = after.get(item, 0) + 1
        self._last[user] = item


class Score:
    """The three methods on one stream of clicks."""

    def __init__(self) -> None:
        self._popularity = Popularity()
        self._markov = Markov(self._popularity)
        self._tallies = {"lists": Tally(), "popularity": Tally(), "markov": Tally()}

    def learn(self, user: str, item: str, time_ms: int) -> None:
        """Take in a click of the past without ranking it."""
        self._markov.learn(user, item)
        self._popularity.learn(item, time_ms)

    def observe(self, user: str, item: str, time_ms: int, standing: Sequence[str]) -> int:
        """Rank a click under all methods, then learn from it.

        Args:
            user: who clicked.
            item: what.
            time_ms: event time.
            standing: the list a reader was given just before, best first.

        Returns:
            The click's place in the standing list, `MISS` where it is not in its first 20.
        """
        own = next((at for at, other in enumerate(standing[:K], 1) if other == item), MISS)
        self._tallies["lists"].add(own)
        self._tallies["popularity"].add(self._popularity.rank(item))
        self._tallies["markov"].add(self._markov.rank(user, item))
        self.learn(user, item, time_ms)
        return own

    def rates(self) -> dict[str, Rates]:
        """Of `lists` (what stood in Redis), `popularity` (24 h) and `markov`."""
        return {name: tally.rates() for name, tally in self._tallies.items()}
