"""Which items are worth describing to a user: what each of several sources names.

One user after the other, compiled (`compiled.py`). Nothing of a user's depends on who else is asked
for; codes, given as items came, decide nothing. Scratch arrays come in as zeros and are left as
zeros. Knows no item ids and no features. Shape letters: N items, B users, L places of the past,
newest first, R rows (candidates), S sessions, P their positions, E postings, X sessions and G items
of one user's neighbourhood, V sets of places, K the model's best rows.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import math
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.compiled import compiled
from afterclick.serving.trails import Trail

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

SOURCES = ("model", "transitions", "repeats", "popularity", "neighbours", "publication")
"""Where candidates come from; bits of `Found.source_R`, the first one lowest."""

LAST = 5
"""Places of the user's past whose sessions are looked up."""

PIECE = 32
"""Longest session in the index; a longer one is cut into pieces."""

PLACE_FALL = 1.0
"""A place's weight falls by exp(-1/this) for each step back. From the probe on yoochoose."""

DISTANCE_FALL = 2.0
"""An item's share of its session falls by exp(-1/this) for each step from the shared item."""

BACKWARD = 1.5
"""A step back from the shared item counts as so many forward."""

_MODEL, _TRANSITIONS, _REPEATS, _POPULARITY, _NEIGHBOURS, _PUBLICATION = (
    np.uint8(1 << bit) for bit in range(len(SOURCES))
)
_LEVELS = 1 << LAST
_SHARED = np.arange(_LEVELS)[:, None] >> np.arange(LAST) & 1
_SIMILARITY_V = (_SHARED * np.exp(-np.arange(LAST) / PLACE_FALL)).sum(axis=1)
"""By the set of shared places, a bit each."""
_LEVEL_V = np.empty(_LEVELS, np.int64)
_LEVEL_V[np.argsort(-_SIMILARITY_V, kind="stable")] = np.arange(_LEVELS)
_DISTANCES = np.arange(-PIECE, PIECE + 1)
_NEARNESS = np.exp(
    -(np.where(_DISTANCES < 0, -BACKWARD * _DISTANCES, _DISTANCES) - 1) / DISTANCE_FALL
)


class Past(NamedTuple):
    """What users touched since they began, or were reset."""

    item_BL: I64
    """Codes, newest first; negative where there is none, or the memory does not know it."""
    length_B: I64
    """At most L."""
    clicks_B: I64
    last_ms_B: I64
    now_ms_B: I64


class Sessions(NamedTuple):
    """The index of past sessions, numbered from the oldest; postings stand newest session first."""

    start_S1: I64
    item_P: I32
    """Negative where it is unknown."""
    post_start_N1: I64
    post_session_E: I32
    post_position_E: npt.NDArray[np.int8]
    """Last place of the item in that session."""
    rarity_N: F64
    """1 + log(sessions / sessions with the item)."""


class Published(NamedTuple):
    """When items were published, as the catalogue says."""

    ms_N: I64
    """0 where it does not say."""
    sorted_ms: I64
    """Of those that it says, rising."""
    sorted_code: I64


class Best(NamedTuple):
    """What a scan found, and where its rows stand in the memory."""

    score_BK: F32
    row_BK: I64
    code_of_row: I64
    num_rows: int
    masked: float
    """Scores up to half of this are of rows that must not be listed."""


class Left(NamedTuple):
    """Which codes are no candidates."""

    hidden_N: Bools
    begin_B1: I64
    code_E: I64
    """What each user leaves out."""
    num_B: I64
    """The same, with those that the memory does not know."""


class Sizes(NamedTuple):
    """How many candidates each source names; see `manifest.BlendSpec`."""

    model: int
    want: int
    """Candidates of a user at least; where all sources name fewer, the model's next ones follow."""
    neighbours: int
    sessions: int
    nearest: int
    followers: int
    own: int
    older: int
    newest: int
    popular: bool
    """Whether everybody is offered what is popular, or only who has no past that is known."""


class Scratch(NamedTuple):
    """A thread's own, all zeros between two calls."""

    row_N: I32
    sum_N: F64
    places_S: U8


class Found(NamedTuple):
    """Candidates of some users, user after user, in the order in which they were first named."""

    begin_B1: I64
    code_R: I64
    source_R: U8
    """A bit for each of `SOURCES` that named the candidate."""
    place_R: I64
    """By the model, from 0, equal scores sharing the best one; `Sizes.model` where it is behind."""
    score_R: F32
    """The model's, where it is not behind; else no number."""
    near_R: F64
    """What the nearest sessions say."""
    near_B: F64
    """The same of all items together."""
    norm_B: F64
    """Logarithm of the sum of the model's exponentiated best scores."""


_LOCAL = threading.local()


def scratch(num_codes: int, num_sessions: int) -> Scratch:
    """This thread's, for so many codes and sessions at least."""
    kept: Scratch | None = getattr(_LOCAL, "scratch", None)
    if kept is None or len(kept.row_N) < num_codes or len(kept.places_S) < num_sessions:
        room = num_codes + num_codes // 8  # the memory learns of new items one by one
        kept = _LOCAL.scratch = Scratch(
            np.zeros(room, np.int32), np.zeros(room), np.zeros(num_sessions, np.uint8)
        )
    return kept


@compiled
def near_items(
    sessions: Sessions,
    last_L: I64,
    per_item: int,
    nearest: int,
    sum_N: F64,
    places_S: U8,
    session_X: I64,
    position_X: I64,
    code_G: I64,
) -> int:
    """Items of the sessions most similar to a user's past, as `neighbours.py` says.

    Args:
        sessions: the index.
        last_L: the user's items; negative where there is none, or it is unknown.
        per_item: newest sessions looked at for an item.
        nearest: sessions kept.
        sum_N: zeros; gets what each item scores, but for its rarity.
        places_S: scratch, zeros before and after.
        session_X, position_X: scratch, room for one more than `LAST` x per_item.
        code_G: gets the items that score, in the order in which they were met; room for one more
            than nearest x (`PIECE` - 1).

    Returns:
        How many these are.
    """
    # Fields are read before the loops: within, each read would count references.
    start_S1, item_P, post_start_N1, session_E, position_E, rarity_N = sessions
    num = 0
    for place in range(min(LAST, len(last_L))):
        item = last_L[place]
        if item < 0 or item >= len(rarity_N) or item in last_L[:place]:
            continue
        begin = post_start_N1[item]
        for at in range(begin, min(post_start_N1[item + 1], begin + per_item)):
            session = session_E[at]
            places = places_S[session]
            # Written always and counted if new: a branch would be guessed wrong every third time.
            session_X[num], position_X[num] = session, position_E[at]
            num += places == 0
            places_S[session] = places | 1 << place
    count_V = np.zeros(_LEVELS, np.int64)
    for at in range(num):
        count_V[_LEVEL_V[places_S[session_X[at]]]] += 1
    edge, left = 0, nearest
    while edge < _LEVELS and count_V[edge] <= left:
        left -= count_V[edge]
        edge += 1
    found = 0
    # Sessions of one level were all met first in the list of one item: newest first.
    for at in range(num):
        session = session_X[at]
        places = places_S[session]
        places_S[session] = 0
        level = _LEVEL_V[places]
        if level > edge or (level == edge and left == 0):
            continue
        if level == edge:
            left -= 1
        start = start_S1[session]
        shared = start + position_X[at]
        similarity = _SIMILARITY_V[places]
        for entry in range(start, start_S1[session + 1]):
            code = item_P[entry]
            if entry == shared or code < 0:
                continue
            before = sum_N[code]
            code_G[found] = code
            found += before == 0.0
            sum_N[code] = before + similarity * _NEARNESS[entry - shared + PIECE]
    return found


@compiled
def best_near(code_G: I64, sum_G: F64, num: int, hash_N: U64) -> I64:
    """Codes of the highest sums; of equals those with the lower hash, which no code decides."""
    if len(code_G) <= num or num == 0:
        return code_G[:num]
    # The best of few groups are at least as many as wanted, and none of them is below the edge.
    width = -(-len(sum_G) // max(len(sum_G) // (2 * num), 1))
    highest_W = sum_G[:width].copy()
    for begin in range(width, len(sum_G), width):
        for at in range(begin, min(begin + width, len(sum_G))):
            highest_W[at - begin] = max(highest_W[at - begin], sum_G[at])
    least = np.partition(highest_W, width - num)[width - num]
    close_G, close = np.empty(len(sum_G), np.int64), np.empty(len(sum_G))
    num_close = 0
    for at in range(len(sum_G)):
        close_G[num_close], close[num_close] = code_G[at], sum_G[at]
        num_close += sum_G[at] >= least
    close_G, close = close_G[:num_close], close[:num_close]
    edge = np.partition(close, num_close - num)[num_close - num]
    equal_G = close_G[close == edge]
    above_G = close_G[close > edge]
    if len(above_G) + len(equal_G) > num:
        equal_G = equal_G[np.argsort(hash_N[equal_G])]
    return np.append(above_G, equal_G[: num - len(above_G)])


@compiled
def _name(
    code_E: I64, source: np.uint8, hidden_N: Bools, row_N: I32, code_R: I64, source_R: U8, num: int
) -> int:
    """A source names codes, none where negative; returns the number of candidates by now."""
    for code in code_E:
        if code < 0 or row_N[code] < 0 or hidden_N[code]:
            continue
        if row_N[code] == 0:
            code_R[num], source_R[num] = code, 0
            num += 1
            row_N[code] = num
        source_R[row_N[code] - 1] |= source
    return num


@compiled
def name_candidates(
    sizes: Sizes,
    past: Past,
    best: Best,
    left: Left,
    sessions: Sessions,
    trail: Trail,
    popular_X: I64,
    touched_X: I64,
    published: Published,
    hash_N: U64,
    scratch: Scratch,
) -> Found:
    """Candidates of all sources.

    Args:
        sizes: how many are wanted.
        past: of the users.
        best: the model's ranking, at least as deep as each user wants it.
        left: what is left out.
        sessions: where neighbours are looked for.
        trail: what came right after an item.
        popular_X: what is popular.
        touched_X: codes that everybody is offered.
        published: what came out when.
        hash_N: decides among equals, where codes must not.
        scratch: of at least so many codes and sessions.
    """
    score_BK, row_BK, code_of_row, num_rows, masked = best
    hidden_N, row_N, sum_N, item_A = left.hidden_N, scratch.row_N, scratch.sum_N, trail.item_A
    rarity_N = sessions.rarity_N
    num_users, width = score_BK.shape
    of_model, ranked = max(sizes.model, 1), max(sizes.model, sizes.want)
    room = ranked + sizes.neighbours + sizes.followers + 2 * sizes.older + sizes.own
    room = num_users * (room + len(popular_X) + len(touched_X) + sizes.newest)
    code_R, source_R = np.empty(room, np.int64), np.empty(room, np.uint8)
    place_R, score_R = np.full(room, of_model), np.full(room, np.nan, np.float32)
    begin_B1, norm_B = np.zeros(num_users + 1, np.int64), np.full(num_users, masked)
    near_R, near_B = np.empty(room), np.zeros(num_users)
    code_C, place_C = np.empty(ranked, np.int64), np.empty(of_model, np.int64)
    score_C = np.empty(of_model, np.float32)
    session_X = np.empty(LAST * sizes.sessions + 1, np.int64)
    position_X = np.empty(LAST * sizes.sessions + 1, np.int64)
    code_G = np.empty(sizes.nearest * (PIECE - 1) + 1, np.int64)
    sum_G = np.empty(len(code_G))
    num = 0
    for user in range(num_users):
        item_L = past.item_BL[user]
        own_left = left.code_E[left.begin_B1[user] : left.begin_B1[user + 1]]
        for code in own_left:
            row_N[code] = -1

        # A cut inside a group of equal scores would go by row: leave that group out. Where the cut
        # is depends on the user alone, however deep others make the scan.
        depth = ranked + left.num_B[user] + 1
        edge = score_BK[user, min(depth, width) - 1]
        place, shared, top, before, mass = 0, 0, 0.0, np.inf, 0.0
        for at in range(width):
            score, code = score_BK[user, at], code_of_row[row_BK[user, at]]
            if score <= masked / 2 or (score <= edge and depth < num_rows) or place == ranked:
                break
            if code < 0 or row_N[code] < 0:
                continue
            if place == 0:
                top = score
            if score != before:
                shared, before = place, score
            if place < of_model:
                mass += math.exp(score - top)
                place_C[place], score_C[place] = shared, score
            code_C[place] = code
            place += 1
        if place > 0:
            norm_B[user] = top + math.log(mass)
        named = min(sizes.model, place)
        num = _name(code_C[:named], _MODEL, hidden_N, row_N, code_R, source_R, num)

        for step in range(3):
            if item_L[step] >= 0:
                end = trail.begin_N[item_L[step]] + trail.size_N[item_L[step]]
                most = min(sizes.older if step else sizes.followers, trail.size_N[item_L[step]])
                code_E = item_A[end - most : end].astype(np.int64)
                num = _name(code_E, _TRANSITIONS, hidden_N, row_N, code_R, source_R, num)
        num = _name(item_L[: sizes.own], _REPEATS, hidden_N, row_N, code_R, source_R, num)
        if sizes.popular or (item_L < 0).all():
            num = _name(popular_X, _POPULARITY, hidden_N, row_N, code_R, source_R, num)
        num = _name(touched_X, _POPULARITY, hidden_N, row_N, code_R, source_R, num)
        num_near = near_items(
            sessions,
            item_L,
            sizes.sessions,
            sizes.nearest,
            sum_N,
            scratch.places_S,
            session_X,
            position_X,
            code_G,
        )
        total = 0.0
        for at in range(num_near):
            code = code_G[at]
            score = sum_N[code] * rarity_N[code]
            sum_N[code] = sum_G[at] = score
            total += score
        near_B[user] = total
        code_E = best_near(code_G[:num_near], sum_G[:num_near], sizes.neighbours, hash_N)
        num = _name(code_E, _NEIGHBOURS, hidden_N, row_N, code_R, source_R, num)
        end = np.searchsorted(published.sorted_ms, past.now_ms_B[user], side="right")
        code_E = published.sorted_code[max(end - sizes.newest, 0) : end]
        num = _name(code_E, _PUBLICATION, hidden_N, row_N, code_R, source_R, num)
        while num - begin_B1[user] < sizes.want and named < place:
            code_E = code_C[named : named + 1]
            num = _name(code_E, _MODEL, hidden_N, row_N, code_R, source_R, num)
            named += 1
        for at in range(min(place, of_model)):
            if row_N[code_C[at]] > 0:
                row = row_N[code_C[at]] - 1
                place_R[row], score_R[row] = place_C[at], score_C[at]

        for row in range(begin_B1[user], num):
            near_R[row] = sum_N[code_R[row]]
            row_N[code_R[row]] = 0
        for at in range(num_near):
            sum_N[code_G[at]] = 0.0
        for code in own_left:
            row_N[code] = 0
        begin_B1[user + 1] = num
    return Found(
        begin_B1,
        code_R[:num],
        source_R[:num],
        place_R[:num],
        score_R[:num],
        near_R[:num],
        near_B,
        norm_B,
    )
