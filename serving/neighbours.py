"""Session neighbours for the worker: items of past sessions that share the user's last items.

In the manner of VMIS-kNN (Kersbergen, Sprangers, Schelter; SIGMOD 2022) and VSTAN (Ludewig et al.,
2021): of each of the last few items the newest sessions that hold it; a session's similarity is the
sum of the weights of the shared places, which fall with their distance from the end; the most
similar sessions stay, the newer of equals first; an item scores the sum of their similarities,
falling with its distance from the shared item and rising with its rarity.

The index comes with the release and never changes, so a look-up costs at most
`LAST` x sessions per item + neighbours x `PIECE` entries, whatever the log's length. Knows no item
ids. Shape letters: N items, S sessions, P positions, E entries, B users, L places.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.trails import place_in_group, ranges

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

LAST = 5
"""Places of the user's past that are looked up."""

PIECE = 32
"""Longest session in the index; a longer one is cut into pieces. Fits `_POSITION_BITS`."""

PLACE_FALL = 1.0
"""A place's weight falls by exp(-1/this) for each step back. From the probe on yoochoose."""

DISTANCE_FALL = 2.0
"""An item's share of its session falls by exp(-1/this) for each step from the shared item."""

BACKWARD = 1.5
"""A step back from the shared item counts as so many forward."""

_POSITION_BITS, _PLACE_BITS, _MASK_BITS = 5, 3, LAST
_WEIGHT_L = np.exp(-np.arange(LAST) / PLACE_FALL)
_MASKS = np.arange(1 << _MASK_BITS)
_SIMILARITY = ((_MASKS[:, None] >> np.arange(LAST) & 1) * _WEIGHT_L).sum(axis=1)
_LEVEL = np.empty(len(_MASKS), np.int64)
_LEVEL[np.argsort(-_SIMILARITY, kind="stable")] = _MASKS
_MASK_OF_LEVEL = np.argsort(_LEVEL)
_DISTANCES = np.arange(-PIECE, PIECE + 1)
_NEARNESS = np.exp(
    -(np.where(_DISTANCES < 0, -BACKWARD * _DISTANCES, _DISTANCES) - 1) / DISTANCE_FALL
)


class Sessions(NamedTuple):
    """The index. Sessions are numbered from the oldest, postings stand newest session first."""

    start_S1: I64
    item_P: npt.NDArray[np.int32]
    post_start_N1: I64
    post_session_E: npt.NDArray[np.int32]
    post_position_E: npt.NDArray[np.int8]
    """Last place of the item in that session."""
    rarity_N: F64
    """1 + log(sessions / sessions with the item)."""


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


def neighbour_items(
    sessions: Sessions, past_BL: I64, *, per_item: int, nearest: int
) -> tuple[I64, I64, F64]:
    """Items of the most similar sessions of every user.

    Args:
        sessions: the index.
        past_BL: the user's items, newest first; negative where there is none, or it is unknown.
        per_item: newest sessions looked at for an item.
        nearest: sessions kept for a user.

    Returns:
        user, item and score of every entry; an item stands there once for each session.
    """
    num_sessions = max(len(sessions.start_S1) - 1, 1)
    last_BL = past_BL[:, :LAST].copy()
    for step in range(1, last_BL.shape[1]):  # an item counts where it is newest
        again = (last_BL[:, :step] == last_BL[:, step : step + 1]).any(axis=1)
        last_BL[again, step] = -1
    last_BL[last_BL >= len(sessions.rarity_N)] = -1
    user_E, place_E = np.nonzero(last_BL >= 0)
    item_E = last_BL[user_E, place_E]
    begin = sessions.post_start_N1[item_E]
    count = np.minimum(sessions.post_start_N1[item_E + 1] - begin, per_item)
    at = ranges(begin, count)
    age = num_sessions - 1 - sessions.post_session_E[at].astype(np.int64)
    # One whole number per (user, session, place, position), newest session first: sorts fast.
    key = np.repeat(user_E * num_sessions, count) + age
    key = (key << _PLACE_BITS) + np.repeat(place_E, count)
    key = (key << _POSITION_BITS) + sessions.post_position_E[at]
    key.sort()
    pair = key >> (_PLACE_BITS + _POSITION_BITS)
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    if not len(first):
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, np.zeros(0)
    place = key >> _POSITION_BITS & ((1 << _PLACE_BITS) - 1)
    level = _LEVEL[np.add.reduceat(1 << place, first)]
    user, age = np.divmod(pair[first], num_sessions)
    position = key[first] & (PIECE - 1)
    best = ((user << _MASK_BITS) + level) * num_sessions + age
    best = (best << _POSITION_BITS) + position
    best.sort()
    position = best & (PIECE - 1)
    group, age = np.divmod(best >> _POSITION_BITS, num_sessions)
    user = group >> _MASK_BITS
    near = place_in_group(user) < nearest
    user, age, position = user[near], age[near], position[near]
    similarity = _SIMILARITY[_MASK_OF_LEVEL[group[near] & ((1 << _MASK_BITS) - 1)]]
    session = num_sessions - 1 - age
    begin = sessions.start_S1[session]
    count = sessions.start_S1[session + 1] - begin
    at = ranges(begin, count)
    distance = at - np.repeat(begin + position, count)
    item = sessions.item_P[at].astype(np.int64)
    score = np.repeat(similarity, count) * _NEARNESS[distance + PIECE]
    score *= np.where(item < 0, 0.0, sessions.rarity_N[np.maximum(item, 0)])
    kept = (distance != 0) & (item >= 0)
    return np.repeat(user, count)[kept], item[kept], score[kept]
