"""Session neighbours for the worker: items of past sessions that share the user's last items.

In the manner of VMIS-kNN (Kersbergen, Sprangers, Schelter; SIGMOD 2022) and VSTAN (Ludewig et al.,
2021): of each of the last few items the newest sessions that hold it; a session's similarity is the
sum of the weights of the shared places, which fall with their distance from the end; the most
similar sessions stay, the newer of equals first; an item scores the sum of their similarities,
falling with its distance from the shared item and rising with its rarity.

The index comes with the release and never changes, so a look-up (`candidates.near_items`) costs at
most `LAST` x sessions per item + neighbours x `PIECE` entries, whatever the log's length. Knows no
item ids. Shape letters: N items, S sessions, P positions, E entries.
"""

import numpy as np
import numpy.typing as npt

from afterclick.serving.candidates import PIECE, Sessions
from afterclick.serving.trails import ranges

I64 = npt.NDArray[np.int64]

_POSITION_BITS = 5
assert 1 << _POSITION_BITS == PIECE


def index_sessions(start_S1: I64, item_P: I64, num_items: int, per_item: int) -> Sessions:
    """Index sessions that stand in order of time.

    Args:
        start_S1: session s holds positions start[s] to start[s + 1].
        item_P: item of each position; a negative one is left out.
        num_items: N.
        per_item: newest sessions kept for an item; sessions that no item keeps are dropped.
    """
    size_S = np.diff(start_S1)
    piece_S = -(-size_S // PIECE)
    number = np.arange(int(piece_S.sum())) - np.repeat(np.cumsum(piece_S) - piece_S, piece_S)
    start = np.repeat(start_S1[:-1], piece_S) + number * PIECE
    size = np.minimum(np.repeat(start_S1[1:], piece_S) - start, PIECE)
    start, size = start[size > 1], size[size > 1]
    session_P = np.repeat(np.arange(len(start)), size)
    item, position = item_P[ranges(start, size)], ranges(np.zeros_like(size), size)
    known = item >= 0
    # Of an item in a session the last place; of an item's sessions the newest.
    key = (item[known] * max(len(start), 1) + session_P[known]) * PIECE + position[known]
    key.sort()
    key = key[np.diff(key >> _POSITION_BITS, append=-1) != 0]
    pair, position = key >> _POSITION_BITS, key & (PIECE - 1)
    item_E, session_E = np.divmod(pair[::-1], max(len(start), 1))
    position_E = position[::-1]
    # From the last item to the first, newest session first: put the items back in order.
    order = np.argsort(item_E, kind="stable")
    item_E, session_E, position_E = item_E[order], session_E[order], position_E[order]
    count_N = np.bincount(item_E, minlength=num_items)
    begin_N = np.cumsum(count_N) - count_N
    kept_N = np.minimum(count_N, per_item)
    at = ranges(begin_N, kept_N)
    session_E, position_E = session_E[at], position_E[at]
    used = np.zeros(len(start), bool)
    used[session_E] = True
    renumbered = np.cumsum(used) - 1
    return Sessions(
        np.concatenate([[0], np.cumsum(size[used])]).astype(np.int64),
        item_P[ranges(start[used], size[used])].astype(np.int32),
        np.concatenate([[0], np.cumsum(kept_N)]).astype(np.int64),
        renumbered[session_E].astype(np.int32),
        position_E.astype(np.int8),
        1.0 + np.log(max(len(start), 1) / np.maximum(count_N, 1)),
    )
