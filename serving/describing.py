"""The numbers of a candidate, by loops over what the memory knows of its user's last items.

One user after the other, compiled; sums are added up in an order that only the user's past and the
memory decide. What each column says stands in `features.py`. Knows no item ids and no graph. Shape
letters: N items, B users, L places of the past, newest first, R rows (candidates), F features, A
arena of a trail, H half-lives; R1 has a row before the first for what is no candidate.
"""

import math
from collections import namedtuple
from typing import Any

import numpy as np
import numpy.typing as npt

from afterclick.serving.candidates import Found, Past, Published
from afterclick.serving.compiled import compiled
from afterclick.serving.memory import Items
from afterclick.serving.trails import Trail

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

FEATURES = (
    *("model", "model_rank", "near", "near_share"),
    *("next", "next_new", "skip", "older", "back", "pair", "next_day", "reach", "reach_day"),
    *("is_last", "is_second", "is_third", "is_older", "times", "popular"),
    *("heat_30m", "heat_2h", "heat_6h", "heat_24h", "heat_72h", "heat_moves", "untouched", "age"),
    *("published", "published_gap", "newer", "unclicked"),
    *("length", "clicks", "last_count", "pair_count", "repeats", "idle"),
)

AT: Any = namedtuple("AT", FEATURES)(*range(len(FEATURES)))
"""Row of each feature."""

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

MODEL_FLOOR = -14.0
"""Logarithm of the model's share for what is far down, or has no row."""

HEAT_FLOOR = np.float32(-7.0)
"""Logarithm of a heat that is nearly gone."""

UNKNOWN_TIME = math.exp(12.0)
"""Stands for a time that nobody knows, in minutes, hours or items: longer than any other."""

_HOUR_MS = 3600.0 * 1000.0
_MINUTES = 1.0 / 60_000.0
"""Of a millisecond."""
_DAY_MS = 24.0 * _HOUR_MS
_PARTS = 64
"""Of a day, that halvings are tabled for."""
_DAYS_MAX = 100
"""After so many nothing is left that counts."""
_HALVED_DAY = 0.5 ** np.arange(_DAYS_MAX + 1)
_HALVED_PART = 0.5 ** (np.arange(_PARTS) / _PARTS)
_STEP_WEIGHT = np.array([0.0, 1.0, STEP_FALL, STEP_FALL**2, STEP_FALL**3])
"""Of an entry of the trail `later`, by its mark."""


@compiled
def newest(trail: Trail, owner: int, most: int) -> tuple[int, int]:
    """Where in the arena an owner's newest entries begin and end; a negative owner has none."""
    if owner < 0:
        return 0, 0
    end = trail.begin_N[owner] + trail.size_N[owner]
    return end - min(trail.size_N[owner], most), end


@compiled
def describe_all(
    past: Past,
    found: Found,
    model_R: F32,
    next_: Trail,
    later: Trail,
    back: Trail,
    items: Items,
    published: Published,
    row_N: I32,
    timed: bool,
    reach: bool,
) -> F32:
    """(F, R) what is known of all candidates; where a feature is a logarithm, what it is taken of.

    Columns that are not wanted hold ones.

    Args:
        past: of the users.
        found: their candidates.
        model_R: the model's score of each; very low where it has none.
        next_, later, back: trails of the memory.
        items: what it counts.
        published: what came out when.
        row_N: scratch.
        timed: whether columns that need times are wanted.
        reach: the same for `reach` and `reach_day`.
    """
    out_FR = np.ones((len(FEATURES), len(found.code_R)), np.float32)
    for user in range(len(past.item_BL)):
        begin, end = found.begin_B1[user], found.begin_B1[user + 1]
        for row in range(begin, end):
            row_N[found.code_R[row]] = row - begin + 1
        count_R = items.count_N[found.code_R[begin:end]].astype(np.float64)
        share_R = count_R * (1.0 / max(items.moves, 1))
        _scored(out_FR, begin, found, user, model_R, share_R)
        _transitions(out_FR, begin, past, user, next_, later, back, share_R, row_N, timed)
        if reach:
            _reach(out_FR, begin, end, past, user, next_, later, row_N)
        _repeats(out_FR, begin, end, past, user, row_N)
        _heats(out_FR, begin, end, past, user, found.code_R, items, timed)
        if timed:
            _publication(out_FR, begin, end, past, user, found.code_R, items, published)
        out_FR[AT.length, begin:end] = math.log(1.0 + past.length_B[user])
        out_FR[AT.clicks, begin:end] = math.log(1.0 + past.clicks_B[user])
        idle_ms = max(past.now_ms_B[user] - past.last_ms_B[user], 0)
        idle = math.log(1.0 + idle_ms / 1000.0) if past.length_B[user] > 0 else 0.0
        out_FR[AT.idle, begin:end] = idle
        for row in range(begin, end):
            row_N[found.code_R[row]] = 0
    return out_FR


@compiled
def _scored(out_FR: F32, begin: int, found: Found, user: int, model_R: F32, share_R: F64) -> None:
    near_R, place_R, norm, most = found.near_R, found.place_R, found.norm_B[user], 1e-9
    for row in range(begin, begin + len(share_R)):
        most = max(most, near_R[row])
    of_most, of_all = 1.0 / most, 1.0 / (found.near_B[user] + 1e-9)
    for row in range(begin, begin + len(share_R)):
        out_FR[AT.model, row] = min(max(model_R[row] - norm, MODEL_FLOOR), 0.0)
        out_FR[AT.model_rank, row] = 1 + place_R[row]
        out_FR[AT.near, row] = near_R[row] * of_most + 1e-3
        out_FR[AT.near_share, row] = near_R[row] * of_all + 1e-4
        out_FR[AT.popular, row] = share_R[row - begin] + 1e-6


@compiled
def _transitions(
    out_FR: F32,
    begin: int,
    past: Past,
    user: int,
    next_: Trail,
    later: Trail,
    back: Trail,
    share_R: F64,
    row_N: I32,
    timed: bool,
) -> None:
    num = len(share_R)
    # Row 0 takes what is no candidate.
    count_R1, new_R1, day_R1 = np.zeros(num + 1), np.zeros(num + 1), np.zeros(num + 1)
    pair_R1, later_R1, back_R1 = np.zeros(num + 1), np.zeros(num + 1), np.zeros(num + 1)
    older_R1 = np.zeros(num + 1)
    last, second = past.item_BL[user, 0], past.item_BL[user, 1]
    now_ms, item_A, mark_A, ms_A = past.now_ms_B[user], next_.item_A, next_.mark_A, next_.ms_A
    start, end = newest(next_, last, next_.window)
    size, day, pair = end - start, 0.0, 0.0
    for at in range(start, end):
        row = row_N[item_A[at]]
        count_R1[row] += 1.0
        if end - at <= NEW:
            new_R1[row] += 1.0
        if timed:
            fresh = halved(now_ms - ms_A[at])
            day_R1[row] += fresh
            day += fresh
        if second >= 0 and mark_A[at] == second:
            pair_R1[row] += 1.0
            pair += 1.0
    start, end = newest(later, last, later.window)
    skipped, later_A, step_A, back_A = 0.0, later.item_A, later.mark_A, back.item_A
    for at in range(start, end):
        weight = _STEP_WEIGHT[step_A[at]]
        later_R1[row_N[later_A[at]]] += weight
        skipped += weight
    start, end = newest(back, last, back.window)
    num_back = end - start
    for at in range(start, end):
        back_R1[row_N[back_A[at]]] += 1.0
    weight, weights = 1.0, 0.0
    for place in range(1, OLDER):
        start, end = newest(next_, past.item_BL[user, place], OLDER_NEWEST)
        share = weight / (end - start + 2.0)
        for at in range(start, end):
            older_R1[row_N[item_A[at]]] += share
        weights += weight
        weight *= STEP_FALL
    # A division takes as long as all else of a column.
    of_next, of_new, of_day = 1.0 / (size + 2.0), 1.0 / (min(size, NEW) + 1.0), 1.0 / (day + 1.0)
    of_skip, of_back = 1.0 / (size + skipped + 2.0), 1.0 / (num_back + 1.0)
    of_pair, of_older = 1.0 / (pair + 1.0), 1.0 / weights
    for row in range(num):
        share, at = share_R[row], begin + row
        count = count_R1[row + 1]
        out_FR[AT.next, at] = (count + 2 * share) * of_next + 1e-6
        out_FR[AT.next_new, at] = (new_R1[row + 1] + share) * of_new + 1e-5
        if timed:
            out_FR[AT.next_day, at] = (day_R1[row + 1] + share) * of_day + 1e-6
        out_FR[AT.pair, at] = (pair_R1[row + 1] + 1e-2) * of_pair
        out_FR[AT.skip, at] = (count + later_R1[row + 1] + 2 * share) * of_skip + 1e-6
        out_FR[AT.back, at] = (back_R1[row + 1] + share) * of_back + 1e-5
        out_FR[AT.older, at] = older_R1[row + 1] * of_older + 1e-4
    out_FR[AT.pair_count, begin : begin + num] = math.log(1.0 + pair)
    total = next_.total_N[last] if last >= 0 else 0
    out_FR[AT.last_count, begin : begin + num] = math.log(1.0 + total)


@compiled
def halved(age_ms: int) -> float:
    """2 ** -(age in days), of what is not negative: by tables, and what is left by a short series;
    off by less than 1e-9 of itself.
    """
    parts = min(max(age_ms, 0) * (_PARTS / _DAY_MS), float(_PARTS * _DAYS_MAX))
    whole = int(parts)
    left = (parts - whole) * (math.log(2.0) / _PARTS)
    series = 1.0 - left * (1.0 - left * (0.5 - left / 6.0))
    return float(_HALVED_DAY[whole // _PARTS] * _HALVED_PART[whole % _PARTS] * series)


@compiled
def _reach(
    out_FR: F32,
    begin: int,
    end: int,
    past: Past,
    user: int,
    next_: Trail,
    later: Trail,
    row_N: I32,
) -> None:
    plain_R1, day_R1 = np.zeros(end - begin + 1), np.zeros(end - begin + 1)
    row_E = np.empty(2 * REACH_NEWEST, np.int64)
    weight_E, fresh_E = np.empty(2 * REACH_NEWEST), np.empty(2 * REACH_NEWEST)
    fall, now_ms = 1.0, past.now_ms_B[user]
    for place in range(REACH):
        num, weights, freshness = 0, 0.0, 0.0
        for trail, is_later in ((next_, False), (later, True)):
            start, stop = newest(trail, past.item_BL[user, place], REACH_NEWEST)
            item_A, mark_A, ms_A = trail.item_A, trail.mark_A, trail.ms_A
            for at in range(start, stop):
                weight = _STEP_WEIGHT[mark_A[at]] if is_later else 1.0
                fresh = weight * halved(now_ms - ms_A[at])
                row_E[num], weight_E[num], fresh_E[num] = row_N[item_A[at]], weight, fresh
                num += 1
                weights += weight
                freshness += fresh
        plain, day = fall / (weights + 1.0), fall / (freshness + 0.3)
        for at in range(num):
            plain_R1[row_E[at]] += weight_E[at] * plain
            day_R1[row_E[at]] += fresh_E[at] * day
        fall *= STEP_FALL
    for row in range(begin, end):
        out_FR[AT.reach, row] = plain_R1[row - begin + 1] + 1e-3
        out_FR[AT.reach_day, row] = day_R1[row - begin + 1] + 1e-3


@compiled
def _repeats(out_FR: F32, begin: int, end: int, past: Past, user: int, row_N: I32) -> None:
    for column in (AT.is_last, AT.is_second, AT.is_third, AT.is_older):
        out_FR[column, begin:end] = 0.0
    again = 0
    for place in range(past.item_BL.shape[1]):
        code = past.item_BL[user, place]
        if code < 0:
            continue
        if code in past.item_BL[user, place + 1 :]:
            again += 1
        row = begin + row_N[code] - 1
        if row < begin:
            continue
        if out_FR[AT.times, row] == 1.0:  # newest place first
            if place < 3:
                out_FR[AT.is_last + place, row] = 1.0
            else:
                out_FR[AT.is_older, row] = 1.0 / math.log(place)
        out_FR[AT.times, row] += 1.0
    out_FR[AT.repeats, begin:end] = again / max(past.length_B[user], 1)


@compiled
def _heats(
    out_FR: F32,
    begin: int,
    end: int,
    past: Past,
    user: int,
    code_R: I64,
    items: Items,
    timed: bool,
) -> None:
    now_ms, num_heats = past.now_ms_B[user], len(items.half_life_H)
    first = 0 if timed else num_heats - 1
    tick = np.float32(math.log(2.0) / items.ticks)
    now_H, total_H = np.empty(num_heats, np.int64), np.empty(num_heats, np.float32)
    for heat in range(num_heats):
        now = now_ms if heat < num_heats - 1 else items.moves
        now_H[heat] = now * items.ticks // items.half_life_H[heat]
        # In logarithms a half-life is a difference; what is nearly gone is all the same.
        spent = max(now_H[heat] - items.total_tick_H[heat], 0) * tick
        total_H[heat] = max(math.log(items.total_heat_H[heat] + 1.0) - spent, 0.0)
    # Item by item as it lies in memory, then column by column.
    ticks, log_heats = items.tick_NH.ravel(), items.log_heat_NH.ravel()
    num = end - begin
    tick_E, log_heat_E = np.empty(num * num_heats, np.int64), np.empty(num * num_heats, np.float32)
    for row in range(num):
        at, source = row * num_heats, code_R[begin + row] * num_heats
        for heat in range(num_heats):
            tick_E[at + heat], log_heat_E[at + heat] = (
                ticks[source + heat],
                log_heats[source + heat],
            )
    for heat in range(first, num_heats):
        now, total = now_H[heat], total_H[heat]
        out_R = out_FR[AT.heat_30m + heat]
        for row in range(num):
            cold = np.float32(max(now - tick_E[row * num_heats + heat], 0)) * tick
            own = log_heat_E[row * num_heats + heat] - cold
            out_R[begin + row] = (own if own > HEAT_FLOOR else HEAT_FLOOR) - total
    if not timed:
        return
    count_N, first_ms_N, last_ms_N = items.count_N, items.first_ms_N, items.last_ms_N
    for row in range(begin, end):
        code = code_R[row]
        if count_N[code] == 0:
            out_FR[AT.untouched, row] = out_FR[AT.age, row] = UNKNOWN_TIME
        else:
            out_FR[AT.untouched, row] = 1.0 + max(now_ms - last_ms_N[code], 0) * _MINUTES
            out_FR[AT.age, row] = 1.0 + max(now_ms - first_ms_N[code], 0) * _MINUTES


@compiled
def _publication(
    out_FR: F32,
    begin: int,
    end: int,
    past: Past,
    user: int,
    code_R: I64,
    items: Items,
    published: Published,
) -> None:
    now_ms, last = past.now_ms_B[user], past.item_BL[user, 0]
    last_ms = published.ms_N[last] if last >= 0 else 0
    ms_N, sorted_ms, count_N = published.ms_N, published.sorted_ms, items.count_N
    num_out = np.searchsorted(sorted_ms, now_ms, side="right")
    for row in range(begin, end):
        ms = ms_N[code_R[row]]
        out_FR[AT.published, row] = out_FR[AT.newer, row] = UNKNOWN_TIME
        out_FR[AT.published_gap, row] = 0.0
        if ms > 0:
            out_FR[AT.published, row] = max(now_ms - ms, 0) / _HOUR_MS + 0.1
            before = np.searchsorted(sorted_ms, ms, side="right")
            out_FR[AT.newer, row] = 1.0 + max(num_out - before, 0)
            if last_ms > 0:
                gap_h = (ms - last_ms) / _HOUR_MS
                out_FR[AT.published_gap, row] = math.copysign(math.log(1.0 + abs(gap_h)), gap_h)
        out_FR[AT.unclicked, row] = 1.0 if count_N[code_R[row]] == 0 else 0.0
