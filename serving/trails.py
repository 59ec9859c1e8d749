"""What came next to an item, the newest few hundred times: bounded, in order, for every item.

Entries of one item stand together in an arena, oldest first, with room to grow; only the newest
`WINDOW` of them are ever read. What is read depends on the entries pushed and their order alone,
not on how the pushes were cut. Knows no item ids. Shape letters: N items, E entries, X owners asked
for, G owners pushed to, A arena.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

WINDOW = 256
"""Newest entries of an item that count: more than a list has places, and what one look-up costs."""

SPARE_SHARE = 8
"""One entry to spare for so many, when an array of all items grows."""

ROOM_MIN = 4
"""Entries that an item's first room holds."""


class Trail(NamedTuple):
    """Trails as compiled loops read them: an item's entries end at begin + size."""

    begin_N: I64
    size_N: I64
    """At most `window` of them are read."""
    total_N: I64
    item_A: I32
    mark_A: I32
    ms_A: I64
    window: int


class Trails:
    """Per item its newest entries: another item, a mark, and the time in ms."""

    def __init__(self, num_items: int) -> None:
        self.total_N = np.zeros(num_items, np.int64)
        """Entries ever pushed."""
        self.item_A = np.zeros(1024, np.int32)
        self.mark_A = np.zeros(1024, np.int32)
        self.ms_A = np.zeros(1024, np.int64)
        self._begin_N = np.zeros(num_items, np.int64)
        self._size_N = np.zeros(num_items, np.int64)
        self._room_N = np.zeros(num_items, np.int64)
        self._used = 0
        self._spare = Spare()

    def grow(self, num_items: int) -> None:
        """Make room for items up to this number."""
        for name in ("total_N", "_begin_N", "_size_N", "_room_N"):
            setattr(self, name, self._spare.grown(name, getattr(self, name), num_items, 0))

    def push(self, owner_E: I64, item_E: I64, mark_E: I64, ms_E: I64) -> None:
        """Append entries, in order."""
        if not len(owner_E):
            return
        order = np.argsort(owner_E, kind="stable")
        owner_E = owner_E[order]
        first_G = np.flatnonzero(np.diff(owner_E, prepend=-1))
        own_G, count_G = owner_E[first_G], np.diff(first_G, append=len(owner_E))
        self.total_N[own_G] += count_G
        new_G = np.minimum(count_G, WINDOW)
        tight = self._size_N[own_G] + new_G > self._room_N[own_G]
        if tight.any():
            self._move(own_G[tight], new_G[tight])
        entry = ranges(first_G + count_G - new_G, new_G)
        at = ranges(self._begin_N[own_G] + self._size_N[own_G], new_G)
        source = order[entry]
        self.item_A[at], self.mark_A[at], self.ms_A[at] = (
            item_E[source],
            mark_E[source],
            ms_E[source],
        )
        self._size_N[own_G] += new_G

    def read(self) -> Trail:
        """What is there now, not copied: good until the next push."""
        arenas = self.item_A, self.mark_A, self.ms_A
        return Trail(self._begin_N, self._size_N, self.total_N, *arenas, WINDOW)

    def find(self, owner_X: I64, newest: int = WINDOW) -> tuple[I64, I64]:
        """Number in `owner_X`, and place in the arena, of each owner's newest entries.

        Oldest first; a negative owner has none.
        """
        size_X = np.where(owner_X < 0, 0, self._size_N[owner_X])
        count_X = np.minimum(size_X, newest)
        at_E = ranges(self._begin_N[owner_X] + size_X - count_X, count_X)
        return np.repeat(np.arange(len(owner_X)), count_X), at_E

    def dump(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that is ever read, item after item."""
        owner_X = np.arange(len(self.total_N))
        at = self.find(owner_X)[1]
        return {
            "total": self.total_N,
            "size": np.minimum(self._size_N, WINDOW),
            "item": self.item_A[at],
            "mark": self.mark_A[at],
            "ms": self.ms_A[at],
        }

    @classmethod
    def restored(cls, data: dict[str, npt.NDArray[Any]]) -> "Trails":
        """From what `dump` gave.

        Raises:
            ValueError, IndexError: the arrays do not fit each other.
        """
        trails = cls(len(data["size"]))
        owner_E = np.repeat(np.arange(len(data["size"])), data["size"])
        trails.push(owner_E, data["item"], data["mark"], data["ms"])
        trails.total_N = data["total"].astype(np.int64)
        return trails

    def _move(self, own_G: I64, new_G: I64) -> None:
        """Give these items room for so many more."""
        kept_G = np.minimum(self._size_N[own_G], WINDOW)
        need_G = kept_G + new_G
        room_G = np.maximum(need_G + np.minimum(need_G, WINDOW), ROOM_MIN)
        if self._used + int(room_G.sum()) > len(self.item_A):
            self._compact(int(room_G.sum()))
        begin_G = self._used + np.cumsum(room_G) - room_G
        source = ranges(self._begin_N[own_G] + self._size_N[own_G] - kept_G, kept_G)
        target = ranges(begin_G, kept_G)
        for array in (self.item_A, self.mark_A, self.ms_A):
            array[target] = array[source]
        self._begin_N[own_G], self._size_N[own_G] = begin_G, kept_G
        self._room_N[own_G] = room_G
        self._used += int(room_G.sum())

    def _compact(self, extra: int) -> None:
        """Drop rooms that were left and entries that no one reads; make place for more."""
        kept_N = np.minimum(self._size_N, WINDOW)
        # What is left of a room stays its own, so that compacting does not make moves.
        room_N = np.minimum(self._room_N, kept_N + WINDOW)
        source = ranges(self._begin_N + self._size_N - kept_N, kept_N)
        self._begin_N = np.cumsum(room_N) - room_N
        self._size_N, self._room_N, self._used = kept_N, room_N, int(room_N.sum())
        target = ranges(self._begin_N, kept_N)
        for name in ("item_A", "mark_A", "ms_A"):
            old = getattr(self, name)
            fresh = np.zeros(2 * (self._used + extra), old.dtype)
            fresh[target] = old[source]
            setattr(self, name, fresh)


class Spare:
    """Arrays that grow by one item at a time without being copied each time."""

    def __init__(self) -> None:
        self._whole: dict[str, npt.NDArray[Any]] = {}

    def grown(
        self, name: str, array: npt.NDArray[Any], size: int, fill: object
    ) -> npt.NDArray[Any]:
        """The array with so many entries, new ones filled; it may share memory with the old one.

        Only the array that was given out last under this name is taken up where it stands.
        """
        whole = self._whole.get(name)
        if whole is None or array.base is not whole or len(whole) < size:
            whole = np.full((size + size // SPARE_SHARE + 1, *array.shape[1:]), fill, array.dtype)
            whole[: len(array)] = array
            self._whole[name] = whole
        return whole[:size]


def ranges(begin_X: I64, count_X: I64) -> I64:
    """All whole numbers begin, begin + 1, … of so many each, one range after the other."""
    end_X = count_X.cumsum()
    if not len(end_X):
        return end_X
    all_E: I64 = (begin_X - end_X + count_X).repeat(count_X)
    all_E += np.arange(len(all_E))
    return all_E


def place_in_group(group_E: I64) -> I64:
    """How many entries of the same group stand before each; equal groups stand together."""
    first = np.flatnonzero(np.diff(group_E, prepend=-1))
    size = np.diff(first, append=len(group_E))
    return np.arange(len(group_E)) - np.repeat(first, size)
