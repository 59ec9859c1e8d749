"""Whose lists a partition makes anew while no click waits: recently active users, a few at a time.

Pure but for the clock that it is handed. Knows no Redis and no fold; assignment.py asks it and does
the work.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

BATCH_USERS = 16
"""Users of one renewal: after a swap each may need 50 steps, and a click waits behind them."""


class Basis(NamedTuple):
    """What lists rest on besides their users' clicks."""

    publication: int
    items: tuple[int, ...]
    signals: int = 0


class Renewal:
    """One partition's passes over its recent users.

    Args:
        users_max: users of one pass; 0 never renews.
        every_s: least time between two passes when only catalogue or signals moved. A publication
            starts one at once.
        basis: what the lists found at the start rest on.
        now_s: any clock.
    """

    def __init__(self, users_max: int, every_s: float, basis: Basis, now_s: float) -> None:
        self._users_max = users_max
        self._every_s = every_s
        self._basis = basis
        self._begun_s = now_s
        self._waiting: deque[str] = deque()

    def pending(self, basis: Basis, now_s: float) -> bool:
        """Whether `batch` may have somebody."""
        return bool(self._waiting) or self._moved(basis, now_s)

    def batch(self, basis: Basis, recent: Callable[[int], list[str]], now_s: float) -> list[str]:
        """Users to renew now; none when nothing moved or the pass is through.

        Args:
            basis: what new lists would rest on.
            recent: users active last, newest first, at most as many as asked for.
            now_s: the clock of `__init__`.
        """
        if self._moved(basis, now_s):
            self._waiting = deque(recent(self._users_max))
            self._basis, self._begun_s = basis, now_s
        size = min(BATCH_USERS, len(self._waiting))
        return [self._waiting.popleft() for _ in range(size)]

    def put_back(self, users: list[str]) -> None:
        """Have a batch again that could not be written."""
        self._waiting.extendleft(reversed(users))

    def _moved(self, basis: Basis, now_s: float) -> bool:
        if not self._users_max or basis == self._basis:
            return False
        swapped = basis.publication != self._basis.publication
        return swapped or now_s - self._begun_s >= self._every_s
