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

from afterclick.serving.trails import ranges

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
_ENTRY_BITS = _POSITION_BITS + _PLACE_BITS
_HASH_BITS = 12
"""Sessions that hold a leading item are known by so many bits: of those that do not, few pass."""
_NONE = np.iinfo(np.int64).max
_WEIGHT_L = np.exp(-np.arange(LAST) / PLACE_FALL)
_MASKS = np.arange(1 << _MASK_BITS)
_SIMILARITY = ((_MASKS[:, None] >> np.arange(LAST) & 1) * _WEIGHT_L).sum(axis=1)
_LEVEL = np.empty(len(_MASKS), np.int64)
_LEVEL[np.argsort(-_SIMILARITY, kind="stable")] = _MASKS
_MASK_OF_LEVEL = np.argsort(_LEVEL)
_BIT = 1 << np.arange(1 << _PLACE_BITS)
_NEWER_LL = np.tri(LAST, k=-1, dtype=bool)
"""Places that are newer than each place."""
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


class Lookup:
    """The index as it is read, with what would else be worked out anew for every user."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.num_sessions = max(len(sessions.start_S1) - 1, 1)
        age_E = self.num_sessions - 1 - sessions.post_session_E.astype(np.int64)
        self.post_key_E = age_E << _ENTRY_BITS | sessions.post_position_E
        """Age of a posting's session, 0 the newest; room for a place; position in the session."""
        self.user_shift = _ENTRY_BITS + self.num_sessions.bit_length()
        self.has_unknown = bool((sessions.item_P < 0).any())


def neighbour_items(
    lookup: Lookup, past_BL: I64, *, per_item: int, nearest: int
) -> tuple[I64, I64, F64]:
    """Items of the most similar sessions of every user.

    Args:
        lookup: the index.
        past_BL: the user's items, newest first; negative where there is none, or it is unknown.
        per_item: newest sessions looked at for an item.
        nearest: sessions kept for a user.

    Returns:
        user, item and score of every entry, user after user; an item stands there once for each
        session.
    """
    sessions, num_users = lookup.sessions, len(past_BL)
    key_E = _shared(lookup, past_BL[:, :LAST], per_item, nearest)
    pair_E = key_E >> _ENTRY_BITS
    first_G = np.flatnonzero(np.diff(pair_E, prepend=-1))
    if not len(first_G):
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, np.zeros(0)
    place_E = key_E >> _POSITION_BITS & ((1 << _PLACE_BITS) - 1)
    level_G = _LEVEL[np.add.reduceat(_BIT.take(place_E), first_G)]
    user_G = key_E[first_G] >> lookup.user_shift
    # What is behind the last level that is needed goes before the sort.
    level_of_user = user_G << _MASK_BITS | level_G
    count_BV = np.bincount(level_of_user, minlength=num_users << _MASK_BITS)
    count_BV = count_BV.reshape(num_users, -1)
    better_BV = np.cumsum(count_BV, axis=1) - count_BV
    needed = np.flatnonzero(better_BV.ravel().take(level_of_user) < nearest)
    first_G, level_G, user_G = first_G[needed], level_G[needed], user_G[needed]
    size_B = np.bincount(user_G, minlength=num_users)
    best_BG = np.full((num_users, int(size_B.max())), _NONE)
    width, end_B = best_BG.shape[1], np.cumsum(size_B)
    # One whole number per session: level, age, position.
    age_position_G = key_E.take(first_G) & ((1 << lookup.user_shift) - 1)
    offset_B = np.arange(num_users) * width - (end_B - size_B)
    best_BG.ravel()[np.arange(len(user_G)) + np.repeat(offset_B, size_B)] = (
        level_G << lookup.user_shift
    ) + age_position_G
    best_BG.sort(axis=1)
    near_BG = best_BG[:, :nearest]
    best_G = near_BG[near_BG != _NONE]
    user_G = np.repeat(np.arange(num_users), np.minimum(size_B, nearest))
    similarity_G = _SIMILARITY[_MASK_OF_LEVEL[best_G >> lookup.user_shift]]
    position_G = best_G & (PIECE - 1)
    age_G = (best_G & ((1 << lookup.user_shift) - 1)) >> _ENTRY_BITS
    session_G = lookup.num_sessions - 1 - age_G
    begin_G = sessions.start_S1[session_G]
    shared_G = begin_G + position_G
    # What stands before the shared item, and behind it.
    parts_G2 = np.stack([begin_G, shared_G + 1], axis=1)
    counts_G2 = np.stack([position_G, sessions.start_S1[session_G + 1] - shared_G - 1], axis=1)
    at_P = ranges(parts_G2.ravel(), counts_G2.ravel())
    count_G = counts_G2.sum(axis=1)
    item_P = sessions.item_P.take(at_P, mode="clip").astype(np.int64)
    nearness_P = _NEARNESS.take(at_P - np.repeat(shared_G - PIECE, count_G), mode="clip")
    score_P = np.repeat(similarity_G, count_G) * nearness_P
    score_P *= sessions.rarity_N.take(item_P, mode="clip")
    user_P = np.repeat(user_G, count_G)
    if lookup.has_unknown:
        known_P = item_P >= 0
        user_P, item_P, score_P = user_P[known_P], item_P[known_P], score_P[known_P]
    return user_P, item_P, score_P


def _shared(lookup: Lookup, last_BL: I64, per_item: int, nearest: int) -> I64:
    """Postings of the last items that may name one of the nearest sessions, sorted.

    Each is a whole number of user, age of the session, place in the past, position in the session.
    """
    num_users, num_places = last_BL.shape
    newer_LL = _NEWER_LL[:num_places, :num_places]
    again_BL = ((last_BL[:, :, None] == last_BL[:, None, :]) & newer_LL).any(axis=2)
    known_BL = (last_BL >= 0) & (last_BL < len(lookup.sessions.rarity_N)) & ~again_BL
    user_X, place_X = np.nonzero(known_BL)
    item_X = last_BL[user_X, place_X]
    begin_X = lookup.sessions.post_start_N1[item_X]
    count_X = np.minimum(lookup.sessions.post_start_N1[item_X + 1] - begin_X, per_item)
    # A place weighs more than all places behind it together. So where one has sessions enough, the
    # nearest ones hold its item, or one before it.
    many_BL = np.zeros((num_users, num_places), bool)
    many_BL[user_X, place_X] = count_X >= nearest
    lead_B = np.where(many_BL.any(axis=1), many_BL.argmax(axis=1), num_places)
    leads_X = place_X <= lead_B[user_X]
    key_X = (user_X << lookup.user_shift) + (place_X << _POSITION_BITS)
    found = []
    for part_X in (np.flatnonzero(leads_X), np.flatnonzero(~leads_X)):
        at_E = ranges(begin_X[part_X], count_X[part_X])
        key_E = np.repeat(key_X[part_X], count_X[part_X])
        key_E += lookup.post_key_E.take(at_E, mode="clip")
        found.append(key_E)
    lead_E, other_E = found
    if len(other_E):
        is_in = np.zeros(num_users << _HASH_BITS, bool)
        is_in[_hashed(lead_E, lookup.user_shift)] = True
        other_E = other_E.compress(is_in.take(_hashed(other_E, lookup.user_shift)))
    key_E = np.concatenate([lead_E, other_E])
    key_E.sort(kind="stable")  # runs that are sorted already are merged
    return key_E


def _hashed(key_E: I64, user_shift: int) -> I64:
    """User and the last bits of the session's age."""
    age_E = key_E >> _ENTRY_BITS & ((1 << _HASH_BITS) - 1)
    return (key_E >> user_shift << _HASH_BITS) + age_E
