"""What the blend knows of a candidate: columns of numbers, most of them logarithms.

Candidates of several users stand in rows, user after user. Every number of a row depends on its own
user, the memory and the model alone, never on who else is in the batch. The trainer fits on exactly
these. Shape letters: R rows (candidates), B users, E entries of the memory, L places of the past,
newest first, C the model's best items, F features.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.engine import F32
from afterclick.serving.memory import HALF_LIVES_MS, HOUR_MS, TICKS, Memory
from afterclick.serving.trails import WINDOW

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

RECENT = 32
"""Interactions of a past that are looked at."""

OLDER = 4
"""Places of the past whose trails are followed, the last one apart from the others."""

OLDER_NEWEST = 128
"""Newest transitions that are read of every place but the last."""

STEP_FALL = 0.6
"""Weight of a transition for every further step between its two items."""

REACH = 6
"""Places of the past that `reach` follows, as far as the trails of items tell."""

REACH_NEWEST = 96
"""Newest entries that it reads of each place, of either trail."""

NEW = 32
"""Newest transitions that `next_new` counts."""

_HEATS = ("heat_30m", "heat_2h", "heat_6h", "heat_24h", "heat_72h", "heat_moves")

MODEL_FEATURES = ("model", "model_rank")
NEIGHBOUR_FEATURES = ("near", "near_share")
REACH_FEATURES = ("reach", "reach_day")
"""What came within three steps after any of the last items, and of that what is a day old or less:
for streams whose items change by the hour; elsewhere the neighbours say as much.
"""
TRANSITION_FEATURES = (
    *("next", "next_new", "skip", "older", "back", "pair", "next_day"),
    *REACH_FEATURES,
)
REPEAT_FEATURES = ("is_last", "is_second", "is_third", "is_older", "times")
POPULARITY_FEATURES = ("popular", *_HEATS, "untouched", "age")
PUBLICATION_FEATURES = ("published", "published_gap", "newer", "unclicked")
"""By the catalogue: since when, against the user's last item, and how many came out since."""

CONTEXT_FEATURES = ("length", "clicks", "last_count", "pair_count", "repeats", "idle")
"""Of the user alone: what the others are worth depends on them."""

FEATURES = (
    *MODEL_FEATURES,
    *NEIGHBOUR_FEATURES,
    *TRANSITION_FEATURES,
    *REPEAT_FEATURES,
    *POPULARITY_FEATURES,
    *PUBLICATION_FEATURES,
    *CONTEXT_FEATURES,
)

TIMED = frozenset(
    {"next_day", *REACH_FEATURES, *_HEATS[:-1], "untouched", "age", "idle", *PUBLICATION_FEATURES}
)
"""These say nothing where a log has no times."""

SPARSE = 256
"""So many pairs of user and code for each entry are too many to be looked through."""

MODEL_FLOOR = -14.0
"""Logarithm of the model's share for what is far down, or has no row."""

_COLUMN = {name: at for at, name in enumerate(FEATURES)}


class Columns:
    """Features by name; logarithms of all that want them are taken together."""

    def __init__(self, num_rows: int) -> None:
        self._out_FR = np.zeros((len(FEATURES), num_rows), np.float32)
        self._is_log_F = np.zeros(len(FEATURES), bool)

    def __call__(self, name: str, value_R: npt.NDArray[Any]) -> None:
        """Take a feature's column."""
        self._out_FR[_COLUMN[name]] = value_R

    def log(self, name: str, value_R: npt.NDArray[Any]) -> None:
        """Take a column whose logarithm is the feature."""
        self._out_FR[_COLUMN[name]] = value_R
        self._is_log_F[_COLUMN[name]] = True

    def done(self) -> F32:
        """(R, F), column after column in memory."""
        bounds = np.flatnonzero(np.diff(self._is_log_F, prepend=False, append=False)).tolist()
        for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
            # Single precision, and never strided: one kernel for every place in an array.
            part_FR = self._out_FR[begin:end]
            np.log(part_FR, out=part_FR)
        return self._out_FR.T


class Past(NamedTuple):
    """What users touched since they began, or were reset."""

    item_BL: I64
    """Codes, newest first; negative where there is none, or the memory does not know it."""
    length_B: I64
    """At most `RECENT`."""
    clicks_B: I64
    last_ms_B: I64
    now_ms_B: I64


class Pool:
    """The candidates of some users: distinct pairs of user and code, in that order."""

    def __init__(
        self,
        key_E: I64,
        num_users: int,
        num_codes: int,
        *,
        hidden_N: npt.NDArray[np.bool_] | None = None,
        dropped: I64 | None = None,
    ) -> None:
        """Of these keys, user x `num_codes` + code, without hidden codes and dropped keys."""
        self.num_codes = num_codes
        self._slots = _slots("pool")
        key_R = self._slots.distinct(key_E, num_users * num_codes, without=dropped)
        bound_B1 = np.arange(num_users + 1) * num_codes
        begin_B1 = np.searchsorted(key_R, bound_B1)
        if hidden_N is not None:
            code_R = key_R - np.repeat(bound_B1[:-1], np.diff(begin_B1))
            shown_R = ~hidden_N.take(code_R)
            if not shown_R.all():
                key_R = key_R.compress(shown_R)
                begin_B1 = np.searchsorted(key_R, bound_B1)
        self.key_R, self.begin_B1 = key_R, begin_B1
        self.size_B = begin_B1[1:] - begin_B1[:-1]
        self.user_R = np.arange(num_users).repeat(self.size_B)
        self.code_R = key_R - bound_B1[:-1].repeat(self.size_B)
        self._slots.put(key_R, num_users * num_codes)

    def __len__(self) -> int:
        return len(self.key_R)

    def spread(self, value_B: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(R,) each candidate's user's value."""
        return value_B.repeat(self.size_B)

    def rows(self, user_E: I64, code_E: I32 | I64) -> I32:
        """Row of each entry's pair, counted from 1; 0 where it is no candidate."""
        return self._slots.numbers(user_E * self.num_codes + code_E)

    def find(self, user_E: I64, code_E: I64) -> tuple[I64, I64]:
        """Entries whose pair is a candidate, and its row."""
        row_E = self.rows(user_E, code_E)
        hit = np.flatnonzero(row_E)
        return hit, row_E.take(hit).astype(np.int64) - 1

    def sums(self, user_E: I64, code_E: I32 | I64, weight_E: F64 | None = None) -> F64:
        """(R,) sum of the weights, or the number, of each candidate's entries."""
        row_E = self.rows(user_E, code_E)
        sum_R1 = np.bincount(row_E, weight_E, len(self) + 1).astype(np.float64, copy=False)
        return sum_R1[1:]


class Sums:
    """Weights of some users' entries, added up by their pair of user and code."""

    def __init__(
        self, user_E: I64, code_E: I64, weight_E: F64, num_users: int, num_codes: int
    ) -> None:
        """Entries stand user after user."""
        key_E = user_E * num_codes + code_E
        self._slots = _slots("sums")
        number_E = self._slots.number(key_E, num_users * num_codes)
        self.key_G = self._slots.key_G
        """The pairs, user after user."""
        sum_G1 = np.bincount(number_E, weight_E, len(self.key_G) + 1)
        self._sum_G1: F64 = sum_G1.astype(np.float64, copy=False)
        self.sum_G: F64 = self._sum_G1[1:]
        """Of each pair."""
        bound_B1 = np.searchsorted(user_E, np.arange(num_users + 1))
        self.all_B = _of_users(weight_E, bound_B1[1:] - bound_B1[:-1])
        """Of each user's entries."""

    def of(self, key_R: I64) -> F64:
        """(R,) sums of these pairs; 0 for one without an entry."""
        return self._sum_G1[self._slots.numbers(key_R)]


class _Slots:
    """A number for some pairs of user and code, 0 for all others: looked up without a search."""

    def __init__(self) -> None:
        self.key_G = np.zeros(0, np.int64)
        """Numbered from 1."""
        self._slot = np.zeros(0, np.int32)
        self._mark = np.zeros(0, bool)

    def distinct(self, key_E: I64, size: int, *, without: I64 | None = None) -> I64:
        """Pairs of these entries, each once, rising: marked, then read off in order."""
        if size > SPARSE * len(key_E):  # sorting these costs less than looking through all marks
            found: I64 = np.sort(key_E)
            found = found[np.append(found[:-1] != found[1:], np.ones(min(len(found), 1), bool))]
            if without is not None:
                found = found[~np.isin(found, without)]
            return found
        if len(self._mark) < size:
            self._mark = np.zeros(size, bool)
        mark = self._mark[:size]
        try:
            mark[key_E] = True
            if without is not None:
                mark[without] = False
            found = np.flatnonzero(mark)
        finally:
            mark[key_E] = False
        return found

    def put(self, key_G: I64, size: int) -> None:
        """Number these pairs, all different, of `size` that there may be; forget those before."""
        self._clean(size)
        self.key_G = key_G
        self._slot[key_G] = np.arange(1, len(key_G) + 1, dtype=np.int32)

    def number(self, key_E: I64, size: int) -> I32:
        """`put` the pairs of these entries, in order of their last one; the entries' numbers."""
        self._clean(size)
        self.key_G = key_E
        at_E = np.arange(1, len(key_E) + 1, dtype=np.int32)
        self._slot[key_E] = at_E
        self.key_G = key_E.compress(self.numbers(key_E) == at_E)
        self._slot[self.key_G] = at_E[: len(self.key_G)]
        return self.numbers(key_E)

    def numbers(self, key_E: I64) -> I32:
        """Numbers of these pairs."""
        return self._slot.take(key_E, mode="clip")  # without a look at every index: twice as fast

    def _clean(self, size: int) -> None:
        if len(self._slot) < size:
            self._slot = np.zeros(size, np.int32)
        else:
            self._slot[self.key_G] = 0


class Published(NamedTuple):
    """When items were published, as the catalogue says."""

    ms_N: I64
    """0 where it does not say."""
    sorted_ms: I64
    """Of those that it says, rising."""
    sorted_code: I64


class Scored(NamedTuple):
    """The model's scores."""

    best_BC: F32
    """Falling."""
    own_R: F32
    """Of each candidate; very low where it has no row, or is hidden."""
    user_E: I64
    code_E: I64
    place_E: I64
    """Of each user's best items: places from 0, equal scores sharing the best one."""


def describe(
    pool: Pool,
    past: Past,
    memory: Memory,
    scored: Scored,
    near: Sums,
    published: Published,
    *,
    timed: bool = True,
    reach: bool = True,
) -> F32:
    """(R, F) all features of all candidates, in the order of `FEATURES`; column after column.

    Args:
        pool: the candidates.
        past: of their users.
        memory: as it is now.
        scored: what the model says.
        near: what the session neighbours say.
        published: what the catalogue says.
        timed: whether the columns of `TIMED` are wanted; else they may be zeros.
        reach: the same for the columns of `REACH_FEATURES`.
    """
    put, code_R = Columns(len(pool)), pool.code_R
    _model(put, pool, scored)
    score_R = near.of(pool.key_R)
    most_B = np.maximum(np.maximum.reduceat(np.append(score_R, 0.0), pool.begin_B1)[:-1], 1e-9)
    put.log("near", score_R / pool.spread(most_B) + 1e-3)
    put.log("near_share", score_R / pool.spread(near.all_B + 1e-9) + 1e-4)
    share_R = memory.count_N[code_R] / max(memory.moves, 1)
    _transitions(put, pool, past, memory, share_R, timed=timed)
    if reach:
        _reach(put, pool, past, memory)
    _repeats(put, pool, past)
    put.log("popular", share_R + 1e-6)
    _heats(put, pool, past, memory, timed=timed)
    if timed:
        _publication(put, pool, past, memory, published)
    put("length", pool.spread(_log(1.0 + past.length_B)))
    put("clicks", pool.spread(_log(1.0 + past.clicks_B)))
    idle_B = np.maximum(past.now_ms_B - past.last_ms_B, 0)
    put("idle", pool.spread(np.where(past.length_B > 0, _log(1.0 + idle_B / 1000.0), 0.0)))
    return put.done()


def columns_of(names: list[str]) -> list[int]:
    """Places of these features among all.

    Raises:
        KeyError: no such feature.
    """
    return [_COLUMN[name] for name in names]


def _model(put: Columns, pool: Pool, scored: Scored) -> None:
    best_BC = scored.best_BC
    top_B = best_BC[:, 0]
    mass_B = _log(np.exp(best_BC - top_B[:, None]).sum(axis=1))
    share_R = scored.own_R - pool.spread(top_B + mass_B)
    put("model", np.clip(share_R, MODEL_FLOOR, 0.0))
    hit, row = pool.find(scored.user_E, scored.code_E)
    place_R = np.full(len(pool), best_BC.shape[1])
    place_R[row] = np.minimum(scored.place_E[hit], best_BC.shape[1])
    put.log("model_rank", 1.0 + place_R)


def _transitions(
    put: Columns, pool: Pool, past: Past, memory: Memory, share_R: F64, *, timed: bool
) -> None:
    num_rows = len(pool) + 1
    num_users = len(past.item_BL)
    last_B, second_B = past.item_BL[:, 0], past.item_BL[:, 1]
    # The last item's trail, and the newest part of those before it, in one go.
    owner_X = past.item_BL[:, :OLDER].T.ravel()
    count_X, at_E = memory.next.newest(owner_X, _MOST_L.repeat(num_users))
    user_E = np.arange(num_users).repeat(OLDER).reshape(-1, OLDER).T.ravel().repeat(count_X)
    row_E = pool.rows(user_E, memory.next.item_A.take(at_E, mode="clip"))
    size_XB = count_X.reshape(OLDER, num_users)
    size_B = size_XB[0]
    end_B = size_B.cumsum()
    of_last = slice(int(end_B[-1]))
    at_older = row_E[of_last.stop :] + (np.arange(OLDER - 1) * num_rows).repeat(
        size_XB[1:].sum(axis=1)
    )
    at_E, user_E, row_E = at_E[of_last], user_E[of_last], row_E[of_last]

    count_R = np.bincount(row_E, minlength=num_rows)[1:]
    put.log("next", (count_R + 2 * share_R) / pool.spread(size_B + 2.0) + 1e-6)
    new = end_B.repeat(size_B) - np.arange(len(row_E)) <= NEW
    new_R = np.bincount(row_E.compress(new), minlength=num_rows)[1:]
    put.log("next_new", (new_R + share_R) / pool.spread(np.minimum(size_B, NEW) + 1.0) + 1e-5)
    if timed:
        age_E = past.now_ms_B.repeat(size_B) - memory.next.ms_A.take(at_E, mode="clip")
        fresh_E = np.exp2(-(np.maximum(age_E, 0) / (24.0 * HOUR_MS)))
        day_R = np.bincount(row_E, fresh_E, num_rows)[1:]
        put.log("next_day", (day_R + share_R) / pool.spread(_of_users(fresh_E, size_B) + 1) + 1e-6)
    same = memory.next.mark_A.take(at_E, mode="clip") == np.maximum(second_B, 0).repeat(size_B)
    same &= (second_B >= 0).repeat(size_B)
    pair_R = np.bincount(row_E.compress(same), minlength=num_rows)[1:]
    pair_B = np.bincount(user_E.compress(same), minlength=num_users)
    put.log("pair", (pair_R + 1e-2) / pool.spread(pair_B + 1.0))
    put("pair_count", pool.spread(_log(1.0 + pair_B)))
    total_B = np.where(last_B < 0, 0, memory.next.total_N[np.maximum(last_B, 0)])
    put("last_count", pool.spread(_log(1.0 + total_B)))
    later_B, at_E = memory.later.newest(last_B, WINDOW)
    weight_E = _STEP_WEIGHT.take(memory.later.mark_A.take(at_E, mode="clip"))
    skip_R = count_R + pool.sums(
        np.arange(num_users).repeat(later_B),
        memory.later.item_A.take(at_E, mode="clip"),
        weight_E,
    )
    skip_B = size_B + _of_users(weight_E, later_B)
    put.log("skip", (skip_R + 2 * share_R) / pool.spread(skip_B + 2) + 1e-6)
    back_B, at_E = memory.back.newest(last_B, WINDOW)
    back_R = pool.sums(
        np.arange(num_users).repeat(back_B), memory.back.item_A.take(at_E, mode="clip")
    )
    put.log("back", (back_R + share_R) / pool.spread(back_B + 1.0) + 1e-5)
    found_XR = np.bincount(at_older, minlength=(OLDER - 1) * num_rows)
    older_R, weight = np.zeros(len(pool)), 0.0
    for place, found_R in enumerate(found_XR.reshape(OLDER - 1, num_rows)[:, 1:]):
        older_R += STEP_FALL**place * found_R / pool.spread(size_XB[place + 1] + 2.0)
        weight += STEP_FALL**place
    put.log("older", older_R / weight + 1e-4)


def _reach(put: Columns, pool: Pool, past: Past, memory: Memory) -> None:
    num_users = len(past.item_BL)
    # Place after place, so that no sum depends on who else is asked for.
    owner_X = past.item_BL[:, :REACH].T.ravel()
    user_X = np.tile(np.arange(num_users), REACH)
    trails = []
    all_X, all_day_X = np.zeros(len(owner_X)), np.zeros(len(owner_X))
    for trail, weight_of_mark in ((memory.next, None), (memory.later, _STEP_WEIGHT)):
        count_X, at_E = trail.newest(owner_X, REACH_NEWEST)
        age_E = past.now_ms_B[user_X].repeat(count_X) - trail.ms_A.take(at_E, mode="clip")
        weight_E = np.ones(len(at_E))
        if weight_of_mark is not None:
            weight_E = weight_of_mark.take(trail.mark_A.take(at_E, mode="clip"))
        fresh_E = weight_E * np.exp2(-(np.maximum(age_E, 0) / (24.0 * HOUR_MS)))
        row_E = pool.rows(user_X.repeat(count_X), trail.item_A.take(at_E, mode="clip"))
        trails.append((count_X, row_E, weight_E, fresh_E))
        all_X += _of_users(weight_E, count_X)
        all_day_X += _of_users(fresh_E, count_X)
    fall_X = (STEP_FALL ** np.arange(REACH)).repeat(num_users)
    own_X, own_day_X = fall_X / (all_X + 1.0), fall_X / (all_day_X + 0.3)
    plain_R1, day_R1 = np.zeros(len(pool) + 1), np.zeros(len(pool) + 1)
    for count_X, row_E, weight_E, fresh_E in trails:
        plain_R1 += np.bincount(row_E, weight_E * own_X.repeat(count_X), len(plain_R1))
        day_R1 += np.bincount(row_E, fresh_E * own_day_X.repeat(count_X), len(day_R1))
    put.log("reach", plain_R1[1:] + 1e-3)
    put.log("reach_day", day_R1[1:] + 1e-3)


def _of_users(weight_E: F64, size_B: I64) -> F64:
    """(B,) sums of the weights of so many entries each, user after user."""
    sum_B = np.zeros(len(size_B))
    some = np.flatnonzero(size_B)
    if len(some):
        sum_B[some] = np.add.reduceat(weight_E, (size_B.cumsum() - size_B)[some])
    return sum_B


def _repeats(put: Columns, pool: Pool, past: Past) -> None:
    # From the oldest to the newest, so that the newest place of an item is written last.
    user_E, back_E = np.nonzero(past.item_BL[:, ::-1] >= 0)
    place_E = past.item_BL.shape[1] - 1 - back_E
    hit, row = pool.find(user_E, past.item_BL[user_E, place_E])
    ago_R = np.full(len(pool), -1, np.int64)
    ago_R[row] = place_E[hit]
    for place, name in enumerate(("is_last", "is_second", "is_third")):
        put(name, (ago_R == place).astype(np.float32))
    put("is_older", np.where(ago_R > 2, 1.0 / _log(np.maximum(ago_R, 2) + 0.0), 0.0))
    put.log("times", 1.0 + np.bincount(row, minlength=len(pool)))
    known_BL = past.item_BL >= 0
    same_BLL = past.item_BL[:, :, None] == past.item_BL[:, None, :]
    again_BL = (same_BLL & _LATER_LL).any(axis=2) & known_BL
    repeats_B = again_BL.sum(axis=1) / np.maximum(past.length_B, 1)
    put("repeats", pool.spread(repeats_B))


def _heats(put: Columns, pool: Pool, past: Past, memory: Memory, *, timed: bool) -> None:
    code_R = pool.code_R
    now_R = pool.spread(past.now_ms_B)
    num_timed = len(HALF_LIVES_MS)
    now_BH = np.empty((len(past.now_ms_B), num_timed + 1), np.int64)
    now_BH[:, :-1] = past.now_ms_B[:, None] * TICKS // np.array(HALF_LIVES_MS)
    now_BH[:, -1] = memory.moves * TICKS // memory.half_life_moves
    # In logarithms a half-life is a difference; what is nearly gone is all the same.
    spent_BH = np.maximum(now_BH - memory.total_tick_H, 0) * _LOG_TICK
    all_BH = np.maximum(np.log(memory.total_heat_H + 1.0) - spent_BH, 0.0).astype(np.float32)
    columns = slice(0 if timed else num_timed, num_timed + 1)
    now_RH = now_BH[:, columns].repeat(pool.size_B, axis=0)
    age_RH = np.maximum(now_RH - memory.tick_NH.take(code_R, axis=0, mode="clip")[:, columns], 0)
    own_RH = memory.log_heat_NH.take(code_R, axis=0, mode="clip")[:, columns]
    own_RH = np.maximum(own_RH - age_RH.astype(np.float32) * _LOG_TICK, np.float32(-7.0))
    own_RH -= all_BH[:, columns].repeat(pool.size_B, axis=0)
    for name, own_R in zip(_HEATS[columns], own_RH.T, strict=True):
        put(name, own_R)
    if not timed:
        return
    never_R = memory.count_N.take(code_R, mode="clip") == 0
    put("untouched", _age(now_R - memory.last_ms_N.take(code_R, mode="clip"), never_R))
    put("age", _age(now_R - memory.first_ms_N.take(code_R, mode="clip"), never_R))


def _publication(
    put: Columns, pool: Pool, past: Past, memory: Memory, published: Published
) -> None:
    code_R = pool.code_R
    ms_R = published.ms_N[code_R]
    known_R = ms_R > 0
    age_R = np.maximum(pool.spread(past.now_ms_B) - ms_R, 0) / HOUR_MS
    put("published", np.where(known_R, _log(age_R + 0.1), 12.0))
    last_B = past.item_BL[:, 0]
    last_ms_B = np.where(last_B >= 0, published.ms_N[np.maximum(last_B, 0)], 0)
    last_ms_R = pool.spread(last_ms_B)
    gap_R = (ms_R - last_ms_R) / HOUR_MS
    gap_R = np.where(known_R & (last_ms_R > 0), gap_R, 0.0)
    put("published_gap", np.sign(gap_R) * _log(1.0 + np.abs(gap_R)))
    out_B = np.searchsorted(published.sorted_ms, past.now_ms_B, side="right")
    newer_R = pool.spread(out_B) - np.searchsorted(published.sorted_ms, ms_R, side="right")
    put("newer", np.where(known_R, _log(1.0 + np.maximum(newer_R, 0)), 12.0))
    put("unclicked", (memory.count_N[code_R] == 0).astype(np.float32))


def _age(ms_R: I64, never_R: npt.NDArray[np.bool_]) -> npt.NDArray[np.floating]:
    age_R = _log(1.0 + np.maximum(ms_R, 0) / 60_000.0)
    age_R[never_R] = 12.0
    return age_R


def _log(value: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    # Single precision, and never strided: one kernel for every place in an array.
    return np.log(value.astype(np.float32))


_LATER_LL = np.tri(RECENT, k=-1, dtype=bool).T
"""Places that are older than each place."""

_MOST_L = np.array([WINDOW] + [OLDER_NEWEST] * (OLDER - 1))

_STEP_WEIGHT = np.array([0.0, 1.0, STEP_FALL, STEP_FALL**2, STEP_FALL**3])

_LOG_TICK = np.float32(np.log(2.0) / TICKS)
"""What a tick takes from the logarithm of a heat."""

_LOCAL = threading.local()


def _slots(name: str) -> _Slots:
    """This thread's own; whoever takes them by the same name next makes the last one's void."""
    slots: _Slots | None = getattr(_LOCAL, name, None)
    if slots is None:
        slots = _Slots()
        setattr(_LOCAL, name, slots)
    return slots
